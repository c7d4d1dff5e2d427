"""Checks of chapter 8: the speed-up at equal loss."""

from __future__ import annotations

import json
import math

from hypothesis import strategies as st

from course.checking import check, expect, shown
from course.student import ROOT

# --------------------------------------------------------------------------------------------------
# speed_up: speed_up(scratch, flops, loss) -> (number, mark)

MEASURED = ROOT / "tutorials/measurements/growth-8x32.json"
Runs = list[tuple[float, float]]  # (FLOPs, loss) of each run from scratch


def falling(steps: list[tuple[int, int]]) -> Runs:
    """Runs from scratch that begin with 1 FLOP and a loss of 4. Each step doubles the FLOPs some
    times and takes some quarters off the loss."""
    runs = [(1.0, 4.0)]
    for doublings, quarters in steps:
        runs.append((runs[-1][0] * 2.0**doublings, runs[-1][1] - quarters / 4))
    return runs


steps = st.tuples(st.integers(1, 4), st.integers(1, 3))
lines = st.lists(steps, min_size=1, max_size=3).map(falling)
spent = st.sampled_from([1.0, 2.0, 5.0])
inside = st.integers(0, 4)  # quarters of the way from the first run's loss down to the last one's
anywhere = st.integers(-1, 5)  # the same, also beyond the runs


def loss_at(scratch: Runs, quarters_down: int) -> float:
    """The loss so far on the way from that of the first run to that of the last one."""
    first, last = scratch[0][1], scratch[-1][1]
    return first + (last - first) * quarters_down / 4


def ask(f, scratch: Runs, flops: float, loss: float) -> tuple[float | None, str, str]:
    """The student's number and mark, and the words for them."""
    found = f.speed_up(list(scratch), flops, loss)
    call = f"speed_up({shown(scratch)}, {shown(flops)}, {shown(loss)})"
    pair = isinstance(found, (tuple, list)) and len(found) == 2
    expect(pair, f"{call} is {shown(found)}, expected a number and a mark")
    return found[0], found[1], f"{call} is {shown(found)}"


def same(number: float | None, exact: float | None) -> bool:
    """Whether a student's number is right in its first five digits, or None where it must be."""
    if number is None or exact is None:
        return number is exact
    return math.isclose(number, exact, rel_tol=1e-5, abs_tol=1e-9)


def expect_answer(f, scratch: Runs, flops: float, loss: float, exact: float | None, mark: str = ""):
    """Raise Wrong unless the student's answer is this number and this mark."""
    number, found, text = ask(f, scratch, flops, loss)
    right = same(number, exact) and found == mark
    expect(right, f"{text}, expected {shown((exact, mark))}")


@check("speed_up", scratch=lines, which=st.integers(0, 3))
def a_run_from_scratch_is_as_fast_as_itself(f, scratch, which):
    """A run from scratch, held against the line on which it lies itself, has the number 1."""
    expect_answer(f, scratch, *scratch[which % len(scratch)], 1.0)


levels, slopes = st.integers(3, 5), st.sampled_from([0.25, 0.125])
powers = st.lists(st.integers(0, 10), min_size=2, max_size=4, unique=True).map(sorted)


@check("speed_up", a=levels, b=slopes, powers=powers, flops=spent, quarters_down=inside)
def a_law_is_read_exactly(f, a, b, powers, flops, quarters_down):
    """Runs with 2**p FLOPs whose loss is a - b p: the loss a - b p, for any p between the runs, has
    the number 2**p / flops."""
    scratch = [(2.0**p, a - b * p) for p in powers]
    power = powers[0] + (powers[-1] - powers[0]) * quarters_down / 4
    expect_answer(f, scratch, flops, a - b * power, 2**power / flops)


