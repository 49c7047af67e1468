"""What this machine has: processors, a GPU, installed packages."""
