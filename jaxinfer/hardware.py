"""GPUs as data: what their makers state, and what programs reach of it.

Rates are dense (no sparsity). Links are given one way: datasheets add both directions up. Figures
are the datasheets' own (`source`), memory excepted: datasheets round it, so that `memory_bytes` is
what the driver reports (`nvidia-smi`, MiB), read here for the H100 SXM and the H200, as commonly
published for the others. A program sees `VISIBLE` of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

VISIBLE = 0.994  # of the memory: the driver keeps the rest; 0.9941 on an H100, 0.9957 on an H200


@dataclass(frozen=True)
class Efficiency:
    """Shares of a datasheet's figures that this engine reaches.

    Attributes:
        copy: of the memory's bandwidth, by a large copy (bytes read and written).
        matmul: of the dense rate, by the products of a whole model's step.
        attention: of the dense 16-bit rate, by attention over prompts.
        source: where they were measured, or that they are assumed.
    """

    copy: float
    matmul: float
    attention: float
    source: str


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: as the command line takes it.
        memory_bytes: in all, as the driver reports it.
        memory_bandwidth: bytes/s.
        flops_16bit: dense bfloat16 and float16 FLOP/s, summed in float32.
        flops_fp32: float32 FLOP/s outside the tensor cores.
        ops_int8, flops_fp8: dense rates; None where there are none.
        nvlink_bandwidth: bytes/s one way; None where there is none.
        nvlink_gpus: how many GPUs it joins.
        pcie_bandwidth: bytes/s one way, 16 lanes.
        source: the maker's datasheet.
        bfloat16: whether its tensor cores take it.
        hopper: whether Hopper's kernels run there (or are taken to: Blackwell has none yet).
    """

    name: str
    memory_bytes: int
    memory_bandwidth: float
    flops_16bit: float
    flops_fp32: float
    ops_int8: float | None
    flops_fp8: float | None
    nvlink_bandwidth: float | None
    nvlink_gpus: int
    pcie_bandwidth: float
    efficiency: Efficiency
    source: str
    bfloat16: bool = True
    hopper: bool = False

    @property
    def visible_bytes(self) -> int:
        """Memory that programs can use."""
        return int(VISIBLE * self.memory_bytes)

    def link_bandwidth(self, gpus: int) -> float:
        """Bytes/s one way between `gpus` of them in one host."""
        joined = self.nvlink_bandwidth is not None and gpus <= self.nvlink_gpus
        return self.nvlink_bandwidth if joined else self.pcie_bandwidth  # type: ignore[return-value]


# Copy: 2.98e12 of 3.35e12 bytes/s, the ceilings of bench/results of 2026-11-26 and 27. Matmul: a
# token of an 8B model costs 22.3 us in steps of 2048 tokens (bench.costs.SAMPLES), 626e12 FLOP/s.
# Attention: 508 to 558e12 FLOP/s over prompts (README).
_H100 = Efficiency(
    copy=0.89, matmul=0.633, attention=0.53, source="measured, one H100 SXM (docs/sizing.md)"
)
# Copy: 4.20e12 of 4.8e12 bytes/s (bench/results of 2026-11-24). The rest as the same chip's.
_H200 = Efficiency(
    copy=0.875, matmul=0.633, attention=0.53,
    source="copy measured on one H200, the rest assumed to be the H100's",
)  # fmt: skip
_ASSUMED = Efficiency(copy=0.89, matmul=0.633, attention=0.53, source="assumed to be the H100's")

_MIB = 1 << 20
_SITE = "https://www.nvidia.com/content/dam/en-zz/Solutions/"
_A100_SHEET = f"{_SITE}Data-Center/a100/pdf/nvidia-a100-datasheet-nvidia-us-2188504-web.pdf"
_H100_SHEET = "https://resources.nvidia.com/en-us-gpu-resources/h100-datasheet-24306"


