"""Tests of lab/recipe.py: the whole recipe in one command, stopped anywhere, and its report.

The recipe --quick is run twice: undisturbed, and killed at five places, see recipe_runs.py. What
becomes of runs whose command is killed is in test_lab_runs.py; the command as a user starts it is
one of the commands of chapter 8, which CI runs."""

import dataclasses
import html
import itertools
import json
import statistics
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import processes
import pytest
import recipe_runs
import torch
from helpers import ROOT, error

import iqeval
from flm import count_parameters
from lab import recipe, recipe_page, runs
from lab.recipe import GPU, LAPTOP, QUICK, Recipe, scaled
from run_folder import read_log, read_run
from schedule import learning_rate, training_flops
from settings import resolve

TIMES = {"tokens_per_s", "utilisation", "cpu_seconds", "wall_seconds"}
BEST = {"lr": 0.01, "init_std": 0.05, "output_mult": 2.0}


def report(folder: Path) -> tuple[Path, dict]:
    """What the recipe left in this folder: (its folder, its report)."""
    out = folder / "runs" / "recipe"
    return out, json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Path:
    """The folder of an undisturbed recipe and one that was killed."""
    folder = tmp_path_factory.mktemp("recipe")
    log = folder / "log"
    command = [sys.executable, recipe_runs.__file__, folder]
    assert processes.wait(processes.start(command, log), log) == 0, log.read_text()
    return folder


@pytest.fixture(scope="module")
def quick(both) -> tuple[Path, dict]:
    """The undisturbed recipe: (its folder, its report)."""
    return report(both / "quick")


def logs(out: Path) -> dict[str, list[dict]]:
    """The log of every run, without its times."""
    return {
        str(file.parent.relative_to(out)): [
            {key: value for key, value in line.items() if key not in TIMES}
            for line in read_log(file.parent)
        ]
        for file in sorted(out.glob("*/*/metrics.jsonl"))
    }


def without_times(numbers: dict) -> dict:
    """What of a report does not depend on the clock."""
    kept = {key: numbers[key] for key in ("search", "growths", "control", "texts")}
    prediction = {k: v for k, v in numbers["prediction"].items() if k != "written"}
    left_out = {"seconds": None, "held_out": None}  # see held_out
    scores = {k: v | left_out for k, v in numbers["evaluation"].items()}
    return kept | {"prediction": prediction, "evaluation": scores}


def held_out(numbers: dict):
    """The held-out numbers of all checkpoints. They are computed on two threads, and may
    differ in their last digits."""
    found = {}
    for name, scores in numbers["evaluation"].items():
        values = scores["held_out"].items()
        found |= {f"{name} {key}": v for key, v in values if isinstance(v, (int, float))}
    return pytest.approx(found, rel=1e-5)


# ----------------------------------------------------------------------------------------------
# The whole recipe


def test_the_report_has_the_numbers_of_the_runs(quick):
    """Every number that a reader compares is one that a run logged: the grid, the narrow losses,
    both sides of each growth, the ends."""
    out, numbers = quick
    for row in numbers["search"]["finalists"]:
        name = "-".join(f"{key}{value:g}" for key, value in row["values"].items())
        for seed, loss in row["losses"].items():
            assert loss == runs.read_finished(out / "search" / f"{name}-seed{seed}").loss
    for width, losses in numbers["prediction"]["losses"].items():
        for seed, loss in losses.items():
            log = read_log(out / "narrow" / f"w{int(width):04}-seed{seed}")
            assert loss == next(line["loss_before"] for line in log if "grown" in line)
    log = read_log(out / "train" / "grown")
    growths = [(line["loss_before"], line["loss_after"]) for line in log if "grown" in line]
    assert [(g["before"], g["after"]) for g in numbers["growths"]] == growths
    assert numbers["prediction"]["predicted"][0]["loss"] == growths[0][0]
    for name in ("grown", "scratch"):
        ends = [line for line in read_log(out / "train" / name) if "val_loss" in line]
        assert numbers["control"][name] == ends[-1]["val_loss"]
        final = "stage-3" if name == "grown" else name
        found = numbers["evaluation"][final]["held_out"]
        assert found["val_loss"] == pytest.approx(ends[-1]["val_loss"], rel=1e-5)
    assert list(numbers["evaluation"]) == ["stage-1", "stage-2", "stage-3", "scratch"]
    at_growth = numbers["evaluation"]["stage-1"]["held_out"]["val_loss"]
    assert at_growth == pytest.approx(growths[0][0], rel=1e-5)


