"""Generate text from a neo-onnx bundle with numpy, onnxruntime and tokenizers alone."""
