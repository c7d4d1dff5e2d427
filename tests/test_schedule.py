"""Tests of schedule.py: the stages of a run and the learning rate."""

import itertools
import json
import re
from fractions import Fraction

import pytest
from helpers import error
from hypothesis import given, settings
from hypothesis import strategies as st

from flm import PRESETS, count_parameters, forward_flops, preset
from schedule import (
    DEMO_STAGES,
    PAPER_STAGES,
    RECIPES,
    Stage,
    extend_stages,
    fit_stages,
    flop_progress,
    given_stages,
    in_samples,
    learning_rate,
    read_stages,
    total_steps,
    training_flops,
)

pytestmark = pytest.mark.quick
DEMO = preset("demo")


def plan(stages=({},), config=DEMO, **changes) -> list[Stage]:
    """fit_stages with plain settings."""
    options = {"steps": 100, "batch_size": 4, "lr": 1e-3, "warmup": 0, **changes}
    return fit_stages(list(stages), config, **options)


# --------------------------------------------------------------------------------------------------
# Reading stages


def test_the_papers_stages_grow_and_carry_its_numbers():
    """PAPER_STAGES are a legal schedule; batch times steps is the tokens: 52,000, 8,400 and nearly
    6,000 of 2160 rows for the last stage's."""
    stages = read_stages(PAPER_STAGES)
    names = ("flm-16b", "flm-51b", "flm-101b")
    assert [stage.config for stage in stages] == [PRESETS[name] for name in names]
    assert [stage.lr for stage in stages] == [4e-4, 3.4e-4, 2e-4]
    assert [stage.warmup for stage in stages] == [4_608_000, 230_400, 230_400]
    steps = [stage.tokens / (stage.batch_size * 2048) for stage in stages]
    assert steps == pytest.approx([52_000, 8_400, 6_000], rel=2e-4)
    assert stages[0].start == 0 and stages[1].start == pytest.approx(52_000 * 2304, rel=1e-4)
    assert all(stage.tp * stage.pp * stage.dp == stage.gpus == 192 for stage in stages)


LARGER = {"config": {"n_layers": 8}, "start": 50}


@pytest.mark.parametrize(
    "stages, said",
    [
        ([], ["stages are a JSON list"]),
        ({"preset": "demo"}, ["stages are a JSON list"]),
        ([3], ["stages are a JSON list"]),
        ([{"preset": "demmo"}], ["did you mean demo"]),
        ([{"preset": "demo", "tokns": 5}], ["unknown key 'tokns'"]),
        ([{"preset": "demo", "tokens": -1, "ramp": 1.5}], ["tokens = -1", "ramp = 1.5"]),
        ([{"preset": "demo", "lr": True, "gpus": 0}], ["lr = True", "gpus = 0"]),
        ([{"preset": "demo", "lr": float("inf"), "dp": 10**400}], ["lr = inf", "dp = 10000"]),
        ([{"preset": ["demo"], "config": 3}], ["the name of a preset", "config = 3"]),
        ([{"preset": "demo", "name": 5, "layers": {}}], ["name = 5", "layers = {}"]),
        ([{"preset": "demo", "start": 5}], ["the first stage starts at 0"]),
        ([{}], ["missing field 'd_model'"]),
        ([{"preset": "demo"}, {"config": {"n_layers": 8}}], ["needs a start in samples"]),
        (
            [{"preset": "demo"}, {"config": {"n_layers": 3, "d_ff": 5}, "start": 9}],
            ["n_layers: 6 -> 3", "d_ff: 512 -> 5"],
        ),
        (
            [{"preset": "demo"}, LARGER | {"ramp": 20}, {"config": {"n_layers": 9}, "start": 60}],
            ["stage 3", "starts at sample 60", "a ramp of 20", "at 70 or later"],
        ),
        (
            [{"preset": "demo"}, LARGER, {"config": {"n_layers": 9}, "start": 40}],
            ["stage 3", "starts at sample 40", "starts at 50", "at 51 or later"],
        ),
        ([{"preset": "demo"}, LARGER | {"layers": "pile"}], ["unknown rule 'pile'"]),
        ([{"preset": "demo"}, LARGER | {"moments": "mean"}], ["unknown key 'moments'"]),
    ],
)
def test_bad_stages(stages, said):
    """A list that shrinks, goes backwards, overlaps a ramp, or says what nobody reads, is
    refused by stage, with its numbers."""
    message = error(read_stages, stages)
    assert all(text in message for text in said), message


