"""course/worker.py - the process in which a student's functions run: python worker.py ROOT [...]

The grader starts this program, sends it calls over its standard input, and reads the answers from
its standard output. The checks, hypothesis and the result are in the grader's process. So whatever
a student's file does to PyTorch, to hypothesis or to this process, it changes no more than its own
answers.

What the student's code prints goes to standard error, where the student sees it.

The file must not use this repository's own modules. A hook (course/guard.py) sees to that.

With RANK SIZE STORE at the end, the process is one of SIZE ranks of a process group on gloo.
"""

from __future__ import annotations

import builtins
import io
import linecache
import os
import sys
import types
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

LARGEST = 2**30  # bytes of a message
MEMORY = 4 * 2**30  # bytes that this process may take, on Linux
WRITTEN = 2**28  # bytes of a file that it may write, on Linux and macOS


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


def alone(file: str | Path) -> dict:
    """The names that a file of Python defines, in a namespace and with builtins of its own: a
    student's file has no reference to them."""
    names = {"__builtins__": dict(vars(builtins)), "__name__": "alone"}
    exec(compile(Path(file).read_text(encoding="utf-8"), file, "exec"), names)
    return names


def watch(root: str, modules: str, pipe: int):
    """Start the hook. The file may write in the current folder. pipe: where the grader reads."""
    path, guard = alone(os.path.__file__), alone(Path(__file__).with_name("guard.py"))
    for module in ("os", "stat"):
        path[module] = types.SimpleNamespace(**vars(path[module]))
    refuse = guard["refusal"](pipe)
    hook = guard["guard"](path["realpath"], root, os.getcwd(), set(modules.split(",")), refuse)
    if "_posixsubprocess" in sys.modules:  # it starts programs, and reports nothing
        sys.modules["_posixsubprocess"].fork_exec = lambda *args: sys.audit("os.fork")
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.dont_write_bytecode = True  # else a library that is imported changes files
    sys.addaudithook(hook)


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
