"""A bundle's hidden states against a reference: how far off, and from which place on."""
