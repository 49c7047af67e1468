"""The key/value cache as callers see it, and the account of all caches."""
