"""Reads the statistics of a model's activations on real text that `neo-calibrate` wrote."""
