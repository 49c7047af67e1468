"""A bundle on disk: its manifest, and whether all of it is there and fits."""
