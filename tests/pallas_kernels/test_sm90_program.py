"""What the Hopper kernel's program must look like, read from its jaxpr: no GPU is needed."""

from __future__ import annotations

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.paged_attention_sm90 import attend
from pallas_kernels.sm90_shapes import Config


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


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize("max_query", [1, 512])
def test_parts_are_signalled_and_awaited_on_one_set_of_counters(max_query: int, defer: bool):
    """Every `get_global` makes counters of its own: with two, the one who waits waits for ever."""
    config = Config(consumers=1 if max_query == 1 else 2, defer=defer)
    found = traced(4096, max_query, config)
    assert found["get_global"] == 1
    assert found["mgpu_semaphore_wait"] + found["semaphore_wait"] == 1
    assert found["mgpu_semaphore_signal"] + found["semaphore_signal"] >= 1


def test_nothing_is_shared_where_no_sequence_can_pass_a_split():
    found = traced(1024, 1)
    assert not found["get_global"]


@pytest.mark.parametrize(
    "fields", [{"stages": 0}, {"consumers": 2, "teams": 3}, {"columns": 12}, {"ping_pong": True}]
)
def test_a_config_that_cannot_run_is_refused(fields: dict):
    with pytest.raises(ValueError, match=r"expected|needs"):
        Config(**fields)
