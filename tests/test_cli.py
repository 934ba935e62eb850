"""The command line: what goes to which stream, records, input in its three forms, exit codes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxinfer import cli
from jaxinfer.cli import model as cli_model
from jaxinfer.errors import (
    CapacityError,
    CheckpointError,
    InvalidRequest,
    JaxinferError,
    QueueFull,
    UnsupportedModel,
)
from jaxinfer.hub import DEMO_MODELS
from jaxinfer.models.families import read_config
from jaxinfer.models.sites import match, widths
from jaxinfer.types import CompletionOutput, Delta, Logprob, RequestOutput, TokenLogprobs

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "goldens" / "qwen2"
DEMO = ROOT / "checkpoints" / DEMO_MODELS["demo"]


class ByteTokenizer:
    has_chat_template = True

    def encode(self, text):
        return list(text.encode())

    def decode(self, token_ids, skip_special_tokens=True):
        return bytes(token_ids).decode(errors="replace")


class EchoLLM:
    """Answers a prompt with its tokens in reverse; refuses empty prompts."""

    def __init__(self, tokenizer=None):
        self.tokenizer = tokenizer
        self.calls = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def chat_tokens(self, messages):
        return list("|".join(m["content"] for m in messages).encode())

    def generate(self, prompts, params, *, on_error):
        assert on_error == "return"
        return [self._answer(i, prompt, params) for i, prompt in enumerate(prompts)]

    def stream(self, prompt, params):
        result = self._answer(0, prompt, params)
        if result.error:
            raise result.error
        (output,) = result.outputs
        for i, token in enumerate(output.token_ids):
            last = i == len(output.token_ids) - 1
            text = output.text[i] if self.tokenizer else ""
            yield Delta(0, text, (token,), result=result if last else None)

    def logprobs(self, sequences, *, top=0):
        return [self._scores(self._ids(s), top) for s in sequences]

    def _ids(self, prompt):
        return tuple(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)

    def _answer(self, index, prompt, params):
        self.calls.append((prompt, params))
        ids = self._ids(prompt)
        text = prompt if isinstance(prompt, str) else None
        if not ids:
            error = InvalidRequest("it is empty", index=index)
            return RequestOutput("0", text, (), (), error=error)
        tokens = tuple(reversed(ids))
        entries = tuple({t: Logprob(-np.inf, 1, "?")} for t in tokens)
        outputs = tuple(
            CompletionOutput(
                index=i,
                text=self.tokenizer.decode(tokens) if self.tokenizer else "",
                token_ids=tokens,
                logprobs=entries if params.logprobs is not None else None,
                finish_reason="length",
            )
            for i in range(params.n)
        )
        return RequestOutput("0", text, ids, outputs, seed=7)

    def _scores(self, ids, top):
        count = len(ids) - 1
        return TokenLogprobs(
            ids,
            np.full(count, -0.5, np.float32),
            np.full((count, top), ord("["), np.int32),
            np.full((count, top), -0.25, np.float32),
        )


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch):
    """A command may set this variable for its process, which here is everyone's."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")


@pytest.fixture
def llm(monkeypatch):
    fake = EchoLLM(ByteTokenizer())
    monkeypatch.setattr(cli, "open_llm", lambda options: fake)
    return fake


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def test_one_prompt_streams_text_alone_to_stdout(llm, capsys):
    assert cli.main(["generate", "abc", "--temperature", "0.5"]) == 0
    out, err = capsys.readouterr()
    assert out == "cba\n"
    assert "3 tokens" in err
    assert "seed 7" in err


def test_sampling_options_arrive(llm):
    options = (
        "--n 2 --max-tokens 9 --min-tokens 3 --temperature 0.5 --top-p 0.9 --top-k 4 --min-p 0.1 "
        "--repetition-penalty 1.5 --seed 3 --stop x --stop yz --ignore-eos --logprobs 2 --json"
    )
    assert cli.main(["generate", "abc", *options.split()]) == 0
    ((prompt, params),) = llm.calls
    assert prompt == "abc"
    given = {
        "n": 2, "max_tokens": 9, "min_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 4,
        "min_p": 0.1, "repetition_penalty": 1.5, "seed": 3, "stop": ("x", "yz"),
        "ignore_eos": True, "logprobs": 2,
    }  # fmt: skip
    assert {name: getattr(params, name) for name in given} == given


