"""Runs of train.py that take a moment: what the tests of lab/ share."""

from pathlib import Path
from unittest import mock

import data
import train
from lab import runs

MODEL = ("n_layers=1", "d_model=16", "n_heads=2", "head_dim=8", "d_ff=64", "max_seq_len=16")
WORDS = ["--eval-rows", "8", "--device", "cpu"]


def write_corpus(folder: Path) -> Path:
    """A small prepared corpus inside `folder`, of its files and eight more."""
    for i in range(1, 9):
        lines = (f"line {i * n} of a small text\n" for n in range(100))
        (folder / f"{i}.txt").write_text("".join(lines))
    tokenizer = data.get_tokenizer("bytes")
    target = folder / "prepared"
    data.prepare({"text": [folder]}, target, tokenizer, val_fraction=0.2, progress=False)
    return target


def train_here(jobs: list, at_a_time: int, bar):
    """In place of runs.train_jobs: the same runs, one after another, in this process."""
    while jobs:
        job = jobs.pop()
        runs.text_log(job.folder).touch()
        with mock.patch.object(runs.MeasuredRun, "report", lambda self, flops: None):
            runs.train_one(job)
        trained.append(job.settings)
        runs.finish(job, 0)


trained: list[train.Settings] = []  # by train_here, since a test cleared it
