"""The reference that a bundle is compared with: a checkpoint in PyTorch, or another bundle."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from neo_export.checkpoint.fingerprint import checkpoint_fingerprint
from neo_export.comparison.cache_steps import read_cache_steps
from neo_export.comparison.errors import PlaceErrors, Series, measure, measure_logits
from neo_export.comparison.explanations import explain
from neo_export.comparison.faults import find_faults
from neo_export.comparison.held_weights import HeldWeights, open_held_weights
from neo_export.comparison.jumps import find_jumps
from neo_export.comparison.metrics import logit_error, relative_l2
from neo_export.tolerances import accumulated_name, limits_name
from neo_runtime.bundle.manifest import MANIFEST_NAME
from neo_runtime.errors import RequestError

from neo_tools.diff.engine import Engine, open_probed_backend, why_not_shown
from neo_tools.diff.results import Subject
from neo_tools.diff.shipped import score_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from neo_export.checkpoint.whole import Checkpoint
    from neo_export.comparison.faults import Fault
    from neo_export.comparison.trace import Text, Trace
    from neo_runtime.bundle.folder import Bundle
    from neo_runtime.bundle.manifest import Manifest, ModelSpec
    from numpy.typing import NDArray

    LayersDone = Callable[[int, int], None]

__all__ = ["Reference", "open_reference", "require_same_shape"]

_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "max_position_embeddings",
)
_BEHAVIOUR = ("window_size", "attention_layers", "layer_norm_epsilon", "activation_function")


class Reference(ABC):
    """Provides hidden states and logits to compare with."""

    subject: Subject
    spec: ModelSpec
    warnings: list[str]
    """Warnings about the last `run`, for the report."""

    @abstractmethod
    def run(self, texts: Sequence[Text], progress: LayersDone, bundle: Bundle) -> PlaceErrors:
        """Run all texts, and compare the traces of those that have some.

        Args:
            texts: texts, with or without traces.
            progress: called with the number of steps done and the total.
            bundle: the bundle of the traces.
        """

    @abstractmethod
    def logits(self, number: int) -> NDArray[np.float32]:
        """Logits [S, V] of text `number` of the last `run`."""

    @abstractmethod
    def add_logits(self, errors: PlaceErrors, text: Text, expected: NDArray[np.float32]) -> None:
        """Compare the logits of a text's traces with `expected`, the result of `logits`, [S, V]."""

    @abstractmethod
    def faults(self, errors: PlaceErrors, bundle: Manifest, texts: Sequence[Text]) -> list[Fault]:
        """Faults in the order of computation; the first one with its explanation."""


class PyTorchReference(Reference):
    """transformers' GPT-Neo, eager, float32, a layer at a time."""

    def __init__(self, checkpoint: Checkpoint, path: str) -> None:
        from neo_export.comparison.reference import LayeredReference

        self._checkpoint = checkpoint
        self.layered = LayeredReference(checkpoint)
        self.spec = self.layered.spec
        self.subject = Subject(path=path, kind="PyTorch", precision="fp32")
        self.warnings = []
        self._finals: list[NDArray[np.float32]] = []
        self._held: dict[str, HeldWeights] = {}

    def run(self, texts: Sequence[Text], progress: LayersDone, bundle: Bundle) -> PlaceErrors:
        """See `Reference.run`."""
        source = bundle.manifest.source
        if source is not None and source.checkpoint != checkpoint_fingerprint(self._checkpoint):
            self.warnings.append(
                f"the bundle was made from another checkpoint than {self.subject.path}, by the "
                "checksum of the tensors; faults may be what tells the two apart"
            )
        cache = read_cache_steps(bundle.path, bundle.manifest)
        self._held = open_held_weights(bundle.path, bundle.manifest, self.layered.read)
        if len(set(self._held.values())) > 1:
            self.warnings.append(
                "decode reads other integers than prompts and scores (--int8-prefill): perplexity "
                "and top-1 agreement are those of prompts; for decode see its row of logits"
            )
        errors, self._finals = measure(self.layered, texts, progress, cache, self._held)
        if odd := sorted({name for held in self._held.values() for name in held.odd_ones}):
            self.warnings.append(
                f"the integers of {', '.join(odd)} are not those that rounding the checkpoint's "
                "matrix gives, as most others are: a mistake there counts as rounding up to the "
                "limit of the precision"
            )
        return errors

    def logits(self, number: int) -> NDArray[np.float32]:
        """See `Reference.logits`."""
        return self.layered.logits(self._finals[number])

    def add_logits(self, errors: PlaceErrors, text: Text, expected: NDArray[np.float32]) -> None:
        """See `Reference.add_logits`."""
        for trace in text.traces:
            assert trace.logits_at is not None
            held = self._held.get(trace.graph)
            own = self.layered if held is None else self.layered.with_weights(held)
            measure_logits(errors, own, trace, expected[trace.logits_at])

    def faults(self, errors: PlaceErrors, bundle: Manifest, texts: Sequence[Text]) -> list[Fault]:
        """See `Reference.faults`."""
        found = find_faults(errors, self.spec, limits_name(bundle))
        first = explain(found, self.layered, texts)
        return found if first is None else [first, *found[1:]]


