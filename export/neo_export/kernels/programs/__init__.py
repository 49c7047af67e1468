"""The decode step as Triton programs: one token for each row, over a bundle's weights and cache.

Sums are float32 whatever is stored. The residual stream, too, is float32; what goes into a
product of several rows is rounded to the half precision of the weights, as onnxruntime has it.

Where one output is the sum of several programs, each leaves its part, and the last to arrive adds
all parts in their order: results do not depend on which came first. `counters` are zero before and
after every launch.

With `PDL` a launch begins before the one that it depends on has ended, and loads weights, which
nobody writes, until `wait_for_earlier` returns (CUDA's programmatic dependent launch).

    rows        sequences of the batch; ROWS is the next size that a product takes
    half        float16 or bfloat16, as the pointers have it
    residual    float32 [rows, WIDTH]

Each function is compiled for one set of its constants (`neo_export.kernels.compiler`), or runs in
Triton's interpreter, which is how it is tested without a GPU. References: Triton's documentation,
https://triton-lang.org; split sums by last arrival: CUDA's sample threadFenceReduction.
"""

from __future__ import annotations

from neo_export.kernels.programs.attention import attend
from neo_export.kernels.programs.candidates import best_of_all, best_of_block
from neo_export.kernels.programs.embedding import embed, normalize
from neo_export.kernels.programs.product import project

__all__ = ["attend", "best_of_all", "best_of_block", "embed", "normalize", "project"]
