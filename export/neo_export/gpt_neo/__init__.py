"""GPT-Neo written once, in standard ONNX operators: its parameters, its modules, its graphs."""
