"""The answers to the exercises of tutorials/. A docstring states the answer; the code checks it."""
import argparse
import inspect
import json
import math
import shutil

import pytest
import torch

import data
import machine
import muP
import parallel
import train
from flm import FLM, IGNORE, PRESETS, FLMConfig, KVCache, forward_flops, xpos_tables

# ---- 01-model.md --------------------------------------------------------------------------------------------------

def test_01_exercise_1_half_life():
    """A pair fades by zeta ** (distance / 512), so to one half at 512 log 2 / -log zeta. The slowest pair of a 128-wide head
    (i = 63, zeta = 0.9888) gets there after 31,620 positions, the fastest (i = 0, zeta = 0.2857) after 283."""
    half_life = [512 * math.log(2) / -math.log((2 * i / 128 + 0.4) / 1.4) for i in (0, 63)]
    assert [round(d) for d in half_life] == [283, 31_620]

    size = xpos_tables(PRESETS["flm-101b"], 31_621).abs()            # (T, 2, D/2): queries, keys; the angle is left out
    for distance, pair in (283, 0), (31_620, 63):
        fading = size[distance, 0, pair] * size[0, 1, pair]          # query at that distance from a key at 0
        assert fading == pytest.approx(0.5, rel=2e-3)                # half a position off is 0.12% for the fastest pair


def test_01_exercise_2_six_days():
    """72 L C^2 (1 + T/6C) + 6 V C = 630.28 GFLOP a token. 192 GPUs at 165 TFLOP/s make 50,264 tokens a second, so 26.54
    billion tokens take 6.11 days. Table 1 prints 6.54, which is 4.34 against 4.06 billion tokens a day: 7% of the time is not
    in this count. Our sources do not say what it went into, nor whether the 165 count recomputed activations."""
    config, T = PRESETS["flm-101b"], 2048
    L, C, V = 80, 10240, 100_352
    per_token = 72 * L * C * C * (1 + T / (6 * C)) + 6 * V * C
    assert per_token == pytest.approx(3 * forward_flops(config, T)) and round(per_token / 1e9, 2) == 630.28
    per_second = 192 * 165e12 / per_token
    assert round(per_second) == 50_264
    days = 26.54e9 / per_second / 86_400
    assert round(days, 2) == 6.11
    assert round(per_second * 86_400 / 1e9, 2) == 4.34 and round(26.54 / 6.54, 2) == 4.06
    assert round(1 - days / 6.54, 2) == 0.07


def test_01_exercise_3_move_the_origin():
    """A constant origin cancels: with 0 instead of max_seq_len / 2 no logit changes, only the rounding. The limit becomes
    max_seq_len / 2 smaller (32,185 -> 31,161 for flm-101b), for the factors' range is the same on the far side and starts
    earlier. An origin that follows the length changes every logit that reads a key from before the length changed."""
    class AtZero(FLMConfig):
        xpos_origin = 0

    config = dict(n_layers=2, d_model=32, n_heads=2, head_dim=16, d_ff=64, vocab_size=64, max_seq_len=40)
    model, moved = (muP.init_weights(FLM(c), 0).double() for c in (FLMConfig(**config), AtZero(**config)))
    tokens = torch.randint(64, (1, 40), generator=torch.Generator().manual_seed(0))
    expected = model(tokens)
    assert (moved(tokens) - expected).abs().max() < 1e-12

    giant = PRESETS["flm-101b"]
    assert (giant.xpos_limit(), AtZero(**giant.to_dict()).xpos_limit()) == (32_185, 31_161)

    cache, logits = KVCache(model, 40), []
    for part in tokens.split(20, dim=1):                             # the origin follows: 10 for the first 20, then 20
        length = cache.length + 20
        cache.tables = xpos_tables(model.config.replace(max_seq_len=length), length, dtype=torch.float64)
        logits.append(model(part, cache=cache))
    off = (torch.cat(logits, 1) - expected).abs().amax(-1)[0]        # (T,)
    assert (off[:20] < 1e-12).all() and (off[20:] > 1e-6).all()


