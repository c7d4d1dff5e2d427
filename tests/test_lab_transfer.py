"""Tests of lab/transfer.py, the sweep and the prediction; exercises 3 and 4 of tutorial 4. That the
fit finds a law, and is least squares, are checks of the course (tests/test_course_ours.py)."""

import argparse
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, error, run_command
from hypothesis import given
from hypothesis import strategies as st
from small_runs import WORDS, train_here, write_corpus

import train
from flm import FLM, FLMConfig, loss_sum, preset
from lab import runs, transfer
from lab.transfer import (
    Law,
    at_first_seed,
    best_values,
    bootstrap,
    collect,
    find_runs,
    fit_law,
    holds,
    interval_of_one_run,
    landscape,
    predict,
    read_points,
    worse_with_width,
)
from muP import at_widths, init_weights, param_groups, text_batch

POINTS = ROOT / "tutorials/measurements/muscaling-points.json"


# ----------------------------------------------------------------------------------------------
# The law


@pytest.mark.quick
def test_the_published_points():
    """muScaling's own points give the published law (our reading of the released script: a 2.469,
    b -0.423, c 2.923), and the three widest, held out, are predicted within 0.0095 nats."""
    points = read_points(POINTS)
    result = predict(points, 3, {})
    assert result["a"] == pytest.approx(2.469, abs=1e-3)
    assert result["b"] == pytest.approx(-0.423, abs=5e-4)
    assert result["c"] == pytest.approx(2.923, abs=1e-3)
    assert [p["width"] for p in result["predicted"]] == [1024, 2048, 3072]
    assert all(abs(p["error"]) <= 0.0095 for p in result["predicted"])
    assert worse_with_width({w: p["losses"][0] for w, p in points.items()}) == []


@pytest.mark.quick
@pytest.mark.parametrize(
    "N, loss, words",
    [
        ([1, 2, 3], [3, 2.5, 2.2], "3 different model sizes, 3 unknowns"),
        ([1, 2, 2, 2], [3, 2.5, 2.5, 2.5], "2 different model sizes"),
        ([1, 2, 4, 8], [2, 2.5, 2.8, 2.9], "a is negative"),  # rises
        ([1, 2, 4, 8], [3, 2.9, 2.7, 2.3], "Tried: b from -4.0 to -0.02"),  # falls ever faster
        ([1, 2, 4, 8], [3, 3, 3, 3], "no law"),
        ([1, 2, 4, 8], [3, 2.5, math.nan, 2], "must be finite"),
        ([0, 2, 4, 8], [3, 2.5, 2.2, 2], "sizes above 0"),
    ],
)
def test_no_law_no_number(N, loss, words):
    """Too few sizes, or losses that follow no falling law: an error that says what was tried, and
    no fit."""
    assert words in error(fit_law, N, loss)


@pytest.mark.quick
def test_the_interval_is_that_of_the_seeds():
    """Where the seeds differ by a shift alone, the fit's a and b cannot move, so a resampled
    prediction is the law plus the mean of the drawn shifts. Of 27 equally likely draws of 3 seeds
    the lowest is three times the lowest seed, with probability 1/27 > 2.5%: the interval runs from
    the lowest shift to the highest."""
    N, shifts = np.array([1, 2, 4, 8, 16.0]), [-0.02, 0.01, 0.03]
    losses = (2 * N**-0.5 + 1)[:, None] + np.array(shifts)
    ((low, high),), failed = bootstrap(N, losses, [64.0])
    assert (low, high) == pytest.approx((2 / 8 + 1 - 0.02, 2 / 8 + 1 + 0.03), abs=1e-6)
    assert failed == 0


@pytest.mark.quick
def test_draws_without_a_law_are_counted():
    """One seed falls with the size and the other rises as much: their mean is constant. So of the
    four equally likely draws of two seeds, only that of the falling seed twice has a law."""
    N = np.array([1, 2, 4, 8.0])
    falls = 2 * N**-0.5 + 1
    intervals, failed = bootstrap(N, np.stack([falls, 4 - falls], 1), [16.0])
    assert intervals == [pytest.approx([1.5, 1.5])]
    assert failed == pytest.approx(750, abs=60)  # four standard deviations
    assert bootstrap(N, (4 - falls)[:, None], [16.0]) == ([], 1000)


