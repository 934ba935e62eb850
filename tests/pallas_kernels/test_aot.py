"""Every kernel compiles to real machine code for an H100 and an A100; see `aot.py`."""

from __future__ import annotations

import sys

import pytest

from tests.pallas_kernels.aot import SPECS, compile_in_subprocess, report

ARCHES = sorted(SPECS)
linux = pytest.mark.skipif(sys.platform != "linux", reason="the CUDA plugin is for Linux")


def table(rows):
    keys = ("registers", "spill_bytes", "shared_bytes", "seconds", "problem")
    return "\n".join(f"{row['name']}: " + ", ".join(f"{k} {row[k]}" for k in keys) for row in rows)


def check(arch, **options):
    rows = compile_in_subprocess(arch, **options)
    print(table(rows))
    wrong = [row for row in rows if row["problem"]]
    assert rows
    assert not wrong, f"{arch}:\n{table(wrong)}"


@linux
@pytest.mark.parametrize("arch", [pytest.param("sm80", marks=pytest.mark.slow), "sm90"])
def test_kernels_compile_without_spills(arch):
    check(arch)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
def test_every_kernel_compiles_without_spills(arch):
    check(arch, cases="tests.pallas_kernels.aot_registry:everything", timeout_s=1800)


@linux
@pytest.mark.parametrize("arch", ARCHES)
def test_what_is_wrong_is_reported(arch):
    rows = compile_in_subprocess(arch, "tests.pallas_kernels.aot_cases:broken")
    problems = {row["name"]: row["problem"] for row in rows}
    assert problems.keys() == {"spill", "shared", "error"}
    assert problems["spill"].startswith("spills ")
    assert "exceeds available shared memory" in problems["shared"]
    assert "TypeError" in problems["error"]


LOG = """
Resources(smem_scratch_bytes=4096, tmem_scratch_cols=0, barrier_counts=Counter({Barrier(\
arrival_count=1, num_barriers=4, orders_tensor_core=False): 2, Barrier(arrival_count=2, \
num_barriers=1, orders_tensor_core=False): 1}), scoped_gmem_semaphores={})
ptxas info    : Compiling entry function 'k' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 132 registers, used 2 barriers, 1 bytes smem
"""


def test_a_log_is_read():
    row = report("sm90", LOG, None)
    assert row == {"registers": 132, "spill_bytes": 0, "shared_bytes": 4168, "problem": None}
    assert report("sm80", LOG, None)["problem"] == "compiled for ['sm_90a']"
    assert report("sm90", "", None)["problem"] == "no Mosaic kernel was compiled"
    spilt = LOG.replace("0 bytes spill loads", "8 bytes spill loads")
    assert report("sm90", spilt, None)["problem"] == "spills 8 bytes"
    assert report("sm90", spilt, None, 7)["problem"] == "spills 8 bytes"
    assert report("sm90", spilt, None, 8)["problem"] is None


@pytest.mark.parametrize(
    "line",
    [
        "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to insufficient register resources for the wgmma pipeline",
        "ptxas info : (C7508) setmaxnreg is ignored to maintain minimum register requirement",
    ],
)
def test_what_makes_a_kernel_slow_is_a_problem(line):
    assert report("sm90", LOG + line + "\n", None)["problem"] == line
