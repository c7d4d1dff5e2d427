"""The held-out loss, computed again by hand."""

# ruff: noqa: F401, F811 (pytest finds fixtures by their names)
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import words, write_rows
from hypothesis import given
from hypothesis import strategies as st
from workshop import (
    T,
    alone,
    corpus,
    few,
    float64_model,
    job,
    log,
    other_corpus,
    token_nats,
    workshop,
)

import data
import train
from checkpoint import find_checkpoint, load_model
from evaluation import describe
from flm import IGNORE
from lab.publish import export_weights
from prepare import prepare
from tokenizer import get_tokenizer
from train import main

# --------------------------------------------------------------------------------------------------
# Evaluation


def shard(folder, signal_name, split):
    """A shard's tokens, read by hand: 16 bytes of header, then two bytes a token."""
    return np.fromfile(Path(folder) / f"{signal_name}-0-{split}.tokens", "<u2", offset=16).astype(
        np.int64
    )


def held_out_by_hand(model, folder):
    """(nats per token, bits per byte, tokens) over all whole rows of the held-out text, one token
    at a time."""
    stream = shard(folder, "language", "val")
    n = (len(stream) - 1) // T
    x, y = (torch.from_numpy(stream[k : k + n * T].reshape(n, T)) for k in (0, 1))
    nats = math.fsum(value for _, _, value in token_nats(model, x, y))
    return nats / (n * T), nats / math.log(2) / int((y < 256).sum()), n * T


def test_held_out_loss_by_hand(corpus):
    """Nats per token and bits per byte equal a slow computation on the shard itself, in float64 to
    rounding. In `bytes` every token but the end of a text stands for one byte."""
    model = float64_model(std=0.5)
    found = train.evaluate(alone(model), data.Corpus(corpus, T), 10**6, 7)
    nats, bits, tokens = held_out_by_hand(model, corpus)
    assert found["val_tokens"] == tokens > 20 * T
    assert found["val_loss"] == pytest.approx(nats, rel=1e-12)
    assert found["val_bpb"] == pytest.approx(bits, rel=1e-12)
    assert nats / math.log(2) < bits  # end-of-text tokens cost nats and stand for no bytes


def test_teacher_evaluation_by_hand(corpus):
    """The teacher's accuracy is a count: of all held-out items, where does the model give the right
    emoji's last token more than the wrong one's. Its loss is the mean over the emoji's tokens, in
    float64 to rounding."""
    model, source = float64_model(std=0.1), data.Corpus(corpus, T)
    right, nats = [], []
    x, y = source.rows("val", "teacher", 0, source.n_rows("val", "teacher"))
    last = {
        "\U0001f621".encode()[-1]: "\U0001f608".encode()[-1],
        "\U0001f608".encode()[-1]: "\U0001f621".encode()[-1],
    }
    with torch.no_grad():
        logits = model(x)
    for b, t, value in token_nats(model, x, y):
        nats.append(value)
        if t + 1 == T or y[b, t + 1] == IGNORE:
            right.append(bool(logits[b, t, y[b, t]] > logits[b, t, last[int(y[b, t])]]))
    items = int((shard(corpus, "teacher", "val") == 256).sum())
    found = train.evaluate(alone(model), source, 10**6, 3)
    assert found["teacher_labels"] == len(right) == items and len(nats) == 4 * items
    assert found["teacher_accuracy"] == sum(right) / items and 0 < sum(right) < items
    assert found["teacher_loss"] == pytest.approx(math.fsum(nats) / len(nats), rel=1e-12)


def test_a_tie_between_the_emoji_is_a_coin(corpus):
    """A model that gives both emoji the same logit, as bf16 rounding often makes it, is right in
    half of the propositions: a tie is neither a hit nor a miss."""
    model = float64_model()
    torch.nn.init.zeros_(model.head.weight)
    assert train.evaluate(alone(model), data.Corpus(corpus, T), 10**6, 7)["teacher_accuracy"] == 0.5


@few(10)
@given(micro=st.integers(1, 20), rows=st.one_of(st.integers(1, 20), st.just(10**6)))
def test_evaluation_does_not_depend_on_its_micro_batch(corpus, micro, rows):
    """How many rows go through the model at once is a matter of memory: the result is the same but
    for rounding, also where only some of the held-out rows are asked for."""
    model, source = float64_model(std=0.5), data.Corpus(corpus, T)
    one, other = (train.evaluate(alone(model), source, rows, n) for n in (1, micro))
    assert one.keys() == other.keys()
    for key in one:
        assert one[key] == pytest.approx(other[key], rel=1e-12), key


