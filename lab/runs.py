"""Many runs of train.py: several at a time, one process and one thread each, resumable.

    1. what a study asks     the settings of its runs, and whether a folder holds another study's
    2. finished runs         what a run's own files say of it
    3. run_all               trains what is not finished, and shows progress

A study (lab/transfer.py, lab/growth.py) makes one Settings for each of its runs. The runs
must differ in nothing but what the study varies. So the study fixes the arithmetic for all of
them: float32 on one thread, unless the user names another one. A finished run keeps config.json
and its log; its checkpoints are deleted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from tqdm import tqdm

import console
import train
from checkpoint import list_checkpoints, read_info
from flm import FLMConfig, count_parameters
from run_folder import open_corpus, read_log, read_run, resumed
from schedule import Stage, training_flops
from settings import Settings, flag, make_parser, resolve

# ----------------------------------------------------------------------------------------------
# 1. What a study asks

# Every study decides these, for each of its runs.
DECIDED = {"out", "preset", "seed", "stages", "steps", "threads"}
# These do not change what a run computes. (Model and stages are compared field by field, the text
# by its digest.)
NEUTRAL = {"out", "preset", "model", "stages", "data", "data_changed", "tokenizer_file", "device"}
NEUTRAL |= {"threads", "compile", "deterministic", "eval_every", "eval_batch"}
NEUTRAL |= {"save_every", "save_minutes", "keep", "timeout_minutes"}
NEUTRAL |= {"log_every", "log_to", "profile"}


def add_options(parser: argparse.ArgumentParser, out: str):
    """Add the options that all studies share. out: the default of --out. What follows `--` on the
    command line goes into `train`, for common_settings."""
    add, cores = parser.add_argument, torch.get_num_threads()
    add("--out", default=out, metavar="DIR", help="where runs and numbers go (default %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default 0")
    add("--jobs", type=int, default=cores, metavar="N", help="runs at a time (default %(default)s)")
    add("train", nargs="*", metavar="-- OPTION", help="options of train.py, for all runs")


def common_settings(words: list[str], decided: set[str], **defaults) -> Settings:
    """What all runs of a study share: `defaults`, changed by `words`, options of train.py.

    decided: settings that the study decides, besides DECIDED. Raises ValueError where a word
    names one of them, or something that is no setting of a run, such as --resume."""
    given = vars(make_parser().parse_args(words))
    free = set(Settings.__dataclass_fields__) - DECIDED - decided
    wrong = [f"{flag(name)}: the study decides it" for name in given if name not in free]
    if given.get("dtype") == "auto":
        wrong.append("--dtype auto: all runs of a study need one arithmetic, name it")
    console.refuse(wrong, "options after -- that cannot be there, leave them out:")
    fixed = {"threads": 1, "dtype": "float32", "stages": "none", "keep": 1}
    return Settings(**fixed | defaults | given)


def question(settings: Settings, stages: list[Stage], digest: str) -> dict:
    """What two runs must share to give the same numbers: {name: value}. digest: of the text."""
    asked = {k: v for k, v in dataclasses.asdict(settings).items() if k not in NEUTRAL}
    asked["text"] = digest
    asked["stages"] = [stage.to_dict() for stage in stages] if len(stages) > 1 else "none"
    return asked | stages[-1].config.to_dict()


def read_question(folder: Path) -> dict:
    """The question of the run in `folder`. Raises ValueError where there is none."""
    settings, stages = read_run(folder)
    digest = json.loads((folder / "config.json").read_text()).get("corpus_digest")
    return question(settings, stages, digest)


def differences(settings: Settings, stages: list[Stage], digest: str) -> list[str]:
    """How the run in settings.out, if there is one, differs from the one that is asked for."""
    folder = Path(settings.out)
    if not (folder / "config.json").exists():
        return []
    old, new = read_question(folder), question(settings, stages, digest)
    names = [name for name in old | new if old.get(name) != new.get(name)]
    return [f"{folder} has {k} = {old.get(k)!r:.99}, this study {new.get(k)!r:.99}" for k in names]


# ----------------------------------------------------------------------------------------------
# 2. Finished runs

DIVERGED = "diverged.txt"  # in a run's folder: the run stopped at a number that is not finite


@dataclass(frozen=True)
class FinishedRun:
    """What a run was asked and how it ended, from its own files."""

    folder: Path
    asked: dict  # see question
    stages: list[Stage]
    loss: float | None  # nats per held-out token after the last step; None where it diverged
    growths: list[tuple[float, float]]  # held-out loss before and after each growth
    cpu_seconds: float
    wall_seconds: float

    @property
    def config(self) -> FLMConfig:
        """The last stage's model."""
        return self.stages[-1].config

    @property
    def N(self) -> int:
        """Parameters of the last stage's model, a tied head once."""
        return count_parameters(self.config)


