"""What `paged_attention_sm90` must compile for: called by the ahead-of-time compile test."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from pallas_kernels import paged_attention_sm90
from tests.pallas_kernels.aot_cases import Case, attention_case

# New tokens of a sequence at most. The kernel is specialised by whether all query rows of a
# sequence and KV head fit one tile (decode, verify), and by how many tokens one copy brings.
MODES = {"decode": 1, "verify": 5, "chunk": 128, "prefill": 512}

# Bytes of spill stores and loads together, as ptxas counts them in the program (not how often they
# run): what was measured, so that any growth fails. To be lowered as the kernel is. A case that is
# not here may not spill.
SPILL_ALLOWANCE: dict[str, int] = {
    "sm90-d64-page64-chunk": 20,
    "sm90-d64-page64-prefill": 20,
    "sm90-d64-page32-prefill": 36,
    "sm90-d128-page64-decode": 8,
    "sm90-d128-page64-verify": 8,
    "sm90-d128-page64-chunk": 236,
    "sm90-d128-page64-prefill": 236,
    "sm90-d128-page32-decode": 40,
    "sm90-d128-page32-prefill": 252,
    "sm90-d128-page128-decode": 8,
    "sm90-d128-page128-prefill": 268,
    "sm90-d256-page64-decode": 192,
    "sm90-d256-page64-verify": 192,
    "sm90-d256-page64-chunk": 592,
    "sm90-d256-page64-prefill": 592,
    "sm90-d256-page32-decode": 208,
    "sm90-d256-page32-prefill": 592,
    "sm90-d256-page128-decode": 192,
    "sm90-d256-page128-prefill": 592,
    "sm90-group1-decode": 16,
    "sm90-group1-prefill": 204,
    "sm90-group2-decode": 16,
    "sm90-group2-prefill": 236,
    "sm90-group5-decode": 16,
    "sm90-group5-prefill": 176,
    "sm90-group7-decode": 16,
    "sm90-group7-prefill": 200,
    "sm90-group8-decode": 76,
    "sm90-group8-prefill": 112,
    "sm90-group16-prefill": 132,
    "sm90-group32-prefill": 132,
    "sm90-int8-token-d128-prefill": 28,
    "sm90-int8-token-d256-prefill": 244,
    "sm90-int8-static-d128-prefill": 180,
    "sm90-int8-static-d256-prefill": 220,
    "sm90-float8_e4m3fn-token-d128-prefill": 36,
    "sm90-float8_e4m3fn-token-d256-prefill": 380,
    "sm90-float8_e4m3fn-static-d128-prefill": 116,
    "sm90-float8_e4m3fn-static-d256-prefill": 600,
    "sm90-f16-decode": 8,
    "sm90-f16-d256-prefill": 592,
    "sm90-f16-fp8-static-prefill": 116,
    "sm90-window-prefill": 308,
    "sm90-softcap-prefill": 236,
    "sm90-window-softcap-d256-prefill": 908,
    "sm90-everything-prefill": 240,
    "sm90-d64-page32-decode": 48,
    "sm90-free-prefill": 132,
    "sm90-many-decode": 32,
    "sm90-beside-decode": 8,
}


def cases() -> list[Case]:
    """Every head dim, page size, group, dtype and option, not their product."""
    bf16, f16 = jnp.bfloat16, jnp.float16
    listed = [
        _case(f"sm90-d{d}-page{page}-{mode}", d=d, page=page, mode=mode)
        for d in (64, 128, 256)
        for page, mode in (
            (64, "decode"), (64, "verify"), (64, "chunk"), (64, "prefill"), (32, "decode"),
            (32, "prefill"), (128, "decode"), (128, "prefill"),
        )
    ]  # fmt: skip
    listed += [
        _case(f"sm90-group{g}-{mode}", group=g, mode=mode)
        for g in (1, 2, 5, 7, 8, 16, 32)
        for mode in ("decode", "prefill")
    ]
    listed += [
        _case(f"sm90-{kv}-{scales}-d{d}-{mode}", d=d, mode=mode, pages=kv, scales=scales)
        for kv in ("int8", "float8_e4m3fn")
        for scales in ("token", "static")
        for d in (64, 128, 256)
        for mode in ("decode", "prefill")
    ]
    listed += [
        _case("sm90-f16-decode", dtype=f16),
        _case("sm90-f16-d256-prefill", dtype=f16, d=256, mode="prefill"),
        _case("sm90-f16-int8-token-decode", dtype=f16, pages="int8", scales="token"),
        _case("sm90-f16-fp8-static-prefill", dtype=f16, pages="float8_e4m3fn", scales="static",
              mode="prefill"),
        _case("sm90-int8-token-page32-verify", pages="int8", scales="token", page=32,
              mode="verify"),
        _case("sm90-fp8-token-page128-d256-decode", pages="float8_e4m3fn", scales="token",
              page=128, d=256),
        _case("sm90-many-decode", sequences=80),
        _case("sm90-int8-many-decode", sequences=80, pages="int8", scales="token"),
        _case("sm90-beside-decode", others=100),
        _case("sm90-beside-short-decode", others=100, max_kv=1024),  # no scratch memory
        _case("sm90-int8-beside-decode", others=100, pages="int8", scales="token"),
        _case("sm90-free-prefill", mode="prefill", invariant=False),
        _case("sm90-window-decode", window=1000),
        _case("sm90-window-prefill", window=1000, mode="prefill"),
        _case("sm90-softcap-prefill", softcap=50.0, mode="prefill"),
        _case("sm90-sinks-decode", sinks=True, d=64, group=8),
        _case("sm90-sinks-window-prefill", sinks=True, d=64, group=8, window=128, mode="prefill"),
        _case("sm90-window-softcap-d256-prefill", d=256, group=2, window=4096, softcap=50.0,
              mode="prefill"),
        _case("sm90-everything-decode", dtype=bf16, pages="float8_e4m3fn", scales="token",
              window=100, softcap=50.0, sinks=True),
        _case("sm90-everything-prefill", dtype=bf16, pages="int8", scales="token", window=100,
              softcap=50.0, sinks=True, mode="prefill"),
    ]  # fmt: skip
    return listed


def _case(
    name: str,
    *,
    d: int = 128,
    mode: str = "decode",
    window: int | None = None,
    softcap: float | None = None,
    invariant: bool = True,
    max_kv: int = 8192,
    **shape: Any,
) -> Case:
    attend = functools.partial(
        paged_attention_sm90.attend, max_query=MODES[mode], scale=d**-0.5, window=window,
        softcap=softcap, invariant=invariant,
    )  # fmt: skip
    return attention_case(
        name, attend, max_kv=max_kv, max_query=MODES[mode], d=d,
        spill_bytes=SPILL_ALLOWANCE.get(name, 0), **shape,
    )  # fmt: skip
