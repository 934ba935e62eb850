"""How many tokens to guess: against brute force, and against simulated devices whose steps take
what the cost model does not know, with the engine's delay before results are read."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.controller import (
    GAIN,
    PRIOR,
    TRIAL_SHARE,
    WARM,
    Control,
    Costs,
    Held,
    Load,
    choose,
    expected,
    forget,
    learned,
    modelled,
    share,
    step_seconds,
    timed,
)

CHOICES = (2, 4)
ROWS = 8  # of the program, whatever it guesses
DRAFT = Costs(
    weight_bytes=16e9, token_flops=16e9, launch_s=1e-3, draft_bytes=1e9, draft_flops=1e9,
    draft_launch_s=2e-4, bytes_per_s=3e12, flops_per_s=6e14,
)  # fmt: skip
LOOKUP = DRAFT._replace(draft_bytes=0.0, draft_flops=0.0, draft_launch_s=0.0)


def load(left: float = 100.0, unread: int = 0, others: int = 0, overrun: float = 0.0) -> Load:
    return Load([0], others, dict.fromkeys((0, *CHOICES), ROWS), left, unread, overrun)


def measured(control: Control, guesses: int, seconds: float, times: int = WARM + 1) -> Control:
    for _ in range(times):
        control = timed(control, ROWS, guesses, seconds)
    return control


def after(held: int, attempted: int, times: int = 30) -> Control:
    """So many guesses of sequence 0 held, in each of some steps; steps cost what they bring, 1 ms
    and a fifth more for each guess."""
    control = Control()
    for _ in range(times):
        control = learned(control, {0: (held, attempted)})
    for k in (0, *CHOICES):
        control = measured(control, k, 1e-3 * (1 + 0.2 * k))
    return control


class Ran(NamedTuple):
    """What a simulated device did: of each step, its guesses and when it ended; tokens in all."""

    guesses: list[int]
    ends: list[float]
    tokens: int
    control: Control


def simulate(
    costs: Costs,
    seconds: Callable[[int, int], float],
    holds: Callable[[int], float],
    steps: int,
    control: Control | None = None,
) -> Ran:
    """One sequence on a device where step i with k guesses takes `seconds(i, k)`, and each guess
    holds with probability `holds(i)`. Results are read a step late; a draft that is behind reads
    first, and that step is not measured: as `guesser.Guesser` has it."""
    control, draws = control or Control(), np.random.default_rng(0)
    under_way: deque[tuple[int, float | None, tuple[int, int]]] = deque()
    ran, now, tokens, unread = Ran([], [], 0, control), 0.0, 0, 1000
    for i in range(steps):
        late = unread if costs.draft_bytes and unread > CHOICES[-1] + 1 else 0
        k, control = choose(control, costs, load(unread=late), CHOICES)
        took, held = seconds(i, k), 0
        if k:
            now += late * costs.draft_flops / costs.flops_per_s
            now += costs.draft_bytes / costs.bytes_per_s if late else 0
            held = int(np.cumprod(draws.random(k) < holds(i)).sum())
        now, tokens, unread = now + took, tokens + held + 1, k + 1 if k else unread + 1
        under_way.append((k, None if k and late else took, (held, min(held + 1, k))))
        ran.guesses.append(k)
        ran.ends.append(now)
        if len(under_way) == 2:
            k, took, found = under_way.popleft()
            if took is not None:
                control = timed(control, ROWS, k, took)
            control = learned(control, {0: found}) if k else control
    return ran._replace(tokens=tokens, control=control)


def device(costs: Costs, speed: float = 1.0, wrong: float = 1.0) -> Callable[[int, int], float]:
    """`speed` times as fast as the model has it, and steps with guesses `wrong` times as slow."""
    return lambda _, k: modelled(costs, ROWS, k) / speed * (wrong if k else 1.0)


def plainly(ran: Ran, seconds: Callable[[int, int], float]) -> float:
    """How long as many tokens would have taken without guesses."""
    return ran.tokens * seconds(0, 0)


# -- what a step brings ------------------------------------------------------------------------


@given(probability=st.floats(0, 1), guesses=st.integers(0, 6))
def test_tokens_of_a_step_against_every_outcome(probability: float, guesses: int) -> None:
    total = 0.0
    for outcome in itertools.product((True, False), repeat=guesses):
        chance = np.prod([probability if held else 1 - probability for held in outcome])
        total += chance * (1 + len([*itertools.takewhile(bool, outcome)]))
    assert expected(probability, guesses) == pytest.approx(total)


def test_what_is_known_of_others_counts_until_more_is_known_of_a_sequence() -> None:
    assert share(Control(), 0) == PRIOR
    control = learned(Control(), {0: (0, 40), 1: (36, 40)})
    assert share(control, 0) < 0.05 < 0.3 < share(control, 2) < 0.6 < 0.8 < share(control, 1)
    for _ in range(30):  # what is long ago counts less
        control = learned(control, {0: (4, 4)})
    assert share(control, 0) > 0.9


def test_a_step_in_which_nothing_was_found_to_guess_did_not_hold() -> None:
    assert learned(Control(), {0: (0, 0)}).overall == Held(0, 1)


def test_who_has_ended_is_forgotten() -> None:
    control = learned(Control(), {0: (2, 2), 1: (0, 1)})
    left = forget(control, 0)
    assert set(left.sequences) == {1}
    assert left.overall == control.overall
    assert set(control.sequences) == {0, 1}
    assert forget(left, 0) is left


# -- what a step takes -------------------------------------------------------------------------


def test_a_time_counts_once_it_was_measured_often_enough() -> None:
    rows = load().rows
    model = {k: modelled(DRAFT, ROWS, k) for k in (0, *CHOICES)}
    control = Control()
    for _ in range(WARM):
        control = timed(timed(control, ROWS, 0, 1.0), ROWS, 2, 3.0)
        assert {k: step_seconds(control, DRAFT, rows, k) for k in model} == model
    control = timed(control, ROWS, 2, 3.0)
    assert step_seconds(control, DRAFT, rows, 2) == 3
    # What is not measured is as the model says beside what is.
    assert step_seconds(control, DRAFT, rows, 0) == pytest.approx(3 * model[0] / model[2])
    control = timed(control, ROWS, 0, 1.0)
    assert step_seconds(control, DRAFT, rows, 0) == 1
    assert step_seconds(control, DRAFT, rows, 4) == pytest.approx(model[4] / model[0])
    assert step_seconds(control, DRAFT, dict.fromkeys(rows, 64), 2) == modelled(DRAFT, 64, 2)


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_one_slow_time_is_not_believed(slow: int) -> None:
    """As while a program is compiled, the own or another."""
    control = Control()
    for i in range(WARM + 1):
        control = timed(control, ROWS, 0, 50.0 if i == slow else 1.0)
    assert step_seconds(control, DRAFT, load().rows, 0) == 1
    assert step_seconds(timed(control, ROWS, 0, 50.0), DRAFT, load().rows, 0) < 1.5


def test_times_follow_what_is_measured() -> None:
    control = measured(measured(Control(), 0, 1.0), 0, 2.0, times=30)
    assert step_seconds(control, DRAFT, load().rows, 0) == pytest.approx(2, rel=0.01)


# -- what is chosen ----------------------------------------------------------------------------


@pytest.mark.parametrize(("held", "attempted", "wanted"), [(0, 1, 0), (1, 2, 2), (4, 4, 4)])
def test_as_many_as_pay(held: int, attempted: int, wanted: int) -> None:
    found, _ = choose(after(held, attempted), DRAFT, load(), CHOICES)
    assert found == wanted


def test_who_ends_soon_does_not_guess_where_it_is_noticed_late() -> None:
    """All guesses hold, five tokens a step that takes 1.8 times as long; 12 steps are lost."""
    control = after(4, 4)
    found = [choose(control, DRAFT, load(left, overrun=12), CHOICES)[0] > 0 for left in (30, 40)]
    assert found == [False, True]
    assert choose(control, DRAFT, load(2, overrun=0), CHOICES)[0] == 4


def test_nobody_to_guess_for() -> None:
    control = after(4, 4)
    assert choose(control, DRAFT, load()._replace(sequences=[]), CHOICES) == (0, control)


def test_those_who_gain_nothing_pay_for_those_who_do() -> None:
    """With n others, who guess nothing or whose guesses do not hold, ends come on average at
    (1.8 / 5 + 1.8 n) / (n + 1) of the time with four guesses, and with two at (1.4 / 3 + 1.4 n) /
    (n + 1)."""
    control = after(4, 4)
    assert [choose(control, DRAFT, load(others=n), CHOICES)[0] for n in (0, 1, 9)] == [4, 2, 0]
    for _ in range(30):
        control = learned(control, {1: (0, 1), 2: (4, 4)})
    found = [
        choose(control, DRAFT, load()._replace(sequences=which), CHOICES)[0]
        for which in ([0], [0, 2], [0, 1], [1])
    ]
    assert found == [4, 4, 2, 0]


def test_a_draft_reads_only_what_pays() -> None:
    """A million tokens take 1e6 · draft_flops / flops_per_s = 1.7 s, of a thousand steps as long
    two thirds are saved."""
    control = after(4, 4)
    many = int(1e6)
    assert choose(control, DRAFT, load(left=10, unread=0), CHOICES)[0] == 4
    assert choose(control, DRAFT, load(left=1000, unread=many), CHOICES)[0] == 0
    assert choose(control, DRAFT, load(left=10_000, unread=many), CHOICES)[0] == 4
    assert choose(control, LOOKUP, load(left=10, unread=many), CHOICES)[0] == 4


def test_a_gain_too_small_is_none() -> None:
    control = after(0, 1, times=1000)  # next to nothing holds, and guesses cost nothing
    for factor, wanted in ((1 / GAIN + 0.01, 0), (1 / GAIN - 0.02, 2)):
        cheap = measured(control, 2, 1e-3 * factor, times=100)
        assert choose(cheap, DRAFT, load(), CHOICES)[0] == wanted


@given(
    found=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=8),
    times=st.lists(st.tuples(st.sampled_from((0, *CHOICES)), st.floats(1e-6, 1.0)), max_size=12),
    left=st.floats(0, 1000),
    unread=st.integers(0, 10_000),
    others=st.integers(0, 9),
)
def test_whatever_is_known_a_choice_is_made_of_it_alone(
    found: list[tuple[int, int]],
    times: list[tuple[int, float]],
    left: float,
    unread: int,
    others: int,
) -> None:
    control = Control()
    for held, more in found:
        control = learned(control, {0: (held, held + more)})
    for k, seconds in times:
        control = timed(control, ROWS, k, seconds)
    first = choose(control, DRAFT, load(left, unread, others), CHOICES)
    assert first[0] in (0, *CHOICES)
    assert first == choose(control, DRAFT, load(left, unread, others), CHOICES)
    assert 0 <= share(control, 0) <= 1


# -- trials ------------------------------------------------------------------------------------

# Of `device`: how fast it is, and how wrong the model of steps with guesses.
DEVICES = [
    (DRAFT, 1, 1), (DRAFT, 5, 1.5), (DRAFT, 0.2, 3), (LOOKUP, 1, 1), (LOOKUP, 0.2, 1.5),
    (LOOKUP, 5, 3),
]  # fmt: skip


@pytest.mark.parametrize(("costs", "speed", "wrong"), DEVICES)
def test_guesses_that_never_hold_cost_next_to_nothing(
    costs: Costs, speed: float, wrong: float
) -> None:
    """Whatever the device, and however wrong the model."""
    seconds = device(costs, speed, wrong)
    ran = simulate(costs, seconds, lambda _: 0.0, 10_000)
    assert ran.tokens == 10_000
    assert ran.ends[-1] <= 1.01 * plainly(ran, seconds)
    if seconds(0, 2) > 1.05 * seconds(0, 0):  # once times are known, TRIAL_SHARE is kept
        late = ran.ends[-1] - ran.ends[1999] - 8000 * seconds(0, 0)
        assert 0 < late <= 1.1 * TRIAL_SHARE * 8000 * seconds(0, 0)


@pytest.mark.parametrize("holds", [0.3, 0.8])
@pytest.mark.parametrize(("costs", "speed", "wrong"), DEVICES)
def test_guesses_never_make_it_slower(
    costs: Costs, speed: float, wrong: float, holds: float
) -> None:
    seconds = device(costs, speed, wrong)
    ran = simulate(costs, seconds, lambda _: holds, 3000)
    assert ran.ends[-1] <= 1.015 * plainly(ran, seconds)


@pytest.mark.parametrize(("costs", "speed", "wrong"), DEVICES)
def test_guesses_that_hold_are_made_use_of(costs: Costs, speed: float, wrong: float) -> None:
    seconds = device(costs, speed, wrong)
    ran = simulate(costs, seconds, lambda _: 1.0, 2000)
    best = max(expected(1, k) / seconds(0, k) for k in (0, *CHOICES))
    assert ran.tokens / ran.ends[-1] >= 0.98 * best


@pytest.mark.parametrize("costs", [DRAFT, LOOKUP])
def test_guesses_begin_again_when_the_text_changes(costs: Costs) -> None:
    change = 3000
    seconds = device(costs, wrong=1.3)
    ran = simulate(costs, seconds, lambda i: 1.0 * (i >= change), change + 2000)
    # A trial comes after as many steps as it takes longer, and so much more; some are convincing.
    between = (seconds(0, 2) / seconds(0, 0) - 1) / TRIAL_SHARE
    again = change + ran.guesses[change:].index(4)
    assert again <= change + 8 * between
    rest = ran.guesses[again + 20 :]
    assert rest.count(4) >= 0.95 * len(rest)
    assert ran.guesses[1000:change].count(4) == 0


def test_bad_luck_in_the_first_steps_does_not_last() -> None:
    ran = simulate(DRAFT, device(DRAFT), lambda i: 1.0 * (i > 3), 200)
    assert ran.guesses[4:16].count(0) == 12
    assert ran.guesses[30:] == [4] * 170


def test_a_draft_with_much_to_read_is_not_tried_soon() -> None:
    for unread, wanted in ((0, 4), (int(1e6), 0)):
        control, guesses = Control(overall=Held(0, 100)), 0
        for _ in range(40):
            k, control = choose(control, DRAFT, load(unread=unread), CHOICES)
            guesses += k > 0
        assert guesses == wanted


def test_what_was_slow_for_a_while_is_tried_again() -> None:
    slow = measured(after(4, 4), 2, 5e-3, times=40)
    slow = measured(slow, 4, 9e-3, times=40)
    assert choose(slow, LOOKUP, load(), CHOICES)[0] == 0
    ran = simulate(LOOKUP, lambda _, k: 1e-3 * (1 + 0.2 * k), lambda _: 1.0, 6000, slow)
    assert ran.guesses[:1000].count(0) >= 990
    assert ran.guesses[-1000:].count(2) >= 990


def test_what_became_slow_is_found_by_steps_without_guesses() -> None:
    """Steps were long, guesses cheap beside them; now all are short, but those without guesses
    most of all, which is seen only where there are some."""
    control = measured(after(2, 3), 0, 20e-3, times=40)
    seconds: Callable[[int, int], float] = lambda _, k: 1e-3 * (1 + 2 * k)  # noqa: E731
    ran = simulate(LOOKUP, seconds, lambda _: 0.7, 20_000, control)
    assert ran.guesses[:100].count(0) == 0
    assert ran.guesses[-4000:].count(0) >= 3900


def test_no_trial_where_the_best_would_not_pay() -> None:
    """So many rows that a forward of more tokens takes as much longer."""
    rows = dict.fromkeys((0, *CHOICES), 4096)
    control = Control(overall=Held(0, 100))
    for _ in range(WARM + 1):
        control = timed(control, 4096, 0, modelled(DRAFT, 4096, 0))
    for _ in range(5000):
        k, control = choose(control, DRAFT, load()._replace(rows=rows), CHOICES)
        assert k == 0
