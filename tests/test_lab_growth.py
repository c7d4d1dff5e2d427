"""Tests of lab/growth.py: growth against training from scratch."""

import json
import math
import re
from pathlib import Path

import pytest
from helpers import error
from hypothesis import given
from hypothesis import strategies as st
from small_runs import train_here, trained, write_corpus

import train
from flm import forward_flops, preset
from lab import growth, runs
from lab.growth import SCHEDULES, describe, speed_up
from schedule import in_samples

TINY = "--model n_layers=2 d_model=16 n_heads=1 head_dim=16 d_ff=32 max_seq_len=16 --batch-size 4 "
TINY += "--warmup 4 --eval-rows 4 --device cpu"
FINAL = preset("demo").replace(
    n_layers=2, d_model=16, n_heads=1, head_dim=16, d_ff=32, max_seq_len=16
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


def bench(place: Path, *words, out: str = "runs") -> dict:
    """bench.json of the command with these words."""
    rest = ["--", *TINY.split(), "--data", str(place / "prepared")]
    growth.main(["--out", str(place / out), *words, *rest])
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
            folder = place / "runs" / f"{name}-{budget}-seed{seed}"
            log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            ends = [line["val_loss"] for line in log if "val_loss" in line]
            assert [row["loss"][str(seed)]] == ends and log[-1]["step"] == row["steps"]
            assert row["cpu_seconds"][str(seed)] == sum(line["cpu_seconds"] for line in log)
            assert sum("grown" in line for line in log) == (name == "double")
            assert train.read_run(folder)[0].seed == seed
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
    words = ["--steps", "4", "8", "--stages", str(place / "double.json")]
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
    rest = ["--", *TINY.split(), "--data", str(place / "prepared"), "--lr", "0.1"]
    message = error(growth.main, ["--out", str(place / "half"), *words, *rest])
    assert "scratch-4-seed0 has lr = 0.016, this study 0.1" in message
    assert "choose another --out" in message


def test_a_run_that_diverged_has_no_speed_up(place, capsys):
    """What diverged is a row without a loss; the others are compared without it."""
    words = ["--steps", "4", "8", "--stages", str(place / "double.json"), "--seeds", "0", "1"]
    rest = ["--", *TINY.split(), "--data", str(place / "prepared"), "--lr", "1e30"]
    growth.main(["--out", str(place / "diverged"), *words, *rest])
    rows = json.loads((place / "diverged" / "bench.json").read_text())["rows"]
    assert [row["speed_up"] for row in rows] == [None] * 3
    assert all(row["mean"]["loss"] is None for row in rows)
    assert "      -" in capsys.readouterr().out


def test_the_table_is_sorted(capsys):
    """Runs from scratch first; then the schedules, by budget, those of one budget by their loss."""
    wanted = [("scratch", 8, 9.0), ("scratch", 16, 7.0), ("b", 8, 1.0), ("a", 8, 2.0)]
    wanted += [("c", 8, None), ("a", 16, 0.5)]
    rows = [
        {"name": name, "budget": budget, "steps": 1, "tflop": 1.0, "stages": "1x16", "growths": {}}
        | {"loss": {0: loss}, "mean": {"loss": loss, "cpu_seconds": 1, "wall_seconds": 1}}
        for name, budget, loss in wanted
    ]
    growth.add_speed_ups(rows)
    growth.print_table(rows[::-1])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line[:9] for line in lines[:6]] == [f"{n} {b}".ljust(9)[:9] for n, b, _ in wanted]


@given(
    st.floats(1, 4),
    st.floats(0.05, 1),
    st.lists(
        st.floats(0.1, 1000), min_size=2, max_size=4, unique_by=lambda f: round(math.log(f), 1)
    ),
    st.floats(0.1, 1000),
    st.floats(0.2, 5),
)
def test_speed_up_reads_a_line_exactly(a, b, budgets, flop, times):
    """Where scratch losses lie on a - b log F, a run with the loss of `times` its FLOPs has a
    speed-up of `times`, wherever the points are; and it is extrapolated exactly where that loss
    lies outside the scratch runs'."""

    def loss(f):
        return a - b * math.log(f)

    needed, low, high = times * flop, min(budgets), max(budgets)
    found, extrapolated = speed_up({f: loss(f) for f in budgets}, flop, loss(needed))
    assert found == pytest.approx(times, rel=1e-6)
    if abs(math.log(needed / low)) > 1e-6 and abs(math.log(needed / high)) > 1e-6:
        assert extrapolated == (not low < needed < high)


def test_speed_up_without_a_line():
    """One scratch run that ended, or one whose loss rises with work, gives no number, not a wrong
    one; nor does a run that diverged."""
    for scratch in ({1.0: 2.0}, {1.0: 2.0, 2.0: 2.1}, {1.0: 2.0, 2.0: 2.0}, {1.0: 2.0, 2.0: None}):
        assert speed_up(scratch, 1.0, 2.0) == (None, True)
    assert speed_up({1.0: 2.0, 2.0: 1.0}, 1.0, None) == (None, True)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--stages", "nothere"], "--stages nothere cannot be read: No such file.*one of small, early, once"),
        (["--stages", "SAMPLES"], "SAMPLES:.*start = 400: must be a share of the run, from 0 to 1"),
        (["--stages", "NUMBER"], "NUMBER:.*must be a list of stages, not 3"),
        (["--stages", "NAMED"], "mine:.*must be a list of stages, not \\['small'\\]"),
        (["--stages", "SHRINKS"], "n_layers.*2.*1"),
        (["--stages", "OURS"], "scratch:.*the name of the runs without growth"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--at", "-3"], "--steps -3: must be at least 1"),
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
    ],
)
def test_bad_input(place, words, message):
    """What cannot run is refused before anything runs."""
    schedules = {"SAMPLES": [DOUBLE[0], DOUBLE[1] | {"start": 400}]}
    schedules |= {"NUMBER": 3, "NAMED": {"mine": ["small"]}, "OURS": {"scratch": DOUBLE}}
    schedules["SHRINKS"] = [{}, {"config": {"n_layers": 1}, "start": 0.5}]
    for name, stages in schedules.items():
        (place / f"{name}.json").write_text(json.dumps(stages))
        words = [str(place / f"{name}.json") if word == name else word for word in words]
    assert re.search(f"(?s){message}", error(bench, place, *words, out="bad"))
    assert not list((place / "bad").glob("*seed*")) and trained == []


def test_the_schedules_are_schedules(tmp_path):
    """Every built-in schedule is one that train.py accepts, and all but the one that never grows
    end as the bench's own model. A file may hold several of them."""
    (tmp_path / "all.json").write_text(json.dumps(SCHEDULES))
    assert growth.read_schedules([str(tmp_path / "all.json")]) == SCHEDULES
    for name, stages in SCHEDULES.items():
        (tmp_path / "one.json").write_text(json.dumps(in_samples(stages, 8000)))
        s = train.Settings(model=growth.MODEL, stages=str(tmp_path / "one.json"), steps=1000)
        planned = train.resolve(train.dataclasses.replace(s, **growth.TRAINING))[1]
        assert (planned[-1].config.n_layers == 8) == (name != "small"), name
        assert describe(planned)[:4] == "2x32"
