"""A call of a graph over preallocated arrays, by onnxruntime's IOBinding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from neo_runtime.backends.cpu.backend import OnnxRuntimeBackend

__all__ = ["BoundCall"]


class BoundCall:
    """A graph's inputs and outputs, bound once; `run` may be called many times.

    Holds references to the arrays, because the binding knows only their addresses.
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
        """Bind the arrays, all of which must be C-contiguous.

        Args:
            backend: provides the session.
            graph: "prefill", "decode" or "score".
            input_ids: int64 [batch, sequence].
            attention_mask: int64 [batch, total_sequence].
            position_ids: int64 [batch, sequence].
            past: keys and values, layer by layer, keys first: [batch, heads, past, head_dim].
            present: output, in the order of `past`; may be the same memory.
            logits: output, float32 [batch, 1, vocab]; for "score" [batch, sequence, vocab].
            candidates: output, by names of `CANDIDATE_OUTPUTS`; None if the graph has none.
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
        """Run the graph on the current contents of the inputs; raises as `failures.translated`."""
        with self._backend.translated():
            self._session.run_with_iobinding(self._binding)


def _address(array: NDArray[Any]) -> int:
    if not array.flags.c_contiguous:
        raise AssertionError("only C-contiguous arrays can be bound")
    return int(array.ctypes.data)
