"""The command line of `neo-export`."""
