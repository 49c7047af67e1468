"""Which matrix needs which precision: measured, chosen, and checked on the bundle itself."""