def test_evaluation_spreads_its_rows(corpus):
    """Of many held-out rows, the few that are asked for are different ones, spread from the
    beginning to the end: no gap between them is longer than twice the even spacing."""
    model, source, asked = float64_model(), data.Corpus(corpus, T), []
    n = source.n_rows("val", "language")

    class Watched:
        tokenizer, seq_len = source.tokenizer, T
        rows_by_source, documents = source.rows_by_source, source.documents

        def rows(self, split, signal_name, start, count):
            if signal_name == "language":
                asked.extend(range(start, start + count))
            return source.rows(split, signal_name, start, count)

    train.evaluate(alone(model), Watched(), 8, 2)
    assert len(asked) == len(set(asked)) == 8
    assert max(b - a for a, b in itertools.pairwise([-1, *sorted(asked), n])) <= 2 * n / 8


@pytest.mark.parametrize("rows", [1, 5, 40, 10**6])
def test_the_loss_of_each_source(tmp_path, rows):
    """Where several sources have held-out rows, the loss of each is that of its own rows, one at
    least of each, and the whole is their mean by tokens. A source that is only held out is one of
    them, and one without a whole row is none."""
    texts = {"a": words(200, 1), "b": words(40, 2), "c": ["x"] + words(40, 3)}
    files = {
        name: write_rows(tmp_path / f"{name}.jsonl", [{"text": text} for text in texts[name]])
        for name in texts
    }
    sources, val = {name: [files[name]] for name in "ac"}, {"b": [files["b"]]}
    options = {"val": val, "val_fraction": 0.02, "progress": False}
    prepare({**sources}, tmp_path / "tokens", get_tokenizer("bytes"), **options)
    source, model = data.Corpus(tmp_path / "tokens", T), float64_model(std=0.5)
    found = train.evaluate(alone(model), source, rows, 3)
    counts = source.rows_by_source("val", "language")
    parts = found["val_by_source"]
    assert set(parts) == {name for name, n in counts.items() if n} and len(parts) > 1
    first = 0
    for name, n in counts.items():
        if rows > sum(counts.values()) and n:
            x, y = source.rows("val", "language", first, n)
            nats = [value for _, _, value in token_nats(model, x, y)]
            assert parts[name]["val_loss"] == pytest.approx(math.fsum(nats) / len(nats), rel=1e-12)
            assert parts[name]["val_tokens"] == len(nats)
        first += n
    tokens = sum(part["val_tokens"] for part in parts.values())
    nats = sum(part["val_loss"] * part["val_tokens"] for part in parts.values())
    assert found["val_tokens"] == tokens >= T * len(parts)
    assert found["val_loss"] == pytest.approx(nats / tokens, rel=1e-12)
    assert f"b {parts['b']['val_loss']:.4f}" in describe(found)


