"""What each kind of machine runs: which passes, which inputs and outputs."""
