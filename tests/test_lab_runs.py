"""Tests of lab/runs.py: many runs of train.py, several at a time, resumable."""

import dataclasses
import json
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, error
from small_runs import MODEL, WORDS, write_corpus

import console
import train
from checkpoint import list_checkpoints, read_info
from lab import runs
from lab.runs import common_settings, read_finished, run_all
from schedule import training_flops


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture
def small(corpus, tmp_path) -> train.Settings:
    """Settings of a run of 4 steps; its folder does not exist yet."""
    fixed = {"model": MODEL, "steps": 4, "batch_size": 2, "warmup": 2, "lr": 0.01}
    common = common_settings([*WORDS, "--data", str(corpus)], set(), **fixed)
    return dataclasses.replace(common, out=str(tmp_path / "study" / "run"))


def elsewhere(settings: train.Settings, name: str, **changes) -> train.Settings:
    return dataclasses.replace(settings, out=str(Path(settings.out).with_name(name)), **changes)


class Bar:
    """In place of console.progress: what it was told."""

    def __init__(self, total, **options):
        self.total, self.done, self.words = total, 0, []
        Bar.last = self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, n):
        self.done += n

    def set_postfix_str(self, words):
        self.words.append(words)

    write = set_postfix_str


# ----------------------------------------------------------------------------------------------
# Real runs, in processes of their own


def test_runs_go_on_and_are_not_run_twice(small, monkeypatch):
    """A run that was stopped half-way, and one whose numbers overflow, side by side.

    The first ends, bit for bit, as it does without a stop. What diverged is a result. Progress
    counts the FLOPs that were left, all of them and no more. Finished runs keep their logs alone,
    and asking again starts no process."""
    whole = train.train(elsewhere(small, "whole"))
    train.train(small, stop_at=2)
    assert read_finished(Path(small.out)) is None
    monkeypatch.setattr(console, "progress", Bar)
    study = [small, elsewhere(small, "inf", seed=1, lr=1e30)]
    first, second = finished = run_all(study, at_a_time=2)

    assert first.loss == whole["val_loss"] and second.loss is None
    assert (first.asked["seed"], second.asked["seed"]) == (0, 1)
    step = training_flops(first.stages) // 4
    overflowed = len((second.folder / "metrics.jsonl").read_text().splitlines())
    assert overflowed < 4 and Bar.last.done == Bar.last.total == step * (2 + overflowed)
    assert any("inf: diverged" in words for words in Bar.last.words)
    for run in finished:
        assert not list_checkpoints(run.folder) and not runs.text_log(run.folder).exists()

    monkeypatch.setattr(multiprocessing, "get_context", None)
    assert run_all(study, at_a_time=2) == finished


def test_a_run_that_fails_says_why(small):
    """The words of the run reach the user, with the file that has all of them. What is not ours
    stays as it was, and no other run begins."""
    foreign = Path(small.out)
    foreign.mkdir(parents=True)
    (foreign / "notes.txt").write_text("mine")
    later = elsewhere(small, "later", steps=2)  # less to do, so it would be the second
    message = error(run_all, [small, later], at_a_time=1)
    for words in ("run ended with code 2", f"{foreign}.log", "exists and is not a run"):
        assert words in message
    assert (foreign / "notes.txt").read_text() == "mine"
    assert not Path(later.out).exists()


SWEEP = ["--mup", "on", "--widths", "16", "--values", "0.01", "--steps", "1000000", "--model"]
SWEEP += ["n_layers=1", "head_dim=8", "max_seq_len=16", "--", *WORDS, "--save-every", "1000000"]


def start_sweep(folder: Path, corpus: Path) -> tuple[subprocess.Popen, Path]:
    """A sweep of one endless run, some steps after its start; and the run's folder."""
    words = [sys.executable, "-m", "lab.transfer", "sweep", "--out", str(folder), *SWEEP]
    process = subprocess.Popen([*words, "--data", str(corpus)], cwd=ROOT, stderr=subprocess.PIPE)
    run = folder / "mup-w0016-lr0.01-seed0"
    while process.poll() is None:  # until there is progress, or an end
        if len(logged_steps(run)) > 2:
            return process, run
        time.sleep(0.1)
    raise AssertionError(process.stderr.read())


