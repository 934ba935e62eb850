"""Speculation on the demo's models: by proposer, number of requests, and temperature.

    python -m bench.speculative_report --plot docs/images/speculation.svg
    python -m bench.speculative_report --from bench/results/FILE.json --plot FILE.svg

Held-out code goes on; an engine with speculation against one without it, in turns, as in
`bench.speculative`. Each record is of a speed-up, with the share of attempted guesses that held and
the tokens of a step in its detail; guesses are `tokens` or fewer, as the controller decides.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench import parts, record
from bench.parts import Part, emit
from bench.record import Record, Run
from bench.speculative import CALLS, K, demo_prompts, faster, in_turn

SPECS = {
    "draft": f"draft=demo-draft,tokens={K}",
    "lookup": "lookup,tokens=8",
    "skip": f"skip=3-6,tokens={K}",
}
CONTEXT = 128
PREFIX = "speculation.report"


def measure(args: argparse.Namespace) -> Iterator[Record]:
    """`speculation.report.PROPOSER.tTEMPERATURE.bREQUESTS.speedup`, and its lower bound."""
    from jaxinfer import LLM, SamplingParams

    rest: dict[str, Any] = {
        "dtype": args.dtype, "kv_cache_bytes": 1 << 30, "max_num_batched_tokens": 512,
        "max_num_seqs": max(args.batch), "max_model_len": 512,
    }  # fmt: skip
    code = demo_prompts(256, CONTEXT)
    with LLM("demo", **rest) as plain:
        for kind in args.kinds:
            with LLM("demo", speculative=SPECS[kind], **rest) as llm:
                for t in args.temperature:
                    how = SamplingParams(
                        temperature=t, seed=1, max_tokens=args.tokens, ignore_eos=True
                    )
                    for batch in args.batch:
                        yield from faster(
                            f"{PREFIX}.{kind}.t{t:g}.b{batch}", plain, llm,
                            partial(in_turn, code, batch), how, repeats=args.repeats,
                            calls=-(-CALLS // batch),
                            detail={
                                "proposer": kind, "temperature": t, "requests": batch,
                                "speculative": SPECS[kind], "context": CONTEXT,
                            },
                        )  # fmt: skip


def plot(run: Run, path: Path) -> None:
    """Speed-up and acceptance over the number of requests, a line for each proposer and
    temperature."""
    from matplotlib.figure import Figure

    lines: dict[tuple[str, float], list[Record]] = defaultdict(list)
    for one in run.records:
        if one.name.startswith(PREFIX) and one.name.endswith(".speedup"):
            lines[one.detail["proposer"], one.detail["temperature"]].append(one)
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    speed, share = figure.subplots(1, 2)
    for (proposer, temperature), found in lines.items():
        found = sorted(found, key=lambda one: one.detail["requests"])
        requests = [one.detail["requests"] for one in found]
        style = {
            "marker": "osD^"[list(SPECS).index(proposer)],
            "label": f"{proposer}, {temperature:g}",
        }
        speed.plot(requests, [one.value for one in found], **style)
        held = [100 * (one.detail["acceptance"] or 0) for one in found]
        share.plot(requests, held, **style)
    speed.axhline(1, color="black", linewidth=0.8)
    speed.set(ylabel="times faster than without speculation")
    share.set(ylabel="attempted guesses that hold, %", ylim=(0, 100))
    for axes in (speed, share):
        axes.set(xlabel="requests at once", xscale="log")
        axes.grid(visible=True, alpha=0.3)
    figure.suptitle(f"Demo models on held-out code, {run.device['kind']}: proposer, temperature")
    figure.legend(*speed.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def table(run: Run) -> str:
    """The same as Markdown."""
    rows = ["| proposer | temperature | requests | faster | of attempted guesses | tokens a step |"]
    rows.append("|---|---|---|---|---|---|")
    for one in run.records:
        if one.name.startswith(PREFIX) and one.name.endswith(".speedup") and one.value is not None:
            d = one.detail
            held = "" if d["acceptance"] is None else f"{100 * d['acceptance']:.0f} %"
            rows.append(
                f"| {d['proposer']} | {d['temperature']:g} | {d['requests']} | {one.value:.2f} | "
                f"{held} | {d['tokens_a_step'] or ''} |"
            )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="speculation on the demo's models")
    parser.add_argument("--kinds", nargs="*", default=list(SPECS), choices=list(SPECS))
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--temperature", type=float, nargs="*", default=[0.0, 0.7, 1.0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--plot", type=Path, help="a picture of it, such as speculation.svg")
    parser.add_argument("--from", dest="source", type=Path, help="show what was measured before")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--part", action="store_true", help="measure in this process")
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part:
        for found in measure(args):
            emit(args.records, found)
        return
    if args.source is not None:
        run = record.read(args.source)
    else:
        options = ["--part", "--tokens", str(args.tokens), "--repeats", str(args.repeats)]
        options += ["--dtype", args.dtype, "--kinds", *args.kinds]
        options += ["--batch", *map(str, args.batch)]
        options += ["--temperature", *map(str, args.temperature)]
        run = record.start(parts.command_line("bench.speculative_report"))
        part = Part("speculation.report", "bench.speculative_report", tuple(options), 1200)
        run = parts.run_parts([part], run, record.path_for(run, "speculative_report", args.out))
    print(table(run))
    if args.plot is not None:
        plot(run, args.plot)


if __name__ == "__main__":
    main()
