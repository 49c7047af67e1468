"""A Hugging Face GPT-Neo checkpoint: found, opened, checked and lazily read."""
