"""The options that several commands share, each declared once."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

MODEL, SAMPLING = "Model", "Sampling"  # panels of --help

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Directory, Hub id, or demo (shipped).", rich_help_panel=MODEL
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub id.", rich_help_panel=MODEL)
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU.", rich_help_panel=MODEL),
]
KvCacheDtype = Literal["auto", "int8", "fp8", "fp8_e4m3"]
KvCacheDtypeOption = Annotated[
    KvCacheDtype,
    typer.Option(help="int8 or fp8 halve the KV cache; auto: as --dtype.", rich_help_panel=MODEL),
]
SpeculativeOption = Annotated[
    str | None,
    typer.Option(
        "--speculative",
        help="Guess tokens, and check several at once: draft=MODEL, lookup, or skip=4-9 (layers). "
        "The text is the same.",
        rich_help_panel=MODEL,
    ),
]
TensorParallel = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size",
        min=1,
        help="Devices that share every layer; docs/parallel.md.",
        rich_help_panel=MODEL,
    ),
]
PipelineParallel = Annotated[
    int,
    typer.Option(
        "--pipeline-parallel-size",
        min=1,
        help="Stages that hold the layers in turn; docs/parallel.md.",
        rich_help_panel=MODEL,
    ),
]
DataParallel = Annotated[
    int,
    typer.Option(
        "--data-parallel-size",
        min=1,
        help="Replicas of the model, that many times the devices; docs/parallel.md.",
        rich_help_panel=MODEL,
    ),
]
DeviceWeightBytes = Annotated[
    int | None,
    typer.Option(
        "--device-weight-bytes",
        min=1,
        help="What weights may take of the device; other layers stay in the host's memory, and "
        "every step copies them. The text is the same; docs/offload.md.",
        rich_help_panel=MODEL,
    ),
]
KvHostBytes = Annotated[
    int,
    typer.Option(
        "--kv-host-bytes",
        min=0,
        help="Room in the host's memory for KV pages that the device has none for; they are copied "
        "back when they are wanted. The text is the same; docs/offload.md.",
        rich_help_panel=MODEL,
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(help="Longest sequence in tokens; default: the model's.", rich_help_panel=MODEL),
]
GpuMemory = Annotated[
    float,
    typer.Option(
        "--gpu-memory-utilization",
        min=0.01,
        max=1.0,
        envvar="XLA_PYTHON_CLIENT_MEM_FRACTION",
        help="Share of the GPU's memory that JAX takes when it starts.",
        rich_help_panel=MODEL,
    ),
]
MaxTokens = Annotated[
    int, typer.Option(help="Tokens to generate at most.", rich_help_panel=SAMPLING)
]
Temperature = Annotated[
    float, typer.Option(help="0 is greedy, 1 samples as it is.", rich_help_panel=SAMPLING)
]
TopP = Annotated[
    float, typer.Option(help="Keep the likeliest tokens up to this sum.", rich_help_panel=SAMPLING)
]
TopK = Annotated[int, typer.Option(help="Keep this many tokens; 0: all.", rich_help_panel=SAMPLING)]
MinP = Annotated[
    float,
    typer.Option(
        help="Drop tokens less likely than this times the likeliest.", rich_help_panel=SAMPLING
    ),
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1 discourages repeats.", rich_help_panel=SAMPLING)
]
Seed = Annotated[
    int | None, typer.Option(help="Repeats a run; default: drawn.", rich_help_panel=SAMPLING)
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="String to stop at; may be repeated.", rich_help_panel=SAMPLING),
]
File = Annotated[
    str | None,
    typer.Option(
        "--file",
        help='JSONL of {"prompt": "text"} or {"token_ids": [1, 2]}; - reads stdin.',
    ),
]
TokenIds = Annotated[str | None, typer.Option("--token-ids", help='Prompt as token ids: "1,2,3".')]
Json = Annotated[bool, typer.Option("--json", help="Print JSONL records.")]
Out = Annotated[
    str | None,
    typer.Option(
        "--out",
        help="Write each record here when it is done, after a header; the same command again "
        "goes on where it was stopped.",
    ),
]
