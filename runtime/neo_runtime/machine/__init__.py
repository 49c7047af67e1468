"""Properties of this machine: processors, memory, GPUs and installed packages."""
