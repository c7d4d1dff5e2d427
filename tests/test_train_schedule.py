"""The learning rate of a run as a function of the samples seen."""

# ruff: noqa: F401, F811 (pytest finds fixtures by their names)

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from workshop import (
    SIZE,
    few,
    workshop,
    write_stages,
)

import train
from schedule import learning_rate
from train import Settings


def schedule(**given):
    s, stages = train.resolve(Settings(model=SIZE, **given))
    return lambda samples: learning_rate(stages, samples, s.min_lr)


@few(60)
@given(
    lr=st.floats(1e-6, 10),
    floor=st.floats(0, 1),
    steps=st.integers(2, 500),
    size=st.integers(1, 64),
    share=st.floats(0, 0.9),
)
def test_learning_rate(lr, floor, steps, size, share):
    """Straight up to the peak at the end of the warm-up, then half a cosine down to the floor at
    the last sample: closed values at both ends and in the middle, monotone on either side, and
    never outside. 1e-12: rounding."""
    total = steps * size
    warmup = int(share * total)
    rate = schedule(lr=lr, min_lr=floor, steps=steps, batch_size=size, warmup=warmup)
    tiny = 1e-12 * lr
    assert rate(total) == pytest.approx(lr * floor, rel=1e-12, abs=tiny)
    assert rate(total + 12345) == pytest.approx(lr * floor, rel=1e-12, abs=tiny)
    if warmup:
        assert rate(warmup) == pytest.approx(lr, rel=1e-12)
        assert rate(1) == pytest.approx(lr / warmup, rel=1e-12)
        assert rate(-(-warmup // 2)) == pytest.approx(lr * -(-warmup // 2) / warmup, rel=1e-12)
    if (total - warmup) % 2 == 0:
        assert rate((total + warmup) // 2) == pytest.approx(lr * (1 + floor) / 2, rel=1e-12)
    rates = [rate(n) for n in range(size, total + 1, size)]
    assert all(0 <= r <= lr + tiny for r in rates)
    top = warmup // size  # the first `top` steps end within the warm-up
    assert all(a <= b + tiny for a, b in itertools.pairwise(rates[:top]))
    assert all(a >= b - tiny for a, b in itertools.pairwise(rates[top:]))


@few(30)
@given(
    steps=st.integers(1, 200),
    size=st.integers(1, 32),
    factor=st.integers(2, 8),
    warmup=st.integers(0, 500),
)
def test_learning_rate_counts_samples(steps, size, factor, warmup):
    """A batch `factor` times smaller with as many times the steps has the same learning rate at the
    same samples."""
    large = schedule(lr=1e-3, steps=steps, batch_size=size * factor, warmup=warmup)
    small = schedule(lr=1e-3, steps=steps * factor, batch_size=size, warmup=warmup)
    assert all(large(n) == small(n) for n in range(size, steps * size * factor + 1, size))


@few(20)
@given(start=st.integers(1, 9), warmup=st.integers(0, 12), size=st.integers(1, 4))
def test_a_stage_leaves_the_cosine_alone(start, warmup, size):
    """After a stage's own warm-up from zero, the learning rate is what it would be without
    stages."""
    write_stages(start * size, warmup=warmup)
    given = dict(lr=1e-3, steps=12, batch_size=size, warmup=2)
    plain, staged = schedule(**given), schedule(**given, stages="stages.json")
    for n in range(1, 12 * size + 1):
        warm = min(1, (n - start * size) / warmup) if n > start * size and warmup else 1
        assert staged(n) == pytest.approx(plain(n) * warm, rel=1e-12)


@few(30)
@given(start=st.integers(200, 900), own=st.floats(2e-5, 3e-3))
def test_a_stage_with_its_own_learning_rate(start, own):
    """A stage's own learning rate is met exactly at its start. A lower one than before is on the
    way of the cosine, which falls all the time and never jumps; one as high or higher is a rewind,
    up from where the cosine was. Either way the run ends at the floor, min_lr of the highest. Steps
    of one sample: 1% is more than the cosine moves in one of 1000."""
    write_stages(start, lr=own)
    rate = schedule(lr=1e-3, steps=1000, batch_size=1, warmup=100, stages="stages.json")
    assert rate(start + 1) == pytest.approx(own, rel=0.02)
    peak = max(own, 1e-3)
    assert rate(1000) == pytest.approx(0.015 * peak, rel=1e-9)
    rates = [rate(n) for n in range(100, 1001)]
    falls = [a >= b * (1 - 1e-12) for a, b in itertools.pairwise(rates)]
    if own < 1e-3:
        assert all(falls) and rate(start) == pytest.approx(own, rel=1e-9)
    else:
        assert falls.count(False) <= 1 and rate(start) <= rate(start + 1) * (1 + 1e-9)


def test_the_papers_learning_rates():
    """The paper's three stages meet Table 1: 4e-4 after the first warm-up, 3.4e-4 and 2e-4 where
    the next two begin, and 6e-6 with the last sample."""
    s, stages = train.resolve(Settings(preset="flm-101b", stages="paper"))
    rate = [
        learning_rate(stages, n, s.min_lr)
        for n in (4_608_000, stages[1].start, stages[2].start, stages[2].end)
    ]
    assert rate == pytest.approx([4e-4, 3.4e-4, 2e-4, 6e-6], rel=1e-9)
