"""Tools that measure the correctness, accuracy and speed of bundles.

Parts of this package; each imports only itself and those above it:

arguments        options that several commands have
model_shape      comparison of a checkpoint's sizes with those of a bundle
installed_size   size of an installation
footprint        import time, and size of the installation
worker           worker processes that answer requests
peers            other engines, each in an environment of its own
older_cpu        runs a command as on a CPU without the newest instructions
diff             `neo-diff`: a bundle compared with PyTorch, for each position and layer
evaluate         `neo-eval`: tasks of lm-evaluation-harness
bench            `neo-bench`: speed and memory, compared with the machine's limits and with peers
clients          throughput and latency with concurrent clients
drafts           the gain from speculative decoding
gpu_check        all checks that need a GPU: `make gpu-check`
entry            entry points of the three commands
"""