def _gpu(
    name: str,
    mib: int,
    gb_s: float,
    tflops: tuple[float, float, float | None, float | None],
    link: tuple[float | None, int, float],
    source: str,
    efficiency: Efficiency = _ASSUMED,
    *,
    bfloat16: bool = True,
    hopper: bool = False,
) -> Gpu:
    """A row of the table, in a datasheet's units.

    Args:
        tflops: 16-bit, float32, int8 and fp8, the last two None where there are none.
        link: NVLink's GB/s and the GPUs that it joins, PCIe's GB/s; both ways added up.
    """
    half, single, int8, fp8 = tflops
    nvlink, joined, pcie = link
    return Gpu(
        name=name,
        memory_bytes=mib * _MIB,
        memory_bandwidth=gb_s * 1e9,
        flops_16bit=half * 1e12,
        flops_fp32=single * 1e12,
        ops_int8=None if int8 is None else int8 * 1e12,
        flops_fp8=None if fp8 is None else fp8 * 1e12,
        nvlink_bandwidth=None if nvlink is None else nvlink * 1e9 / 2,
        nvlink_gpus=joined,
        pcie_bandwidth=pcie * 1e9 / 2,
        efficiency=efficiency,
        source=source,
        bfloat16=bfloat16,
        hopper=hopper,
    )


_ROWS = (
    _gpu(
        "t4", 15360, 320, (65, 8.1, 130, None), (None, 1, 32),
        f"{_SITE}Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf", bfloat16=False,
    ),
    _gpu(
        "a10", 23028, 600, (125, 31.2, 250, None), (None, 1, 64),
        f"{_SITE}Data-Center/a10/pdf/a10-datasheet.pdf",
    ),
    _gpu(
        "a10g", 23028, 600, (70, 35, 140, None), (None, 1, 64),
        "https://d1.awsstatic.com/product-marketing/ec2/"
        "NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf",
    ),
    _gpu(
        "l4", 23034, 300, (121, 30.3, 242.5, 242.5), (None, 1, 64),
        "https://www.nvidia.com/en-us/data-center/l4/",
    ),
    _gpu(
        "rtx4090", 24564, 1008, (165.2, 82.6, 660.6, 330.3), (None, 1, 64),
        "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/"
        "nvidia-ada-gpu-architecture.pdf",
    ),
    _gpu(
        "l40s", 46068, 864, (362.05, 91.6, 733, 733), (None, 1, 64),
        "https://www.nvidia.com/en-us/data-center/l40s/",
    ),
    _gpu("a100-40g", 40960, 1555, (312, 19.5, 624, None), (600, 8, 64), _A100_SHEET),
    _gpu("a100-40g-pcie", 40960, 1555, (312, 19.5, 624, None), (600, 2, 64), _A100_SHEET),
    _gpu("a100-80g", 81920, 2039, (312, 19.5, 624, None), (600, 8, 64), _A100_SHEET),
    _gpu(
        "h100-pcie", 81559, 2000, (756, 51, 1513, 1513), (600, 2, 128), _H100_SHEET, hopper=True,
    ),
    _gpu(
        "h100", 81559, 3350, (989.4, 67, 1979, 1979), (900, 8, 128), _H100_SHEET, _H100,
        hopper=True,
    ),
    _gpu(
        "h200", 143771, 4800, (989.4, 67, 1979, 1979), (900, 8, 128),
        "https://www.nvidia.com/en-us/data-center/h200/", _H200, hopper=True,
    ),
    _gpu(
        "b200", 183359, 8000, (2250, 75, 4500, 4500), (1800, 8, 128),
        "https://resources.nvidia.com/en-us-dgx-systems/dgx-b200-datasheet", hopper=True,
    ),
)  # fmt: skip

GPUS: Mapping[str, Gpu] = MappingProxyType({gpu.name: gpu for gpu in _ROWS})


# What drivers call them.
DEVICE_KINDS: Mapping[str, str] = MappingProxyType(
    {
        "Tesla T4": "t4",
        "NVIDIA A10": "a10",
        "NVIDIA A10G": "a10g",
        "NVIDIA L4": "l4",
        "NVIDIA GeForce RTX 4090": "rtx4090",
        "NVIDIA L40S": "l40s",
        "NVIDIA A100-SXM4-40GB": "a100-40g",
        "NVIDIA A100-PCIE-40GB": "a100-40g-pcie",
        "NVIDIA A100-SXM4-80GB": "a100-80g",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA B200": "b200",
    }
)


def gpu_of(device_kind: str) -> Gpu | None:
    """The row of a device, by what its driver calls it (`jax.Device.device_kind`), or None."""
    name = DEVICE_KINDS.get(device_kind)
    return None if name is None else GPUS[name]


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, whatever its case.

    Raises:
        ValueError: there is none; it lists those that there are.
    """
    found = GPUS.get(name.lower())
    if found is None:
        raise ValueError(f"gpu={name!r}: expected one of {', '.join(GPUS)}")
    return found
