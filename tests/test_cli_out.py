"""`generate --out`: whatever ends a run, the same command brings its file to the same lines."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from jaxinfer import LLM, cli, delivery
from jaxinfer.cli import resumable
from jaxinfer.cli.results import open_results
from jaxinfer.progress import RunState, run_bar
from tests.conftest import TinyModel

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "goldens" / "qwen2"
PROMPTS = ["import os", [5, 6, 7], "def f(", "", [300], "x" * 500, "class A:", [9, 8]]
REFUSED = {3, 5}  # empty; too long


@pytest.fixture(scope="module")
def shared(tiny: TinyModel) -> Iterator[LLM]:
    with LLM.from_params(
        tiny.params, tiny.config, tokenizer=tiny.tokenizer, dtype="float32", max_num_seqs=4,
        max_model_len=64, kv_cache_bytes=1 << 20, max_num_batched_tokens=16,
        max_steps=4, page_size=8,
    ) as llm:  # fmt: skip
        yield llm


@pytest.fixture
def llm(shared: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """What the command runs on. The model that it is told of is another."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    monkeypatch.setattr(resumable, "open_llm", lambda options, dtype: nullcontext(shared))
    return shared


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(prompt_line, PROMPTS)) + "\n\n")
    return path


def prompt_line(prompt: str | list[int]) -> str:
    return json.dumps({"prompt" if isinstance(prompt, str) else "token_ids": prompt})


def generate(prompts: Path, out: Path, *options: str) -> int:
    argv = ["generate", "-m", str(GOLDEN), "--file", str(prompts), "--out", str(out)]
    return cli.main([*argv, "--max-tokens", "4", "--ignore-eos", *options])


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def by_index(path: Path) -> dict[int, dict[str, Any]]:
    _, *records = lines(path)
    assert len({r["index"] for r in records}) == len(records)
    return {r["index"]: r for r in records}


