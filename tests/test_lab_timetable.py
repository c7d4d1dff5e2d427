"""The timetable of a pipeline: its bubble, its dependencies, and how it is drawn."""

import pytest
from helpers import error
from hypothesis import given
from hypothesis import strategies as st

from lab.cluster import main
from lab.timetable import SCHEDULES, UNITS, closed_bubble, draw, timetable

pytestmark = pytest.mark.quick


@st.composite
def pipelines(draw, schedules=tuple(SCHEDULES)):
    """(ranks, micro-batches, schedule) that fit together."""
    schedule, p = draw(st.sampled_from(schedules)), draw(st.integers(2, 6))
    if SCHEDULES[schedule] == 1:
        return p, p + draw(st.integers(0, 5)), schedule
    return p, p * draw(st.integers(2, 5)), schedule


@given(pipelines(("1F1B", "GPipe")))
def test_bubble_of_one_pipeline_stage_on_a_rank(pipeline):
    """1F1B and GPipe idle (p-1)/(m+p-1) of the time, for any p ranks and m micro-batches; only
    rounding is tolerated."""
    p, m, _ = pipeline
    assert timetable(*pipeline)[1] == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


@given(pipelines(("Interleaved1F1B",)))
def test_bubble_of_two_pipeline_stages_on_a_rank(pipeline):
    """Two pipeline stages on a rank make the bubble (p-1)/(2m+p-1)."""
    p, m, _ = pipeline
    assert timetable(*pipeline)[1] == pytest.approx((p - 1) / (2 * m + p - 1), abs=1e-12)


@given(pipelines())
def test_the_closed_formula_is_the_bubble_of_the_timetable(pipeline):
    """The formula that a rehearsal uses is what the timetable gives; the zero-bubble schedules have
    no formula, and a smaller bubble than Interleaved1F1B."""
    closed, bubble = closed_bubble(*pipeline), timetable(*pipeline)[1]
    if closed is None:
        assert bubble < closed_bubble(*pipeline[:2], "Interleaved1F1B")[1]
    else:
        assert bubble == pytest.approx(closed[1], abs=1e-12)


@given(pipelines())
def test_timetable_obeys_its_dependencies(pipeline):
    """In every schedule: each pipeline stage does each micro-batch's forward and backward pass
    once, on its own rank, one thing at a time; nothing starts before what it needs is done; no rank
    could have started sooner what it did; the bubble is the idle share."""
    p, m, schedule = pipeline
    rows, bubble = timetable(*pipeline)
    stages = p * SCHEDULES[schedule]
    in_v = schedule == "ZBVZeroBubble"
    home = {s: 2 * p - 1 - s if in_v and s >= p else s % p for s in range(stages)}
    end = {tuple(work): start + UNITS[work[0]] for row in rows for start, *work in row}
    passes = [(stage, i) for stage in range(stages) for i in range(m)]
    backward = {(s, i): end.get(("B", s, i), end.get(("I", s, i))) for s, i in passes}
    assert len(rows) == p and sum(map(len, rows)) == len(end)
    assert {key[1:] for key in end if key[0] == "F"} == set(backward)
    assert None not in backward.values()
    for s, i in passes:
        halves = ("I", s, i) in end and ("W", s, i) in end
        assert (("B", s, i) in end) != halves
    for rank, row in enumerate(rows):
        free = 0
        for start, kind, stage, i in row:
            assert home[stage] == rank
            if kind == "F":
                needs = end["F", stage - 1, i] if stage else 0
            elif kind == "W":
                needs = end["I", stage, i]
            else:
                needs = backward[stage + 1, i] if stage + 1 < stages else end["F", stage, i]
            assert start == max(free, needs)
            free = start + UNITS[kind]
    assert bubble == pytest.approx(1 - 3 * m * stages / (p * max(end.values())), abs=1e-12)


def test_draw_prints_every_rank():
    """A row for each rank, under the bubble and its formula; the letters are explained."""
    text = draw(2, 3)
    assert "bubble 25.0% ((p-1)/(m+p-1) = 25.0%)" in text
    assert "\npp rank 0  F0 F1 .  .  B0 -  F2 B1 -  .  B2 -\n" in text
    assert "\npp rank 1  .  F0 B0 -  F1 B1 -  F2 B2 -  .  .\n" in text
    text = draw(2, 4, "ZBVZeroBubble")
    assert "no closed formula" in text and "F0:3 I0:3 W0:3" in text and "I3:5 and W3:5" in text


@pytest.mark.parametrize(
    "pipeline, words",
    [
        ((0, 4, "1F1B"), "--pp 0: must be at least 1"),
        ((2, 0, "1F1B"), "--micro-batches 0: must be at least 1"),
        ((4, 3, "1F1B"), "--micro-batches 3: --pp 4 --schedule 1F1B needs at least 4"),
        ((2, 4, "1f1b"), "--schedule 1f1b: must be one of 1F1B, GPipe, Interleaved1F1B, Inter"),
        ((2, 5, "ZBVZeroBubble"), "--schedule ZBVZeroBubble needs a multiple of 2"),
    ],
)
def test_what_is_no_pipeline_is_refused(pipeline, words):
    """The message names the option, its value and what is allowed."""
    assert words in error(timetable, *pipeline)


def test_every_reason_at_once():
    """Three mistakes make three lines."""
    message = error(timetable, 0, -1, "no such")
    assert all(word in message for word in ("--pp 0", "--micro-batches -1", "--schedule no such"))


def test_the_command_draws(capsys):
    """`draw` prints the drawing."""
    assert main(["draw", "--pp", "4", "--micro-batches", "8"]) == 0
    assert capsys.readouterr().out == draw(4, 8) + "\n"
