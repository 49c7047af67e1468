"""Run a command as on a CPU without AVX-512, AVX-VNNI, BF16 and AMX.

`python -m neo_tools.older_cpu FOLDER neo-bench …`. Which kernels are the fastest depends on the
instructions that a CPU has, and libraries choose by the CPUID instruction. It cannot be trapped
everywhere (and not in most virtual machines), so copies of this environment and of the peers' get
an instruction of the same length in its place that does trap, and a small library answers for it
(`answer_cpuid.c`): as the CPU would, without the bits of the newer instructions. All else stays
what it is: clock, caches, memory. What such a run measures is this CPU with the kernels for AVX2.

Not hidden: what /proc/cpuinfo says, and what the C library itself uses to copy memory. `pytest`
wants `-p no:faulthandler`, which would take the signal.
"""

from __future__ import annotations

__all__ = ["ENVIRONMENT_VARIABLE", "HIDDEN"]

ENVIRONMENT_VARIABLE = "NEO_OLDER_CPU"
"""Set for what runs so; `neo-bench` says so in its report."""
HIDDEN = "AVX-512, AVX-VNNI, BF16 and AMX"
