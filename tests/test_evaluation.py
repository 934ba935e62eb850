"""lm-eval on our engine: its numbers are those of a forward pass without any of the engine."""

from __future__ import annotations

import json
import logging
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import LLM, InvalidRequest, SamplingParams
from jaxinfer.loading import load_weights
from jaxinfer.models import decoder
from jaxinfer.models.families import read_config
from jaxinfer.tokenizer import load_tokenizer
from tests.conftest import TinyModel, small_llm

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install jaxinfer[eval]")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from jaxinfer import evaluation
from jaxinfer.evaluation import JaxinferLM, evaluate

LENGTH = 64  # longest sequence, in tokens, of the LLMs here
DEMO = Path(__file__).parents[1] / "checkpoints" / "demo" / "target"
TEXT = "import os\nimport sys\n\n\ndef main(argv):\n    return os.path.join(argv[0], sys.prefix)\n"
PAIRS = [
    ("import", " os\n"),
    ("", "def main():"),
    ("class A", ":\n    pass"),
    ("import", " sys"),
    ("import", " os\n"),  # a second time
    ("for i in ", "range(10):"),  # the space belongs to the continuation
    (TEXT * 5, "    return 1\n"),  # too long
]


@pytest.fixture(scope="module")
def shared(tiny: TinyModel) -> Iterator[LLM]:
    with small_llm(tiny, max_model_len=LENGTH) as llm:
        yield llm


class Watched(JaxinferLM):
    """Counts the sequences of every call of the engine."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        super().__init__(llm, **options)
        self.calls: list[tuple[str, int]] = []
        for name in ("logprobs", "generate"):
            monkeypatch.setattr(llm, name, self._counted(name, getattr(llm, name)))

    def _counted(self, name: str, call: Any) -> Any:
        def counted(sequences: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, len(sequences)))
            return call(sequences, *args, **kwargs)

        return counted


@pytest.fixture
def lm(shared: LLM, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(shared, monkeypatch)


def instances(kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


forward = jax.jit(
    lambda p, config, tokens: decoder.apply(p, config, tokens).logits, static_argnums=1
)


def reference(params: Any, config: Any, sequence: Sequence[int]) -> np.ndarray:
    """Log-probabilities [N-1, V] after each token but the last, in float32."""
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(sequence)] = sequence
    logits = forward(params, config, jnp.asarray(padded))[0, : len(sequence) - 1]
    return np.asarray(jax.nn.log_softmax(logits))


def scored(logprobs: np.ndarray, sequence: Sequence[int], length: int) -> tuple[float, bool]:
    """Of the last `length` tokens of `sequence`, from the reference's log-probabilities."""
    tokens, rows = np.array(sequence[-length:]), logprobs[-length:]
    return rows[np.arange(length), tokens].sum(), bool((rows.argmax(1) == tokens).all())


def encode(tiny: TinyModel, text: str) -> list[int]:
    return tiny.tokenizer.backend.encode(text, add_special_tokens=False)


# -- log-probabilities ---------------------------------------------------------------------------


def test_loglikelihoods(lm: Watched, tiny: TinyModel, caplog: pytest.LogCaptureFixture) -> None:
    got = lm.loglikelihood(instances("loglikelihood", PAIRS))
    assert lm.calls == [("logprobs", len(PAIRS) - 1)]
    wholes, lengths = [], []
    for context, continuation in PAIRS:
        whole = encode(tiny, context + continuation)
        before = encode(tiny, context.rstrip())
        assert whole[: len(before)] == before
        wholes.append(([] if context else [0]) + whole)
        lengths.append(len(whole) - len(before))
    wholes = [whole[-LENGTH:] for whole in wholes]
    assert {len(whole) for whole in wholes} > {LENGTH}
    for (logprob, greedy), whole, length in zip(got, wholes, lengths, strict=True):
        want = scored(reference(tiny.params, tiny.config, whole), whole, length)
        np.testing.assert_allclose(logprob, want[0], rtol=1e-4)
        assert greedy == want[1]
    (record,) = caplog.records
    assert f"1 of {len(PAIRS)} requests do not fit in {LENGTH} tokens" in record.getMessage()


def test_what_greedy_decoding_gives_is_greedy(lm: Watched) -> None:
    context = [5, 6, 7]
    (output,) = lm.llm.generate([context], SamplingParams(temperature=0, max_tokens=6))
    tokens = list(output.outputs[0].token_ids)
    other = [*tokens[:2], (tokens[2] + 1) % 4096, *tokens[3:]]
    results = lm._loglikelihood_tokens([(None, context, tokens), (None, context, other)])
    assert [greedy for _, greedy in results] == [True, False]


def test_continuations_that_are_refused(lm: Watched) -> None:
    for continuation, words in (("", "empty"), (TEXT * 5, f"from 1 to {LENGTH - 1}")):
        with pytest.raises(InvalidRequest, match=words) as error:
            lm.loglikelihood(instances("loglikelihood", [("a", " b"), ("a", continuation)]))
        assert (error.value.index, error.value.field) == (1, "continuation")
    assert lm.calls == []


