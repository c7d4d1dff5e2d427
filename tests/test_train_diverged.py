"""Numbers that are not finite: no sound weight is lost, and the words are true."""

# ruff: noqa: F401, F811 (pytest finds fixtures by their names)

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from workshop import (
    CONFIG,
    assert_same_run,
    contents,
    corpus,
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
from flm import FLM
from train import main

# --------------------------------------------------------------------------------------------------
# Numbers that are not finite


def test_a_wild_learning_rate_stops_before_the_step(corpus, capsys):
    """A learning rate of 1e30 ruins the weights in step 1, so step 2 has no finite loss. It stops
    before its optimizer step, says which step, what was not finite and what to try; saved are the
    weights of step 1."""
    s = job(corpus, lr=1e30, warmup=0)
    words = r"step 2 stopped before the optimizer: loss \S+, gradient norm (nan|inf)"
    with pytest.raises(train.NonFinite, match=words) as caught:
        main(flags(s))
    for words in (s.out, "--lr (now 1e+30)", "--warmup (now 0 samples)", "--dtype float32"):
        assert words in str(caught.value)
    assert steps_of(s.out) == ["step-00000000", "step-00000001"] and [
        line["step"] for line in log(s.out)
    ] == [1]
    before = train.train(dataclasses.replace(s, out="before"), stop_at=1)["folder"]
    assert_same_run(s.out, before)
    assert Path("before", "metrics.jsonl").exists()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_one_bad_number_stops_before_the_step(corpus, monkeypatch, what):
    """A single infinite gradient under a finite loss, or a NaN loss, in step 3: no weight and no
    moment changes, and the run goes on as if nothing had been once the cause is gone."""
    s, real, calls = job(corpus), parallel.Worker.gradients, itertools.count(1)

    def poisoned(worker, *args):
        loss = real(worker, *args)
        if next(calls) != 4:
            return loss
        if what == "loss":
            return math.nan
        worker.parts[0].layers["1"].ff.up.bias.grad[3] = math.inf
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(parallel.Worker, "gradients", poisoned)
        words = "step 4 .*loss nan" if what == "loss" else "step 4 .*gradient norm (inf|nan)"
        with pytest.raises(train.NonFinite, match=words):
            train.train(s)
    assert_same_run(s.out, train.train(job(corpus), stop_at=3)["folder"])
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
