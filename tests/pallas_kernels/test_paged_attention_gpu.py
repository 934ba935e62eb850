"""The attention kernels on a GPU: numerics, poison, bit invariance. See `gpu_check.py`."""

from __future__ import annotations

import pytest

from tests.pallas_kernels.attention_problems import Options
from tests.pallas_kernels.gpu_check import BACKENDS, checks, invariance, numerics

QUICK = [check for backend in BACKENDS for check in checks(backend, quick=True)]
FULL = [check for backend in BACKENDS for check in checks(backend)]


def name(check):
    return check.name.replace(" ", "-")


@pytest.mark.gpu
@pytest.mark.parametrize("check", QUICK, ids=name)
def test_on_a_gpu(check):
    print(check.run())


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("check", FULL, ids=name)
def test_everything_on_a_gpu(check):
    print(check.run())


def test_the_checks_accept_the_reference():
    """On a CPU, with the reference as the backend: what the checks themselves say is right."""
    small = Options(K=1, G=2, D=64, dtype="float16", window=40)
    told = numerics("reference", small, [(1, 1), (70, 1), (150, 20)])
    assert told.startswith("error ")


def test_the_checks_notice(monkeypatch):
    from tests.pallas_kernels import gpu_check

    def off_by_a_bit(call, backend):
        calls.append(call)
        out = run(call, backend).copy()
        # A row of the first call of all has one bit flipped.
        out.view("u2")[-1, 0, 0] ^= len(calls) == 1
        return out

    run, calls = gpu_check.run, []
    monkeypatch.setattr(gpu_check, "run", off_by_a_bit)
    with pytest.raises(AssertionError, match="two runs"):
        numerics("reference", Options(K=1, G=1, D=64), [(3, 1)])
    calls.clear()
    monkeypatch.setattr(gpu_check, "WHOLE", 40)
    monkeypatch.setattr(
        gpu_check, "arrangements", lambda: {"again": ((gpu_check.Item(0, 40, 1),), {})}
    )
    with pytest.raises(AssertionError, match=r"again \(position 39, head 0"):
        invariance("reference", Options(K=1, G=1, D=64))
