"""What every command of this repository does around its own work: errors for people, what takes
long, signals.

A user's mistake raises ValueError, and a limit of the machine (a full disk) raises OSError. `run`
prints such an error as one screen, without a traceback. Any other error is a fault of this
repository, and keeps its traceback.
"""

import codecs
import contextlib
import difflib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm


def refuse(problems: Iterable[str], heading: str = ""):
    """Raise ValueError with all of `problems`, if there are any.

    >>> refuse([])
    >>> refuse(["--tp 0: must be at least 1"], "this layout does not fit:")
    Traceback (most recent call last):
    ValueError: this layout does not fit:
      --tp 0: must be at least 1
    """
    lines = list(dict.fromkeys(problems))
    if lines and heading:
        raise ValueError("\n  ".join([heading, *lines]))
    if lines:
        raise ValueError("\n".join(lines))


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A question that names those of the `known` words that are like `name`; "" where none is.

    >>> did_you_mean("flm-101", ["demo", "flm-101b"])
    'did you mean flm-101b? '
    """
    near = difflib.get_close_matches(str(name), known)
    return f"did you mean {' or '.join(near)}? " if near else ""


EVERY = 30  # seconds between two lines


class Lines:
    """A stream for tqdm where there is no terminal. tqdm writes the same line again and again; this
    prints one of them after `delay` seconds, and another one whenever EVERY seconds are over. Where
    it has printed any, it prints that of the end, too."""

    def __init__(self, delay: float):
        self.due, self.printed = time.monotonic() + delay, ""

    def write(self, text: str):
        line = text.replace("\r", "").strip()
        ends = self.printed and ": 100% of" in line and line != self.printed
        if line and (ends or time.monotonic() >= self.due):
            print(line, file=sys.stderr)
            self.due, self.printed = time.monotonic() + EVERY, line

    def flush(self):
        sys.stderr.flush()


def progress(things: Iterable | None = None, delay: float = 3, **options) -> tqdm:
    """tqdm on stderr, for what takes more than a few seconds; its time left is by the mean speed.

    Without a terminal there is no bar and there are no escape codes, but a line now and then: see
    Lines. options: those of tqdm; desc says what is being done."""
    if sys.stderr.isatty():
        return tqdm(things, dynamic_ncols=True, smoothing=0, **options)
    form = "{desc}: {percentage:.0f}% of {total_fmt} {unit}, {remaining} left{postfix}"
    return tqdm(things, file=Lines(delay), bar_format=form, smoothing=0, **options)


def read_text(path: str | Path) -> str:
    """The text of a file that the user names: UTF-8, with or without a byte order mark.

    Raises ValueError for another encoding, with what to type, and where it cannot be read."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        old, new = shlex.quote(str(path)), shlex.quote(str(path.with_name(f"utf8-{path.name}")))
        raise ValueError(
            f"{path} is UTF-16, as older versions of PowerShell write text with >. Make UTF-8 of "
            f"it, in PowerShell with\n  Get-Content {old} | Set-Content -Encoding utf8 {new}\n"
            f"elsewhere with\n  iconv -f UTF-16 -t UTF-8 {old} > {new}"
        )
    try:
        return content.replace(b"\0", b"\xff").decode("utf-8-sig")  # a NUL is no text, either
    except UnicodeDecodeError as error:
        problem = f"the byte at offset {error.start} fits no UTF-8 character"
        raise ValueError(f"{path} is no UTF-8 text, {problem}: save it as UTF-8") from None


def read_json(option: str, file: str | Path):
    """What a JSON file holds. Raises ValueError that names the option."""
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} {file} is not JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"{option} {error}") from error


def make_folder(folder: str | Path):
    """Make a folder and those above it, where they are missing. Raises ValueError where a file has
    the name of one of them."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        there = [path for path in (folder, *folder.parents) if path.exists() or path.is_symlink()]
        problem = f"{there[0]} is no folder, but must be one: choose another path"
        raise ValueError(problem) from error


def output_file(file: str | Path) -> Path:
    """The path of a file that will be written, in a folder that is there from now on. Raises
    ValueError where a folder has its name, or a file that of its folder."""
    file = Path(file)
    if file.is_dir():
        raise ValueError(f"{file} is a folder: give the name of a file")
    make_folder(file.parent)
    return file


def replace_file(path: Path, text: str):
    """Write a file whole or not at all."""
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        tmp.write_text(text, encoding="utf-8")
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def write_numbers(file: str | Path, value):
    """Write what a study measured as JSON; say where, and how to draw it."""
    output_file(file).write_text(json.dumps(value, indent=1) + "\n")
    numbers, picture = (shlex.quote(str(path)) for path in (file, Path(file).with_suffix(".svg")))
    print(f"numbers: {file}; to draw them:")
    print(f"  python -m lab.report {numbers} --out {picture}")


def markers() -> tuple[str, str]:
    """What stands before and after marked text: green on a terminal, brackets elsewhere."""
    return ("\x1b[1;32m", "\x1b[0m") if sys.stdout.isatty() else ("\u27e6", "\u27e7")


def program_name() -> str:
    """What the user typed after `python`: train.py, or lab.growth for `python -m lab.growth`."""
    path = Path(sys.argv[0])
    folder = path.parent.name
    return f"{folder}.{path.stem}" if folder in ("lab", "course", "benchmarks") else path.name


def make_streams_usable():
    """Make stdout and stderr usable, whatever they are.

    A stream that the caller closed becomes the null device. Lines are written at once, so that a
    log file has them when the process is killed. A terminal that does not know a character shows
    its escape code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)


def discard_streams():
    """Send what is still to be written to the null device: nobody can read it any more."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def exit_code(main: Callable[[], int | None], interrupted: str) -> int | str | None:
    """What `main` returns or exits with; 2 or 130 where it ends with an error, which it prints."""
    try:
        return main() or 0
    except SystemExit as end:  # argparse: --help, or a word that it does not know
        return end.code
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"{program_name()}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{program_name()}: {interrupted}", file=sys.stderr)
        return 130


def run(main: Callable[[], int | None], interrupted: str = "interrupted") -> NoReturn:
    """Run a command and leave Python with its exit code.

    0, or what `main` returns; 2 after ValueError or OSError; 130 after Ctrl-C, with the text
    `interrupted`; 141 when nobody reads the output any more (`... | head`)."""
    make_streams_usable()
    try:
        code = exit_code(main, interrupted)
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        discard_streams()
        code = 141
    except OSError:  # the disk that stdout goes to is full, as was said
        discard_streams()
        code = 2
    sys.exit(code)


SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # Windows has the first two


@contextlib.contextmanager
def receive_signals(received: list[int]):
    """Append the numbers of signals that ask a run to stop, in place of what they do otherwise; a
    second Ctrl-C stops at once. A signal that the caller ignores (nohup) stays ignored."""

    def receive(number, frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        with contextlib.suppress(ValueError):  # only the main thread may handle signals
            for number in before:
                signal.signal(number, receive)
        yield
    finally:
        with contextlib.suppress(ValueError):
            for number, handler in before.items():
                signal.signal(number, handler)
