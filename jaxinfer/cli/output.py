"""What the commands print: text as it comes, tables, and JSON records.

Data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from jaxinfer.errors import InvalidRequest
from jaxinfer.types import Logprob, RequestOutput, SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from jaxinfer.llm import LLM
    from jaxinfer.tokenizer import Tokenizer

RECORD_VERSION = 1  # of the JSON records; raised when a field changes its meaning or goes


def note(message: str) -> None:
    """A line for the user, on stderr."""
    print(message, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """A piece of data, on stdout at once: whoever reads along sees it, or is seen to be gone."""
    print(text, end="", flush=True)


def show_prompt(prompt: str | list[int]) -> None:
    """The prompt before its completion, where both appear on a screen."""
    if isinstance(prompt, str) and sys.stderr.isatty() and sys.stdout.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)


def stream(
    llm: LLM, prompt: str | list[int], params: SamplingParams, *, silent: bool = False
) -> RequestOutput:
    """Runs one request, writing its text as it comes (ids, where there is no tokenizer)."""
    began, first, separator, result = time.perf_counter(), None, "", None
    for delta in llm.stream(prompt, params):
        if first is None and delta.token_ids:
            first = time.perf_counter()
        if not silent and llm.tokenizer is not None:
            write(delta.text)
        elif not silent and delta.token_ids:
            write(separator + _join(delta.token_ids))
            separator = ","
        result = delta.result
    if not silent:
        write("\n")
    assert result is not None, "the last Delta carries the result"
    seed = f"; seed {result.seed}" if params.temperature > 0 else ""
    note(f"[{_speed(result, began, first)}; finished: {result.outputs[0].finish_reason}{seed}]")
    return result


def _speed(result: RequestOutput, began: float, first: float | None) -> str:
    count, ended = len(result.outputs[0].token_ids), time.perf_counter()
    parts = [f"{count} tokens"]
    if first is not None:
        parts.append(f"first after {first - began:.2f} s")
        if count > 1:
            parts.append(f"then {(count - 1) / (ended - first):.1f} a second")
    return ", ".join(parts)


def print_result(index: int, result: RequestOutput, tokenizer: Tokenizer | None) -> None:
    """A request's texts on stdout, which is which on stderr."""
    if result.error is not None:
        note(f"prompt {index}: error: {result.error}")
    for output in result.outputs:
        note(f"[prompt {index}, sample {output.index}; finished: {output.finish_reason}]")
        write((_join(output.token_ids) if tokenizer is None else output.text) + "\n")


def _join(token_ids: Iterable[int]) -> str:
    return ",".join(map(str, token_ids))


def print_logprobs(result: TokenLogprobs, tokenizer: Tokenizer | None) -> None:
    """A table with a row for each token; the sums on stderr."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("position", "token id", "token", "log-probability", "likeliest")
    values = ["", *(f"{value:.4f}" for value in result.logprobs)]
    likeliest = ["", *(", ".join(map(_brief, top)) for top in _top_entries(result, tokenizer))]
    for i, token in enumerate(result.token_ids):
        spelled = "" if tokenizer is None else repr(_spell(tokenizer, token))
        cells = (str(i), str(token), spelled, values[i], likeliest[i])
        table.add_row(*map(Text, cells))  # Text, because brackets in a token are not markup
    Console().print(table)
    if len(result.logprobs):
        mean = float(result.logprobs.mean())
        total = float(result.logprobs.sum())
        note(f"[sum {total:.4f}, mean {mean:.4f}, perplexity {math.exp(-mean):.4g}]")


def _brief(entry: dict[str, Any]) -> str:
    name = entry["token_id"] if entry["token"] is None else repr(entry["token"])
    return f"{name} {entry['logprob']:.3f}"


def print_info(description: dict[str, Any], prefix: str = "") -> None:
    """One line a value, nested names joined by dots."""
    for key, value in description.items():
        if isinstance(value, dict):
            print_info(value, f"{prefix}{key}.")
        else:
            shown = f"{value:,}" if type(value) is int else value
            write(f"{prefix + key:<32} {shown}\n")


def print_sites(description: dict[str, Any]) -> None:
    """One line a site: its name, its vectors' width, and what they are."""
    for name, site in description["sites"].items():
        write(f"{name:<22} {site['width']:>6}  {site['what']}\n")
    write(f"N: 0 to {description['num_layers'] - 1}, or * for all\n")


def record(kind: str, **fields: Any) -> dict[str, Any]:
    """What every JSON record has, and `fields`."""
    return {"version": RECORD_VERSION, "type": kind, **fields}


def write_record(fields: dict[str, Any]) -> None:
    """One line of JSON on stdout."""
    write(json.dumps(fields, allow_nan=False) + "\n")


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: a log-probability of minus infinity is null."""
    return None if value is None or not math.isfinite(value) else float(value)


def result_record(index: int, result: RequestOutput) -> dict[str, Any]:
    """A `completion`, or the `error` of a request that was refused; `index`: of the prompt."""
    if (error := result.error) is not None:
        message = error.message if isinstance(error, InvalidRequest) else str(error)
        field = error.field if isinstance(error, InvalidRequest) else None
        return record("error", index=index, field=field, message=message)
    outputs = [
        {
            "index": output.index,
            "text": output.text,
            "token_ids": output.token_ids,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            "cumulative_logprob": _finite(output.cumulative_logprob),
            "logprobs": output.logprobs and [_logprob_entries(entry) for entry in output.logprobs],
        }
        for output in result.outputs
    ]
    return record(
        "completion",
        index=index,
        prompt=result.prompt,
        prompt_token_ids=result.prompt_token_ids,
        seed=result.seed,
        outputs=outputs,
    )


def _logprob_entries(position: dict[int, Logprob]) -> list[dict[str, Any]]:
    return [
        {
            "token_id": token,
            "token": entry.decoded_token,
            "logprob": _finite(entry.logprob),
            "rank": entry.rank,
        }
        for token, entry in position.items()
    ]


def logprobs_record(
    index: int, result: TokenLogprobs, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """A `logprobs` record; entry i of `logprobs` and of `top` is about token i + 1."""
    tokens = tokenizer and [_spell(tokenizer, token) for token in result.token_ids]
    top = [
        [entry | {"logprob": _finite(entry["logprob"])} for entry in entries]
        for entries in _top_entries(result, tokenizer)
    ]
    return record(
        "logprobs",
        index=index,
        token_ids=result.token_ids,
        tokens=tokens,
        logprobs=[_finite(value) for value in result.logprobs.tolist()],
        top=top,
    )


def _top_entries(result: TokenLogprobs, tokenizer: Tokenizer | None) -> list[list[dict[str, Any]]]:
    """The likeliest tokens of each position after the first."""
    return [
        [
            {"token_id": i, "token": tokenizer and _spell(tokenizer, i), "logprob": value}
            for i, value in zip(ids, values, strict=True)
        ]
        for ids, values in zip(result.top_ids.tolist(), result.top_logprobs.tolist(), strict=True)
    ]


def _spell(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=False)