def read_finished(folder: Path) -> FinishedRun | None:
    """The run in `folder`; None where it has not ended, or not begun. Raises ValueError where the
    folder holds something else."""
    if not all((folder / name).exists() for name in ("config.json", "metrics.jsonl")):
        return None
    settings, stages = read_run(folder)
    lines = read_log(folder)
    losses = [x["val_loss"] for x in lines if x["step"] == settings.steps and "val_loss" in x]
    growths = [(x["loss_before"], x["loss_after"]) for x in lines if "loss_after" in x]
    cpu, wall = (sum(x.get(f"{k}_seconds", 0) for x in lines) for k in ("cpu", "wall"))
    if (folder / DIVERGED).exists():
        losses = [None]
    if not losses:
        return None
    return FinishedRun(folder, read_question(folder), stages, losses[-1], growths, cpu, wall)


def origin(finished: list[FinishedRun]) -> dict:
    """What a report says of its runs: what all of them were asked alike, and PyTorch's version."""
    first, *others = (run.asked for run in finished)
    same = {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}
    return {"same_in_all": same, "torch": torch.__version__}


def mean(losses: Iterable[float | None]) -> float | None:
    """The mean over the seeds; None where one is None: a seed that diverged leaves no mean."""
    losses = list(losses)
    return None if None in losses else sum(losses) / len(losses)


# ----------------------------------------------------------------------------------------------
# 3. run_all


def text_log(folder: Path) -> Path:
    """Takes what a run prints; deleted when the run is finished."""
    return Path(f"{folder}.log")


@dataclass
class Job:
    """A run that is not finished, with its FLOPs: those done so far, and all of them."""

    settings: Settings
    folder: Path
    done: int
    total: int


class MeasuredRun(train.Run):
    """A run that logs its seconds, and reports its FLOPs to the process that started it."""

    report = print  # where it goes; see work
    clocks = (0.0, 0.0)

    def log(self, **values):
        clocks = time.process_time(), time.perf_counter()
        cpu, wall = (round(now - last, 4) for now, last in zip(clocks, self.clocks))
        self.clocks = clocks
        super().log(**values, cpu_seconds=cpu, wall_seconds=wall)
        self.report(training_flops(self.stages, self.state.samples))


def train_one(job: Job) -> int | None:
    """Train a run, or go on with it. Returns the exit code: 128 + the signal that stopped it."""
    MeasuredRun.clocks = time.process_time(), time.perf_counter()
    resume = bool(list_checkpoints(job.folder))
    settings = resumed(str(job.folder), {}) if resume else job.settings
    try:
        result = train.train(settings, resume=resume, run_class=MeasuredRun)
        return sum(128 + number for number in result["signals"].values())
    except train.NonFinite as error:
        (job.folder / DIVERGED).write_text(f"{error}\n")


def work(job: Job, connection: Connection) -> int | None:
    """What a process does: train one run. Its words go to a file, its progress to `connection`."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C in the terminal reaches run_all alone, which asks the runs to stop
    with open(text_log(job.folder), "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    MeasuredRun.report = connection.send
    return train_one(job)


def finish(job: Job, code: int) -> FinishedRun:
    """What a run's process left behind; the checkpoints go. Raises ValueError where it failed."""
    if code:
        log = text_log(job.folder)
        words = log.read_text(errors="replace").strip().splitlines()[-8:]
        heading = f"{job.folder} ended with code {code}. All its words are in {log}, the last ones:"
        raise ValueError("\n  ".join([heading, *words]))
    text_log(job.folder).unlink()
    for path in list_checkpoints(job.folder):
        shutil.rmtree(path)
    return read_finished(job.folder)


