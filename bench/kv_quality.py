"""What a quantised KV cache costs in quality: KL on held-out code, and error on outlier channels.

    python -m bench.kv_quality

The KL is of the demo target's next-token distributions, with the cache quantised against the same
model with an unquantised one, through `forward` over the paged cache, over the start of every
held-out file of this machine's standard library. Nothing of it depends on the machine's speed.
Static scales are calibrated on the validation files. The error is that of `paged_attention` on
random heads whose keys have a few channels much larger than the rest, as real models' do.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import parts, record
from bench.parts import Part, emit
from bench.record import ROOT, Record
from jaxinfer.batch import Batch, Ragged
from jaxinfer.cache import KV_DTYPES, PagedCache, Scales, init_cache
from jaxinfer.config import ModelConfig
from jaxinfer.models.decoder import AttentionOptions, Params, forward, logits
from jaxinfer.quality import divergence
from pallas_kernels.kv_quantise import calibrate, quantise
from pallas_kernels.paged_attention import paged_attention

DEMO = ROOT / "checkpoints" / "demo"
WINDOW, PAGE_SIZE = 1024, 64
FORMATS = ("int8", "fp8")
OUTLIERS = (1.0, 4.0, 16.0, 64.0)  # how much larger the channels are


# -- KL -----------------------------------------------------------------------------------------


def windows(part: str, tokenizer: Any) -> list[np.ndarray]:
    """The first tokens of each file of a part of the demo's corpus, an end-of-text before them."""
    manifest = json.loads((DEMO / "corpus.json").read_text())
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    texts = [(stdlib / name).read_text(encoding="utf-8") for name in manifest[part]["files"]]
    tokens = [[manifest["end_of_text"], *tokenizer.encode(text)] for text in texts]
    return [np.asarray(t[:WINDOW], np.int32) for t in tokens]


