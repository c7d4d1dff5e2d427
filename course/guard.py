"""course/guard.py - the hook that keeps a student's file away from this repository.

It sees what Python reports: imports, files that are opened or changed, programs that are started.
At the first thing that is not allowed it tells the grader the reason, and ends the process: there
is no error that the file could catch. It does not see what Python does not report
(course/README.md, "Not defended").

The student's file can change every module, and the builtins. So course/worker.py runs this file in
a namespace to which nobody else has a reference. The hook has no state, and calls nothing outside
it but functions in C that it keeps, and realpath, of which it has a copy, too. It calls nothing of
an object that comes from the student's file: str.__str__(path), not str(path).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

REFUSED = b"refused: "  # how a message begins that is no answer, but says what was not allowed

READS = ("open", "os.listdir", "os.scandir")
CHANGES = (
    *("os.chdir", "os.chmod", "os.chown", "os.mkdir", "os.remove", "os.rename", "os.rmdir"),
    *("os.truncate", "os.utime"),
)
STARTS = (
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile"),
    *("os.fork", "os.forkpty", "pty.spawn", "os.kill", "os.killpg"),
)
REACHES = {  # event -> what the file does
    "os.link": "it makes a link",
    "os.symlink": "it makes a link",
    "gc.get_objects": "it looks through all objects of the process",
    "gc.get_referrers": "it looks through the objects of the process",
    "gc.get_referents": "it looks through the objects of the process",
    "cpython.PyInterpreterState_New": "it starts another interpreter",
    **dict.fromkeys(STARTS, "it starts another program or stops one"),
}


def guard(
    realpath: Callable[[str], str],
    root: str,
    folder: str,
    modules: set[str],
    refuse: Callable[[str], None],
) -> Callable[[str, tuple], None]:
    """The hook, for sys.addaudithook.

    root: of the repository; what is installed in it may be read. folder: where the file may write.
    modules: the names of the repository's modules. refuse: called with a reason."""
    status, separator = os.stat, os.sep
    root, folder, null = realpath(root), realpath(folder), realpath(os.devnull)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    installed = tuple(realpath(path) for path in (*sys.path, sys.prefix) if path)
    installed = tuple(path for path in installed if path.startswith(root + separator))

    def look_at(path, change: bool, opens: bool):
        """Refuse a path. opens: by os.open, which can open a folder."""
        if not issubclass(type(path), (str, bytes)):
            return refuse("it names a file by an object that is no text")
        if issubclass(type(path), bytes):
            path = bytes.decode(path, "utf-8", "surrogateescape")
        path = realpath(str.__str__(path))
        if path == folder or path.startswith(folder + separator) or path == null:
            pass
        elif path == root or path.startswith(root + separator):
            if change or not path.startswith(installed):
                verb, name = "changes" if change else "reads", path[len(root) + 1 :]
                refuse(f"it {verb} {name or 'the folder'} of the repository")
        elif change:
            refuse(f"it changes {path}; it may write in its current folder only")
        if opens and not change:
            try:
                kind = status(path).st_mode & 0o170000
            except OSError:  # there is nothing of that name
                return
            if kind == 0o040000:
                refuse(f"it opens the folder {path}")

    def judge(event: str, args: tuple):
        if event == "import" and str.partition(args[0], ".")[0] in modules:
            refuse(f"it imports {str.__str__(args[0])}, which is the repository's own")
        elif event in REACHES:
            refuse(f"{REACHES[event]} ({event})")
        elif event.startswith("ctypes."):
            refuse(f"it calls C ({event})")
        elif event in READS or event in CHANGES:
            change = event in CHANGES or event == "open" and int.__and__(args[2], writing)
            for path in args[: 2 if event == "os.rename" else 1]:
                if path is not None and not issubclass(type(path), int):
                    look_at(path, change, event == "open" and args[1] is None)

    return without_errors(judge, refuse)


def without_errors(judge: Callable, refuse: Callable[[str], None]) -> Callable:
    """The hook that calls `judge`. An error never leaves it: the stack frames would go with it."""

    def hook(event: str, args: tuple):
        try:
            judge(event, args)
        except BaseException:
            while True:  # if the stack is full no call works, and the grader's time ends this
                try:
                    refuse("it calls the grader's hook in a wrong way, or with a full stack")
                except BaseException:
                    continue

    return hook


def refusal(pipe: int) -> Callable[[str], None]:
    """A function that tells the grader a reason, and ends the process."""
    write, leave, start = os.write, os._exit, REFUSED

    def refuse(reason: str):
        message = start + str.encode(reason[:1000], "utf-8", "replace")
        write(pipe, len(message).to_bytes(8, "little") + message)
        leave(0)

    return refuse
