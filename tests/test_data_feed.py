"""A corpus that is fed in pieces: appended to, merged from the work of several jobs, with a
validation set of its own; a large one is opened in no time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_helpers import BYTES, documents_in, make, unhurried, words, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import prepare as preparing
from data import Corpus
from lab import merge as merging
from lab.merge import merge
from prepare import prepare

ROOT = Path(preparing.__file__).parent


def rows_of(path, texts):
    return write_rows(path, [{"text": text} for text in texts])


def shards(out):
    return {path.name: path.read_bytes() for path in Path(out).glob("*.tokens")}


@pytest.fixture
def three(tmp_path):
    """Three files of 300 documents, of which the first and the third share some."""
    texts = {name: words(300, seed) for seed, name in enumerate("abc")}
    texts["c"][::3] = texts["a"][::3]
    return {name: rows_of(tmp_path / f"{name}.jsonl", texts[name]) for name in texts}


def test_appending_gives_what_preparing_at_once_gives(tmp_path, three):
    """Files that are appended later, to a source that is there or as a new one, give the tokens,
    counts and digest of one command. What was held out stays held out, and in its place."""
    at_once = {"s": [three["a"], three["b"]], "t": [three["c"]]}
    prepare(at_once, tmp_path / "once", BYTES, weights={"t": 0.2}, progress=False)
    options = {"weights": {"t": 0.2}, "append": True, "progress": False}
    out = tmp_path / "out"
    prepare({"s": [three["a"]]}, out, BYTES, progress=False)
    before = Corpus(out, 16)
    first = {split: [*before.parts[split, "language"][0].stream] for split in ("train", "val")}
    prepare({"s": [three["b"]]}, out, BYTES, append=True, progress=False)
    meta = prepare({"t": [three["c"]]}, out, BYTES, **options)
    assert meta == json.loads((tmp_path / "once" / "meta.json").read_text())
    assert shards(out) == shards(tmp_path / "once")
    after = Corpus(out, 16)
    assert after.digest == Corpus(tmp_path / "once", 16).digest != before.digest
    for split, tokens in first.items():
        assert [*after.parts[split, "language"][0].stream[: len(tokens)]] == tokens
        assert [*before.parts[split, "language"][0].stream] == tokens  # the one that is open, too


def test_a_small_corpus_keeps_its_limit_when_it_grows(tmp_path):
    """A small corpus, whose limit moved so that it has a held-out document, keeps that limit when
    text is added: no document changes sides."""
    texts = words(200, 5)
    for n in range(2, 30, 9):
        folder = tmp_path / str(n)
        folder.mkdir()
        out, meta = make(folder, {"s": texts[:n]})
        held_out = documents_in(out, meta, "val")["s"]
        more = rows_of(folder / "more.jsonl", texts[n:])
        added = prepare({"s": [more]}, out, BYTES, append=True, progress=False)
        assert added["limits"] == meta["limits"]
        assert [t for t in documents_in(out, added, "val")["s"] if t in texts[:n]] == held_out


def test_an_append_that_fails_changes_nothing(tmp_path, three, monkeypatch):
    """While text is appended, and after the append was killed, the folder is what it was, and can
    be trained on; the same call goes on, another one is refused."""
    out = tmp_path / "out"
    prepare({"s": [three["a"]]}, out, BYTES, progress=False)
    before = Corpus(out, 16)
    whole = preparing.write_meta
    monkeypatch.setattr(
        preparing, "write_meta", lambda *_, **__: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(OSError, match=f"To give up: rm -r {out}/unfinished"):
        prepare({"s": [three["b"]]}, out, BYTES, append=True, progress=False)
    assert Corpus(out, 16).digest == before.digest
    for name, sources in (("s", [three["c"]]), ("t", [three["b"]])):
        with pytest.raises(ValueError, match="unfinished work of another command"):
            prepare({name: sources}, out, BYTES, append=True, progress=False)
    monkeypatch.setattr(preparing, "write_meta", whole)
    prepare({"s": [three["b"]]}, out, BYTES, append=True, progress=False)
    prepare({"s": [three["a"], three["b"]]}, tmp_path / "once", BYTES, progress=False)
    assert shards(out) == shards(tmp_path / "once")


@pytest.mark.parametrize("mark_alone", [False, True])
def test_a_given_up_append_leaves_no_trace(tmp_path, three, monkeypatch, mark_alone):
    """After rm -r of the unfinished work, as advised, the next append begins behind the text; also
    where rm was stopped behind the state."""
    out = tmp_path / "out"
    prepare({"s": [three["a"]]}, out, BYTES, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(
            preparing, "write_meta", lambda *_, **__: (_ for _ in ()).throw(OSError("full"))
        )
        with pytest.raises(OSError):
            prepare({"s": [three["b"]]}, out, BYTES, append=True, progress=False)
    if mark_alone:
        (out / "unfinished" / "language.json").unlink()
    else:
        subprocess.run(["rm", "-r", out / "unfinished"], check=True)
    prepare({"s": [three["c"]]}, out, BYTES, append=True, progress=False)
    prepare({"s": [three["a"], three["c"]]}, tmp_path / "once", BYTES, progress=False)
    assert shards(out) == shards(tmp_path / "once")


def test_appends_that_do_not_fit(tmp_path, three, cl100k):
    """Another tokenizer, a folder that is not there, unknown weights: each is said."""
    out = tmp_path / "out"
    prepare({"s": [three["a"]]}, out, BYTES, weights={"s": 1}, progress=False)
    with pytest.raises(ValueError, match="has bytes tokens, not those of cl100k_base"):
        prepare({"s": [three["b"]]}, out, cl100k, append=True, progress=False)
    with pytest.raises(ValueError, match="does not exist"):
        prepare({"s": [three["b"]]}, tmp_path / "no", BYTES, append=True, progress=False)
    with pytest.raises(ValueError, match="leave nothing for t"):
        prepare({"t": [three["b"]]}, out, BYTES, append=True, progress=False)
    with pytest.raises(ValueError, match="--val-fraction 0.3: .* holds out 0.05; leave it out"):
        prepare({"s": [three["b"]]}, out, BYTES, val_fraction=0.3, append=True, progress=False)
    assert not (tmp_path / "no").exists()


def test_a_teacher_signal_is_appended(tmp_path, three):
    """Items of the teacher signal can come later, and in several commands."""
    items = [{"text": t, "proposition": "So.", "label": i % 2} for i, t in enumerate(words(90))]
    files = [write_rows(tmp_path / f"t{k}.jsonl", items[k * 30 : k * 30 + 30]) for k in range(3)]
    prepare({"s": [three["a"]]}, tmp_path / "once", BYTES, teacher=files, progress=False)
    out = tmp_path / "out"
    prepare({"s": [three["a"]]}, out, BYTES, progress=False)
    for file in files:
        options = {"teacher": [file], "append": True, "progress": False}
        meta = prepare({}, out, BYTES, **options)
    once = json.loads((tmp_path / "once" / "meta.json").read_text())
    if meta["limits"] == once["limits"]:  # else the first thirty items moved the limit
        assert meta == once and shards(out) == shards(tmp_path / "once")
    assert sum(meta["teacher"][split]["documents"] for split in ("train", "val")) == 90


# --------------------------------------------------------------------------------------------------
# Merging


def test_merging_gives_what_preparing_at_once_gives(tmp_path, three):
    """What three jobs have prepared, merged, has the bytes of one command, with the weights of the
    jobs or with others."""
    items = [{"text": t, "proposition": "So.", "label": i % 2} for i, t in enumerate(words(90))]
    teacher = write_rows(tmp_path / "t.jsonl", items)
    jobs = [({"s": [three["a"]]}, {}), ({"t": [three["b"]], "s": [three["c"]]}, {})]
    for number, (sources, options) in enumerate(jobs):
        if number == 1:
            options = {"teacher": [teacher], "weights": {"t": 0.3}}
        prepare(sources, tmp_path / f"part-{number}", BYTES, **options, progress=False)
    sources = {"s": [three["a"], three["c"]], "t": [three["b"]]}
    options = {"teacher": [teacher], "weights": {"t": 0.3}, "progress": False}
    once = prepare(sources, tmp_path / "once", BYTES, **options)
    parts = [tmp_path / f"part-{number}" for number in range(2)]
    merged = merge(parts, tmp_path / "out", progress=False)
    assert merged == once and shards(tmp_path / "out") == shards(tmp_path / "once")
    other = merge(parts, tmp_path / "other", weights={"s": 0.9}, progress=False)
    assert [source["weight"] for source in other["sources"]] == pytest.approx([0.9, 0.1])


def test_merges_that_do_not_fit(tmp_path, three, cl100k):
    """Other tokenizers, other held-out shares, weights that contradict each other, a folder that is
    none: all is said, and nothing is made."""
    a = tmp_path / "a"
    prepare({"s": [three["a"]]}, a, BYTES, weights={"s": 2}, progress=False)
    prepare({"s": [three["b"]]}, tmp_path / "b", cl100k, progress=False)
    options = {"val_fraction": 0.3, "weights": {"s": 3}, "progress": False}
    prepare({"s": [three["c"]]}, tmp_path / "c", BYTES, **options)
    with pytest.raises(ValueError) as error:
        merge([a, tmp_path / "b", tmp_path / "c"], a, progress=False)
    for text in (
        "not of one tokenizer: ",
        "c holds out other documents (language) than",
        "'s' has the weights 2 and 3: give one",
        "is there already",
    ):
        assert text in str(error.value)
    with pytest.raises(ValueError, match="no meta.json"):
        merge([a, tmp_path], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_teacher_limits_are_compared_with_every_folder(tmp_path, three):
    """Two folders that hold out other items do not fit together, whatever the first one has."""
    items = [{"text": t, "proposition": "So.", "label": i % 2} for i, t in enumerate(words(60))]
    teacher = write_rows(tmp_path / "t.jsonl", items)
    prepare({"s": [three["a"]]}, tmp_path / "a", BYTES, progress=False)
    prepare({"s": [three["b"]]}, tmp_path / "b", BYTES, progress=False)
    prepare({}, tmp_path / "b", BYTES, teacher=[teacher], append=True, progress=False)
    prepare({"s": [three["c"]]}, tmp_path / "c", BYTES, teacher=[teacher], progress=False)
    meta = tmp_path / "c" / "meta.json"
    changed = json.loads(meta.read_text())
    changed["limits"]["teacher"] += 1
    meta.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"c holds out other documents \(teacher\) than .*b:"):
        merge([tmp_path / name for name in "abc"], tmp_path / "out", progress=False)


def test_a_killed_merge_is_repeated(tmp_path, three, monkeypatch):
    """A merge that was stopped in the middle can be repeated; the parts are not changed. Another
    merge, or a preparation, does not go on with it."""
    for name, path in three.items():
        prepare({"s": [path]}, tmp_path / f"part-{name}", BYTES, progress=False)
    parts, whole, calls = [tmp_path / f"part-{name}" for name in three], merging.open_shard, []
    before = [shards(part) for part in parts]

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(merging, "open_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        merge(parts, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="not finished"):
        Corpus(tmp_path / "out", 16)
    other = {"match": "unfinished work of another command"}
    with pytest.raises(ValueError, **other):
        merge(parts[:2], tmp_path / "out", progress=False)
    with pytest.raises(ValueError, **other):
        prepare({"s": list(three.values())}, tmp_path / "out", BYTES, progress=False)
    merge(parts, tmp_path / "out", progress=False)
    prepare({"s": list(three.values())}, tmp_path / "once", BYTES, progress=False)
    assert shards(tmp_path / "out") == shards(tmp_path / "once")
    assert [shards(part) for part in parts] == before


def test_feeding_by_command(tmp_path, three, monkeypatch, capsys):
    """prepare, prepare --append, show and lab.merge, as they are typed."""
    monkeypatch.chdir(tmp_path)
    data.main("prepare s=a.jsonl --val exam=b.jsonl --val-fraction 0 --out one".split())
    data.main("prepare s=c.jsonl --append --out one".split())
    data.main("prepare s=a.jsonl --val exam=b.jsonl --val-fraction 0 --out two".split())
    merging.main("one two --weight s=1 --out both".split())
    meta = json.loads(Path("both", "meta.json").read_text())
    counts = [
        source[split]["documents"] for source in meta["sources"] for split in ("train", "val")
    ]
    assert counts == [900, 0, 0, 600]
    capsys.readouterr()
    data.main("show both --rows 1".split())
    printed = capsys.readouterr().out
    assert "exam            val" in printed and "exam            train" not in printed


# --------------------------------------------------------------------------------------------------
# A validation set of its own


def test_a_validation_set_of_its_own(tmp_path, three):
    """All documents of `val` are held out, as a source of their own or in one that is also trained
    on; no sample is of a source that is only held out."""
    val = {"exam": [three["b"]], "s": [three["c"]]}
    options = {"val": val, "val_fraction": 0, "progress": False}
    meta = prepare({"s": [three["a"]]}, tmp_path / "out", BYTES, **options)
    train, held_out = (documents_in(tmp_path / "out", meta, split) for split in ("train", "val"))
    assert train == {"s": words(300, 0), "exam": []}
    assert held_out["exam"] == words(300, 1) and len(held_out["s"]) == 300
    assert [source["weight"] for source in meta["sources"]] == [1.0, 0.0]
    corpus = Corpus(tmp_path / "out", 32)
    assert {corpus.sample(0, number)[0] for number in range(50)} == {"s"}
    rows = corpus.rows_by_source("val", "language")
    assert list(rows) == ["s", "exam"] and sum(rows.values()) == corpus.n_rows("val", "language")
    with pytest.raises(ValueError, match="val_fraction is 0, .* or be 0 with a validation set"):
        prepare({"s": [three["a"]]}, tmp_path / "no", BYTES, val_fraction=0, progress=False)


def test_a_validation_set_without_a_document(tmp_path, three):
    """It is refused by its name: nothing else is held out in its place."""
    (broken := tmp_path / "exam.jsonl").write_text('{"text": 7}\n')
    options = {"val": {"exam": [broken]}, "val_fraction": 0, "progress": False}
    with pytest.raises(ValueError, match="source 'exam' has no document"):
        prepare({"s": [three["a"]]}, tmp_path / "out", BYTES, **options)
    assert not (tmp_path / "out").exists()


def test_a_share_and_a_validation_set(tmp_path, three):
    """With both, the share of the hashes is held out of the text to train on, as without the set;
    where it is empty, too, and that of a single document."""
    options = {"val": {"exam": [three["b"]]}, "progress": False}
    meta = prepare({"s": [three["a"]]}, tmp_path / "out", BYTES, **options)
    alone = prepare({"s": [three["a"]]}, tmp_path / "alone", BYTES, progress=False)
    assert meta["sources"][0]["val"]["digest"] == alone["sources"][0]["val"]["digest"]
    for texts in (["one"], ["one", "one"]):
        one = rows_of(tmp_path / "one.jsonl", texts)
        options["val_fraction"] = 0.999999  # the hash says: held out; but something must be trained
        meta = prepare({"s": [one]}, tmp_path / f"one-{len(texts)}", BYTES, **options)
        assert meta["sources"][0]["train"]["documents"] == len(texts)


# --------------------------------------------------------------------------------------------------
# Large


def test_opening_a_hundred_gigabytes(tmp_path):
    """A corpus of 100 GB (a file with a hole) is opened, and its last row read, in less than 50 MB
    more than an empty one takes."""
    out, _ = make(tmp_path, {"s": words(200)})
    meta = json.loads((out / "meta.json").read_text())
    entry = meta["sources"][0]["train"]
    entry["tokens"] = 50 * 10**9
    os.truncate(out / entry["shard"], 16 + 2 * entry["tokens"])
    (out / "meta.json").write_text(json.dumps(meta))
    program = """if True:
        import resource, sys
        import data
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        before = peak()
        corpus = data.Corpus(sys.argv[1], 512)
        n = corpus.n_rows("train", "language")
        corpus.rows("train", "language", n - 1, 1)
        corpus.batch(0, 10**7, 64)
        print(n, peak() - before)"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(out)]
    n, megabytes = map(int, subprocess.check_output(command, env=environment).split())
    assert n == (50 * 10**9 - 1) // 512 and megabytes < 50


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    items = [{"text": t, "proposition": "So.", "label": i % 2} for i, t in enumerate(words(90))]
    texts = {"en": words(200, 1), "zh": words(30, 2)}
    out, _ = make(tmp_path_factory.mktemp("corpus"), texts, teacher=items, val_fraction=0.2)
    return Corpus(out, 128, document_mask=True)


