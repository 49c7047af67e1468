"""The CUDA backend: onnxruntime's CUDA provider with shared weights and captured decode steps."""
