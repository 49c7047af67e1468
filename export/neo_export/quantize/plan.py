"""Weight plans: the storage of each weight matrix of a bundle, and the JSON file of a plan.

    {
     "schema_version": 1,
     "default": "int4:32",
     "weights": {
      "transformer.wte.weight": "int8",
      "transformer.h.*.mlp.c_proj.weight": "int4:16"
     }
    }

A storage is `fp32`, `fp16`, `int8`, or `int4:` and its block size. Keys are names in the checkpoint
or shell patterns of names. A name takes precedence over patterns; two patterns that disagree about
a weight are an error, so the order in the file does not matter. A tied table is one weight:
embedding and head read the same storage. The position table is not part of a plan.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from neo_runtime.errors import RequestError
from neo_runtime.json_input import parse_json

from neo_export.gpt_neo.parameters import POSITIONS, parts_of_packed
from neo_export.quantize.int4 import BLOCK_SIZES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

__all__ = [
    "PLAN_SCHEMA_VERSION",
    "Storage",
    "WeightPlan",
    "check_patterns",
    "is_planned",
]

PLAN_SCHEMA_VERSION = 1
_KINDS = ("fp32", "fp16", "int8", "int4")


@dataclass(frozen=True, order=True)
class Storage:
    """How one matrix is stored."""

    kind: str
    """"fp32", "fp16", "int8" or "int4"."""
    block_size: int | None = None
    """Consecutive inputs that share a scale, for int4; None for the other kinds."""

    @classmethod
    def parse(cls, text: str) -> Storage:
        """Read `fp32`, `fp16`, `int8`, or `int4:32`.

        Raises:
            RequestError: it is none of these.
        """
        kind, colon, block = text.partition(":")
        if kind == "int4" and block.isdecimal() and int(block) in BLOCK_SIZES:
            return cls(kind, int(block))
        if kind in _KINDS and kind != "int4" and not colon:
            return cls(kind)
        sizes = ", ".join(str(size) for size in BLOCK_SIZES)
        raise RequestError(
            f"storage {text!r} is unknown, expected fp32, fp16, int8, or int4: and a block size "
            f"({sizes}), such as int4:32"
        )

    def __str__(self) -> str:
        return self.kind if self.block_size is None else f"{self.kind}:{self.block_size}"

    def bytes_of(self, rows: int, columns: int) -> int:
        """Size in the weight file of a matrix [rows, columns] and its scales, in bytes."""
        if self.kind == "int4":
            assert self.block_size is not None
            return rows * columns // 2 + 4 * rows * (columns // self.block_size)
        if self.kind == "int8":
            return rows * columns + 4 * rows
        return rows * columns * (2 if self.kind == "fp16" else 4)


def is_planned(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a plan says how this parameter is stored: matrices, but not the position table."""
    return len(shape) == 2 and name != POSITIONS


