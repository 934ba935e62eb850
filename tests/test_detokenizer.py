"""The text of an output, whatever its tokens are and however they arrive."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from jaxinfer import detokenizer

SPECIAL = b""  # a special token: it spells nothing
texts = st.text(st.sampled_from("ab cé你好🙂👩‍\ufffd\n"), max_size=24)
stop_lists = st.lists(st.text(st.sampled_from("ab cé你"), min_size=1, max_size=4), max_size=3)


def byte_decoder(vocab):
    """The decoder of a byte-level BPE whose token i is the bytes `vocab[i]`."""
    return lambda ids: b"".join(vocab[i] for i in ids).decode(errors="replace")


def sentencepiece_decoder():
    """Llama 2's: pieces with a leading-space mark, byte fallback, first space dropped."""
    pieces = ["<unk>", "▁", "▁a", "a", "b", "▁好", "好"] + [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return pieces, tokenizer.decode


def run(decode, prompt, tokens, stops=(), chunks=()):
    """Pushes `tokens` in pieces of the sizes `chunks`, the rest at once; returns what came out."""
    state, text, count = detokenizer.start(decode, prompt), "", 0
    bounds = [min(sum(chunks[: i + 1]), len(tokens)) for i in range(len(chunks))] + [len(tokens)]
    first = 0
    for end in bounds:
        last = end == len(tokens)
        state, pushed = detokenizer.push(state, decode, tokens[first:end], stops, finished=last)
        text, count = text + pushed.text, count + pushed.num_tokens
        if pushed.stop is not None or last:
            return text, pushed.stop, count
        first = end
    raise AssertionError("unreachable: the last piece is finished")


def cut_at_stop(text, stops):
    """The definition: the stop that completes first, the longer of two that end together."""
    ends = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end - len(stop)], stop


