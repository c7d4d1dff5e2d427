"""What a run promises about stopping and going on: N steps straight are k steps, a stop and N - k
more."""

# ruff: noqa: F401, F811 (pytest finds fixtures by their names)

import contextlib
import dataclasses
import io
import itertools
import json
import os
import random
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from workshop import (
    CONFIG,
    SIZE,
    T,
    assert_same_run,
    contents,
    corpus,
    equal,
    few,
    flags,
    go_on,
    job,
    log,
    other_corpus,
    relabel,
    steps_of,
    workshop,
    write_stages,
)

import data
import run_folder
import sample
import train
from checkpoint import find_checkpoint, load_model
from settings import Settings
from train import main

# --------------------------------------------------------------------------------------------------
# Exact resume


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"micro_batch": 1},
        {"micro_batch": 2, "teacher_fraction": 0.5},
        {"dtype": "bfloat16"},
        {"stages": "stages.json"},
        {"dtype": "float64", "batch_size": 3, "micro_batch": 1, "teacher_fraction": 0.3},
    ],
    ids=["plain", "accumulation", "teacher", "bfloat16", "growth", "float64"],
)
def test_resume_is_exact(corpus, changes):
    """N steps straight are k steps, a stop and N-k more, for any number of stops anywhere: weights,
    moments and the whole log, but for its times. So also where the model grows after step 2 and its
    mask opens until step 4."""
    write_stages(start=8, ramp=8, warmup=4)
    straight = train.train(job(corpus, **changes))
    before = contents(straight["folder"])

    @few(3)
    @given(st.sets(st.integers(1, 5), min_size=1, max_size=3))
    def check(stops):
        first, *others = sorted(stops)
        folder = train.train(job(corpus, **changes), stop_at=first)["folder"]
        assert steps_of(folder)[-1] == f"step-{first:08d}"
        for stop in [*others, None]:
            last = go_on(folder, stop)
        assert_same_run(folder, straight["folder"])
        assert last | {"folder": 0} == straight | {"folder": 0}

    check()
    assert (
        before["step"] == 6 and len(before) > 6 * 3 * CONFIG.n_layers
    )  # it did compare weights and two moments


def test_a_run_depends_on_its_seed_and_on_nothing_before_it(corpus):
    """Two runs of the same settings are equal whatever ran in between, and another seed gives
    another run."""
    one = train.train(job(corpus))["folder"]
    torch.rand(7)
    np.random.rand(7)
    assert_same_run(one, train.train(job(corpus))["folder"])
    other = train.train(job(corpus, seed=1))["folder"]
    assert not equal(contents(one), contents(other)) and log(one) != log(other)


