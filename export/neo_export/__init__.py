"""Turn a GPT-Neo checkpoint into a bundle of ONNX graphs over one copy of the weights."""
