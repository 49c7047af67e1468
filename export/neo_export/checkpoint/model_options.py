"""Options that belong to the name of a model, for every command that opens a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

__all__ = ["add_base", "add_tokenizer", "model_arguments"]


def add_base(parser: argparse._ActionsContainer) -> None:
    """Add `--base`, an adapter's base model."""
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the base model of a LoRA adapter: a folder or a hub id (default: the one that the "
        "adapter's adapter_config.json names)",
    )


def add_tokenizer(parser: argparse._ActionsContainer) -> None:
    """Add `--tokenizer`, for checkpoints that come without one."""
    parser.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="use the tokenizer of this folder or hub id, such as EleutherAI/gpt-neo-125m "
        "(default: the checkpoint's own)",
    )


def model_arguments(base: str | None, tokenizer: str | None) -> tuple[str, ...]:
    """These options as arguments for another command."""
    given = {"base": base, "tokenizer": tokenizer}
    return tuple(f"--{name}={value}" for name, value in given.items() if value is not None)