def test_whole_texts(lm: Watched, tiny: TinyModel) -> None:
    """Each token is predicted once, from all before it that fit, after EOS where there are none."""
    texts = ["import os", TEXT * 8, "", TEXT]
    got = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(t,) for t in texts]))
    assert [name for name, _ in lm.calls] == ["logprobs"]
    most = LENGTH - 1
    for text, total in zip(texts, got, strict=True):
        tokens = encode(tiny, text)
        want = 0.0
        for begin in range(0, len(tokens), most):
            end = min(begin + most, len(tokens))
            window = ([0, *tokens][: end + 1])[-LENGTH:]
            logprobs = reference(tiny.params, tiny.config, window)
            want += scored(logprobs, window, end - begin)[0]
        np.testing.assert_allclose(total, want, rtol=1e-4)


def test_a_prefix_of_ones_own(shared: LLM) -> None:
    pair = instances("loglikelihood", [("", "import os")])
    other = JaxinferLM(shared, prefix_token_id=9)
    assert other.prefix_token_id == 9
    assert JaxinferLM(shared).prefix_token_id == other.eot_token_id == 0
    assert other.loglikelihood(pair) != JaxinferLM(shared).loglikelihood(pair)


# -- generation ----------------------------------------------------------------------------------


def test_generation(lm: Watched, caplog: pytest.LogCaptureFixture) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=12)
    contexts = ["import os", "def f(", TEXT * 5, ""]
    tokenizer = lm.tokenizer
    prompts = [tokenizer.encode(context)[-(LENGTH - 12) :] or [0] for context in contexts]
    full = [output.outputs[0].text for output in lm.llm.generate(prompts, greedy)]
    stop = full[1][5:8]
    lm.calls.clear()
    asked = [
        (contexts[0], {"until": [], "max_gen_toks": 12}),
        (contexts[1], {"until": [stop], "max_gen_toks": 12, "do_sample": False}),
        (contexts[2], {"max_gen_toks": 12}),
        (contexts[0], {"max_gen_toks": 3}),
        (contexts[3], {"max_gen_toks": 12}),
    ]
    got = lm.generate_until(instances("generate_until", asked))
    assert lm.calls == [("generate", 5)]
    assert got[0] == full[0]
    assert got[1] == full[1][: full[1].index(stop)]
    assert got[2] == full[2]
    assert full[0].startswith(got[3])
    assert got[4] == full[3]
    (record,) = caplog.records
    assert f"1 of 5 requests do not fit in {LENGTH} tokens" in record.getMessage()


def test_sampled_repeats_differ_and_come_again(lm: Watched) -> None:
    sampled = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8, "seed": 3}
    asked = instances("generate_until", [("import os", sampled)] * 3)
    first = lm.generate_until(asked)
    assert len(set(first)) == 3
    assert lm.generate_until(asked) == first


def test_generations_that_are_refused(lm: Watched) -> None:
    for kwargs, words in (
        ({"max_gen_toks": LENGTH}, "leave no room"),
        ({"guidance_scale": 2}, "guidance_scale: not known"),
        ({"do_sample": True, "top_p": 2.0, "max_gen_toks": 4}, "2.0 is not a number"),
    ):
        asked = [("import os", {"max_gen_toks": 4}), ("import os", kwargs)]
        with pytest.raises(InvalidRequest, match=words) as error:
            lm.generate_until(instances("generate_until", asked))
        assert error.value.index == 1


def test_chat_templates(tiny: TinyModel, shared: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{"role": "user", "content": "hi"}]
    lm = JaxinferLM(shared, chat_template_args={"mark": "!"})
    with pytest.raises(InvalidRequest, match="no chat template"):
        lm.apply_chat_template(messages)
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ '[' + m.role + mark + ']' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    monkeypatch.setattr(tiny.tokenizer.backend, "chat_template", template)
    assert lm.apply_chat_template(messages) == "[user!]hi\n[assistant]"
    begun = [*messages, {"role": "assistant", "content": "It is"}]
    want = "[user!]hi\n[assistant!]It is"
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == want
    assert lm.chat_template(True) == template
    with pytest.raises(InvalidRequest, match="refuses these messages: no system"):
        lm.apply_chat_template([{"role": "system", "content": "be"}])


