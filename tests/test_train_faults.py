"""Signals, full disks, kill -9 and numbers that are not finite: nothing is lost, and the words are
true."""

# ruff: noqa: F401, F811 (pytest finds fixtures by their names)
import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from workshop import (
    CONFIG,
    ROOT,
    assert_same_run,
    contents,
    corpus,
    equal,
    flags,
    go_on,
    job,
    log,
    run_python,
    steps_of,
    workshop,
)

import checkpoint
import console
import data
import muP
import parallel
import train
from checkpoint import StepWriter, find_checkpoint, read_info, step_of
from flm import FLM
from train import main

# --------------------------------------------------------------------------------------------------
# Signals


SIGNALLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import data, train
real, calls, number = data.Corpus.batch_ahead, [], int(sys.argv[2])
def batch(*args, **options):
    calls.append(0)
    if len(calls) == 4:
        os.kill(os.getpid(), number)
    return real(*args, **options)
data.Corpus.batch_ahead = batch
sys.argv = ["train.py", *sys.argv[3:]]
train.launch(train.main)
"""


NUMBERS = [getattr(signal, name) for name in console.SIGNALS if hasattr(signal, name)]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_a_signal_saves_and_leaves(corpus, number):
    """A real signal to a real process, in its fourth step: the exit code is 128 + its number, the
    message says how to go on, and the run, resumed, equals one that was never stopped."""
    s = job(corpus, steps=100_000, batch_size=16, save_every=7, out="run")
    done = run_python(SIGNALLED, str(int(number)), *flags(s))
    assert done.returncode == 128 + number, done.stderr
    assert (
        f"stopped by {number.name} after step 4, saved; to go on:\n  python train.py --resume run\n"
    ) in done.stdout
    assert log("run")[-1]["step"] == 4 and "Traceback" not in done.stderr
    go_on("run", stop_at=6)
    straight = train.train(dataclasses.replace(s, out="straight"), stop_at=6)
    assert straight["step"] == 6
    assert_same_run("run", "straight")


def signals_at_batch(monkeypatch, call, *numbers):
    """The process gets these signals while it prepares its batch number `call`."""
    real, calls = data.Corpus.batch_ahead, itertools.count(1)

    def batch(self, *args, **options):
        if next(calls) == call:
            for number in numbers:
                signal.raise_signal(number)
        return real(self, *args, **options)

    monkeypatch.setattr(data.Corpus, "batch_ahead", batch)


def test_an_ignored_signal_stays_ignored(corpus, monkeypatch):
    """nohup starts a program that ignores SIGHUP; a run in it is not stopped by one."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals_at_batch(monkeypatch, 4, signal.SIGHUP)
        assert train.train(job(corpus))["signals"] == {}
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_between_two_micro_batches(corpus, monkeypatch):
    """Where a step takes longer than a launcher waits, a signal does not wait for its end: half a
    step is thrown away, what was whole before it is saved, and the run goes on exactly."""
    s, real, calls = job(corpus, micro_batch=1), FLM.forward, itertools.count(1)

    def forward(model, *args, **options):
        if next(calls) == 4 * 4 + 2:  # in the second micro-batch of the fifth step
            signal.raise_signal(signal.SIGTERM)
        return real(model, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *_: {"val_loss": 1.0, "val_bpb": 1.0})
        patch.setattr(FLM, "forward", forward)
        assert main(flags(dataclasses.replace(s, eval_every=100))) == 128 + signal.SIGTERM
    assert next(calls) == 4 * 4 + 3  # two micro-batches of the fifth step, and no more
    assert steps_of(s.out)[-1] == "step-00000004" and log(s.out)[-1]["step"] == 4
    go_on(s.out, eval_every=3)
    steps = [line for line in log(s.out) if "loss" in line]
    straight = train.train(job(corpus, micro_batch=1))["folder"]
    assert steps == [line for line in log(straight) if "loss" in line]
    assert equal(contents(s.out), contents(straight))


