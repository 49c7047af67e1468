"""Tools around a bundle: benchmarks and peers."""
