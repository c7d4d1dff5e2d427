"""course/worker.py - the process in which a student's functions run: python worker.py ROOT [...]

The grader starts this program, sends it calls over its standard input, and reads the answers from
its standard output. The checks, hypothesis and the result are in the grader's process. So whatever
a student's file does to PyTorch, to hypothesis or to this process, it changes no more than its own
answers.

What the student's code prints goes to standard error, where the student sees it.

The file must not use this repository's own modules. A hook sees what Python reports: imports, files
that are opened or changed, programs that are started. At the first thing that is not allowed it
tells the grader the reason, and ends the process: there is no error that the file could catch. The
hook does not see what Python does not report (course/README.md, "Not defended").

With RANK SIZE STORE at the end, the process is one of SIZE ranks of a process group on gloo.
"""

from __future__ import annotations

import builtins
import io
import linecache
import os
import sys
import types
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# The functions below use this copy: a student's file can change the builtins of everybody.
__builtins__ = dict(vars(builtins))

LARGEST = 2**30  # bytes of a message
MEMORY = 4 * 2**30  # bytes that this process may take, on Linux
WRITTEN = 2**28  # bytes of a file that it may write, on Linux and macOS
REFUSED = b"refused: "  # how a message begins that is no answer, but says what was not allowed

READS = ("open", "os.listdir", "os.scandir")
# os.open, which can open a folder, reports "open" too.
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


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest tensor had that PyTorch made."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


def own_realpath() -> Callable[[str], str]:
    """os.path.realpath, from a copy of its module that nobody else has."""
    with open(os.path.__file__, encoding="utf-8") as file:
        code = compile(file.read(), os.path.__file__, "exec")
    names = {"__builtins__": __builtins__, "__name__": "own_path"}
    exec(code, names)
    for module in ("os", "stat"):
        names[module] = types.SimpleNamespace(**vars(names[module]))
    return names["realpath"]


def guard(root: str, folder: str, modules: set[str], refuse: Callable[[str], None]) -> Callable:
    """The hook that keeps a student's file away from the repository. It has no state that could be
    changed, and calls nothing of Python's that others can reach.

    root: of the repository; what is installed in it may be read. folder: where the file may write.
    modules: the names of the repository's modules. refuse: called with a reason."""
    realpath, status, separator = own_realpath(), os.stat, os.sep
    reads, changes, reaches, text = READS, CHANGES, REACHES, (str, bytes)
    root, folder, null = realpath(root), realpath(folder), realpath(os.devnull)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    installed = tuple(realpath(path) for path in (*sys.path, sys.prefix) if path)
    installed = tuple(path for path in installed if path.startswith(root + separator))

    def look_at(path, change: bool, opens: bool):
        """Refuse a path. opens: by os.open, which can open a folder."""
        if not issubclass(type(path), text):
            return refuse("it names a file by an object that is no text")
        if issubclass(type(path), bytes):
            path = bytes.decode(path, "utf-8", "surrogateescape")
        path = realpath(str.__str__(path))  # str.__str__: of a subclass, too, the text itself
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
            refuse(f"it imports {args[0]}, which is the repository's own")
        elif event in reaches:
            refuse(f"{reaches[event]} ({event})")
        elif event.startswith("ctypes."):
            refuse(f"it calls C ({event})")
        elif event in reads or event in changes:
            change = event in changes or event == "open" and args[2] & writing
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


def send(stream, message: dict):
    """Write a message: 8 bytes with its length, then the bytes of torch.save."""
    buffer = io.BytesIO()
    torch.save(message, buffer)
    stream.write(len(buffer.getvalue()).to_bytes(8, "little") + buffer.getvalue())
    stream.flush()


def read(stream) -> bytes | None:
    """The bytes of one message; None at the end, and where a length makes no sense."""
    head = stream.read(8)
    length = int.from_bytes(head, "little")
    return stream.read(length) if len(head) == 8 and length < LARGEST else None


