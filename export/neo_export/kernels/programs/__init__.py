"""The decode step as Triton programs: one token per row, over a bundle's weights and cache.

Sums and the residual stream are float32 whatever the storage type. The inputs of a product of
several rows are rounded to the half precision of the weights, as in onnxruntime.

Split-K: when several programs share a sum, each stores its partial sum, and the last one to finish
adds them all in a fixed order, so the result does not depend on which finished first. `counters`
are zero before and after every launch.

With `PDL` (CUDA's programmatic dependent launch) a launch starts before the previous one has ended.
Until `wait_for_earlier` returns it loads only weights, which no launch writes.

    rows        sequences in the batch; ROWS is the batch size that a product is compiled for
    half        float16 or bfloat16, by the type of the pointer
    residual    float32 [rows, WIDTH]

Each function is compiled for one set of its constants (`neo_export.kernels.compiler`), or runs in
Triton's interpreter, where it is tested without a GPU. References: Triton's documentation,
https://triton-lang.org; reduction by the last program: CUDA's sample threadFenceReduction.
"""

from __future__ import annotations

from neo_export.kernels.programs.attention import attend
from neo_export.kernels.programs.candidates import best_of_all, best_of_block
from neo_export.kernels.programs.embedding import embed, normalize
from neo_export.kernels.programs.product import project

__all__ = ["attend", "best_of_all", "best_of_block", "embed", "normalize", "project"]
