"""--document-mask: attention is cut where a document ends, so each document of a row is computed as
if it stood alone. Under tensor and pipeline parallelism: tests/test_parallel.py."""

import pytest
import torch
from helpers import build, configs, difference, few, seeds, some_tokens, tiny
from hypothesis import given
from hypothesis import strategies as st
from workshop import alone, corpus, float64_model, job, log, workshop  # noqa: F401

import data
import train
from flm import IGNORE, loss_sum
from sample import KVCache

END = 0  # the end-of-text token of these tests


def rows_of_documents(config, B, seed):
    """Tokens (B, T) in which documents of any lengths, 1 to T, stand one after the other, and the
    number of the document of each."""
    tokens = some_tokens(config, B, config.max_seq_len, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tokens[torch.rand(tokens.shape, generator=generator) < 0.3] = END
    return tokens, (tokens == END).cumsum(1)


@few
@given(config=configs(), B=st.integers(1, 3), seed=seeds)
def test_each_document_is_computed_as_if_it_stood_alone(config, B, seed):
    """The logits of every document of a row are those of the document as a text of its own, though
    it stands at other positions: in float64 to rounding, for every random model. Gradients, too."""
    model = build(config, seed)
    tokens, documents = rows_of_documents(config, B, seed)
    together = model(tokens, documents=documents)
    for b in range(B):
        for number in documents[b].unique():
            here = documents[b] == number
            single = model(tokens[b : b + 1, here])
            assert difference(together[b : b + 1, here], single) < 1e-9
    targets = tokens.roll(-1, 1)
    nats = model(tokens, targets, documents=documents)
    assert difference(nats, loss_sum(together, targets)) < 1e-9


@few
@given(seed=seeds)
def test_a_later_document_sees_nothing_of_an_earlier_one(seed):
    """What stands in one document changes nothing, not a bit, in another one."""
    config = tiny()
    model = build(config, seed)
    tokens, _ = rows_of_documents(config, 1, seed)
    tokens[0, 7] = END
    other = tokens.clone()
    other[0, :7] = some_tokens(config, 7, seed=seed + 1)
    numbers = [(x == END).cumsum(1) for x in (tokens, other)]
    one, two = (model(x, documents=n) for x, n in zip((tokens, other), numbers, strict=True))
    assert torch.equal(one[0, 7:], two[0, 7:])


def test_one_document_is_plain_attention():
    """A row without an end of text has the logits that it has without the mask, to rounding; and
    those of generation with a cache, which knows no mask."""
    config = tiny()
    model = build(config, 3)
    tokens = some_tokens(config, 2, config.max_seq_len, seed=1).clamp(min=1)
    masked = model(tokens, documents=torch.zeros_like(tokens))
    assert difference(masked, model(tokens)) < 1e-12
    cache = KVCache(model, config.max_seq_len)
    steps = [model(tokens[:, k : k + 1], cache=cache) for k in range(config.max_seq_len)]
    assert difference(masked, torch.cat(steps, 1)) < 1e-9


def test_both_signals(corpus):  # noqa: F811
    """In a batch of both signals the labels of the teacher's items get the logits that each item
    alone has: a question about one text is not answered from another one."""
    source, model = data.Corpus(corpus, 32, document_mask=True), float64_model(std=0.5)
    tokens, targets = source.batch(0, 0, 8, teacher_fraction=0.5)
    documents = source.documents(tokens)
    logits = model(tokens, documents=documents)
    n_labels = 0
    for b, t in zip(*(targets != IGNORE).nonzero(as_tuple=True), strict=True):
        here = documents[b] == documents[b, t]
        single = model(tokens[b : b + 1, here])[0]
        place = int(here[: t + 1].sum()) - 1
        assert difference(logits[b, t], single[place]) < 1e-9
        n_labels += 1
    assert n_labels > 100


@pytest.mark.parametrize("micro", [None, 2])
def test_a_run_with_the_mask(corpus, micro):  # noqa: F811
    """A run with --document-mask trains and evaluates with it: its first loss is that of the masked
    rows, and --eval-only repeats its last evaluation. Resumed, it keeps the mask, bit for bit."""
    s = job(corpus, document_mask=True, teacher_fraction=0.5, micro_batch=micro, dtype="float64")
    run = train.train(s)["folder"]
    source = data.Corpus(corpus, 32, document_mask=True)
    tokens, targets = source.batch(s.seed, 0, s.batch_size, teacher_fraction=0.5)
    model, worker = float64_model(), alone(float64_model())
    nats = model(tokens, targets, documents=source.documents(tokens)).item()
    found = log(run)
    assert found[0]["loss"] == pytest.approx(nats / (targets != IGNORE).sum().item(), rel=1e-12)
    plain = model(tokens, targets).item() / (targets != IGNORE).sum().item()
    assert abs(plain - found[0]["loss"]) > 1e-6
    last = {k: v for k, v in found[-1].items() if k not in ("step", "samples")}
    assert train.eval_only(run, {}) == pytest.approx(last, rel=1e-12)
    assert train.eval_only(run, {"document_mask": False}) != pytest.approx(last, rel=1e-9)
    masked = train.evaluate(worker, source, 6, 4)
    assert masked != train.evaluate(worker, data.Corpus(corpus, 32), 6, 4)

    train.train(job(corpus, **{**vars(s), "out": "stopped"}), stop_at=3)
    train.train(train.resumed("stopped", {}), resume=True)
    assert log("stopped") == found