@pytest.mark.quick
@given(st.floats(-0.5, -0.25), st.floats(0.05, 1), st.floats(0.5, 3))
def test_a_known_range_of_b(b, a, c):
    """An exact law within the range is found; one that rises is flat, at the mean."""
    N = np.array([0.03, 0.07, 0.12, 0.25])
    law = fit_law(N, a * N**b + c, (-0.5, -0.25))
    assert law(0.43) == pytest.approx(a * 0.43**b + c, abs=1e-6)
    flat = fit_law(N, c - a * N**b, (-0.5, -0.25))
    assert flat.a == 0 and flat.c == pytest.approx((c - a * N**b).mean())


@pytest.mark.quick
@pytest.mark.parametrize("shared, own", [(0.014, 0.008), (0.0, 0.012)], ids=["paired", "alone"])
def test_the_interval_of_one_run_holds(shared, own):
    """Where law and luck are known, about 95% of the intervals hold one run more, of the first
    seed: whether most luck is shared by the sizes or none. Of 200 trials a fair 95% gives 190, with
    a standard deviation of 3; the bootstrap may lose as much again. Shared luck costs no width."""
    N, b_range, inside, widths = np.array([0.03, 0.07, 0.12, 0.25]), (-0.5, -0.25), 0, []
    rng = np.random.default_rng(0)
    for _ in range(200):
        order = shared * rng.normal(size=3)
        losses = (0.1 * N**-0.35 + 1.8)[:, None] + order + own * rng.normal(size=(4, 3))
        low, high = interval_of_one_run(N, losses, 0.43, b_range)
        came = 0.1 * 0.43**-0.35 + 1.8 + order[0] + own * rng.normal()
        inside += low <= came <= high
        same = interval_of_one_run(N, losses - order + order[0], 0.43, b_range)
        widths.append((high - low) / (same[1] - same[0]))
    assert 178 <= inside <= 199
    assert np.median(widths) == pytest.approx(1, abs=0.02)


@pytest.mark.quick
def test_losses_at_the_first_seed():
    """Losses that are a sum of size and seed become equal in each size: to that of the first
    seed."""
    sizes, seeds = np.array([3.0, 2.0, 1.5]), np.array([0.2, -0.1])
    found = at_first_seed(sizes[:, None] + seeds)
    assert found == pytest.approx((sizes + 0.2)[:, None].repeat(2, axis=1))


@pytest.mark.quick
def test_no_luck_no_width():
    """Seeds that agree leave the law's own value."""
    N = np.array([0.03, 0.07, 0.12, 0.25])
    losses = (0.1 * N**-0.35 + 1.8)[:, None].repeat(2, axis=1)
    ends = interval_of_one_run(N, losses, 0.43, (-0.5, -0.25))
    assert ends == pytest.approx([0.1 * 0.43**-0.35 + 1.8] * 2, abs=1e-5)


# ----------------------------------------------------------------------------------------------
# Wider is never worse


@pytest.mark.quick
@given(st.lists(st.floats(0.5, 5), min_size=2, max_size=6), st.floats(0.001, 0.1))
def test_worse_with_width(losses, tolerance):
    """By the definition: a width is named where some narrower one was better by more than the
    tolerance."""
    by_width = {16 * (i + 1): loss for i, loss in enumerate(losses)}
    named = [line.split()[1] for line in worse_with_width(by_width, tolerance)]

    def is_worse(width):
        narrower = [loss for w, loss in by_width.items() if w < width]
        return any(loss + tolerance < by_width[width] for loss in narrower)

    assert named == [str(width) for width in by_width if is_worse(width)]


@pytest.mark.quick
def test_a_diverged_width_is_no_better():
    """A width that diverged is named, and the wider ones are not measured against it."""
    assert worse_with_width({16: 2.0, 32: None, 64: 1.9}) == ["width 32 diverged"]