def test_the_report_has_what_the_search_measured(quick):
    """The means of each value, how large luck is and by how much the winner leads, from the logs of
    the grid; computed here without the code of the search."""
    out, numbers = quick
    found, grid = numbers["search"], list(itertools.product(*QUICK.axes.values()))
    loss = {}
    for seed in range(QUICK.search_seeds):
        for values in grid:
            cell = "-".join(f"{key}{value:g}" for key, value in zip(QUICK.axes, values))
            run = runs.read_finished(out / "search" / f"{cell}-seed{seed}")
            loss[values, seed] = run and run.loss
    for place, (axis, values) in enumerate(QUICK.axes.items()):
        for value in values:
            mean = statistics.fmean(loss[cell, 0] for cell in grid if cell[place] == value)
            assert found["means"][axis][f"{value}"] == pytest.approx(mean)
    finalists = sorted(grid, key=lambda cell: loss[cell, 0])[: QUICK.finalists]
    pairs = [[loss[cell, seed] for seed in range(QUICK.search_seeds)] for cell in finalists]
    best, second = sorted(map(statistics.fmean, pairs))[:2]
    assert found["lead"] == pytest.approx(second - best)
    luck = statistics.fmean(map(statistics.variance, pairs)) ** 0.5
    assert found["luck"] == pytest.approx(luck)


def test_the_report_has_the_scores_of_the_last_stage(quick):
    """Asked again, its checkpoint answers as many items rightly."""
    out, numbers = quick
    last = max((out / "train" / "grown").glob("step-*"))
    suite = {name: task.generate(QUICK.items, 0) for name, task in iqeval.TASKS.items()}
    again = iqeval.evaluate(iqeval.CheckpointModel(last), suite)
    told = numbers["evaluation"]["stage-3"]["tasks"]
    assert sum(row["n"] for row in again.values()) > 0
    assert {k: v["right"] for k, v in again.items()} == {k: told[k]["right"] for k in again}
    for row in told.values():
        assert row["accuracy"] == (row["right"] / row["n"] if row["n"] else None)


def test_the_report_has_what_it_took(quick):
    """The tokens and FLOPs of each stage, the processor seconds in the logs of each part, and the
    seconds of every part of the recipe."""
    out, numbers = quick
    _, stages = read_run(out / "train" / "grown")
    for row, stage in zip(numbers["runs"]["grown"]["stages_cost"], stages, strict=True):
        alone = dataclasses.replace(stage, start=0, end=stage.end - stage.start)
        assert row["tokens"] == alone.end * QUICK.context
        assert row["tflop"] == pytest.approx(training_flops([alone]) / 1e12)
    for part, row in numbers["costs"].items():
        pattern = f"{part}/*" if part in ("search", "narrow") else f"train/{part}"
        lines = [line for folder in out.glob(pattern) for line in read_log_of(folder)]
        assert row["cpu_seconds"] == pytest.approx(sum(line["cpu_seconds"] for line in lines))
    shown = sum(row["tflop"] for row in numbers["costs"].values()) * 1e12
    asked = Recipe(out, QUICK, 0, "cpu", True, 2)
    models = len(QUICK.layers) + 1
    assert shown + models * recipe.evaluation_flops(asked) == pytest.approx(recipe.all_flops(asked))
    assert numbers["seconds"] == json.loads((out / "seconds.json").read_text())
    assert tuple(numbers["seconds"]) == recipe.PARTS


def read_log_of(folder: Path) -> list[dict]:
    """The log of a run; nothing for what is no run's folder."""
    return read_log(folder) if folder.is_dir() else []