def test_a_second_interrupt_during_a_save(corpus, monkeypatch):
    """Ctrl-C twice, the second time while the last checkpoint is written and the run waits for it:
    it is an interrupt, not a disk that failed. The write comes to its end before the process does,
    so the checkpoint is whole, and the run goes on from it."""
    s = job(corpus, save_every=4)

    def interrupt(step, folder):
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        when_written(patch, interrupt)
        signals_at_batch(patch, 3, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            train.train(s)
    assert steps_of(s.out) == ["step-00000000", "step-00000003"]
    go_on(s.out)
    assert_same_run(s.out, train.train(job(corpus, save_every=4))["folder"])


def test_checkpoints_by_time(corpus, monkeypatch):
    """With --save-minutes 10 and a clock that each step moves on by four minutes, there is a
    checkpoint every third step, without one by steps. What is computed does not depend on it."""
    clock, saved = [0.0], []
    real_time, real_batch, real_save = (
        time.monotonic,
        data.Corpus.batch_ahead,
        checkpoint.write_in_background,
    )

    def batch(self, *args, **options):
        clock[0] += 4 * 60
        return real_batch(self, *args, **options)

    def save(folder, *args):
        saved.append(folder.name)
        return real_save(folder, *args)

    s = job(corpus, steps=9, save_every=100, save_minutes=10)
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: real_time() + clock[0])
        patch.setattr(data.Corpus, "batch_ahead", batch)
        patch.setattr(checkpoint, "write_in_background", save)
        train.train(s)
    assert saved == [f"step-{step:08d}" for step in (0, 3, 6, 9)]
    assert_same_run(s.out, train.train(job(corpus, steps=9))["folder"])


