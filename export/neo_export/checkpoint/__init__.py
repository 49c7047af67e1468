"""Finds, opens, checks and lazily reads a Hugging Face GPT-Neo checkpoint."""
