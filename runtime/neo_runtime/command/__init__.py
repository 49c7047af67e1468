"""`neo-generate`, `neo-verify`, and how every command ends."""
