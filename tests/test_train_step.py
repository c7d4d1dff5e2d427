"""One step of training, held against slow independent programs."""

# ruff: noqa: F401, F811 (pytest finds fixtures by their names)

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
    float64_model,
    job,
    log,
    token_nats,
    workshop,
)

import data
import muP
import parallel
import train
from flm import FLM, IGNORE
from schedule import learning_rate

# --------------------------------------------------------------------------------------------------
# One step


def alone(model, dtype=torch.float64):
    return parallel.Worker([model], parallel.World(), dtype)


def gradients(model, tokens, targets, micro):
    """Adds the gradient of the batch's mean loss to .grad; returns the loss."""
    nats, count = alone(model).gradients(tokens, targets, micro)
    return nats / count


def batch_with_teacher_rows(folder, n=6):
    tokens, targets = data.Corpus(folder, T).batch(0, 0, n, teacher_fraction=0.5)
    counts = (targets != IGNORE).sum(1)
    assert (
        len(set(counts.tolist())) > 2
    )  # rows differ in their supervised tokens, or the test would show little
    return tokens, targets


def test_loss_is_the_mean_over_supervised_tokens(corpus):
    """The loss of a batch is the sum over its supervised tokens, taken one at a time, divided once
    by their number. In float64, rounding is about 1e-15 of it."""
    tokens, targets = batch_with_teacher_rows(corpus)
    model = float64_model(std=0.1)
    nats = [value for _, _, value in token_nats(model, tokens, targets)]
    loss = gradients(model, tokens, targets, len(tokens))
    assert loss == pytest.approx(math.fsum(nats) / len(nats), rel=1e-13)
    assert len(nats) == int((targets != IGNORE).sum())


@few(6)
@given(micro=st.integers(1, 6), seed=st.integers(0, 99))
def test_accumulated_gradients_are_those_of_the_whole_batch(corpus, micro, seed):
    """Any split into micro-batches, of rows with uneven numbers of labels, gives the gradient of
    PyTorch's mean cross-entropy over the whole batch's logits, but for rounding (1e-12 of the
    largest entry, in float64)."""
    tokens, targets = batch_with_teacher_rows(corpus)
    model, plain = float64_model(seed, std=0.1), float64_model(seed, std=0.1)
    loss = gradients(model, tokens, targets, micro)
    expected = F.cross_entropy(plain(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(
            p.grad, q.grad, rtol=0, atol=1e-12 * q.grad.abs().max().item() + 1e-16, msg=name
        )


def test_updates_are_adamw(corpus):
    """Several steps equal AdamW written from its paper, in float64 to 1e-10: clipping of the whole
    gradient, bias correction, decay of matrices only and apart from the gradient, muP's learning
    rates (lr / m for a block's matrices, whose decay per step does not depend on m). Both clipped
    and unclipped steps occur."""
    s, stages = train.resolve(job(corpus, weight_decay=0.3, lr=1e-3))
    model = float64_model()
    optimizer = train.make_optimizer(alone(model), s)
    source = data.Corpus(corpus, T)
    mine = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    first = {name: np.zeros_like(p) for name, p in mine.items()}
    second = {name: np.zeros_like(p) for name, p in mine.items()}
    m = {
        "qkv.weight": 32 / 256,
        "up.weight": 32 / 256,
        "o.weight": 2 * 16 / 256,
        "down.weight": 64 / 1024,
    }
    clipped = []
    for step in range(1, 7):
        loss = gradients(model, *source.batch(0, 4 * step, 4), 4)
        for p in model.parameters():
            p.grad *= 10.0 ** random.Random(step).choice((-2, 2))
        g = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        clipped.append(norm > 1)
        scale = min(1.0, 1 / (norm + 1e-6))  # 1e-6: PyTorch's guard against a norm of zero
        lr = learning_rate(stages, 4 * step, s.min_lr)
        for name, p in mine.items():
            first[name] = 0.9 * first[name] + 0.1 * g[name] * scale
            second[name] = 0.95 * second[name] + 0.05 * (g[name] * scale) ** 2
            ratio = next((value for key, value in m.items() if name.endswith(key)), 1.0)
            decayed = p.ndim == 2
            p -= lr * 0.3 * p * decayed
            p -= (
                lr
                / ratio
                * (first[name] / (1 - 0.9**step))
                / (np.sqrt(second[name] / (1 - 0.95**step)) + 1e-8)
            )
        assert train.update(alone(model), optimizer, 1.0, lr, loss, 1)[1] == pytest.approx(
            norm, rel=1e-12
        )
        assert all(p.grad is None for p in model.parameters())
        for name, p in model.named_parameters():
            np.testing.assert_allclose(
                p.detach().numpy(), mine[name], rtol=0, atol=1e-10, err_msg=name
            )
    assert len(set(clipped)) == 2


def test_bf16_computes_in_bf16_over_fp32_weights(corpus):
    """With --dtype bfloat16 matrix products round to bf16 (3 decimal digits), so the loss is near
    the fp32 one and not equal to it; weights and moments are fp32."""
    near, exact = (
        log(train.train(job(corpus, dtype=dtype))["folder"])[0]["loss"]
        for dtype in ("bfloat16", "float32")
    )
    assert near != exact and near == pytest.approx(exact, rel=2e-2)
    kept = contents(train.train(job(corpus, dtype="bfloat16"))["folder"])
    assert {x.dtype for x in kept.values() if torch.is_tensor(x)} == {torch.float32}


def test_mup_at_the_base_width_is_the_standard_parametrization(corpus):
    """Where every width is the base's, muP on and off train the same weights to the last bit;
    elsewhere they do not."""
    runs = {}
    for base in (32, 64):
        for mup in ("on", "off"):
            size = SIZE + ("d_ff=128", f"mup_base_width={base}")
            runs[base, mup] = train.train(job(corpus, model=size, mup=mup))["folder"]
    assert_same_run(runs[32, "on"], runs[32, "off"])
    assert not equal(contents(runs[64, "on"]), contents(runs[64, "off"]))


def test_mup_by_its_other_name(corpus):
    """--model mup=false, which names the model's field, means --mup off."""
    runs = [
        train.train(job(corpus, **given))["folder"]
        for given in ({"mup": "off"}, {"model": SIZE + ("mup=false",)})
    ]
    assert_same_run(*runs)


def test_the_log_says_what_was_done(corpus):
    """Each step's line: samples so far, the number of supervised targets (counted here in the batch
    itself), the learning rate that the step ended with, and a first loss that is the initial
    model's. Evaluations stand between them, and at the end."""
    s = job(corpus, teacher_fraction=0.5, eval_every=4)
    train.train(s)
    lines, source = log(s.out), data.Corpus(corpus, T)
    assert [line["step"] for line in lines if "val_loss" in line] == [4, 6] and "val_loss" in lines[
        -1
    ]
    lines = [line for line in lines if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for step, line in enumerate(lines, 1):
        targets = source.batch(0, 4 * step - 4, 4, teacher_fraction=0.5)[1]
        assert line["supervised"] == int((targets != IGNORE).sum()) < 4 * T
        assert line["samples"] == 4 * step
        cosine = 0.015 + 0.985 * (1 + math.cos(math.pi * (step - 2) / 4)) / 2
        assert line["lr"] == pytest.approx(3e-3 * (step / 2 if step < 2 else cosine))
    nats = [
        n
        for _, _, n in token_nats(
            muP.init_weights(FLM(CONFIG), 0), *source.batch(0, 0, 4, teacher_fraction=0.5)
        )
    ]
    assert lines[0]["loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)  # fp32