def as_if_drawn(monkeypatch: pytest.MonkeyPatch, seed: int = 11) -> None:
    monkeypatch.setattr(resumable.secrets, "randbelow", lambda most: seed)


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Breaks off where the next line after `count` would be written."""
    add = resumable.Results.add
    left = iter(range(count))

    def breaking(self: Any, fields: dict[str, Any]) -> None:
        if next(left, None) is None:
            raise error
        add(self, fields)

    monkeypatch.setattr(resumable.Results, "add", breaking)


SAMPLED = ("--temperature", "1", "--n", "2", "--logprobs", "1")


@pytest.mark.parametrize("options", [(), SAMPLED])
def test_the_records_are_those_of_json(
    llm: LLM,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
) -> None:
    out = tmp_path / "out.jsonl"
    assert generate(prompts, out, "--seed", "5", *options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "[8 of 8 prompts are in" in captured.err
    assert "2 of them refused" in captured.err

    monkeypatch.setattr(cli, "open_llm", lambda options: nullcontext(llm))
    argv = ["generate", "--file", str(prompts), "--max-tokens", "4", "--ignore-eos", "--json"]
    assert cli.main([*argv, "--seed", "5", *options]) == 2
    want = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    got = by_index(out)
    assert [got[i] for i in range(8)] == [w | {"line": i + 1} for i, w in enumerate(want)]
    assert {i for i, r in got.items() if r["type"] == "error"} == REFUSED

    header = lines(out)[0]
    assert (header["type"], header["prompts"], header["dtype"]) == ("run", 8, "float32")
    assert header["params"]["seed"] == 5


def test_requests_without_a_seed_get_one_each_from_the_runs(
    llm: LLM, prompts: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for out in (first, second):
        generate(prompts, out, "--temperature", "1")
    seeds = [{r["seed"] for r in by_index(out).values() if "seed" in r} for out in (first, second)]
    assert all(len(drawn) == 6 for drawn in seeds)
    assert not seeds[0] & seeds[1]


@pytest.mark.parametrize("options", [(), SAMPLED])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), RuntimeError("boom")])
def test_broken_off_and_resumed(
    llm: LLM,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    error: BaseException,
) -> None:
    as_if_drawn(monkeypatch)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert generate(prompts, whole, *options) == 2
    for count in (0, 1, 3, 7):
        out.unlink(missing_ok=True)
        with monkeypatch.context() as broken:
            stop_after(count, broken, error)
            assert generate(prompts, out, *options) == (
                130 if isinstance(error, KeyboardInterrupt) else 1
            )
        assert len(by_index(out)) == count
        with monkeypatch.context() as other:
            as_if_drawn(other, 12)  # what the file says holds
            assert generate(prompts, out, *options) == 2
        assert lines(out)[0] == lines(whole)[0]
        assert by_index(out) == by_index(whole)


def test_cut_off_at_any_byte(
    llm: LLM, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if_drawn(monkeypatch)
    out = tmp_path / "out"
    generate(prompts, out, "--temperature", "1")
    whole, want, header = out.read_bytes(), by_index(out), lines(out)[0]
    begin = sum(map(len, whole.splitlines(keepends=True)[:-2]))
    fields = {k: v for k, v in header.items() if k not in ("version", "type")}
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a thousand files
    for size in range(begin, len(whole) + 1):
        out.write_bytes(whole[:size])
        kept = whole[:size].rpartition(b"\n")[0] + b"\n"
        with open_results(out, fields, 8) as results:
            assert sum(results.done) == kept.count(b"\n") - 1
            missing = [i for i in range(8) if not results.done[i]]
            for i in missing:
                results.add(want[i])
        assert out.read_bytes().startswith(kept)
        assert by_index(out) == want
    for size in (begin, begin + 1, len(whole) - 1, len(whole)):
        out.write_bytes(whole[:size])
        assert generate(prompts, out, "--temperature", "1") == 2
        assert by_index(out) == want
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "prompts.jsonl"]


def test_what_is_done_is_not_run_again(
    llm: LLM, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    generate(prompts, out)
    before = out.read_bytes()
    monkeypatch.setattr(llm, "pump", lambda: pytest.fail("the engine was used"))
    assert generate(prompts, out) == 2
    assert out.read_bytes() == before


def test_ctrl_c_lets_results_arrive(
    llm: LLM,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pump, take = llm.pump, delivery.take
    finished: list[str] = []

    def pressed() -> None:
        pump()
        if len(finished) == 4 and signal.getsignal(signal.SIGINT) is not handler:
            signal.raise_signal(signal.SIGINT)

    def watched(request: Any, *rest: Any) -> None:
        take(request, *rest)
        finished.extend([request.id] * request.finished)

    monkeypatch.setattr(llm, "pump", pressed)
    monkeypatch.setattr(delivery, "take", watched)
    handler = signal.getsignal(signal.SIGINT)
    out = tmp_path / "out"
    assert generate(prompts, out) == 130
    assert len(by_index(out)) == 4 + len(REFUSED)
    err = capsys.readouterr().err
    assert f"ended early: 6 of 8 prompts are in {out}; the same command goes on" in err
    assert signal.getsignal(signal.SIGINT) is handler
    assert llm._owners == {}
    monkeypatch.setattr(llm, "pump", pump)
    assert generate(prompts, out) == 2
    assert len(by_index(out)) == 8
    assert f"6 of 8 prompts are in {out} already" in capsys.readouterr().err


def test_ctrl_c_twice_ends_at_once(
    llm: LLM, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")

    monkeypatch.setattr(llm, "pump", pressed)
    out = tmp_path / "out"
    assert generate(prompts, out) == 130
    assert set(by_index(out)) == REFUSED


def test_one_that_fails_is_tried_again(
    llm: LLM,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    take = delivery.take

    def failing(request: Any, *rest: Any) -> None:
        if request.prompt_ids == (300,):
            raise ZeroDivisionError("no")
        take(request, *rest)

    out = tmp_path / "out"
    with monkeypatch.context() as broken:
        broken.setattr(delivery, "take", failing)
        assert generate(prompts, out) == 1
    assert "prompt 4: failed, and has no line: ZeroDivisionError" in capsys.readouterr().err
    assert 4 not in by_index(out)
    assert generate(prompts, out) == 2
    assert 4 in by_index(out)


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said in the box, as one line."""
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--temperature", "0.5"), "params.temperature was 0.0, now 0.5"),
        (("--seed", "3"), "params.seed was null, now 3"),
        (("--n", "2", "--temperature", "1"), "params.n was 1, now 2"),
        (("--stop", "x"), 'params.stop was [], now ["x"]'),
        (("--dtype", "bfloat16"), 'dtype was "float32", now "bfloat16"'),
        (("--kv-cache-dtype", "int8"), 'kv_cache_dtype was "float32", now "int8"'),
    ],
)
def test_another_run_is_told_apart(
    llm: LLM,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    said: str,
) -> None:
    out = tmp_path / "out"
    generate(prompts, out)
    out.write_bytes(out.read_bytes()[:-3])
    before = out.read_bytes()
    monkeypatch.setattr(resumable, "open_llm", lambda *_: pytest.fail("the model was loaded"))
    capsys.readouterr()
    assert generate(prompts, out, *options) == 2
    assert said in refusal(capsys)
    assert out.read_bytes() == before