def start(job: Job) -> tuple[Connection, BaseProcess]:
    """Train the job in a process of its own: (what it reports, the process). The report ends when
    the process does."""
    context = multiprocessing.get_context("spawn")
    text_log(job.folder).touch()
    receiver, sender = context.Pipe(duplex=False)
    action = partial(work, job, sender)
    process = context.Process(target=console.run, args=(action,), daemon=True)
    process.start()
    sender.close()
    return receiver, process


def train_jobs(jobs: list[Job], at_a_time: int, bar: tqdm):
    """Train all jobs, the last of the list first.

    Raises ValueError with the last words of a run that fails. However this function ends, the
    runs that are under way save and stop."""
    running = {}  # {what a run reports: (job, process)}
    try:
        while jobs or running:
            while jobs and len(running) < at_a_time:
                job = jobs.pop()
                receiver, process = start(job)
                running[receiver] = job, process
            for receiver in wait(list(running)):
                job, process = running[receiver]
                try:
                    done = receiver.recv()
                    bar.update(done - job.done)
                    job.done = done
                except EOFError:
                    process.join()
                    del running[receiver]
                    run = finish(job, process.exitcode)
                    bar.total -= job.total - job.done  # what a diverged run never does
                    loss = "diverged" if run.loss is None else f"{run.loss:.3f}"
                    left = len(jobs) + len(running)
                    bar.set_postfix_str(f"{left} runs left; {job.folder.name}: {loss}")
    finally:
        if running:
            bar.write("stopping: the runs under way save their last step; the same command goes on")
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()


def unfinished(settings: Settings, stages: list[Stage]) -> Job | None:
    """The run as a job; None where it is finished."""
    folder = Path(settings.out)
    if read_finished(folder):
        return None
    checkpoints = list_checkpoints(folder)
    samples = read_info(checkpoints[-1])["samples"] if checkpoints else 0
    done, total = training_flops(stages, samples), training_flops(stages, stages[-1].end)
    return Job(settings, folder, done, total)


def stop(number: int, frame):
    """SIGTERM ends this process as Ctrl-C does: through every `finally`."""
    sys.exit(128 + number)


def jobs_to_do(runs: list[Settings]) -> list[Job]:
    """The runs that are not finished, the longest last. Prepares their text.

    Raises ValueError for what train.py would refuse, and for folders that hold runs of another
    study."""
    folders = [run.out for run in runs]
    console.refuse(f"{out} is asked for twice" for out in folders if folders.count(out) > 1)
    planned = [resolve(run) for run in runs]
    settings, stages = planned[0]
    source = settings.data, settings.tokenizer, settings.tokenizer_file
    corpus = open_corpus(*source, stages[-1].config)
    foreign = [line for run in planned for line in differences(*run, corpus.digest)]
    console.refuse(foreign[:10], "runs of another study are in the way, choose another --out:")
    jobs = [job for run in planned if (job := unfinished(*run))]
    return sorted(jobs, key=lambda job: job.total - job.done)


def run_all(runs: list[Settings], at_a_time: int) -> list[FinishedRun]:
    """Train what is not finished; a run that was stopped goes on. Raises ValueError before anything
    runs, see jobs_to_do, and later where a run fails."""
    console.refuse([f"--jobs {at_a_time}: must be at least 1"] * (at_a_time < 1))
    jobs = jobs_to_do(runs)
    if jobs:
        jobs[0].folder.parent.mkdir(parents=True, exist_ok=True)
        left = sum(job.total - job.done for job in jobs)
        before = signal.signal(signal.SIGTERM, stop)
        try:
            options = {"desc": "training", "unit": "FLOP", "unit_scale": True, "delay": 0}
            with console.progress(total=left, **options) as bar:
                train_jobs(jobs, at_a_time, bar)
        finally:
            signal.signal(signal.SIGTERM, before)
    return [read_finished(Path(run.out)) for run in runs]
