"""Bundles on disk: the manifest, and the checks before a bundle is used."""
