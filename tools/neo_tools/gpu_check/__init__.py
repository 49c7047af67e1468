"""All checks that need a GPU, in one command: `make gpu-check`.

It runs the tests, then benchmarks against PyTorch on the same GPU, and writes one report.
"""
