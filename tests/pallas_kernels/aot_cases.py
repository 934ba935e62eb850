"""What `aot.py` compiles, a trivial kernel, and broken ones that show that it would notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp


@dataclass(frozen=True)
class Case:
    """One program to compile.

    Attributes:
        name: says what is special about it.
        function: of arrays, to be jitted; static options are bound already.
        args: `jax.ShapeDtypeStruct`, or pytrees of them.
        spill_bytes: the most that it may spill, stores and loads together.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    spill_bytes: int = 0


def cases(arch: str) -> list[Case]:
    """A kernel that compiles for any arch; `aot_registry.py` lists the real ones."""
    return [_doubling(64)]


def broken(arch: str) -> list[Case]:
    """A spill, too much shared memory, and an error: each must be reported."""
    shared = {"sm90": 240 << 10, "sm80": 176 << 10}[arch]  # the sm80 one fits an H100
    return [
        _doubling(320, name="spill"),
        _doubling(64, name="shared", ballast=shared),
        Case("error", lambda x: x + jnp.zeros((3,)), (jax.ShapeDtypeStruct((2,), jnp.float32),)),
    ]


def _doubling(columns: int, name: str = "double", ballast: int = 0) -> Case:
    """[128, columns] doubled: each of the 128 threads holds `columns` values at once."""
    shape = jax.ShapeDtypeStruct((128, columns), jnp.float32)

    def kernel(x, out, *_):
        values = plgpu.load(x, (), layout=plgpu.Layout.WGMMA, optimized=False)
        total = jnp.sum(values, axis=1)
        spread = jax.lax.broadcast_in_dim(total, values.shape, (0,))
        out[...] = values + values / spread

    scratch = [plgpu.SMEM((ballast,), jnp.uint8)] if ballast else []
    run = plgpu.kernel(kernel, out_type=shape, scratch_types=scratch)
    return Case(name, run, (shape,))


def attention_case(
    name: str,
    attend: Callable[..., Any],
    *,
    max_kv: int,
    max_query: int,
    d: int = 128,
    page: int = 64,
    group: int = 4,
    dtype: Any = jnp.bfloat16,
    pages: str | None = None,
    scales: Literal["token", "static"] | None = None,
    sinks: bool = False,
    sequences: int = 4,
    others: int = 0,
    spill_bytes: int = 0,
) -> Case:
    """Sequences of up to `max_kv` tokens, 2 KV heads, a pool of 600 pages; with `others`, so many
    rows of q that belong to none of them and keep what they hold.

    `attend` takes the arrays of `paged_attention`; sinks and scales by name.
    """
    kv_heads = 2
    pool = (600, kv_heads, page, d)
    pages_dtype = dtype if pages is None else jnp.dtype(pages)
    shapes = [
        ((sequences * max_query + others, kv_heads * group, d), dtype),
        (pool, pages_dtype),
        (pool, pages_dtype),
        ((sequences, max_kv // page), jnp.int32),
        ((sequences + 1,), jnp.int32),
        ((sequences,), jnp.int32),
    ]
    names: list[str] = []
    if scales is not None:
        shapes += [(pool[:3] if scales == "token" else (kv_heads,), jnp.float32)] * 2
        names += ["k_scales", "v_scales"]
    if sinks:
        shapes.append(((kv_heads * group,), jnp.float32))
        names.append("sinks")
    if others:
        shapes.append(shapes[0])
        names.append("into")

    def function(*args: jax.Array) -> Any:
        return attend(*args[:6], **dict(zip(names, args[6:], strict=True)))

    args = tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)
    return Case(name, function, args, spill_bytes)