@check("speed_up", scratch=lines, flops=spent, quarters_down=inside)
def the_line_has_this_loss(f, scratch, flops, quarters_down):
    """With number * flops FLOPs, the line through the runs has the loss that was asked for."""
    loss = loss_at(scratch, quarters_down)
    number, mark, text = ask(f, scratch, flops, loss)
    expect(mark == "", f"{text}, expected the mark ''")
    low, high = scratch[0][0], scratch[-1][0]
    between = number is not None and low * 0.999 < number * flops < high * 1.001
    expect(between, f"{text}, expected a number from {low / flops:g} to {high / flops:g}")
    need = number * flops
    left = max(i for i, run in enumerate(scratch[:-1]) if i == 0 or run[0] <= need)
    (F1, L1), (F2, L2) = scratch[left : left + 2]
    there = L1 + (L2 - L1) * math.log(need / F1) / math.log(F2 / F1)
    right = math.isclose(there, loss, abs_tol=1e-4)
    expect(right, f"{text}, but with {need:.6g} FLOPs the line has the loss {there:.6g}")


@check("speed_up", scratch=lines, flops=spent, far=st.integers(1, 4))
def beyond_the_runs_it_is_a_bound(f, scratch, flops, far):
    """A loss that no run from scratch has passed gets a bound and its mark, however far it is."""
    (fewest, highest), (most, lowest) = scratch[0], scratch[-1]
    expect_answer(f, scratch, flops, lowest - far / 4, most / flops, ">")
    expect_answer(f, scratch, flops, highest + far / 4, fewest / flops, "<")


@check("speed_up", scratch=lines.flatmap(st.permutations), flops=spent, quarters_down=anywhere)
def the_order_of_the_runs_does_not_matter(f, scratch, flops, quarters_down):
    """Runs in any order have the answer that they have in the order of their FLOPs."""
    loss = loss_at(sorted(scratch), quarters_down)
    number, mark, _ = ask(f, sorted(scratch), flops, loss)
    found, its_mark, text = ask(f, scratch, flops, loss)
    right = same(found, number) and its_mark == mark
    expect(right, f"{text}, but {shown((number, mark))} in the order of FLOPs")


units = st.sampled_from([1000.0, 0.5, 1e12, 1e21])


@check("speed_up", scratch=lines, flops=spent, quarters_down=anywhere, unit=units)
def the_unit_does_not_matter(f, scratch, flops, quarters_down, unit):
    """All FLOPs in another unit, so all times the same number, give the same answer."""
    loss = loss_at(scratch, quarters_down)
    number, mark, _ = ask(f, scratch, flops, loss)
    large = [(F * unit, L) for F, L in scratch]
    found, its_mark, text = ask(f, large, flops * unit, loss)
    right = same(found, number) and its_mark == mark
    expect(right, f"{text}, but {shown((number, mark))} with all FLOPs over {unit:g}")


@check(
    "speed_up", scratch=lines, at=st.integers(0, 2), up=st.integers(0, 2), quarters_down=anywhere
)
def no_line_that_falls(f, scratch, at, up, quarters_down):
    """With no run or one, or where a run with more FLOPs has the same loss or a higher one, there
    is no number, for any loss."""
    loss, at = loss_at(scratch, quarters_down), at % (len(scratch) - 1)
    bent = list(scratch)
    bent[at + 1] = scratch[at + 1][0], scratch[at][1] + up / 4
    for runs in [], scratch[:1], bent:
        expect_answer(f, runs, 1.0, loss, None)


@check("speed_up")
def the_measured_runs(f):
    """The first runs of chapter 3's appendix: `early` has 1.34. `small` is worse than every run
    from scratch: there is only a bound."""
    rows = json.loads(MEASURED.read_text())["rows"]
    points = {(row["name"], row["budget"]): (row["tflop"], row["mean"]["loss"]) for row in rows}
    scratch = [points["scratch", 2000], points["scratch", 4000]]
    expect_answer(f, scratch, *points["early", 2000], 1.3427165)
    small = points["small", 2000]
    expect_answer(f, scratch, *small, scratch[0][0] / small[0], "<")
