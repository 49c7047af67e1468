"""`neo-diff`: what a bundle computes, against PyTorch or another bundle."""
