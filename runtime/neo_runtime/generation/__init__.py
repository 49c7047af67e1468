"""Continuations of prompts, in batches and as streams."""
