"""Token ids to text as they are sampled, and stop strings: pure functions on a `DetokState`.

The text of a request is what `decode(prompt + output)` has and `decode(prompt)` has not. It is
built from a window of recent tokens, so that a token costs the same whatever the length of the
output. Nothing here depends on how the tokens were grouped into pushes: the state, the text and
the stop are those of pushing one token at a time.

The text is exact for every decoder whose text of a longer sequence extends the text of a shorter
one, save for characters still incomplete at its end. Decoders with byte fallback break that in one
case: in a run of byte tokens that is not UTF-8, how many U+FFFD appear may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

REPLACEMENT = "\ufffd"  # what decoders put for bytes that are not, or not yet, a character
MAX_PENDING = 4  # tokens after which U+FFFD cannot all be one incomplete character
MAX_WINDOW = 16  # tokens; beyond, the window is cut
CONTEXT = range(4, 9)  # tokens kept when the window is cut: enough for one to start a character

Decode = Callable[[Sequence[int]], str]


class DetokState(NamedTuple):
    """Where the detokenisation of one sample stands.

    Attributes:
        window: recent token ids: context, then tokens whose text is not settled.
        read: characters of the window's text that have been taken.
        pending: tokens since the window's text last ended in a complete character.
        prompt_tail: U+FFFD at the end of the prompt's text; the output completes or repeats them.
        held: text taken and not returned, because it may be the beginning of a stop string.
    """

    window: tuple[int, ...]
    read: int
    pending: int = 0
    prompt_tail: str = ""
    held: str = ""


class Pushed(NamedTuple):
    """What a push gave.

    Attributes:
        text: to be appended to the output's text.
        stop: the stop string found; the text ends before it, and the sample is finished.
        num_tokens: how many of the pushed tokens are the sample's: all, or up to and including
            the one that completed the stop string.
    """

    text: str
    stop: str | None
    num_tokens: int


def start(decode: Decode, prompt: Sequence[int]) -> DetokState:
    """The state before the first token of an output that follows `prompt` (token ids)."""
    size = CONTEXT.start
    # No context: special tokens alone, or a beginning inside a character. Look further back.
    while size < len(prompt) and decode(prompt[-size:])[:1] in ("", REPLACEMENT):
        size += 1 if size in CONTEXT else size
    window = tuple(prompt[-size:])
    text = decode(window)
    complete = text.rstrip(REPLACEMENT)
    return DetokState(window, len(complete), prompt_tail=text[len(complete) :])


def push(
    state: DetokState,
    decode: Decode,
    token_ids: Sequence[int],
    stops: Sequence[str] = (),
    finished: bool = False,
) -> tuple[DetokState, Pushed]:
    """Takes newly sampled tokens; returns the text that they settle.

    Args:
        state: from `start` or the last push.
        decode: token ids to text; special tokens already skipped.
        token_ids: the new tokens. A stop token that ended the sample is left out by the caller.
        stops: stop strings, none empty. The one whose occurrence is complete first in the text
            ends the sample; of two that end together, the longer.
        finished: no token follows: what is held back is returned.
    """
    settled = []
    for count, token in enumerate(token_ids, start=1):
        state, text = _take(state, decode, token)
        state, text, stop = _scan(state, text, stops)
        settled.append(text)
        if stop is not None:
            return state, Pushed("".join(settled), stop, count)
    if finished:
        rest = decode(state.window)[state.read :]
        state, text, stop = _scan(state, _after_prompt(state.prompt_tail, rest), stops)
        settled += [text, state.held]
        return state._replace(held=""), Pushed("".join(settled), stop, len(token_ids))
    return state, Pushed("".join(settled), None, len(token_ids))


def _take(state: DetokState, decode: Decode, token: int) -> tuple[DetokState, str]:
    """Adds a token to the window; returns the text that no later token can change."""
    window = (*state.window, token)
    text = decode(window)
    unsettled = len(text) - len(text.rstrip(REPLACEMENT))
    if text and state.read == len(text) and not state.pending:
        return state, ""  # a special token spells nothing and gives no context
    pending = state.pending + 1 if unsettled else 0
    if pending > MAX_PENDING:
        unsettled = min(unsettled, 3)  # a character lacks at most its last byte of four
    end = max(state.read, len(text) - unsettled)
    new, tail = text[state.read : end], state.prompt_tail
    if tail and new:
        shown = _after_prompt(tail, new)
        tail = tail[len(new) :] if not shown else ""
        new = shown
    # Inside an incomplete character, byte fallback spells the whole run of bytes as U+FFFD, and
    # no place to cut can be told from another.
    if len(window) > MAX_WINDOW and not 0 < pending <= MAX_PENDING:
        window, end = _cut(window, text, end, decode)
    return DetokState(window, end, pending, tail, state.held), new


def _after_prompt(tail: str, new: str) -> str:
    """`new` without what the prompt's text showed of it already."""
    repeated = len(new) - len(new.lstrip(REPLACEMENT))
    return new[min(len(tail), repeated) :]


def _cut(
    window: tuple[int, ...], text: str, read: int, decode: Decode
) -> tuple[tuple[int, ...], int]:
    """The window and `read`, without old tokens that no longer bear on the text to come.

    A shorter window serves as well when its text is the end of the longer one's (it does not begin
    inside a character) and part of it has been read (it holds the beginning of the unsettled
    character, and a decoder that drops a leading space drops one that has been read).
    """
    for size in CONTEXT:
        kept = decode(window[-size:])
        dropped = len(text) - len(kept)
        if text.endswith(kept) and (read > dropped or not text):
            return window[-size:], max(0, read - dropped)
    return window, read


def _scan(state: DetokState, new: str, stops: Sequence[str]) -> tuple[DetokState, str, str | None]:
    """Text to return of what is held and new, and the stop string that completes in it."""
    if not stops:
        return state, new, None
    text = state.held + new
    found = [(at + len(s), -len(s), s) for s in stops if (at := text.find(s)) >= 0]
    if found:
        end, _, stop = min(found)
        return state._replace(held=""), text[: end - len(stop)], stop
    hold = max(_overlap(text, s) for s in stops)
    cut = len(text) - hold
    return state._replace(held=text[cut:]), text[:cut], None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, `stop` itself excluded."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
