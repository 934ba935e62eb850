"""Everything that `test_aot.py` compiles: a line for each kernel's own list."""

from __future__ import annotations

from typing import Any

from tests.pallas_kernels import aot_cases, cases_sm80, cases_sm90, kv_write_cases

# The attention kernels take seconds to compile: what every run of the suite tries.
QUICK_SM80 = (
    "d64-page32-decode", "d128-page64-decode", "d128-page64-chunk", "d128-page128-decode",
    "d256-page64-chunk", "group5-decode", "group32-chunk", "int8-token-d128-bfloat16",
    "int8-token-d256-bfloat16", "float8_e4m3fn-token-d128-float16", "window", "everything",
)  # fmt: skip
QUICK_SM90 = (
    "sm90-d64-page32-decode", "sm90-d128-page64-decode", "sm90-d128-page64-prefill",
    "sm90-d256-page64-prefill", "sm90-group5-decode", "sm90-int8-token-d128-decode",
    "sm90-float8_e4m3fn-static-d128-prefill", "sm90-everything-decode",
)  # fmt: skip


def everything(arch: str) -> list[Any]:
    """What must compile for `arch` ("sm90" or "sm80"): objects with the fields of `Case`."""
    found: list[Any] = [*aot_cases.cases(arch), *kv_write_cases.cases(arch)]
    return found + (cases_sm80.cases("sm80") if arch == "sm80" else cases_sm90.cases())


def cases(arch: str) -> list[Any]:
    """Those of `everything` that cover most.

    Raises:
        ValueError: a name in the lists above is no case's.
    """
    found = everything(arch)
    quick = QUICK_SM80 if arch == "sm80" else QUICK_SM90
    unknown = set(quick) - {case.name for case in found}
    if unknown:
        raise ValueError(f"no such cases: {sorted(unknown)}")
    attention = cases_sm80.cases("sm80") if arch == "sm80" else cases_sm90.cases()
    slow = {case.name for case in attention} - set(quick)
    return [case for case in found if case.name not in slow]