def test_wider_is_never_worse_in_training():
    """TP-V, microsoft/mup's second test: at equal steps and data a wider muP model's loss is not
    above a narrower one's. Learned from the same 8 rows for 30 steps, three seeds; the tolerance
    of 0.05 nats is a few times the seeds' spread."""
    config = FLMConfig(
        n_layers=2, d_model=16, n_heads=2, head_dim=8, d_ff=64, vocab_size=256, max_seq_len=32,
        mup_base_width=16,
    )  # fmt: skip
    tokens, targets = text_batch(8, 32, 256)
    for step in (15, 30):
        losses = {}
        for width, wide in at_widths(config, (16, 32, 64)).items():
            losses[width] = np.mean([loss_after(step, wide, s, tokens, targets) for s in range(3)])
        assert worse_with_width(losses, tolerance=0.05) == [], losses
        assert losses[64] < losses[16]


def loss_after(steps: int, config: FLMConfig, seed: int, tokens, targets) -> float:
    """The loss in the last of so many steps of AdamW on one batch."""
    model = init_weights(FLM(config), seed)
    optimizer = torch.optim.AdamW(param_groups(model, 0.01, 0.1), betas=(0.9, 0.95))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_sum(model(tokens), targets) / targets.numel()
        loss.backward()
        optimizer.step()
    return loss.item()


# ----------------------------------------------------------------------------------------------
# Predictions from runs


