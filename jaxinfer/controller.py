"""How many tokens to guess: a pure controller, without jax.

More guesses bring more tokens a step, and make the step longer. What a step brings follows from how
many guesses have held; how long it takes is measured, and until then told by a cost model. The
number that brings a sequence to its end soonest is chosen: none, where guessing does not pay. What
does not seem best, a few guesses or none, is tried now and then, so seldom that it costs next to
nothing: times and text change.

It decides how fast tokens come, never which: under the rule `shared` they are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

PRIOR = 0.7  # share of guesses that hold, before anything is known
PRIOR_WORTH = 2.0  # guesses
SEQUENCE_MEMORY, OVERALL_MEMORY = 0.9, 0.99  # what the past counts after one more step
NEW_TIME = 0.2  # what a new time counts
WARM = 2  # times of a program that are not believed: it is loaded in the first
TRIAL_SHARE = 0.004  # of the time, for what does not seem best
BEST_SHARE = 0.95  # of guesses that hold, at best: where that would not pay, nothing is tried
FIRST = 16  # steps before the first trial of a program: it is to be known soon how long it takes
GAIN = 1.02  # less is not worth a change


class Costs(NamedTuple):
    """A roofline: what a forward of the model, and one of what guesses, has to read and to compute.

    Attributes:
        weight_bytes, draft_bytes: of the matrices; 0 of a draft that is no model.
        token_flops, draft_flops: of a token.
        launch_s, draft_launch_s: whatever is computed.
        bytes_per_s, flops_per_s: of the device.
    """

    weight_bytes: float
    token_flops: float
    launch_s: float
    draft_bytes: float
    draft_flops: float
    draft_launch_s: float
    bytes_per_s: float
    flops_per_s: float


class Held(NamedTuple):
    """Guesses that held, and that were attempted; those of long ago count less."""

    held: float = 0.0
    attempted: float = 0.0


class Control(NamedTuple):
    """What is known so far.

    Attributes:
        overall: of all sequences.
        sequences: of each that runs.
        times: seconds of a step by (rows, guesses), and how often it was measured.
        since_trial: steps since what did not seem best was tried.
        trying: how many more steps are a trial, and its guesses.
        begun: (rows, guesses) of which there was a trial.
    """

    overall: Held = Held()
    sequences: Mapping[int, Held] = {}
    times: Mapping[tuple[int, int], tuple[float, int]] = {}
    since_trial: int = 0
    trying: tuple[int, int] = (0, 0)
    begun: frozenset[tuple[int, int]] = frozenset()


class Load(NamedTuple):
    """What the next step is to do.

    Attributes:
        sequences: that decode and may have guesses.
        others: how many decode beside them.
        rows: of the program that runs them all, by the number of guesses.
        left: tokens that each may still come to have, on average.
        unread: tokens that the draft has to read first, of all of them.
        overrun: steps that are computed for a sequence after its end, on average, where it guesses:
            the host learns of its end from results, and more was begun by then.
    """

    sequences: Sequence[int]
    others: int
    rows: Mapping[int, int]
    left: float
    unread: int
    overrun: float


def learned(control: Control, found: Mapping[int, tuple[int, int]]) -> Control:
    """After a dispatch: of each sequence, guesses that held and were attempted. A step in which
    nothing was found to guess counts as one that did not hold."""
    sequences, overall = dict(control.sequences), control.overall
    for sequence, (held, attempted) in found.items():
        new = Held(held, max(attempted, 1))
        sequences[sequence] = _added(sequences.get(sequence, Held()), new, SEQUENCE_MEMORY)
        overall = _added(overall, new, OVERALL_MEMORY)
    return control._replace(sequences=sequences, overall=overall)


def timed(control: Control, rows: int, guesses: int, seconds: float) -> Control:
    """A step with so many guesses took so long."""
    before, count = control.times.get((rows, guesses), (seconds, 0))
    # One that waited for something else, such as a program that was compiled, is no measure: of the
    # first two that are believed the shorter counts, then twice as long at most.
    now = before + NEW_TIME * (min(seconds, 2 * before) - before)
    if count <= WARM:
        now = seconds if count < WARM else min(before, seconds)
    return control._replace(times={**control.times, (rows, guesses): (now, count + 1)})


def forget(control: Control, sequence: int) -> Control:
    """A sequence has ended."""
    if sequence not in control.sequences:
        return control
    rest = {i: held for i, held in control.sequences.items() if i != sequence}
    return control._replace(sequences=rest)


def choose(
    control: Control, costs: Costs, load: Load, choices: Sequence[int]
) -> tuple[int, Control]:
    """How many tokens to guess in the next step, of `choices` or 0."""
    if not load.sequences:
        return 0, control
    plain = step_seconds(control, costs, load.rows, 0)
    reading = load.unread * costs.draft_flops / costs.flops_per_s
    reading += costs.draft_bytes / costs.bytes_per_s if load.unread else 0
    best, soonest = 0, load.left * plain / GAIN
    for k in choices:
        seconds = step_seconds(control, costs, load.rows, k)
        end = reading + (_steps(control, load, k) + load.overrun) * seconds
        if end < soonest:
            best, soonest = k, end
    again, tried = control.trying
    if again:
        return tried, control._replace(trying=(again - 1, tried))
    tried = 0 if best else min(choices)
    steps = _trial(control, costs, load, tried, reading)
    if steps:
        begun = control.begun | {(load.rows[tried], tried)}
        return tried, control._replace(since_trial=0, trying=(steps - 1, tried), begun=begun)
    return best, control._replace(since_trial=control.since_trial + 1)


def _trial(control: Control, costs: Costs, load: Load, tried: int, reading: float) -> int:
    """Of how many steps a trial is that may begin now; 0: none may.

    Args:
        tried: guesses, which do not seem best.
        reading: seconds for what the draft has to read first.
    """
    plain = step_seconds(control, costs, load.rows, 0)
    known = _known(control, load.rows[tried], tried) is not None
    # The first, before which the draft reads, is not measured.
    steps = 1 if known else WARM + 2
    extra = plain  # as if a step without guesses brought nothing
    if tried:
        # By the model: what has been slow for a while may be so no more.
        model = [modelled(costs, load.rows[k], k) for k in (0, tried)]
        if expected(BEST_SHARE, tried) * model[0] <= model[1] * GAIN:
            return 0
        longer = step_seconds(control, costs, load.rows, tried) - plain
        extra = max(longer, (GAIN - 1) * plain)
    due = control.since_trial * plain * TRIAL_SHARE >= steps * extra + reading
    first = not known and (load.rows[tried], tried) not in control.begun
    first &= control.since_trial >= FIRST and reading <= FIRST * plain
    return steps if due or first else 0


def step_seconds(control: Control, costs: Costs, rows: Mapping[int, int], guesses: int) -> float:
    """Of a step of `rows[guesses]` rows: as measured, or by the model, which is held against what
    was measured: of a step without guesses, or else with as few as were.

    Args:
        rows: of the program, by its guesses.
    """
    known = {k: x for k, n in rows.items() if (x := _known(control, n, k)) is not None}
    if guesses in known:
        return known[guesses]
    model = modelled(costs, rows[guesses], guesses)
    if not known:
        return model
    k = min(known)
    return model * known[k] / modelled(costs, rows[k], k)


def _known(control: Control, rows: int, guesses: int) -> float | None:
    """Seconds of a step, as measured; None: not often enough."""
    seconds, count = control.times.get((rows, guesses), (0.0, 0))
    return seconds if count > WARM else None


def modelled(costs: Costs, rows: int, guesses: int) -> float:
    """Seconds of a step, by the roofline."""

    def forward(tokens: int, weights: float, flops: float, launch: float) -> float:
        work = max(weights / costs.bytes_per_s, tokens * flops / costs.flops_per_s)
        return launch + work

    target = forward(rows * (guesses + 1), costs.weight_bytes, costs.token_flops, costs.launch_s)
    draft = forward(rows, costs.draft_bytes, costs.draft_flops, costs.draft_launch_s)
    return target + guesses * draft


def expected(share: float, guesses: int) -> float:
    """Tokens of a step where each guess holds with probability `share`, if those before it do;
    Leviathan et al. 2023, eq. 1."""
    return sum(share**i for i in range(guesses + 1))


def share(control: Control, sequence: int) -> float:
    """Of a sequence's guesses, how many are expected to hold."""
    overall = _smoothed(control.overall, PRIOR)
    return _smoothed(control.sequences.get(sequence, Held()), overall)


def _steps(control: Control, load: Load, guesses: int) -> float:
    """That a row takes to its end, on average: those whose guesses do not hold take as many as
    without, however many tokens others have a step."""
    each = sum(1 / expected(share(control, i), guesses) for i in load.sequences) + load.others
    return load.left * each / (len(load.sequences) + load.others)


def _smoothed(found: Held, prior: float) -> float:
    return (found.held + PRIOR_WORTH * prior) / (found.attempted + PRIOR_WORTH)


def _added(before: Held, new: Held, memory: float) -> Held:
    return Held(before.held * memory + new.held, before.attempted * memory + new.attempted)