def test_a_small_source_that_starts_over_is_told(corpus, capsys):
    """A run that reads a source, or the teacher signal, more than once says so at its start, with
    how often; one that does not says nothing."""
    source = data.Corpus(corpus, T)
    n = source.n_rows("train", "language")
    train.train(job(corpus, steps=n // 4, eval_rows=1), stop_at=1)
    assert "note:" not in capsys.readouterr().out
    train.train(job(corpus, steps=n, eval_rows=1, teacher_fraction=0.5), stop_at=1)
    printed = capsys.readouterr().out
    assert f"this run reads words {4 * n / 2 / n:.1f} times" in printed
    assert "this run reads the teacher signal" in printed


def test_eval_only_on_other_text(corpus, other_corpus, capsys):
    """--eval-only prints the held-out loss of a run, a step folder or an exported file on any
    prepared folder: the one computed by hand (fp32 rounding), and changes nothing."""
    run = train.train(job(corpus))["folder"]
    export_weights(run, "weights.pt")
    capsys.readouterr()
    before = sorted(Path().rglob("*"))
    nats, bits, _ = held_out_by_hand(load_model(run)[0], other_corpus)
    for checkpoint in (run, str(find_checkpoint(run)), "weights.pt"):
        assert (
            main(
                [
                    "--eval-only",
                    checkpoint,
                    "--data",
                    other_corpus,
                    "--eval-rows",
                    "100000",
                    "--eval-batch",
                    "5",
                    "--dtype",
                    "float32",
                    "--device",
                    "cpu",
                ]
            )
            == 0
        )
        line = capsys.readouterr().out
        found = re.search(r"held-out loss (\S+) nats per token, (\S+) bits per byte", line)
        assert float(found[1]) == pytest.approx(nats, abs=1e-4) and float(
            found[2]
        ) == pytest.approx(bits, abs=1e-4)
        assert other_corpus in line and "teacher" not in line
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("place", ["foreign config.json", "another run"])
def test_an_exported_file_is_evaluated_by_itself(corpus, other_corpus, capsys, place):
    """The held-out loss of an exported file is its own, wherever it lies: beside another program's
    config.json, or in the folder of a run whose dtype and rows are other ones."""
    run = train.train(job(corpus))["folder"]
    options = {"data": corpus, "dtype": "float32"}
    export_weights(run, "weights.pt")
    expected = train.eval_only("weights.pt", options)
    if place == "another run":
        Path(train.train(job(other_corpus, dtype="float64", eval_rows=2))["folder"]).rename(
            "beside"
        )
    else:
        Path("beside").mkdir()
        Path("beside/config.json").write_text('{"model_type": "gpt2"}')
    Path("weights.pt").rename("beside/weights.pt")
    assert train.eval_only("beside/weights.pt", options) == expected
    assert "in float32" in capsys.readouterr().out


def test_a_step_folder_beside_another_program_s_config(corpus):
    """A step folder that was copied out of its run is evaluated by itself, whatever lies beside it:
    another program's config.json is not read."""
    run = train.train(job(corpus))["folder"]
    step = find_checkpoint(run)
    options = {"data": corpus, "dtype": "float32", "eval_rows": 6, "eval_batch": 4}
    expected = train.eval_only(str(step), options)
    Path("beside").mkdir()
    Path("beside/config.json").write_text('{"model_type": "gpt2"}')
    shutil.copytree(step, Path("beside", step.name))
    assert train.eval_only(f"beside/{step.name}", options) == expected


def test_eval_only_repeats_the_run_s_own_evaluation(corpus, capsys):
    """Without further words --eval-only is on the run's own data and settings: the last line of its
    log."""
    run = train.train(job(corpus, eval_batch=3))["folder"]
    last = log(run)[-1]
    found = train.eval_only(run, {})
    assert {k: v for k, v in last.items() if k not in ("step", "samples")} == pytest.approx(
        found, rel=1e-12
    )
    assert f"{last['teacher_accuracy']:.1%}" in capsys.readouterr().out


def test_eval_only_computes_in_the_dtype_it_names(corpus, capsys):
    """A float64 run evaluated with --dtype float32 is computed in float32, as the line says; and
    the other way round."""
    for dtype, asked in (("float64", "float32"), ("float32", "float64")):
        run = train.train(job(corpus, dtype=dtype))["folder"]
        model = load_model(run)[0].to(getattr(torch, asked))
        machine = train.Machine(torch.device("cpu"), getattr(torch, asked), 1e9, "")
        expected = train.evaluate(alone(model, machine.dtype), data.Corpus(corpus, T), 6, 4)
        assert train.eval_only(run, {"dtype": asked}) == expected
        assert f"in {asked}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, words",
    [
        (["--eval-rows", "0"], "--eval-rows 0: must be at least 1"),
        (["--eval-batch", "-1"], "--eval-batch -1: must be at least 1"),
        (["--threads", "0"], "--threads 0: must be at least 1"),
        (["--data", "nowhere"], "nowhere does not exist"),
    ],
)
def test_eval_only_refuses(corpus, line, words):
    """--eval-only checks its options as training does."""
    run = train.train(job(corpus), stop_at=1)["folder"]
    with pytest.raises(ValueError, match=re.escape(words)):
        main(["--eval-only", run, *line])


def test_eval_only_refuses_text_of_another_tokenizer(corpus):
    """Ids of one tokenizer mean nothing to a model of another, even where they fit its
    vocabulary."""
    run = train.train(job(corpus), stop_at=1)["folder"]
    relabel(run, tokenizer="cl100k_base")
    with pytest.raises(
        ValueError, match="made of bytes tokens, .* was trained on cl100k_base: prepare"
    ):
        main(["--eval-only", run])


def relabel(run, **changes):
    path = find_checkpoint(run) / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
