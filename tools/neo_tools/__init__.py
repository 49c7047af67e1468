"""Tools around a bundle: benchmarks and rivals."""
