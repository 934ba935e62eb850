"""The comparison: cases, turns, figures, reports and differences; and one small run of all."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import (
    cases,
    compare,
    compare_options,
    diff,
    figures,
    parts,
    record,
    report,
    timing,
)
from bench.engines import RAGGED, Memory, Output
from bench.record import Record, Run
from bench.sessions import Took, Trial
from bench.sizes import SMOKE
from tests.bench.test_engines import STUBS
from tests.bench.test_sessions import GPU, TINY, Fake, one_case, replies, run_fakes

# -- cases ----------------------------------------------------------------------------------------


def test_figures_of_each_workload_are_those_of_the_clock() -> None:
    sizes = replace(SMOKE, num_prompts=4, output_lens=(3, 11), goodput={"ttft": 300.0})
    case = cases.latency(TINY, 4, 16, (3, 11))
    found = case.measure(case.draw(1), replies(case.draw(1), 0.5, 0.02))
    assert found == pytest.approx({"ms_per_step": 20, "tok_s": 200, "ttft_ms": 500})
    assert {r.room for call in case.draw(1) for r in call} == {27}
    with pytest.raises(ValueError, match="no longer than 3"):
        case.measure(case.draw(1), replies(case.draw(1), 0.5, 0.0))
    case = cases.prefill(TINY, 32)
    found = case.measure(case.draw(1), replies(case.draw(1), 0.5, 0.02))
    assert found == pytest.approx({"ttft_ms": 500, "in_tok_s": 64})
    case = cases.throughput(TINY, "random:6:11", sizes)
    found = case.measure(case.draw(1), replies(case.draw(1), 0.8, 0.02))
    assert found == pytest.approx({"out_tok_s": 44, "total_tok_s": 68, "req_s": 4})
    case = cases.serve(TINY, sizes, 40.0, 0.5)
    found = case.measure(case.draw(1), replies(case.draw(1), 0.2, 0.02))
    assert found["ttft_p50_ms"] == pytest.approx(200)
    assert found["itl_p99_ms"] == pytest.approx(20)
    assert found["goodput_req_s"] > 0


@pytest.mark.parametrize("workload", ["latency", "prefill", "throughput", "serve", "memory"])
def test_repeats_have_prompts_of_their_own_and_the_same_sizes(workload: str) -> None:
    sizes = replace(SMOKE, datasets=("lognormal", "random:8:4", "prefix_repetition"))
    for case in cases.of_workload(workload, TINY, sizes):
        one, other = case.draw(1), case.draw(2)
        assert case.draw(1) == one
        assert [[r.max_tokens for r in c] for c in one] == [
            [r.max_tokens for r in c] for c in other
        ]
        assert [[r.due for r in c] for c in one] == [[r.due for r in c] for c in other]
        calls = [tuple(r.prompt) for both in (one, other) for call in both for r in call]
        assert len(set(calls)) == len(calls)
        ragged = any(len({(len(r.prompt), r.max_tokens) for r in call}) > 1 for call in one)
        assert not ragged or RAGGED in case.needs


def test_the_work_of_a_step_is_counted_from_any_config() -> None:
    config = timing.shapes.hf_config("tiny")
    for batch, context in ((1, 10), (4, 100)):
        assert timing.config_bytes(config, 2.0, batch, context) == timing.bytes_per_step(
            "tiny", batch, context
        )
    # one token: each weight of the layers and the head is multiplied once
    matrices = timing.config_flops(TINY.config, 1, 0, 0)
    assert matrices == 2 * 2 * (8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16)
    assert timing.config_flops(TINY.config, 0, 1, 0) == 2 * 8 * 100
    assert timing.config_flops(TINY.config, 0, 0, 5) == 4 * 2 * 2 * 4 * 5


def test_an_unknown_dataset_is_refused() -> None:
    for name in ("sharegpt", "random:5", "random:5:x", "random:0:5"):
        with pytest.raises((ValueError, SystemExit)):
            compare_options.parse(["--dataset-name", name])


# -- figures --------------------------------------------------------------------------------------


def summary(exact: bool, token: int) -> dict[str, Record]:
    fakes = Fake("jaxinfer", 0.01), Fake("vllm", 0.02, token=token)
    found, _ = run_fakes(*fakes, session=one_case(repeats=2))
    found += [Took("vllm", replace(one_case().cases[0], workload="memory"), Memory(5, None, 2), {})]
    records = figures.summarise("m", found, greedy=True, exact=exact, reference="jaxinfer")
    return {r.name: r for r in records}


def test_ratios_are_of_repeats_side_by_side_and_tokens_are_compared() -> None:
    told = summary(exact=True, token=1)
    ours, theirs = (told[f"compare.m.latency.b2.in4.{n}.ms_per_step"] for n in ("jaxinfer", "vllm"))
    assert (ours.value, theirs.value, ours.unit) == (pytest.approx(10), pytest.approx(20), "ms")
    assert theirs.detail["over_reference"] == pytest.approx(2)
    assert theirs.detail["bytes_per_step"] == timing.config_bytes(TINY.config, 2.0, 2, 8)
    assert (theirs.detail["each"], theirs.detail["spread"]) == ([20, 20], 0)
    assert told["compare.m.latency.b2.in4.vllm.agree"].value == 1
    assert told["compare.m.memory.b2.in4.vllm.loaded_bytes"].value == 5
    assert "compare.m.memory.b2.in4.vllm.peak_bytes" not in told


@pytest.mark.parametrize("exact", [True, False])
def test_other_tokens_are_a_fault_only_where_nothing_is_rounded(exact: bool) -> None:
    agree = summary(exact, token=2)["compare.m.latency.b2.in4.vllm.agree"]
    assert agree.value == 0
    assert (agree.error is not None) == exact


def test_agreement_ends_at_the_first_token_that_differs() -> None:
    ours = [Output([1, 2, 3, 4], [0.0] * 4), Output([5], [0.0])]
    theirs = [Output([1, 2, 9, 4], [0.0] * 4), Output([6], [0.0])]
    assert cases.agreement(ours, theirs) == (0.25, 0.5)
    assert cases.agreement(ours, ours) == (1.0, 1.0)


def made_run(scale: float = 1.0, kind: dict[str, Any] = GPU, **more: Any) -> Run:
    """Two engines on latency, prefill, throughput and serve."""
    records: list[Record] = []
    for engine, step in (("jaxinfer", 1.0), ("hf-static", 2.0)):
        for case in (
            *(cases.latency(TINY, b, 16, (3, 11)) for b in (1, 4)),
            cases.prefill(TINY, 32),
            cases.throughput(TINY, "lognormal", replace(SMOKE, num_prompts=4)),
            cases.serve(TINY, SMOKE, 40.0, 1.0),
        ):
            calls = case.draw(0)
            trials = []
            for turn in range(3):
                got = replies(calls, 0.1, step * scale * (1 + 0.02 * turn) / 100)
                measured = case.measure(calls, got)
                seen = cases.streams(calls, got)
                trials.append(Trial(engine, case, (0, turn), measured, [], seen, 0))
            records += figures.summarise(
                "8b", trials, greedy=False, exact=False, reference="jaxinfer"
            )
    ceilings = {"copy_bytes_per_s": 3e12, "bf16_matmul_flops_per_s": 6e14}
    run = Run("2026-12-01T00:00:00+00:00", kind, {"torch": "2.11"}, "cmd", **more)
    run = replace(run, ceilings=ceilings)
    return replace(run, records=(*records, *figures.shares(records, ceilings),
                                 *parts.share_of_copy(records, 3e12)))  # fmt: skip


# -- reports --------------------------------------------------------------------------------------


def test_the_table_has_a_column_for_each_engine_and_says_what_did_not_run(tmp_path: Path) -> None:
    run = made_run()
    why = {"engine": "vllm", "why": "vllm is not installed"}
    run = replace(run, records=(*run.records, Record("compare.8b.vllm.runs", 0, "", why)))
    detail = {"model": "8b", "workload": "latency", "case": "b4.in16", "engine": "vllm"}
    anchor = Record("compare.8b.latency.b4.in16.vllm.ms_per_step", 6.5, "ms", detail)
    earlier = Run("2026-11-23T00:00:00+00:00", GPU, {"vllm": "0.26.0"}, "x", records=(anchor,))
    record.write(earlier, tmp_path / "anchor.json")
    text = report.table(run, tmp_path)
    assert "| case | | jaxinfer | hf-static | vllm 0.26.0, 2026-11-23, quoted |" in text
    assert "| b4.in16 | ms a step | 10.2 (±2%) | 20.4 (±2%) | 6.5 |" in text
    assert "| b1.in16 | ms a step | 10.2 (±2%) | 20.4 (±2%) | – |" in text
    assert "- vllm: not run: vllm is not installed" in text
    assert "`cmd`" in text
    other = replace(run, device={**GPU, "kind": "NVIDIA H200"})
    assert "quoted" not in report.table(other, tmp_path)


def test_the_anchors_are_the_figures_that_were_taken() -> None:
    (run,) = record.read_all(report.ANCHORS)
    found = {r.name: r.value for r in run.records}
    assert found["compare.8b.latency.b64.in1024.vllm.ms_per_step"] == 10.1394
    assert found["compare.8b.throughput.lognormal-1000.vllm.out_tok_s"] == 10327.4
    for (model, workload, case, figure), engine, r in report.placed(run):
        assert r.name == f"compare.{model}.{workload}.{case}.{engine}.{figure}"


def test_readme_is_rewritten_between_the_markers_and_nowhere_else(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.rewrite_readme(made_run(), readme, tmp_path / "images", tmp_path)
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n**8b: latency**")
    assert text.endswith(f"\n{report.END}\nafter\n")
    assert "old" not in text
    shown = [line for line in text.splitlines() if line.startswith("![")]
    assert shown == [f"![{p}](images/compare-{p}.svg)" for p in report.IN_README]
    assert all(
        "<svg" in (tmp_path / f"images/compare-{p}.svg").read_text() for p in report.IN_README
    )


@pytest.mark.parametrize("cpu", [True, False])
def test_readme_takes_no_figures_of_a_cpu_and_needs_its_markers(tmp_path: Path, cpu: bool) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}{report.END}" if cpu else "no markers")
    before = readme.read_text()
    run = made_run(kind={"kind": "cpu"} if cpu else GPU)
    with pytest.raises(ValueError, match="figures of a GPU" if cpu else "README.md has no"):
        report.rewrite_readme(run, readme, tmp_path)
    assert readme.read_text() == before
    if cpu and record.device()["kind"] == "cpu":  # before anything is measured
        with pytest.raises(ValueError, match="figures of a GPU"):
            compare.main(["--smoke", "--readme", "--out", str(tmp_path / "none")])
        assert not (tmp_path / "none").exists()


def test_the_real_readme_has_the_markers() -> None:
    text = report.README.read_text()
    assert text.count(report.BEGIN) == text.count(report.END) == 1


# -- differences ----------------------------------------------------------------------------------


def test_only_changes_beyond_the_noise_count(tmp_path: Path, capsys: Any) -> None:
    paths = {name: tmp_path / f"{name}.json" for name in ("old", "same", "slow")}
    for name, scale in (("old", 1.0), ("same", 1.03), ("slow", 1.5)):
        record.write(made_run(scale), paths[name])
    assert diff.main([str(paths["old"]), str(paths["same"])]) == 0
    assert "0 better, 0 worse" in capsys.readouterr().out
    assert diff.main([str(paths["old"]), str(paths["slow"])]) == 1
    verdicts = {c.name: c for c in diff.compare(made_run(1.0), made_run(1.5))}
    step = verdicts["compare.8b.latency.b4.in16.jaxinfer.ms_per_step"]
    assert (step.verdict, round(step.ratio, 3)) == ("worse", 1.5)
    assert verdicts["compare.8b.latency.b4.in16.jaxinfer.tok_s"].verdict == "worse"
    assert verdicts["compare.8b.prefill.in32.jaxinfer.ttft_ms"].verdict == "same"
    back = {c.name: c.verdict for c in diff.compare(made_run(1.5), made_run(1.0))}
    assert back[step.name] == "better"


def test_figures_of_different_devices_are_not_compared(tmp_path: Path) -> None:
    record.write(made_run(), tmp_path / "a.json")
    record.write(made_run(kind={"kind": "cpu"}), tmp_path / "b.json")
    assert diff.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert diff.gone(made_run(), Run("d", GPU, {}, "c")) == [r.name for r in made_run().records]


# -- all of it ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--engines", "tgi"],
        ["--workloads", "chat"],
        ["--goodput", "itl:5"],
        ["--output-len", "9,3"],
        ["--engine-args", '{"tgi": {}}'],
        ["--short", "--smoke"],
    ],
)
def test_options_are_checked_before_anything_runs(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        compare_options.parse(words)


def test_a_small_run_of_jaxinfer_beside_a_stub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STUBS), str(record.ROOT)]))
    monkeypatch.delenv(parts.TORCH_PYTHON, raising=False)
    words = ["--smoke", "--engines", "jaxinfer,vllm", "--burstiness", "0.5"]
    words += ["--workloads", "latency,prefill,throughput,serve,memory", "--out", str(tmp_path)]
    run = compare.main(words)
    found = {r.name: r for r in run.records}
    for engine in ("jaxinfer", "vllm"):
        for name in (
            "latency.b2.in16.{}.ms_per_step", "prefill.in32.{}.in_tok_s",
            "throughput.lognormal-6.{}.out_tok_s", "serve.40rps-burst0_5.{}.goodput_req_s",
        ):  # fmt: skip
            one = found["compare.demo." + name.format(engine)]
            assert one.value is not None
            assert len(one.detail["each"]) == 2
    assert found["compare.demo.memory.b2.in16.jaxinfer.token_bytes"].value == 8192
    # the stub makes its tokens up, which in float32 is found out; nothing else has failed
    assert {name.rpartition(".")[2] for name, r in found.items() if r.error} == {"agree"}
    assert run.ceilings.keys() == {"copy_bytes_per_s", "bf16_matmul_flops_per_s"}
    (path,) = tmp_path.glob("*.json")
    assert record.read(path) == run
    assert "**demo: serve**" in path.with_suffix(".md").read_text()
    assert json.loads(path.read_text())["command"].startswith("python -m bench.compare")


def test_a_run_without_time_says_of_everything_that_it_did_not_run(tmp_path: Path) -> None:
    words = ["--smoke", "--engines", "jaxinfer,hf-static", "--minutes", "0"]
    run = compare.main([*words, "--out", str(tmp_path)])
    assert {r.value for r in run.records} <= {None, 0}
    (text,) = (path.read_text() for path in tmp_path.glob("*.md"))
    lines = {line.partition(":")[0]: line for line in text.splitlines() if line.startswith("- ")}
    assert "not run: out of time (startup in16, latency b1.in16, " in lines["- jaxinfer"]
    assert "throughput 8x4-6" in lines["- hf-static"]
    assert "lognormal" not in lines["- hf-static"]  # which it cannot do
    assert "- ceilings.jax" in lines


@pytest.mark.slow
def test_start_is_timed_with_and_without_programs_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(parts.TORCH_PYTHON, raising=False)
    words = ["--smoke", "--engines", "jaxinfer,vllm", "--workloads", "startup"]
    run = compare.main([*words, "--out", str(tmp_path)])
    found = {r.name: r for r in run.records}
    cold, warm = (
        found[f"compare.demo.startup.in16.jaxinfer.{kind}_s"] for kind in ("cold", "warm")
    )
    assert cold.value
    assert warm.value
    assert cold.detail["loaded_s"] < cold.value < cold.detail["last_token_s"]
    assert found["compare.demo.startup.in16.vllm.runs"].value == 0


def test_cases_that_leave_room_for_fewer_engines_have_a_session_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, sizes = compare_options.parse(
        ["--workloads", "latency,throughput,prefill", "--num-prompts", "9"]
    )
    checkpoint, writing = compare.find_checkpoint("llama-3.1-8b", tmp_path, "bfloat16")
    assert [part.args[1] for part in writing] == ["write"]
    made = compare.make_sessions(args, sizes, checkpoint, 80 << 30)
    names = [[case.name for case in session.cases] for session in made]
    fixed = [case for own in names for case in own if case.startswith(("b", "in"))]
    assert len(fixed) == len(set(fixed)) == 4 * 4 + 3 - 1
    assert "latency b64.in32768] left out" in capsys.readouterr().out
    for session in made:
        assert session.options.max_model_len == cases.longest(session.cases)
        mixed = session.cases[0].workload == "throughput"
        assert session.options.warm_up == mixed
    args, sizes = compare_options.parse(["--short"])
    (short,) = compare.make_sessions(args, sizes, checkpoint, None)
    assert [case.workload for case in short.cases] == [
        "latency", "latency", "prefill", "throughput", "serve"
    ]  # fmt: skip
    assert short.options.warm_up
    assert not short.options.prefix_caching
    assert compare.find_checkpoint("demo", tmp_path, "float32")[1] == []
    with pytest.raises(ValueError, match="unknown shape"):
        compare.find_checkpoint("gpt", tmp_path, "bfloat16")