def fake_run(
    folder: Path, width: int, seed: int, loss: float | None, text: str = "a", **changes
) -> Path:
    """A folder as train.py leaves it: config.json of its own making, and a log of 100 steps with
    this held-out loss at the end."""
    sizes = {"d_model": width, "d_ff": 4 * width, "head_dim": 16, "n_heads": width // 16}
    model = tuple(f"{k}={v}" for k, v in {**sizes, "mup_base_width": 32}.items())
    fixed = {"seed": seed, "steps": 100, "lr": 0.01, "model": model, "stages": "none"}
    s, stages = train.resolve(train.Settings(**fixed | changes))
    folder.mkdir(parents=True)
    nothing = argparse.Namespace(why="none", path="none", digest=text)
    train.write_run(folder, s, stages, nothing, nothing)
    lines = [{"step": n + 1, "loss": 5.0 - n / s.steps} for n in range(s.steps)]
    lines += [{"step": s.steps, "val_loss": loss}] * (loss is not None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def law_runs(folder: Path, widths: tuple[int, ...], seeds=(0, 1, 2)):
    """Runs whose losses are 1.5 N^-0.4 + 1 and a little for the seed, N counted by hand: 6 layers
    of 12 C^2 + 13 C, the embedding 288 C, the last LayerNorm 2 C."""
    for width, seed in itertools.product(widths, seeds):
        N = (6 * (12 * width**2 + 13 * width) + 288 * width + 2 * width) / 1e6
        fake_run(folder / f"w{width}-{seed}", width, seed, 1.5 * N**-0.4 + 1 + 0.01 * (seed - 1))


def test_a_prediction_before_and_after_the_run(tmp_path, capsys):
    """From folders on disk to numbers: the law of synthetic runs is found; what is predicted for a
    width that has not been run (--at) is exactly what is predicted once it has, and held out; the
    JSON says what the table says."""
    narrow, wide = tmp_path / "narrow", tmp_path / "wide"

    def report(name, *words):
        transfer.main(["predict", *map(str, words), "--json", str(tmp_path / name)])
        return json.loads((tmp_path / name).read_text())

    law_runs(narrow, (32, 48, 64, 96))
    before = report("before.json", narrow, "--hold-out", 0, "--at", 384)
    law_runs(wide, (384,))
    after = report("after.json", narrow, wide)
    (early,), (late,) = before["predicted"], after["predicted"]
    assert early == {k: late[k] for k in ("width", "N", "predicted", "interval")}
    assert (after["a"], after["b"], after["c"]) == pytest.approx((1.5, -0.4, 1.0), abs=1e-4)
    assert late["predicted"] == pytest.approx(late["loss"], abs=1e-6)
    assert late["interval"][0] < late["loss"] < late["interval"][1]
    assert after["worse_with_width"] == [] and after["losses"]["384"].keys() == {"0", "1", "2"}
    out = capsys.readouterr().out
    assert "\n15 runs, held-out loss after 100 steps, 4 widths fitted, mean of 3 seed(s):\n" in out
    assert f"{late['predicted']:.4f}" in out


def test_what_a_finished_run_says(tmp_path):
    """Its loss is the held-out loss of the last step. N is the number of numbers that the optimizer
    moves, a tied head once. Seconds are the sums of the log's."""
    for tie in (True, False):
        folder = fake_run(tmp_path / str(tie), 32, 0, 2.0)
        config = json.loads((folder / "config.json").read_text())
        config["stages"][-1]["config"]["tie_embeddings"] = tie
        (folder / "config.json").write_text(json.dumps(config))
        with open(folder / "metrics.jsonl", "a") as log:
            log.write('{"step": 100, "cpu_seconds": 1.5, "wall_seconds": 2}\n' * 2)
        run = runs.read_finished(folder)
        assert run.loss == 2.0
        assert run.N == sum(p.numel() for p in FLM(run.config).parameters())
        assert (run.cpu_seconds, run.wall_seconds) == (3.0, 4.0)


def test_runs_that_do_not_belong_together(tmp_path):
    """Every reason at once: steps, learning rate and text differ, seeds differ, one is there twice.
    Before that, runs that have not finished or have diverged; a log that a killed run cut is not
    an error by itself."""
    law_runs(tmp_path, (32, 48))
    fake_run(tmp_path / "steps", 64, 0, 2.0, steps=50)
    fake_run(tmp_path / "lr", 64, 1, 2.0, lr=0.02)
    fake_run(tmp_path / "text", 64, 7, 2.0, text="b")
    fake_run(tmp_path / "again", 32, 0, 2.0)
    message = error(lambda: collect(find_runs([str(tmp_path)])))
    for words in (
        "differ in steps: 100 (",
        "differ in lr: 0.01 (",
        'differ in text: "a" (',
        "different seeds: 32 has [0, 1, 2]; 48 has [0, 1, 2]; 64 has [0, 1, 7]",
        "second run of width 32 and seed 0",
    ):
        assert words in message

    cut = fake_run(tmp_path / "unfinished", 80, 0, None)
    with open(cut / "metrics.jsonl", "a") as log:
        log.write('{"step": 1')
    (fake_run(tmp_path / "nan", 80, 1, None) / runs.DIVERGED).touch()
    message = error(find_runs, [str(tmp_path)])
    assert "unfinished: no finished run" in message and "nan: no finished" in message
    (tmp_path / "steps/config.json").write_text("{}")
    assert "is not" in error(find_runs, [str(tmp_path / "steps")])


# ----------------------------------------------------------------------------------------------
# The sweep


@pytest.mark.quick
def test_best_values_and_whether_they_hold():
    """Best is the lowest finite loss; it holds where the extremes are within a factor of 2; a
    width without any has no best."""
    narrow, wide = {0.01: 2.0, 0.02: 1.9, 0.04: None}, {0.01: 1.8, 0.02: 1.9, 0.04: None}
    best = best_values({16: narrow, 32: wide})
    assert best == {16: 0.02, 32: 0.01} and holds(best)
    assert not holds({16: 0.04, 32: 0.01}) and not holds({16: 0.04, 32: None})
    assert best_values({16: {0.01: None}}) == {16: None}


@pytest.mark.quick
def test_a_seed_that_diverged_is_a_setting_that_diverged():
    """The landscape has the mean over the seeds, none where one seed diverged, and its rows and
    columns in rising order."""
    losses = iter((1.0, 3.0, 5.0, 5.0, 2.0, None, 7.0, 8.0))
    finished = []
    for mup, width, seed in itertools.product((False, True), (32, 16), (0, 1)):
        config = preset("demo").replace(mup=mup, d_model=width)
        asked = {"lr": 0.1, "seed": seed}
        finished.append(argparse.Namespace(config=config, asked=asked, loss=next(losses)))
    table = landscape(finished, "lr")
    expected = {
        "muP": {16: {0.1: 7.5}, 32: {0.1: None}},
        "standard": {16: {0.1: 5.0}, 32: {0.1: 2.0}},
    }
    assert table == expected
    assert list(table) == ["muP", "standard"] and list(table["muP"]) == [16, 32]


@pytest.fixture
def planned(monkeypatch) -> Callable[[str], list[train.Settings]]:
    """The settings of the runs that a command line asks for; nothing runs."""

    def plan(words):
        asked = []
        monkeypatch.setattr(
            runs, "run_all", lambda settings, *options: asked.extend(settings) or []
        )
        with pytest.raises(ValueError):  # no run, no table
            transfer.main(words.split())
        return [train.resolve(settings) for settings in asked]

    return plan


def test_every_cell_of_the_grid(planned):
    """Each run has its cell's parametrization, width, value and seed, and shares all the rest: the
    demo model's fields but those that --model changes, one thread, float32, no growth."""
    cells = planned(
        "sweep --axis init_std --values 0.1 0.2 --widths 16 48 --seeds 3 4 --steps 7 "
        "--model n_layers=1 head_dim=8 -- --lr 0.5 --eval-rows 9"
    )
    seen = set()
    for settings, (stage,) in cells:
        config = stage.config
        seen.add((settings.mup, config.d_model, config.init_std, settings.seed, settings.out))
        assert (config.mup, config.mup_base_width) == (settings.mup == "on", 16)
        assert (config.n_heads, config.d_ff) == (config.d_model // 8, 4 * config.d_model)
        assert (config.n_layers, config.head_dim, config.output_mult) == (1, 8, 2.0)
        assert (settings.lr, settings.eval_rows, settings.steps, settings.threads) == (0.5, 9, 7, 1)
        assert (settings.dtype, settings.stages) == ("float32", "none")
    grid = set(itertools.product(("on", "off"), (16, 48), (0.1, 0.2), (3, 4)))
    assert len(cells) == len(seen) == 16 and {cell[:4] for cell in seen} == grid
    assert len({cell[4] for cell in seen}) == 16


def test_a_sweep(tmp_path, capsys, monkeypatch):
    """Real runs of train.py: the table and sweep.json say what the runs say. A cell whose numbers
    overflow is shown as diverged. The same command again runs nothing; other settings in the same
    folder are refused with both values."""
    corpus = write_corpus(tmp_path)
    monkeypatch.setattr(runs, "train_jobs", train_here)
    monkeypatch.setattr("machine.matmul_rate", lambda *args: 1e12)  # takes longer than these runs
    words = "sweep --mup on --widths 16 --values 1e30 0.01 --steps 4 --model n_layers=1 head_dim=8"
    command = [*words.split(), "max_seq_len=16", "--out", str(tmp_path / "sweep")]
    rest = ["--", "--data", str(corpus), "--batch-size", "2", "--warmup", "2", *WORDS]
    transfer.main([*command, *rest])
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "sweep/sweep.json").read_text())
    run = runs.read_finished(tmp_path / "sweep/mup-w0016-lr0.01-seed0")
    assert report["landscape"] == {"muP": {"16": {"0.01": run.loss, "1e+30": None}}}
    assert "diverged" in out and "best lr by width: 16: 0.01" in out and f"{run.loss:.4f}*" in out
    assert report["muP"]["best"] == {"16": 0.01} and report["same_in_all"]["n_layers"] == 1
    assert report["losses"] == {run.folder.name: run.loss, "mup-w0016-lr1e+30-seed0": None}

    monkeypatch.setattr(runs, "train_jobs", None)
    transfer.main([*command, *rest])
    assert json.loads((tmp_path / "sweep/sweep.json").read_text()) == report
    command[command.index("4")] = "6"
    assert "steps = 4, this study 6" in error(transfer.main, [*command, *rest])


# ----------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    "command, words",
    [
        (
            "sweep --widths 40 33 --model head_dim=16",
            ["width 40 does not fit heads of 16", "width 33"],
        ),
        ("sweep --model n_layer=3", ["n_layer=3", "n_layers"]),
        ("sweep --model d_model=64", ["--model d_model", "leave it out"]),
        ("sweep --axis output_mult --model output_mult=3", ["--model output_mult", "leave it out"]),
        ("sweep --widths 32 --seeds 1 1", ["sweep/mup-w0032-lr0.002-seed1 is asked for twice"]),
        ("sweep --values -1", ["--lr -1.0: must be"]),
        ("sweep --axis init_std --values 0", ["init_std = 0.0"]),
        ("sweep -- --resume runs/x", ["--resume: the study decides it"]),
        ("sweep -- --lr 0.1", ["--lr: the study decides it"]),
        ("predict -- --lr", ["--lr: no finished run"]),
        ("predict", ["give either folders of runs"]),
        ("predict nowhere --points x.json", ["give either"]),
        ("predict nowhere", ["nowhere: no finished run"]),
        ("predict --points nowhere.json", ["nowhere.json cannot be read"]),
        (f"predict --points {POINTS} --hold-out 10", ["--hold-out 10: there are 10 widths"]),
        (f"predict --points {POINTS} --hold-out 7", ["3 different model sizes"]),
    ],
)
def test_bad_input(command, words, tmp_path, monkeypatch):
    """A ValueError that names the value and what to do, before anything is run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "train_jobs", None)
    message = error(transfer.main, command.split())
    for word in words:
        assert word in message


def test_an_error_is_one_screen():
    """One line on stderr and exit code 2; nothing else."""
    words = "give either folders of runs (and --at WIDTH for widths without one) or --points FILE"
    assert run_command("lab.transfer", "predict") == (2, "", f"lab.transfer: {words}\n")


@pytest.mark.quick
@pytest.mark.parametrize(
    "command, words",
    [("sweep", "does not run finished cells again"), ("predict", "hold the widest out")],
)
def test_the_help_tells_what_a_command_does(command, words, capsys):
    """--help tells a learner what each command asks. Its examples are accepted by the parser."""
    with pytest.raises(SystemExit) as stop:
        transfer.main([command, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and words in " ".join(out.split())
    examples = re.findall(r"python -m lab\.transfer (\S.*?)(?:   .*)?$", out, re.M)
    assert examples
    for example in examples:
        args = transfer.make_parser().parse_args(example.split())
        train.make_parser().parse_args(getattr(args, "train", []))


# ----------------------------------------------------------------------------------------------
# Exercises of tutorials/04-mup.md


def test_04_exercise_3_how_large_for_three_nats():
    """The published law solved for N: ((3 - c) / a)^(1/b), about 3.6 billion parameters; the limit
    of infinite width is c."""
    law = predict(read_points(POINTS), 3, {})
    N = ((3.0 - law["c"]) / law["a"]) ** (1 / law["b"])
    assert 3000 < N < 4500
    assert Law(law["a"], law["b"], law["c"])(N) == pytest.approx(3.0)


def exact_law(N: tuple[float, ...], loss: tuple[float, ...]) -> Law:
    """The law through three points."""

    def distance(b):  # of the ratio of the two differences from that of the points
        ratio = (N[0] ** b - N[1] ** b) / (N[1] ** b - N[2] ** b)
        return abs((loss[0] - loss[1]) / (loss[1] - loss[2]) - ratio)

    b = min(np.linspace(-3, -0.03, 20000), key=distance)
    a = (loss[0] - loss[2]) / (N[0] ** b - N[2] ** b)
    return Law(a, b, loss[0] - a * N[0] ** b)


def test_04_exercise_4_why_four_points():
    """Three points can be met exactly by a law, whatever noise they carry: a prediction without
    any check. Moving one of three published losses by 0.01 nats moves the prediction for the
    widest model several times as far."""
    points = read_points(POINTS)
    N, loss = zip(*[(points[w]["N"], points[w]["losses"][0]) for w in (256, 512, 896)])
    moved = (loss[0], loss[1] - 0.01, loss[2])
    residuals = exact_law(N, moved)(np.array(N)) - moved
    assert max(abs(residuals)) < 1e-3  # no residual tells of the error
    assert abs(exact_law(N, moved)(1446.72) - exact_law(N, loss)(1446.72)) > 0.03
