"""Tests of --lr-schedule wsd: warm-up, constant, and a straight line down at the end."""

import re
import shlex
from pathlib import Path

import pytest
from helpers import error
from hypothesis import given
from hypothesis import strategies as st
from workshop import (  # noqa: F401 - fixtures are used by their names
    assert_same_run,
    contents,
    corpus,
    equal,
    go_on,
    job,
    log,
    steps_of,
    workshop,
    write_stages,
)

import run_folder
import schedule
import train
from flm import preset
from schedule import decay_start, fit_stages, learning_rate, total_steps
from settings import Settings, resolve

shares = st.floats(0, 1)
PEAK = 1e-3


@st.composite
def plans(draw, rates=st.none()):
    """(stages, steps, batch size): up to three stages of whole steps, from any sample on."""
    size, steps = draw(st.integers(1, 5)), draw(st.integers(4, 60))
    starts = sorted(draw(st.sets(st.integers(1, steps - 1), max_size=2)))
    given = [{"config": {"n_layers": 2}}]
    for number, start in enumerate(starts, 3):
        more = {"lr": draw(rates), "warmup": draw(st.integers(0, 9))}
        more = {key: value for key, value in more.items() if value is not None}
        given.append({"config": {"n_layers": number}, "start": start * size, **more})
    options = {"batch_size": size, "lr": PEAK, "warmup": draw(st.integers(0, 20))}
    seen = draw(st.sampled_from([0, 1000]))
    return fit_stages(given, preset("demo"), steps=steps, seen=seen, **options), steps, size


# --------------------------------------------------------------------------------------------------
# The shape


@pytest.mark.quick
@given(plans(), shares, shares)
def test_constant_then_a_straight_line(planned, floor, decay):
    """Without rates of their own, stages leave the shape alone: the peak up to the decay's start,
    min_lr of it at the end, and on the way at each sample as far down as it is far along. 1e-9:
    rounding."""
    stages, _, _ = planned
    start, end = decay_start(stages, decay), stages[-1].end
    for n in range(stages[0].start + 1, end + 1):
        down = (n - start) / (end - start) if n > start else 0
        expected = PEAK * (1 - down * (1 - floor))
        assert schedule.wsd(stages, n, floor, decay) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.quick
@given(plans(st.floats(1e-5, 1e-2)), shares, shares)
def test_it_is_continuous_but_for_a_stages_own_rate(planned, floor, decay):
    """From one sample to the next the rate moves by at most one sample's share of the line, except
    where a stage with a rate of its own begins; and it never is above the rate that the newest
    stage asks for."""
    stages, _, _ = planned
    end = stages[-1].end
    most = 1.0001 * max(s.lr or 0 for s in stages) / max(1, end - decay_start(stages, decay))
    jumps = {s.start for s in stages if s.lr is not None}
    for n in range(stages[0].start + 1, end):
        a, b = (schedule.wsd(stages, k, floor, decay) for k in (n, n + 1))
        assert n in jumps or 0 <= a - b + 1e-15 <= most + 2e-15
        own = [s.lr for s in stages if s.lr is not None and s.start < n][-1]
        assert 0 <= a <= own * (1 + 1e-12)


@pytest.mark.quick
@given(plans(), shares, shares)
def test_each_stages_warmup_multiplies_it(planned, floor, decay):
    """learning_rate is the shape times the present stage's warm-up, also inside the decay."""
    stages, _, _ = planned
    for n in range(stages[0].start + 1, stages[-1].end + 1):
        stage = [s for s in stages if s.start < n][-1]
        warm = min(1, (n - stage.start) / stage.warmup) if stage.warmup else 1
        expected = schedule.wsd(stages, n, floor, decay) * warm
        assert learning_rate(stages, n, floor, decay) == pytest.approx(expected, rel=1e-12)


@pytest.mark.quick
@given(plans(), shares, shares, st.integers(1, 40))
def test_the_same_trunk_for_every_end(planned, first, second, more):
    """Two ends and two decays: up to the earlier of the two starts the rates are the same. So a
    checkpoint from there belongs to both runs."""
    stages, _, _ = planned
    longer = schedule.extend_stages(stages, more)
    trunk = min(decay_start(stages, first), decay_start(longer, second))
    for n in range(stages[0].start + 1, trunk + 1):
        assert learning_rate(stages, n, 0.1, first) == learning_rate(longer, n, 0.1, second)


