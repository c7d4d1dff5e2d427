"""The answers to the exercises of tutorials/01-model.md."""

import json
import math

import pytest
import torch

import data
import muP
from flm import FLM, IGNORE, PRESETS, FLMConfig, forward_flops, xpos_tables
from sample import KVCache


def test_01_exercise_1_half_life():
    """A pair fades by zeta ** (distance / 512), so to one half at 512 log 2 / -log zeta. The
    slowest pair of a 128-wide head (i = 63, zeta = 0.9888) gets there after 31,620 positions, the
    fastest (i = 0, zeta = 0.2857) after 283."""
    half_life = [512 * math.log(2) / -math.log((2 * i / 128 + 0.4) / 1.4) for i in (0, 63)]
    assert [round(d) for d in half_life] == [283, 31_620]

    size = xpos_tables(
        PRESETS["flm-101b"], 31_621
    ).abs()  # (T, 2, D/2): queries, keys; the angle is left out
    for distance, pair in (283, 0), (31_620, 63):
        fading = (
            size[distance, 0, pair] * size[0, 1, pair]
        )  # query at that distance from a key at 0
        assert fading == pytest.approx(
            0.5, rel=2e-3
        )  # half a position off is 0.12% for the fastest pair


def test_01_exercise_2_six_days():
    """72 L C^2 (1 + T/6C) + 6 V C = 630.28 GFLOP a token. 192 GPUs at 165 TFLOP/s make 50,264
    tokens a second, so 26.54 billion tokens take 6.11 days. Table 1 prints 6.54, which is 4.34
    against 4.06 billion tokens a day: 7% of the time is not in this count. Our sources do not say
    what it went into, nor whether the 165 count recomputed activations."""
    config, T = PRESETS["flm-101b"], 2048
    L, C, V = 80, 10240, 100_352
    per_token = 72 * L * C * C * (1 + T / (6 * C)) + 6 * V * C
    assert (
        per_token == pytest.approx(3 * forward_flops(config, T))
        and round(per_token / 1e9, 2) == 630.28
    )
    per_second = 192 * 165e12 / per_token
    assert round(per_second) == 50_264
    days = 26.54e9 / per_second / 86_400
    assert round(days, 2) == 6.11
    assert round(per_second * 86_400 / 1e9, 2) == 4.34 and round(26.54 / 6.54, 2) == 4.06
    assert round(1 - days / 6.54, 2) == 0.07


def test_01_exercise_3_move_the_origin():
    """A constant origin cancels: with 0 instead of max_seq_len / 2 no logit changes, only the
    rounding. The limit becomes max_seq_len / 2 smaller (32,185 -> 31,161 for flm-101b), for the
    factors' range is the same on the far side and starts earlier. An origin that follows the length
    changes every logit that reads a key from before the length changed."""

    class AtZero(FLMConfig):
        xpos_origin = 0

    config = dict(
        n_layers=2, d_model=32, n_heads=2, head_dim=16, d_ff=64, vocab_size=64, max_seq_len=40
    )
    model, moved = (
        muP.init_weights(FLM(c), 0).double() for c in (FLMConfig(**config), AtZero(**config))
    )
    tokens = torch.randint(64, (1, 40), generator=torch.Generator().manual_seed(0))
    expected = model(tokens)
    assert (moved(tokens) - expected).abs().max() < 1e-12

    giant = PRESETS["flm-101b"]
    assert (giant.xpos_limit(), AtZero(**giant.to_dict()).xpos_limit()) == (32_185, 31_161)

    cache, logits = KVCache(model, 40), []
    for part in tokens.split(20, dim=1):  # the origin follows: 10 for the first 20, then 20
        length = cache.length + 20
        cache.tables = xpos_tables(
            model.config.replace(max_seq_len=length), length, dtype=torch.float64
        )
        logits.append(model(part, cache=cache))
    off = (torch.cat(logits, 1) - expected).abs().amax(-1)[0]  # (T,)
    assert (off[:20] < 1e-12).all() and (off[20:] > 1e-6).all()


def test_01_exercise_4_the_cache_of_a_giant():
    """A key and a value of H D numbers for each layer and position: 2 * 80 * 80 * 128 * 2048 =
    3,355,443,200 numbers, 6.7 GB in bf16, for one text."""
    with torch.device("meta"):
        model = FLM(PRESETS["flm-101b"], layers=range(1))  # one block; the other 79 are like it
    cache = KVCache(model, capacity=2048)
    with torch.no_grad():
        model(
            torch.zeros(1, 1, dtype=torch.long, device="meta"), cache=cache
        )  # the first token makes the slots
    count = 80 * sum(slots.numel() for layer in cache.kv.values() for slots in layer)
    assert count == 2 * 80 * 80 * 128 * 2048 == 3_355_443_200
    assert round(2 * count / 1e9, 1) == 6.7


def test_01_exercise_5_supervised_tokens(tmp_path):
    """An item is b + 1 + p + 4 + 1 tokens: text, newline, proposition, four bytes of emoji, end of
    text. A row of T targets holds T + 1 tokens, so k = (T + 1) // (b + p + 6) items; n items make
    ceil(n / k) rows; 4k of a full row's T targets are supervised, which is 4 / (b + p + 6) and a
    little less."""
    b, p, T, n = 20, 11, 128, 50
    (tmp_path / "plain.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} " * 100}) + "\n" for i in range(8))
    )
    (tmp_path / "judged.jsonl").write_text(
        "".join(
            json.dumps(
                {"text": f"{i:0{b}}", "proposition": f"It is {i % 7:0{p - 6}}", "label": i % 2}
            )
            + "\n"
            for i in range(n)
        )
    )
    meta = data.prepare(
        {"plain": [tmp_path / "plain.jsonl"]},
        tmp_path / "tokens",
        data.get_tokenizer("bytes"),
        teacher=[tmp_path / "judged.jsonl"],
        val_fraction=0.2,
        progress=False,
    )
    corpus = data.Corpus(tmp_path / "tokens", T)
    k = (T + 1) // (b + p + 6)
    assert k == 3
    for split in data.SPLITS:
        items = meta["teacher"][split]["documents"]
        assert corpus.n_rows(split, "teacher") == math.ceil(items / k)
    supervised = corpus.rows("train", "teacher", 0, 1)[1] != IGNORE
    assert supervised.sum() == 4 * k and 4 * k / T < 4 / (b + p + 6)
