"""Errors for people: what every command of this repository does around its own work.

A user's mistake raises ValueError, and a limit of the machine (a full disk) raises OSError. `run`
prints such an error as one screen, without a traceback. Any other error is a fault of this
repository, and keeps its traceback.
"""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn


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


def program_name() -> str:
    """What the user typed after `python`: train.py, or lab.growth for `python -m lab.growth`."""
    path = Path(sys.argv[0])
    folder = path.parent.name
    return f"{folder}.{path.stem}" if folder in ("lab", "course") else path.name


def prepare_streams():
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
    """What `main` returns or exits with; 2 or 130 where it ends with an error, which is told."""
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
    prepare_streams()
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
