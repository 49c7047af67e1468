"""The option `--base`, an adapter's base model, for every command that takes a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

__all__ = ["add_base"]


def add_base(parser: argparse._ActionsContainer) -> None:
    """Add the option."""
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the base model of a LoRA adapter: a folder or a hub id (default: the one that the "
        "adapter's adapter_config.json names)",
    )