def test_greedy_is_the_default(llm):
    cli.main(["generate", "abc"])
    assert llm.calls[0][1].temperature == 0


def test_json_is_one_versioned_record_a_prompt(llm, capsys):
    assert cli.main(["generate", "ab", "é", "--json", "--n", "2", "--logprobs", "0"]) == 0
    first, second = records(capsys.readouterr().out)
    assert (first["version"], first["type"], first["index"]) == (1, "completion", 0)
    assert (first["prompt"], first["prompt_token_ids"], first["seed"]) == ("ab", [97, 98], 7)
    assert [o["index"] for o in first["outputs"]] == [0, 1]
    assert first["outputs"][0]["text"] == "ba"
    assert first["outputs"][0]["finish_reason"] == "length"
    # minus infinity is not JSON
    entry = {"token_id": 98, "token": "?", "logprob": None, "rank": 1}
    assert first["outputs"][0]["logprobs"][0] == [entry]
    assert second["index"] == 1


def test_several_prompts_are_told_apart_on_stderr(llm, capsys):
    assert cli.main(["generate", "ab", "cd"]) == 0
    out, err = capsys.readouterr()
    assert out == "ba\ndc\n"
    assert "prompt 1, sample 0" in err


def test_stdin_is_a_prompt(llm, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    assert cli.main(["generate", "-"]) == 0
    assert capsys.readouterr().out == "b\na\n"


def test_a_model_without_tokenizer_takes_and_gives_ids(monkeypatch, capsys):
    monkeypatch.setattr(cli, "open_llm", lambda options: EchoLLM())
    assert cli.main(["generate", "--token-ids", "1,2, 3"]) == 0
    assert capsys.readouterr().out == "3,2,1\n"
    assert cli.main(["generate", "--token-ids", "1,2", "--n", "2"]) == 0
    assert capsys.readouterr().out == "2,1\n2,1\n"


def test_prompts_from_a_file(llm, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n\n{"token_ids": [99, 100]}\n', encoding="utf-8")
    assert cli.main(["generate", "--file", str(path), "--json"]) == 0
    first, second = records(capsys.readouterr().out)
    assert first["prompt"] == "a\u2028b"
    assert second["prompt_token_ids"] == [99, 100]


def test_one_bad_prompt_does_not_cost_the_others(llm, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"prompt": ""}\n{"prompt": "ab"}\n'))
    assert cli.main(["generate", "--file", "-", "--json"]) == 2
    error, good = records(capsys.readouterr().out)
    assert error == {
        "version": 1, "type": "error", "index": 0, "field": "prompt", "message": "it is empty",
    }  # fmt: skip
    assert good["outputs"][0]["text"] == "ba"


def test_one_bad_prompt_in_text_mode_is_told_on_stderr(llm, capsys):
    assert cli.main(["generate", "", "ab"]) == 2
    out, err = capsys.readouterr()
    assert out == "ba\n"
    assert "prompt 0: error: request 0, prompt: it is empty" in err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"prompt": "a"\n', "line 1: not JSON"),
        ('{"prompt": "a"}\n{"prompt": 3}', "line 2: expected"),
        ('{"prompt": "a", "temprature": 1}', "line 1: expected"),
        ('["a"]', "line 1: expected"),
        ("\n", "no prompts"),
    ],
)
def test_a_bad_line_is_named_before_any_work(llm, tmp_path, capsys, content, said):
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    assert cli.main(["generate", "--file", str(path)]) == 2
    out, err = capsys.readouterr()
    assert said in " ".join(err.replace("│", " ").split())
    assert (out, llm.calls) == ("", [])


