"""What `paged_attention_sm80` must compile for: called by the ahead-of-time compile test.

`sm90` stands for the same kernel forced on Hopper, where copies go through TMA.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, Literal

import jax.numpy as jnp

from pallas_kernels import paged_attention_sm80
from tests.pallas_kernels.aot_cases import Case, attention_case


def cases(arch: Literal["sm80", "sm90"] = "sm80") -> list[Case]:
    """Every head dim, page size, group, dtype and option, not their product."""
    bf16, f16 = jnp.bfloat16, jnp.float16
    case = functools.partial(_case, arch)
    listed = [
        case(f"d{d}-page{page}-{mode}", d=d, page=page, max_query=n)
        for d in (64, 128, 256)
        for page in (32, 64, 128)
        for mode, n in (("decode", 1), ("chunk", 512))
    ]
    listed += [
        case(f"group{g}-{mode}", group=g, max_query=n)
        for g in (1, 2, 5, 7, 8, 16, 32)
        for mode, n in (("decode", 1), ("chunk", 512))
    ]
    listed += [
        case(f"{pages}-{scales}-d{d}-{jnp.dtype(q).name}", d=d, dtype=q, pages=pages, scales=scales)
        for pages in ("int8", "float8_e4m3fn")
        for scales in ("token", "static")
        for d in (64, 128, 256)
        for q in (bf16, f16)
    ]
    listed += [
        case("int8-chunk", pages="int8", scales="token", max_query=512),
        case("fp8-page32-chunk", pages="float8_e4m3fn", scales="token", max_query=512, page=32),
        case("f16", dtype=f16),
        case("f16-d256-chunk", dtype=f16, d=256, max_query=512),
        case("verify", max_query=5),
        case("window", window=1000),
        case("softcap-sinks-chunk", softcap=30.0, sinks=True, max_query=512),
        case("everything", d=256, window=100, softcap=50.0, sinks=True, pages="float8_e4m3fn",
             scales="token", max_query=512),
    ]  # fmt: skip
    return listed


def _case(
    arch: Literal["sm80", "sm90"],
    name: str,
    *,
    d: int = 128,
    max_query: int = 1,
    window: int | None = None,
    softcap: float | None = None,
    **shape: Any,
) -> Case:
    attend = functools.partial(
        paged_attention_sm80.attend, max_query=max_query, scale=d**-0.5, window=window,
        softcap=softcap, config=replace(paged_attention_sm80.default_config(d), arch=arch),
    )  # fmt: skip
    return attention_case(name, attend, max_kv=4096, max_query=max_query, d=d, **shape)