def test_the_prediction_is_there_before_the_model(quick):
    """Its file is older than the first file of the run that it is about. It holds no outcome."""
    out, _ = quick
    file = out / "prediction.json"
    assert file.stat().st_mtime_ns <= (out / "train" / "grown" / "config.json").stat().st_mtime_ns
    (row,) = json.loads(file.read_text())["predicted"]
    assert "loss" not in row and row["interval"][0] < row["predicted"] < row["interval"][1]


def test_the_page_shows_what_the_json_holds(quick):
    """The page opens without a network, and each line of the summary is on it."""
    out, numbers = quick
    page = (out / "report.html").read_text(encoding="utf-8")
    for line in [*recipe_page.summary(numbers), *numbers["cluster"], "FLM-101B", "21.54"]:
        assert html.escape(line) in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_the_bar_ends_full(quick):
    """The FLOPs that were promised are those that were done."""
    out, _ = quick
    shown = (out.parent.parent / "log").read_text().replace("\r", "\n")
    assert "5 of 5, report: 100%" in shown


def test_the_command_ends_with_the_commands_for_a_cluster(quick):
    """Each in a line of its own, to be copied, after what was found."""
    out, numbers = quick
    lines = (out.parent.parent / "log").read_text().splitlines()
    at = [lines.index(f"  {command}") for command in numbers["cluster"]]
    assert at and at == sorted(at)


def test_killed_at_five_places(both, quick):
    """kill -9 in each part, Ctrl-C, and the same command again: every log and every number is the
    one of the undisturbed recipe, and no finished run was touched again."""
    done = json.loads((both / "killed/done.json").read_text())
    assert len(done) > 10
    assert {config: Path(config).stat().st_mtime_ns for config in done} == done
    found, numbers = report(both / "killed")
    assert logs(found) == logs(quick[0])
    assert without_times(numbers) == without_times(quick[1])
    assert held_out(numbers) == held_out(quick[1]).expected


# ----------------------------------------------------------------------------------------------
# Chapter 8

CHAPTER = (ROOT / "tutorials/08-recipe.md").read_text(encoding="utf-8")


@pytest.mark.quick
def test_chapter_8_has_the_numbers():
    """Every line of the summary of every recipe that was measured is in the chapter; line ends
    aside."""
    files = sorted(ROOT.glob("tutorials/measurements/recipe-seed*.json"))
    shown = " ".join(CHAPTER.split())
    lines = [line for file in files for line in recipe_page.summary(json.loads(file.read_text()))]
    assert lines and [line for line in lines if " ".join(line.split()) not in shown] == []


@pytest.mark.quick
def test_chapter_8_has_the_tables():
    """Each line of the three tables, and in section 8.3 how far the widths agree about a seed and
    how large a run's own luck is, both computed here from the narrow losses."""
    files = sorted(ROOT.glob("tutorials/measurements/recipe-seed*.json"))
    reports = [json.loads(file.read_text()) for file in files]
    wanted = [line for lines in recipe_page.tables(reports) for line in lines]
    assert len(reports) == 3 and [line for line in wanted if line not in CHAPTER] == []
    shared, own = [], []
    for numbers in reports:
        losses = np.array([list(row.values()) for row in numbers["prediction"]["losses"].values()])
        pairs = np.corrcoef(losses)[np.triu_indices(len(losses), 1)]
        shared.append(f"{pairs.mean():.2f}")
        rest = losses - losses.mean(0) - losses.mean(1, keepdims=True) + losses.mean()
        own.append(
            f"{np.sqrt(np.square(rest).sum() / (len(losses) - 1) / (losses.shape[1] - 1)):.4f}"
        )
    text = CHAPTER.replace("\n", " ")
    for numbers in (shared, own):
        assert f"{numbers[0]}, {numbers[1]} and {numbers[2]}" in text


