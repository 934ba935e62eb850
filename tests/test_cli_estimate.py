"""`jaxinfer estimate`: where configs come from, records and tables, what is refused and how."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from jaxinfer import cli, hardware
from jaxinfer.hardware import GPUS
from jaxinfer.known_models import HF_CONFIGS

GOLDEN = Path(__file__).parent / "goldens" / "qwen2"


def run(capsys, *args):
    code = cli.main(["estimate", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_record_has_what_the_table_shows(capsys):
    args = (
        "llama-3.1-8b --gpu h100 --precision int4 --batch 64 --context 4096 --tp 1 --pp 1"
        " --price 2.5 --tpot-ms 30"
    )
    code, out, err = run(capsys, *args.split(), "--json")
    (found,) = records(out)
    assert (code, err) == (0, "")
    assert (found["version"], found["type"], found["gpu"]) == (1, "estimate", "h100")
    answer = found["estimate"]
    assert answer["kv_bytes_per_token"] == 131072
    assert answer["setting"]["gpus"] == 1
    assert answer["memory"]["fits"] is True
    assert answer["setting"]["gpu"]["source"].startswith("https://")
    assert 64 < found["batch_within_tpot"] <= answer["max_batch"]
    code, out, _ = run(capsys, *args.split())
    for shown in ("5.70 GB", "131,072", f"{answer['decode_ms']:.2f} ms", "fits", "measured"):
        assert shown in out


def test_without_a_gpu_all_are_compared(capsys):
    args = ("llama-3.1-70b", "--batch", 16, "--price", "h100=2.5,L40S=1.1", "--tpot-ms", 40)
    code, out, _ = run(capsys, *args, "--json")
    found = {record["gpu"]: record for record in records(out)}
    assert code == 0
    assert list(found) == list(GPUS)
    assert found["t4"]["estimate"] is None
    assert found["t4"]["reason"] == "no bfloat16"
    assert found["h100"]["estimate"]["setting"]["tp"] == 4
    assert found["h100"]["estimate"]["cost_per_million_output"] > 0
    assert found["b200"]["estimate"]["cost_per_million_output"] is None
    code, out, _ = run(capsys, *args)
    assert all(name in out for name in (*GPUS, "4 tp4", "per million", "batch in 40 ms"))
    assert max(map(len, out.splitlines())) <= 120


def test_what_does_not_fit_is_said_with_what_does(capsys):
    code, out, _ = run(capsys, "llama-3.1-70b", "--gpu", "h100")
    assert code == 0
    assert "does not fit" in out
    assert "precision fp8; or tp 2 (2 GPUs)" in out


@pytest.mark.parametrize("place", [GOLDEN, GOLDEN / "config.json", "demo", "Qwen3-8B"])
def test_where_a_config_comes_from(place, capsys):
    code, out, err = run(capsys, place, "--gpu", "l4", "--json")
    assert code == 0, err
    assert records(out)[0]["estimate"]["memory"]["fits"] is True


def test_a_config_that_is_one_of_the_known(tmp_path, capsys):
    path = tmp_path / "some.json"
    path.write_text(json.dumps(HF_CONFIGS["mistral-7b"]))
    results = [run(capsys, name, "--gpu", "h200", "--json")[1] for name in (path, "mistral-7b")]
    first, second = (records(out)[0] | {"model": ""} for out in results)
    assert first == second


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ("llama-4 --gpu h100", 3, "one of llama-3.2-1b, llama-3.1-8b"),
        ("llama-3.1-8b --gpu h99", 2, "expected one of t4, a10"),
        ("llama-3.1-8b --gpu h100 --tp 3", 2, "nearest that works: 2"),
        ("llama-2-7b --gpu h100 --context 8192", 2, "up to 4096"),
        ("llama-2-7b --gpu h100 --precision int3", 2, "precision='int3'"),
        ("llama-2-7b --context 8192", 2, "up to 4096"),
        ("llama-2-7b --tp 2", 2, "give --gpu too"),
        ("llama-2-7b --price 2", 2, "h100=2.5,l40s=1.1"),
        ("llama-2-7b --gpu h100 --price cheap", 2, "price='h100=cheap'"),
        ("llama-2-7b --gpu h100 --tpot-ms 0", 2, "tpot-ms=0"),
        ("llama-2-7b --plot roof.png", 2, "give --gpu too"),
        ("llama-2-7b --check", 2, "a shape without weights"),
        ("demo --check --gpu h100", 2, "leave --gpu out"),
        ("demo --check --tpot-ms 3", 2, "leave --tpot-ms out"),
        ("demo --check --plot roof.png", 2, "leave --check out"),
        ("demo --check --precision int3", 2, "precision='int3'"),
        ("demo --check --context 16", 2, "expected at least 32"),
    ],
)
def test_refusals(args, code, message, capsys):
    got, out, err = run(capsys, *args.split())
    assert (got, out) == (code, "")
    # usage errors come in a box, wrapped
    assert message in " ".join(err.replace("│", " ").split())


def test_a_check_on_a_cpu_is_of_memory(capsys, monkeypatch):
    args = (GOLDEN, "--check", "--batch", 2, "--context", 32, "--prompt", 15)
    code, out, _ = run(capsys, *args, "--json")
    (found,) = records(out)
    items = {item["what"]: item for item in found["items"]}
    assert (code, found["type"], found["gpu"], found["precision"]) == (0, "check", None, "fp32")
    assert "no row for 'cpu'" in found["unpredicted"]
    for name in ("weights", "KV cache, a token", "KV cache"):
        assert items[name]["error"] == 0
    assert "temporaries: they are known of a GPU's kernels" in found["unpredicted"]
    of_steps = "temporaries of compiled steps", "memory, of these"
    for name in ("decode step", "decode", "first token", "prompts", *of_steps):
        assert items[name]["predicted"] is None
        assert items[name]["measured"] > 0
    assert items["decode"]["measured"] == pytest.approx(2e3 / items["decode step"]["measured"])

    # Where there is a row, speed is predicted too.
    monkeypatch.setattr(hardware, "DEVICE_KINDS", {"cpu": "h100"})
    code, out, _ = run(capsys, *args, "--precision", "fp32")
    assert code == 0
    assert "speed:" not in out
    assert out.count("%") == 7


@pytest.mark.parametrize("contents", ["[]", "{", '{"architectures": ["T5Model"]}'])
def test_a_config_that_is_none(contents, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(contents)
    code, _, err = run(capsys, path, "--gpu", "h100")
    assert code == 3
    assert err.startswith("error: ")


def test_the_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "roof.png"
    code, _, err = run(capsys, "llama-3.1-8b", "--gpu", "h100", "--plot", path)
    assert code == 0, err
    assert path.read_bytes().startswith(b"\x89PNG")
    code, _, err = run(capsys, "llama-3.1-8b", "--gpu", "h100", "--plot", tmp_path / "no" / "x.png")
    assert code == 4
    assert "cannot be written" in err


def test_a_plot_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = run(capsys, "llama-3.1-8b", "--gpu", "h100", "--plot", "x.png")
    assert code == 2
    assert "pip install matplotlib" in " ".join(err.replace("│", " ").split())
    assert not Path("x.png").exists()