def logged_steps(run: Path) -> list[int]:
    """The steps in a run's log, as far as the log goes now."""
    log = run / "metrics.jsonl"
    whole = log.read_text().rpartition("\n")[0].splitlines() if log.exists() else []
    return [json.loads(line)["step"] for line in whole]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_a_signal_to_the_command_saves_the_runs(tmp_path, corpus, name):
    """A job queue's SIGTERM, even SIGKILL: the runs under way save their last step and end, so
    that nothing is lost. After SIGTERM (and Ctrl-C, which takes the same way) they have ended when
    the command ends."""
    fcntl = pytest.importorskip("fcntl", reason="Windows has neither this lock nor SIGKILL")
    process, run = start_sweep(tmp_path, corpus)
    process.send_signal(getattr(signal, name))
    process.communicate()
    assert process.returncode == {"SIGTERM": 143, "SIGKILL": -9}[name]
    with open(run / "lock") as lock:
        if name == "SIGKILL":
            fcntl.flock(lock, fcntl.LOCK_EX)  # returns when the run has ended
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    newest = list_checkpoints(run)[-1]
    assert read_info(newest)["step"] == logged_steps(run)[-1] > 2


# ----------------------------------------------------------------------------------------------
# What a study asks


def test_a_folder_of_another_study_is_refused(small, monkeypatch):
    """Before anything runs, with every difference and both values; what cannot change a result is
    no difference."""
    monkeypatch.setattr(runs, "train_jobs", None)
    train.train(small)
    other = dataclasses.replace(small, steps=6, lr=0.02, model=(*MODEL, "init_std=0.5"))
    message = error(run_all, [other, elsewhere(small, "new")], at_a_time=1)
    for words in ("steps = 4, this study 6", "lr = 0.01, this study 0.02", "init_std"):
        assert words in message
    assert "choose another --out" in message and "notes" not in message
    assert run_all([dataclasses.replace(small, eval_every=3, keep=2)], at_a_time=1)[0].loss


@pytest.mark.parametrize("text", ["{}", "[]", "{"])
def test_a_config_of_another_program_is_refused(small, text):
    """A config.json that is no run's: a ValueError that names the folder, and the file stays."""
    config = Path(small.out) / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text(text)
    assert f"{config.parent} is not the folder of a run" in error(run_all, [small], at_a_time=1)
    assert config.read_text() == text


def test_another_text_is_another_study(small, corpus, tmp_path):
    """A corpus that moved is the same text. Other text at the same path is another study, and the
    runs that are there are left as they are."""
    moved = shutil.copytree(corpus, tmp_path / "moved")
    settings = dataclasses.replace(small, data=str(moved))
    train.train(small)
    assert run_all([settings], at_a_time=1)[0].loss
    shutil.rmtree(moved)
    other = tmp_path / "other"
    other.mkdir()
    (other / "0.txt").write_text("another text, that has never been there before. " * 99)
    write_corpus(other).rename(moved)
    message = error(run_all, [settings], at_a_time=1)
    assert "run has text = " in message and "choose another --out" in message


@pytest.mark.parametrize(
    "words, message",
    [
        ("--resume runs/x", "--resume: the study decides it"),
        ("--settings x.json", "--settings: the study decides it"),
        ("--seed 1 --threads 2", "--threads: the study decides it"),
        ("--mup off", "--mup: the study decides it"),
        ("--dtype auto", "need one arithmetic"),
    ],
)
def test_what_a_study_decides(words, message):
    """Options of train.py that a study decides, and other modes of train.py, are refused."""
    assert message in error(common_settings, words.split(), {"mup"})


def test_all_runs_have_one_arithmetic():
    """float32 on one thread, whatever the machine would choose, unless the user names another."""
    settings = common_settings([], set(), lr=0.5)
    assert (settings.dtype, settings.threads, settings.lr) == ("float32", 1, 0.5)
    settings = common_settings(["--dtype", "float64", "--lr", "0.1"], set(), lr=0.5)
    assert (settings.dtype, settings.threads, settings.lr) == ("float64", 1, 0.1)


def test_what_run_all_refuses(small):
    """No runs at a time, and two runs in one folder."""
    assert error(run_all, [small, small], at_a_time=1) == f"{small.out} is asked for twice"
    assert error(run_all, [small], at_a_time=0) == "--jobs 0: must be at least 1"