def batch_of(tokens: np.ndarray) -> Batch:
    """One sequence from its first token on, in pages 1, 2, ..."""
    count, at = len(tokens), np.arange(WINDOW, dtype=np.int32)
    inside = at < count
    pages = np.arange(1, WINDOW // PAGE_SIZE + 1, dtype=np.int32)
    arrays = (
        np.pad(tokens, (0, WINDOW - count)), np.where(inside, at, 0),
        np.where(inside, at + PAGE_SIZE, 0), pages[None, None], np.array([0, count], np.int32),
        np.array([count], np.int32), at,
    )  # fmt: skip
    ids, positions, slots, *ragged, rows = map(jnp.asarray, arrays)
    return Batch(ids, positions, slots, None, Ragged(*ragged), rows)


@partial(jax.jit, static_argnames="config")
def run(
    params: Params, config: ModelConfig, batch: Batch, cache: PagedCache
) -> tuple[jax.Array, PagedCache]:
    """Log-probabilities float32 [WINDOW, V], and the cache."""
    options = AttentionOptions(backend="reference")
    out, cache = forward(params, config, batch, cache, attention=options)
    return jax.nn.log_softmax(logits(params, config, out.hidden).astype(jnp.float32)), cache


def empty(config: ModelConfig, dtype: Any, scales: tuple[Scales, Scales] | None = None) -> Any:
    return init_cache(config, WINDOW // PAGE_SIZE + 1, PAGE_SIZE, dtype, scales=scales)


def static_scales(
    params: Params, config: ModelConfig, data: list[np.ndarray], exact: Any, kv_dtype: Any
) -> tuple[Scales, Scales]:
    """Scales of keys and values a layer, from what an unquantised cache holds after each window."""
    found = None
    for tokens in data:
        _, cache = run(params, config, batch_of(tokens), empty(config, exact))

        def seen(pages: jax.Array) -> jax.Array:
            # Page 0 is the trash page; slots that were not written hold zeros.
            return calibrate(jnp.moveaxis(pages[1:], 1, 2), kv_dtype)

        new = jax.tree.map(seen, (cache.k, cache.v))
        found = new if found is None else jax.tree.map(jnp.maximum, found, new)
    assert found is not None
    return found


def kl_records(dtype: str, files: int | None) -> list[Record]:
    """`kv_quality.DTYPE.FORMAT.mean_kl` of every format, dynamic and static."""
    from checkpoints import load_params
    from jaxinfer.models.families import read_config
    from jaxinfer.models.weights import declare
    from jaxinfer.tokenizer import load_tokenizer

    config, exact = read_config(DEMO / "target"), jnp.dtype(dtype)
    params = load_params(DEMO / "target", declare(config), dtype=exact)
    tokenizer = load_tokenizer(DEMO / "target")
    data, other = (windows(part, tokenizer)[:files] for part in ("held_out", "validation"))
    caches = {name: empty(config, KV_DTYPES[name]) for name in FORMATS}
    for name in FORMATS:
        scales = static_scales(params, config, other, exact, KV_DTYPES[name])
        caches[f"{name}_static"] = empty(config, KV_DTYPES[name], scales)
    found: dict[str, list[np.ndarray]] = {name: [] for name in caches}
    for tokens in data:
        batch, count = batch_of(tokens), len(tokens)
        want = np.asarray(run(params, config, batch, empty(config, exact))[0])[:count]
        following = tokens[1:]
        for name, cache in caches.items():
            got = np.asarray(run(params, config, batch, cache)[0])[:count]
            worse = np.append((want - got)[np.arange(count - 1), following], np.nan)
            same = want.argmax(-1) == got.argmax(-1)
            found[name].append(np.stack([divergence(want, got), same, worse]))
    return [_kl_record(f"kv_quality.{dtype}.{k}", np.concatenate(v, 1)) for k, v in found.items()]


def _kl_record(name: str, columns: np.ndarray) -> Record:
    kl, same, worse = columns
    detail = {
        "max_kl": kl.max(),
        "p99_kl": np.quantile(kl, 0.99),
        "top1_agreement": same.mean(),
        "nats_lost_per_token": np.nanmean(worse),
        "positions": kl.size,
        "against": f"unquantised cache of the same dtype, windows of up to {WINDOW} tokens",
    }
    detail = {k: v if isinstance(v, str | int) else float(v) for k, v in detail.items()}
    return Record(f"{name}.mean_kl", float(kl.mean()), "nats", detail)


# -- outlier channels ---------------------------------------------------------------------------


def outlier_records(tokens: int = 1024) -> list[Record]:
    """`kv_quality.outliers.FORMAT.relative_error`: the worst; by `OUTLIERS` in `detail`.

    4 of 128 channels of the keys are `OUTLIERS` times larger. The queries' same channels are as
    much smaller, so that the softmax stays as flat and the error is the quantisation's alone.
    """
    found: dict[str, dict[str, float]] = {}
    for factor in OUTLIERS:
        for name, error in _outlier_errors(factor, tokens).items():
            found.setdefault(name, {})[f"{factor:g}x"] = error
    return [
        Record(f"kv_quality.outliers.{name}.relative_error", max(errors.values()), "ratio", errors)
        for name, errors in found.items()
    ]


def _outlier_errors(factor: float, tokens: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    K, G, D, new = 4, 4, 128, 64
    k, v = (rng.normal(size=(tokens, K, D)).astype(np.float32) for _ in "kv")
    q = rng.normal(size=(new, K * G, D)).astype(np.float32)
    k[..., :: D // 4] *= factor
    q[..., :: D // 4] /= factor
    pages = [jnp.moveaxis(jnp.asarray(x).reshape(-1, PAGE_SIZE, K, D), 1, 2) for x in (k, v)]
    rows = (
        jnp.arange(tokens // PAGE_SIZE, dtype=jnp.int32)[None],
        jnp.array([0, new], jnp.int32),
        jnp.array([tokens], jnp.int32),
    )
    attend = jax.jit(partial(paged_attention, max_query=new, backend="reference"))
    want = np.asarray(attend(jnp.asarray(q), *pages, *rows), np.float64)
    errors = {}
    for name in FORMATS:
        dtype = KV_DTYPES[name]
        for mode in ("", "_static"):
            arrays, scales = [], []
            for pool, rows_seen in zip(pages, (k, v), strict=True):
                given = calibrate(jnp.asarray(rows_seen), dtype) if mode else None
                by = None if given is None else jnp.broadcast_to(given[:, None], pool.shape[:3])
                values, chosen = quantise(pool, dtype, by)
                arrays.append(values)
                scales.append(chosen if given is None else given)
            got = attend(jnp.asarray(q), *arrays, *rows, k_scales=scales[0], v_scales=scales[1])
            wrong = np.linalg.norm(np.asarray(got, np.float64) - want)
            errors[name + mode] = float(wrong / np.linalg.norm(want))
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description="quality of a quantised KV cache")
    parser.add_argument("--part", choices=("bfloat16", "float32", "outliers"))
    parser.add_argument("--files", type=int, help="only so many held-out files, to try it")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part:
        kl = args.part != "outliers"
        for found in kl_records(args.part, args.files) if kl else outlier_records():
            emit(args.records, found)
        return
    measured = record.start(parts.command_line("bench.kv_quality"))
    files = ("--files", str(args.files)) if args.files else ()
    todo = [
        Part(f"kv_quality.{part}", "bench.kv_quality", ("--part", part, *files), 1800)
        for part in ("outliers", "bfloat16", "float32")
    ]
    path = record.path_for(measured, "kv_quality", args.out)
    parts.print_table(parts.run_parts(todo, measured, path))


if __name__ == "__main__":
    main()
