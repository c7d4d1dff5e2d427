"""Tests of console.py: what a user sees when a command is refused, interrupted or not read.

Each command is a small program in a process of its own, started by a shell, as users do."""

import json
import os
import subprocess
import sys
import time

import pytest
from helpers import ROOT, error

import console

pytestmark = pytest.mark.quick

PROGRAM = """
import os, signal, sys
import console

def main():
    what = sys.argv[1]
    if what == "value":
        raise ValueError("--lr -1: must be above 0")
    if what == "disk":
        raise OSError(28, "No space left on device")
    if what == "fault":
        raise RuntimeError("a fault of ours")
    if what == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    if what == "help":
        import argparse
        argparse.ArgumentParser(description="word " * 20_000).parse_args(["--help"])
    if what == "stderr":
        print("x" * 100_000, file=sys.stderr)
    if what == "kill":
        print("step 1")
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "smile":
        print("\\U0001f608")
    if what == "lines":
        for i in range(20_000):
            print("line", i)
    return int(what) if what.isdigit() else None

console.run(main, "stopped by you")
"""


def shell(folder, command: str, **environment) -> tuple[int, str, str]:
    """Run a line of bash in which `run WORD` is the program above -> (exit code, stdout, stderr).

    The exit code is the program's, also in a pipe."""
    (folder / "tool.py").write_text(PROGRAM)
    run = f'set -o pipefail; run() {{ "{sys.executable}" tool.py "$@"; }}; '
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    words = ["bash", "-c", run + command]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "command, code, err",
    [
        ("run 0", 0, ""),
        ("run 3", 3, ""),
        ("run value", 2, "tool.py: --lr -1: must be above 0\n"),
        ("run disk", 2, "tool.py: [Errno 28] No space left on device\n"),
        ("run interrupt", 130, "\ntool.py: stopped by you\n"),
    ],
)
def test_exit_codes(tmp_path, command, code, err):
    """Each way to end has its exit code, and its one screen on stderr."""
    assert shell(tmp_path, command) == (code, "", err)


def test_a_fault_of_ours_keeps_its_traceback(tmp_path):
    """What is no mistake of the user ends with Python's traceback."""
    code, _, err = shell(tmp_path, "run fault")
    assert code == 1 and "Traceback" in err and "a fault of ours" in err


@pytest.mark.parametrize(
    "command, code",
    [
        ("run lines >&-", 0),
        ("run lines 2>&-", 0),
        ("run stderr 2>&-", 0),
        ("run lines >&- 2>&-", 0),
        ("run value >&- 2>&-", 2),
        ("run value 2>&-", 2),
        ("run interrupt >&- 2>&-", 130),
        ("run help >&-", 0),
    ],
)
def test_closed_streams(tmp_path, command, code):
    """A command whose stdout or stderr was closed by the caller does its work all the same."""
    assert shell(tmp_path, command)[::2] == (code, "")


@pytest.mark.parametrize("command", ["lines | true", "lines | head -n 1", "lines 2>&1 | true"])
def test_nobody_reads_stdout(tmp_path, command):
    """A reader that has gone ends the command, without a word: exit code 141, as for `yes`."""
    code, _, err = shell(tmp_path, f"run {command}")
    assert (code, err) == (141, "")


def test_nobody_reads_the_help(tmp_path):
    """argparse does not mind that nobody reads its help. Nothing is said."""
    code, _, err = shell(tmp_path, "run help | true")
    assert code in (0, 141) and err == ""


def test_nobody_reads_stderr(tmp_path):
    """The same where both streams go into the pipe and stderr is what breaks."""
    assert shell(tmp_path, "run stderr 2>&1 | true")[0] == 141
    assert shell(tmp_path, "run value 2>&1 | true")[0] in (2, 141)  # a short text may fit the pipe


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_stdout(tmp_path):
    """Output that cannot be written is told once, with exit code 2."""
    code, _, err = shell(tmp_path, "run lines > /dev/full")
    assert (code, err) == (2, "tool.py: [Errno 28] No space left on device\n")


def test_what_was_printed_outlives_a_kill(tmp_path):
    """Lines are written at once: a log file has them when the process is killed."""
    shell(tmp_path, "run kill > log")
    assert (tmp_path / "log").read_text() == "step 1\n"


def test_a_terminal_that_does_not_know_a_character(tmp_path):
    """An ASCII terminal shows the character's escape code."""
    assert shell(tmp_path, "run smile", PYTHONIOENCODING="ascii") == (0, "\\U0001f608\n", "")


def test_refuse_lists_each_problem_once():
    """All problems are in one ValueError, each once, under the heading; none raises nothing."""
    console.refuse([])
    assert error(console.refuse, ["a", "b", "a"]) == "a\nb"
    assert error(console.refuse, iter(["a", "b"]), "wrong:") == "wrong:\n  a\n  b"


