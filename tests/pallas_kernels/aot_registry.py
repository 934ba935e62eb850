"""Everything that `test_aot.py` compiles: a line for each kernel's own list."""

from __future__ import annotations

from typing import Any

from tests.pallas_kernels import (
    aot_cases,
    cases_sm80,
    cases_sm90,
    exchange_cases,
    norm_cases,
    quant_cases,
    threshold_cases,
)

# The attention kernels take seconds to compile: what every run of the suite tries.
QUICK_SM80 = (
    "d64-page32-decode", "d128-page64-chunk", "int8-token-d128-bfloat16", "everything",
)  # fmt: skip
QUICK_SM90 = (
    "sm90-d128-page64-prefill",
    "sm90-int8-token-d128-decode", "sm90-many-decode", "sm90-beside-decode",
)  # fmt: skip


def everything(arch: str) -> list[Any]:
    """What must compile for `arch` ("sm90" or "sm80"): objects with the fields of `Case`.

    What `qkv_write` compiles to has a test of its own.
    """
    attention = cases_sm80.cases("sm80") if arch == "sm80" else cases_sm90.cases()
    others = threshold_cases.cases(arch) + norm_cases.cases(arch) + quant_cases.cases(arch)
    others += exchange_cases.cases(arch)
    return aot_cases.cases(arch) + attention + others


def cases(arch: str) -> list[Any]:
    """Those of `everything` that cover most.

    Raises:
        ValueError: a name in the lists above is no case's.
    """
    quick = QUICK_SM80 if arch == "sm80" else QUICK_SM90
    small = aot_cases.cases(arch)[:1] + threshold_cases.cases(arch)[::3] + norm_cases.cases(arch)
    small += quant_cases.cases(arch)[::9] + exchange_cases.cases(arch)
    quick += tuple(case.name for case in small)
    found = [case for case in everything(arch) if case.name in quick]
    if len(found) < len(quick):
        raise ValueError(f"no such cases: {sorted(set(quick) - {case.name for case in found})}")
    return found