def test_other_prompts_model_and_limits_are_told_apart(
    llm: LLM,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    generate(prompts, out)
    before = out.read_bytes()

    def refused(said: str) -> None:
        capsys.readouterr()
        assert generate(prompts, out) == 2
        assert said in refusal(capsys)
        assert out.read_bytes() == before

    with monkeypatch.context() as other:
        other.setattr(resumable, "model_digest", lambda directory: "abc")
        refused('model_digest was "')
    with monkeypatch.context() as other:
        plan = llm.memory_plan
        other.setattr(llm, "memory_plan", type(plan)(**{**vars(plan), "max_model_len": 63}))
        refused("max_model_len was 64, now 63")
    with monkeypatch.context() as other:
        other.setattr(resumable.jaxinfer, "__version__", "9")
        refused('jaxinfer was "0.1.0", now "9"')
    text = prompts.read_text()
    prompts.write_text(text + prompt_line("more"))
    refused("prompts was 8, now 9")
    prompts.write_text("\n" + text)
    refused("prompts_digest was")


def test_another_device_is_worth_a_note(
    llm: LLM,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(resumable, "_device", lambda: "H100")
    generate(prompts, out)
    assert "begun on" not in capsys.readouterr().err
    monkeypatch.setattr(resumable, "_device", lambda: "H200")
    assert generate(prompts, out) == 2
    assert "begun on H100" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"hello\n", b"hello", b"{}\n", b'{"version": 1, "type": "r'])
