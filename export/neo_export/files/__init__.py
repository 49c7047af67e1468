"""Files, whatever is in them: written whole or not at all, and as room for large arrays."""
