"""Where a prepared folder is made: it is whole or says that it is not, whoever stands in the way,
and what is done is not done again."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import BYTES, make, words, write_rows
from hypothesis import given
from hypothesis import strategies as st
from processes import process_tree

import prepare as preparing
import textfiles
from data import Corpus
from prepare import prepare, prepare_once

ROOT = Path(preparing.__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def small_pieces(monkeypatch):
    """A text of a few hundred kilobytes has some tens of pieces."""
    for module in (preparing, textfiles):
        monkeypatch.setattr(module, "PIECE", 20_000)


@pytest.fixture
def text(tmp_path):
    """A file of 30 documents, alone in its folder."""
    path = tmp_path / "in" / "text.txt"
    path.parent.mkdir()
    path.write_text("".join(f"hello {i}\n" for i in range(50_000)))
    return path


# --------------------------------------------------------------------------------------------------
# What is done is not done again


@contextlib.contextmanager
def stopping(monkeypatch, after, error):
    """So many pieces are tokenized, then comes an error; the list of the pieces that were."""
    tokenized, whole = [], preparing.documents

    def documents(part, *options):
        if part.before not in tokenized:
            if len(tokenized) == after:
                raise error
            tokenized.append(part.before)
        return whole(part, *options)

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "documents", documents)
        yield tokenized


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("after", [0, 1, 7])
def test_the_same_call_goes_on(text, tmp_path, monkeypatch, small_pieces, error, after):
    """After Ctrl-C or a full disk the folder is not whole, and says so. The same call goes on with
    the pieces that are missing, and writes what it would have written at once."""
    prepare({"s": [text]}, tmp_path / "whole", BYTES, workers=1, progress=False)
    out = tmp_path / "out"
    with stopping(monkeypatch, after, error) as first, pytest.raises(type(error)) as raised:
        prepare({"s": [text]}, out, BYTES, workers=1, progress=False)
    if isinstance(error, OSError):
        assert "out is not finished: [Errno 28] No space left" in str(raised.value)
        assert f"rm -r {out}" in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="not finished: repeat the command"):
        Corpus(out, 16)
    with stopping(monkeypatch, 1000, error) as second:
        prepare({"s": [text]}, out, BYTES, workers=1, progress=False)
    assert len(first) == after and not set(first) & set(second) and len(first + second) > 20
    assert contents(out) == contents(tmp_path / "whole")


KILLED = """if True:
    import os, signal, sys, prepare, textfiles, tokenizer
    prepare.PIECE = textfiles.PIECE = 20_000
    prepare.MANY = 1
    whole, count = getattr(prepare, sys.argv[1]), 0
    def killed(*arguments, **options):
        global count
        count += 1
        if count == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments, **options)
    setattr(prepare, sys.argv[1], killed)
    sources = {"s": ["in/text.txt"]}
    options = {"teacher": ["in/t.jsonl"], "workers": int(sys.argv[3]), "progress": False}
    prepare.prepare(sources, "out", tokenizer.get_tokenizer("bytes"), **options)"""


@pytest.mark.parametrize(
    "place, count, workers",
    [
        ("append_piece", 1, 1),
        ("append_to_shard", 8, 1),
        ("replace_file", 11, 1),
        ("append_piece", 9, 2),
        ("write_meta", 1, 1),
    ],
)
def test_kill_9_at_any_place(text, tmp_path, small_pieces, place, count, workers):
    """Killed before a piece is appended, between its two halves, before the state is written, with
    worker processes, and before meta.json: the next call completes the same bytes."""
    items = [{"text": t, "proposition": "So.", "label": i % 2} for i, t in enumerate(words(40))]
    teacher = write_rows(text.parent / "t.jsonl", items)
    command = [sys.executable, "-c", KILLED, place, str(count), str(workers)]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match="not finished"):
        Corpus(tmp_path / "out", 16)
    for out in ("out", "whole"):
        options = {"teacher": [teacher], "workers": 1, "progress": False}
        prepare({"s": [text]}, tmp_path / out, BYTES, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_workers_end_with_their_parent(text, tmp_path):
    """After kill -9 of the command its worker processes end, too."""
    program = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "print('at work', flush=True)")
    program = program.replace("return whole", "time.sleep(1000); return whole")
    program = program.replace("import os,", "import os, time,")
    write_rows(text.parent / "t.jsonl", [])
    command = [sys.executable, "-c", program, "append_piece", "1", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"at work\n"
    workers = set(process_tree(process.pid)) - {process.pid}
    process.kill()
    process.wait()
    assert len(workers) == 2
    process.stdout.read()  # ends when no worker holds the pipe any more
    process.stdout.close()


def test_a_killed_worker_is_an_error_of_one_line(text, tmp_path, small_pieces, monkeypatch):
    """A worker process that the system kills, as it does where the memory is full, ends the command
    with a line that says so; the same call goes on."""
    monkeypatch.setattr(preparing, "MANY", 1)
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "hash64", lambda text: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(OSError, match=r"a worker process was killed.*--workers N.*goes on"):
            prepare({"s": [text]}, tmp_path / "out", BYTES, workers=2, progress=False)
    prepare({"s": [text]}, tmp_path / "out", BYTES, progress=False)
    assert Corpus(tmp_path / "out", 16).n_rows("val", "language") > 0


def test_a_full_disk(text, tmp_path):
    """A file that may not grow any further is an error of one line from the command, with exit code
    2; with more room the same command completes the folder."""
    limited = (
        "import resource, signal, sys, console, prepare, tokenizer; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY)); "
        "bytes = tokenizer.get_tokenizer('bytes'); "
        "console.run(lambda: prepare.prepare({'s': ['in']}, 'out', bytes) and 0)"
    )
    for limit, code in ((300_000, 2), (10**7, 0)):
        command = [sys.executable, "-c", limited, str(limit)]
        done = subprocess.run(
            command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        if code:
            assert "out is not finished: [Errno 27] File too large" in done.stderr
            assert "Traceback" not in done.stderr
    assert Corpus(tmp_path / "out", 16).n_rows("train", "language") > 0


def test_other_work_is_not_thrown_away(text, tmp_path, monkeypatch, small_pieces):
    """Another command, or the same one after a file has changed, does not go on with unfinished
    work, and does not remove it: it says so. What it advises works."""
    out = tmp_path / "out"
    with stopping(monkeypatch, 5, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        prepare({"s": [text]}, out, BYTES, workers=1, progress=False)
    before = contents(out / "unfinished")
    for change in ({"val_fraction": 0.2}, {"field": "content"}, {"sources": {"t": [text]}}):
        with pytest.raises(ValueError, match="unfinished work of another command"):
            prepare(**{"sources": {"s": [text]}, "out": out, "tokenizer": BYTES} | change)
    text.write_text("other text\n" * 9000)
    with pytest.raises(ValueError, match=f"or remove it with rm -r {out}"):
        prepare({"s": [text]}, out, BYTES, progress=False)
    assert contents(out / "unfinished") == before
    subprocess.run(["rm", "-r", out], check=True)
    text.write_text("".join(f"other text {i}\n" for i in range(9000)))
    prepare({"s": [text]}, out, BYTES, progress=False)


@pytest.mark.parametrize("mended", ["b", "teacher"])
def test_an_empty_source_keeps_the_work_of_the_others(text, tmp_path, monkeypatch, mended):
    """Where only the text shows that a source, or the teacher signal, has nothing, what is done is
    kept. The same call after the mistake is mended goes on with it, and writes what one call
    writes."""
    monkeypatch.setattr(preparing, "MANY", 1)  # of less text nothing is kept
    items = [{"text": t, "proposition": "So.", "label": 0} for t in words(40)]
    good = {"b": [{"text": t} for t in words(60)], "teacher": items}
    files = {name: write_rows(tmp_path / f"{name}.jsonl", good[name]) for name in good}
    bad = [row | {"text": 7} for row in good[mended]]
    write_rows(files[mended], bad)
    sources, out, whole = {"a": [text], "b": [files["b"]], "c": [text]}, tmp_path / "out", []
    options = {"teacher": [files["teacher"]], "workers": 1, "progress": False}
    append_piece = preparing.append_piece

    def record(job, piece, *rest):
        whole.append(piece.source)
        append_piece(job, piece, *rest)

    monkeypatch.setattr(preparing, "append_piece", record)
    for _ in range(2):  # nothing changes by repeating it
        with pytest.raises(
            ValueError, match=f"'{mended}' has no document(?s:.)*is kept: mend this"
        ):
            prepare(sources, out, BYTES, **options)
    done = set(whole) - {mended}
    assert done == ({"a"} if mended == "b" else {"a", "b", "c"})
    write_rows(files[mended], good[mended])
    whole.clear()
    prepare(sources, out, BYTES, **options)
    assert whole == (["b", "c", "teacher"] if mended == "b" else ["teacher"])
    prepare(sources, tmp_path / "at-once", BYTES, **options)
    assert contents(out) == contents(tmp_path / "at-once")


def test_pieces_of_other_text_are_not_taken(text, tmp_path, monkeypatch, small_pieces):
    """A kill leaves pieces that are tokenized and not in the shards. Where their file has changed
    since, they are not used."""
    good, other = ([{"text": t} for t in words(900, seed)] for seed in (0, 1))
    file = write_rows(tmp_path / "b.jsonl", other)
    sources, out = {"a": [text], "b": [file]}, tmp_path / "out"
    append_piece = preparing.append_piece

    def stop(job, piece, *rest):
        if piece.source == "b":
            raise KeyboardInterrupt
        append_piece(job, piece, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparing, "append_piece", stop)
        prepare(sources, out, BYTES, workers=1, progress=False)
    assert len(list((out / "unfinished").glob("*.tokens"))) == 1
    write_rows(file, good)
    for folder in (out, tmp_path / "at-once"):
        prepare(sources, folder, BYTES, workers=1, progress=False)
    assert contents(out) == contents(tmp_path / "at-once")


# --------------------------------------------------------------------------------------------------
# The place


@pytest.mark.parametrize("by_link", [False, True])
def test_an_empty_folder_stays_the_same_folder(text, tmp_path, by_link):
    """An empty folder is filled and never replaced: it may be a mount point. A link to an empty
    folder stays a link."""
    out = target = tmp_path / "target"
    target.mkdir()
    before = target.stat().st_ino
    if by_link:
        out = tmp_path / "link"
        out.symlink_to(target)
    prepare({"s": [text]}, out, BYTES, progress=False)
    assert out.is_symlink() == by_link and target.stat().st_ino == before
    prepare({"s": [text]}, tmp_path / "new", BYTES, progress=False)
    assert names(out) == names(tmp_path / "new") and Corpus(out, 16).meta == Corpus(target, 16).meta


def test_a_link_to_nowhere_is_made_real(text, tmp_path):
    """A link whose target is missing: the target is made."""
    (tmp_path / "link").symlink_to("some/where")
    prepare({"s": [text]}, tmp_path / "link", BYTES, progress=False)
    assert Corpus(tmp_path / "some" / "where", 16).digest == Corpus(tmp_path / "link", 16).digest


def test_what_cannot_be_completed_leaves_nothing(tmp_path):
    """After a mistake that only the text shows, no folder is left, nor a part of it."""
    (tmp_path / "text.txt").write_text("one document")
    with pytest.raises(ValueError, match="two different documents"):
        prepare({"s": [tmp_path / "text.txt"]}, tmp_path / "a" / "out", BYTES, progress=False)
    assert names(tmp_path / "a") == []


def test_a_folder_that_may_not_be_written(text, tmp_path, monkeypatch):
    """Where no folder can be made, the system's reason is told, and nothing is tried before."""

    def mkdir(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(PermissionError, match="Permission denied.*out"):
        prepare({"s": [text]}, tmp_path / "out", BYTES, progress=False)


def test_a_folder_that_others_can_read(text, tmp_path):
    """A new folder has the permissions of any new folder."""
    prepare({"s": [text]}, tmp_path / "out", BYTES, progress=False)
    (tmp_path / "other").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {text.stat().st_mode}


# --------------------------------------------------------------------------------------------------
# Several processes


def test_two_processes_at_once(text, tmp_path):
    """Two processes that start together both end well, and leave one whole folder: the second waits
    for the first and uses what it made."""
    program = (
        "import prepare, tokenizer; "
        "prepare.prepare_once({'s': ['in/text.txt']}, 'out', tokenizer.get_tokenizer('bytes'))"
    )
    command = [sys.executable, "-c", program]
    started = [subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT) for _ in range(2)]
    assert [process.wait() for process in started] == [0, 0]
    assert names(tmp_path) == ["in", "out"] and Corpus(tmp_path / "out", 16)