@pytest.mark.quick
def test_chapter_8_has_the_sizes():
    """The table of the stages is that of the laptop's recipe, and so are the narrow widths."""
    asked = Recipe(Path("nowhere"), LAPTOP, 0, "cpu", False, 2)
    for layers, width in zip(LAPTOP.layers, LAPTOP.widths):
        size = count_parameters(asked.model(width, layers))
        assert f"| {layers} | {width} | {size:,} |" in CHAPTER
    *first, last = map(str, LAPTOP.narrow)
    assert f"widths {', '.join(first)} and {last}" in CHAPTER.replace("\n", " ")


@pytest.mark.quick
def test_chapter_8_has_the_luck():
    """The standard deviations over the seeds, from the measured losses."""
    losses = json.loads((ROOT / "tutorials/measurements/recipe-luck.json").read_text())["losses"]
    for width in ("32", "64"):
        for step in ("200", "400"):
            found = statistics.stdev(row[step] for row in losses[width].values())
            assert f"{found:.4f}" in CHAPTER


# ----------------------------------------------------------------------------------------------
# What is asked for


def small(tmp_path: Path, **changes) -> Recipe:
    """The quick recipe in a folder that is there."""
    return Recipe(tmp_path, dataclasses.replace(QUICK, **changes), 0, "cpu", True, 2)


