"""Tools around a bundle: how right, how good and how fast it is.

Its parts; each imports only itself and those above it:

arguments        options that several commands have
model_shape      whether a checkpoint and a bundle are the same model, as far as sizes tell
installed_size   bytes of an installation
footprint        seconds of an import, and those bytes
worker           processes that answer requests
peers            other engines, each in an environment of its own
older_cpu        a command as on a CPU without the newest instructions
diff             `neo-diff`: a bundle beside PyTorch, position by position and place by place
evaluate         `neo-eval`: tasks of lm-evaluation-harness
bench            `neo-bench`: speed and memory beside the machine's limit and the peers
clients          many clients at once, in several ways of serving them
drafts           what speculative decoding saves
gpu_check        everything that needs a GPU: `make gpu-check`
entry            where the three commands begin
"""