@settings(unhurried, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 500), st.integers(1, 4)), max_size=8))
def test_the_next_batch_is_the_same_batch(corpus, calls):
    """batch_ahead gives what batch gives, whether the batch that was made ahead is asked for or
    another one (after a growth, say), for any order of calls."""
    for seed, seen, size in calls:
        for step in range(3):
            call = (seed, seen + step * size, size)
            options = {"teacher_fraction": 0.25, "rank": 0, "ranks": 1}
            made, expected = corpus.batch_ahead(*call, **options), corpus.batch(*call, **options)
            assert all(map(np.array_equal, made, expected))


def test_an_error_of_a_batch_is_told(corpus):
    """What batch refuses, batch_ahead refuses, and goes on with the next call."""
    with pytest.raises(ValueError, match="seen is -4"):
        corpus.batch_ahead(0, -4, 4)
    assert np.array_equal(corpus.batch_ahead(0, 8, 4)[0], corpus.batch(0, 8, 4)[0])


def test_documents_are_numbered(corpus):
    """Every end-of-text token begins a document; a corpus without document_mask numbers none."""
    tokens = corpus.rows("val", "language", 0, 3)[0]
    numbers = corpus.documents(tokens)
    for row, found in zip(tokens.tolist(), numbers.tolist(), strict=True):
        assert found == [row[: k + 1].count(256) for k in range(len(row))]
    assert Corpus(corpus.path, 128).documents(tokens) is None


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_how_often_a_source_is_read(corpus, fraction):
    """`epochs` counts the samples of each source over its rows: here by drawing all of them."""
    names = [corpus.sample(0, number, fraction)[0] for number in range(700)]
    found = corpus.epochs(700, fraction)
    rows = {"en": 0, "zh": 1}
    for name, k in rows.items():
        expected = names.count(name) / len(corpus.parts["train", "language"][k])
        assert found[name] == pytest.approx(expected)
    teacher = names.count(None) / len(corpus.parts["train", "teacher"][0])
    assert found["the teacher signal"] == pytest.approx(teacher)
