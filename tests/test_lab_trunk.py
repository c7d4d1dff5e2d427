"""Tests of lab/runs.py: runs that share a trunk."""

import contextlib
import dataclasses
import json
from pathlib import Path
from unittest import mock

import pytest
from small_runs import MODEL, WORDS, train_here, trained, write_corpus

import train
from lab import runs
from lab.runs import common_settings, read_finished, run_all
from schedule import training_flops

STAGES = [{"config": {"n_layers": 1}}, {"config": {"n_layers": 2}, "start": 6, "ramp": 4}]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    """The same runs, in this process."""
    trained.clear()
    monkeypatch.setattr(runs, "train_jobs", train_here)
    monkeypatch.setattr("machine.matmul_rate", lambda *args: 1e12)


def study(corpus: Path, folder: Path, grown: bool = False, **changes) -> list[train.Settings]:
    """Four runs: three of one trunk, with two lengths and two decays, and one of another seed."""
    folder.mkdir(parents=True, exist_ok=True)
    fixed = {"model": MODEL, "batch_size": 2, "warmup": 4, "lr": 0.01, "min_lr": 0.0}
    common = common_settings([*WORDS, "--data", str(corpus)], set(), **fixed, lr_schedule="wsd")
    if grown:
        (folder / "stages.json").write_text(json.dumps(STAGES))
        model = ("n_layers=2", *MODEL[1:])
        changes |= {"stages": str(folder / "stages.json"), "model": model}
    cells = [(6, 0.5, 0), (8, 0.25, 0), (8, 0.5, 0), (6, 0.5, 1)]
    return [
        dataclasses.replace(
            common, steps=n, eval_every=n, lr_decay=decay, seed=seed,
            out=str(folder / f"{n}-{decay}-{seed}"), **changes,
        )
        for n, decay, seed in cells
    ]  # fmt: skip


def log_of(run: train.Settings) -> list[dict]:
    """Its log, without what depends on the clock."""
    lines = [
        json.loads(line) for line in (Path(run.out) / "metrics.jsonl").read_text().splitlines()
    ]
    gone = {"cpu_seconds", "wall_seconds", "tokens_per_s", "utilisation"}
    return [{k: v for k, v in line.items() if k not in gone} for line in lines]


@pytest.mark.parametrize("grown", [False, True])
def test_a_branch_is_the_run_that_was_asked_for(corpus, tmp_path, grown):
    """Each run of a shared trunk has the log, number for number, and the question of the same run
    trained alone. The trunk, all checkpoints and what was printed are gone in the end. With and
    without a growth, which is in the trunk of some branches and in the decay of others."""
    together, alone = (study(corpus, tmp_path / name, grown) for name in ("a", "b"))
    finished = run_all(together, 1)
    assert len(trained) == 2 and sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(
        [Path(run.out).name for run in together] + ["stages.json"] * grown
    )
    for run, other, found in zip(together, alone, finished):
        (expected,) = run_all([other], 1)
        assert log_of(run) == log_of(other)
        assert (found.loss, found.asked) == (expected.loss, expected.asked)
        assert len(found.growths) == grown and found.cpu_seconds > 0
    trained.clear()
    assert run_all(together, 1) == finished and not trained


class Killed(Exception):
    """In place of kill -9: nothing after it runs."""


@pytest.mark.parametrize("step", [2, 5])
def test_a_study_that_is_killed_goes_on(corpus, tmp_path, step):
    """Killed at any step, in the trunk or in a branch, or while a branch's folder is made: the same
    command ends with the same losses, and what is finished is not trained again."""
    whole = [run.loss for run in run_all(study(corpus, tmp_path / "whole"), 1)]
    asked = study(corpus, tmp_path / "half", save_every=1)
    real, calls = train.Run.train_step, []

    def dies(run):
        calls.append(run)
        if len(calls) == 2 * step:
            raise Killed
        real(run)

    with mock.patch.object(train.Run, "train_step", dies), pytest.raises(Killed):
        run_all(asked, 1)
    with mock.patch.object(runs.shutil, "copytree", side_effect=Killed):
        with contextlib.suppress(Killed):
            run_all(asked, 1)
    done = {run.out: Path(run.out, "metrics.jsonl").stat() for run in asked if finished_run(run)}
    assert [run.loss for run in run_all(asked, 1)] == whole
    assert all(Path(out, "metrics.jsonl").stat() == stat for out, stat in done.items())


def finished_run(run: train.Settings):
    return read_finished(Path(run.out))


def test_more_branches_than_before(corpus, tmp_path):
    """A study of one run more: where the trunk is gone, or has no checkpoint there, it is trained
    anew, and the new run is the one asked for."""
    first, *others = study(corpus, tmp_path / "a")
    run_all(others[:2], 1)
    (found, *_) = run_all([first, *others], 1)
    assert found.loss == run_all([study(corpus, tmp_path / "b")[0]], 1)[0].loss


def test_a_trunk_that_diverges(corpus, tmp_path):
    """All its branches have diverged, and the study ends."""
    finished = run_all(study(corpus, tmp_path / "a", lr=1e30), 1)
    assert [run.loss for run in finished] == [None] * 4
    assert finished[1].asked["steps"] == 8


def test_the_work_of_a_trunk_is_counted_once(corpus, tmp_path):
    """The FLOPs that a job has left, and those that it reports at its end, are those of the trunk
    to its last branch and of each decay."""
    asked = study(corpus, tmp_path / "a")
    jobs = runs.jobs_to_do(asked)
    step = {6: None, 8: None}
    for settings in asked:
        stages = train.resolve(settings)[1]
        step[settings.steps] = training_flops(stages) // settings.steps
    one = step[6]
    assert sorted((job.done, job.total) for job in jobs) == [
        (0, 6 * one),
        (0, (6 + 3 + 4 + 2) * one),
    ]
    job = next(job for job in jobs if job.branches)
    reported = []
    with mock.patch.object(runs.MeasuredRun, "report", lambda self, flops: reported.append(flops)):
        runs.text_log(job.folder).touch()
        assert runs.train_one(job) == 0
    assert reported[-1] == job.total and reported == sorted(reported)
