"""Requests that join a running batch."""
