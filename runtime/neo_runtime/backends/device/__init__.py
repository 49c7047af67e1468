"""A GPU's memory, whose it is, and when it goes back, whatever the engine."""
