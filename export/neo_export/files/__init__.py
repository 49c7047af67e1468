"""Writes files and folders atomically, and memory-maps scratch files for large arrays."""
