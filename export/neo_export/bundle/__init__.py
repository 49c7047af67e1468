"""Writes the bundle: graphs, weights and other files, checks, and the atomic rename into place."""
