"""The sampler, rows and batches, and how they are shown. That every epoch visits every row once is
a check of the course (tests/test_course_ours.py)."""

import sys
import tempfile
from collections import Counter
from fractions import Fraction
from math import factorial, floor, log, sqrt
from unittest import mock

import numpy as np
import pytest
import torch
from data_helpers import BYTES, make, shard_tokens, unhurried, words
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import data
from data import IGNORE, Corpus
from tokenizer import EMOJI, byte_lengths


@pytest.fixture(params=["bytes", "cl100k_base"])
def tokenizer(request):
    return BYTES if request.param == "bytes" else request.getfixturevalue("cl100k")


@unhurried
@given(st.integers(1, 700), st.binary(max_size=64))
def test_permute_is_a_permutation(n, key):
    """permute(., n, key) takes each of 0 .. n-1 exactly once."""
    assert sorted(data.permute(i, n, key) for i in range(n)) == list(range(n))


@unhurried
@given(st.integers(1, 10**15), st.binary(max_size=64), st.data())
def test_permute_of_large_ranges(n, key, draw):
    """For any n: the values stay inside the range and different places have different values."""
    places = draw.draw(st.sets(st.integers(0, n - 1), max_size=20))
    values = {data.permute(i, n, key) for i in places}
    assert len(values) == len(places) and all(0 <= value < n for value in values)


def test_permute_mixes():
    """Where position 0 lands is uniform over the keys: chi-square over 40 places, 4000 keys, below
    90 (99.999% of true uniform draws are below 89)."""
    landed = np.bincount([data.permute(0, 40, b"%d" % key) for key in range(4000)], minlength=40)
    assert ((landed - 100) ** 2 / 100).sum() < 90


@pytest.mark.parametrize("n", [2, 3, 4, 5, 9, data.FEW - 1, data.FEW, 31])
def test_permute_of_few_is_uniform(n):
    """Of few elements all orders are equally frequent, and so are all places that two elements can
    take together. The chi-square of uniform draws has mean d and variance 2d at d degrees of
    freedom: with these fixed keys it stays within 4 standard deviations."""
    keys = [b"%d" % number for number in range(20_000 if n < 10 else 6_000)]
    orders = [tuple(data.permute(i, n, key) for i in range(min(n, 5))) for key in keys]
    kinds = {min(n, 2): n * (n - 1)} | ({n: factorial(n)} if n <= 5 else {})
    for seen, cells in kinds.items():  # the first `seen` places, and how many outcomes they have
        expected, counts = len(keys) / cells, Counter(order[:seen] for order in orders)
        chi_square = sum((count - expected) ** 2 for count in counts.values()) / expected
        chi_square += (cells - len(counts)) * expected
        assert abs(chi_square - (cells - 1)) < 4 * sqrt(2 * (cells - 1))


def test_permute_of_many_is_what_it_was():
    """The rows of a prepared corpus stay in their order from version to version."""
    assert [data.permute(i, 17, b"key") for i in range(8)] == [3, 5, 6, 15, 11, 0, 8, 12]
    assert [data.permute(i, 10**6, b"key") for i in range(4)] == [664142, 156288, 652273, 917192]


def test_orders_differ_between_epochs_sources_and_seeds():
    """The order of 50 rows depends on the epoch, the source and the seed."""

    def order(epoch, *names):
        return tuple(data.shuffled(i, 50, *names) for i in range(epoch * 50, epoch * 50 + 50))

    assert (
        len({order(e, seed, name) for e in (0, 1) for seed in (0, 1) for name in ("a", "b")}) == 8
    )


