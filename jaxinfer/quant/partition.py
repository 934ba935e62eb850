"""How quantised matrices are split under tensor parallelism: like the dense ones they stand for."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxinfer.quant.arrays import Parts, QuantisedMatrix


def partition(matrix: Any, spec: PartitionSpec, shards: int, stage: str | None = None) -> Any:
    """The `PartitionSpec` of each array of `matrix`, which would be split by `spec` if dense.

    Args:
        matrix: of arrays or their shapes; an array too. With stages, that of one.
        spec: of two axes, only one of which is split.
        shards: over how many devices it is.
        stage: mesh axis of stages, each of which has such a matrix: of all arrays the first axis is
            split over it before anything else (`quant.stack_stages`).

    Returns:
        `matrix` with a `PartitionSpec` for each array.

    Raises:
        ValueError: a shard would begin inside a group of columns or a byte, or the columns are
            reordered; it says which degrees work.
    """
    if stage is not None:
        each = partition(matrix, spec, shards)
        return jax.tree.map(lambda inner: _behind(stage, inner), each)
    if isinstance(matrix, Parts):
        return Parts(tuple(partition(part, spec, shards) for part in matrix.parts))
    rows, columns = (*spec, None, None)[:2]
    N = matrix.shape[0]
    if rows is not None and N % shards:
        raise ValueError(f"{N} rows do not divide into {shards} shards: {_degrees(N)}")
    if not isinstance(matrix, QuantisedMatrix):
        return spec
    if columns is not None and shards > 1:
        _check_columns(matrix, shards)
    groups = columns if matrix.scales.shape[1] > 1 else None
    per_group, codes = PartitionSpec(rows, groups), PartitionSpec(rows, columns)
    fields = {
        "codes": codes, "scales": per_group, "zeros": per_group, "mins": per_group,
        "order": PartitionSpec(), "input_scale": PartitionSpec(),
    }  # fmt: skip
    present = {k: None if getattr(matrix, k) is None else v for k, v in fields.items()}
    return QuantisedMatrix(matrix.scheme, **present)


def _behind(stage: str, spec: PartitionSpec) -> PartitionSpec:
    """`spec`, with the first axis split over stages before anything else."""
    first, *rest = (*spec, None)[: max(len(spec), 1)]
    inner = first if isinstance(first, tuple) else () if first is None else (first,)
    return PartitionSpec((stage, *inner), *rest)


def _check_columns(matrix: QuantisedMatrix, shards: int) -> None:
    K, G = matrix.shape[1], matrix.scales.shape[1]
    if matrix.order is not None:
        raise ValueError(
            f"tensor parallelism {shards}: the columns of this matrix are reordered (act-order), "
            "so that every shard would need all of x: degree 1 works"
        )
    if matrix.scheme.activations == "token":
        raise ValueError(
            f"tensor parallelism {shards}: activations are rounded with a scale for each token, "
            "which every shard would choose by its own columns: degree 1 works"
        )
    most = math.gcd(K * matrix.scheme.bits // 8, G) if G > 1 else K * matrix.scheme.bits // 8
    if most % shards:
        raise ValueError(
            f"tensor parallelism {shards} would cut the groups of {matrix.group} columns of a "
            f"matrix of {K}: {_degrees(most)}"
        )


def _degrees(size: int) -> str:
    works = [str(n) for n in (1, 2, 4, 8, 16) if size % n == 0]
    return f"degrees {', '.join(works)} work"
