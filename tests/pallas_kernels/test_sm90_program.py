"""What the Hopper kernel's program must look like, read from its jaxpr: no GPU is needed."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest

from pallas_kernels.paged_attention_sm90 import attend
from pallas_kernels.sm90_config import Config, default_config


def primitives(jaxpr) -> Counter:
    """How often each primitive stands in a jaxpr and in those inside it."""
    found = Counter()
    for eqn in jaxpr.eqns:
        found[eqn.primitive.name] += 1
        for inner in jax.tree.leaves(
            list(eqn.params.values()),
            is_leaf=lambda x: isinstance(x, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr),
        ):
            if isinstance(inner, jax.extend.core.ClosedJaxpr):
                inner = inner.jaxpr
            if isinstance(inner, jax.extend.core.Jaxpr):
                found += primitives(inner)
    return found


def traced(length: int, max_query: int, config: Config | None = None) -> Counter:
    T, pages = max(8, max_query), length // 64
    array = jax.ShapeDtypeStruct
    pool = array((pages + 1, 2, 64, 128), jnp.bfloat16)
    args = (
        array((T, 8, 128), jnp.bfloat16), pool, pool, array((1, pages), jnp.int32),
        array((2,), jnp.int32), array((1,), jnp.int32),
    )  # fmt: skip
    call = partial(attend, max_query=max_query, scale=0.1, config=config)
    return primitives(jax.make_jaxpr(call)(*args).jaxpr)


@pytest.mark.parametrize("max_query", [1, 512])
def test_parts_are_signalled_and_awaited_on_one_set_of_counters(max_query: int):
    """Every `get_global` makes counters of its own: with two, the one who waits waits for ever."""
    found = traced(4096, max_query, Config(consumers=1 if max_query == 1 else 2))
    assert found["get_global"] == 1
    assert found["mgpu_semaphore_wait"] + found["semaphore_wait"] == 1
    assert found["mgpu_semaphore_signal"] + found["semaphore_signal"] == 1


def test_nothing_is_shared_where_no_sequence_can_pass_a_split():
    found = traced(1024, 1)
    assert not found["get_global"]


@pytest.mark.parametrize("fields", [{"stages": 0}, {"consumers": 2, "teams": 3}, {"columns": 12}])
def test_a_config_that_cannot_run_is_refused(fields: dict):
    with pytest.raises(ValueError, match="expected"):
        Config(**fields)


@pytest.mark.parametrize("pages", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize(("max_query", "group"), [(1, 4), (1, 5), (512, 4), (512, 5)])
def test_what_shares_memory_begins_at_the_same_byte_for_every_consumer(
    pages: Any, max_query: int, group: int, monkeypatch: pytest.MonkeyPatch
):
    """Else one consumer's rows would be written over what another has put aside."""
    unions: list[Any] = []
    made = plgpu.RefUnion
    monkeypatch.setattr(plgpu, "RefUnion", lambda *forms: unions.append(forms) or made(*forms))
    pool = ((33, 2, 64, 128), pages)
    shapes = [
        ((max_query, 2 * group, 128), jnp.bfloat16), pool, pool, ((1, 32), jnp.int32),
        ((2,), jnp.int32), ((1,), jnp.int32), *[((33, 2, 64), jnp.float32)] * 2,
    ]  # fmt: skip
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    q8 = pages == jnp.int8

    def call(*args: Any) -> Any:
        scales = {"k_scales": args[6], "v_scales": args[7]} if q8 else {}
        return attend(*args[:6], max_query=max_query, scale=0.1, sm_count=7, **scales)

    jax.make_jaxpr(call)(*arrays)
    config = default_config(max_query, group, 128, q8)
    workers = config.consumers * config.teams

    def size(ref: Any) -> int:
        return math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize

    assert len(unions) == 2
    for forms in unions:
        each = []
        for form in forms:
            if isinstance(form, list):
                # What begins a consumer's part is aligned to whole KiB.
                of_one = form[: len(form) // workers]
                each.append(sum(-(-size(ref) // 1024) * 1024 for ref in of_one))
            else:
                assert form.shape[0] == workers
                each.append(size(form) // workers)
        assert len(set(each)) == 1, each
