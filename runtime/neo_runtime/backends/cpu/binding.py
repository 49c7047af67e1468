"""One call of a graph over memory that we own: onnxruntime's IOBinding, by the IO contract."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from neo_runtime.backends.cpu.backend import OnnxRuntimeBackend

__all__ = ["BoundCall"]


class BoundCall:
    """Inputs and outputs of one graph, bound once; `run` may be called many times.

    The arrays are kept, so that their memory lives as long as the binding.
    """

    def __init__(
        self,
        backend: OnnxRuntimeBackend,
        graph: str,
        *,
        input_ids: NDArray[Any],
        attention_mask: NDArray[Any],
        position_ids: NDArray[Any],
        past: Sequence[NDArray[Any]],
        present: Sequence[NDArray[Any]],
        logits: NDArray[Any],
        candidates: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        """Bind; every array must be C-contiguous.

        Args:
            backend: whose session runs.
            graph: "prefill", "decode" or "score".
            input_ids: int64 [batch, sequence].
            attention_mask: int64 [batch, total_sequence].
            position_ids: int64 [batch, sequence].
            past: keys and values, layer by layer, key first: [batch, heads, past, head_dim].
            present: where the graph writes them; may be the same memory as `past`.
            logits: float32 [batch, 1, vocab], of "score" [batch, sequence, vocab]: written by the
                graph.
            candidates: by name of `CANDIDATE_OUTPUTS`, written where the graph has them.
        """
        self._backend = backend
        self._session = backend.session(graph)
        self._binding = self._session.io_binding()
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        outputs: dict[str, NDArray[Any]] = {"logits": logits, **(candidates or {})}
        for index, (before, after) in enumerate(zip(past, present, strict=True)):
            name = f"{index // 2}.{'value' if index % 2 else 'key'}"
            inputs[f"past_key_values.{name}"] = before
            outputs[f"present.{name}"] = after
        self._kept = (inputs, outputs)
        for name, array in inputs.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, _address(array))
        for name, array in outputs.items():
            self._binding.bind_output(
                name, "cpu", 0, array.dtype.type, array.shape, _address(array)
            )

    def run(self) -> None:
        """Compute the outputs from what the inputs hold now."""
        with self._backend.translated():
            self._session.run_with_iobinding(self._binding)


def _address(array: NDArray[Any]) -> int:
    if not array.flags.c_contiguous:
        raise AssertionError("only contiguous memory can be bound")
    return int(array.ctypes.data)
