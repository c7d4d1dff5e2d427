"""course/student.py - the grader's side of a student's functions.

`Student` starts the processes in which a student's file runs (course/worker.py), and calls its
functions: `student.rotate(q, k, 0, 8, 1e4, 512.0)` sends the arguments to the process and returns
what comes back. `Local` has the same face for functions of this process: with it the tests hold
this repository's own functions against the same checks.
"""

from __future__ import annotations

import ast
import functools
import io
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from course.guard import REFUSED
from course.worker import LargestTensor, read, send

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("course", "lab", "tests", "benchmarks")
# Where libraries write of their own accord: the hook allows one folder.
CACHES = ("TMPDIR", "TEMP", "TMP", "XDG_CACHE_HOME", "MPLCONFIGDIR")
CACHES += ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
SHOWN = 2**16  # bytes of what a file prints that are shown
START = 120  # seconds in which a process must have imported PyTorch, on the slowest machine


class Wrong(Exception):
    """An answer that is not right. The text says what was found and what was expected."""


class Raised(Wrong):
    """A student's function raised an error. kind: the name of its type."""

    def __init__(self, function: str, kind: str, text: str, line: int | None):
        self.kind = kind
        where = f" (line {line})" if line else ""
        if kind == "ModuleNotFoundError":
            text += ". Your file stands alone: it cannot import another file of yours"
        super().__init__(f"{function} raised {kind}{where}: {text}")


# BaseException: hypothesis must not take these for a wrong answer and look for a smaller input.
class NotWritten(BaseException):
    """A function that is missing or raises NotImplementedError."""


class Stopped(BaseException):
    """The grading of an assignment ended early: no answer in time, or the process ended."""


class Refused(BaseException):
    """The file did what it must not do. The text says what."""


def own_modules() -> set[str]:
    """The names of this repository's modules and folders."""
    return {path.stem for path in ROOT.glob("*.py")} | set(FOLDERS)


def forbidden_imports(source: str, more: tuple[str, ...] = ()) -> list[str]:
    """Where a file imports a module of this repository, or one of `more`: a line for each.

    >>> forbidden_imports("import torch\\nfrom flm import rotate")
    ['line 2 imports flm']

    Raises SyntaxError for a file that is no Python."""
    found, ours = [], own_modules()
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            also = any(name == module or name.startswith(module + ".") for module in more)
            if name.partition(".")[0] in ours or also:
                found.append(f"line {node.lineno} imports {name}")
                break
    return found


class Process:
    """One process that runs a student's file. folder: where the file may write."""

    def __init__(self, folder: str, *rank_size_store: str):
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        kept = [path for path in paths if path and Path(path).resolve() != ROOT]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(kept), "OMP_NUM_THREADS": "1"}
        environment |= dict.fromkeys(CACHES, folder)
        words = [sys.executable, "-P", str(ROOT / "course/worker.py"), str(ROOT)]
        words += [",".join(sorted(own_modules())), *rank_size_store]
        self.child = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=folder,
        )
        self.answers, self.printed = queue.Queue(), 0
        threading.Thread(target=self.listen, daemon=True).start()
        self.shows = threading.Thread(target=self.show, daemon=True)
        self.shows.start()

    def listen(self):
        """Put the answers into the queue, and None at the end."""
        message = b""
        while message is not None:
            message = read(self.child.stdout)
            self.answers.put(message)

    def show(self):
        """Show the first SHOWN bytes of what the file prints, and read the rest."""
        while printed := self.child.stderr.read1(SHOWN):
            on_stderr(printed[: max(0, SHOWN - self.printed)].decode(errors="replace"))
            self.printed += len(printed)

    def end_of_file(self):
        """Say how much of what the file printed was not shown."""
        if self.printed > SHOWN:
            on_stderr(f"\n... {self.printed - SHOWN:,} more bytes\n")
        self.printed = 0

    def send(self, message: dict):
        if "load" in message:
            self.end_of_file()
        try:
            send(self.child.stdin, message)
        except OSError:  # it has ended: receive will say so
            pass

    def receive(self, seconds: float, late: str) -> dict:
        """The next answer. Raises Stopped where there is none in time (its text is then `late`), or
        never will be."""
        try:
            message = self.answers.get(timeout=max(0.0, seconds))
        except queue.Empty:
            raise Stopped(late) from None
        if message is None:
            raise Stopped("the process of the file ended (os._exit, or a crash)")
        if message.startswith(REFUSED):
            raise Refused(message[len(REFUSED) :].decode(errors="replace"))
        try:
            return dict(torch.load(io.BytesIO(message), weights_only=True))
        except Exception as error:  # whatever bytes the file sent
            text = f"an answer that cannot be read ({type(error).__name__})"
            raise Stopped(text) from None

    def end(self):
        """End the process at once."""
        self.child.kill()
        self.child.wait()
        self.child.stdin.close()
        self.shows.join(1)  # a process that it started may hold its stderr open
        self.end_of_file()