def test_01_exercise_4_the_cache_of_a_giant():
    """A key and a value of H D numbers for each layer and position: 2 * 80 * 80 * 128 * 2048 = 3,355,443,200 numbers, 6.7 GB
    in bf16, for one text."""
    with torch.device("meta"):
        model = FLM(PRESETS["flm-101b"], layers=range(1))            # one block; the other 79 are like it
    cache = KVCache(model, capacity=2048)
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long, device="meta"), cache=cache)      # the first token makes the slots
    count = 80 * sum(slots.numel() for layer in cache.kv.values() for slots in layer)
    assert count == 2 * 80 * 80 * 128 * 2048 == 3_355_443_200
    assert round(2 * count / 1e9, 1) == 6.7


def test_01_exercise_5_supervised_tokens(tmp_path):
    """An item is b + 1 + p + 4 + 1 tokens: text, newline, proposition, four bytes of emoji, end of text. A row of T targets
    holds T + 1 tokens, so k = (T + 1) // (b + p + 6) items; n items make ceil(n / k) rows; 4k of a full row's T targets are
    supervised, which is 4 / (b + p + 6) and a little less."""
    b, p, T, n = 20, 11, 128, 50
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 100}) + "\n" for i in range(8)))
    (tmp_path / "judged.jsonl").write_text("".join(
        json.dumps({"text": f"{i:0{b}}", "proposition": f"It is {i % 7:0{p - 6}}", "label": i % 2}) + "\n" for i in range(n)))
    meta = data.prepare({"plain": [tmp_path / "plain.jsonl"]}, tmp_path / "tokens", data.get_tokenizer("bytes"),
                        teacher=[tmp_path / "judged.jsonl"], val_fraction=0.2, progress=False)
    corpus = data.Corpus(tmp_path / "tokens", T)
    k = (T + 1) // (b + p + 6)
    assert k == 3
    for split in data.SPLITS:
        items = meta["teacher"][split]["documents"]
        assert corpus.n_rows(split, "teacher") == math.ceil(items / k)
    supervised = corpus.rows("train", "teacher", 0, 1)[1] != IGNORE
    assert supervised.sum() == 4 * k and 4 * k / T < 4 / (b + p + 6)


# ---- 02-training.md -----------------------------------------------------------------------------------------------

def test_02_exercise_1_before_the_first_step():
    """The head is the embedding. Before training the residual stream is little more than the current token's embedding, so
    the likeliest next token is the current one again. Code has long runs of spaces, where that is right: a repeated byte
    costs far less than log 288 = 5.66 nats, any other one a little more. Untied, the two have nothing in common: the loss is
    log 288 and a little more, for random logits are confident about random bytes."""
    source = inspect.getsource(argparse).encode()[:8 * 257]
    rows = torch.tensor(list(source)).view(8, 257)
    x, y = rows[:, :-1], rows[:, 1:]
    repeated = x == y
    assert repeated.float().mean() > 0.05
    nats = {}
    for tied in True, False:
        model = muP.init_weights(FLM(PRESETS["demo"].replace(n_layers=2, tie_embeddings=tied)), seed=0)
        with torch.no_grad():
            nats[tied] = -model(x).log_softmax(-1).gather(-1, y[..., None])[..., 0]
    blind = math.log(288)
    assert nats[True].mean() < blind - 0.1
    assert nats[True][repeated].mean() < blind - 1 and blind < nats[True][~repeated].mean() < blind + 1
    assert blind < nats[False].mean() < blind + 0.5


def test_02_exercise_2_mean_of_means():
    """The batch's loss is (256 * 2.0 + 8 * 5.0) / 264 = 2.091 nats. The mean of means is (2.0 + 5.0) / 2 = 3.5, in which a
    teacher token weighs 256 / 8 = 32 times as much as a language token. train.gradients divides once."""
    nats = torch.cat([torch.full((256,), 2.0), torch.full((8,), 5.0)]).requires_grad_()
    once, means = nats.mean(), (nats[:256].mean() + nats[256:].mean()) / 2
    assert once.item() == pytest.approx(2.091, abs=5e-4) and means.item() == pytest.approx(3.5)
    weight, = torch.autograd.grad(means, nats)
    assert weight[-1] / weight[0] == pytest.approx(32)
    weight, = torch.autograd.grad(once, nats)
    assert weight[-1] == weight[0]

    model = muP.init_weights(FLM(PRESETS["demo"].replace(n_layers=1, max_seq_len=256)), seed=0)
    worker = parallel.Worker([model], parallel.World(), torch.float32)
    rows = torch.randint(256, (2, 257), generator=torch.Generator().manual_seed(0))
    x, y = rows[:, :-1], rows[:, 1:].clone()
    y[1, 8:] = IGNORE
    with torch.no_grad():
        expected = (model(x, y) / 264).item()
    for micro in 1, 2:
        assert worker.gradients(x, y, micro, 264) / 264 == pytest.approx(expected, rel=1e-5)          # fp32 sums