def test_deterministic_changes_nothing_on_a_cpu(corpus, monkeypatch):
    """--deterministic asks for what a CPU does anyway."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # so that it is taken back
    try:
        one = train.train(job(corpus, deterministic=True))["folder"]
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(one, train.train(job(corpus))["folder"])


def crashes(monkeypatch, owner, name, call):
    """The function owner.name dies when it is called the `call`-th time."""
    real, calls = getattr(owner, name), itertools.count(1)

    def dies(*args, **options):
        if next(calls) == call:
            raise RuntimeError("power cut")
        return real(*args, **options)

    monkeypatch.setattr(owner, name, dies)


@pytest.mark.parametrize("call", [1, 3, 4, 5, 6])
def test_resume_after_a_crash_forgets_what_came_after_the_checkpoint(corpus, monkeypatch, call):
    """A run that dies between two checkpoints goes on from the last one: what its log said of later
    steps is dropped and written again, also where its last line was cut off."""
    straight = train.train(job(corpus))["folder"]
    s = job(corpus)
    with monkeypatch.context() as patch:
        crashes(patch, data.Corpus, "batch_ahead", call)
        with pytest.raises(RuntimeError, match="power cut"):
            train.train(s)
    with open(Path(s.out) / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "sam')
    go_on(s.out)
    assert_same_run(s.out, straight)


@pytest.mark.parametrize("call", [3, 4, 5, 6])
def test_resume_after_a_crash_around_a_growth(corpus, monkeypatch, call):
    """The same where the model grows at a checkpoint: the growth is done again, and stands in the
    log once."""
    write_stages(start=8, ramp=8)
    straight, s = (
        train.train(job(corpus, stages="stages.json"))["folder"],
        job(corpus, stages="stages.json"),
    )
    with monkeypatch.context() as patch:
        crashes(patch, data.Corpus, "batch_ahead", call)
        with pytest.raises(RuntimeError, match="power cut"):
            train.train(s)
    go_on(s.out)
    assert sum("grown" in line for line in log(s.out)) == 1
    assert_same_run(s.out, straight)


def test_growth_in_a_run_keeps_the_loss(corpus):
    """The log holds the held-out loss before and after a growth of all dimensions: equal, in
    float64 to rounding; in a bf16 run both are computed in fp32, and equal to its rounding."""
    write_stages(start=8, ramp=8)
    for dtype, tolerance in (("float64", 1e-12), ("bfloat16", 1e-5)):
        run = train.train(job(corpus, stages="stages.json", dtype=dtype, steps=4))["folder"]
        (grown,) = (line for line in log(run) if "grown" in line)
        assert (grown["step"], grown["samples"], grown["grown"]) == (2, 8, CONFIG.to_dict())
        assert grown["loss_after"] == pytest.approx(grown["loss_before"], rel=tolerance)
        assert load_model(run)[0].config == CONFIG


def test_an_evaluation_is_not_lost_between_checkpoint_and_log(corpus, monkeypatch):
    """Where a checkpoint and an evaluation fall on the same step, a run that dies during the
    evaluation and goes on has it in its log like an undisturbed run."""
    straight = train.train(job(corpus, eval_every=2))["folder"]
    s = job(corpus, eval_every=2)
    with monkeypatch.context() as patch:
        crashes(patch, train, "evaluate", 2)
        with pytest.raises(RuntimeError, match="power cut"):
            train.train(s)
    go_on(s.out)
    assert_same_run(s.out, straight)


@pytest.mark.parametrize("stages", ["none", None])
def test_a_new_run_from_a_checkpoint(corpus, stages):
    """--init-from begins a new run with a checkpoint's model, moments and place in the data. With a
    learning rate that never changes, its first steps are therefore the old run's next ones: the
    same weights and moments. It takes no more than the checkpoint and what a run needs anyway: the
    preset's own stages are for its own model."""
    constant = dict(min_lr=1.0, warmup=0)
    old = train.train(job(corpus, **constant, model=SIZE + ("n_layers=3",), keep=9))["folder"]
    s = job(corpus, **constant, model=(), steps=3, stages=stages, init_from=f"{old}/step-00000002")
    new = train.train(s, stop_at=2)["folder"]
    go_on(new)
    assert [line["samples"] for line in log(new) if "loss" in line] == [12, 16, 20]
    found, expected = contents(f"{new}/step-00000002"), contents(f"{old}/step-00000004")
    assert equal(
        {k: x for k, x in found.items() if k != "step"},
        {k: x for k, x in expected.items() if k != "step"},
    )


def test_a_checkpoint_is_never_cut_to_fit(corpus):
    """A schedule that begins with another model than the checkpoint's is refused; no layer is left
    out in silence."""
    old = train.train(job(corpus), stop_at=1)["folder"]
    Path("stages.json").write_text(json.dumps([{"config": {"n_layers": 1}}]))
    with pytest.raises(ValueError, match="n_layers"):
        train.train(job(corpus, model=(), stages="stages.json", init_from=old))


# --------------------------------------------------------------------------------------------------
# Going on


def test_main_prints_what_to_type_next_and_it_works(corpus, capsys):
    """A finished run shows a sample and what one may want next: sample, go on, own text. The first
    two are run here; the second goes on to twice the steps."""
    assert main(flags(job(corpus, out=None))) == 0
    out = capsys.readouterr().out
    assert "training runs/demo\n" in out and "muP on" in out
    assert "A sample, from the start of a new document:" in out
    commands = re.findall(r"python \w+\.py .*", out)
    assert [line.split()[1] for line in commands] == [
        "sample.py",
        "train.py",
        "data.py",
        "train.py",
    ]
    assert main(shlex.split(commands[1])[2:]) == 0
    out = capsys.readouterr().out
    assert "going on with runs/demo" in out
    assert "--steps is now 12: the learning rate follows the new schedule from here on" in out
    last = log("runs/demo")[-2]
    assert last["step"] == 12 and last["lr"] == pytest.approx(3e-3 * 0.015)
    assert sample.main(shlex.split(commands[0])[2:] + ["--max-new-tokens", "3"]) == 0