@pytest.mark.parametrize(
    "argv",
    [
        ["generate"],
        ["generate", "a", "--token-ids", "1"],
        ["generate", "--token-ids", "1,x"],
        ["generate", "--file", "/no/such.jsonl"],
        ["generate", "a", "--logprobs", "1"],
        ["generate", "a", "--dtype", "int8"],
        ["generate", "a", "--gpu-memory-utilization", "5"],
        ["nonsense"],
    ],
)
def test_wrong_usage_exits_2(llm, capsys, argv):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Usage: jaxinfer" in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("bad", field="top_p"), 2),
        (UnsupportedModel("bad"), 3),
        (CheckpointError("bad"), 3),
        (CapacityError("bad"), 4),
        (QueueFull("bad"), 4),
        (JaxinferError("bad"), 1),
        (KeyError("bad"), 1),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(32, "gone"), 1),
    ],
)
def test_errors_are_one_line_and_a_documented_code(monkeypatch, capsys, error, code):
    def fail(options):
        raise error

    monkeypatch.setattr(cli, "open_llm", fail)
    # typer swaps the streams of a process whose reader is gone
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    assert cli.main(["generate", "a"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == (0 if isinstance(error, OSError | KeyboardInterrupt) else 1)
    assert f"{code} " in cli.EPILOG


def test_debug_shows_the_traceback(monkeypatch, capsys):
    def fail(options):
        raise CheckpointError("bad")

    monkeypatch.setattr(cli, "open_llm", fail)
    assert cli.main(["--debug", "generate", "a"]) == 3
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: bad\n")


def test_an_interrupted_stream_exits_130(llm, monkeypatch, capsys):
    def stream(prompt, params):
        yield Delta(0, "par", (1,))
        raise KeyboardInterrupt

    monkeypatch.setattr(llm, "stream", stream)
    assert cli.main(["generate", "a"]) == 130
    assert capsys.readouterr().out == "par"


def test_chat_remembers_its_turns(llm, capsys):
    argv = ["chat", "--system", "s", "--message", "ab", "--message", "c"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == "ba|s\nc|s|ab|ba|s\n"[::1].replace(
        "c|s|ab|ba|s", "c|s|ab|ba|s"
    )


def test_chat_asks_line_by_line(llm, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\n\n"))
    assert cli.main(["chat", "--json"]) == 0
    out, err = capsys.readouterr()
    (only,) = records(out)
    assert only["outputs"][0]["text"] == "ba"
    assert err.count("> ") == 3


def test_chat_needs_a_template(llm, capsys):
    llm.tokenizer.has_chat_template = False
    assert cli.main(["chat", "--message", "a"]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_logprobs_as_a_table(llm, capsys):
    assert cli.main(["logprobs", "a[b", "--top", "1"]) == 0
    out, err = capsys.readouterr()
    assert "-0.5000" in out
    assert "'[' -0.250" in out
    assert "perplexity 1.649" in err


def test_logprobs_as_records(llm, capsys):
    assert cli.main(["logprobs", "ab", "--json", "--top", "1"]) == 0
    (only,) = records(capsys.readouterr().out)
    assert only == {
        "version": 1, "type": "logprobs", "index": 0, "token_ids": [97, 98], "tokens": ["a", "b"],
        "logprobs": [-0.5], "top": [[{"token_id": 91, "token": "[", "logprob": -0.25}]],
    }  # fmt: skip


def test_info_reads_the_config_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((GOLDEN / "config.json").read_bytes())
    assert cli.main(["info", "-m", str(tmp_path), "--json", "--dtype", "bfloat16"]) == 0
    (only,) = records(capsys.readouterr().out)
    assert (only["type"], only["dtype"]) == ("info", "bfloat16")
    assert only["config"]["num_layers"] == 2
    # 2 layers, keys and values of 1 head of 16, 2 bytes each
    assert only["kv_bytes_per_token"] == 2 * 2 * 16 * 2
    assert only["memory"]["weights"] == 2 * only["parameters"]
    info = ["info", "-m", str(tmp_path), "--json", "--kv-cache-dtype", "fp8"]
    assert cli.main(info) == 0
    (only,) = records(capsys.readouterr().out)
    assert only["kv_cache_dtype"] == "float8_e4m3fn"
    assert only["kv_bytes_per_token"] == 2 * 2 * (16 + 4)  # and a scale
    assert cli.main(["info", "-m", str(tmp_path), "--max-model-len", "100"]) == 0
    assert "memory.max_model_len             100\n" in capsys.readouterr().out


def test_info_lists_the_sites(tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((GOLDEN / "config.json").read_bytes())
    assert cli.main(["info", "-m", str(tmp_path), "--sites", "--json"]) == 0
    (only,) = records(capsys.readouterr().out)
    config = read_config(GOLDEN)
    listed = {name.replace("N", str(i)) for name in only["sites"] for i in range(2)}
    assert listed == set(match(["*"], config))
    assert {site["width"] for site in only["sites"].values()} == set(widths(config).values())
    assert cli.main(["info", "-m", str(tmp_path), "--sites"]) == 0
    assert "layers.N.mlp_hidden " in capsys.readouterr().out


def test_info_tells_of_a_model_that_does_not_fit(tmp_path, capsys):
    config = json.loads((GOLDEN / "config.json").read_text()) | {
        "num_hidden_layers": 400, "hidden_size": 4800, "num_attention_heads": 300,
        "num_key_value_heads": 300, "max_position_embeddings": 1 << 20,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["info", "-m", str(tmp_path), "--max-model-len", str(1 << 20)]) == 0
    assert "memory.error" in capsys.readouterr().out


def test_a_wrong_name_is_refused_before_jax_starts(monkeypatch, capsys):
    monkeypatch.setattr(cli_model, "choose_dtype", lambda options: pytest.fail("JAX was started"))
    for command in ("info", "generate a", "chat", "logprobs a"):
        assert cli.main([*command.split(), "-m", "/no/such"]) == 3
        assert "'/no/such': does not exist" in capsys.readouterr().err


def test_verify_prints_its_report(monkeypatch, capsys):
    from jaxinfer import verify

    report = verify.Report(
        model="m", dtype="float32", reference_dtype="float32", num_prompts=1, num_positions=2,
        layer_error_mean=(1e-6,), layer_error_max=(2e-6,), kl_mean=0.0, kl_max=0.0,
        top1_agreement=1.0, greedy_tokens=4, greedy_agreement=1.0, greedy_identical=1,
    )  # fmt: skip
    monkeypatch.setattr(verify, "verify", lambda model, **options: report)
    assert cli.main(["verify", "m", "--json"]) == 0
    (only,) = records(capsys.readouterr().out)
    assert (only["type"], only["model"], only["greedy_identical"]) == ("verify", "m", 1)
    assert cli.main(["verify", "m"]) == 0
    assert "top-1 agreement" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from jaxinfer.cli import main; assert main(['--help']) == 0; "
        "print({'jax', 'transformers', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stderr == "set()\n"
    assert "Exit codes" in done.stdout


def test_a_real_model_end_to_end(capsys):
    argv = ["generate", "-m", str(GOLDEN), "--token-ids", "1,2,3", "--max-tokens", "4"]
    assert cli.main(argv) == 0
    ids = capsys.readouterr().out.strip().split(",")
    assert len(ids) == 4
    assert cli.main([*argv, "--json"]) == 0
    (only,) = records(capsys.readouterr().out)
    assert [str(i) for i in only["outputs"][0]["token_ids"]] == ids
    assert cli.main([*argv[:-2], "--max-model-len", "100000"]) == 2
    assert "max_model_len=100000" in capsys.readouterr().err


@pytest.mark.skipif(not DEMO.is_dir(), reason="the demo model is not in this checkout")
def test_the_demo_model_needs_no_name(capsys):
    assert cli.main(["generate", "def read_config(", "--max-tokens", "8"]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert "8 tokens" in err