# --------------------------------------------------------------------------------------------------
# In a run


WSD = dict(lr_schedule="wsd", lr_decay=0.5, save_every=99, keep=1, min_lr=0.0)


@pytest.mark.quick
def test_what_is_asked_for():
    """wsd without a share has 0.2; a share without wsd, and one outside 0 to 1, are refused."""
    assert resolve(Settings(lr_schedule="wsd"))[0].lr_decay == 0.2
    assert resolve(Settings())[0].lr_decay is None
    assert "--lr-schedule wsd" in error(resolve, Settings(lr_decay=0.3))
    bad = error(resolve, Settings(lr_schedule="wsd", lr_decay=1.5))
    assert "--lr-decay 1.5: must be between 0 and 1" in bad


def test_the_run_follows_it_and_keeps_the_decays_start(corpus):
    """The log has learning_rate's values, down to 0; the checkpoint of the decay's start stays
    although only one is kept; a stop and a resume inside the decay change nothing."""
    straight = train.train(job(corpus, **WSD))["folder"]
    settings, stages = run_folder.read_run(straight)
    lines = [line for line in log(straight) if "loss" in line]
    expected = [learning_rate(stages, 4 * n, 0.0, 0.5) for n in range(1, 7)]
    assert [line["lr"] for line in lines] == pytest.approx(expected) and expected[-1] == 0
    assert steps_of(straight) == ["step-00000003", "step-00000006"]
    folder = train.train(job(corpus, **WSD), stop_at=5)["folder"]
    go_on(folder)
    assert_same_run(folder, straight)


def test_a_branch_is_the_rest_of_the_run(corpus):
    """A run without decay, and a run from one of its checkpoints that only decays, end with the
    weights and moments of one run that does both, across a growth."""
    write_stages(start=8, ramp=4, warmup=4)
    options = WSD | {"keep": 9, "save_every": 1}
    whole = train.train(job(corpus, **options, stages="stages.json"))["folder"]
    trunk = train.train(job(corpus, **options | {"lr_decay": 0.0}, stages="stages.json"))["folder"]
    tail = options | {"lr_decay": 1.0, "steps": 3, "warmup": 0}
    branch = job(corpus, **tail, model=(), stages="none", init_from=f"{trunk}/step-00000003")
    folder = train.train(branch)["folder"]
    ends = contents(f"{folder}/step-00000003"), contents(f"{whole}/step-00000006")
    anew = ("step", "stage")  # a new run counts these anew
    found, expected = ({k: x for k, x in end.items() if k not in anew} for end in ends)
    assert equal(found, expected)


def test_a_longer_run_goes_back_to_before_the_decay(corpus):
    """More steps, or another decay, are refused inside the decay, old or new. What the message says
    can be typed, and then the run is the one that had been asked for so from the start."""
    folder = train.train(job(corpus, **WSD))["folder"]
    message = error(go_on, folder, steps=8)
    assert "step-00000003" in message and "jump" in message
    assert "jump" in error(go_on, folder, steps=8, lr_decay=0.0)
    words = shlex.split(re.search(r"rm -r (.*)", message)[1])
    assert [Path(word).name for word in words] == ["step-00000006"]
    for word in words:
        for file in Path(word).iterdir():
            file.unlink()
        Path(word).rmdir()
    assert "jump" in error(go_on, folder, steps=5)  # the new decay would begin before step 3
    go_on(folder, steps=8)
    assert_same_run(folder, train.train(job(corpus, **WSD | {"steps": 8}))["folder"])
    assert steps_of(folder) == ["step-00000004", "step-00000008"]


def test_without_a_checkpoint_from_before_the_decay(corpus):
    """A run whose checkpoints all lie in the decay cannot be made longer, and says so."""
    folder = train.train(job(corpus, **WSD))["folder"]
    for file in Path(folder, "step-00000003").iterdir():
        file.unlink()
    assert "no checkpoint from before it is left" in error(go_on, folder, steps=8)


@pytest.mark.quick
@given(plans(), shares)
def test_the_kept_step_is_the_last_one_before_the_decay(planned, decay):
    """The step that train.Run keeps ends at or before the decay's start, the next one after it."""
    stages, steps, size = planned
    start = decay_start(stages, decay)
    step = steps - total_steps(stages, start)
    assert stages[0].start + step * size <= start < stages[0].start + (step + 1) * size