def test_stages_survive_json(tmp_path):
    """A planned stage is the same after a way through JSON, its model and its row of layers too."""
    row = [0, 1, None, 2, 3, 4, 5, 1]
    stages = plan([{}, {"config": {"n_layers": 8}, "start": 9, "layers": row, "lr": 2e-4, "dp": 2}])
    again = json.loads(json.dumps([stage.to_dict() for stage in stages]))
    assert [Stage.from_dict(values) for values in again] == stages and stages[1].layers == row


def test_what_stages_means(tmp_path):
    """--stages: none, paper, a file, or the recipe of the preset. A file that is not there, or no
    JSON, is named."""
    assert given_stages("none", "demo", 100, 4) == [{}]
    assert given_stages("paper", "demo", 100, 4) == PAPER_STAGES
    (tmp_path / "mine.json").write_text('[{"config": {"n_layers": 2}}]')
    file = str(tmp_path / "mine.json")
    assert given_stages(file, "demo", 100, 4) == [{"config": {"n_layers": 2}}]
    assert [stage.get("start") for stage in given_stages(None, "demo", 100, 4)] == [None, 220, 312]
    assert given_stages(None, "iq-demo", 100, 4) == [{}]
    for content in (b"[", "[{}]".encode("utf-16")):
        (tmp_path / "bad.json").write_bytes(content)
        assert "--stages" in error(given_stages, str(tmp_path / "bad.json"), "demo", 100, 4)
    assert "cannot be read" in error(given_stages, str(tmp_path / "none.json"), "demo", 100, 4)


def test_every_preset_has_a_recipe():
    """Each preset has steps, a batch size, a learning rate and a warm-up."""
    assert RECIPES.keys() == PRESETS.keys()
    for recipe in RECIPES.values():
        assert {"steps", "batch_size", "lr", "warmup"} <= recipe.keys()


# --------------------------------------------------------------------------------------------------
# Planning a run


@st.composite
def schedules(draw) -> tuple[list[dict], int, int]:
    """(stages, steps, batch size) of which many do not fit: starts, ramps and batch sizes of a
    like size, in any order."""
    stages, at = [{"config": {"n_layers": 1}}], 0
    for n_layers in range(2, draw(st.integers(1, 4)) + 1):
        at += draw(st.integers(-3, 40))
        stages.append({"config": {"n_layers": n_layers}, "start": max(0, at)})
        if draw(st.booleans()):
            stages[-1]["ramp"] = draw(st.integers(0, 20))
    for stage in stages:
        if draw(st.booleans()):
            stage["batch_size"] = draw(st.integers(1, 12))
    return stages, draw(st.integers(1, 40)), draw(st.integers(1, 12))


@settings(max_examples=500)
@given(schedules(), st.integers(0, 99))
def test_steps_and_samples_agree_under_any_stages(drawn, seen):
    """--steps is the number of optimizer steps of the whole run, whatever the batch sizes of its
    stages. A loop that takes whole steps meets every growth and the end exactly, no growth falls
    into a ramp, and each stage begins with the first whole step at or after its start. Where a
    schedule does not fit, every start and every --steps that the message prints is accepted as
    printed."""
    stages, steps, batch_size = drawn
    for _ in range(len(stages) + 1):
        options = {"steps": steps, "batch_size": batch_size, "seen": seen}
        try:
            planned = plan(stages, **options)
            break
        except ValueError as problem:
            advice = re.findall(r'stage (\d+)[^"]*"start": (\d+)', str(problem))
            enough = re.findall(r"--steps (\d+)", str(problem))
            assert advice or enough, problem
            for number, start in advice:
                stages[int(number) - 1]["start"] = int(start)
            steps = int(enough[0]) if enough else steps
    wanted = [stage.get("start", 0) for stage in stages]
    samples, count, now = seen, 0, 0
    while samples < planned[-1].end:
        if now + 1 < len(planned) and samples >= planned[now + 1].start:
            assert samples == planned[now].end == planned[now + 1].start
            assert 0 <= samples - seen - wanted[now + 1] < planned[now].batch_size
            assert samples >= planned[now].start + planned[now].ramp
            now += 1
        assert total_steps(planned, samples) == steps - count
        samples, count = samples + planned[now].batch_size, count + 1
    assert samples == planned[-1].end and now == len(planned) - 1
    assert count == steps == total_steps(planned)


