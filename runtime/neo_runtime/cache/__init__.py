"""The public KV cache, the prefix cache, and the account of their memory."""
