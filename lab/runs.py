"""Many runs of train.py: several at a time, one process and one thread each, resumable.

    1. what a study asks     the settings of its runs, and whether a folder holds another study's
    2. finished runs         what a run's own files say of it
    3. jobs                  a run, or several runs that share a trunk
    4. run_all               trains what is not finished, and shows progress

A study (lab/transfer.py, lab/growth.py) makes one Settings for each of its runs. The runs
must differ in nothing but what the study varies. So the study fixes the arithmetic for all of
them: float32 on one thread, unless the user names another one. A finished run keeps config.json
and its log; its checkpoints are deleted, unless the study needs them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from tqdm import tqdm

import console
import machine
import train
from checkpoint import list_checkpoints, read_info, step_name, step_of
from flm import FLMConfig, count_parameters
from run_folder import open_corpus, read_log, read_run, resumed
from schedule import Stage, decay_step, total_steps, training_flops
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
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default %(default)s")
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
# 3. Jobs
#
# Runs with --lr-schedule wsd that differ in nothing but --steps and --lr-decay are one run until
# the first of them decays. So they share a *trunk*, a run without decay. At the start of each decay
# a branch copies the trunk's folder and goes on as the run that was asked for. It ends with the
# same bits and the same log as if it had been trained alone.


def text_log(folder: Path) -> Path:
    """Takes what a run prints; deleted when the run is finished."""
    return Path(f"{folder}.log")


@dataclass
class Branch:
    """A run of a trunk: where it leaves it. start: in steps; flops: of the trunk to there."""

    settings: Settings
    stages: list[Stage]
    start: int
    flops: int


@dataclass
class Job:
    """A run that is not finished, or a trunk with its branches, by their start. With its FLOPs:
    those done so far, and all of them. keep: its checkpoints stay."""

    settings: Settings
    folder: Path
    done: int
    total: int
    branches: tuple[Branch, ...] = ()
    keep: bool = False


class MeasuredRun(train.Run):
    """A run that logs its seconds, and reports its FLOPs to the process that started it."""

    report = print  # where it goes; see work
    clocks = (0.0, 0.0)
    offset = 0  # FLOPs of the job that are no part of this run

    def log(self, **values):
        clocks = time.process_time(), time.perf_counter()
        cpu, wall = (round(now - last, 4) for now, last in zip(clocks, self.clocks))
        self.clocks = clocks
        super().log(**values, cpu_seconds=cpu, wall_seconds=wall)
        try:
            self.report(self.offset + training_flops(self.stages, self.state.samples))
        except BrokenPipeError:  # the study was killed: complete this step, end as after SIGTERM
            self.received.append(signal.SIGTERM)


def train_run(settings: Settings, stop_at: int | None = None) -> int:
    """Train a run, or go on with it. Returns the exit code: 128 + the signal that stopped it."""
    MeasuredRun.clocks = time.process_time(), time.perf_counter()
    folder = Path(settings.out)
    resume = bool(list_checkpoints(folder))
    settings = resumed(str(folder), {}) if resume else settings
    try:
        result = train.train(settings, resume=resume, stop_at=stop_at, run_class=MeasuredRun)
        return sum(128 + number for number in result["signals"].values())
    except train.NonFinite as error:
        (folder / DIVERGED).write_text(f"{error}\n")
        return 0


def train_one(job: Job) -> int:
    """Do the job, or go on with it. Returns the exit code, as train_run does."""
    if not job.branches:
        return train_run(job.settings)
    before = 0  # FLOPs of the branches that are finished
    for branch in job.branches:
        MeasuredRun.offset, folder = before, Path(branch.settings.out)
        if not list_checkpoints(folder) and not read_finished(folder):
            code = train_trunk(job, branch.start)
            if code:
                return code
            copy_trunk(job.folder, branch)
        if not read_finished(folder):
            code = train_run(branch.settings)
            if code:
                return code
        remove_checkpoints(folder)
        before += training_flops(branch.stages) - branch.flops
    return 0


def train_trunk(job: Job, step: int) -> int:
    """Train the trunk to that step, of which it has a checkpoint then, unless it diverges. Returns
    the exit code, as train_run does."""
    trunk = job.folder
    newest = max((step_of(path.name) for path in list_checkpoints(trunk)), default=-1)
    if newest > step and not (trunk / step_name(step)).exists():
        shutil.rmtree(trunk)  # of a study with fewer branches, which did not stop here
        newest = -1
    if newest >= step or (trunk / DIVERGED).exists():
        return 0
    return train_run(job.settings, stop_at=step)


def copy_trunk(trunk: Path, branch: Branch):
    """The folder of a branch, whole or not there, as if the run had been stopped where it leaves
    the trunk. Branches of a trunk that diverged have diverged."""
    folder = Path(branch.settings.out)
    tmp = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    for name in ("metrics.jsonl", DIVERGED):
        if (trunk / name).exists():
            shutil.copy(trunk / name, tmp)
    if not (trunk / DIVERGED).exists():
        shutil.copytree(trunk / step_name(branch.start), tmp / step_name(branch.start))
    config = json.loads((trunk / "config.json").read_text())
    asked = dataclasses.asdict(branch.settings)
    config["settings"] |= {k: asked[k] for k in ("steps", "lr_decay", "eval_every", "out")}
    config["stages"] = [stage.to_dict() for stage in branch.stages]
    (tmp / "config.json").write_text(json.dumps(config))
    tmp.rename(folder)


def remove_checkpoints(folder: Path):
    for path in list_checkpoints(folder):
        shutil.rmtree(path)


def make_jobs(planned: list[tuple[Settings, list[Stage]]], keep: bool = False) -> list[Job]:
    """Runs and their stages as jobs; those that share a trunk are one. Without what is finished.
    keep: see run_all; runs that share a trunk keep no checkpoints."""
    groups: dict[str, list] = {}
    for settings, stages in planned:
        free = {"steps": 0, "lr_decay": 0.0, "eval_every": 1, "out": "", "stages": ""}
        same = [dataclasses.replace(settings, **free), [replace(s, end=0) for s in stages]]
        alone = "" if settings.lr_schedule == "wsd" else settings.out
        groups.setdefault(repr([same, alone]), []).append((settings, stages))
    jobs = []
    for key, members in groups.items():
        if len(members) == 1:
            job = unfinished(*members[0], keep)
            jobs += [job] if job else []
            continue
        left = [member for member in members if not read_finished(Path(member[0].out))]
        if left:
            jobs.append(trunk_job(key, left))
    return jobs


def flops_done(folder: Path, stages: list[Stage]) -> int:
    """The FLOPs that the newest checkpoint of a run has behind it."""
    checkpoints = list_checkpoints(folder)
    return training_flops(stages, read_info(checkpoints[-1])["samples"]) if checkpoints else 0


def unfinished(settings: Settings, stages: list[Stage], keep: bool) -> Job | None:
    """One run as a job; None where it is finished. The log comes before the checkpoint: a run that
    was killed between the two is finished, but not where its checkpoints are to be kept."""
    folder = Path(settings.out)
    total = training_flops(stages)
    done = flops_done(folder, stages)
    run = read_finished(folder)
    if run and (run.loss is None or not keep or done == total):
        return None
    return Job(settings, folder, done, total, keep=keep)


def trunk_job(key: str, members: list[tuple[Settings, list[Stage]]]) -> Job:
    """The job of runs that share a trunk. key: what they share."""
    branches = []
    for settings, stages in members:
        start = decay_step(stages, settings.lr_decay)
        samples = samples_after(stages, start)
        branches.append(Branch(settings, stages, start, training_flops(stages, samples)))
    branches.sort(key=lambda branch: (branch.start, branch.settings.steps))
    longest = max(branches, key=lambda branch: branch.settings.steps)
    name = f"trunk-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    folder = Path(longest.settings.out).with_name(name)
    never = {"keep": 10**9, "save_every": 10**9, "eval_every": 10**9}
    trunk = replace(longest.settings, out=str(folder), lr_decay=0.0, **never)
    own = [training_flops(b.stages) - b.flops for b in branches]
    done = flops_done(folder, longest.stages)
    for branch in branches:
        done += max(0, flops_done(Path(branch.settings.out), branch.stages) - branch.flops)
    return Job(trunk, folder, done, branches[-1].flops + sum(own), tuple(branches))


def samples_after(stages: list[Stage], steps: int) -> int:
    """The samples that a run has seen after so many steps."""
    samples = stages[0].start
    for stage in stages:
        taken = min(steps, total_steps([stage]))
        samples, steps = samples + taken * stage.batch_size, steps - taken
    return samples


def work(job: Job, connection: Connection) -> int | None:
    """What a process does: train one run. Its words go to a file, its progress to `connection`."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C in the terminal reaches run_all alone, which asks the runs to stop
    with open(text_log(job.folder), "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    MeasuredRun.report = connection.send
    # A job may begin many runs. Their utilisation is no result of a study: one measurement will do.
    machine.matmul_rate = cache(machine.matmul_rate)
    return train_one(job)


def finish(job: Job, code: int) -> FinishedRun:
    """What a run's process left behind; the checkpoints go, if they are not to be kept. Raises
    ValueError where it failed."""
    if code:
        log = text_log(job.folder)
        words = log.read_text(errors="replace").strip().splitlines()[-8:]
        heading = f"{job.folder} ended with code {code}. All its words are in {log}, the last ones:"
        raise ValueError("\n  ".join([heading, *words]))
    text_log(job.folder).unlink()
    if job.branches:
        shutil.rmtree(job.folder, ignore_errors=True)  # not there where all branches were begun
        return read_finished(Path(job.branches[-1].settings.out))
    if not job.keep:
        remove_checkpoints(job.folder)
    return read_finished(job.folder)


# ----------------------------------------------------------------------------------------------
# 4. run_all


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


def stop(number: int, frame):
    """SIGTERM ends this process as Ctrl-C does: through every `finally`."""
    sys.exit(128 + number)


def jobs_to_do(runs: list[Settings], keep: bool = False) -> list[Job]:
    """The runs that are not finished, the longest last. Prepares their text. keep: see run_all.

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
    return sorted(make_jobs(planned, keep), key=lambda job: job.total - job.done)


def run_all(
    runs: list[Settings],
    at_a_time: int,
    later: int = 0,
    bar: tqdm | None = None,
    keep: bool = False,
) -> list[FinishedRun]:
    """Train what is not finished; a run that was stopped goes on. later: FLOPs that the study still
    has to do after these runs; the time left that is shown counts them.

    bar: shows FLOPs, those of these runs among others; None: a bar of these runs alone. keep:
    leave all checkpoints that the settings ask for, not only the log. Raises ValueError before
    anything runs, see jobs_to_do, and later where a run fails."""
    console.refuse([f"--jobs {at_a_time}: must be at least 1"] * (at_a_time < 1))
    jobs = jobs_to_do(runs, keep)
    if jobs:
        console.make_folder(jobs[0].folder.parent)
        left = later + sum(job.total - job.done for job in jobs)
        before = signal.signal(signal.SIGTERM, stop)
        try:
            with contextlib.ExitStack() as stack:
                if bar is None:
                    own = {"desc": "training", "unit": "FLOP", "unit_scale": True, "delay": 0}
                    bar = stack.enter_context(console.progress(total=left, **own))
                train_jobs(jobs, at_a_time, bar)
        finally:
            signal.signal(signal.SIGTERM, before)
    return [read_finished(Path(run.out)) for run in runs]