def test_02_exercise_3_the_same_learning_rate():
    """--steps 300 and the same --warmup: the schedule counts samples, its length is steps * batch_size, and the warm-up is
    in samples already. Sample s is the same row for every batch size. (The training is another one, with twice as many
    updates of half the data; --micro-batch 8 would keep that too.)"""
    def rate(samples, **given):
        return train.learning_rate(*train.resolve(train.Settings(stages="none", lr=3e-3, **given)), samples)

    for samples in range(16, 150 * 16 + 1, 16):
        assert rate(samples, steps=150, batch_size=16, warmup=400) == rate(samples, steps=300, batch_size=8, warmup=400)
    assert rate(160, steps=300, batch_size=8, warmup=200) != rate(160, steps=150, batch_size=16, warmup=400)


def test_02_exercise_3_the_same_rows(tmp_path):
    """Sample number s is the same row, however many are taken at a time."""
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 200}) + "\n" for i in range(20)))
    data.prepare({"plain": [tmp_path / "plain.jsonl"]}, tmp_path / "tokens", data.get_tokenizer("bytes"), progress=False)
    corpus = data.Corpus(tmp_path / "tokens", 32)
    one = corpus.batch(0, 0, 16)[0]
    two = torch.cat([corpus.batch(0, 0, 8)[0], corpus.batch(0, 8, 8)[0]])
    assert torch.equal(one, two)


def test_02_exercise_4_reading_table_1():
    """One cosine over all tokens would have come down to 5.1e-5 where the 51B stage begins and to 1.3e-5 where the 101B stage
    does; the table prints 3.4e-4 and 2e-4. Nor does any other single cosine from 4e-4 to 6e-6 fit: the first rate asks for
    one over about 934 billion tokens, the second for one over about 555. So the schedule changed as the model grew; the paper says
    "approximately inherit", not how."""
    def rate(tokens, horizon):                                       # both in billions
        samples = horizon * 1e9 / 2048
        given = train.Settings(stages="none", steps=round(samples / 2304), batch_size=2304, lr=4e-4, warmup=4_608_000, min_lr=6e-6 / 4e-4)
        return train.learning_rate(*train.resolve(given), tokens * 1e9 / 2048)

    begins_51b, begins_101b = 245.37, 245.37 + 39.64
    assert rate(begins_51b, 311.54) == pytest.approx(5.1e-5, rel=0.01)
    assert rate(begins_101b, 311.54) == pytest.approx(1.3e-5, rel=0.04)
    assert rate(begins_51b, 934) == pytest.approx(3.4e-4, rel=0.01)
    assert rate(begins_101b, 555) == pytest.approx(2e-4, rel=0.01)


def test_02_exercise_5_pulling_the_plug(tmp_path, monkeypatch):
    """The newest checkpoint is that of step 4. Resuming cuts the log back to it and computes steps 5 and 6 a second time, with
    the same losses, so the log has every step once and equals that of a run that nobody killed."""
    monkeypatch.setattr(machine, "matmul_rate", lambda *_: 1e9)        # spares a second; only utilisation depends on it
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 200}) + "\n" for i in range(20)))
    data.prepare({"plain": [tmp_path / "plain.jsonl"]}, "tokens", data.get_tokenizer("bytes"), val_fraction=0.2, progress=False)
    job = dict(data="tokens", steps=8, batch_size=2, warmup=4, lr=3e-3, save_every=4, eval_rows=2, dtype="float32",
               model=("n_layers=1", "d_model=32", "n_heads=2", "head_dim=16", "d_ff=64", "max_seq_len=32"))

    def losses(folder):
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    train.train(train.Settings(**job, out="straight"))
    train.train(train.Settings(**job, out="killed"), stop_at=6)
    shutil.rmtree(tmp_path / "killed" / "step-00000006")             # a killed process would not have written this
    assert [step for step, _ in losses("killed")] == [1, 2, 3, 4, 5, 6]
    before = losses("killed")

    train.train(train.resumed("killed", {}), resume=True)
    assert losses("killed") == losses("straight") and losses("killed")[:6] == before