def test_a_stage_with_its_own_batch_size_by_hand():
    """10 steps, of which 3 of 16 rows and 7 of 32: the growth at the first whole step at or after
    sample 40, the end at 48 + 7 * 32. With 3 steps there is no step left for the last stage; the
    4 of the message are enough."""
    stages = [{}, {"config": {"n_layers": 8}, "start": 40, "batch_size": 32}]
    planned = plan(stages, steps=10, batch_size=16)
    assert [(stage.start, stage.end) for stage in planned] == [(0, 48), (48, 272)]
    message = error(plan, stages, steps=3, batch_size=16)
    assert "starts at sample 48 after 3 steps: ask for --steps 4" in message
    assert plan(stages, steps=4, batch_size=16)[-1].end == 80


@given(st.integers(1, 200), st.integers(1, 300))
def test_the_demo_grows_in_any_run_of_five_steps_and_more(steps, batch_size):
    """The recipe's stages are shares of the run. From 5 steps on they fit, whatever the batch size;
    below, both commands of the message are accepted."""
    options = {"steps": steps, "batch_size": batch_size}
    try:
        stages = given_stages(None, "demo", **options)
    except ValueError as problem:
        assert steps < 5 and "--steps 5 or more" in str(problem)
        stages = given_stages("none", "demo", **options)
        assert "--stages none" in str(problem) and len(plan(stages, **options)) == 1
        options["steps"] = 5
        stages = given_stages(None, "demo", **options)
    assert len(plan(stages, **options)) == 3


def test_what_a_stage_leaves_open_is_filled_in():
    """lr and warmup are the run's in the first stage; later ones have no lr and no warm-up of their
    own; all have a batch size. All counts from the samples that a checkpoint brought along."""
    stages = [{}, {"config": {"n_layers": 8}, "start": 40, "lr": 5e-4, "warmup": 7}, {}]
    stages[2] = {"config": {"n_layers": 9}, "start": 80, "batch_size": 2}
    planned = plan(stages, lr=2e-3, warmup=5, seen=1000)
    assert [stage.lr for stage in planned] == [2e-3, 5e-4, None]
    assert [stage.warmup for stage in planned] == [5, 7, 0]
    assert [stage.batch_size for stage in planned] == [4, 4, 2]
    assert [stage.start for stage in planned] == [1000, 1040, 1080] and planned[2].end == 1240
    assert [stage.config.n_layers for stage in planned] == [6, 8, 9]


def test_a_run_without_steps_ends_with_its_tokens():
    """The paper's stages: each has its tokens, so no number of steps is asked for; where a last
    stage has none, the message says what to add."""
    planned = plan(PAPER_STAGES, steps=None)
    rows = [round(stage["tokens"] / 2048) for stage in PAPER_STAGES]
    for stage, expected in zip(planned, rows):
        assert 0 <= stage.end - stage.start - expected < 2304
    assert planned[-1].end - planned[-1].start == rows[-1]
    assert "needs its tokens, or the run a number of steps: --steps" in error(plan, steps=None)


@settings(max_examples=200)
@given(schedules(), st.integers(-60, 60))
def test_a_resumed_run_ends_where_steps_says(drawn, more):
    """extend_stages moves the end by that many steps of the last stage. Where the last stage would
    have no step left, the --steps of the message are accepted as printed."""
    stages, steps, batch_size = drawn
    try:
        planned = plan(stages, steps=steps, batch_size=batch_size)
    except ValueError:
        return
    try:
        extended = extend_stages(planned, more)
    except ValueError as problem:
        more = int(re.search(r"--steps (\d+)", str(problem))[1]) - steps
        extended = extend_stages(planned, more)
        assert extended[-1].end == extended[-1].start + extended[-1].batch_size
    assert total_steps(extended) == steps + more and extended[:-1] == planned[:-1]


