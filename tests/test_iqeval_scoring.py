"""What the scores of iqeval.py promise: honest counts, intervals, and answers that do not depend on
the batch."""

import math
import random
import string
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from iq_oracles import STORIES, Answers

import iqeval
import muP
from checkpoint import write_checkpoint
from flm import FLM, FLMConfig
from iqeval import TASKS, CheckpointModel, evaluate

TINY = FLMConfig(2, 32, 2, head_dim=16, d_ff=64, vocab_size=288, max_seq_len=768)


def tiny_checkpoint(folder: Path) -> Path:
    """A model of two layers on disk. Its weights are large, so that its greedy choices differ."""
    model = muP.init_weights(FLM(TINY), 0).double()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    info = {"config": TINY.to_dict(), "dtype": "float64", "tokenizer": "bytes"}
    info |= {"samples": 0, "growth": None, "step": 1}
    return write_checkpoint(
        folder / "step-00000001", {"model": dict(model.named_parameters())}, info
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return CheckpointModel(tiny_checkpoint(tmp_path_factory.mktemp("iq")))


@pytest.fixture(scope="module")
def suite():
    return {name: task.generate(120, 0) for name, task in TASKS.items()}


def wrong(item):
    """A wrong answer of the right form: the other label, the next number, one letter more."""
    if item.labels:
        return next(label for label in item.labels if label != item.answer)
    return str(int(item.answer) + 1) if item.task.metric == "number" else item.answer + "x"


def test_the_oracle_scores_everything_and_a_wrong_answer_nothing(suite):
    """100% for a model that always knows, 0% for one that gives a wrong answer of the right
    form."""
    for r in evaluate(Answers(suite, lambda item: item.answer), suite).values():
        assert r["accuracy"] == 1.0 and r["n"] == 120
    for r in evaluate(Answers(suite, wrong), suite).values():
        assert r["accuracy"] == 0.0


def test_a_guesser_scores_at_chance(suite):
    """A guess of the right form lands inside a 99.9% interval around chance."""
    rng = random.Random(0)

    def guess(item):
        if item.labels:
            return rng.choice(item.labels)
        if item.task.name in STORIES:
            return rng.choice(iqeval.PLACES)
        if item.task.name == "key-retrieval":
            return str(rng.randint(1, 50_000))
        return "".join(rng.choices(string.ascii_lowercase, k=len(item.answer)))

    for name, r in evaluate(Answers(suite, guess), suite).items():
        p, n = r["chance"], r["n"]
        if name != "head-slicing":  # a letter or two can be guessed; the table rounds that to 0
            assert abs(r["right"] - n * p) <= 3.3 * math.sqrt(n * p * (1 - p)) + 1, name


@given(st.integers(1, 400), st.data())
def test_the_interval_holds_its_share(n, drawn):
    """Wilson's interval: inside [0, 1], around the share, and p solves
    (share - p)^2 = z^2 p (1 - p) / n at both ends."""
    right = drawn.draw(st.integers(0, n))
    low, high = iqeval.interval(right, n)
    assert 0 <= low <= right / n + 1e-12 and right / n - 1e-12 <= high <= 1
    for p in (low, high):
        assert (right / n - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / n, abs=1e-9)


def test_300_items_are_known_to_5_7_points():
    """Half of 300 right is 50% give or take 5.6."""
    low, high = iqeval.interval(150, 300)
    assert 0.054 < (high - low) / 2 < 0.058


SAID = [
    ("exact", "  kitchen\n\nMary", "kitchen"),
    ("exact", " kitchen.", "kitchen."),
    ("exact", "", ""),
    ("exact", " a b \n", "a b"),
    ("exact", "kitchen \t", "kitchen"),
    ("number", " 123. Remember 45", "123"),
    ("number", " nothing\n7", ""),
]


@pytest.mark.parametrize("metric, text, counts", SAID)
def test_what_counts_of_a_text(metric, text, counts):
    """The first line without the space around it, as lm-evaluation-harness compares; for numbers
    the first one in it."""
    assert iqeval.said(metric, text) == counts


def test_batched_likelihoods_are_those_of_plain_forward_passes(model):
    """Prompts and options of any lengths, in one batch with a cache, against one row at a time
    without."""
    rng = random.Random(0)
    tokens = lambda n: [rng.randrange(256) for _ in range(n)]  # noqa: E731
    prompts = [tokens(n) for n in (5, 40, 17, 40)]
    options = [[tokens(rng.randint(1, 6)) for _ in range(3)] for _ in prompts]
    found = model.likelihoods(prompts, options)
    for b, prompt in enumerate(prompts):
        for k, option in enumerate(options[b]):
            log_p = model.model(torch.tensor([prompt + option]))[0].log_softmax(-1)
            places = enumerate(option, len(prompt) - 1)
            expected = sum(log_p[place, token].item() for place, token in places)
            assert found[b, k].item() == pytest.approx(expected, abs=1e-3)
    singles = model.likelihoods([[1, 2]], [[[3], [4]]])
    assert singles.exp().sum() < 1


def test_answers_do_not_depend_on_the_batch(model):
    """Whatever shares a batch, an item is answered alike, and in the order of the items."""
    for name in ("single-fact", "head-tail", "counting-en"):
        items = TASKS[name].generate(7, 4, **({"sentences": 2} if name == "single-fact" else {}))
        prompts = [model.encode(item.prompt) for item in items]
        assert model.complete(prompts, 6) == [model.complete([p], 6)[0] for p in prompts]
    items = TASKS["entailment-en"].generate(7, 4)
    together, needs = iqeval.answer_all(model, items, batch_size=5)
    alone = [iqeval.answer_all(model, [item])[0][0] for item in items]
    assert together == alone and len(set(together)) > 1
    assert needs == [len(i.prompt) + 1 + max(map(len, i.labels)) for i in items]
    items = TASKS["head-tail"].generate(20, 0)
    oracle = Answers({"": items}, lambda item: item.answer)
    assert iqeval.answer_all(oracle, items, batch_size=3)[0] == [f" {i.answer}" for i in items]


def test_generation_stops_at_a_line_end(model):
    """A first line is all that is read, so a row ends at a line end or at the end of text, and
    neither is in the text."""
    assert set(model.stop) == {10, 256}
    texts = model.complete([model.encode("Input: ab\nOutput:")] * 2, 30)
    assert texts[0] == texts[1] and "\n" not in texts[0]
    assert len(model.encode(texts[0])) <= 30 * 3


def test_items_longer_than_the_context_are_reported(model):
    """They count as left out, not as wrong; if none of a task fits, the task has no score."""
    keys = TASKS["key-retrieval"]
    suite = {
        "key-retrieval": keys.generate(3, 0, length=100) + keys.generate(2, 0, length=2000),
        "single-fact": TASKS["single-fact"].generate(2, 0, sentences=90),
    }
    results = evaluate(model, suite)
    found = results["key-retrieval"]
    assert (found["n"], found["left_out"]) == (3, 2) and found["longest"] > 2000
    assert results["single-fact"]["accuracy"] is None
    text = iqeval.table(results, model.context)
    assert "key-retrieval: 2 of 5 items, the longest needs 2" in text
    assert "single-fact: 2 of 2" in text
    expected = r"context of 768 tokens:\n  single-fact: the shortest needs \d+ tokens\n  make the"
    with pytest.raises(ValueError, match=expected):
        evaluate(model, {"single-fact": suite["single-fact"]})


def test_a_difficulty_that_was_changed_has_no_known_lazy_score():
    """The scores of laziness are measured at the default difficulty; labels in words change
    none."""
    known = TASKS["entailment-en"].lazy
    for knobs, lazy in (({}, known), ({"labels": "words"}, known), ({"chain": 2}, ("", None))):
        items = TASKS["entailment-en"].generate(2, 0, **knobs)
        results = evaluate(Answers({"": items}, lambda item: item.answer), {"": items})
        assert results[""]["lazy"] == lazy
        row = iqeval.table(results, 100).splitlines()[1]
        assert row.split("|")[0].split()[-1] == ("-" if lazy[1] is None else f"{lazy[1]:.1f}")


def test_a_label_that_tokenizes_to_nothing_is_refused(model):
    """An empty label would have likelihood 1."""
    item = TASKS["entailment-en"].generate(1, 0)[0]
    with pytest.raises(ValueError, match="entailment-en: the label '' tokenizes to nothing"):
        iqeval.answer_all(model, [item._replace(labels=("", item.answer))])
