"""Everything that needs a GPU, in one command: `make gpu-check`.

Correctness first, then speed beside PyTorch on the same GPU, then one report.
"""