@few(6)
@given(
    steps=st.integers(3, 9),
    size=st.integers(1, 4),
    later=st.lists(
        st.fixed_dictionaries({"batch_size": st.integers(1, 5), "ramp": st.integers(0, 5)}),
        max_size=2,
    ),
    gap=st.integers(4, 9),
)
def test_every_printed_command_is_accepted(corpus, tmp_path, steps, size, later, gap):
    """Whatever stages a run has, with batches of their own: it does --steps steps, and goes on to
    as many as the printed command names. What does not fit is refused with a number of steps, or a
    start of a stage, that mends it."""
    sizes = [{"n_layers": 2}, {"n_layers": 2, "d_ff": 96}]
    stages = [{"config": CONFIG.to_dict() | {"n_layers": 1}}]
    for number, stage in enumerate(later):
        stages.append({"config": sizes[number], "start": (number + 1) * gap, **stage})
    s = job(corpus, model=(), batch_size=size, steps=steps, stages="stages.json")
    line, done, refused = flags(s), [], 0
    while len(done) < 2:
        Path("stages.json").write_text(json.dumps(stages))
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                assert main(line) == 0
        except ValueError as error:
            refused += 1
            assert refused < 5 and not done, error
            s = follow_advice(str(error), stages, s)
            line = flags(s)
            continue
        asked = int(line[line.index("--steps") + 1])
        lines = [x for x in log(s.out) if "loss" in x]
        assert [x["step"] for x in lines] == [*range(1, asked + 1)]
        assert not done or asked > done[-1]
        done.append(asked)
        line = shlex.split(re.search(r"train\.py (--resume .*)", out.getvalue())[1])


def follow_advice(message: str, stages: list[dict], s: Settings) -> Settings:
    """What a user types who takes a refusal at its word: other starts in the file of stages, or
    another number of steps."""
    starts = re.findall(r'stage (\d+)\b.*?"start": (\d+)', message, re.S)
    for number, start in starts:
        stages[int(number) - 1]["start"] = int(start)
    steps = re.search(r"ask for --steps (\d+) or more", message)
    assert starts or steps, message
    return dataclasses.replace(s, steps=int(steps[1])) if steps else s


def test_resume_of_a_finished_run_says_what_to_type(corpus):
    """There is nothing to go on with: the error gives the command that asks for more."""
    run = train.train(job(corpus))["folder"]
    for line in ([], ["--steps", "6"], ["--steps", "5"]):
        with pytest.raises(
            ValueError,
            match=f"{run} has done its 6 steps: ask for more, as in --resume {run} --steps 12$",
        ):
            main(["--resume", run, *line])
    assert log(run)[-1]["step"] == 6


def test_resume_refuses_what_a_run_fixes(corpus):
    """All changes of what a run fixes are named with both values, and nothing happens. The run's
    own values may be given."""
    s = job(corpus)
    train.train(s, stop_at=3)
    before = contents(s.out), log(s.out)
    with pytest.raises(ValueError, match="start a new one") as caught:
        main(
            [
                "--resume",
                s.out,
                "--batch-size",
                "8",
                "--seed",
                "7",
                "--preset",
                "flm-16b",
                "--mup",
                "off",
                "--steps",
                "9",
            ]
        )
    assert set(str(caught.value).splitlines()[1:]) == {
        "  --batch-size 8: this run has 4",
        "  --seed 7: this run has 0",
        "  --preset flm-16b: this run has demo",
        "  --mup off: this run has on",
    }
    assert equal(contents(s.out), before[0]) and log(s.out) == before[1]
    assert main(["--resume", s.out, "--batch-size", "4", "--model", *SIZE]) == 0
    assert log(s.out)[-1]["step"] == 6


def test_resume_takes_what_may_change(corpus, other_corpus):
    """Steps, learning rate, clip, data and what watches and keeps may change; the new values are
    used and kept."""
    s = job(corpus)
    train.train(s, stop_at=2)
    changes = dict(steps=8, lr=1e-4, min_lr=0.5, eval_rows=2, eval_every=1, keep=1)
    go_on(s.out, **changes, data=other_corpus, data_changed=True)
    kept, lines = run_folder.read_run(Path(s.out))[0], log(s.out)
    assert (kept.steps, kept.lr, kept.min_lr, kept.keep, kept.data) == (
        8,
        1e-4,
        0.5,
        1,
        other_corpus,
    )
    assert lines[-2]["step"] == 8 and lines[-2]["lr"] == pytest.approx(0.5e-4)
    assert [line["val_tokens"] for line in lines if "val_tokens" in line] == [2 * T] * 6
    assert steps_of(s.out) == ["step-00000008"]


def test_resume_checks_what_changes(corpus):
    """A changed setting is held to the same constraints, all of them at once."""
    s = job(corpus)
    train.train(s, stop_at=2)
    with pytest.raises(ValueError) as caught:
        main(["--resume", s.out, "--keep", "0", "--lr", "-1"])
    assert "--keep 0: must be at least 1" in str(
        caught.value
    ) and "--lr -1.0: must be a number above 0" in str(caught.value)