def overtake(monkeypatch, action):
    """Another process does `action` while this one waits for the lock."""
    whole = preparing.locked

    def locked(out):
        monkeypatch.setattr(preparing, "locked", whole)
        action()
        return whole(out)

    monkeypatch.setattr(preparing, "locked", locked)


def test_the_second_of_two_uses_the_folder_of_the_first(text, tmp_path, monkeypatch):
    """While one process waits for a folder another one makes it: `prepare` says so and changes
    nothing, `prepare_once` uses it. While one waits to append another appends: it is said."""
    out = tmp_path / "out"
    make_other = lambda: prepare({"other": [text]}, out, BYTES, progress=False)  # noqa: E731
    overtake(monkeypatch, make_other)
    prepare_once({"mine": [text]}, out, BYTES)
    before = contents(out)
    assert Corpus(out, 16).names == ["other"]
    prepare_once({"mine": [text]}, out, BYTES)
    add = lambda: prepare({"more": [text]}, out, BYTES, append=True, progress=False)  # noqa: E731
    assert contents(out) == before
    overtake(monkeypatch, add)
    with pytest.raises(ValueError, match="has just changed: repeat the command"):
        prepare({"mine": [text]}, out, BYTES, append=True, progress=False)
    assert Corpus(out, 16).names == ["other", "more"]
    out = tmp_path / "again"
    overtake(monkeypatch, lambda: prepare({"other": [text]}, out, BYTES, progress=False))
    with pytest.raises(ValueError, match="again is there already.*--append"):
        prepare({"mine": [text]}, out, BYTES, progress=False)
    assert Corpus(out, 16).names == ["other"]


