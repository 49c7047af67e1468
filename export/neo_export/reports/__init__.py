"""What commands show of their work: progress, memory, plots."""
