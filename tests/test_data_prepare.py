"""Prepared folders: what is written, what is refused, and that nothing half-made stays."""

import contextlib
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from data_helpers import (
    BYTES,
    documents_in,
    lengths_of,
    make,
    shard_tokens,
    unhurried,
    words,
    write_rows,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import console
import data
import prepare as preparing
import textfiles
from prepare import prepare
from textfiles import stdlib_files

ROOT = Path(data.__file__).parent


@pytest.fixture(params=["bytes", "cl100k_base"])
def tokenizer(request):
    return BYTES if request.param == "bytes" else request.getfixturevalue("cl100k")


@settings(unhurried, max_examples=25)
@given(
    documents=st.lists(st.text(min_size=1), min_size=2, max_size=30), fraction=st.floats(0.01, 0.9)
)
def test_shards_read_back_equal(tokenizer, documents, fraction):
    """Every document is in exactly one split, as often as it was given and in its order; equal
    documents are in the same split; both splits hold something; and tokens, documents and bytes are
    counted right."""
    assume(len(set(documents)) >= 2)
    with tempfile.TemporaryDirectory() as folder:
        out, meta = make(folder, {"s": documents}, tokenizer, val_fraction=fraction)
        train, val = (documents_in(out, meta, split, tokenizer)["s"] for split in ("train", "val"))
        assert train and val and not set(train) & set(val)
        assert train == [d for d in documents if d in set(train)] and val == [
            d for d in documents if d in set(val)
        ]
        assert len(train) + len(val) == len(documents)
        assert meta == json.loads((out / "meta.json").read_text())
        assert meta["tokenizer"] == {"name": tokenizer.name, "n_vocab": tokenizer.n_vocab}
        for split, texts in (("train", train), ("val", val)):
            entry = meta["sources"][0][split]
            tokens = shard_tokens(out, entry)
            assert entry["documents"] == len(texts) and entry["tokens"] == len(tokens)
            assert (
                entry["bytes"]
                == sum(len(text.encode()) for text in texts)
                == lengths_of(tokenizer)[tokens].sum()
            )
            assert tokens.tolist() == sum(
                (tokenizer.encode_ordinary(d) + [tokenizer.eot_token] for d in texts), []
            )


def content_hash(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def test_the_held_out_share(tmp_path):
    """Of many documents about val_fraction is held out: 5% of 4000 within 4 standard deviations
    (55). A document of another source with the same text falls on the same side."""
    documents = words(4000)
    out, meta = make(tmp_path, {"a": documents, "b": documents[::2]})
    val = documents_in(out, meta, "val")
    assert 145 <= len(val["a"]) <= 255
    assert set(val["b"]) == set(val["a"]) & set(documents[::2])


def test_a_small_corpus_has_a_held_out_document(tmp_path):
    """Two documents are enough, whatever val_fraction; the held-out one has the smallest hash, all
    its copies too, wherever in the corpus it lies."""
    for number, documents in enumerate([words(2), words(3) * 4, ["same"] * 1500 + words(5)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        out, meta = make(folder, {"s": documents}, val_fraction=1e-9)
        val = documents_in(out, meta, "val")["s"]
        smallest = min(documents, key=content_hash)
        assert val == [smallest] * documents.count(smallest)
    for number, documents in enumerate([[], ["one"], ["same"] * 3]):
        folder = tmp_path / f"few-{number}"
        folder.mkdir()
        message = f"two different documents.* got {len(documents)}" if number else "no document"
        with pytest.raises(ValueError, match=message):
            make(folder, {"s": documents})
        assert not (folder / "out").exists()


def test_output_does_not_depend_on_the_workers(tmp_path, tokenizer, monkeypatch):
    """One, two or five processes write the same bytes, also where pieces are small."""
    files = stdlib_files()[:60]
    items = [
        {"text": w, "proposition": "It is so.", "label": i % 2} for i, w in enumerate(words(300))
    ]
    teacher, contents = write_rows(tmp_path / "t.jsonl", items), []
    for module in (preparing, textfiles):
        monkeypatch.setattr(module, "PIECE", 10_000)
    monkeypatch.setattr(preparing, "MANY", 1)  # processes, however little text there is
    for workers in (1, 2, 5):
        out = tmp_path / f"out-{workers}"
        options = {"teacher": [teacher], "workers": workers, "progress": False}
        prepare({"a": files[:30], "b": files[30:]}, out, tokenizer, **options)
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert contents[0] == contents[1] == contents[2] and len(contents[0]) == 8


def test_text_files_folders_and_jsonl(tmp_path):
    """Sources of every kind, several paths to a source, empty files and rows among them; a folder's
    own files, line ends kept as they are."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_bytes("α\r\nβ\n".encode())
    (tmp_path / "folder" / "empty.md").write_text("")
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "one", "more": 1}\n\n{"text": ""}\n{"text": "\\u8bed\\n<|endoftext|>"}'
    )
    (tmp_path / "plain").write_text("plain")
    meta = prepare(
        {"x": [tmp_path / "folder", tmp_path / "plain"], "y": [tmp_path / "rows.jsonl"]},
        tmp_path / "out",
        BYTES,
        val_fraction=0.5,
        progress=False,
    )
    train, val = (documents_in(tmp_path / "out", meta, split) for split in ("train", "val"))
    assert sorted(train["x"] + val["x"]) == ["plain", "α\r\nβ\n"]
    assert sorted(train["y"] + val["y"]) == ["one", "语\n<|endoftext|>"]


@pytest.mark.parametrize(
    "given_weights, expected",
    [
        ({}, {"a": 0.75, "b": 0.25}),
        ({"b": 0.465}, {"a": 0.535, "b": 0.465}),
        ({"a": 3, "b": 1}, {"a": 0.75, "b": 0.25}),
    ],
)
def test_weights(tmp_path, given_weights, expected):
    """Without weights sources count by their training tokens; one without a weight takes what the
    others leave; if all have one, ratios count. (a is 3 times b, within the rounding by
    documents.)"""
    _, meta = make(tmp_path, {"a": words(300, 1), "b": words(100, 2)}, weights=given_weights)
    found = {source["name"]: source["weight"] for source in meta["sources"]}
    if not given_weights:
        tokens = {source["name"]: source["train"]["tokens"] for source in meta["sources"]}
        expected = {name: n / sum(tokens.values()) for name, n in tokens.items()}
    assert found == pytest.approx(expected)


def test_bad_requests_name_everything_at_once(tmp_path):
    """All that is wrong with a request is said in one error, and nothing is written."""
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    (tmp_path / "nothing").mkdir()
    before = sorted(tmp_path.rglob("*"))
    absent, empty, text = (tmp_path / name for name in ("absent.txt", "nothing", "text.txt"))
    with pytest.raises(ValueError) as error:
        sources = {"a": [absent], "b": [empty], "c": [text]}
        weights, teacher = {"d": 1, "a": -2, "b": 5}, [tmp_path / "no.jsonl", text]
        options = {"teacher": teacher, "weights": weights, "val_fraction": 1.5, "workers": -1}
        prepare(sources, tmp_path / "full", BYTES, **options)
    expected = """absent.txt|nothing|no.jsonl|'d'|'a' is -2|leave nothing for c|1.5|workers is -1|
        not an empty folder|text.txt' is not a .jsonl file"""
    for part in expected.split("|"):
        assert part.strip() in str(error.value)
    assert "rm -r" not in str(error.value)  # somebody's own files: never advise to remove them
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match="no source"):
        prepare({}, tmp_path / "out", BYTES)


def test_bad_lines_are_told(tmp_path):
    """Every bad line of a .jsonl file is left out and counted by what is wrong with it, with its
    number, at most three of a kind and file; the good lines are read."""
    good = {"text": "t", "proposition": "p", "label": 1}
    lines = [
        json.dumps(good),
        "{broken",
        json.dumps(good | {"label": 2}),
        json.dumps(good | {"label": True}),
        "",
        json.dumps({"text": "t", "label": 0}),
        json.dumps(good | {"label": "1"}),
        json.dumps(good | {"text": 5}),
        "[1, 2]",
        json.dumps(good | {"proposition": "\ud83d"}),
        "[" * 100_000,
        json.dumps(good | {"label": 1.0}),
        json.dumps(good | {"text": "u"}),
    ]
    text, teacher = tmp_path / "text.txt", tmp_path / "t.jsonl"
    text.write_text("".join(f"hello {i}\n" for i in range(10_000)))
    teacher.write_text("\n".join(lines))
    meta = prepare({"s": [text]}, tmp_path / "out", BYTES, teacher=[teacher], progress=False)
    found = {
        reason: (one["count"], [detail for _, detail in one["examples"]])
        for reason, one in meta["skipped"].items()
    }
    label = "the field 'label' must be 0 or 1"
    assert found[label] == (4, ["line 3: it is 2", "line 4: it is true", 'line 7: it is "1"'])
    assert found["the field 'text' must be text"] == (1, ["line 8: it is 5"])
    proposition = found["the field 'proposition' must be text"]
    details = ["line 6: it is missing; there are text, label", 'line 10: it is "\\ud83d"']
    assert proposition == (2, details)
    assert found["a line that is no JSON object"] == (1, ["line 9: [1, 2]"])
    assert found["broken JSON"][0] == 2 and len(found) == 5
    assert meta["teacher"]["train"]["documents"] + meta["teacher"]["val"]["documents"] == 2
    printed = data.summary(meta)
    assert "4 x the field 'label'" in printed and f"{teacher}: line 3: it is 2" in printed


def test_only_bad_lines_are_an_error(tmp_path):
    """Where nothing is left to train on, the error says what was left out, and nothing is made."""
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b'{"text": 7}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError) as error:
        prepare({"s": [rows]}, tmp_path / "out", BYTES, progress=False)
    assert "source 's' has no document" in str(error.value)
    assert "line 1: it is 7" in str(error.value)
    assert "line 2: its byte 10 fits no character" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_wrong_field_is_told_before_the_work(tmp_path, monkeypatch):
    """A source whose objects or rows have no such field is told before any text is tokenized, with
    the fields that are there and what to type; what is advised works. A line without the field,
    before others that have it, does not matter."""
    monkeypatch.chdir(tmp_path)
    write_rows("en.jsonl", [{"about": 1}, *({"text": text} for text in words(50))])
    write_rows("zh.jsonl", [{"url": "u", "content": text} for text in words(50, 1)])
    write_rows("t.jsonl", [{"text": "a", "label": 1}])
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "tokenize", lambda *_: pytest.fail("has begun"))
        with pytest.raises(ValueError) as error:
            data.main("prepare en=en.jsonl zh=zh.jsonl --teacher t.jsonl --out o".split())
    told = str(error.value)
    assert "source 'zh': zh.jsonl" in told and "missing; there are url, content" in told
    assert "type --field NAME" in told and "'en'" not in told and not Path("o").exists()
    assert "source 'teacher': t.jsonl: the field 'proposition'" in told
    data.main("prepare en=en.jsonl --out o".split())
    data.main("prepare zh=zh.jsonl --field content --append --out o".split())
    assert [one["name"] for one in preparing.read_meta(Path("o"))["sources"]] == ["en", "zh"]


def test_a_source_left_without_training_text(tmp_path):
    """A source whose only document is held out is an error that names it."""
    documents = words(100)
    smallest = min(documents, key=content_hash)
    message = "source 'b' has no document to train on: all its 1 are held out"
    with pytest.raises(ValueError, match=message):
        make(tmp_path, {"a": documents, "b": [smallest]})


def command(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / "data.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )


def test_command_line_from_text_to_rows(tmp_path):
    """prepare and show, as a learner types them, also where the output knows no Unicode; a mistake
    is exit code 2 and one screen without a traceback."""
    (tmp_path / "notes.txt").write_text("".join(f"Line {i} of my notes.\n" for i in range(5000)))
    items = [{"text": f"{i} is odd", "proposition": "So.", "label": i % 2} for i in range(100)]
    write_rows(tmp_path / "t.jsonl", items)
    done = command("prepare", "notes.txt", "--teacher", "t.jsonl", "--out", "made", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "python data.py show made" in done.stdout and "tokenizing" in done.stderr
    done = command("show", "made", "--teacher-fraction", "0.5", "--rows", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sample 1, teacher signal" in done.stdout and "\\u27e6\\U0001f6" in done.stdout
    done = command("prepare", "absent.txt", "--out", "x", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert "absent.txt" in done.stderr and not done.stdout and not (tmp_path / "x").exists()
    for wrong in ("", "prepare", "show", "prepare a --out x --val-fraction much"):
        with pytest.raises(SystemExit) as left:
            data.main(wrong.split())
        assert left.value.code == 2


def test_names_of_inputs(tmp_path, monkeypatch):
    """NAME=PATH names a source, a path without a name is called like its file, an existing path
    with '=' in it is a path, and the word stdlib is the standard library."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "c=d.txt"):
        Path(name).write_text("x")
    asked = {}

    def record(sources, out, tokenizer, **options):
        asked.update(options, sources=sources)
        tokenizer = {"name": "bytes", "n_vocab": 257}
        return {"sources": [], "teacher": None, "tokenizer": tokenizer, "skipped": {}}

    monkeypatch.setattr(data, "prepare", record)
    words = "prepare a.txt a=b.txt c=d.txt stdlib --out o --weight a=0.25 --weight c=d=2"
    data.main(words.split())
    stdlib = stdlib_files()
    assert asked["sources"] == {"a": ["a.txt", "b.txt"], "c=d": ["c=d.txt"], "stdlib": stdlib}
    assert asked["weights"] == {"a": 0.25, "c=d": 2.0}
    for wrong in ("zh", "zh=much"):
        with pytest.raises(ValueError, match="NAME=NUMBER"):
            data.main(["prepare", "a.txt", "--out", "o", "--weight", wrong])


def test_the_bar_shows_every_byte(tmp_path, monkeypatch):
    """The bar counts the bytes of all files of a signal, of every kind, and ends at their sum."""
    write_rows(tmp_path / "a.jsonl", [{"text": text} for text in words(50)])
    (tmp_path / "b.txt").write_text("α line\n" * 100_000)
    items = [{"text": text, "proposition": "So.", "label": 0} for text in words(30)]
    teacher = write_rows(tmp_path / "t.jsonl", items)
    bars = []

    class Bar(contextlib.AbstractContextManager):
        def __init__(self, total, initial, **_):
            self.total, self.n, self.steps = total, initial, 0
            bars.append(self)

        def __exit__(self, *_):
            pass

        def update(self, n):
            self.n, self.steps = self.n + n, self.steps + 1

    for module in (preparing, textfiles):
        monkeypatch.setattr(module, "PIECE", 10_000)
    monkeypatch.setattr(console, "progress", Bar)
    sources = {"s": [tmp_path / "a.jsonl", tmp_path / "b.txt"]}
    prepare(sources, tmp_path / "out", BYTES, teacher=[teacher])
    sizes = [(tmp_path / name).stat().st_size for name in ("a.jsonl", "b.txt", "t.jsonl")]
    assert [bar.total for bar in bars] == [bar.n for bar in bars] == [sum(sizes[:2]), sizes[2]]
    assert bars[0].steps > 10
    write_rows(tmp_path / "few.jsonl", [{"text": text} for text in words(3)])
    prepare({"s": [tmp_path / "few.jsonl"]}, tmp_path / "few", BYTES, val_fraction=1e-9)
    assert len(bars) == 3 and bars[2].n == bars[2].total  # one, though the limit has moved


def test_the_advice_for_small_files_works(tmp_path, monkeypatch):
    """Three files of one document each cannot be three sources, as one is held out; the error says
    that they can be one source, and they can."""
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        Path(f"{name}.txt").write_text(name)
    with pytest.raises(ValueError, match="make one source of several inputs: all=INPUT all=INPUT"):
        data.main("prepare a.txt b.txt c.txt --out o".split())
    data.main("prepare all=a.txt all=b.txt all=c.txt --out o".split())
    assert Path("o", "meta.json").is_file()


def test_printed_commands_are_accepted(tmp_path, monkeypatch, capsys):
    """A command that is printed works as it is printed, with blanks and quotes in the names."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("".join(f"Line {i}.\n" for i in range(9000)))
    out = "it's a folder"
    data.main(["prepare", "a.txt", "--out", out])
    python, program, *words = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    assert (python, program) == ("python", "data.py") and words == ["show", out]
    data.main(words)
    with pytest.raises(ValueError) as error:
        data.main(["prepare", "a.txt", "--out", out])
    removal = shlex.split(str(error.value).split("(--append), or ")[1])
    assert removal == ["rm", "-r", str(tmp_path / out)]
    with pytest.raises(ValueError) as error:
        data.main(["show", "an other"])
    assert shlex.split(str(error.value).split("type ")[1])[-2:] == ["--out", "an other"]


def test_a_name_that_is_not_utf8(tmp_path, monkeypatch, capfd):
    """A folder whose name is not UTF-8 cannot name a source, which is said before the work; with a
    NAME it is read like any other, whatever the names of its files."""
    monkeypatch.chdir(tmp_path)
    folder = os.fsdecode(b"caf\xe9")
    os.mkdir(folder)
    for name in (b"a.txt", b"\xff.txt"):
        Path(folder, os.fsdecode(name)).write_text(ascii(name))
    with pytest.raises(ValueError, match="is not UTF-8: choose one, NAME=INPUT"):
        data.main(["prepare", folder, "--out", "o"])
    assert "tokenizing" not in capfd.readouterr().err and not Path("o").exists()
    data.main(["prepare", f"cafe={folder}", "--out", "o"])
    assert Path("o", "meta.json").is_file()


def test_show_into_a_closed_pipe(tmp_path):
    """`python data.py show c | true` prints nothing about the pipe."""
    (tmp_path / "a.txt").write_text("".join(f"Line {i}.\n" for i in range(9000)))
    prepare({"a": [tmp_path / "a.txt"]}, tmp_path / "c", BYTES, progress=False)
    reading, writing = os.pipe()
    os.close(reading)
    show = [sys.executable, str(ROOT / "data.py"), "show", "c", "--rows", "50"]
    done = subprocess.run(show, cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.stderr == b"" and done.returncode == 141