@dataclass(frozen=True)
class WeightPlan:
    """A storage for every matrix."""

    default: Storage
    weights: tuple[tuple[str, Storage], ...] = ()
    """(Name in the checkpoint or shell pattern, its storage); the first match counts."""

    @classmethod
    def uniform(
        cls, kind: str, block_size: int | None = None, keep: Iterable[str] = ()
    ) -> WeightPlan:
        """A plan with one storage for all matrices but those that match `keep`: these are fp32."""
        return cls(Storage(kind, block_size)).keeping(keep)

    def of(self, name: str) -> Storage:
        """The storage of a matrix, by its name in the checkpoint.

        A layer's packed projection is stored like its parts: it exists only if they agree
        (`packs`).
        """
        name = parts_of_packed(name)[0]
        for pattern, storage in self.weights:
            if name == pattern or fnmatchcase(name, pattern):
                return storage
        return self.default

    def packs(self, names: Iterable[str]) -> bool:
        """Whether these matrices have the same storage, so that they may be packed into one."""
        return len({self.of(name) for name in names}) == 1

    def keeping(self, patterns: Iterable[str]) -> WeightPlan:
        """The same plan, with the weights that match these shell patterns in float32."""
        kept = tuple((pattern, Storage("fp32")) for pattern in patterns)
        return replace(self, weights=kept + self.weights)

    def replacing(self, old: str, new: Storage) -> WeightPlan:
        """The same plan, with another storage for everything of the kind `old`."""
        return WeightPlan(
            new if self.default.kind == old else self.default,
            tuple((n, new if s.kind == old else s) for n, s in self.weights),
        )

    def mentions(self, kind: str) -> bool:
        """Whether the default or any pattern has this kind of storage."""
        return kind in {self.default.kind, *(storage.kind for _, storage in self.weights)}

    def kinds(self, names: Iterable[str]) -> set[str]:
        """The kinds of storage that occur among these matrices."""
        return {self.of(name).kind for name in names}

    def bytes_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes of all the matrices among these parameters, scales included."""
        return sum(
            self.of(name).bytes_of(*shape)
            for name, shape in shapes.items()
            if is_planned(name, shape)
        )

    def check_model(self, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
        """Refuse a plan that does not fit a model.

        Args:
            shapes: shapes of the model's parameters, by name.
            source: how errors refer to the plan.

        Raises:
            RequestError: a name does not exist in the model, two patterns disagree, or no graph
                supports the mixture of kinds.
        """
        check_patterns((pattern for pattern, _ in self.weights), shapes, source)
        names = [name for name, shape in shapes.items() if is_planned(name, shape)]
        for name in names:
            self._check_name(name, source)
        kinds = self.kinds(names)
        if "fp16" in kinds and len(kinds) > 1:
            raise RequestError(
                f"{source} mixes {', '.join(sorted(kinds))}; fp16 cannot be mixed with others, "
                "because its graphs compute in float16. Use fp32 for weights that must stay exact"
            )

    def refuse_half(self, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
        """Refuse fp16 storage, for targets whose unquantized weights are float32.

        Raises:
            RequestError: the plan stores a matrix of the model in fp16.
        """
        if "fp16" in self.kinds(name for name, shape in shapes.items() if is_planned(name, shape)):
            raise RequestError(
                f"{source} stores weights in fp16, which this target cannot mix with integers; "
                "use fp32, or export with --fp16 instead of a plan"
            )

    def _check_name(self, name: str, source: str) -> None:
        if any(name == exact for exact, _ in self.weights):
            return
        found = {s: p for p, s in reversed(self.weights) if fnmatchcase(name, p)}
        if len(found) > 1:
            one, two = list(found.items())[:2]
            raise RequestError(
                f"{source}: {one[1]!r} says {one[0]} for {name}, and {two[1]!r} says {two[0]}; "
                "name the weight itself, or make the patterns agree"
            )

    def to_json(self) -> str:
        """The text of a plan file, canonical: the same plan gives the same bytes."""
        raw = {
            "schema_version": PLAN_SCHEMA_VERSION,
            "default": str(self.default),
            "weights": {name: str(storage) for name, storage in self.weights},
        }
        return json.dumps(raw, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> WeightPlan:
        """Read a plan file.

        Raises:
            RequestError: the file cannot be read or is not a plan.
        """
        try:
            raw = parse_json(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
        except OSError as error:
            raise RequestError(f"the plan {path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise RequestError(f"the plan {path} is not valid JSON: {error}") from error
        needed = {"schema_version", "default"}
        if not isinstance(raw, dict) or raw.keys() - {"weights"} != needed:
            raise RequestError(
                f"the plan {path} is not an object with the keys schema_version, default and, for "
                "weights that differ from the default, weights"
            )
        if raw["schema_version"] != PLAN_SCHEMA_VERSION:
            raise RequestError(
                f"the plan {path} has schema version {raw['schema_version']!r}, this neo-export "
                f"reads {PLAN_SCHEMA_VERSION}"
            )
        weights = raw.get("weights", {})
        texts = [raw["default"], *weights.values()] if isinstance(weights, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise RequestError(
                f"the plan {path}: expected a storage such as 'int8' as default, and an object of "
                "names and storages as weights"
            )
        try:
            pairs = [(name, Storage.parse(text)) for name, text in weights.items()]
            default = Storage.parse(raw["default"])
        except RequestError as error:
            raise RequestError(f"the plan {path}: {error}") from error
        patterns = [pair for pair in pairs if set(pair[0]) & set("*?[")]
        return cls(default, tuple(pair for pair in pairs if pair not in patterns) + tuple(patterns))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} occurs twice")
        found[key] = value
    return found


def check_patterns(
    patterns: Iterable[str], shapes: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Refuse shell patterns that no weight matrix matches.

    Args:
        patterns: shell patterns of names.
        shapes: shapes of the model's parameters, by name.
        source: where the patterns come from, for the error.

    Raises:
        RequestError: a pattern matches nothing; the message says which, and lists the names.
    """
    names = [name for name, shape in shapes.items() if is_planned(name, shape)]
    for pattern in patterns:
        if not any(name == pattern or fnmatchcase(name, pattern) for name in names):
            raise RequestError(
                f"{source}: {pattern!r} matches no weight matrix of this model; the first are "
                f"{', '.join(names[:3])}. Is it meant for another model?"
            )