@pytest.mark.parametrize(
    "damage", ["cut off", "missing", "no metadata", "json cut off", "another format"]
)
def test_a_damaged_newest_checkpoint_is_named(corpus, damage):
    """Going on from a damaged checkpoint, or reading it at all, is refused with its name and what
    is wrong. With it out of the way, the one before takes over, exactly."""
    s = job(corpus)
    train.train(s, stop_at=4)
    newest = find_checkpoint(s.out)
    tensors = next(newest.glob("*.distcp"))
    size = tensors.stat().st_size
    if damage == "cut off":
        os.truncate(tensors, size - 1)
        words = rf"cut off or damaged(?s:.*)\n  {tensors.name}: {size:,} bytes expected, "
        words += f"{size - 1:,} found"
    elif damage == "missing":
        tensors.unlink()
        words = rf"cut off or damaged(?s:.*)\n  {tensors.name}: {size:,} bytes expected, missing"
    elif damage == "no metadata":
        (newest / ".metadata").unlink()
        words = r"cut off or damaged(?s:.*)\n  \.metadata: .* missing"
    elif damage == "json cut off":
        os.truncate(newest / "checkpoint.json", 99)
        words = "checkpoint.json is not readable JSON .* cut off or edited"
    else:
        relabel(s.out, format=99)
        words = "has checkpoint format 99, this code reads 1"
    before = (Path(s.out) / "metrics.jsonl").read_text()
    for line in (["--resume", s.out], ["--eval-only", s.out]):
        with pytest.raises(ValueError, match=words) as caught:
            main(line)
        assert str(newest) in str(caught.value)
    assert (Path(s.out) / "metrics.jsonl").read_text() == before
    shutil.rmtree(newest)
    go_on(s.out)
    assert_same_run(s.out, train.train(job(corpus))["folder"])


def test_damaged_numbers_of_the_right_size_are_noticed(corpus):
    """A checkpoint whose tensors are overwritten with noise of the same length is refused as a
    whole, not half used."""
    s = job(corpus)
    train.train(s, stop_at=4)
    tensors = next(find_checkpoint(s.out).glob("*.distcp"))
    tensors.write_bytes(random.Random(0).randbytes(tensors.stat().st_size))
    with pytest.raises(ValueError, match=str(find_checkpoint(s.out))):
        main(["--resume", s.out])


def test_a_checkpoint_of_another_shape_is_refused(corpus):
    """A checkpoint of another model, here a narrower one put in the run's place, is refused by
    name, and so are tensors of another shape under the right configuration."""
    s, narrow = job(corpus), job(corpus, model=SIZE + ("d_ff=32",))
    train.train(s, stop_at=2)
    train.train(narrow, stop_at=2)
    shutil.rmtree(find_checkpoint(s.out))
    shutil.copytree(find_checkpoint(narrow.out), Path(s.out) / "step-00000002")
    with pytest.raises(ValueError, match=f"{s.out}/step-00000002 holds another model than stage 1"):
        main(["--resume", s.out])
    relabel(s.out, config=run_folder.read_run(s.out)[1][0].config.to_dict())
    with pytest.raises(ValueError, match=f"{s.out}/step-00000002 does not hold these tensors"):
        main(["--resume", s.out])


def test_resume_refuses_text_of_another_tokenizer(corpus):
    """A run that learned one tokenizer's ids does not go on with another's."""
    s = job(corpus)
    train.train(s, stop_at=2)
    relabel(s.out, tokenizer="cl100k_base")
    with pytest.raises(ValueError, match="bytes.*cl100k_base|cl100k_base.*bytes"):
        main(["--resume", s.out])


@pytest.mark.parametrize(
    "what",
    [
        "nothing",
        "empty folder",
        "file",
        "not JSON",
        "other JSON",
        "a list",
        "numbers that do not fit",
    ],
)
def test_resume_of_what_is_no_run(what, tmp_path):
    """The error names the folder and says that it is no run; nothing is made in it."""
    if what == "file":
        Path("run").write_text("")
    elif what != "nothing":
        Path("run").mkdir()
    if "JSON" in what or what in ("a list", "numbers that do not fit"):
        unfit = {"settings": {}, "stages": [{"config": CONFIG.to_dict() | {"head_dim": 3}}]}
        text = {"not JSON": "{", "other JSON": '{"settings": 5, "stages": 7}', "a list": "[]"}.get(
            what, json.dumps(unfit)
        )
        Path("run/config.json").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="^run is not the folder of a run"):
        main(["--resume", "run"])
    assert sorted(tmp_path.rglob("*")) == before
