"""Time to the first token of a prompt whose pages are nowhere, on the device, or on the host.

    python -m bench.kv_tier
    python -m bench.kv_tier --shape llama-3.2-1b --tokens 4096

Random weights, one prompt at a time, and pages on the device for one only: so the prompt before
always has to leave. `host` is where it has been stored before, so that pages come back and none
leave; `host_storing` is where the other prompt's leave for the first time meanwhile. What is on the
link is the difference to `device`: `share_of_link` is the bytes that came over it, over that time
and the link's bandwidth, which is measured with large copies in the same process. Tokens must be
the same each time, and what was found in the cache as many as there should be.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bench import decode, parts, record, shapes
from bench.offload import COPIED, link_bytes_per_s
from bench.parts import Part, emit
from bench.record import Record

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

REPEATS, PAGE = 5, 32
HELD = 4  # prompts that the host has room for
LIMIT_S = 175.0


def start(shape: str, tokens: int) -> LLM:
    """An LLM of random weights, with pages for so many tokens, on the host for several times."""
    import jax.numpy as jnp

    from jaxinfer import LLM
    from jaxinfer.cache import page_bytes
    from jaxinfer.pages import pages_for

    config, params = shapes.model_config(shape), shapes.init_params(shape, jnp.bfloat16)
    one, pages = page_bytes(config, PAGE, jnp.bfloat16), pages_for(tokens, PAGE)
    return LLM.from_params(
        params, config, page_size=PAGE, kv_cache_bytes=(pages + 1) * one, max_num_seqs=8,
        kv_host_bytes=HELD * pages * one, max_model_len=tokens,
    )  # fmt: skip


def first_token(llm: LLM, prompt: list[int], cached: int, loaded: int) -> tuple[float, int]:
    """Seconds to the first token, and the token.

    Raises:
        RuntimeError: other than so many of its tokens were in the cache, or other than so many
            pages came from the host.
    """
    from jaxinfer import SamplingParams

    before = llm.metrics.summary().loaded_pages
    began = time.perf_counter()
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    took = time.perf_counter() - began
    came = llm.metrics.summary().loaded_pages - before
    if (output.num_cached_tokens, came) != (cached, loaded):
        raise RuntimeError(
            f"{output.num_cached_tokens} tokens were found and {came} pages came from the host, "
            f"not {cached} and {loaded}"
        )
    return took, output.outputs[0].token_ids[0]


def rounds(llm: LLM, tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds to the first token, of each kind in each repeat; the first round compiles.

    Prompts have a token less than `tokens`: of the last page, nothing is kept.
    """
    pages = (tokens - 1) // PAGE
    hit, kinds = pages * PAGE, ("miss", "device", "host_storing", "host")
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for seed in range(repeats + 1):
        one, other = decode.random_prompts(seed, 2, tokens - 1, llm.config.vocab_size)
        miss, token = first_token(llm, one, 0, 0)
        device, again = first_token(llm, one, hit, 0)
        _, of_other = first_token(llm, other, 0, 0)
        storing, back = first_token(llm, one, hit, pages)
        _, other_back = first_token(llm, other, hit, pages)
        host, last = first_token(llm, one, hit, pages)
        if {again, back, last} != {token} or other_back != of_other:
            raise RuntimeError("another token followed what came from the cache")
        if seed:
            for kind, seconds in zip(kinds, (miss, device, storing, host), strict=True):
                found[kind].append(seconds)
    return found


def measure(shape: str, tokens: int, nbytes: int) -> Iterator[Record]:
    """The link, then each kind; the link once more in the end, and the faster counts."""
    links = [link_bytes_per_s(nbytes)]
    llm = start(shape, tokens)
    memory, name = llm.memory_plan, f"kv_tier.{shapes.short(shape)}.{tokens // 1024}k"
    times = rounds(llm, tokens, REPEATS)
    llm.close()
    links.append(link_bytes_per_s(nbytes))
    one = memory.host_cache // memory.host_pages
    detail = {"memory_plan": str(memory), "tokens": tokens, "page_bytes": one}
    for kind, found in times.items():
        each = {"ms_of_each_repeat": [round(1000 * s, 3) for s in found]}
        yield Record(f"{name}.ttft_ms.{kind}", 1000 * statistics.median(found), "ms", detail | each)
    copied = (tokens - 1) // PAGE * one
    seconds = statistics.median(times["host"]) - statistics.median(times["device"])
    detail = {"bytes": copied, "seconds": seconds, "link_bytes_per_s": links}
    share = copied / seconds / max(links) if seconds > 0 else None
    yield Record(f"{name}.share_of_link", share, "ratio", detail)


def run_part(args: argparse.Namespace) -> None:
    """What the process of the part does."""
    import jax

    parts.check_platform(jax.default_backend())
    for found in measure(args.shape, args.tokens, min(COPIED, int(args.copied))):
        emit(args.records, found)


def main() -> None:
    parser = argparse.ArgumentParser(description="time to the first token, pages on the host")
    parser.add_argument("--shape", default="llama-3.1-8b", help="of bench.shapes")
    parser.add_argument("--tokens", type=int, default=8192, help="of a prompt and its answer")
    parser.add_argument("--copied", type=float, default=COPIED, help="bytes of the link's copies")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--part", action="store_true", help="measure in this process")
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    if args.part:
        run_part(args)
        return
    words = ("--part", "--shape", args.shape, "--tokens", str(args.tokens))
    words += ("--copied", str(args.copied))
    # The weights are made before the LLM, which could have reserved the memory itself.
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
    name = f"kv_tier.{shapes.short(args.shape)}"
    part = Part(name, "bench.kv_tier", words, LIMIT_S, env)
    parts.run_and_print([part], "bench.kv_tier", args.out)


if __name__ == "__main__":
    main()
