"""From the start of an engine's process to its first token: with nothing compiled, and again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench import cases, figures, sessions
from bench.cases import Case
from bench.engines import Options, Request
from bench.engines.client import START_S, Client, EngineError, Missing
from bench.record import Record
from bench.until import Until

START_TOKENS = 16  # of the first request: long enough to need the decode step too
# Programs compiled before are kept in these, by one engine or another.
TORCH_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
CACHES = (
    *TORCH_CACHES, "XDG_CACHE_HOME", "CUDA_CACHE_PATH", "VLLM_CACHE_ROOT",
    "JAX_COMPILATION_CACHE_DIR",
)  # fmt: skip


def measure(
    name: str, model: str, path: Path, vocab_size: int, options: Options, prompt: int, until: Until
) -> Iterator[Record]:
    """`.cold_s` and `.warm_s`, from the start of the process to its first token.

    The detail has the time to the last of `START_TOKENS`, and until the weights were loaded. Files
    are in the page cache either way. An engine that has none when it is over is ended.
    """
    (request,) = cases.fixed(1, 1, prompt, START_TOKENS, vocab_size)
    options = replace(options, max_num_seqs=1, max_model_len=prompt + START_TOKENS)
    case = Case("startup", f"in{prompt}", lambda _: [[request]], lambda calls, got: {})
    stem = figures.stem(model, case, name)
    detail = figures.described(model, case, name)
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as folder:
        env = {variable: str(Path(folder) / variable) for variable in CACHES}
        for kind in ("cold", "warm"):
            try:
                seconds, stages = _start(name, path, options, env, request, until)
            except Missing as error:
                yield Record(f"{stem}.runs", 0, "", detail | {"why": str(error)})
                return
            except EngineError as error:
                said = sessions.why(error, until)
                told = detail | {"why": said, "output_tail": error.tail}
                yield Record(f"{stem}.{kind}.failed", None, "", told, said)
                return
            yield Record(f"{stem}.{kind}_s", round(seconds, 3), "s", detail | stages)
            print(f"  startup {name} {kind}: {seconds:.1f} s", flush=True)


def _start(
    name: str, path: Path, options: Options, env: dict[str, str], request: Request, until: Until
) -> tuple[float, dict[str, float]]:
    with Client(name, path, options, env) as client:
        loaded = client.wait(min(START_S, until.left))
        reply = client.generate([request], min(sessions.CALL_S, until.left))
        times = [reply.began + t - client.began for t in reply.outputs[0].times]
        stages = {"loaded_s": loaded - client.began, "last_token_s": times[-1]}
        return times[0], {stage: round(s, 3) for stage, s in stages.items()}
