"""How a weight is stored in fewer bits: pure numpy, no graph."""
