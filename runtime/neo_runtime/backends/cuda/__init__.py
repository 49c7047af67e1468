"""onnxruntime's CUDA provider: weights once, buffers bound once, steps captured."""
