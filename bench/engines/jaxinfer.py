"""jaxinfer, through `LLM`: requests are submitted when they are due, and their Deltas timed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.engines import Engine, Memory, Options, Output, Request
from bench.load import status_bytes


def load(checkpoint: Path, options: Options) -> Engine:
    """An LLM of the checkpoint; what it may need is compiled where `options.warm_up` says so."""
    import jax

    from bench import parts
    from jaxinfer import LLM, SamplingParams

    speculative = options.speculative
    if speculative is not None:
        kind = "lookup" if speculative == "lookup" else f"draft={speculative}"
        speculative = f"{kind},tokens={options.guesses}"
    arguments: dict[str, Any] = {
        "dtype": options.dtype,
        "max_num_seqs": options.max_num_seqs,
        "max_model_len": options.max_model_len,
        "gpu_memory_utilization": options.memory_share,
        "prefix_caching": options.prefix_caching,
        "speculative": speculative,
        **options.extra,
    }
    llm = LLM(checkpoint, **arguments)
    parts.check_platform(jax.default_backend())
    llm.tokenizer = None  # ids in, ids out, as of every engine here
    if options.warm_up:
        llm.warm_up([SamplingParams(temperature=options.temperature)])
    return _Jaxinfer(llm, options.temperature)


class _Jaxinfer:
    def __init__(self, llm: Any, temperature: float) -> None:
        self.llm, self.temperature = llm, temperature
        plan = llm.memory_plan
        self.token = plan.cache // (plan.num_pages * plan.page_size)
        self.loaded = plan.weights

    def generate(self, requests: Sequence[Request]) -> list[Output]:
        from jaxinfer import SamplingParams

        outputs = [Output([], []) for _ in requests]
        prepared = [
            self.llm.prepare(
                r.prompt,
                SamplingParams(
                    temperature=self.temperature, max_tokens=r.max_tokens, ignore_eos=True, seed=i
                ),
            )
            for i, r in enumerate(requests)
        ]
        coming = deque(sorted(range(len(requests)), key=lambda i: requests[i].due))
        running: list[int] = []
        began = time.perf_counter()
        while coming or running:
            now, new = time.perf_counter() - began, []
            while coming and requests[coming[0]].due <= now:
                new.append(coming.popleft())
            if new:
                self.llm.submit([prepared[i] for i in new])
                running += new
            if not running:
                time.sleep(max(0.0, requests[coming[0]].due - (time.perf_counter() - began)))
                continue
            self.llm.pump()
            now = time.perf_counter() - began
            for i in running:
                deltas = prepared[i].deltas
                while deltas:
                    ids = deltas.popleft().token_ids
                    outputs[i].tokens.extend(ids)
                    outputs[i].times.extend([now] * len(ids))
            for i in running:
                if prepared[i].failed is not None:
                    raise prepared[i].failed
            running = [i for i in running if not prepared[i].finished]
        return outputs

    def memory(self) -> Memory:
        import jax

        stats = jax.local_devices()[0].memory_stats() or {}
        peak = stats.get("peak_bytes_in_use") or status_bytes("VmHWM")
        return Memory(self.loaded, peak, self.token)

    def programs(self) -> int:
        return self.llm.engine.compiler.count