def test_an_error_of_prepare_once_is_told(tmp_path):
    """Where no folder comes about, the error is that of `prepare`."""
    with pytest.raises(ValueError, match="nothing to read"):
        prepare_once({"s": [tmp_path / "absent"]}, tmp_path / "out", BYTES)


# --------------------------------------------------------------------------------------------------
# The digest


def test_the_digest_tells_texts_apart(tmp_path):
    """The digest is the same for the same text, wherever the folder lies; it is another one for one
    changed letter, which changes no count, for other weights, for a changed label, and for two
    documents that change places."""
    items = [{"text": f"{i}", "proposition": "Odd.", "label": i % 2} for i in range(40)]
    swapped = words(50)
    swapped[3], swapped[4] = swapped[4], swapped[3]
    corpora = {
        "first": (words(50), {}, items),
        "same": (words(50), {}, items),
        "letter": (["X" + text[1:] for text in words(50)], {}, items),
        "weight": (words(50), {"b": 0.3}, items),
        "label": (words(50), {}, [items[0] | {"label": 1}, *items[1:]]),
        "order": (swapped, {}, items),
    }
    digests = {}
    for name, (documents, weights, teacher) in corpora.items():
        (tmp_path / name).mkdir()
        texts = {"a": documents, "b": words(50, seed=1)}
        out, _ = make(tmp_path / name, texts, weights=weights, teacher=teacher)
        digests[name] = Corpus(out, 64).digest
    assert digests["first"] == digests["same"] and len(set(digests.values())) == 5


@given(st.lists(st.integers(0, 2**64 - 1)), st.integers(0, 10), st.integers(0, 10))
def test_counts_of_parts_join(hashes, one, other):
    """The digest of documents does not depend on how they were divided into pieces: joined in any
    way it is the polynomial in the base, with the hashes as coefficients, computed as it stands."""

    def counts(part):
        base, modulus = preparing.BASE, preparing.MODULUS
        total = sum(h * base ** (len(part) - 1 - k) for k, h in enumerate(part)) % modulus
        return preparing.NOTHING | {"documents": len(part), "digest": f"{total:x}"}

    first, last = sorted((min(one, len(hashes)), min(other, len(hashes))))
    parts = [counts(hashes[:first]), counts(hashes[first:last]), counts(hashes[last:])]
    left = preparing.joined(preparing.joined(parts[0], parts[1]), parts[2])
    right = preparing.joined(parts[0], preparing.joined(parts[1], parts[2]))
    assert left == right == counts(hashes)
