"""Prompts, documents and the tokenizer: text to token ids and back."""