def test_a_second_interrupt_stops_at_once(corpus, monkeypatch):
    """Two Ctrl-C leave without finishing the step. The last checkpoint stays usable, and the
    process's own handlers are back in place."""
    straight, s = train.train(job(corpus))["folder"], job(corpus)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        signals_at_batch(patch, 4, signal.SIGINT, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            train.train(s)
    assert steps_of(s.out)[-1] == "step-00000002"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    go_on(s.out)
    assert_same_run(s.out, straight)


def test_a_signal_in_the_last_step(corpus, monkeypatch, capsys):
    """A signal that comes during the last step changes nothing of the run, and every command that
    is then printed works."""
    straight, s = train.train(job(corpus))["folder"], job(corpus)
    with monkeypatch.context() as patch:
        signals_at_batch(patch, 6, signal.SIGTERM)
        main(flags(s))
    assert_same_run(s.out, straight)
    for line in re.findall(r"python train\.py (--resume.*)", capsys.readouterr().out):
        assert main(shlex.split(line.split("  ")[0])) == 0


def test_trains_outside_the_main_thread(corpus):
    """Python lets only the main thread handle signals; a run in another thread works without."""
    s = job(corpus)
    thread = threading.Thread(target=train.train, args=(s,))
    thread.start()
    thread.join()
    assert log(s.out)[-1]["step"] == 6


# --------------------------------------------------------------------------------------------------
# Killed or out of space during a save


def raises(error):
    raise error


def cut_largest(folder):
    largest = max(Path(folder).iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def when_written(monkeypatch, action):
    """Call action(step, folder) in the thread that writes a checkpoint, when its tensors are
    written and nothing else of it is."""
    real = StepWriter.write_data

    def write_data(writer, *args):
        result = real(writer, *args)
        action(step_of(writer.folder.name), writer.path)
        return result

    monkeypatch.setattr(StepWriter, "write_data", write_data)


def breaks_saves(monkeypatch, step, error):
    """From the checkpoint of that step on, half of each is written, and then `error` is raised."""

    def fail(n, folder):
        if n >= step:
            cut_largest(folder)
            raise error

    when_written(monkeypatch, fail)


class PatientRun(train.Run):
    """A run that waits before each step until no thread writes: what happens then does not depend
    on how fast the disk is."""

    def train_step(self):
        while self.writing and not self.writing.done():
            time.sleep(0.001)
        super().train_step()


def test_training_goes_on_while_a_checkpoint_is_written(corpus, monkeypatch):
    """The write of step 2's checkpoint does not end before the batch of step 4 is asked for. Until
    then there is no such checkpoint. It holds the weights and moments of step 2 all the same, and
    the run is an undisturbed one, bit for bit."""
    s, fourth, seen = job(corpus, keep=9), threading.Event(), []
    real, calls = data.Corpus.batch_ahead, itertools.count(1)

    def batch(*args, **options):
        if next(calls) == 4:
            seen.append(steps_of(s.out))
            fourth.set()
        return real(*args, **options)

    def wait_for_it(step, folder):
        if step == 2:
            seen.append(fourth.wait(60))

    with monkeypatch.context() as patch:
        patch.setattr(data.Corpus, "batch_ahead", batch)
        when_written(patch, wait_for_it)
        train.train(s)
    assert sorted(seen, key=str) == [True, ["step-00000000", "step-00000002.tmp"]]
    straight = train.train(job(corpus, keep=9))["folder"]
    assert steps_of(s.out) == steps_of(straight) == [f"step-{n:08d}" for n in (0, 2, 4, 6)]
    assert_same_run(s.out, straight)
    for name in steps_of(straight):
        assert equal(contents(f"{s.out}/{name}"), contents(f"{straight}/{name}"))


@pytest.mark.parametrize(
    "place",
    [
        "tensors half written",
        "before checkpoint.json is whole",
        "before the rename",
        "before old ones go",
    ],
)
def test_killed_anywhere_in_a_save(corpus, monkeypatch, tmp_path, place):
    """What is on the disk at a moment of a save is what a kill -9 at that moment leaves: there is a
    whole checkpoint, and the run that goes on from it equals an undisturbed one and leaves no half
    folders."""
    s, left = job(corpus, keep=1, out="killed/run"), tmp_path / "left"
    tmp, whole = Path(s.out, "step-00000004.tmp"), Path(s.out, "step-00000004")

    def snapshot():
        if not left.exists():
            shutil.copytree(s.out, left)

    def before(owner, name, when):
        real = getattr(owner, name)

        def call(*args, **options):
            if when(*args):
                snapshot()
            return real(*args, **options)

        patch.setattr(owner, name, call)

    def half(step, folder):
        if step == 4:
            snapshot()
            cut_largest(left / folder.name)

    with monkeypatch.context() as patch:
        if place == "tensors half written":
            when_written(patch, half)
        elif place == "before checkpoint.json is whole":
            before(json, "dump", lambda *_: tmp.exists())
        elif place == "before the rename":
            before(Path, "rename", lambda path, _: path == tmp)
        else:
            before(checkpoint, "remove_old_checkpoints", lambda *_: whole.exists())
        train.train(s, run_class=PatientRun)
    assert find_checkpoint(left).name == ("step-00000004" if "old" in place else "step-00000002")
    go_on(str(left))
    assert_same_run(left, s.out)
    assert steps_of(left) == ["step-00000006"]


KILLED_BY_THE_SYSTEM = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from checkpoint import StepWriter
import train
whole = StepWriter.write_data
def half(writer, *args):
    result = whole(writer, *args)
    if writer.path.name == "step-00000004.tmp":
        file = max(writer.path.iterdir(), key=lambda path: path.stat().st_size)
        os.truncate(file, file.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return result
StepWriter.write_data = half
train.main(sys.argv[2:])
"""


def test_kill_9_during_a_save(corpus):
    """A real kill -9 with half of a checkpoint written: the one before is used, and the resumed run
    equals an undisturbed one."""
    s = job(corpus)
    done = run_python(KILLED_BY_THE_SYSTEM, *flags(s))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert steps_of(s.out) == ["step-00000000", "step-00000002", "step-00000004.tmp"]
    assert find_checkpoint(s.out).name == "step-00000002"
    assert main(["--resume", s.out]) == 0
    assert_same_run(s.out, train.train(job(corpus))["folder"])
    assert steps_of(s.out) == ["step-00000004", "step-00000006"]


def test_evaluations_are_on_the_screen_when_the_process_is_killed(corpus):
    """`train.py >log` and a kill -9: all evaluations until then stand in the log."""
    s = job(corpus)
    kill = SIGNALLED.replace("len(calls) == 4", "len(calls) == 5")
    done = run_python(kill, str(int(signal.SIGKILL)), *flags(s))
    assert done.returncode == -signal.SIGKILL
    assert "step      3: held-out loss" in done.stdout


def test_a_log_that_cannot_be_written(corpus, monkeypatch):
    """Where the log's disk is full, or the terminal is gone, the steps since the last checkpoint
    are saved, and the error says how to go on."""
    s, real = job(corpus, save_every=100), train.Run.log

    def log_of(run, **values):
        if run.state.step == 3:
            raise OSError(28, "No space left on device")
        real(run, **values)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "log", log_of)
        with pytest.raises(OSError) as caught:
            train.train(s)
    command = f"python train.py --resume {s.out}"
    assert str(caught.value).endswith(f"on device\nsaved at step 3; to go on: {command}")
    assert steps_of(s.out) == ["step-00000000", "step-00000003"]
    go_on(s.out)
    assert log(s.out)[-1]["step"] == 6


def test_full_disk_during_a_save(corpus, monkeypatch):
    """No space left from step 4 on: the run does not train on until the next save is due, but ends
    after step 5, with an OSError that names the checkpoint and the reason, and the command that goes
    on; no half folder; the checkpoint before is whole, and the run goes on from it exactly."""
    s = job(corpus)
    with monkeypatch.context() as patch:
        breaks_saves(patch, 4, OSError(28, "No space left on device"))
        with pytest.raises(OSError) as caught:
            train.train(s, run_class=PatientRun)
    lines = str(caught.value).splitlines()
    place = f"{s.out}/step-00000004"
    assert lines == [
        f"could not write the checkpoint {place}: No space left on device",
        f"saved at step 2; to go on: python train.py --resume {s.out}",
    ]
    assert steps_of(s.out) == ["step-00000000", "step-00000002"]
    assert log(s.out)[-1]["step"] == 5
    go_on(s.out)
    assert_same_run(s.out, train.train(job(corpus))["folder"])


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), KeyboardInterrupt()],
    ids=["full disk", "Ctrl-C"],
)
@pytest.mark.parametrize("place", ["checkpoint", "config.json"])
def test_a_run_that_cannot_begin_leaves_nothing(corpus, monkeypatch, place, error):
    """If its first files cannot be written there is no run: nothing is left of it, and the same
    command works once there is space."""
    s = job(corpus)
    with monkeypatch.context() as patch:
        if place == "checkpoint":
            breaks_saves(patch, 0, error)
        else:
            patch.setattr(Path, "replace", lambda path, to: raises(error))
        with pytest.raises(type(error)):
            train.train(s)
    assert not Path(s.out).exists()
    assert train.train(s)["step"] == 6


SEVERAL_COMMANDS = """
import contextlib, io, json, resource, runpy, sys
sys.path.insert(0, sys.argv[1])
import checkpoint
write = checkpoint.write_in_background
def limited(folder, tensors, info, group):
    if "interrupted" in str(folder):
        raise KeyboardInterrupt
    if info["step"] == 4 and "small-disk" in str(folder):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    return write(folder, tensors, info, group)
checkpoint.write_in_background = limited
found = []
for line in json.loads(sys.argv[2]):
    sys.argv = ["train.py", *line]
    out, err, code = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO(), "none"
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(sys.path[0] + "/train.py", run_name="__main__")
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            err.write("Traceback: " + repr(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    out.seek(0)
    found.append([code, out.read(), err.getvalue()])
print(json.dumps(found))
"""


def test_exit_codes(corpus):
    """As a script: 0 for success, 2 for a user's mistake, 2 for a disk (here the system's limit on
    a file's size) that is full, 1 for numbers that are not finite, 130 for Ctrl-C before there is
    anything to save; each with its message as the last thing on the standard error, and no
    traceback."""
    good, small = job(corpus), job(corpus, out="small-disk")
    wild, early = job(corpus, lr=1e30, warmup=0), job(corpus, out="interrupted")
    commands = [["--preset", "demmo"], *map(flags, (small, wild, good, early))]
    done = run_python(SEVERAL_COMMANDS, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    mistake, full, infinite, fine, interrupted = json.loads(done.stdout)

    assert mistake[:2] == [2, ""] and mistake[2].count("\n") == 1
    assert mistake[2].startswith("train.py: unknown preset 'demmo': did you mean demo")
    assert full[0] == 2
    place = "small-disk/step-00000004"
    assert f"train.py: could not write the checkpoint {place}: File too large\n" in full[2]
    assert infinite[0] == 1 and "train.py: step 2 stopped before the optimizer: " in infinite[2]
    assert fine[0] == 0 and "What next?" in fine[1]
    assert interrupted[0] == 130 and interrupted[2].splitlines()[-1].startswith("train.py: ")
    assert not any("Traceback" in err for _, _, err in (mistake, full, infinite, fine, interrupted))

    assert steps_of("small-disk") == ["step-00000000", "step-00000002"]
    go_on("small-disk")
    assert_same_run("small-disk", good.out)