def on_stderr(text: str):
    """Write it to stderr, if anybody reads that."""
    try:
        print(text, end="", file=sys.stderr, flush=True)
    except OSError:
        pass


class Local:
    """Functions of this process, with the face of Student."""

    def __init__(self, **functions: Callable):
        self.functions, self.largest = functions, 0
        self.last = ("", (), None)  # the last call: its function, arguments and answer

    def __getattr__(self, name: str) -> Callable:
        return functools.partial(self.call, name)

    def call(self, name: str, *args):
        """The function's answer."""
        self.last = (name, args, None)
        with torch.no_grad(), LargestTensor() as largest:
            value = self.functions[name](*args)
        self.largest, self.last = largest.numbers, (name, args, value)
        return value

    def on_ranks(self, name: str, calls: list[tuple]) -> list:
        """The answer to each call, one for each rank."""
        return [self.call(name, *args) for args in calls]


class Student:
    """The functions of one student's files, one file after the other.

    One process serves all of them, and is started again after a file that did not answer. Two more,
    which form a process group, are started for the first file that needs them."""

    def __init__(self):
        self.groups: dict[int, list[Process]] = {}  # number of ranks -> its processes
        self.file, self.source, self.loaded = "", "", {}
        self.left, self.spent, self.ranks, self.measure, self.largest = 0.0, 0.0, 1, False, 0
        self.seconds = 0.0
        self.last = ("", (), None)  # the last call: its function, arguments and answer
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for size in list(self.groups):
            self.end(size)
        self.folder.cleanup()

    def __getattr__(self, name: str) -> Callable:
        return functools.partial(self.call, name)

    def open(self, file: Path, source: str, seconds: float, ranks: int = 1, measure: bool = False):
        """Load a file. seconds: what all its answers may take together. ranks: the number of
        processes that on_ranks calls. measure: set `largest` after each call."""
        self.file, self.source = str(file), source
        self.left, self.spent, self.ranks, self.measure = seconds, 0.0, ranks, measure
        self.seconds = seconds
        self.last = ("", (), None)
        self.ask(1, [{"load": self.file, "source": source}], "the file")
        if ranks > 1:
            self.ask(ranks, [{"load": self.file, "source": source}] * ranks, "the file")

    def call(self, name: str, *args):
        """The answer of the student's function. Raises Raised, NotWritten, Stopped or Refused."""
        request = {"name": name, "args": args, "measure": self.measure}
        self.last = (name, args, None)
        answer = self.ask(1, [request], name)[0]
        self.last = (name, args, answer)
        return answer

    def on_ranks(self, name: str, calls: list[tuple]) -> list:
        """The answer to each call, one for each rank, computed at the same time."""
        requests = [{"name": name, "args": args, "measure": False} for args in calls]
        shown_as = f"on rank 0: {name}"
        self.last = (shown_as, calls[0], None)
        answers = self.ask(len(calls), requests, name)
        self.last = (shown_as, calls[0], answers[0])
        return answers

    def ask(self, size: int, requests: list[dict], name: str) -> list:
        """What the processes answer, each to its request."""
        processes = self.group(size)
        start = time.monotonic()
        try:
            for process, request in zip(processes, requests):
                process.send(request)
            answers = [
                process.receive(self.left - (time.monotonic() - start), self.late(size, rank))
                for rank, process in enumerate(processes)
            ]
        except BaseException:
            self.end(size)
            raise
        finally:
            self.spent += time.monotonic() - start
            self.left -= time.monotonic() - start
        for answer in answers:
            kind, text = str(answer.get("kind")), str(answer.get("text"))
            if kind == "NotImplementedError":
                raise NotWritten(text)
            if "value" not in answer:
                raise Raised(name, kind, text, answer.get("line"))
            self.largest = answer.get("largest", 0)
        return [answer["value"] for answer in answers]

    def late(self, size: int, rank: int) -> str:
        """What is said where a rank gives no answer in time."""
        who = f"rank {rank} gave no" if size > 1 else "no"
        text = f"{who} answer within {self.seconds:g} seconds in all: is there a loop without end"
        if size > 1:
            text += ", or an all_reduce that the other rank does not call"
        return f"{text}? (On a very busy machine a right file may take as long: try again.)"

    def group(self, size: int) -> list[Process]:
        """The processes of a group of that many ranks, started when first asked for."""
        if size not in self.groups:
            store = os.path.join(self.folder.name, f"store-{size}-{time.monotonic_ns()}")
            words = [(str(rank), str(size), store) for rank in range(size)] if size > 1 else [()]
            self.groups[size] = [Process(self.folder.name, *each) for each in words]
            slow = f"PyTorch did not start within {START} seconds: the machine is busy; try again"
            try:
                for process in self.groups[size]:
                    process.receive(START, slow)
            except Stopped:  # else a late "ready" would be taken for an answer
                self.end(size)
                raise
        return self.groups[size]

    def end(self, size: int):
        """End the processes of a group."""
        for process in self.groups.pop(size, []):
            process.end()
