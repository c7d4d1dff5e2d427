"""Tests of watch.py: what a run shows with and without a terminal, its logs, its profile."""

# ruff: noqa: F401, F811 (pytest finds fixtures by their names)

import builtins
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from workshop import (
    CONFIG,
    assert_same_run,
    corpus,
    few,
    flags,
    go_on,
    job,
    log,
    workshop,
    write_stages,
)

import console
import run_folder
import train
import watch
from flm import FLM
from parallel import World
from schedule import flop_progress
from train import main

LINE = re.compile(
    r"step +(\d+) of (\d+): loss (\S+), lr (\S+), (\S+) tok/s, MFU \d+%, ((?:\d+:)?\d\d:\d\d) left"
)

# --------------------------------------------------------------------------------------------------
# Lines and bars


@few(4)
@given(every=st.integers(1, 8))
def test_without_a_terminal_there_are_lines(corpus, every):
    """Where the standard error is no terminal: the first step, every --log-every'th one and the
    last have a line with loss and learning rate of the log; no bar, and no escape codes."""
    written = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.stdout, "write", written.append)
        run = train.train(job(corpus, log_every=every))["folder"]
    text = "".join(written)
    found = [match.groups() for line in text.splitlines() if (match := LINE.fullmatch(line))]
    due = sorted({1, *range(every, 7, every), 6})
    assert [int(step) for step, *_ in found] == due and {last for _, last, *_ in found} == {"6"}
    steps = {line["step"]: line for line in log(run) if "loss" in line}
    for step, _, loss, lr, *_ in found:
        assert loss == f"{steps[int(step)]['loss']:.3f}" and lr == f"{steps[int(step)]['lr']:.3g}"
    assert found[-1][5] == "00:00"
    assert "\r" not in text and "\x1b" not in text


