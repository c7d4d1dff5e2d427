"""Numbers that are not finite: no sound weight is lost, and the words are true."""

# ruff: noqa: F401, F811 (pytest finds fixtures by their names)
import dataclasses
import itertools
import math
import re
import shlex
import time
from pathlib import Path

import pytest
import torch
from workshop import (
    CONFIG,
    assert_same_run,
    contents,
    corpus,
    equal,
    flags,
    go_on,
    job,
    log,
    steps_of,
    workshop,
)

import muP
import parallel
import train
from checkpoint import StepWriter, find_checkpoint, load_model
from flm import FLM
from train import main

# --------------------------------------------------------------------------------------------------
# Numbers that are not finite


def newest(folder) -> str:
    return find_checkpoint(folder).name


def test_a_wild_learning_rate_stops_before_the_step(corpus):
    """A learning rate of 1e30 ruins the weights in step 1, so step 2 has no finite loss. The run
    stops before that update and says which step, what was not finite and what to try. The ruined
    weights are not saved: the checkpoint that is named is the one before them, and it is sound."""
    s = job(corpus, lr=1e30, warmup=0)
    words = r"step 2 stopped before the optimizer: loss \S+, gradient norm (nan|inf)"
    with pytest.raises(train.NonFinite, match=words) as caught:
        main(flags(s))
    for words in (
        f"is {s.out}/step-00000000;",
        "(now 1e+30)",
        "--warmup (now 0 samples)",
        "float32",
    ):
        assert words in str(caught.value)
    assert steps_of(s.out) == ["step-00000000"] and [line["step"] for line in log(s.out)] == [1]
    model, _ = load_model(s.out)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_advice_after_a_divergence_works(corpus):
    """A run that went well for four steps is ruined by the learning rate of the fifth. The command
    that is then printed goes on from the checkpoint before, with a learning rate that serves."""
    s = job(corpus, steps=4, warmup=0, min_lr=1.0)
    train.train(s)
    command = ["--resume", s.out, "--steps", "12", "--lr", "1e30"]
    for tries in itertools.count():  # each advice is a tenth of the learning rate before
        try:
            assert main(command) == 0
            break
        except train.NonFinite as error:
            assert newest(s.out) == "step-00000004"
            command = shlex.split(re.search(r"python train\.py (--resume .*)", str(error))[1])
    assert tries > 0
    lines = [line for line in log(s.out) if "loss" in line]
    assert [line["step"] for line in lines] == [*range(1, 13)]
    assert all(math.isfinite(line["loss"]) for line in lines)


@pytest.mark.parametrize("keep", [1, 3])
def test_ruined_weights_never_replace_sound_ones(corpus, monkeypatch, keep):
    """The weights of step 4 are ruined and saved before anybody can know it; their write goes on
    when step 5 shows it. Whatever --keep says, the last checkpoint with a finite loss is still
    there, and is the newest one now."""
    s, real, real_write = job(corpus, keep=keep), train.update, StepWriter.write_data

    def write_slowly(writer, *args):
        time.sleep(0.2 if writer.folder.name == "step-00000004" else 0)
        return real_write(writer, *args)

    def ruin(worker, optimizer, clip, lr, *numbers):
        found = real(worker, optimizer, clip, lr, *numbers)
        if optimizer.state[worker.named[0][1]]["step"] == 4:
            with torch.no_grad():
                worker.named[0][1].fill_(math.nan)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(train, "update", ruin)
        patch.setattr(StepWriter, "write_data", write_slowly)
        with pytest.raises(train.NonFinite, match="step 5 stopped.*loss nan") as caught:
            train.train(s)
    sound, ruined = f"{s.out}/step-00000002", f"{s.out}/step-00000004.diverged-1"
    assert f"newest sound checkpoint is {sound};" in str(caught.value)
    assert newest(s.out) == "step-00000002" and Path(ruined).is_dir()
    go_on(s.out)
    assert_same_run(s.out, train.train(job(corpus))["folder"])
    assert Path(ruined).is_dir()


def test_a_held_out_loss_that_is_not_finite_stops_the_run(corpus, monkeypatch):
    """Weights that are ruined in the very last step have no next step that would show it. The
    evaluation does."""
    s, real = job(corpus), train.evaluate

    def poisoned(worker, *args):
        return real(worker, *args) | {"val_loss": math.inf}

    monkeypatch.setattr(train, "evaluate", poisoned)
    with pytest.raises(train.NonFinite, match="held-out loss inf after step 3"):
        train.train(s)
    assert newest(s.out) == "step-00000002"


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_one_bad_number_stops_before_the_step(corpus, monkeypatch, what):
    """A single infinite gradient under a finite loss, or a NaN loss, in step 4: no weight and no
    moment changes. Once the cause is gone, the run goes on from the checkpoint before, as if
    nothing had been."""
    s, real, calls = job(corpus), parallel.Worker.gradients, itertools.count(1)
    before = []

    def poisoned(worker, *args, **cut):
        nats, count = real(worker, *args, **cut)
        if next(calls) != 4:
            return nats, count
        before.extend((p, p.detach().clone()) for _, p in worker.named)
        if what == "loss":
            return math.nan, count
        worker.parts[0].layers["1"].ff.up.bias.grad[3] = math.inf
        return nats, count

    with monkeypatch.context() as patch:
        patch.setattr(parallel.Worker, "gradients", poisoned)
        words = "step 4 .*loss nan" if what == "loss" else "step 4 .*gradient norm (inf|nan)"
        with pytest.raises(train.NonFinite, match=words):
            train.train(s)
    assert before and all(torch.equal(p, copy) for p, copy in before)
    assert equal(contents(s.out), contents(train.train(job(corpus), stop_at=2)["folder"]))
    go_on(s.out)
    assert_same_run(s.out, train.train(job(corpus))["folder"])


def test_a_poisoned_weight_stops_the_first_step(corpus, monkeypatch):
    """A weight that is not a number is found in the first step; the checkpoint holds that weight,
    and otherwise the initial ones."""
    real = parallel.Worker.init_weights

    def poisoned(worker, seed):
        real(worker, seed)
        with torch.no_grad():
            worker.parts[0].layers["0"].ff.down.weight[0, 0] = math.nan

    monkeypatch.setattr(parallel.Worker, "init_weights", poisoned)
    s = job(corpus)
    with pytest.raises(train.NonFinite, match="step 1 stopped"):
        train.train(s)
    kept, initial = contents(s.out), dict(muP.init_weights(FLM(CONFIG), 0).named_parameters())
    assert sum(int((kept[f"model/{name}"] != p).sum()) for name, p in initial.items()) == 1
    assert torch.isnan(kept["model/layers.0.ff.down.weight"][0, 0])
