"""Opens a folder of statistics.

    statistics = Statistics.open("stats")
    statistics.check_model(checkpoint)
    statistics.channel_max("transformer.h.0.key")      # float32 [hidden]

The folder's format is described in docs/design/statistics.md: `statistics.json`, and one
safetensors file per layer. Arrays are views of the memory-mapped files.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from neo_runtime.errors import CheckpointError, StatisticsError

from neo_export.checkpoint.fingerprint import tensor_digests
from neo_export.checkpoint.safetensors_file import SafetensorsFile
from neo_export.gpt_neo.parameters import HEAD_INPUT
from neo_export.statistics.header import INPUT_PLACES, STATISTICS_NAME, StatisticsHeader

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from neo_export.checkpoint.lazy_tensor import LazyTensor
    from neo_export.checkpoint.whole import Checkpoint
    from neo_export.statistics.header import PlaceStatistics

__all__ = ["LikelyTokens", "Statistics"]


@dataclass(frozen=True)
class LikelyTokens:
    """The head's input at some positions of the text, and its likeliest next tokens there."""

    inputs: NDArray[np.float32]
    """[n, C]: inputs of the head."""
    tokens: NDArray[np.int32]
    """[n, k]: the likeliest tokens, in decreasing order."""
    probabilities: NDArray[np.float32]
    """[n, k]: probabilities of `tokens`."""


class Statistics:
    """An open folder of statistics.

    Attributes:
        folder: its path.
        header: `statistics.json`.
    """

    def __init__(self, folder: Path, header: StatisticsHeader) -> None:
        self.folder = folder
        self.header = header
        self._files: dict[str, SafetensorsFile] = {}

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open a folder that `neo-calibrate` wrote; arrays are loaded lazily.

        Raises:
            StatisticsError: it is not a folder of statistics, or is damaged.
        """
        folder = Path(path)
        file = folder / STATISTICS_NAME
        if not file.is_file():
            raise StatisticsError(
                f"{folder} holds no {STATISTICS_NAME}; expected a folder written by "
                "neo-calibrate MODEL --text FILE -o FOLDER"
            )
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StatisticsError(f"{file} cannot be read: {error}") from error
        return cls(folder, StatisticsHeader.from_json(text, str(file)))

    @property
    def places(self) -> Mapping[str, PlaceStatistics]:
        """Every place's summary, by name, in the order of computation."""
        return self.header.places

    @property
    def tokens(self) -> int:
        """Number of positions that were run."""
        return int(self.header.text["tokens"])

    def check_model(
        self, checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Check that these are this checkpoint's statistics; reads the whole checkpoint.

        Args:
            checkpoint: the checkpoint to compare with.
            progress: called with the number of tensors done and the total.

        Raises:
            StatisticsError: they are another model's; the message says what differs.
        """
        theirs, ours = self.header.model["spec"], json.loads(json.dumps(asdict(checkpoint.spec)))
        for field in ours:
            if theirs.get(field) != ours[field] and not field.endswith("_token_id"):
                raise self._another(checkpoint, f"{field} {theirs.get(field)}", ours[field])
        digests = tensor_digests(checkpoint, progress)
        recorded = self.header.model["tensors"]
        for name, digest in digests.items():
            if recorded.get(name) != digest:
                raise self._another(checkpoint, f"other values of {name!r}", "its own")

    def _another(self, checkpoint: Checkpoint, found: str, expected: object) -> StatisticsError:
        return StatisticsError(
            f"{self.folder} holds the statistics of another model: it has {found}, "
            f"{checkpoint.folder} has {expected}; run neo-calibrate on {checkpoint.folder}"
        )

    def channel_max(self, place: str) -> NDArray[np.float32]:
        """Largest |x| of each channel, [C]."""
        low, high = self.channel_range(place)
        return np.maximum(-low, high)

    def channel_range(self, place: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Smallest and largest value of each channel, [C] each."""
        return self._array(place, "low"), self._array(place, "high")

    def channel_mean(self, place: str) -> NDArray[np.float32]:
        """Mean of each channel, [C]."""
        return self._array(place, "mean")

    def channel_mean_square(self, place: str) -> NDArray[np.float32]:
        """Mean square of each channel, [C]: the diagonal of the second moments."""
        return self._array(place, "mean_square")

    def second_moment(self, place: str) -> NDArray[np.float32]:
        """E[x xᵀ] over all positions, [C, C], exactly symmetric; memory-mapped.

        Raises:
            StatisticsError: it was not kept; only places that a matrix reads have one, and only
                with `--second-moments full`.
        """
        return self._array(place, "second_moment")

    def sample(self, place: str) -> NDArray[np.float32]:
        """Values at some positions, evenly spaced over the text, [n, C]; memory-mapped.

        The positions are the same at every place. Only places that a matrix reads have them.
        """
        return self._array(place, "sample")

    def likely(self) -> LikelyTokens | None:
        """The head's inputs and likely tokens at some positions; None if they were not kept.

        Folders without second moments, and folders of earlier versions, do not have them.
        """
        file = self.places[HEAD_INPUT].file
        if "transformer.logits.likely" not in self._tensors(file):
            return None
        return LikelyTokens(
            inputs=self._array(HEAD_INPUT, "context"),
            tokens=self._tensors(file)["transformer.logits.likely"].read_raw(),
            probabilities=self._array("transformer.logits", "probability"),
        )

    def score_max(self, layer: int) -> tuple[float, ...]:
        """Largest |q·k| (unscaled, causal) of each head of a layer."""
        return self.header.score_max[f"transformer.h.{layer}"]

    def require_second_moments(self) -> None:
        """Check early that every matrix's input has second moments, before long work needs them.

        Raises:
            StatisticsError: they were not kept.
        """
        for name, place in self.places.items():
            if name.rpartition(".")[2] in INPUT_PLACES and not place.second_moment:
                raise StatisticsError(
                    f"{self.folder} has no second moments (none at {name}), as after neo-calibrate "
                    "--second-moments none; expected them, because with statistics GPTQ chooses "
                    "the integers of int8 and int4. Run neo-calibrate with --second-moments full "
                    "(the default), or leave --calibration out"
                )

    def _array(self, place: str, kind: str) -> NDArray[np.float32]:
        summary = self.places.get(place)
        if summary is None:
            raise StatisticsError(f"{self.folder} has no place {place!r}; run neo-calibrate again")
        tensor = self._tensors(summary.file).get(f"{place}.{kind}")
        if tensor is None:
            raise StatisticsError(
                f"{self.folder} has no {kind} of {place}; run neo-calibrate again"
                + (" with --second-moments full" if kind == "second_moment" else "")
            )
        try:
            tensor.check_finite()
        except CheckpointError as error:
            raise StatisticsError(
                f"{self.folder / summary.file} is damaged: {place}.{kind} holds values that are "
                "not finite; run neo-calibrate again"
            ) from error
        return tensor.read()

    def _tensors(self, file: str) -> Mapping[str, LazyTensor]:
        """The arrays of one file, by name."""
        try:
            if file not in self._files:
                self._files[file] = SafetensorsFile(self.folder / file)
        except CheckpointError as error:
            raise StatisticsError(f"{error} (part of {self.folder}; calibrate again)") from error
        return self._files[file].tensors