class Terminal:
    """A standard error that is a terminal, and keeps what is written."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_a_terminal_has_a_bar_that_counts_flops(corpus, monkeypatch, capsys):
    """On a terminal there is a bar and no line. Its share is that of the FLOPs: after the small
    model's half of the steps much less than half, and 100% at the end; also in a run that goes on.
    """
    write_stages(start=12)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(watch, "INTERVAL", 0)  # each step is shown
    s = job(corpus, stages="stages.json", save_every=100)
    train.train(s, stop_at=4)
    go_on(s.out)
    found = re.findall(r"(\d+)%\|[^|]*\| step (\d+) of 6 \[", terminal.text)
    shares = {int(step): int(percent) for percent, step in found}
    stages = train.resolve(s)[1]
    for step in range(1, 7):
        done, total = flop_progress(stages, 4 * step)
        assert shares[step] == pytest.approx(100 * done / total, abs=0.6)
    assert shares[3] < 40 and shares[6] == 100
    assert not LINE.search(capsys.readouterr().out)


def test_the_time_left_holds_over_a_growth(corpus, monkeypatch, capsys):
    """With a clock that moves on with the FLOPs, and with nothing else, each line promises the time
    that is really left: also those before the growth, after which steps take longer."""
    write_stages(start=12)
    clock = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    s = job(corpus, stages="stages.json", log_every=1, save_minutes=1e6)
    stages, real = train.resolve(s)[1], train.Run.log

    def log_of(run, **values):
        done, total = flop_progress(stages, run.state.samples)
        clock[0] = 3600 * done / total
        real(run, **values)

    monkeypatch.setattr(train.Run, "log", log_of)
    train.train(s)
    lines = LINE.findall(capsys.readouterr().out)
    assert [step for step, *_ in lines] == list("123456")
    for step, *_, left in lines:
        seconds = sum(60**i * int(part) for i, part in enumerate(reversed(left.split(":"))))
        done, total = flop_progress(stages, 4 * int(step))
        assert seconds == pytest.approx(3600 * (1 - done / total), abs=1.01)


# --------------------------------------------------------------------------------------------------
# What takes long is said


def test_a_warm_up_that_is_longer_than_the_run_is_told(corpus, capsys):
    """One line before the first step; a warm-up as long as the run reaches its peak."""
    note = "note      the warm-up of {} samples is longer than this stage: the learning rate"
    train.train(job(corpus, steps=1, batch_size=4, warmup=5))
    assert note.format(5) in capsys.readouterr().out
    train.train(job(corpus, steps=1, batch_size=4, warmup=4))
    assert "warm-up" not in capsys.readouterr().out


def test_what_takes_long_is_said_without_a_terminal(corpus, monkeypatch, capsys):
    """With no patience at all, the lines show what a run does before its first step, in an
    evaluation, and in an evaluation alone; the loss is the same."""
    expected = train.train(job(corpus, steps=1))["val_loss"]
    assert capsys.readouterr().err == ""  # none of it takes seconds
    patient = console.Lines.__init__
    monkeypatch.setattr(console.Lines, "__init__", lambda lines, _: patient(lines, 0))
    found = train.train(job(corpus, steps=1))
    told = capsys.readouterr()
    assert "  starting  weights are set, a checkpoint is written" in told.out
    assert "drawing: 0% of " in told.err and "evaluating: 0% of 6 rows" in told.err
    assert main(["--eval-only", found["folder"]]) == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"reading {found['folder']}") and "evaluating: 0%" in told.err
    assert found["val_loss"] == expected


# --------------------------------------------------------------------------------------------------
# What starting took


def test_what_starting_took_is_one_line(corpus, capsys):
    """One process says in one line how long it took to start, and how much memory so far."""
    train.train(job(corpus, steps=1))
    line = r"^  started   in (\S+) s; memory so far: (\S+) of (\S+) GiB$"
    ((seconds, used, whole),) = re.findall(line, capsys.readouterr().out, re.M)
    assert float(seconds) >= 0 and 0 < float(used) < float(whole)


def test_what_starting_took_is_a_table_of_the_ranks(monkeypatch):
    """Several ranks: a row for each, in columns that line up, whatever their width."""

    class Two(World):
        size = 2

        def at(self, axis):
            return 0

        def gather(self, row):
            assert row[0] == "0" and row[4] == "1,653,760" and row[6] == "9.1"
            first = [*row[:5], "0.41 of 23.5", row[6]]
            return [first, ["1", "0", "1", "0", "85,504", "10.44 of 23.5", "12.0"]]

    named = [("a", torch.empty(1_653_760, device="meta"))]
    text = watch.describe_start(Two(), torch.device("cpu"), named, 9.1)
    assert text.splitlines() == [
        "  started:",
        "    rank  pp  dp  tp  parameters     GiB so far  seconds",
        "       0   0   0   0   1,653,760   0.41 of 23.5      9.1",
        "       1   0   1   0      85,504  10.44 of 23.5     12.0",
    ]


# --------------------------------------------------------------------------------------------------
# TensorBoard


def events_of(run: str) -> dict[str, dict[int, float]]:
    """{name: {step: value}} as TensorBoard's own reader gives them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(f"{run}/tensorboard")
    board.Reload()
    names = board.Tags()["scalars"]
    return {name: {e.step: e.value for e in board.Scalars(name)} for name in names}


def test_tensorboard_has_the_numbers_of_the_log(corpus):
    """--log-to tensorboard: its own reader finds every number of metrics.jsonl (in fp32) and no
    other, also where a run was killed after a step that is computed again; the run is the same."""
    s = job(corpus, log_to="tensorboard", keep=9)
    train.train(s, stop_at=5)
    shutil.rmtree(Path(s.out, "step-00000005"))  # as if killed after step 5
    go_on(s.out)
    expected = {}
    for line in map(json.loads, Path(s.out, "metrics.jsonl").read_text().splitlines()):
        for name, value in line.items():
            if name != "step":
                expected.setdefault(name, {})[line["step"]] = pytest.approx(value, rel=1e-6)
    assert events_of(s.out) == expected
    assert_same_run(s.out, train.train(job(corpus))["folder"])


