"""What every shape of the learning rate promises, alone and under stages.

A shape is a function of schedule.py with the parameters (stages, samples, min_lr), such as
`cosine`. The tests find all of them: a new one needs no line here. `wsd` has one parameter more."""

import functools
import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

import schedule
from flm import preset

pytestmark = pytest.mark.quick

PARAMETERS = ["stages", "samples", "min_lr"]
SHAPES = [
    function
    for name, function in inspect.getmembers(schedule, inspect.isfunction)
    if list(inspect.signature(function).parameters) == PARAMETERS and name != "learning_rate"
]
FLOOR, PEAK = 0.1, 1e-3
WSD = [functools.partial(schedule.wsd, decay=decay) for decay in (0.3, 0.9)]
every_shape = pytest.mark.parametrize("shape", SHAPES + WSD)


def plan(*later: dict, steps=200, batch_size=1, warmup=20):
    """A run with stages that begin later; each has a larger model than the one before."""
    given = [{"config": {"n_layers": 2 + number}, **more} for number, more in enumerate(later, 1)]
    options = {"steps": steps, "batch_size": batch_size, "lr": PEAK, "warmup": warmup}
    return schedule.fit_stages([{"config": {"n_layers": 2}}, *given], preset("demo"), **options)


def test_the_shape_of_the_paper_is_found():
    assert schedule.cosine in SHAPES


@every_shape
def test_a_run_begins_at_the_peak_and_ends_at_the_floor(shape):
    """At the end of the warm-up it is the peak, with the last sample min_lr of the peak. Between
    the two it never rises."""
    found = [shape(plan(), n, FLOOR) for n in range(20, 201)]
    assert found[0] == pytest.approx(PEAK) and found[-1] == pytest.approx(FLOOR * PEAK)
    assert all(a >= b * (1 - 1e-12) for a, b in zip(found, found[1:]))


@every_shape
@given(start=st.integers(21, 180), warmup=st.integers(0, 20))
def test_a_stage_without_a_learning_rate_changes_nothing(shape, start, warmup):
    """A growth alone is no reason for another rate: its warm-up is a factor of learning_rate, and
    no part of the shape."""
    staged = plan({"start": start, "warmup": warmup})
    assert all(
        shape(staged, n, FLOOR) == pytest.approx(shape(plan(), n, FLOOR)) for n in range(1, 201)
    )


@pytest.mark.parametrize("shape", SHAPES)
@given(first=st.integers(30, 90), second=st.integers(100, 180), own=st.floats(0.5, 0.9))
def test_a_lower_rate_is_met_where_its_stage_begins(shape, first, second, own):
    """Two later stages with rates of their own, each lower than the one before, as in the paper's
    Table 1: each rate is met at the start of its stage, and the run still ends at the floor."""
    rates = own * PEAK, own * own * PEAK
    staged = plan({"start": first, "lr": rates[0]}, {"start": second, "lr": rates[1]})
    assert shape(staged, first, FLOOR) == pytest.approx(rates[0])
    assert shape(staged, second, FLOOR) == pytest.approx(rates[1])
    assert shape(staged, 200, FLOOR) == pytest.approx(FLOOR * PEAK)


@every_shape
@given(factor=st.integers(2, 5), start=st.integers(11, 30))
def test_a_shape_counts_samples(shape, factor, start):
    """Smaller batches and as many times the steps: the same rate at the same samples."""
    later = {"start": start * factor, "lr": PEAK / 2}
    large = plan(later, steps=200 // factor, batch_size=factor)
    small = plan(later, steps=200 // factor * factor, batch_size=1)
    assert all(
        shape(large, n, FLOOR) == pytest.approx(shape(small, n, FLOOR)) for n in range(1, 200)
    )
