"""One file an engine that runs the graphs."""