@pytest.mark.quick
@pytest.mark.parametrize("size", [LAPTOP, QUICK, GPU], ids=["laptop", "quick", "gpu"])
def test_the_narrow_runs_share_the_first_stage(tmp_path, size):
    """Up to the end of the first stage a narrow run has the learning rate of the run that grows, at
    every step; it ends one step later."""
    asked = Recipe(tmp_path, size, 0, "cpu", False, 2)
    recipe.write_stages(asked, BEST)
    grown, stages = resolve(recipe.grown_settings(asked, BEST))
    narrow, short = resolve(recipe.narrow_settings(asked, BEST)[0])
    end, B = stages[0].end, size.batch_size
    assert short[0].end == end and short[-1].end == end + B
    for samples in range(B, end + 1, max(1, end // B // 50) * B):
        rate = learning_rate(stages, samples, grown.min_lr)
        assert learning_rate(short, samples, narrow.min_lr) == pytest.approx(rate, rel=1e-9)


@pytest.mark.quick
@pytest.mark.parametrize("size", [LAPTOP, QUICK, GPU], ids=["laptop", "quick", "gpu"])
def test_what_the_search_found_is_what_is_trained(tmp_path, size):
    """Every stage of every run after the search has its values. A narrow model and the first
    stage's differ in nothing but the width; the first narrow seed is that of the large runs."""
    asked = Recipe(tmp_path, size, 5, "cpu", True, 2)
    recipe.write_stages(asked, BEST)
    narrow, large = recipe.narrow_settings(asked, BEST), recipe.big_settings(asked, BEST)
    for settings in [*narrow, *large]:
        assert settings.lr == BEST["lr"]
        for stage in resolve(settings)[1]:
            assert stage.config.init_std == BEST["init_std"]
            assert stage.config.output_mult == BEST["output_mult"]
    first, second = (resolve(settings)[1][0].config for settings in (narrow[0], large[0]))
    wide = {name: getattr(second, name) for name in ("d_model", "n_heads", "d_ff")}
    assert first.replace(**wide) == second
    assert {settings.seed for settings in large} == {narrow[0].seed}


@pytest.mark.quick
def test_the_control_has_the_same_flops(tmp_path):
    """Up to half a step of the large model."""
    asked = Recipe(tmp_path, LAPTOP, 0, "cpu", True, 2)
    recipe.write_stages(asked, BEST)
    grown, scratch = recipe.big_settings(asked, BEST)
    _, stages = resolve(scratch)
    step = training_flops(stages, scratch.batch_size)
    assert abs(recipe.flops_of(grown) - recipe.flops_of(scratch)) <= step / 2


@pytest.mark.quick
def test_minutes_scale_the_work():
    """Half the minutes, half the steps; too few are refused with what to type."""
    half = scaled(LAPTOP, LAPTOP.minutes / 2)
    assert half.steps == LAPTOP.steps // 2 and half.search_steps == LAPTOP.search_steps // 2
    assert scaled(LAPTOP, LAPTOP.minutes) == LAPTOP
    for minutes in (0, -1, 2, float("nan"), float("inf")):
        assert "ask for --quick" in error(scaled, LAPTOP, minutes)


@pytest.mark.quick
def test_another_recipe_is_refused(tmp_path):
    """With each difference, before anything is trained; the folder stays as it was."""
    recipe.check_folder(small(tmp_path))
    recipe.check_folder(small(tmp_path))
    before = (tmp_path / "recipe.json").read_text()
    message = error(recipe.check_folder, small(tmp_path, steps=99))
    assert "steps = 20, asked is 99" in message and "another --out" in message
    assert (tmp_path / "recipe.json").read_text() == before
    (tmp_path / "recipe.json").write_text("[]")
    assert "is not what lab.recipe writes" in error(recipe.check_folder, small(tmp_path))


@pytest.mark.quick
def test_a_folder_of_something_else_is_refused(tmp_path):
    """Nothing is written there, and what is damaged is named."""
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds something that is no recipe" in error(recipe.run, small(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "search.json").write_text("{")
    assert "search.json is no JSON" in error(recipe.read, small(tmp_path), "search")


@pytest.mark.quick
def test_what_the_command_line_refuses(tmp_path):
    """All of it at once."""
    file = tmp_path / "file"
    file.touch()
    words = ["--quick", "--minutes", "9", "--seed", "-1", "--jobs", "0", "--out", str(file)]
    message = error(recipe.read_recipe, recipe.make_parser().parse_args(words))
    for part in ("--quick and --minutes", "--seed -1", "--jobs 0", "is a file"):
        assert part in message


@pytest.mark.quick
def test_how_many_runs_at_a_time():
    """As many as the processor has threads; one on a GPU, which all runs would share; or --jobs."""
    asked = {"": torch.get_num_threads(), "--device cuda": 1, "--device cuda --jobs 3": 3}
    for words, jobs in asked.items():
        args = recipe.make_parser().parse_args(words.split())
        assert recipe.read_recipe(args).jobs == jobs


@pytest.mark.quick
def test_only_write_stages_writes(tmp_path):
    """What a recipe takes is counted without a file, and is what its runs take once there is one.
    The stages in the files are those that were counted."""
    asked = small(tmp_path)
    promised = recipe.all_flops(asked)
    settings = recipe.narrow_settings(asked, BEST) + recipe.big_settings(asked, BEST)
    assert list(tmp_path.iterdir()) == []
    recipe.write_stages(asked, BEST)
    cells = 2 + QUICK.finalists  # one more seed of each finalist
    cell = recipe.flops_of(recipe.cell_settings(asked, tuple(BEST.values()), 0))
    runs_take = cells * cell + sum(map(recipe.flops_of, settings))
    assert promised == runs_take + 4 * recipe.evaluation_flops(asked)


@pytest.mark.quick
def test_the_summary_says_that_there_was_no_control():
    """Without --control nothing says what growth saved, so a line names the option."""
    file = ROOT / "tutorials/measurements/recipe-seed1.json"
    assert "no control: --control" in recipe_page.summary(json.loads(file.read_text()))[-1]


@pytest.mark.quick
def test_the_bar_moves_within_an_evaluation():
    """Once after each task."""
    model = mock.Mock(context=1000, encode=lambda text: [0] * len(text))
    model.complete = lambda prompts, new: ["x"] * len(prompts)
    suite = {name: iqeval.TASKS[name].generate(1, 0) for name in ("counting-en", "head-tail")}
    calls = []
    iqeval.evaluate(model, suite, after=lambda: calls.append(1))
    assert len(calls) == len(suite)


def test_a_stage_ends_with_its_checkpoint(quick):
    """Each evaluated checkpoint is the last one of its stage, and is there."""
    out, _ = quick
    grown = runs.read_finished(out / "train" / "grown")
    found = recipe.stage_checkpoints([grown])
    _, stages = read_run(out / "train" / "grown")
    for path, stage in zip(found.values(), stages):
        assert json.loads((path / "checkpoint.json").read_text())["samples"] == stage.end
