"""Static batching on PyTorch, for engines that know one step: equal requests, batch after batch.

No token is read back and no stopping rule is evaluated between steps, so a loop is never slower
than `model.generate`. On a GPU tokens are timed by events on the device, and waited for at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch  # pyright: ignore[reportMissingImports]

from bench import parts
from bench.engines import Memory, Options, Output, Request
from bench.load import status_bytes

SIZES = 64  # of batches and caches, each compiled for itself


class Steps(Protocol):
    """A model with room for one batch.

    `prefill(ids [B, T], length) -> [B, 1]`, the first tokens, in a cache that will hold `length`;
    `step(tokens [B, 1]) -> [B, 1]`, those that follow. `token`: bytes of keys and values of one.
    """

    token: int

    def prefill(self, ids: Any, length: int) -> Any: ...
    def step(self, tokens: Any) -> Any: ...


def start(options: Options) -> str:
    """The device, of whose memory no more than the share is taken; in float32 nothing is rounded
    to TF32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts.check_platform(device)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = SIZES
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(options.memory_share)
    return device


def sample(logits: Any, temperature: float) -> Any:
    """Token ids [B, 1] of logits [B, V]: the likeliest, or drawn by the exponential trick."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    chances = torch.softmax(logits.float() / temperature, -1)
    return (chances / torch.empty_like(chances).exponential_(1)).argmax(-1, keepdim=True)


def allocated(device: str) -> int:
    """Bytes in use."""
    return torch.cuda.memory_allocated() if device == "cuda" else status_bytes("VmRSS")


def memory(device: str, loaded: int, token: int) -> Memory:
    """Of this process."""
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else status_bytes("VmHWM")
    return Memory(loaded, peak, token)


def compiled() -> int:
    """Graphs that torch.compile has made so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def timer(device: str) -> tuple[Callable[[], Any], Callable[[Any], float]]:
    """`mark()` notes where the device is, and `seconds(mark)`, once it has got there, is the time
    since `timer` was called; both cost the device nothing."""
    began = time.perf_counter()
    if device == "cpu":
        return time.perf_counter, lambda mark: mark - began
    first = torch.cuda.Event(enable_timing=True)
    first.record()

    def mark() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return mark, lambda event: first.elapsed_time(event) / 1000


class StaticBatches:
    """The engine made of such steps. Requests of one call are of equal lengths."""

    def __init__(self, steps: Steps, options: Options, device: str, loaded: int) -> None:
        self.steps, self.options, self.device, self.loaded = steps, options, device, loaded

    def rows(self, count: int, length: int) -> int:
        """Of a batch: as many as are wanted, or as have room with half as much again beside."""
        most = min(count, self.options.max_num_seqs)
        if self.device == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            room = self.options.memory_share * total - self.loaded
            most = min(most, int(room / 1.5 / (length * self.steps.token)))
        if most < 1:
            raise RuntimeError(f"no memory for one request of {length} tokens")
        return most

    def generate(self, requests: Sequence[Request]) -> list[Output]:
        sizes = {(len(r.prompt), r.max_tokens, r.room) for r in requests}
        if len(sizes) != 1 or any(r.due for r in requests):
            raise ValueError("static batches: requests must be of equal lengths, and all there")
        ((prompt, new, room),) = sizes
        length = max(prompt + new, room)
        rows, outputs = self.rows(len(requests), length), []
        if self.device == "cuda":
            torch.cuda.synchronize()
        mark, seconds = timer(self.device)
        for at in range(0, len(requests), rows):
            own = requests[at : at + rows]
            # The last batch is filled up: another size would be compiled anew.
            filled = [*own, *[own[-1]] * (rows - len(own))]
            found, marks = self._batch(filled, length, new, mark)
            times = [seconds(m) for m in marks]
            outputs += [Output(ids, times) for ids in found[: len(own)]]
        return outputs

    def _batch(
        self, requests: Sequence[Request], length: int, new: int, mark: Callable[[], Any]
    ) -> tuple[list[list[int]], list[Any]]:
        ids = torch.tensor([r.prompt for r in requests], device=self.device)
        with torch.no_grad():
            # A graph's output buffer is overwritten by its next replay.
            found = [self.steps.prefill(ids, length).clone()]
            marks = [mark()]
            for _ in range(new - 1):
                torch.compiler.cudagraph_mark_step_begin()
                found.append(self.steps.step(found[-1]).clone())
                marks.append(mark())
            return torch.cat(found, dim=1).tolist(), marks  # waits for the device

    def memory(self) -> Memory:
        return memory(self.device, self.loaded, self.steps.token)

    def programs(self) -> int:
        return compiled()
