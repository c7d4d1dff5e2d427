"""Tests of lab/growth.py: growth against training from scratch, each at its best."""

import itertools
import json
import math
import re
from pathlib import Path

import pytest
from helpers import error
from hypothesis import given
from hypothesis import strategies as st
from small_runs import train_here, trained, write_corpus

import run_folder
import train
from flm import forward_flops, preset
from lab import growth, runs
from lab.growth import SCHEDULES, best_cell, compare, describe, gap, speed_up, warnings
from schedule import in_samples

TINY = "--model n_layers=2 d_model=16 n_heads=1 head_dim=16 d_ff=32 max_seq_len=16 "
TINY += "mup_base_width=256 --batch-size 4 --warmup 4 --eval-rows 4 --device cpu"
FINAL = preset("demo").replace(
    n_layers=2, d_model=16, n_heads=1, head_dim=16, d_ff=32, max_seq_len=16, mup_base_width=256
)
DOUBLE = [
    {"config": {"n_layers": 1}},
    {"config": {"n_layers": 2}, "start": 0.5, "ramp": 0.25, "warmup": 0.1},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a small corpus and a schedule."""
    folder = tmp_path_factory.mktemp("bench")
    write_corpus(folder)
    (folder / "double.json").write_text(json.dumps(DOUBLE))
    return folder


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    """The same runs, in this process."""
    trained.clear()
    monkeypatch.setattr(runs, "train_jobs", train_here)
    monkeypatch.setattr("machine.matmul_rate", lambda *args: 1e12)  # takes longer than these runs


ONE_CELL = ["--lrs", "0.016", "--decays", "cosine"]


def bench(place: Path, *words, out: str = "runs", cells=ONE_CELL) -> dict:
    """bench.json of the command with these words, by default without a choice."""
    rest = ["--", *TINY.split(), "--data", str(place / "prepared")]
    growth.main(["--out", str(place / out), *cells, "--seeds", "0", *words, *rest])
    return json.loads((place / out / "bench.json").read_text())


# ----------------------------------------------------------------------------------------------
# The bench


def test_bench(place, capsys):
    """Each row is what its run's own log and configuration say. A schedule's run costs what its
    budget of steps from scratch costs, to half a step. Finished runs are not run again, and one
    that was interrupted goes on. A folder of another bench is refused."""
    words = ["--steps", "8", "16", "--at", "8", "--seeds", "0", "1"]
    words += ["--stages", str(place / "double.json")]
    result = bench(place, *words)
    table = capsys.readouterr().out
    assert len(trained) == 6
    rows = {(row["name"], row["budget"]): row for row in result["rows"]}
    assert list(rows) == [("scratch", 8), ("scratch", 16), ("double", 8)]

    small = FINAL.replace(n_layers=1)
    step = {config: 3 * forward_flops(config, 16) * 16 * 4 / 1e12 for config in (small, FINAL)}
    for (name, budget), row in rows.items():
        assert abs(row["tflop"] - budget * step[FINAL]) <= (
            step[FINAL] if name == "double" else 1e-9
        )
        for seed in (0, 1):
            folder = place / "runs" / f"{name}-{budget}-lr0.016-cosine-seed{seed}"
            log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            ends = [line["val_loss"] for line in log if "val_loss" in line]
            assert [row["loss"][str(seed)]] == ends and log[-1]["step"] == row["steps"]
            assert row["cpu_seconds"][str(seed)] == sum(line["cpu_seconds"] for line in log)
            assert sum("grown" in line for line in log) == (name == "double")
            assert run_folder.read_run(folder)[0].seed == seed
        assert row["mean"]["loss"] == sum(row["loss"].values()) / 2
        assert f"{row['mean']['loss']:.4f}" in table
    grown = rows["double", 8]
    half = round(grown["steps"] * 4 * 0.5)
    first = -(-half // 4)  # whole steps of the first stage
    cost = first * step[small] + (grown["steps"] - first) * step[FINAL]
    assert grown["tflop"] == pytest.approx(cost)
    assert grown["stages"].startswith("1x16 -> 2x16 at ")
    assert all(abs(a - b) < 1e-5 for ((a, b),) in grown["growths"].values())
    line = {row["tflop"]: row["mean"]["loss"] for row in result["rows"] if row["name"] == "scratch"}
    assert grown["speed_up"] == speed_up(line, grown["tflop"], grown["mean"]["loss"])[0]
    assert rows["scratch", 8]["speed_up"] == pytest.approx(1)
    assert result["same_in_all"]["d_model"] == 16 and "seed" not in result["same_in_all"]


def test_bench_goes_on(place):
    """A run that was stopped after its growth goes on, and no other is run again; the result is
    that of a bench without a stop."""
    words = ["--steps", "4", "8", "--at", "4", "--stages", str(place / "double.json")]
    whole = bench(place, *words, out="whole")
    settings = next(s for s in trained if "double" in s.out)
    trained.clear()
    stages = settings.stages.replace("whole", "half")
    half = Path(settings.out.replace("whole", "half"))
    half.parent.mkdir()
    Path(stages).write_text(Path(settings.stages).read_text())
    train.train(train.dataclasses.replace(settings, out=str(half), stages=stages), stop_at=4)
    again = bench(place, *words, out="half")
    assert [row["loss"] for row in again["rows"]] == [row["loss"] for row in whole["rows"]]
    trained.clear()
    bench(place, *words, out="half")
    assert trained == []
    rest = ["--", *TINY.split(), "--data", str(place / "prepared"), "--clip", "0.1"]
    words = ["--out", str(place / "half"), *ONE_CELL, *words, "--seeds", "0", *rest]
    message = error(growth.main, words)
    assert "scratch-4-lr0.016-cosine-seed0 has clip = 1.0, this study 0.1" in message
    assert "choose another --out" in message


def test_a_run_that_diverged_has_no_speed_up(place, capsys):
    """What diverged is a row without a loss; the others are compared without it."""
    words = ["--steps", "4", "8", "--at", "4", "--stages", str(place / "double.json")]
    cells = ["--lrs", "1e30", "--decays", "0.5"]
    rows = bench(place, *words, "--seeds", "0", "1", out="diverged", cells=cells)["rows"]
    assert [row["speed_up"] for row in rows] == [None] * 3
    assert all(row["mean"]["loss"] is None for row in rows)
    assert "      -" in capsys.readouterr().out


def test_the_best_cell_of_each_is_reported(place, capsys):
    """Every schedule and budget chooses its learning rate and decay by one seed alone, and other
    seeds report it. Cells of wsd that share a trunk end as if trained alone. The JSON has every
    cell."""
    words = ["--steps", "4", "6", "8", "--at", "6", "--stages", str(place / "double.json")]
    grid = ["--lrs", "0.004", "0.03", "--decays", "0.5", "cosine"]
    result = bench(place, *words, "--tune", "5", "--seeds", "1", "2", out="grid", cells=grid)
    assert len(result["rows"]) == 4 and result["tune"] == 5
    for row in result["rows"]:
        assert len(row["cells"]) == 4 and row["loss"].keys() == {"1", "2"}
        lowest = min(loss for _, _, loss in row["cells"])
        assert [row["lr"], row["decay"], lowest] in row["cells"]
        name = f"{row['name']}-{row['budget']}-lr{row['lr']:g}-{row['decay']}-seed"
        for seed in (1, 2):
            log = (place / "grid" / f"{name}{seed}" / "metrics.jsonl").read_text().splitlines()
            assert row["loss"][str(seed)] == json.loads(log[-1])["val_loss"]
    trunks = [s for s in trained if "trunk" in s.out]
    assert len([s for s in trunks if s.seed == 5 and s.steps == 8]) == 2  # from scratch, by rate
    assert "an end of the grid" in capsys.readouterr().out
    trained.clear()
    again = bench(place, *words, "--tune", "5", "--seeds", "1", "2", out="grid", cells=grid)
    assert again == result and not trained


def row(name: str, budget: int, loss: float | None, **more) -> dict:
    values = {"name": name, "budget": budget, "steps": budget, "samples": 8 * budget, "lr": 0.01}
    values |= {"tflop": float(budget), "decay": "0.2", "stages": "1x16", "alone": False}
    values |= {"loss": {0: loss}, "mean": {"loss": loss}, "at_the_edge": [], "cells": [0, 0]}
    return values | more


def test_the_table_is_sorted_and_has_no_number_from_beyond_a_line(capsys):
    """Runs from scratch first; then the schedules, by budget, those of one budget by their loss. A
    loss that no run from scratch has gives a bound."""
    wanted = [("scratch", 8, 9.0), ("scratch", 16, 7.0), ("b", 8, 1.0), ("a", 8, 8.0)]
    wanted += [("d", 8, 9.5), ("c", 8, None), ("e", 16, 0.5)]
    rows = [row(*values) for values in wanted]
    compare(rows)
    growth.print_table(rows[::-1], [])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line[:9] for line in lines[:7]] == [f"{n} {b}".ljust(9)[:9] for n, b, _ in wanted]
    assert ">2.00" in lines[2] and "1.41" in lines[3] and "<1.00" in lines[4]
    assert rows[2]["speed_up"] is None and rows[2]["bound"] == [">", 2.0]


def test_what_to_distrust():
    """A small model that is as good, a best value at the end of the grid, too few budgets, no small
    model at all, a single seed, one that chooses and reports, and losses that do not fall are said,
    and nothing else is."""
    seeds = {"loss": {1: 0.0, 2: 0.0}}
    good = [row("scratch", n, 9.0 - n / 8) | seeds for n in (8, 16, 32)]
    good += [row("small", 8, 8.5, alone=True) | seeds]
    assert warnings(good, 0) == []
    found = warnings([*good[:3], row("small", 8, 8.0, alone=True)], 0)
    assert len(found) == 1 and "not worth having" in found[0]
    assert "no small model alone" in warnings(good[:3], 0)[0]
    assert "only 2 budgets" in warnings(good[1:], 0)[0]
    edge = [row("once", n, 5.0, at_the_edge=["decay 0.6"]) for n in (8, 16)]
    assert "once 8 (decay 0.6), once 16 (decay 0.6)" in warnings([*good, *edge], 0)[0]
    (found,) = warnings(good, 2)
    assert found == "seed 2 has chosen, and reports: give --seeds without it"
    (found,) = warnings([one | {"loss": {1: 0.0}} for one in good], 0)
    assert found.startswith("one seed: ")
    rising = row("scratch", 32, 7.5) | seeds
    (found,) = warnings([*good[:2], rising, good[3]], 0)
    assert found.endswith("no speed-up: 8.0000 at 8, 7.0000 at 16, 7.5000 at 32")
    alone = [one | {"cells": [0], "at_the_edge": ["decay 0.6"]} for one in good]
    assert warnings(alone, 1) == [
        "one learning rate and one decay: nothing was chosen (--lrs, --decays)"
    ]


def test_growth_is_compared_with_the_best_size():
    """`any_size` is read from the lowest loss at each budget of all that never grow: here the
    middle size at three budgets, the final one at the last. A schedule that is twice as fast as the
    final size and no better than the middle one has 1."""
    rows = [row("scratch", n, loss) for n, loss in ((8, 9.0), (16, 8.0), (32, 7.0), (64, 5.0))]
    rows += [row("middle", n, loss, alone=True) for n, loss in ((8, 8.0), (16, 7.0), (32, 6.0))]
    rows += [row("grown", 8, 8.0), row("grown", 16, 5.75), row("lost", 8, None)]
    rows += [row("narrow", 8, None, alone=True)]
    compare(rows)
    assert growth.best_sizes(rows) == {8.0: 8.0, 16.0: 7.0, 32.0: 6.0, 64.0: 5.0}
    found = {(r["name"], r["budget"]): r["any_size"] for r in rows}
    assert found["grown", 8] == found["middle", 8] == pytest.approx(1) == found["middle", 16]
    assert rows[7]["speed_up"] == pytest.approx(2) and rows[8]["bound"] is None
    assert found["grown", 16] == pytest.approx(2 * 2**0.25)
    assert found["scratch", 16] == pytest.approx(0.5) and found["lost", 8] is None
    assert rows[0]["any_size_bound"] == ["<", 1.0]


def test_the_best_cell():
    """The lowest loss; what diverged is never the best, unless all did."""
    assert best_cell({(1, 0.2): None, (2, 0.2): 3.0, (2, None): 2.0}) == (2, None)
    assert best_cell({(1, 0.2): None, (2, 0.2): None}) == (1, 0.2)


budgets_of = st.lists(
    st.floats(0.1, 1000), min_size=2, max_size=4, unique_by=lambda f: round(math.log(f), 1)
)


@given(st.floats(1, 4), st.floats(0.05, 1), budgets_of, st.floats(0.1, 1000), st.floats(0.2, 5))
def test_speed_up_reads_a_line_exactly(a, b, budgets, flop, times):
    """Where scratch losses lie on a - b log F, a run with the loss of `times` its FLOPs has a
    speed-up of `times`, wherever the points are. Where that loss lies outside the scratch runs',
    what comes back is a bound, and it holds."""

    def loss(f):
        return a - b * math.log(f)

    needed, low, high = times * flop, min(budgets), max(budgets)
    found, bound = speed_up({f: loss(f) for f in budgets}, flop, loss(needed))
    if low * 1.001 < needed < high / 1.001:
        assert found == pytest.approx(times, rel=1e-6) and bound == ""
    if needed > high * 1.001:
        assert bound == ">" and found == high / flop
    if needed < low / 1.001:
        assert bound == "<" and found == low / flop


@given(
    st.floats(0.5, 2), st.floats(0.1, 0.6), st.floats(1.5, 2.5), st.integers(0, 2), st.floats(0, 1)
)
def test_a_loss_that_flattens_is_read_to_three_percent(b, c, ratio, piece, share):
    """Losses from scratch that fall as 1 + b F^-c, at four budgets: a run with the loss of twice
    its FLOPs has a speed-up of 2, to 3%. A straight line would give more, never less. The gap at
    the same samples is 0, to 3% of the fall between two budgets."""
    scratch = {ratio**n: 1 + b * ratio ** (-c * n) for n in range(4)}
    needed = ratio ** (piece + share)
    loss = 1 + b * needed**-c
    found, bound = speed_up(scratch, needed / 2, loss)
    assert found == pytest.approx(2, rel=0.03) and not bound
    left, right = ratio**piece, ratio ** (piece + 1)
    fall = scratch[left] - scratch[right]
    assert abs(gap(scratch, needed, loss)) <= 0.03 * fall
    straight = ratio ** (piece + (scratch[left] - loss) / fall)
    assert straight >= needed * (1 - 1e-9)


@given(st.permutations([1.0, 2.0, 3.0, 4.5, 9.0]), st.floats(0, 1))
def test_any_falling_losses_are_read_between_their_neighbours(losses, share):
    """However losses fall, flat and steep in turn, a loss between those of two budgets needs FLOPs
    between theirs, and the budgets' own losses need just theirs."""
    points = dict(zip((1.0, 2.0, 4.0, 8.0, 16.0), sorted(losses, reverse=True), strict=True))
    drops = dict(zip(points, itertools.accumulate(losses), strict=True))
    for scratch in (points, {f: 100 - drop for f, drop in drops.items()}):
        for (f, a), (g, b) in itertools.pairwise(scratch.items()):
            found, bound = speed_up(scratch, 1.0, a + (b - a) * share)
            assert f * (1 - 1e-9) <= found <= g * (1 + 1e-9) and not bound
            assert speed_up(scratch, 1.0, b)[0] == pytest.approx(g)


@given(st.floats(1, 4), st.floats(0.05, 1), budgets_of, st.floats(0.1, 1000), st.floats(-1, 1))
def test_the_gap_is_the_distance_from_the_line(a, b, budgets, samples, above):
    """Where scratch losses lie on a - b log samples, a loss that far above the line has that gap;
    outside of the line it has none."""
    line = {n: a - b * math.log(n) for n in budgets}
    found = gap(line, samples, a - b * math.log(samples) + above)
    if min(budgets) <= samples <= max(budgets):
        assert found == pytest.approx(above, abs=1e-9)
    else:
        assert found is None


def test_without_a_line():
    """One scratch run that ended, or one whose loss rises with work, gives no number, not a wrong
    one; nor does a run that diverged."""
    for scratch in ({1.0: 2.0}, {1.0: 2.0, 2.0: 2.1}, {1.0: 2.0, 2.0: 2.0}, {1.0: 2.0, 2.0: None}):
        assert speed_up(scratch, 1.0, 2.0) == (None, "") and gap(scratch, 1.0, 2.0) is None
    assert speed_up({1.0: 2.0, 2.0: 1.0}, 1.0, None) == (None, "")
    assert gap({1.0: 2.0, 2.0: 1.0}, 1.0, None) is None


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--stages", "nothere"],
            "--stages nothere cannot be read: No such.*of small, middle, early, once",
        ),
        (["--stages", "SAMPLES"], "SAMPLES:.*start = 400: must be a share of the run, from 0 to 1"),
        (["--stages", "NUMBER"], "NUMBER:.*must be a list of stages, not 3"),
        (["--stages", "NAMED"], "mine:.*must be a list of stages, not \\['small'\\]"),
        (["--stages", "SHRINKS"], "n_layers.*2.*1"),
        (["--stages", "OURS"], "scratch:.*the name of the runs without growth"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--at", "-3"], "--at -3: must be at least 1"),
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--decays", "0.2", "1.5", "fast"], "--decays 1.5: must be cosine.*--decays fast"),
        (["--lrs", "-1", "nan"], "--lrs -1.0: must be a number above 0.*--lrs nan"),
        (
            ["--steps", "0", "--at", "-1", "--seeds", "-2", "--tune", "-3", "--decays", "x"]
            + ["--stages", "nothere", "nor this", "OURS"],
            "--steps 0.*--at -1.*--seeds -2.*--tune -3.*--decays x.*nothere.*nor this.*scratch:",
        ),
        (["--stages", "OUTSIDE"], "schedule \\.\\./x: its name becomes that of a folder"),
        (["--stages", "DOUBLE", "DOUBLE"], "two schedules have the name 'DOUBLE'"),
        (["--stages", "LARGER"], "LARGER: must end as the model from.*n_layers = 3 in place of 2"),
        (["--stages", "LATE"], "first stage starts at 0.2, .* 0.*stage 3 starts at 0: must be a"),
        (["--steps", "2", "--stages", "DOUBLE"], "DOUBLE: a budget of 2 gives 2 step.s.: take 3"),
    ],
)
def test_bad_input(place, words, message):
    """What cannot run is refused before anything runs."""
    schedules = {"SAMPLES": [DOUBLE[0], DOUBLE[1] | {"start": 400}]}
    schedules |= {"NUMBER": 3, "NAMED": {"mine": ["small"]}, "OURS": {"scratch": DOUBLE}}
    schedules["SHRINKS"] = [{}, {"config": {"n_layers": 1}, "start": 0.5}]
    schedules |= {"OUTSIDE": {"../x": DOUBLE}, "DOUBLE": DOUBLE}
    schedules["LARGER"] = [DOUBLE[0], {"config": {"n_layers": 3}, "start": 0.5}]
    schedules["LATE"] = [DOUBLE[0] | {"start": 0.2}, DOUBLE[1], {"config": {"n_layers": 2}}]
    for name, stages in schedules.items():
        (place / f"{name}.json").write_text(json.dumps(stages))
        words = [str(place / f"{name}.json") if word == name else word for word in words]
    assert re.search(f"(?s){message}", error(bench, place, *words, out="bad"))
    assert not list((place / "bad").glob("*seed*")) and trained == []


def test_the_schedules_are_schedules(tmp_path):
    """Every built-in schedule is one that train.py accepts; all that grow end as the bench's own
    model. A file may hold several of them."""
    (tmp_path / "all.json").write_text(json.dumps(SCHEDULES))
    problems = []
    assert growth.read_schedules([str(tmp_path / "all.json")], problems) == SCHEDULES
    assert not problems
    for name, stages in SCHEDULES.items():
        (tmp_path / "one.json").write_text(json.dumps(in_samples(stages, 8000)))
        s = train.Settings(
            model=growth.MODEL, lr=0.01, stages=str(tmp_path / "one.json"), steps=1000
        )
        planned = train.resolve(train.dataclasses.replace(s, **growth.TRAINING))[1]
        assert (planned[-1].config.n_layers == 8) == (len(stages) > 1), name
        assert describe(planned)[:4] == ("4x32" if name == "middle" else "2x32")
