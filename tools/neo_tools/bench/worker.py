"""A bundle in a process of its own, driven like the peers: JSON lines on stdin and stdout.

Besides the requests of `neo_tools.worker.engine`:

    {"op": "reserve", "length": 1056}     → the next cache has room for this many positions
    {"op": "score", "length": 16}         → seconds; the score graph stays loaded afterwards
    {"op": "overhead", "batch": 1, "steps": 32}   → Python's time per token, see `_overhead`
    {"op": "device_memory"}               → bytes of a GPU that it holds besides CUDA's context
    {"op": "first_token", "length": 16}   → in a process that has loaded nothing: see `_first_token`
"""

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from neo_tools.bench.device_memory import ProcessMemory
from neo_tools.bench.native_time import native_seconds
from neo_tools.worker.engine import context_ids, engine_handlers
from neo_tools.worker.protocol import claim_stdout, serve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from neo_runtime.backends.step_logits import StepLogits
    from neo_runtime.cache.kv_cache import KVCache
    from neo_runtime.model import Model

    from neo_tools.worker.protocol import Handler

__all__ = ["NeoEngine", "main"]

_OVERHEAD_PROMPT = 16


class NeoEngine:
    """Our runtime as the protocol's `Engine`; it uses `Model` like any caller."""

    packages = ("neo-onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "tokenizers")

    def __init__(
        self,
        bundle: Path,
        threads: int,
        prefill_chunk: int | None,
        backend: str = "auto",
        device: int = 0,
        *,
        keep_prepacked: bool = False,
    ) -> None:
        self._bundle = bundle
        self._options: dict[str, Any] = {"threads": threads, "backend": backend, "device": device}
        if prefill_chunk is not None:
            self._options["prefill_chunk"] = prefill_chunk
        if keep_prepacked:
            self._options["keep_prepacked"] = True
        self._opened: Model | None = None
        self._cache: KVCache | None = None
        self._length: int | None = None
        self._device_memory: ProcessMemory | None = None
        self._context_bytes: int | None = None

    @property
    def _model(self) -> Model:
        if self._opened is None:
            raise ValueError("nothing is loaded")
        return self._opened

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self._model.manifest.model.vocab_size

    @property
    def max_length(self) -> int:
        """Largest number of positions in a sequence."""
        return self._model.manifest.max_length

    def load(self) -> dict[str, Any]:
        """Open the bundle, and the sessions of prefill and decode."""
        started = perf_counter()
        import neo_runtime
        import neo_runtime.loading

        if self._options["backend"] in ("cuda", "tensorrt"):
            self._device_memory = ProcessMemory(self._options["device"])
            self._context_bytes = self._device_memory.bytes()
        imported = perf_counter()
        with _warnings() as warnings:
            self._opened = neo_runtime.load(self._bundle, **self._options)
            self._opened.prepare()
        ready = perf_counter()
        manifest = self._opened.manifest
        return {
            "import_seconds": imported - started,
            "load_seconds": ready - imported,
            "precision": manifest.precision,
            "target": manifest.target,
            "cache": manifest.cache.layout,
            "window": manifest.cache.window,
            "backend": self._opened.backend,
            "prepacked_bytes": self._opened.prepacked_bytes,
            "warnings": warnings,
        }

    def reset(self) -> None:
        """Forget the cache."""
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def forward(self, ids: list[list[int]]) -> list[int]:
        """Append rows of ids; a new sequence opens its cache, which counts as measured time."""
        model = self._model
        if self._cache is None:
            length = model.rounded_length(self._length or model.manifest.max_length)
            self._cache = model.new_cache(len(ids), length)
        elif len(ids[0]) == 1:
            return _greedy_step(model.decode_step(self._cache, [row[0] for row in ids]))
        return _greedy_step(model.prefill_step(self._cache, ids))

    def handlers(self) -> dict[str, Handler]:
        """Handlers of all requests: those of every engine, and those of this one only."""
        return {
            **engine_handlers(self),
            "reserve": self._reserve,
            "score": self._score,
            "overhead": self._overhead,
            "first_token": self._first_token,
            "device_memory": self._held,
        }

    def _reserve(self, request: dict[str, Any]) -> dict[str, Any]:
        self._length = request["length"]
        length = self._model.rounded_length(request["length"])
        return {"cache_bytes": self._model.cache_bytes(request["batch"], length)}

    def _held(self, request: dict[str, Any]) -> dict[str, Any]:
        held = None if self._device_memory is None else self._device_memory.bytes()
        if held is None or self._context_bytes is None:
            return {"bytes": None}
        return {"bytes": held - self._context_bytes}

    def _score(self, request: dict[str, Any]) -> dict[str, Any]:
        [ids] = context_ids(request["length"], 1, 0, self.vocab_size)
        started = perf_counter()
        self._model.logits(ids)
        return {"seconds": perf_counter() - started}

    def _overhead(self, request: dict[str, Any]) -> dict[str, Any]:
        """Time of decode steps that is not spent inside onnxruntime's native run.

        Returns:
            `step`: median seconds per step of `forward`, which is what the rounds time;
            `generate`: the same for `Model.generate` with its additional bookkeeping: (its seconds
            − native seconds) / new tokens, including prefill's bookkeeping and the allocation of
            the cache; `native`: median seconds per step inside onnxruntime.
        """
        from neo_runtime.options.generation_options import GenerationOptions

        batch, steps = request["batch"], request["steps"]
        model = self._model
        if model.backend != "cpu":
            return {"step": None, "native": None, "generate": None}
        ids = context_ids(_OVERHEAD_PROMPT, batch, 0, self.vocab_size)
        outside, inside = [], []
        with native_seconds() as spent:
            with self._other_cache(_OVERHEAD_PROMPT + steps):
                tokens = self.forward(ids)
                for _ in range(steps):
                    calls, before = len(spent), perf_counter()
                    tokens = self.forward([[token] for token in tokens])
                    whole = perf_counter() - before
                    if len(spent) == calls:
                        raise RuntimeError(
                            "no call of onnxruntime was seen in a decode step: the runtime "
                            "calls it in a way that native_seconds does not know"
                        )
                    native = sum(spent[calls:])
                    inside.append(native)
                    outside.append(whole - native)
            options = GenerationOptions(max_new_tokens=steps, ignore_eos=True)
            model.generate(ids, options.merged(max_new_tokens=2))
            calls, before = len(spent), perf_counter()
            model.generate(ids, options)
            around = perf_counter() - before - sum(spent[calls:])
        return {"step": median(outside), "native": median(inside), "generate": around / steps}

    @contextmanager
    def _other_cache(self, length: int) -> Iterator[None]:
        """Inside the block `forward` uses a new cache of `length` positions, then the old one."""
        kept = self._cache, self._length
        self._cache, self._length = None, length
        try:
            yield
        finally:
            self.reset()
            self._cache, self._length = kept

    def _first_token(self, request: dict[str, Any]) -> dict[str, Any]:
        """From `load()` to the first token of a prompt, in a process that has not loaded anything.

        Returns:
            `seconds`, and `prefill`: seconds of the same request again, with everything loaded.
        """
        if self._opened is not None:
            raise ValueError("first_token wants a process that has loaded nothing")
        import neo_runtime
        import neo_runtime.loading
        from neo_runtime.options.generation_options import GenerationOptions

        options = GenerationOptions(max_new_tokens=1, ignore_eos=True)
        started = perf_counter()
        self._opened = neo_runtime.load(self._bundle, **self._options)
        [ids] = context_ids(request["length"], 1, 0, self.vocab_size)
        self._opened.generate(ids, options)
        first = perf_counter()
        self._opened.generate(ids, options)
        return {"seconds": first - started, "prefill": perf_counter() - first}


def _greedy_step(step: StepLogits) -> list[int]:
    """Each row's best token, from its candidates if they suffice."""
    tokens = []
    for row in step:
        found = row.candidates
        if found is not None and found.values.max() > found.edge:
            tokens.append(int(found.ids[found.values.argmax()]))
        else:
            tokens.append(int(row.full().argmax()))
    return tokens


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect the runtime's warnings inside the block."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("neo_runtime")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def main(argv: list[str]) -> None:
    """Serve requests from stdin."""
    answers = claim_stdout()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prefill-chunk", type=int)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--keep-prepacked", action="store_true")
    arguments = parser.parse_args(argv)
    engine = NeoEngine(
        arguments.bundle,
        arguments.threads,
        arguments.prefill_chunk,
        arguments.backend,
        arguments.device,
        keep_prepacked=arguments.keep_prepacked,
    )
    serve(engine.handlers(), sys.stdin, answers)


if __name__ == "__main__":
    main(sys.argv[1:])
