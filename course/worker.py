"""course/worker.py - the process in which a student's functions run: python worker.py ROOT [...]

The grader starts this program, sends it calls over its standard input, and reads the answers from
its standard output. The checks, hypothesis and the result are in the grader's process. So whatever
a student's file does to PyTorch, to hypothesis or to this process, it changes no more than its own
answers.

What the student's code prints goes to standard error, where the student sees it.

The file must not use this repository's own modules. A hook refuses to import them, to open a file
of the repository, and to start another program. Python does not allow to remove such a hook. Every
refusal is also reported with the next answer, so to catch the error is of no use.

With RANK SIZE STORE after ROOT, the process is one of SIZE ranks of a process group on gloo.
"""

from __future__ import annotations

import io
import os
import sys
import types

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("open", "os.link", "os.rename", "os.symlink", "os.listdir", "os.scandir")
LARGEST = 2**30  # bytes of a message
MEMORY = 4 * 2**30  # bytes that this process may take, on Linux
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.kill")


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


class Guard:
    """The hook that keeps a student's file away from the repository. It does nothing until
    `allowed` is set: the paths that may be read although they lie in the repository."""

    def __init__(self, root: str, modules: set[str]):
        self.root, self.modules = os.path.realpath(root), modules
        self.allowed: tuple[str, ...] | None = None
        self.refused: list[str] = []

    def __call__(self, event: str, args: tuple):
        if self.allowed is None:
            return
        if event == "import" and args[0].partition(".")[0] in self.modules:
            self.refuse(f"it imports {args[0]}, which is the repository's own")
        elif event in READS and isinstance(args[0], (str, bytes, os.PathLike)):
            path = os.path.realpath(os.fsdecode(args[0]))
            inside = path == self.root or path.startswith(self.root + os.sep)
            if inside and not path.startswith(self.allowed):
                self.refuse(f"it reads {os.path.relpath(path, self.root)} of the repository")
        elif event in STARTS:
            self.refuse(f"it starts another program or stops one ({event})")

    def find_spec(self, name: str, path=None, target=None):
        """As the first of sys.meta_path: importlib.import_module makes no event of its own."""
        if self.allowed is not None and name.partition(".")[0] in self.modules:
            self.refuse(f"it imports {name}, which is the repository's own")

    def refuse(self, reason: str):
        self.refused.append(reason)
        raise PermissionError(f"the grader does not allow this: {reason}")


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


def serve(requests, answers, guard: Guard):
    """Answer the grader's requests, (file, None, ...) to load a file, until there are no more."""
    functions, file = {}, ""
    installed = [os.path.realpath(path) for path in (*sys.path, sys.prefix) if path]
    installed = [path for path in installed if path.startswith(guard.root + os.sep)]
    while (message := read(requests)) is not None:
        request = torch.load(io.BytesIO(message), weights_only=True)
        try:
            if "load" in request:
                file = request["load"]
                guard.refused.clear()
                guard.allowed = (os.path.realpath(file), *installed)
                module = types.ModuleType("student")
                sys.modules["student"] = module  # dataclasses look their module up
                functions = vars(module)
                exec(compile(request["source"], file, "exec"), functions)
                answer = {"value": None}
            else:
                with torch.no_grad():
                    answer = call(functions, **request)
        except BaseException as error:  # SystemExit too: the process goes on
            answer = failure(error, file)
        send(answers, answer | {"refused": guard.refused})


def limit_memory():
    """From here on more memory than MEMORY is a MemoryError in the student's code. Without that a
    list of a billion rows takes all memory of the grader's machine. Linux only."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


def main(root: str, modules: str, *rank_size_store: str):
    """The program. modules: the names of the repository's modules, with commas between."""
    torch.set_num_threads(1)
    limit_memory()
    requests, answers = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints go to standard error
    if rank_size_store:
        import torch.distributed as dist

        rank, size, store = rank_size_store
        interface = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
        if interface:  # else gloo looks for the machine's name, which fails on some laptops
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        meeting = dist.FileStore(store, int(size))
        dist.init_process_group("gloo", store=meeting, rank=int(rank), world_size=int(size))
    guard = Guard(root, set(modules.split(",")))
    sys.addaudithook(guard)
    sys.meta_path.insert(0, guard)
    send(answers, {"value": "ready", "refused": []})
    serve(requests, answers, guard)
    os._exit(0)  # gloo's threads may abort a normal end


if __name__ == "__main__":
    main(*sys.argv[1:])
