"""GPU memory, its owners and when it is freed; independent of the engine."""
