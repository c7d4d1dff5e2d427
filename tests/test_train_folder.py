"""The folder of a run: what train.py takes, what it leaves alone, what it removes."""

# ruff: noqa: F401, F811 (pytest finds fixtures by their names)

import contextlib
import itertools
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from workshop import (
    ROOT,
    assert_same_run,
    contents,
    corpus,
    equal,
    flags,
    go_on,
    job,
    log,
    make_corpus,
    other_corpus,
    run_train,
    steps_of,
    workshop,
)

import data
import flm
import prepare
import run_folder
import train
from checkpoint import find_checkpoint
from train import main


def files_of(folder) -> dict[str, bytes]:
    """{path: content} of everything in a folder."""
    return {str(p): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


# --------------------------------------------------------------------------------------------------
# A folder is ours only by a mark of ours


@pytest.mark.parametrize(
    "names",
    [["config.json"], ["config.json", "thesis.txt"], ["lock"], ["step-best/model.pt"], ["a/b/c"]],
    ids=" ".join,
)
@pytest.mark.parametrize("error", [None, OSError(28, "No space left on device")])
def test_files_of_others_stay(corpus, monkeypatch, names, error):
    """A folder that holds another program's files is refused, whatever they are called and whether
    or not the disk is full, and stays as it was."""
    for name in names:
        path = Path("project", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"model_type": "gpt2"}')
    before = files_of("project")
    if error:
        monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(ValueError, match="project exists and is not a run: choose another folder"):
        train.train(job(corpus, out="project"))
    assert files_of("project") == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_only_what_was_made_is_removed(corpus, monkeypatch, error):
    """A run in an existing empty folder whose first save fails removes its own files, and nothing
    that somebody else has put there in the meantime."""
    Path("place").mkdir()

    def fails(folder, *_):
        Path("place", "thesis.txt").write_text("all of it")
        raise error

    monkeypatch.setattr(train.checkpoint, "write_in_background", fails)
    with pytest.raises(type(error)):
        train.train(job(corpus, out="place"))
    assert files_of("place") == {"place/thesis.txt": b"all of it"}


def test_a_run_killed_in_its_first_save_may_begin_again(corpus, monkeypatch):
    """What a kill -9 leaves of a run without a checkpoint is taken over by the same command."""
    s = job(corpus)
    with monkeypatch.context() as patch:
        patch.setattr("run_folder.remove_unbegun", lambda *_: None)  # a killed process does nothing
        patch.setattr(train.checkpoint, "write_in_background", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(s)
    Path(s.out, "step-00000000.tmp").mkdir()
    assert "config.json" in os.listdir(s.out)
    train.train(s)
    assert_same_run(s.out, train.train(job(corpus))["folder"])
    assert "step-00000000.tmp" not in steps_of(s.out)


def test_the_log_of_a_run_without_checkpoints_stays(corpus):
    """A user who removes the checkpoints of a run to save space keeps its log: a new run neither
    adds lines to it nor removes it."""
    train.train(job(corpus, out="old"))
    for path in Path("old").glob("step-*"):
        shutil.rmtree(path)
    before = files_of("old")
    with pytest.raises(ValueError, match="old holds the log of another run, whose checkpoints are"):
        train.train(job(corpus, out="old"))
    assert files_of("old") == before


def test_a_lock_that_is_no_text(corpus):
    """A file "lock" of another program may hold anything: the folder is refused by its name."""
    Path("project").mkdir()
    Path("project", "lock").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="project exists and is not a run"):
        train.train(job(corpus, out="project"))


def test_copies_of_checkpoints_are_not_checkpoints(corpus):
    """A copy under another name, or under the number of another step, is neither the newest
    checkpoint nor an old one: the run goes on from its own newest, and leaves the copies alone."""
    s = job(corpus, keep=1)
    train.train(s, stop_at=2)
    copies = "step-best", "step-00000000-init", "step-99", "step-00000099"
    for name in copies:
        shutil.copytree(Path(s.out, "step-00000002"), Path(s.out, name))
    Path(s.out, "step-notes.txt").write_text("all of it")
    before = {name: files_of(Path(s.out, name)) for name in copies}
    train.train(train.resumed(s.out, {}), resume=True, stop_at=4)
    go_on(s.out)
    assert_same_run(s.out, train.train(job(corpus))["folder"])
    assert {name: files_of(Path(s.out, name)) for name in before} == before
    assert Path(s.out, "step-notes.txt").read_text() == "all of it"
    assert find_checkpoint(s.out).name == "step-00000006"


# --------------------------------------------------------------------------------------------------
# Two runs at once


def test_runs_that_start_at_once_get_folders_of_their_own(corpus):
    """Eight runs choose their folder at the same moment: eight folders, each locked by one."""
    s, found, start = job(corpus, out=None), [], threading.Barrier(8)
    done = threading.Barrier(8)

    def claim():
        with contextlib.ExitStack() as stack:
            start.wait()
            found.append(train.claim_folder(s, stack))
            done.wait()

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(["runs/demo", *(f"runs/demo-{n}" for n in range(2, 9))])
    assert not list(Path("runs").glob("demo*"))  # none of them had a checkpoint


def test_a_second_writer_is_refused(corpus):
    """While a run is written, neither --out nor --resume gives its folder to another process; the
    refused one removes nothing."""
    s = job(corpus)
    train.train(s, stop_at=2)
    before = files_of(s.out)
    with contextlib.ExitStack() as stack:
        train.lock_folder(Path(s.out), stack)
        held = files_of(s.out)
        for action in (lambda: go_on(s.out), lambda: train.train(s)):
            with pytest.raises(ValueError, match="is being written by another run|another run: go"):
                action()
        assert files_of(s.out) == held
    assert before.keys() == held.keys()
    go_on(s.out)


def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    """A rank on another host sees no such folder, or a copy of an older run: refused, with the
    name. It sees the folder that rank 0 has locked: accepted."""
    shared, copy, missing = (tmp_path / name for name in ("shared", "copy", "missing"))
    shared.mkdir()
    with contextlib.ExitStack() as stack:
        run_folder.lock_folder(shared, stack)
        shutil.copytree(shared, copy)
    with contextlib.ExitStack() as stack:
        (copy / "lock").write_text(f"{run_folder.LOCK_MARK}process 1 on host9\n")
        run_folder.lock_folder(shared, stack)
        lock = (shared / "lock").read_text()
        run_folder.check_shared(shared, lock, 0)
        for folder in copy, missing:
            with pytest.raises(ValueError, match=f"the folder {folder} that rank 0 writes to"):
                run_folder.check_shared(folder, lock, 0)


def test_another_text_on_another_host_is_refused(corpus, other_corpus):
    """Rank 0 has other text under the same name: a rank refuses, and names the folder."""
    found = data.Corpus(corpus, 32)
    run_folder.check_same_corpus(found, data.Corpus(corpus, 32).digest)
    with pytest.raises(ValueError, match=f"{found.path} on .* is not the text that rank 0 has"):
        run_folder.check_same_corpus(found, data.Corpus(other_corpus, 32).digest)


def test_two_first_runs_that_prepare_the_default_corpus(monkeypatch, capsys):
    """Another process finishes the same default corpus while this one prepares it: this one takes
    it. Any other failure of the preparation is told."""
    (library := Path("library")).mkdir()
    for name in ("one", "two"):
        text = f"# {name}\n" + "def f(x):\n    return x + 1\n" * 40
        Path(library, f"{name}.py").write_text(text)
    monkeypatch.setattr(run_folder, "stdlib_files", lambda: sorted(library.iterdir()))
    real = prepare.prepare

    def other_was_faster(*args, **options):
        real(*args, **options)
        raise OSError(17, "File exists")

    monkeypatch.setattr(prepare, "prepare", other_was_faster)
    assert train.open_corpus(None, "bytes", None, flm.preset("demo")).n_rows("train", "language")
    shutil.rmtree("corpora")
    monkeypatch.setattr(prepare, "prepare", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        train.open_corpus(None, "bytes", None, flm.preset("demo"))


# --------------------------------------------------------------------------------------------------
# The text of a run


def test_another_text_is_refused(tmp_path):
    """Text that changed at the same path is noticed on --resume, though all numbers of it are as
    before. --data-changed says yes to it, once: the next --resume compares with the new text."""
    (folder := tmp_path / "text").mkdir()
    text = make_corpus(folder, 1, teacher=True)
    s = job(text)
    train.train(s, stop_at=2)
    moved = shutil.copytree(text, tmp_path / "moved")
    shutil.rmtree(text)
    for file in ("text.jsonl", "teacher.jsonl"):
        content = (folder / file).read_text()
        (folder / file).write_text(content.replace("cat", "dog"))
    sources = {"words": [folder / "text.jsonl"]}
    options = dict(val_fraction=0.2, teacher=[folder / "teacher.jsonl"], workers=1, progress=False)
    data.prepare(sources, text, data.get_tokenizer("bytes"), **options)

    before = files_of(s.out)
    for line in ([], ["--data", text], ["--data", text, "--steps", "9"]):
        with pytest.raises(ValueError, match="not the one that this run began with.*data-changed"):
            main(["--resume", s.out, *line])
    assert {k: v for k, v in files_of(s.out).items() if "lock" not in k} == {
        k: v for k, v in before.items() if "lock" not in k
    }
    go_on(s.out, stop_at=3, data=str(moved))  # the same text, in another place
    with pytest.raises(ValueError, match="not the one"):
        go_on(s.out, data=text)
    go_on(s.out, stop_at=4, data=text, data_changed=True)
    go_on(s.out, stop_at=5)
    with pytest.raises(ValueError, match="not the one"):
        go_on(s.out, data=str(moved))
    with pytest.raises(ValueError, match="--data-changed: a new run has no text before"):
        main([*flags(job(text)), "--data-changed"])


def test_resume_from_another_folder_asks_for_the_text(corpus, tmp_path, monkeypatch):
    """The text's folder was given relative to where the run began. From elsewhere, --resume and
    --eval-only say that it is --data that is missing, and go on with it."""
    shutil.copytree(corpus, "tokens")
    s = job("tokens")
    train.train(s, stop_at=2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    run = f"../{s.out}"
    for line in (["--eval-only", run], ["--resume", run]):
        with pytest.raises(ValueError, match="was in tokens, .* --data DIR"):
            main(line)
        assert main([*line, "--data", "../tokens"]) == 0
    assert log(run)[-1]["step"] == 6


@pytest.mark.parametrize("line", ['{"loss": 1.0}', "5", "{", '{"step": "3"}', "[]"])
def test_a_line_that_is_no_line_of_a_log(corpus, line):
    """A line in the log that is not ours is named; the log stays as it was."""
    s = job(corpus)
    train.train(s, stop_at=2)
    path = Path(s.out, "metrics.jsonl")
    path.write_text(path.read_text() + line + "\n")
    before = path.read_text()
    with pytest.raises(ValueError, match="metrics.jsonl, line 3 is not a line of a log.*remove"):
        go_on(s.out)
    assert path.read_text() == before


def test_paths_with_spaces_are_quoted(corpus, capsys, tmp_path):
    """Every command that is printed is accepted as printed, also where a path has a space."""
    s = job(corpus, out="my first run", save_every=9)
    assert main(flags(s)) == 0
    assert "--resume 'my first run' --steps 12" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"\(--resume 'my first run'\)"):
        train.train(s)
    with pytest.raises(ValueError, match="--resume 'my first run' --steps 12$"):
        main(["--resume", s.out])
    with pytest.raises(ValueError, match="--resume takes its run: --resume 'my first run'$"):
        main(["--resume", f"{s.out}/step-00000006"])
