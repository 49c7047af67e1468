"""Run real text through a checkpoint and keep what quantization needs to know about it."""