class BundleReference(Reference):
    """Another bundle's score graph; it gives accumulated errors only, place by place."""

    def __init__(self, bundle: Bundle, threads: int, device: int) -> None:
        manifest = bundle.manifest
        self.spec = manifest.model
        self.subject = Subject(
            path=str(bundle.path),
            kind="bundle",
            precision=manifest.precision,
            target=manifest.target,
            digest=manifest.digest,
        )
        self.warnings = []
        self._bundle, self._threads, self._device = bundle, threads, device
        self._logits: list[NDArray[np.float32]] = []

    def run(self, texts: Sequence[Text], progress: LayersDone, bundle: Bundle) -> PlaceErrors:
        """See `Reference.run`."""
        import neo_runtime

        errors = PlaceErrors()
        with neo_runtime.load(
            self._bundle.path, threads=self._threads, device=self._device
        ) as model:
            engine = Engine.of(model, self._device, self._threads)
            self._logits = [score_logits(model, text.ids).values for text in texts]
        self.subject = replace(self.subject, backend=engine.backend, runs_on=engine.runs_on)
        traced = [text for text in texts if text.traces]
        if not traced:
            return errors
        if reason := why_not_shown(self._bundle, engine):
            self.warnings = [f"places are not compared, the reference shows none: {reason}"]
            for text in traced:
                text.traces, text.cache_checks = (), ()
            return errors
        with open_probed_backend(self._bundle, engine) as backend:
            for number, text in enumerate(traced, start=1):
                self._compare(errors, text, backend.score_trace(text.ids))
                progress(number, len(traced))
        return errors

    def _compare(self, errors: PlaceErrors, text: Text, expected: Trace) -> None:
        for trace in text.traces:
            for place in trace.probes.keys() & expected.probes.keys():
                rows = trace.rows(*place)
                positions = trace.positions[rows]
                error = relative_l2(trace.get(*place)[rows], expected.get(*place)[positions])
                errors.add(trace.graph, place, Series(positions, error, error))
        for check in text.cache_checks:
            for cached, found in check.errors.items():
                errors.add(check.graph, cached, Series(check.positions, found, found))

    def logits(self, number: int) -> NDArray[np.float32]:
        """See `Reference.logits`."""
        return self._logits[number]

    def add_logits(self, errors: PlaceErrors, text: Text, expected: NDArray[np.float32]) -> None:
        """See `Reference.add_logits`."""
        for trace in text.traces:
            assert trace.logits is not None
            assert trace.logits_at is not None
            error = logit_error(trace.logits, expected[trace.logits_at])
            errors.add(trace.graph, (None, "logits"), Series(trace.logits_at, error, error))

    def faults(self, errors: PlaceErrors, bundle: Manifest, texts: Sequence[Text]) -> list[Fault]:
        """See `Reference.faults`."""
        both = (bundle, self._bundle.manifest)
        return find_jumps(errors, self.spec, [accumulated_name(manifest) for manifest in both])


@contextmanager
def open_reference(
    model: str, threads: int, device: int = 0, base: str | None = None
) -> Iterator[Reference]:
    """Open a bundle or a checkpoint as reference.

    Args:
        model: a bundle's folder, a checkpoint's folder, or a hub id.
        threads: threads within an operator on a CPU.
        device: the GPU, for a bundle that runs on one; a checkpoint runs on the CPU.
        base: the base model of a LoRA adapter; None for the one that the adapter names.

    Raises:
        BundleError: the bundle cannot be used.
        CheckpointError: the checkpoint cannot be used.
        DependencyError: torch or transformers is missing.
        RequestError: a base model was given for a bundle.
    """
    if (Path(model) / MANIFEST_NAME).is_file():
        from neo_runtime.bundle.folder import open_bundle

        if base is not None:
            raise RequestError(f"--base was given, but the reference {model} is a bundle")
        bundle = open_bundle(model, verify=True, check_runtime=False)
        yield BundleReference(bundle, threads, device)
        return
    from neo_export.checkpoint.folder import open_model

    with open_model(model, base) as checkpoint:
        yield PyTorchReference(checkpoint, model)


def require_same_shape(bundle: ModelSpec, reference: ModelSpec) -> list[str]:
    """Refuse models of different shapes; return warnings about other differences.

    Raises:
        RequestError: the models have different shapes.
    """

    def differing(names: tuple[str, ...]) -> list[str]:
        return [
            f"{name} {getattr(bundle, name)} against {getattr(reference, name)}"
            for name in names
            if getattr(bundle, name) != getattr(reference, name)
        ]

    if shapes := differing(_SHAPE):
        raise RequestError(
            f"bundle and reference are different models: {', '.join(shapes)}; give the checkpoint "
            "that the bundle was made of"
        )
    return [
        f"the bundle's configuration differs from the reference's: {difference}"
        for difference in differing(_BEHAVIOUR)
    ]