def test_a_file_of_something_else_is_left_alone(
    llm: LLM, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    out = tmp_path / "out"
    out.write_bytes(content)
    assert generate(prompts, out) == 2
    assert "not a file of results" in refusal(capsys)
    assert out.read_bytes() == content
    assert generate(prompts, prompts) == 2


@pytest.mark.parametrize("line", [b"x\n", b"[]\n", b'{"type": "completion", "index": 8}\n', b"\n"])
def test_a_line_of_something_else_is_named(
    llm: LLM, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes
) -> None:
    out = tmp_path / "out"
    generate(prompts, out)
    content = out.read_bytes() + line + b'{"half'
    out.write_bytes(content)
    capsys.readouterr()
    assert generate(prompts, out) == 2
    assert "line 10: not a result of this run" in refusal(capsys)
    assert out.read_bytes() == content


def test_an_empty_file_is_a_new_one(llm: LLM, prompts: Path, tmp_path: Path) -> None:
    real, out = tmp_path / "real", tmp_path / "out"
    real.write_bytes(b"")
    real.chmod(0o640)
    out.symlink_to(real)
    assert generate(prompts, out) == 2
    assert len(by_index(real)) == 8
    assert out.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640


def test_two_runs_do_not_write_to_one_file(
    llm: LLM, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    generate(prompts, out)
    before = out.read_bytes()
    fields = {k: v for k, v in lines(out)[0].items() if k not in ("version", "type")}
    with open_results(out, fields, 8):
        assert generate(prompts, out) == 2
        assert "another run is writing to it" in refusal(capsys)
    assert out.read_bytes() == before
    assert generate(prompts, out) == 2


def test_prompts_of_any_source(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str, *argv: str) -> list[tuple[int | None, list[int]]]:
        out = tmp_path / name
        given = ["generate", "-m", str(GOLDEN), "--max-tokens", "4", "--out", str(out), *argv]
        assert cli.main(given) == 0
        return [(r["line"], r["prompt_token_ids"]) for _, r in sorted(by_index(out).items())]

    assert [line for line, _ in run("texts", "import os", "def f(")] == [None, None]
    assert run("ids", "--token-ids", "5,6") == [(None, [5, 6])]
    for name in ("a", "b"):
        stdin = '\n{"token_ids": [7]}\n\n{"token_ids": [8]}'
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        assert run(name, "--file", "-") == [(2, [7]), (4, [8])]


@pytest.mark.parametrize("change", [lambda s: s + prompt_line("z"), lambda s: s[:-50], str.upper])
def test_prompts_that_change_under_way_are_noticed(
    llm: LLM,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[str], str],
) -> None:
    def opened(options: Any, dtype: Any) -> Any:
        prompts.write_text(change(prompts.read_text()))
        return nullcontext(llm)

    monkeypatch.setattr(resumable, "open_llm", opened)
    assert generate(prompts, tmp_path / "out") in (1, 2)
    err = refusal(capsys)
    # A long path is broken anywhere.
    assert "prompts were changed" in err or "prompts.jsonl,line" in err.replace(" ", "")


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "no prompts"), ("\n", "no prompts"), ('{"prompt": "a"}\nx', "line 2: not JSON")],
)
def test_bad_prompts_are_found_before_anything_is_made(
    llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, said: str
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    assert generate(path, tmp_path / "out") == 2
    assert said in refusal(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["no/such/out", "."])
def test_where_no_file_can_be(
    llm: LLM, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    assert generate(prompts, tmp_path / out) == 2
    assert "--out" in refusal(capsys)


def test_json_goes_nowhere_beside_out(
    llm: LLM, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(prompts, tmp_path / "out", "--json") == 2
    assert "leave --json out" in refusal(capsys)


# -- progress ------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_alone(
    llm: LLM, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {}
    for kind in (Terminal, io.StringIO):
        monkeypatch.setattr(sys, "stderr", kind())
        assert generate(prompts, tmp_path / kind.__name__) == 2
        shown[kind] = sys.stderr.getvalue()
    assert "running" in shown[Terminal]
    assert "running" not in shown[io.StringIO]
    assert "tok/s" not in shown[io.StringIO]


def test_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "150")
    with run_bar(2, 10) as show:
        assert show is not None
        show(RunState(done=3, tokens=100, running=4, waiting=5))
    text = sys.stderr.getvalue()
    assert "3/10" in text
    assert "4 running, 5 waiting" in text


def test_a_real_model_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    out = tmp_path / "out"
    argv = ["generate", "-m", str(GOLDEN), "--token-ids", "1,2,3", "--max-tokens", "4"]
    assert cli.main([*argv, "--out", str(out)]) == 0
    assert len(by_index(out)[0]["outputs"][0]["token_ids"]) == 4
