"""Results of `bench.compare` for readers: a table in Markdown, pictures, and README's part of it.

    python -m bench.report bench/results/RESULT.json --readme

Nothing in README between the markers is written by hand. Figures of a CPU are refused there.
Figures of an engine that did not run here, but was measured earlier on such a card, are quoted from
`bench/anchors` in a column that says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import record
from bench.record import ROOT, Record, Run
from bench.until import OUT_OF_TIME

README, IMAGES, ANCHORS = ROOT / "README.md", ROOT / "docs" / "images", ROOT / "bench" / "anchors"
BEGIN, END = "<!-- bench.compare: begin -->", "<!-- bench.compare: end -->"
PICTURES = ("throughput", "roofline", "itl")
IN_README = PICTURES[:2]
SHOWN: dict[str, dict[str, str]] = {
    "latency": {"ms_per_step": "ms a step", "pct_copy": "% of copy bandwidth"},
    "prefill": {"ttft_ms": "ms to the first token", "mfu": "of the matmul ceiling"},
    "throughput": {"out_tok_s": "output tok/s"},
    "serve": {
        "ttft_p50_ms": "TTFT p50, ms", "ttft_p99_ms": "TTFT p99, ms", "tpot_p50_ms": "TPOT p50, ms",
        "itl_p99_ms": "ITL p99, ms", "goodput_req_s": "goodput, requests/s",
    },
    "quantised": {"ms_per_step": "ms a step", "pct_copy": "% of copy bandwidth"},
    "speculative": {"ms_per_step": "ms a token"},
    "startup": {"cold_s": "cold, s", "warm_s": "warm, s"},
    "memory": {"loaded_bytes": "loaded, GB", "peak_bytes": "peak, GB", "token_bytes": "a token, B"},
}  # fmt: skip
Cell = tuple[str, str, str, str]  # model, workload, case, figure


def placed(run: Run) -> Iterator[tuple[Cell, str, Record]]:
    """Every figure of an engine: where it belongs, whose it is. `pct_copy` has no detail: it is
    found by its name."""
    by_stem = {r.name.rpartition(".")[0]: r.detail for r in run.records if "engine" in r.detail}
    for r in run.records:
        stem, _, figure = r.name.rpartition(".")
        detail = by_stem.get(stem, {})
        if r.value is not None and {"model", "workload", "case"} <= set(detail):
            place = detail["model"], detail["workload"], detail["case"], figure
            yield place, detail["engine"], r


def quoted(run: Run, anchors: Path = ANCHORS) -> list[tuple[str, Run]]:
    """Earlier runs on such a card, of engines that gave no figure in this one; with the name of
    their column."""
    ran = {engine for _, engine, r in placed(run) if not r.name.endswith(".runs")}
    return [
        (f"{engine} {other.versions.get(engine)}, {other.date[:10]}, quoted", other)
        for other in record.read_all(anchors)
        for engine in sorted({engine for _, engine, _ in placed(other)} - ran)
        if other.device["kind"] == run.device["kind"]
    ]


def table(run: Run, anchors: Path = ANCHORS) -> str:
    """Markdown: a table for each model and workload, then what did not run, then the conditions."""
    found: dict[Cell, dict[str, Record]] = {}
    engines: dict[str, None] = {}  # in the order in which they came
    for place, engine, r in placed(run):
        found.setdefault(place, {})[engine] = r
        if not r.name.endswith(".runs"):
            engines[engine] = None
    for column, other in quoted(run, anchors):
        for place, _, r in placed(other):
            if place in found:
                found[place][column] = r
                engines[column] = None
    blocks = []
    for model, workload in dict.fromkeys((m, w) for m, w, _, _ in found):
        rows = _rows(model, workload, found, list(engines))
        if rows:
            blocks.append("\n".join([f"**{model}: {workload}**", "", *rows]))
    return "\n\n".join([*blocks, *_missing(run), _conditions(run)])


def _rows(
    model: str, workload: str, found: dict[Cell, dict[str, Record]], engines: list[str]
) -> list[str]:
    shown = SHOWN.get(workload, {})
    of_cases = dict.fromkeys(c for m, w, c, _ in found if (m, w) == (model, workload))
    lines = []
    used: list[str] = []
    for engine in engines:
        if any(engine in found.get((model, workload, c, f), {}) for c in of_cases for f in shown):
            used.append(engine)
    for case in of_cases:
        for figure, said in shown.items():
            by = found.get((model, workload, case, figure), {})
            if any(engine in by for engine in used):
                cells = [_cell(by.get(engine), figure) for engine in used]
                lines.append(f"| {case} | {said} | {' | '.join(cells)} |")
    if not lines:
        return []
    return [f"| case | | {' | '.join(used)} |", "|---" * (2 + len(used)) + "|", *lines]


def _cell(r: Record | None, figure: str) -> str:
    """A median, with how far its repeats lie apart, or that there was one only."""
    if r is None or r.value is None:
        return "–"
    value = r.value / 1e9 if figure in ("loaded_bytes", "peak_bytes") else r.value
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if len(r.detail.get("each", ())) == 1:
        return f"{text} (once)"
    spread = r.detail.get("spread", 0)
    return f"{text} (±{50 * spread:.0f}%)" if spread >= 0.01 else text


def _missing(run: Run) -> Iterable[str]:
    """A line for each engine that did not run at all, for each case that failed or that there was
    no time for, and for each part that failed."""
    seen: dict[str, list[str]] = {}
    for r in run.records:
        stem, _, figure = r.name.rpartition(".")
        why = r.detail.get("why") or (r.error if figure == "failed" else None)
        if why and not why.startswith("cannot"):
            how = "failed" if r.error and why != OUT_OF_TIME else "not run"
            said = why.partition("\n")[0]
            places = seen.setdefault(f"{r.detail.get('engine', stem)}: {how}: {said}", [])
            if r.error and "case" in r.detail:
                places.append(f"{r.detail['workload']} {r.detail['case']}")
    lines = [
        f"- {line}{' (' + ', '.join(where) + ')' if where else ''}" for line, where in seen.items()
    ]
    return ["\n".join(lines)] if lines else []


def _conditions(run: Run) -> str:
    versions = ", ".join(f"{name} {v[:12]}" for name, v in run.versions.items() if v)
    ceilings = ", ".join(f"{name} {value:.3g}" for name, value in run.ceilings.items())
    return (
        "Medians; ± is half of what the repeats lie apart, if that is 1% or more; –: not measured "
        f"(static batches take equal lengths only). {run.device['kind']}, {run.date[:10]}, "
        f"`{run.command}`. {versions}. Ceilings of this run: {ceilings or 'none'}."
    )


# -- pictures ----------------------------------------------------------------------------------


def draw(run: Run, picture: str, path: Path) -> bool:
    """One of PICTURES; False where the run has nothing for it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    plot = {"throughput": _throughput, "roofline": _roofline, "itl": _itl}[picture]
    if not plot(run, axes):
        return False
    models = ", ".join(dict.fromkeys(model for (model, *_), _, _ in placed(run)))
    axes.set_title(f"{models} on {run.device['kind']}, {run.date[:10]}")
    figure.legend(fontsize="small", loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return True


def _throughput(run: Run, axes: Any) -> bool:
    """Tokens a second over a step's time, by engine; a mark for each batch."""
    points: dict[tuple[str, int], list[tuple[float, float, int]]] = {}
    for (_, workload, _, figure), engine, r in placed(run):
        if workload == "latency" and figure == "ms_per_step" and r.value:
            batch = r.detail["batch"]
            own = points.setdefault((engine, r.detail["input_len"]), [])
            own.append((r.value, 1000 * batch / r.value, batch))
    for (engine, length), own in points.items():
        own.sort(key=lambda point: point[2])
        (line,) = axes.plot([x for x, _, _ in own], [y for _, y, _ in own], "o-",
                            label=f"{engine}, input {length}")  # fmt: skip
        for i, (x, y, batch) in enumerate(own):  # beside the line, which rises
            above = 1 if i else -1
            axes.annotate(str(batch), (x, y), textcoords="offset points", xytext=(0, 10 * above),
                          ha="center", va="center", color=line.get_color(),
                          fontsize="small")  # fmt: skip
    axes.margins(y=0.12)
    axes.set(xscale="log", yscale="log", xlabel="ms a token of a request",
             ylabel="tok/s of all requests; at each mark, their number")  # fmt: skip
    return bool(points)


def _roofline(run: Run, axes: Any) -> bool:
    """Every engine's steps, and prompts, under this run's ceilings."""
    copy, matmul = (
        run.ceilings.get(name) for name in ("copy_bytes_per_s", "bf16_matmul_flops_per_s")
    )
    if not copy or not matmul:
        return False
    colours: dict[str, int] = {}
    edges = [0.5, matmul / copy, 1e4]
    axes.plot(edges, [edges[0] * copy, matmul, matmul], color="grey", label="ceilings of this run")
    marks = {"latency": ("o", "a decode step"), "prefill": ("^", "a prompt")}
    for mark, said in marks.values():
        axes.plot([], [], mark, color="grey", label=said)
    for (_, workload, _, _), engine, r in placed(run):
        moved = r.detail.get("bytes_per_step") or r.detail.get("bytes_at_least")
        if workload in marks and moved and "flops" in r.detail and r.value:
            label = engine if engine not in colours else None
            colour = f"C{colours.setdefault(engine, len(colours))}"
            rate = r.detail["flops"] / (r.value / 1000)
            axes.plot(r.detail["flops"] / moved, rate, marks[workload][0], color=colour,
                      label=label, alpha=0.8)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte that must move", ylabel="FLOP/s")
    return bool(colours)


def _itl(run: Run, axes: Any) -> bool:
    """Distribution of the time between tokens, in the first case under arrivals, or of any."""
    from bench.serving import QUANTILES

    found = [(place, engine, r) for place, engine, r in placed(run)
             if r.detail.get("itl_quantiles_ms")]  # fmt: skip
    found.sort(key=lambda each: each[0][1] != "serve")
    chosen = [(engine, r) for place, engine, r in found if place[:3] == found[0][0][:3]]
    for engine, r in chosen:
        axes.plot(r.detail["itl_quantiles_ms"], QUANTILES, label=engine)
    axes.set(xscale="symlog", xlabel="ms between tokens", ylabel="% of gaps no longer")
    return bool(chosen)


# -- files -------------------------------------------------------------------------------------


def write(run: Run, path: Path, anchors: Path = ANCHORS) -> list[Path]:
    """The table and the pictures beside the result file, under its name; what was written."""
    from importlib.util import find_spec

    text = path.with_suffix(".md")
    text.write_text(table(run, anchors) + "\n")
    if find_spec("matplotlib") is None:
        print("no pictures: matplotlib is not installed")
        return [path, text]
    named = {p: path.with_name(f"{path.stem}-{p}.svg") for p in PICTURES}
    return [path, text, *(file for picture, file in named.items() if draw(run, picture, file))]


def check_device(run: Run) -> None:
    """Raises ValueError for a CPU, whose figures README does not show."""
    if run.device["kind"] == "cpu":
        raise ValueError("README shows figures of a GPU; these are of a CPU")


def rewrite_readme(
    run: Run, readme: Path = README, images: Path = IMAGES, anchors: Path = ANCHORS
) -> None:
    """Puts the table and two pictures between README's markers.

    Raises:
        ValueError: the run is of a CPU, or README has no markers. Nothing has been written.
    """
    check_device(run)
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme.name} has no {BEGIN} … {END}")
    shown = []
    for picture in IN_README:
        file = images / f"compare-{picture}.svg"
        if draw(run, picture, file):
            shown.append(f"![{picture}]({file.relative_to(readme.parent)})")
    body = "\n\n".join([table(run, anchors), *shown])
    readme.write_text(f"{before}{begin}\n{body}\n{end}{after}")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="table and pictures of a result")
    parser.add_argument("result", type=Path)
    parser.add_argument("--readme", action="store_true", help="rewrite README's part")
    args = parser.parse_args(words)
    run = record.read(args.result)
    if args.readme:
        rewrite_readme(run)
    else:
        write(run, args.result)
    print(table(run))


if __name__ == "__main__":
    main()