def test_a_resumed_run_has_another_learning_rate():
    """Every learning rate of a schedule is multiplied; a stage without one stays without."""
    stages = [{}, {"config": {"n_layers": 8}, "start": 8}]
    stages += [{"config": {"n_layers": 9}, "start": 16, "lr": 4e-4}]
    extended = extend_stages(plan(stages), 0, 0.5)
    assert [stage.lr for stage in extended] == [5e-4, None, 2e-4]


# --------------------------------------------------------------------------------------------------
# The learning rate


def rates(stages=({},), min_lr=0.015, **options):
    """The learning rate as a function of the samples."""
    planned = plan(stages, **options)
    return lambda samples: learning_rate(planned, samples, min_lr)


@settings(max_examples=60)
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
    warmup, tiny = int(share * total), 1e-12 * lr
    rate = rates(lr=lr, min_lr=floor, steps=steps, batch_size=size, warmup=warmup)
    assert rate(total) == pytest.approx(lr * floor, rel=1e-12, abs=tiny)
    assert rate(total + 12345) == pytest.approx(lr * floor, rel=1e-12, abs=tiny)
    if warmup:
        half = -(-warmup // 2)
        assert rate(warmup) == pytest.approx(lr, rel=1e-12)
        assert rate(1) == pytest.approx(lr / warmup, rel=1e-12)
        assert rate(half) == pytest.approx(lr * half / warmup, rel=1e-12)
    if (total - warmup) % 2 == 0:
        middle = rate((total + warmup) // 2)
        assert middle == pytest.approx(lr * (1 + floor) / 2, rel=1e-12)
    found = [rate(n) for n in range(size, total + 1, size)]
    assert all(0 <= r <= lr + tiny for r in found)
    top = warmup // size  # the first `top` steps end within the warm-up
    assert all(a <= b + tiny for a, b in itertools.pairwise(found[:top]))
    assert all(a >= b - tiny for a, b in itertools.pairwise(found[top:]))


@given(
    steps=st.integers(1, 200),
    size=st.integers(1, 32),
    factor=st.integers(2, 8),
    warmup=st.integers(0, 500),
)
def test_learning_rate_counts_samples(steps, size, factor, warmup):
    """A batch `factor` times smaller with as many times the steps has the same learning rate at the
    same samples."""
    large = rates(steps=steps, batch_size=size * factor, warmup=warmup)
    small = rates(steps=steps * factor, batch_size=size, warmup=warmup)
    assert all(large(n) == small(n) for n in range(size, steps * size * factor + 1, size))


def two_stages(start: int, **more) -> list[dict]:
    """A model half as large grows to a whole one."""
    return [{"config": {"n_layers": 3}}, {"config": {"n_layers": 6}, "start": start, **more}]


@given(start=st.integers(1, 9), warmup=st.integers(0, 12), size=st.integers(1, 4))
def test_a_stage_leaves_the_cosine_alone(start, warmup, size):
    """After a stage's own warm-up from zero, the learning rate is what it would be without
    stages."""
    options = {"steps": 12, "batch_size": size, "warmup": 2}
    plain, staged = rates(**options), rates(two_stages(start * size, warmup=warmup), **options)
    for n in range(1, 12 * size + 1):
        warm = min(1, (n - start * size) / warmup) if n > start * size and warmup else 1
        assert staged(n) == pytest.approx(plain(n) * warm, rel=1e-12)


@given(start=st.integers(200, 900), own=st.floats(2e-5, 3e-3))
def test_a_stage_with_its_own_learning_rate(start, own):
    """A stage's own learning rate is met exactly at its start. A lower one than before is on the
    way of the cosine, which falls all the time and never jumps; one as high or higher sets it back,
    up from where the cosine was. Either way the run ends at the floor, min_lr of the highest. Steps
    of one sample: 1% is more than the cosine moves in one of 1000."""
    rate = rates(two_stages(start, lr=own), steps=1000, batch_size=1, warmup=100)
    assert rate(start + 1) == pytest.approx(own, rel=0.02)
    assert rate(1000) == pytest.approx(0.015 * max(own, 1e-3), rel=1e-9)
    found = [rate(n) for n in range(100, 1001)]
    falls = [a >= b * (1 - 1e-12) for a, b in itertools.pairwise(found)]
    if own < 1e-3:
        assert all(falls) and rate(start) == pytest.approx(own, rel=1e-9)
    else:
        assert falls.count(False) <= 1 and rate(start) <= rate(start + 1) * (1 + 1e-9)


def test_the_papers_learning_rates():
    """The paper's three stages meet Table 1: 4e-4 after the first warm-up, 3.4e-4 and 2e-4 where
    the next two begin, and 6e-6 with the last sample."""
    stages = plan(PAPER_STAGES, steps=None)
    points = (4_608_000, stages[1].start, stages[2].start, stages[2].end)
    rate = [learning_rate(stages, n, 0.015) for n in points]
    assert rate == pytest.approx([4e-4, 3.4e-4, 2e-4, 6e-6], rel=1e-9)


# --------------------------------------------------------------------------------------------------
# FLOPs and the cost plan


def test_flops_of_training_add_up_over_the_stages():
    """At each sample the FLOPs grow by three forward passes over a row of the stage's model."""
    planned = plan(two_stages(8), steps=5, batch_size=3, seen=100)
    small, large = (3 * forward_flops(stage.config, 256) * 256 for stage in planned)
    assert planned[0].end == 109
    assert training_flops(planned, 100) == 0 and training_flops(planned, 109) == 9 * small
    assert training_flops(planned, 112) - training_flops(planned, 108) == small + 3 * large
    assert training_flops(planned, 10**6) == 9 * small + 6 * large


@given(schedules(), st.data())
def test_progress_in_flops(drawn, data):
    """FLOPs done over a run: nothing at its start, all at its end and after it, never fewer with
    more samples; within a stage linear in them, so that a run without growth has the share of its
    samples."""
    stages, steps, batch_size = drawn
    try:
        planned = plan(stages, steps=steps, batch_size=batch_size)
    except ValueError:
        return
    start, end = planned[0].start, planned[-1].end
    total = flop_progress(planned, end)[1]
    assert flop_progress(planned, start) == (0, total)
    assert flop_progress(planned, end + 10) == (total, total) and total > 0
    a, b = sorted(data.draw(st.integers(start, end)) for _ in range(2))
    assert flop_progress(planned, a)[0] <= flop_progress(planned, b)[0] <= total
    for stage in planned:
        (first, _), (last, _) = (flop_progress(planned, n) for n in (stage.start, stage.end))
        inside = data.draw(st.integers(stage.start, stage.end))
        share = Fraction(inside - stage.start, stage.end - stage.start)
        assert flop_progress(planned, inside)[0] == first + share * (last - first)


def test_our_recipes_are_derived_as_they_say():
    """Of presets whose training no paper prints: 20 tokens for each parameter, a warm-up of the
    paper's share of its first stage, its learning rate. The paper's own have the paper's numbers:
    16B warms up for 9.4 billion tokens, and nothing smaller does."""
    paper = RECIPES["flm-16b"]
    assert paper["warmup"] == 4_608_000
    share = paper["warmup"] / (paper["steps"] * paper["batch_size"])
    for name in ("flm-1b", "flm-proxy", "tele-flm-proxy"):
        config, recipe = preset(name), RECIPES[name]
        samples = recipe["steps"] * recipe["batch_size"]
        tokens = samples * config.max_seq_len
        assert tokens / count_parameters(config) == pytest.approx(20, rel=0.01)
        assert recipe["warmup"] / samples == pytest.approx(share, rel=0.01)
        assert recipe["warmup"] * config.max_seq_len < 1e9
        assert recipe["warmup"] % recipe["batch_size"] == 0
    assert RECIPES["flm-1b"]["lr"] == RECIPES["flm-proxy"]["lr"] == paper["lr"]
    assert 1e9 < count_parameters(preset("flm-1b")) < 1.1e9


def test_the_demo_recipe_is_the_papers_in_miniature():
    """Three stages that grow, copied layers on top, a ramp and a new warm-up after each growth; the
    whole is in shares, so that a longer run grows later."""
    for samples in (1000, 9600):
        stages = in_samples(DEMO_STAGES, samples)
        assert [stage.get("start", 0) / samples for stage in stages] == [0, 0.55, 0.78]
        assert read_stages(stages, DEMO)[-1].config == DEMO