def test_a_template_that_brings_its_own_bos(
    tiny: TinyModel, lm: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def tokenizer(text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        seen.append(add_special_tokens)
        return {"input_ids": [1]}

    tokenizer.bos_token = "<s>"  # type: ignore[attr-defined]
    monkeypatch.setattr(lm, "tokenizer", tokenizer)
    for text, special in (("<s>a", None), ("a", None), ("a", False), ("<s>a", True)):
        lm.tok_encode(text, special)
    assert seen == [False, True, False, True]


# -- making one ----------------------------------------------------------------------------------


def test_without_a_tokenizer(tiny: TinyModel) -> None:
    bare = LLM.from_params(
        tiny.params, tiny.config, dtype="float32", max_model_len=LENGTH, kv_cache_bytes=1 << 20
    )
    with bare, pytest.raises(ValueError, match="no tokenizer"):
        JaxinferLM(bare)


def test_arguments_out_of_range(shared: LLM) -> None:
    for option in ({"prefix_token_id": 4096}, {"prefix_token_id": -1}, {"max_gen_toks": 0}):
        with pytest.raises(ValueError, match=next(iter(option))):
            JaxinferLM(shared, **option)


def test_without_lm_eval() -> None:
    code = "import sys; sys.modules['lm_eval'] = None; import jaxinfer.evaluation"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install jaxinfer[eval]" in done.stderr.splitlines()[-1]


# -- tasks ---------------------------------------------------------------------------------------

CHOICES = [
    {"context": "import os\nimport sys\n\ndef main", "choices": ["(argv=None):", "]]", "%%"]},
    {"context": "class Error", "choices": ["(Exception):", " 123", " else"]},
    {"context": "for i in ", "choices": ["import", "range(len(x)):", "raise"]},
]
CHOICE_TASK = """\
task: choice
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITE_TASK = """\
task: write
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""
WHOLE_TASK = """\
task: whole
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context * 12}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaskManager:
    """Three tasks in files; whoever reaches for the network fails."""

    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in CHOICES))
    files = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
    common = f"dataset_path: json\ndataset_kwargs: {json.dumps(files)}\ntest_split: test\n"
    for name, text in (("choice", CHOICE_TASK), ("write", WRITE_TASK), ("whole", WHOLE_TASK)):
        (tmp_path / f"{name}.yaml").write_text(text + common)
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def responses(results: dict[str, Any], task: str) -> list[Any]:
    """Of each document in turn: pairs of what was asked and what was answered."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [
        (asked, answered[0])
        for sample in samples
        for asked, answered in zip(sample["arguments"], sample["resps"], strict=True)
    ]


@pytest.mark.slow
def test_the_demo_on_local_tasks(tasks: TaskManager, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jaxinfer")
    results: Any = simple_evaluate(
        model="jaxinfer",
        model_args=(
            f"pretrained=demo,dtype=float32,max_model_len={LENGTH},max_num_seqs=4,"
            "kv_cache_bytes=2000000,max_num_batched_tokens=32,max_steps=4"
        ),
        tasks=["choice", "write", "whole"],
        task_manager=tasks,
        batch_size=1,
        device="cuda:0",  # as lm-eval's command line, unasked
    )
    assert "no effect on jaxinfer: {'batch_size': 1, 'device': 'cuda:0'}" in caplog.text
    config = read_config(DEMO)
    params = load_weights(DEMO, config, jnp.dtype("float32"))
    tokenizer = load_tokenizer(DEMO)
    assert tokenizer is not None
    logprobs = []
    for (context, continuation), (logprob, greedy) in responses(results, "choice"):
        before = tokenizer.encode(context.rstrip())
        whole = tokenizer.encode(context + continuation)
        assert whole[: len(before)] == before
        want = scored(reference(params, config, whole), whole, len(whole) - len(before))
        np.testing.assert_allclose(logprob, want[0], rtol=1e-4)
        assert greedy == want[1]
        logprobs.append(logprob)
    right = (np.array(logprobs).reshape(3, 3).argmax(1) == 0).mean()
    assert results["results"]["choice"]["acc,none"] == pytest.approx(right)
    for (context, _), text in responses(results, "write"):
        tokens = tokenizer.encode(context)
        for _ in range(8):
            tokens.append(int(reference(params, config, [*tokens, 0])[-1].argmax()))
        assert text == tokenizer.decode(tokens)[len(context) :].split("\n")[0]
    wholes = responses(results, "whole")
    size = sum(len(text.encode()) for (text,), _ in wholes)
    bits = -sum(total for _, total in wholes) / np.log(2) / size
    assert results["results"]["whole"]["bits_per_byte,none"] == pytest.approx(bits)
    assert results["config"]["model"] == "jaxinfer"
    assert results["max_length"] == LENGTH


def test_answers_that_lm_eval_kept_are_not_computed_again(
    lm: Watched, tasks: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "JaxinferLM", lambda llm: lm)
    options = {"task_manager": tasks, "use_cache": str(tmp_path / "kept")}
    runs = [evaluate(lm.llm, ["choice", "write", "whole"], **options) for _ in range(2)]
    assert sorted(name for name, _ in lm.calls) == ["generate", "logprobs", "logprobs"]
    assert runs[0]["results"] == runs[1]["results"]


def test_lm_eval_knows_the_model() -> None:
    assert get_model("jaxinfer") is JaxinferLM
    with pytest.raises(ValueError, match="trust_remote_code: not known"):
        JaxinferLM.create_from_arg_string("pretrained=demo,trust_remote_code=True")


def test_one_process(lm: Watched) -> None:
    assert (lm.rank, lm.world_size, lm.max_length, lm.max_gen_toks) == (0, 1, LENGTH, 256)
    assert "/" not in lm.tokenizer_name


@pytest.mark.slow
def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).parents[1] / "examples" / "lm_eval_local.py"
    runpy.run_path(str(example), run_name="__main__")
    assert "|python_completion|" in capsys.readouterr().out