@st.composite
def split_bytes(draw, source=texts, specials=True):
    """Bytes of a text, split into tokens anywhere, with special tokens strewn in."""
    data = draw(source).encode()
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(data) - 1)), max_size=len(data))))
    tokens = [data[i:j] for i, j in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    if specials:
        for at in draw(st.lists(st.integers(0, len(tokens)), max_size=3)):
            tokens.insert(at, SPECIAL)
    return [t for t in tokens if t or specials]


chunk_lists = st.lists(st.integers(1, 5), max_size=8)


@given(split_bytes(), split_bytes(), chunk_lists)
@example([b"\xf0\x9f"], [b"\x99\x82", b"x"], [])  # the output completes the prompt's character
@example([b"\xf0\x9f"], [b"x"], [])
@example(["\ufffd".encode()], [b"a"], [])
@example([SPECIAL] * 20, [b"a"], [])
@settings(max_examples=200)
def test_text_is_what_the_output_adds_to_the_prompt(prompt, output, chunks):
    vocab = prompt + output
    decode = byte_decoder(vocab)
    whole, shown = decode(range(len(vocab))), decode(range(len(prompt)))
    same = next((i for i, (a, b) in enumerate(zip(shown, whole, strict=False)) if a != b), None)
    expected = whole[min(len(shown), len(whole)) if same is None else same :]
    ids = list(range(len(vocab)))
    text, stop, count = run(decode, ids[: len(prompt)], ids[len(prompt) :], (), chunks)
    assert (text, stop, count) == (expected, None, len(output))


@given(st.lists(st.binary(min_size=1, max_size=3), max_size=60), chunk_lists)
@settings(max_examples=200)
def test_bytes_that_are_not_utf8_match_the_whole_decode(vocab, chunks):
    decode = byte_decoder(vocab)
    ids = list(range(len(vocab)))
    assert run(decode, [], ids, (), chunks)[0] == decode(ids)


@given(split_bytes(st.text(st.sampled_from("ab cé你好🙂"), max_size=24)), stop_lists, chunk_lists)
@settings(max_examples=200)
def test_stop_strings_match_the_whole_string_reference(vocab, stops, chunks):
    decode = byte_decoder(vocab)
    ids = list(range(len(vocab)))
    expected, stop = cut_at_stop(decode(ids), stops)
    text, found, count = run(decode, [], ids, stops, chunks)
    assert (text, found) == (expected, stop)
    lengths = [n for n in range(1, len(ids) + 1) if stop is not None and stop in decode(ids[:n])]
    assert count == min(lengths, default=len(ids))


@given(split_bytes(texts, specials=False), stop_lists)
@settings(max_examples=200)
def test_nothing_returned_is_taken_back_and_little_is_held(vocab, stops):
    decode = byte_decoder(vocab)
    state, text = detokenizer.start(decode, []), ""
    for i in range(len(vocab)):
        state, pushed = detokenizer.push(state, decode, [i], stops)
        text += pushed.text
        if pushed.stop is not None:
            break
        settled = decode(range(i + 1)).rstrip("\ufffd")
        assert decode(range(i + 1)).startswith(text)
        held = settled[len(text) :]
        assert all(len(held) < len(s) for s in stops if s.startswith(held)) or not held
        assert any(s.startswith(held) for s in stops) or not held


@given(
    st.lists(st.sampled_from(["▁", "▁a", "a", "b", "▁好", "好", "你", "🙂", "é"]), max_size=40),
    st.integers(0, 40),
    chunk_lists,
)
@example(["🙂", "你"] * 8, 0, [])  # one long run of bytes: the window is cut within it
@example(["你", "你", "🙂", "你"], 3, [])  # and so is the prompt's
@settings(max_examples=200)
def test_sentencepiece_spaces_and_byte_fallback(words, split, chunks):
    pieces, decode = sentencepiece_decoder()
    ids = []
    for word in words:
        names = [word] if word in pieces else [f"<0x{b:02X}>" for b in word.encode()]
        ids.append([pieces.index(n) for n in names])
    prompt = [i for word in ids[:split] for i in word]
    output = [i for word in ids[split:] for i in word]
    text, _, _ = run(decode, prompt, output, (), chunks)
    assert decode(prompt) + text == decode(prompt + output)


def test_stop_inside_one_token_returns_what_precedes_it():
    decode = byte_decoder([b"one STOP two"])
    assert run(decode, [], [0], ["STOP"]) == ("one ", "STOP", 1)


def test_tokens_after_the_stop_are_not_the_samples():
    decode = byte_decoder([b"a", b"b", b"c"])
    assert run(decode, [], [0, 1, 2], ["b"]) == ("a", "b", 2)


def test_a_stop_that_never_completes_is_returned_at_the_end():
    decode = byte_decoder([b"x", b"</", b"a"])
    state, pushed = detokenizer.push(detokenizer.start(decode, []), decode, [0, 1], ["</s>"])
    assert pushed == ("x", None, 2)
    _, pushed = detokenizer.push(state, decode, [], ["</s>"], finished=True)
    assert pushed.text == "</"


def test_the_prompt_is_no_part_of_a_stop():
    decode = byte_decoder([b"EN", b"D", b"END"])
    assert run(decode, [0], [1, 2], ["END"]) == ("D", "END", 2)


def test_a_stop_in_the_flushed_end_is_found():
    decode = byte_decoder([b"a\xff"])
    assert run(decode, [], [0], ["\ufffd"]) == ("a", "\ufffd", 1)


@pytest.mark.parametrize("token", [b"a", SPECIAL, b"\xff", "\ufffd".encode(), "🙂".encode()])
def test_the_window_stays_small(token):
    decode = byte_decoder([b"a", token])
    state = detokenizer.start(decode, [0])
    for _ in range(200):
        state, _ = detokenizer.push(state, decode, [1])
        assert len(state.window) <= detokenizer.MAX_WINDOW + detokenizer.MAX_PENDING
