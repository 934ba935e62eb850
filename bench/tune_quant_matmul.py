"""Tries configs of the quantised matmul kernels: what `default_config` should choose.

    python -m bench.tune_quant_matmul --only int4.28672x4096.t1,int4.6144x4096

For each case of `bench.quant_matmul` that is named, every config that fits, the fastest first, with
the default marked. Nothing is written: what is found goes into `default_config` by hand. No config
changes a bit of a result.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp

from bench import parts
from bench.quant_matmul import (
    Case,
    cases,
    make_recipe,
    of_kernel,
    packed_matrices,
    profile,
    stored_bytes,
    tokens,
)
from pallas_kernels import quant_matmul_sm90, scaled_matmul_sm90
from pallas_kernels.device import sm_count
from pallas_kernels.quant_matmul_sm90 import Config, chains_of

SHOWN = 6


def packed_configs(T: int, N: int, K: int, form: Any, sms: int) -> Iterator[Config]:
    """Of `quant_matmul_sm90`, those that fit."""
    chains, columns = chains_of(N, K), -(-T // 8) * 8
    warps = [
        Config("warp", units, 32, depth, blocks)
        for units, depth, blocks in product((1, 2, 3, 4, 6, 8, 12, 14, 16), (1, 2, 4, 8), (1, 2, 4))
        if units % blocks == 0 and units // blocks * chains <= 16 and T <= 64
    ]
    groups = [
        Config("group", units, tokens, depth)
        for units, tokens, depth in product((4, 8, 16), (16, 32, 64), (1, 2, 4))
        if units // 4 * chains <= 4 and T >= 16
    ]
    tiles = [
        Config("tile", units, tokens, 1, blocks)
        for units, tokens, blocks in product((4, 8, 12, 16), (64, 128), (1, 2))
        if units // 4 % blocks == 0 and units // 4 // blocks <= 4 and T >= 32
    ]
    for config in warps + groups + tiles:
        if K % (config.depth * 128) or config.units * 16 > N:
            continue
        if config.way != "tile" and config.depth % chains:
            continue
        if config.units * config.depth % 4:
            continue
        shape = quant_matmul_sm90.Shape(
            columns, N, K, form, jnp.dtype(jnp.bfloat16), config, sms, True
        )
        if shape.most_stages >= 2:
            yield config


def scaled_configs(T: int, N: int, K: int, dtype: Any, sms: int) -> Iterator[Any]:
    """Of `scaled_matmul_sm90`, those that fit."""
    for consumers, most, depth in product((1, 2, 4), (64, 128, 256), (1, 2, 4)):
        config = scaled_matmul_sm90.Config(consumers, most, depth)
        if K % (depth * 128) or consumers * min(T, most) > 512:
            continue
        shape = scaled_matmul_sm90.Shape(T, N, K, dtype, jnp.dtype(jnp.bfloat16), config, sms, True)
        try:
            fits = shape.stages >= 2
        except ValueError:
            continue
        if fits:
            yield config


def tune(case: Case) -> None:
    """Prints the fastest configs of a case."""
    sms = sm_count() or 132
    T, N, K = case.tokens, case.N, case.K
    nbytes, weights, x = stored_bytes(case), packed_matrices(case), tokens(case)
    if make_recipe(case).activations:
        x, one = x.astype(weights[0].codes.dtype), jnp.ones(T, jnp.float32)
        default = scaled_matmul_sm90.default_config(T, N, K, sms)
        found: Any = scaled_configs(T, N, K, x.dtype, sms)

        def multiply(w: Any, config: Any) -> Any:
            scale = w.scales[:, 0].astype(jnp.float32)
            return scaled_matmul_sm90.matmul(
                x, w.codes, one, scale, out_dtype=jnp.dtype(jnp.bfloat16), config=config, sms=sms
            )
    else:
        form = weights[0].format
        default = quant_matmul_sm90.default_config(T, N, K, form, sms)
        found = packed_configs(T, N, K, form, sms)

        def multiply(w: Any, config: Any) -> Any:
            return quant_matmul_sm90.matmul(x, w, config=config, sms=sms)

    timed = []
    for config in dict.fromkeys([default, *found]):
        run = jax.jit(lambda ws, config=config: [multiply(w, config) for w in ws])
        try:
            us, _ = of_kernel(profile(lambda run=run: run(weights)), "matmul")
        except Exception as error:
            print(f"{case.name} {config}: {type(error).__name__}: {error}"[:300], flush=True)
            continue
        timed.append((us, config))
    for rank, (us, config) in enumerate(sorted(timed, key=lambda pair: pair[0])):
        if rank < SHOWN or config == default:
            mark = "default" if config == default else ""
            print(f"{case.name:<24} {us:8.2f} us {nbytes / us / 1e6:6.3f} TB/s {config} {mark}")


def main() -> None:
    parser = argparse.ArgumentParser(description="configs of the quantised matmul kernels")
    parser.add_argument("--only", required=True, help="starts of cases' names, by commas")
    args = parser.parse_args()
    parts.check_platform(jax.default_backend())
    for case in cases():
        if case.name.startswith(tuple(args.only.split(","))):
            tune(case)


if __name__ == "__main__":
    main()
