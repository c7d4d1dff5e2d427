"""The answers to the exercises of tutorials/02-training.md."""

import argparse
import inspect
import json
import math
import shutil

import pytest
import torch

import data
import muP
import parallel
import train
from flm import FLM, IGNORE, PRESETS
from schedule import learning_rate
from settings import Settings, resolve


def test_02_exercise_1_before_the_first_step():
    """The head is the embedding. Before training the residual stream is little more than the
    current token's embedding, so the likeliest next token is the current one again. Code has long
    runs of spaces, where that is right: a repeated byte costs far less than log 288 = 5.66 nats,
    any other one a little more. Untied, the two have nothing in common: the loss is log 288 and a
    little more, for random logits are confident about random bytes."""
    source = inspect.getsource(argparse).encode()[: 8 * 257]
    rows = torch.tensor(list(source)).view(8, 257)
    x, y = rows[:, :-1], rows[:, 1:]
    repeated = x == y
    assert repeated.float().mean() > 0.05
    nats = {}
    for tied in True, False:
        model = muP.init_weights(
            FLM(PRESETS["demo"].replace(n_layers=2, tie_embeddings=tied)), seed=0
        )
        with torch.no_grad():
            nats[tied] = -model(x).log_softmax(-1).gather(-1, y[..., None])[..., 0]
    blind = math.log(288)
    assert nats[True].mean() < blind - 0.05
    assert (
        nats[True][repeated].mean() < blind - 1 and blind < nats[True][~repeated].mean() < blind + 1
    )
    assert blind < nats[False].mean() < blind + 0.5


def test_02_exercise_2_mean_of_means():
    """The batch's loss is (256 * 2.0 + 8 * 5.0) / 264 = 2.091 nats. The mean of means is (2.0 +
    5.0) / 2 = 3.5, in which a teacher token weighs 256 / 8 = 32 times as much as a language token.
    parallel.Worker.gradients divides once."""
    nats = torch.cat([torch.full((256,), 2.0), torch.full((8,), 5.0)]).requires_grad_()
    once, means = nats.mean(), (nats[:256].mean() + nats[256:].mean()) / 2
    assert once.item() == pytest.approx(2.091, abs=5e-4) and means.item() == pytest.approx(3.5)
    (weight,) = torch.autograd.grad(means, nats)
    assert weight[-1] / weight[0] == pytest.approx(32)
    (weight,) = torch.autograd.grad(once, nats)
    assert weight[-1] == weight[0]

    model = muP.init_weights(FLM(PRESETS["demo"].replace(n_layers=1, max_seq_len=256)), seed=0)
    worker = parallel.Worker([model], parallel.World(), torch.float32)
    rows = torch.randint(256, (2, 257), generator=torch.Generator().manual_seed(0))
    x, y = rows[:, :-1], rows[:, 1:].clone()
    y[1, 8:] = IGNORE
    with torch.no_grad():
        expected = (model(x, y) / 264).item()
    for micro in 1, 2:
        nats, count = worker.gradients(x, y, micro)
        assert count == 264 and nats / count == pytest.approx(expected, rel=1e-5)  # fp32 sums


def test_02_exercise_3_the_same_learning_rate():
    """--steps 300 and the same --warmup: the schedule counts samples, its length is steps *
    batch_size, and the warm-up is in samples already. Sample s is the same row for every batch
    size. (The training is another one, with twice as many updates of half the data; --micro-batch 8
    would keep that too.)"""

    def rate(samples, **given):
        s, stages = resolve(Settings(stages="none", lr=3e-3, **given))
        return learning_rate(stages, samples, s.min_lr)

    for samples in range(16, 150 * 16 + 1, 16):
        assert rate(samples, steps=150, batch_size=16, warmup=400) == rate(
            samples, steps=300, batch_size=8, warmup=400
        )
    assert rate(160, steps=300, batch_size=8, warmup=200) != rate(
        160, steps=150, batch_size=16, warmup=400
    )


def test_02_exercise_3_the_same_rows(tmp_path):
    """Sample number s is the same row, however many are taken at a time."""
    (tmp_path / "plain.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} " * 200}) + "\n" for i in range(20))
    )
    data.prepare(
        {"plain": [tmp_path / "plain.jsonl"]},
        tmp_path / "tokens",
        data.get_tokenizer("bytes"),
        progress=False,
    )
    corpus = data.Corpus(tmp_path / "tokens", 32)
    one = corpus.batch(0, 0, 16)[0]
    two = torch.cat([corpus.batch(0, 0, 8)[0], corpus.batch(0, 8, 8)[0]])
    assert torch.equal(one, two)


def test_02_exercise_4_reading_table_1():
    """One cosine over all tokens would have come down to 5.1e-5 where the 51B stage begins and to
    1.3e-5 where the 101B stage does; the table prints 3.4e-4 and 2e-4. Nor does any other single
    cosine from 4e-4 to 6e-6 fit: the first rate asks for one over about 934 billion tokens, the
    second for one over about 555. So the schedule changed as the model grew; the paper says
    "approximately inherit", not how."""

    def rate(tokens, horizon):  # both in billions
        samples = horizon * 1e9 / 2048
        given = Settings(
            stages="none",
            steps=round(samples / 2304),
            batch_size=2304,
            lr=4e-4,
            warmup=4_608_000,
            min_lr=6e-6 / 4e-4,
        )
        s, stages = resolve(given)
        return learning_rate(stages, tokens * 1e9 / 2048, s.min_lr)

    begins_51b, begins_101b = 245.37, 245.37 + 39.64
    assert rate(begins_51b, 311.54) == pytest.approx(5.1e-5, rel=0.01)
    assert rate(begins_101b, 311.54) == pytest.approx(1.3e-5, rel=0.04)
    assert rate(begins_51b, 934) == pytest.approx(3.4e-4, rel=0.01)
    assert rate(begins_101b, 555) == pytest.approx(2e-4, rel=0.01)


def test_02_exercise_5_pulling_the_plug(tmp_path, monkeypatch):
    """The newest checkpoint is that of step 4. Resuming cuts the log back to it and computes steps
    5 and 6 a second time, with the same losses, so the log has every step once and equals that of a
    run that nobody killed."""
    monkeypatch.setattr(
        "machine.matmul_rate", lambda *_: 1e9
    )  # spares a second; only utilisation depends on it
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} " * 200}) + "\n" for i in range(20))
    )
    data.prepare(
        {"plain": [tmp_path / "plain.jsonl"]},
        "tokens",
        data.get_tokenizer("bytes"),
        val_fraction=0.2,
        progress=False,
    )
    job = dict(
        data="tokens",
        steps=8,
        batch_size=2,
        warmup=4,
        lr=3e-3,
        save_every=4,
        eval_rows=2,
        dtype="float32",
        model=("n_layers=1", "d_model=32", "n_heads=2", "head_dim=16", "d_ff=64", "max_seq_len=32"),
    )

    def losses(folder):
        lines = [
            json.loads(line)
            for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        ]
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    train.train(train.Settings(**job, out="straight"))
    train.train(train.Settings(**job, out="killed"), stop_at=6)
    shutil.rmtree(
        tmp_path / "killed" / "step-00000006"
    )  # a killed process would not have written this
    assert [step for step, _ in losses("killed")] == [1, 2, 3, 4, 5, 6]
    before = losses("killed")

    train.train(train.resumed("killed", {}), resume=True)
    assert losses("killed") == losses("straight") and losses("killed")[:6] == before