def test_the_program_is_named_as_it_was_called(monkeypatch):
    """`python train.py` is train.py, `python -m lab.growth` is lab.growth."""
    for path, name in (
        ("train.py", "train.py"),
        ("/a/lab/growth.py", "lab.growth"),
        ("/a/course/grade.py", "course.grade"),
        ("/a/benchmarks/gpu.py", "benchmarks.gpu"),
    ):
        monkeypatch.setattr(sys, "argv", [path])
        assert console.program_name() == name


def lines_of(monkeypatch, capsys, seconds: float, delay: float = 3) -> list[str]:
    """What a job of 50 equal parts shows without a terminal, if it takes so many seconds."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with console.progress(total=50, desc="growing", unit="parts", delay=delay) as bar:
        bar._time = lambda: clock[0]  # tqdm has a clock of its own
        bar.start_t = bar.last_print_t = 0.0
        for _ in range(50):
            clock[0] += seconds / 50
            bar.update()
    return capsys.readouterr().err.splitlines()


def test_progress_without_a_terminal(monkeypatch, capsys):
    """What takes long says what it does, how much of it is done and what is left: after three
    seconds (at once where asked), then twice a minute and at the end, in lines without escape
    codes. What ends within three seconds says nothing."""
    assert lines_of(monkeypatch, capsys, 2.5) == []
    assert lines_of(monkeypatch, capsys, 100) == [
        "growing: 4% of 50 parts, 01:36 left",
        "growing: 34% of 50 parts, 01:06 left",
        "growing: 64% of 50 parts, 00:36 left",
        "growing: 94% of 50 parts, 00:06 left",
        "growing: 100% of 50 parts, 00:00 left",
    ]
    assert lines_of(monkeypatch, capsys, 1, delay=0) == [
        "growing: 0% of 50 parts, ? left",
        "growing: 100% of 50 parts, 00:00 left",
    ]


def test_progress_on_a_terminal(monkeypatch):
    """There it is tqdm's bar."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with console.progress(range(3), desc="growing", delay=0) as bar:
        assert list(bar) == [0, 1, 2] and "growing: 100%|" in str(bar)


# --------------------------------------------------------------------------------------------------
# Files that a user names


def test_text_is_read_in_utf_8_with_or_without_a_mark(tmp_path):
    """What an editor on Windows adds in front of UTF-8 is no part of the text."""
    for content in ("naïve", "\ufeffnaïve", ""):
        (tmp_path / "a.txt").write_text(content, encoding="utf-8")
        assert console.read_text(tmp_path / "a.txt") == content.lstrip("\ufeff")


@pytest.mark.parametrize(
    "content, said",
    [
        ("[1]".encode("utf-16"), "a b.txt is UTF-16, .*PowerShell .*\n  Get-Content '.*a b.txt'"),
        (
            "\ufeff[1]".encode("utf-16-be"),
            "iconv -f UTF-16 -t UTF-8 '.*a b.txt' > '.*utf8-a b.txt'",
        ),
        ("[1]".encode("utf-16-le"), "a b.txt is no UTF-8 text, the byte at offset 1 "),
        ("é".encode("latin-1"), "offset 0 fits no UTF-8 character: save it as UTF-8"),
        (None, "a b.txt cannot be read: No such file"),
    ],
)
def test_text_in_another_encoding_is_refused(tmp_path, content, said):
    """UTF-16, which PowerShell's > writes, is named with the commands that convert it. Other
    encodings, and a file that is not there, have a line each."""
    if content is not None:
        (tmp_path / "a b.txt").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        console.read_text(tmp_path / "a b.txt")


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "is not JSON"),
        ("{}".encode("utf-16"), "is UTF-16"),
        (b"\xe9", "no UTF-8 text"),
        (None, "cannot be read"),
    ],
)
def test_a_file_of_json_that_is_none(tmp_path, content, said):
    """What is no JSON, no UTF-8 and no file at all: a message that names the option."""
    if content is not None:
        file = tmp_path / "x.json"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = error(console.read_json, "--stages", tmp_path / "x.json")
    assert message.startswith("--stages ") and said in message


def test_where_a_file_or_a_folder_may_be_written(tmp_path):
    """Missing folders are made. A file in the place of a folder is named, as is the reverse, and a
    link to nowhere."""
    file, link = tmp_path / "a" / "b" / "c.json", tmp_path / "link"
    assert console.output_file(file) == file and file.parent.is_dir()
    file.write_text("{}")
    link.symlink_to(tmp_path / "nowhere")
    for there in (file, link):
        for inside in (there, there / "d", there / "d" / "e"):
            assert f"{there} is no folder" in error(console.make_folder, inside)
    assert "a is a folder: give the name of a file" in error(console.output_file, tmp_path / "a")


def test_numbers_come_back(tmp_path, capsys):
    """What is written is what is read, in a folder that is made for it; the user sees where, and
    the command that draws it."""
    file = tmp_path / "new" / "my numbers.json"
    console.write_numbers(file, {"a": [1.5, None]})
    assert json.loads(file.read_text()) == {"a": [1.5, None]}
    command = f"python -m lab.report '{file}' --out '{file.with_suffix('.svg')}'"
    assert capsys.readouterr().out == f"numbers: {file}; to draw them:\n  {command}\n"
