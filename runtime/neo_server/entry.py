"""Entry point of the installed command."""

from __future__ import annotations

from neo_runtime.entry import entry

__all__ = ["serve"]

serve = entry("neo_server.command", heeds_sigterm=True)