def plain(value):
    """The value as the grader takes it: tensors, numbers, texts, None, and lists, tuples and
    dictionaries of them. Raises TypeError for anything else."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value).__module__ == "numpy":
        return torch.tensor(value) if value.ndim else value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        kind = list if isinstance(value, list) else tuple
        return kind(map(plain, value))
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    raise TypeError(
        f"the answer holds a {type(value).__name__}: the grader takes tensors, numbers, texts, "
        "None, and lists, tuples and dictionaries of them"
    )


def failure(error: BaseException, file: str) -> dict:
    """What the grader says of an error of the student's code: its kind, text and line."""
    if isinstance(error, SyntaxError):
        return {"kind": "SyntaxError", "text": str(error.msg), "line": error.lineno}
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    return {"kind": type(error).__name__, "text": str(error), "line": line}


def call(functions: dict, name: str, args: tuple, measure: bool) -> dict:
    """The answer of a student's function to one call."""
    if not callable(functions.get(name)):
        return {"kind": "NotImplementedError", "text": f"there is no function {name}", "line": None}
    if not measure:
        return {"value": plain(functions[name](*args))}
    with LargestTensor() as largest:
        value = functions[name](*args)
    return {"value": plain(value), "largest": largest.numbers}


def load(file: str, source: str) -> dict:
    """Run a student's file. Returns the names that it defines."""
    module = types.ModuleType("student")
    sys.modules["student"] = module  # dataclasses look their module up
    # For a traceback: the hook allows nobody to read the file where it lies in the repository.
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    exec(compile(source, file, "exec"), vars(module))
    return vars(module)


def serve(requests, answers):
    """Answer the grader's requests, to load a file or to call its functions, until there are no
    more."""
    functions, file = {}, ""
    while (message := read(requests)) is not None:
        request = torch.load(io.BytesIO(message), weights_only=True)
        try:
            if "load" in request:
                functions, file = {}, request["load"]
                functions = load(file, request["source"])
                answer = {"value": None}
            else:
                with torch.no_grad():
                    answer = call(functions, **request)
        except BaseException as error:  # SystemExit too: the process goes on
            answer = failure(error, file)
        send(answers, answer)


def set_limits():
    """From here on more memory than MEMORY is a MemoryError in the student's code, on Linux, and a
    file of more than WRITTEN bytes an OSError, on Linux and macOS. Without that a list of a billion
    rows takes all memory of the grader's machine."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN, WRITTEN))
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


def watch(root: str, modules: str, pipe: int):
    """Start the hook, in the current folder. pipe: where the grader reads."""
    if "_posixsubprocess" in sys.modules:  # it starts programs, and reports nothing
        sys.modules["_posixsubprocess"].fork_exec = lambda *args: sys.audit("os.fork")
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.dont_write_bytecode = True  # else a library that is imported changes files
    sys.addaudithook(guard(root, os.getcwd(), set(modules.split(",")), refusal(pipe)))


def main(root: str, modules: str, *rank_size_store: str):
    """The program, started in the folder in which the student's file may write.

    modules: the names of the repository's modules, with commas between."""
    torch.set_num_threads(1)
    set_limits()
    requests, pipe = os.fdopen(os.dup(0), "rb"), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # input() finds an end
    os.dup2(2, 1)  # prints go to standard error
    sys.stdout.reconfigure(line_buffering=True)  # at once: the process is killed at its end
    if rank_size_store:
        import torch.distributed as dist

        rank, size, store = rank_size_store
        interface = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
        if interface:  # else gloo looks for the machine's name, which fails on some laptops
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        meeting = dist.FileStore(store, int(size))
        dist.init_process_group("gloo", store=meeting, rank=int(rank), world_size=int(size))
    answers = os.fdopen(pipe, "wb")
    watch(root, modules, pipe)
    send(answers, {"value": "ready"})
    serve(requests, answers)
    os._exit(0)  # gloo's threads may abort a normal end


if __name__ == "__main__":
    main(*sys.argv[1:])
