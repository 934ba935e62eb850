"""Inputs, checks and timings of `bench.attention`, inside the processes that have a GPU."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from bench import attention_cases
from bench.attention_cases import Case, Group
from bench.record import Record
from jaxinfer.profiling.ceilings import rotating, seconds_per_call

TOLERANCES = {"bf16": 3e-3, "int8": 2e-2, "fp8": 2e-2}
CHECKED_ROWS = 64  # of a sequence: its first and its last new tokens
CALLS = {"calls": 6, "repeats": 7}
ROUNDS = 8  # over all inputs in one program


def timing_records(
    case: Case, seconds: float, detail: dict[str, Any], suffix: str = ""
) -> list[Record]:
    """`attention.CASE[.SUFFIX].us` and `.tflops`; the share of the copy rate is added later."""
    name = f"attention.{case.name}{suffix}"
    full = {"bytes_per_step": case.bytes, "flops": case.flops, "sets": case.sets, **detail}
    return [
        Record(f"{name}.us", 1e6 * seconds, "us", full),
        Record(f"{name}.tflops", case.flops / seconds / 1e12, "TFLOP/s"),
    ]


def make_inputs(case: Case, seed: int) -> dict[str, Any]:
    """The op's arrays by name. Random pages in random order; lengths in random order too."""
    import jax
    import jax.numpy as jnp

    rng = np.random.default_rng(seed)
    lengths = [case.lengths()[i] for i in rng.permutation(len(case.lengths()))]
    pages_of = [-(-length // case.page_size) for length, _ in lengths]
    N = sum(pages_of)
    table = np.zeros((len(lengths), max(pages_of)), np.int32)
    free = rng.permutation(N).astype(np.int32)
    for s, count in enumerate(pages_of):
        table[s, :count], free = free[:count], free[count:]
    keys = jax.random.split(jax.random.key(seed), 5)
    shape = (N, case.kv_heads, case.page_size, case.head_dim)
    pool = _pool_maker(case.kv, shape)

    arrays: dict[str, Any] = {
        "q": jax.random.normal(keys[0], (case.new_tokens, case.heads, case.head_dim), jnp.bfloat16),
        "k_pages": pool(keys[1]),
        "v_pages": pool(keys[2]),
        "page_table": jnp.asarray(table),
        "query_starts": jnp.asarray(np.cumsum([0, *(new for _, new in lengths)]), jnp.int32),
        "kv_lengths": jnp.asarray([length for length, _ in lengths], jnp.int32),
    }
    if case.kv != "bf16":
        for name, key in (("k_scales", keys[3]), ("v_scales", keys[4])):
            arrays[name] = jax.random.uniform(key, shape[:3], minval=0.005, maxval=0.02)
    return arrays


@functools.cache
def _pool_maker(kv: str, shape: tuple[int, ...]) -> Callable[[Any], Any]:
    """Random pages from a key; compiled once for all sets of a case."""
    import jax
    import jax.numpy as jnp

    def pool(key: jax.Array) -> jax.Array:
        if kv == "int8":
            return jax.random.randint(key, shape, -127, 128, jnp.int8)
        x = jax.random.normal(key, shape, jnp.bfloat16)
        return jnp.clip(100 * x, -448, 448).astype(jnp.float8_e4m3fn) if kv == "fp8" else x

    return jax.jit(pool)


@dataclass(frozen=True)
class Op:
    """How one backend is called: `plan(arrays)`, once a step, and `attend(arrays, plan)`."""

    plan: Callable[[dict[str, Any]], Any]
    attend: Callable[[dict[str, Any], Any], Any]


def make_op(case: Case, backend: str, config: dict[str, Any] | None) -> Op:
    """The public op; with a config, the backend's `attend`, which alone takes one."""
    from pallas_kernels.device import capability, target_device
    from pallas_kernels.paged_attention import paged_attention, plan_attention

    if backend == "auto" and (found := capability()) is not None:
        backend = "sm90" if int(found) == 9 else "sm80"
    static: dict[str, Any] = {"max_query": case.max_query}
    module: Any = None
    if backend in ("sm90", "sm80"):
        module = importlib.import_module(f"pallas_kernels.paged_attention_{backend}")
    chosen = None if config is None else module.Config(**config)

    def plan(arrays: dict[str, Any]) -> Any:
        if chosen is None:
            names = ("q", "k_pages", "page_table", "query_starts", "kv_lengths")
            return plan_attention(*(arrays[n] for n in names), **static, backend=backend)  # type: ignore
        if backend != "sm90":
            return None
        columns = arrays["page_table"].shape[1]
        return module.make_plan(
            arrays["query_starts"], arrays["kv_lengths"], T=case.new_tokens, H=case.heads,
            K=case.kv_heads, D=case.head_dim, max_kv=columns * case.page_size,
            max_query=case.max_query, window=None, quantised=case.kv != "bf16", config=chosen,
        )  # fmt: skip

    def attend(arrays: dict[str, Any], plan: Any) -> Any:
        options: dict[str, Any] = {"plan": plan} if plan is not None else {}
        if chosen is not None:
            options |= {"scale": case.head_dim**-0.5, "config": chosen}
            if backend == "sm90":
                options |= {"sm_count": target_device().core_count, "invariant": case.invariant}
            return module.attend(**arrays, **static, **options)
        free = {} if case.invariant else {"invariant": False}
        return paged_attention(**arrays, **static, **options, **free, backend=backend)  # type: ignore

    return Op(plan, attend)


def measure(case: Case, backend: str, config: dict[str, Any] | None) -> list[Record]:
    """Checks, then times, one case of ours; raises as `prepare`."""
    return prepare(case, backend, config)()


def prepare(case: Case, backend: str, config: dict[str, Any] | None) -> Callable[[], list[Record]]:
    """Compiles and checks one case of ours. What is returned times it.

    Raises:
        RuntimeError: the output is further from the reference than it may be.
    """
    import jax

    op = make_op(case, backend, config)
    sets = [make_inputs(case, seed) for seed in range(case.sets)]
    plan = jax.jit(op.plan)
    plans = [plan(arrays) for arrays in sets]
    attend = jax.jit(op.attend)  # lowered once for all sets
    error = check(case, sets[0], np.asarray(attend(sets[0], plans[0])))
    detail: dict[str, Any] = {"relative_error": float(f"{error:.3g}"), "backend": backend}
    if config is not None:
        detail["config"] = config
    inputs = list(zip(sets, plans, strict=True))
    time_step = in_turn(lambda arrays, plan: {"q": attend(arrays, plan)}, inputs)
    planned = plans[0] is not None
    time_plan = in_turn(partial(_replan, op), [(sets[0],)]) if planned else None

    def timed() -> list[Record]:
        if time_plan is not None:
            detail["plan_us"] = round(1e6 * time_plan(), 2)
        return timing_records(case, time_step(), detail)

    return timed


def _replan(op: Op, arrays: dict[str, Any]) -> dict[str, Any]:
    """The same lengths again, but only the plan can tell."""
    import jax.numpy as jnp

    lengths = arrays["kv_lengths"]
    return {"kv_lengths": lengths + jnp.minimum(op.plan(arrays).counts[0], 0)}


def in_turn(
    step: Callable[..., dict[str, Any]], inputs: list[tuple[Any, ...]]
) -> Callable[[], float]:
    """Compiles a program that runs `step` of each input over and over. Returns what times it: the
    seconds of one step. The host launches it all once, so that they are the device's."""
    import jax

    program = jax.jit(partial(run_in_turn, step, rounds=ROUNDS)).lower(inputs).compile()

    def seconds() -> float:
        whole = seconds_per_call(lambda _: program(inputs), jax.block_until_ready, **CALLS)
        return whole / (ROUNDS * len(inputs))

    return seconds


def run_in_turn(
    step: Callable[..., dict[str, Any]], inputs: list[tuple[Any, ...]], *, rounds: int
) -> list[dict[str, Any]]:
    """`rounds` times, an even number, `step` of each tuple (arrays, …) of `inputs`.

    What a step returns replaces arrays of the same names in that tuple's next round, so that no
    step can be left out, moved or shared.
    """
    import jax

    def once(own: list[dict[str, Any]]) -> list[dict[str, Any]]:
        pairs = zip(inputs, own, strict=True)
        return [step(arrays | new, *rest) for (arrays, *rest), new in pairs]

    names = jax.eval_shape(step, *inputs[0])
    begin = [{name: arrays[name] for name in names} for arrays, *_ in inputs]
    # Two rounds at a time: the second writes to where the first read from, without a copy.
    return jax.lax.fori_loop(0, rounds // 2, lambda _, own: once(once(own)), begin)


def check(case: Case, arrays: dict[str, Any], out: np.ndarray) -> float:
    """The relative error of some rows: shortest, longest and last sequence, first and last tokens.

    Raises:
        RuntimeError: it is more than the case allows, or not a number.
    """
    import jax
    import jax.numpy as jnp

    from pallas_kernels.paged_attention import paged_attention

    starts, lengths = np.asarray(arrays["query_starts"]), np.asarray(arrays["kv_lengths"])
    reference = jax.jit(partial(paged_attention, backend="reference"), static_argnames="max_query")
    got, want = [], []
    for s in sorted({int(lengths.argmin()), int(lengths.argmax()), len(lengths) - 1}):
        new = int(starts[s + 1] - starts[s])
        rows = min(new, CHECKED_ROWS)
        for first in sorted({0, new - rows}):
            length = int(lengths[s]) - new + first + rows
            used = np.asarray(arrays["page_table"])[s, : -(-length // case.page_size)]
            pools = {}
            for x in "kv":
                pages = arrays[f"{x}_pages"][used].astype(jnp.float32)
                scales = arrays.get(f"{x}_scales")
                pages = pages if scales is None else pages * scales[used][..., None]
                pools[f"{x}_pages"] = pages
            at = slice(starts[s] + first, starts[s] + first + rows)
            want.append(
                np.asarray(
                    reference(
                        arrays["q"][at].astype(jnp.float32), **pools, max_query=rows,
                        page_table=jnp.arange(len(used), dtype=jnp.int32)[None],
                        query_starts=jnp.array([0, rows], jnp.int32),
                        kv_lengths=jnp.array([length], jnp.int32),
                    )
                )
            )  # fmt: skip
            got.append(out[at].astype(np.float32))
    a, b = np.concatenate(got), np.concatenate(want)
    error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    if not error <= TOLERANCES[case.kv]:
        raise RuntimeError(f"relative error {error:.2e}, more than {TOLERANCES[case.kv]:.0e}")
    return error


def prepare_qkv_write(kv: str) -> Callable[[], list[Record]]:
    """Heads of 64 tokens rotated, and keys and values put into a pool, in place: every call updates
    what the call before it returned.

    Raises:
        RuntimeError: what is written differs from what the reference writes.
    """
    import jax
    import jax.numpy as jnp

    from pallas_kernels.qkv_heads import Heads
    from pallas_kernels.qkv_write import qkv_write

    tokens, inner = attention_cases.QKV_WRITE_TOKENS, 16
    case = replace(attention_cases.CASES[0], groups=(Group(16, 4096),), kv=kv)
    arrays = make_inputs(case, 0)
    pools = tuple(arrays.get(name) for name in ("k_pages", "v_pages", "k_scales", "v_scales"))
    slots = pools[0].shape[0] * case.page_size  # type: ignore
    width = (case.heads + 2 * case.kv_heads) * case.head_dim
    keys = jax.random.split(jax.random.key(1), inner)
    new = [jax.random.normal(key, (tokens, width), jnp.bfloat16) for key in keys]
    angles = jax.random.normal(keys[0], (tokens, case.head_dim // 2))
    heads = Heads(rope=(jnp.cos(angles), jnp.sin(angles)))
    rng = np.random.default_rng(0)
    index = [jnp.asarray(rng.choice(slots, tokens, False), jnp.int32) for _ in range(inner)]

    def chain(backend, pools, new, index):
        q = None
        for x, at in zip(new, index, strict=True):
            q, pools = qkv_write(pools, x, at, heads, backend=backend)
        return q, pools  # of all queries the last: results cost the host time

    got = jax.jit(partial(chain, "auto"))(pools, new, index)
    want = jax.jit(partial(chain, "reference"))(pools, new, index)
    page, slot = jnp.divmod(jnp.concatenate(index), case.page_size)
    here = [[q, *(p[page, :, slot] for p in pools if p is not None)] for q, pools in (got, want)]
    for g, w in zip(*here, strict=True):
        a, b = (np.asarray(x.astype(jnp.float32)) for x in (g, w))
        if not np.linalg.norm(a - b) <= 1e-2 * np.linalg.norm(b):
            raise RuntimeError("qkv_write and its reference differ")
    del got, want, here
    run = jax.jit(partial(chain, "auto"), donate_argnums=0)
    held = [run(pools, new, index)]

    def step(_: int) -> Any:
        held[0] = run(held[0][1], new, index)
        return held[0]

    def timed() -> list[Record]:
        seconds = seconds_per_call(step, jax.block_until_ready, **CALLS) / inner
        moved = attention_cases.qkv_write_bytes(kv, tokens)
        name = f"attention.{attention_cases.QKV_WRITE}.{kv}.us"
        return [Record(name, 1e6 * seconds, "us", {"bytes_per_step": moved, "chained": inner})]

    return timed


def measure_baseline(case: Case, name: str) -> list[Record]:
    """cuDNN or FlashAttention on contiguous keys and values, a call for each group."""
    total, details = 0.0, []
    for group in case.groups:
        one = replace(case, groups=(group,))
        time = _jax_cudnn if name == "jax_cudnn" else partial(_torch, name)
        seconds, detail = time(one, group)
        total += seconds
        details.append(detail)
    return timing_records(case, total, {"calls": details}, f".{name}")


def _jax_cudnn(case: Case, g: Group) -> tuple[float, str]:
    import jax
    import jax.numpy as jnp

    if 1 < g.new < g.length:
        raise NotImplementedError("its causal mask starts at the first key")
    D, K = case.head_dim, case.kv_heads
    attend = partial(jax.nn.dot_product_attention, implementation="cudnn", is_causal=g.new > 1)
    sets = []
    for seed in range(case.sets):
        keys = jax.random.split(jax.random.key(seed), 3)
        shapes = ((g.batch, g.new, case.heads, D), *2 * [(g.batch, g.length, K, D)])
        sets.append([jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes)])  # noqa: B905
    program = jax.jit(lambda sets: [attend(*qkv) for qkv in sets])
    run = seconds_per_call(lambda _: program(sets), jax.block_until_ready, **CALLS)
    return run / len(sets), "jax.nn.dot_product_attention, cudnn"


def _torch(name: str, case: Case, g: Group) -> tuple[float, str]:
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore
    from torch.nn.attention.bias import causal_lower_right  # pyright: ignore

    sdpa = torch.nn.functional.scaled_dot_product_attention
    B, K, D = g.batch, case.kv_heads, case.head_dim

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    options: dict[str, Any] = {"enable_gqa": True}
    rows, heads, how = g.new, case.heads, "grouped"
    if g.new == 1:  # a group's heads see the same keys: they are rows, and no mask is needed
        rows, heads, options, how = case.group, K, {}, "group as rows"
    elif g.new == g.length:
        options["is_causal"] = True
    else:
        options["attn_mask"] = causal_lower_right(g.new, g.length)
    sets = [
        (draw(B, heads, rows, D), draw(B, K, g.length, D), draw(B, K, g.length, D))
        for _ in range(case.sets)
    ]
    kind = SDPBackend.CUDNN_ATTENTION if name == "torch_cudnn" else SDPBackend.FLASH_ATTENTION

    def wait(_: Any) -> None:
        torch.cuda.synchronize()

    with sdpa_kernel(kind), torch.no_grad():
        try:
            sdpa(*sets[0], **options)
        except RuntimeError:
            # Not for grouped heads: as many keys as queries then, which is no less work for it.
            options.pop("enable_gqa", None)
            sets = [(q, *(x.repeat_interleave(heads // K, 1) for x in kv)) for q, *kv in sets]
            how = "keys repeated for every query head"
        call = rotating(lambda qkv: sdpa(*qkv, **options), sets)
        return seconds_per_call(
            call, wait, calls=4 * len(sets)
        ), f"torch {torch.__version__}, {how}"
