"""Run a command as on a CPU without AVX-512, AVX-VNNI, BF16 and AMX.

`python -m neo_tools.older_cpu FOLDER neo-bench …`. Libraries use the CPUID instruction to find out
which instructions the CPU has, and choose their kernels accordingly. Not every machine can trap
CPUID; most virtual machines cannot. So this environment and those of the peers are copied, and in
the copies CPUID is replaced by UD2, an instruction of the same length that always traps. A small
preloaded library (`answer_cpuid.c`) handles the trap: it returns what CPUID would, without the bits
of the newer instructions. Clock, caches and memory are unchanged, so a run measures this CPU with
the kernels for AVX2.

Not hidden are /proc/cpuinfo, and the instructions that the C library itself uses to copy memory.
`pytest` needs `-p no:faulthandler`: its own handler would replace the one for the trap's signal.
"""

from __future__ import annotations

__all__ = ["ENVIRONMENT_VARIABLE", "HIDDEN"]

ENVIRONMENT_VARIABLE = "NEO_OLDER_CPU"
"""Set for the command; `neo-bench` mentions it in its report."""
HIDDEN = "AVX-512, AVX-VNNI, BF16 and AMX"
