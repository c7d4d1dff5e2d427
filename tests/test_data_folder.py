"""Where a prepared folder is made: whole or not there, whoever stands in the way."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import BYTES, make, words

import data
from data import Corpus, prepare, prepare_once

ROOT = Path(data.__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture
def text(tmp_path):
    """A file of 30 documents, alone in its folder."""
    path = tmp_path / "in" / "text.txt"
    path.parent.mkdir()
    path.write_text("".join(f"hello {i}\n" for i in range(50_000)))
    return path


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full: always full")
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    """When the disk is full the error is one line that says so, and neither the folder nor a part
    of it is left."""
    (tmp_path / "text.txt").write_text("hello\n" * 50_000)

    def full(path, mode):
        return open("/dev/full" if mode == "wb" else path, mode)

    monkeypatch.setattr(data, "open", full, raising=False)
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
    """After kill -9 in the middle of writing, the folder is not there, and preparing it again
    works."""
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
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    prepare({"s": [tmp_path / "text.txt"]}, tmp_path / "out", BYTES, progress=False)
    assert Corpus(tmp_path / "out", 16).n_rows("val", "language") > 0


@pytest.mark.parametrize("by_link", [False, True])
def test_an_empty_folder_stays_the_same_folder(text, tmp_path, by_link):
    """An empty folder is filled and never replaced: it may be a mount point, where renaming fails
    after all the work. A link to an empty folder stays a link."""
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


def test_an_error_leaves_an_empty_folder_empty(text, tmp_path, monkeypatch):
    """After an error in the middle, the empty folder that was there is there, and empty."""
    (tmp_path / "out").mkdir()

    def broken(*_):
        raise OSError("broken")

    monkeypatch.setattr(data, "shares_of_rows", broken)
    with pytest.raises(OSError, match="out was not made, and nothing is left of it: broken"):
        prepare({"s": [text]}, tmp_path / "out", BYTES, progress=False)
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize("inside", [False, True])
def test_leftovers_of_killed_processes_do_not_matter(text, tmp_path, inside):
    """A temporary folder that a killed process left, beside `out` or in it, hinders nobody, also
    where process numbers repeat; it is not touched."""
    place = tmp_path / "out" if inside else tmp_path
    leftovers = [place / f"out.part-{name}" for name in (os.getpid(), 1, "abcdefgh")]
    for leftover in leftovers:
        leftover.mkdir(parents=True)
    prepare({"s": [text]}, tmp_path / "out", BYTES, progress=False)
    assert all(leftover.is_dir() for leftover in leftovers)
    assert Corpus(tmp_path / "out", 16).n_rows("train", "language") > 0


def test_a_folder_that_others_can_read(text, tmp_path):
    """A new folder has the permissions of any new folder, not of a private temporary one."""
    prepare({"s": [text]}, tmp_path / "out", BYTES, progress=False)
    (tmp_path / "other").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("is_there", [False, True])
def test_the_second_of_two_uses_the_folder_of_the_first(text, tmp_path, monkeypatch, is_there):
    """While one process prepares a folder another one makes it: `prepare` says so and changes
    nothing, `prepare_once` uses it."""
    out = tmp_path / "out"
    if is_there:
        out.mkdir()
    whole = data.shares_of_rows

    def overtaken(*arguments):
        monkeypatch.setattr(data, "shares_of_rows", whole)
        prepare({"other": [text]}, out, BYTES, progress=False)
        return whole(*arguments)

    monkeypatch.setattr(data, "shares_of_rows", overtaken)
    prepare_once({"mine": [text]}, out, BYTES)
    assert Corpus(out, 16).meta["sources"][0]["name"] == "other"
    assert names(tmp_path) == ["in", "out"]
    before = [path.read_bytes() for path in sorted(out.iterdir())]
    prepare_once({"mine": [text]}, out, BYTES)
    assert [path.read_bytes() for path in sorted(out.iterdir())] == before

    again = tmp_path / "again"
    monkeypatch.setattr(data, "shares_of_rows", overtaken)
    out = again
    with pytest.raises(OSError, match="again was not made.*another process filled it meanwhile"):
        prepare({"mine": [text]}, again, BYTES, progress=False)
    assert Corpus(again, 16).meta["sources"][0]["name"] == "other"


def test_an_error_of_prepare_once_is_told(tmp_path):
    """Where no folder comes about, the error is that of `prepare`."""
    with pytest.raises(ValueError, match="nothing to read"):
        prepare_once({"s": [tmp_path / "absent"]}, tmp_path / "out", BYTES)


def test_two_processes_at_once(text, tmp_path):
    """Two processes that start together both end well, and leave one whole folder."""
    program = (
        "import data; data.prepare_once({'s': ['in/text.txt']}, 'out', data.get_tokenizer('bytes'))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=ENVIRONMENT)
        for _ in range(2)
    ]
    assert [process.wait() for process in started] == [0, 0]
    assert names(tmp_path) == ["in", "out"] and Corpus(tmp_path / "out", 16)


def test_the_digest_tells_texts_apart(tmp_path):
    """The digest is the same for the same text, wherever the folder lies; it is another one for one
    changed letter, which changes no count, for other weights, and for a changed label."""
    items = [{"text": f"{i}", "proposition": "Odd.", "label": i % 2} for i in range(40)]
    corpora = {
        "first": (words(50), {}, items),
        "same": (words(50), {}, items),
        "letter": (["X" + text[1:] for text in words(50)], {}, items),
        "weight": (words(50), {"b": 0.3}, items),
        "label": (words(50), {}, [items[0] | {"label": 1}, *items[1:]]),
    }
    digests = {}
    for name, (documents, weights, teacher) in corpora.items():
        (tmp_path / name).mkdir()
        texts = {"a": documents, "b": words(50, seed=1)}
        out, _ = make(tmp_path / name, texts, weights=weights, teacher=teacher)
        digests[name] = Corpus(out, 64).digest
    assert digests["first"] == digests["same"] and len(set(digests.values())) == 4
