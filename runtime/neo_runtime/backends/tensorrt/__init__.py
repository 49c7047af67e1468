"""The TensorRT backend, which runs plans."""
