"""NVIDIA GPUs: onnxruntime with CUDA, and TensorRT."""