def test_tensorboard_that_is_not_installed(corpus, monkeypatch, tmp_path):
    """Without the package: one line with the command that installs it, before anything is made."""
    real = builtins.__import__

    def without(name, *args, **options):
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ModuleNotFoundError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError) as caught:
        main([*flags(job(corpus)), "--log-to", "tensorboard"])
    assert str(caught.value).endswith("pip install tensorboard") and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------
# A profile


def test_a_profile_changes_nothing(corpus, capsys):
    """--profile 2: the trace is JSON that viewers read, of two steps after those that warm up; the
    table has ten operations, the costliest first, with shares that are at most all; the results are
    bit for bit those of a run without it. A run that goes on is not profiled again."""
    s = job(corpus, profile=2)
    train.train(s)
    out = capsys.readouterr().out
    trace = json.loads(Path(s.out, "trace-step-4-rank-0.json").read_text())
    names = [e["name"] for e in trace["traceEvents"] if e["name"].startswith("ProfilerStep")]
    assert len(set(names)) == 2 and any(e["name"] == "aten::mm" for e in trace["traceEvents"])
    table = out.split("profile of steps 4 to 5, cpu time\n")[1].splitlines()
    rows = [re.fullmatch(r"  (\S.*?) +([\d,]+) +([\d,.]+) +([\d.]+)%", row) for row in table[1:11]]
    milliseconds = [float(row[3].replace(",", "")) for row in rows]
    assert milliseconds == sorted(milliseconds, reverse=True)
    assert 0 < sum(float(row[4]) for row in rows) <= 100.5
    assert table[11] == f"  trace: {s.out}/trace-step-4-rank-0.json, for ui.perfetto.dev"
    assert_same_run(s.out, train.train(job(corpus))["folder"])
    assert run_folder.read_run(s.out)[0].profile is None


def test_a_profile_of_more_steps_than_there_are(corpus, capsys):
    """The profile begins earlier and is shorter, so that there is one, and says which steps it
    holds. A run that is stopped before has none; in the middle, it has the steps so far."""
    for steps, stop_at, first, last in ((2, None, 2, 2), (6, 2, None, None), (6, 4, 4, 4)):
        s = job(corpus, steps=steps, profile=9)
        train.train(s, stop_at=stop_at)
        tables = re.findall(r"profile of steps (\d+) to (\d+), cpu time\n", capsys.readouterr().out)
        traces = [path.name for path in Path(s.out).glob("trace-*")]
        assert tables == [(str(first), str(last))] * (first is not None)
        assert traces == [f"trace-step-{first}-rank-0.json"] * (first is not None)


# --------------------------------------------------------------------------------------------------
# The sample


@pytest.mark.parametrize("room", [1, 6, 7, 32])
def test_the_sample_of_the_default_corpus_begins_as_code(monkeypatch, capsys, room):
    """Of Python's own source the model continues a function's first line; of another text it
    begins a document. Rows too short for that have no sample."""
    asked = []
    model = FLM(CONFIG.replace(max_seq_len=room))
    monkeypatch.setattr(watch, "load_model", lambda folder: (model, {}))
    note = lambda *args, **options: asked.append((args[2][0], options["max_new_tokens"]))
    monkeypatch.setattr(watch, "continue_texts", note)
    for text in (None, "corpora/mine"):
        watch.print_sample("run", train.Settings(data=text))
    prompts = [prompt for prompt, _ in asked]
    assert prompts == ["\n\ndef "] * (room > 6) + [""] * (room > 1)
    assert all(max(1, len(prompt)) + new == room for prompt, new in asked)
    assert capsys.readouterr().out.count("A sample") == len(asked)
