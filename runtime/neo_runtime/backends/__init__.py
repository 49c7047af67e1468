"""One file an engine; `base` says what the runtime needs of each."""
