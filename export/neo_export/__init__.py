"""Turn a GPT-Neo checkpoint into a bundle of ONNX graphs over one copy of the weights.

Its parts; each imports only itself and those above it:

files        written whole or not at all, whatever is in them
reports      progress, memory and plots, for commands
tolerances   every limit of the project's comparisons
gpt_neo      the architecture as portable graphs
checkpoint   Hugging Face's files, checked and lazily read
statistics   what real text does inside a model
quantize     how a weight is stored in fewer bits
passes       graph rewrites, one per file
targets      which passes a kind of machine runs
decisions    what is asked of an export, and what follows from it
bundle       what is written, and how it is put in place
comparison   a bundle beside PyTorch
exporter     a checkpoint becomes a bundle: the order of things
engine       TensorRT plans of a bundle, and `neo-engine`
kernels      a decode step of a bundle as kernels of its own, and `neo-kernels`
command      `neo-export`
entry        where both commands begin
"""