@unhurried
@given(
    st.floats(0, 1), st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(0, 10**12)
)
def test_shares_are_exact_in_every_prefix(teacher, weights, far):
    """Of the first s samples floor(s * p) are teacher samples, for every s. Each source's count
    lies within one sample per division of its exact share. Within a part the indices count 0, 1, 2,
    ... without a gap. Also far out, where the counts are known from the indices alone."""
    p = round(2**32 * teacher)
    shares = [p, *data.chain_of_shares(weights)]
    exact, left = [], Fraction(1)
    for share in shares:
        exact.append(left * Fraction(share, 2**32))
        left -= exact[-1]
    assert left == 0
    for weight, share in zip(weights, exact[1:]):  # 2**-32 of rounding per division
        assert abs(float(share) - (1 - p / 2**32) * weight / sum(weights)) < 1e-8
    counts = [0] * len(shares)
    for s in range(400):
        assert counts[0] == floor(s * exact[0])
        assert all(
            abs(count - s * share) <= k + 1 for k, (count, share) in enumerate(zip(counts, exact))
        )
        k, index = data.pick(s, shares)
        assert index == counts[k]
        counts[k] += 1
    seen = {}
    for s in range(far, far + 50):
        k, index = data.pick(s, shares)
        assert abs(index - s * exact[k]) <= k + 1
        assert index == seen.get(k, index - 1) + 1
        seen[k] = index


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two sources and a teacher signal, in the bytes tokenizer, as a Corpus of T = 64."""
    items = [
        {"text": text, "proposition": f"It says {i}.", "label": i % 2}
        for i, text in enumerate(t[:20] for t in words(200, 3))
    ]
    out, _ = make(
        tmp_path_factory.mktemp("mixed"),
        {"en": words(300, 1), "zh": ["语言" + w for w in words(80, 2)]},
        teacher=items,
        weights={"en": 53.5, "zh": 46.5},
        val_fraction=0.2,
    )
    return Corpus(out, 64)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other))


@unhurried
@given(
    st.integers(0, 3),
    st.integers(0, 10**10),
    st.sampled_from([1, 2, 3, 4, 6]),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_ranks_divide_the_batch(mixed, seed, seen, ranks, per_rank, fraction):
    """The slices of all ranks, one after the other, are the batch of one rank; asked again it is
    the same."""
    B = ranks * per_rank
    whole = mixed.batch(seed, seen, B, teacher_fraction=fraction)
    assert [part.shape for part in whole] == [(B, 64)] * 2 and {part.dtype for part in whole} == {
        torch.int64
    }
    parts = [
        mixed.batch(seed, seen, B, rank=rank, ranks=ranks, teacher_fraction=fraction)
        for rank in range(ranks)
    ]
    assert equal(whole, [torch.cat(pieces) for pieces in zip(*parts)])
    assert equal(whole, Corpus(mixed.path, 64).batch(seed, seen, B, teacher_fraction=fraction))


@unhurried
@given(
    st.integers(0, 5), st.integers(0, 10**9), st.lists(st.integers(1, 12), min_size=1, max_size=5)
)
def test_the_stream_does_not_depend_on_the_batch_size(mixed, seed, seen, sizes):
    """Batches of any sizes, each begun where the last one ended, give the stream that one large
    batch gives: to resume, or to change the batch size, the number of samples seen is enough."""
    whole = mixed.batch(seed, seen, sum(sizes), teacher_fraction=0.3)
    parts, at = [], seen
    for size in sizes:
        parts.append(mixed.batch(seed, at, size, teacher_fraction=0.3))
        at += size
    assert equal(whole, [torch.cat(pieces) for pieces in zip(*parts)])


def test_a_batch_holds_the_rows_it_should(mixed):
    """Sampling without replacement, seen from outside: the first epoch of a source is a
    rearrangement of `rows`, the shares are those of the weights, and the teacher rows are where
    something is not supervised."""
    n = 400
    tokens, targets = mixed.batch(7, 0, n, teacher_fraction=0.25)
    is_teacher = (targets == IGNORE).any(1)
    assert is_teacher.sum() == n // 4
    names = [mixed.sample(7, s, 0.25)[0] for s in range(n)]
    assert [name is None for name in names] == is_teacher.tolist()
    assert abs(names.count("en") - 300 * 0.535) <= 1 and abs(names.count("zh") - 300 * 0.465) <= 2
    every = mixed.rows("train", "language", 0, mixed.n_rows("train", "language"))[0].tolist()
    assert all(row in every for row in tokens[~is_teacher].tolist())
    n_en, n_zh = map(len, mixed.parts["train", "language"])
    epoch = [row for row, name in zip(tokens.tolist(), names) if name == "zh"][:n_zh]
    assert len(epoch) == n_zh and sorted(epoch) == sorted(every[n_en:])


@pytest.mark.parametrize("T", [1, 7, 64])
def test_language_rows_are_windows(tmp_path, T):
    """Row i of a source is tokens i*T .. i*T + T of its stream, targets one further; the sources
    follow each other; a source too short for a row of the held-out split is passed over. Neighbours
    overlap in one token, so every token but the first of a stream is a target once."""
    out, meta = make(tmp_path, {"a": words(40, 1), "b": words(30, 2)}, val_fraction=0.3)
    corpus = Corpus(out, T)
    for split in ("train", "val"):
        wanted = []
        for source in meta["sources"]:
            stream = shard_tokens(out, source[split]).tolist()
            wanted += [stream[i : i + T + 1] for i in range(0, len(stream) - T, T)]
        n = corpus.n_rows(split, "language")
        assert n == len(wanted)
        tokens, targets = corpus.rows(split, "language", 0, n)
        assert tokens.tolist() == [row[:-1] for row in wanted] and targets.tolist() == [
            row[1:] for row in wanted
        ]
        assert equal(corpus.rows(split, "language", n - 2, 2), (tokens[-2:], targets[-2:]))
        for start, number in ((0, n + 1), (n, 1), (-1, 1), (0, 0)):
            with pytest.raises(ValueError, match=f"it has {n:,}"):
                corpus.rows(split, "language", start, number)
    with pytest.raises(ValueError, match="the splits are train and val"):
        corpus.n_rows("test", "language")


items_strategy = st.lists(
    st.fixed_dictionaries(
        {
            "text": st.text(alphabet="ab语\n\U0001f621\U0001f608", max_size=12),
            "proposition": st.text(max_size=12),
            "label": st.sampled_from([0, 1]),
        }
    ),
    min_size=2,
    max_size=25,
)


@settings(unhurried, max_examples=25)
@given(items=items_strategy, T=st.integers(16, 60))
def test_teacher_rows_against_a_slow_packer(tokenizer, items, T):
    """An independent packer, item by item with lists, gives the same rows and targets. What is
    supervised decodes to the labels' emoji, in order, and to nothing else. Items that do not fit
    are counted. A text is on one side only."""
    groups = {item["text"] or item["proposition"] for item in items}
    assume(len(groups) >= 2)
    eot = tokenizer.eot_token
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(data, "get_tokenizer", lambda *_: tokenizer),
    ):
        out, meta = make(folder, {"s": words(30)}, tokenizer, teacher=items, val_fraction=0.4)
        encoded = [
            tokenizer.encode_ordinary(item["text"] + "\n" + item["proposition"])
            + tokenizer.encode_ordinary(EMOJI[item["label"]])
            + [eot]
            for item in items
        ]
        stored, sides = {}, {}
        for split in ("train", "val"):
            stream = shard_tokens(out, meta["teacher"][split])
            stored[split] = [
                part.tolist() for part in np.split(stream, np.flatnonzero(stream == eot) + 1)[:-1]
            ]
        left = {split: list(parts) for split, parts in stored.items()}
        for item, tokens in zip(items, encoded):
            key = item["text"] or item["proposition"]
            if key not in sides:
                sides[key] = "train" if left["train"] and left["train"][0] == tokens else "val"
            assert (
                left[sides[key]].pop(0) == tokens
            )  # in the order of the file, propositions of a text together
        assert left == {"train": [], "val": []}

        expected, too_long = {}, {}
        for split, parts in stored.items():
            rows, too_long[split] = [], 0
            for part in parts:
                if len(part) > T + 1:
                    too_long[split] += 1
                elif rows and len(sum(rows[-1], [])) + len(part) <= T + 1:
                    rows[-1].append(part)
                else:
                    rows.append([part])
            expected[split] = rows
        if not expected["train"]:
            with pytest.raises(ValueError, match="all of them longer"):
                Corpus(out, T)
            return
        corpus = Corpus(out, T)
        assert corpus.teacher_left_out == too_long
        n_emoji = len(tokenizer.encode_ordinary(EMOJI[0]))
        for split, rows in expected.items():
            assert corpus.n_rows(split, "teacher") == len(rows)
            if not rows:
                continue
            tokens, targets = corpus.rows(split, "teacher", 0, len(rows))
            for row, got, target in zip(rows, tokens.tolist(), targets.tolist()):
                flat = sum(row, [])
                assert got == (flat + [eot] * (T + 1))[:T]
                mask = sum(
                    ([0] * (len(part) - 1 - n_emoji) + [1] * n_emoji + [0] for part in row), []
                )
                assert target == [
                    t if m else IGNORE
                    for t, m in zip(
                        (flat + [eot] * (T + 1))[1 : T + 1], (mask + [0] * (T + 1))[1 : T + 1]
                    )
                ]
                text = tokenizer.decode([t for t in target if t != IGNORE])
                assert text == "".join(tokenizer.decode(part[-1 - n_emoji : -1]) for part in row)
                assert set(text) <= set(EMOJI.values()) and len(text) == len(row)


def test_opening_what_is_not_there_or_damaged(tmp_path):
    """A missing folder, one without meta, damaged JSON, another version, a shard cut off, absent
    or foreign, another tokenizer, a T that does not fit: each is an error that says so."""
    out, meta = make(tmp_path, {"s": words(50)})
    shard = out / meta["sources"][0]["train"]["shard"]
    whole, meta_text = shard.read_bytes(), (out / "meta.json").read_text()
    before = Corpus(out, 16).rows("train", "language", 0, 9)

    def refused(match, path=out, T=16):
        with pytest.raises(ValueError, match=match):
            Corpus(path, T)

    refused("does not exist.*python data.py prepare", tmp_path / "absent")
    refused("no meta.json", tmp_path)
    refused("seq_len is 0", T=0)
    n = meta["sources"][0]["train"]["tokens"]
    short = f"takes 100,001 tokens, but\n.*'s' has {n:,} tokens\n.*held-out text has.*\n.*smaller"
    refused(short, T=100_000)
    cut = [whole[: len(whole) // 2], whole[:-1], whole[:10], b""]
    foreign = [
        b"x" * len(whole),
        whole[:8] + b"\x09" + whole[9:],
        whole[:12] + b"\x04" + whole[13:],
    ]
    for contents in [*cut, *foreign]:
        shard.write_bytes(contents)
        refused("cut off, or no shard of this folder: .*prepare the folder again")
    shard.unlink()
    refused("No such file.*prepare the folder again")
    shard.write_bytes(whole + b"behind")  # as an append leaves it that was killed
    assert equal(Corpus(out, 16).rows("train", "language", 0, 9), before)
    for old, new, match in (
        ('"version": 2', '"version": 99', "version 99"),
        ('"bytes"', '"byte"', "there are bytes and cl100k_base"),
        ("{", "", "damaged"),
        (meta_text, "[]", "damaged"),
    ):
        (out / "meta.json").write_text(meta_text.replace(old, new, 1))
        refused(match)


def test_bad_batches(mixed, tmp_path):
    """Numbers that do not fit together are refused, all at once; so is a teacher signal that is not
    there."""
    with pytest.raises(ValueError) as error:
        mixed.batch(0, -1, 10, rank=3, ranks=3, teacher_fraction=2)
    for expected in ("batch_size is 10", "rank is 3", "seen is -1", "teacher_fraction is 2"):
        assert expected in str(error.value)
    out, _ = make(tmp_path, {"s": words(50)})
    plain = Corpus(out, 16)
    with pytest.raises(ValueError, match="no teacher signal.*--teacher FILE.jsonl"):
        plain.batch(0, 0, 4, teacher_fraction=0.5)
    assert plain.n_rows("train", "teacher") == 0


def test_show_marks_what_is_supervised(mixed, capsys, monkeypatch):
    """Every label stands marked, nothing else in a teacher row is; runs of padding are counted; on
    a terminal the mark is a colour. Control characters and halves of characters never reach the
    terminal as they are."""
    folder = str(mixed.path)
    data.main(["show", folder, "--rows", "3", "--teacher-fraction", "1", "--seq-len", "64"])
    printed = capsys.readouterr().out
    marked = [
        part.split("\u27e7")[0]
        for part in printed.split("--- sample")[1:]
        for part in part.split("\u27e6")[1:]
    ]
    targets = mixed.batch(0, 0, 3, teacher_fraction=1.0)[1]
    assert "".join(marked) == BYTES.decode(targets[targets != IGNORE].tolist()) and marked
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    data.main(["show", folder, "--rows", "1", "--seq-len", "64"])
    assert "\x1b[1;32m" in capsys.readouterr().out
    for text in ("en ", "zh ", "(teacher)", "53.5%", "46.5%"):
        assert text in data.summary(mixed.meta)


@unhurried
@given(st.binary(min_size=1, max_size=40), st.data())
def test_rows_print_safely(raw, draw):
    """Any bytes, cut anywhere, print as printable characters and line ends only."""
    targets = [draw.draw(st.sampled_from([IGNORE, 1])) for _ in raw]
    text = data.row_as_text(BYTES, list(raw), targets, "[", "]")
    assert all(character.isprintable() or character == "\n" for character in text)


def test_bits_per_byte_from_byte_lengths(mixed):
    """A model that is uniform over the 257 ids has log2(257) * tokens / bytes bits per byte, by the
    count of the meta and by byte_lengths alike."""
    tokens = np.concatenate([rows.stream for rows in mixed.parts["val", "language"]])
    by_lengths = len(tokens) * log(257, 2) / byte_lengths(BYTES)[tokens].sum()
    counts = [source["val"] for source in mixed.meta["sources"]]
    by_meta = sum(c["tokens"] for c in counts) * log(257, 2) / sum(c["bytes"] for c in counts)
    assert by_lengths == pytest.approx(by_meta, rel=1e-12)
