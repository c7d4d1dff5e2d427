"""Ranks of which one is lost: python tests/frozen.py FOLDER SECONDS

For each case two ranks are forked. One of them stops its own process (SIGSTOP; in the last case it
ends it with SIGKILL) in the middle of its work, as if its machine were gone. The other waits for it with a timeout of SECONDS; what it prints
is in FOLDER/CASE.log. FOLDER/CASE.frozen is there if the case came as far as that."""

import contextlib
import functools
import os
import signal
import sys
import time
from pathlib import Path

import distributed
import torch

import launch
import parallel
import train
from checkpoint import write_checkpoint
from parallel import Layout, World


def freeze(mark: Path):
    mark.touch()
    os.kill(os.getpid(), signal.SIGKILL if mark.stem == "killed-1" else signal.SIGSTOP)


def one_sum(world: World, freeze_me):
    """The plain numbers of a step."""
    world.sum(1.0)
    freeze_me()
    world.sum(1.0)


def one_step(world: World, freeze_me, layout: Layout):
    """A step of training, frozen before its second micro-batch or its end."""
    world = parallel.arrange(world, layout, distributed.CPU)
    worker, _ = distributed.make_worker(world, distributed.Job())
    rows = distributed.rows_of(world, 0, False)
    worker.gradients(*rows, 4)
    freeze_me()
    worker.gradients(*rows, 4)
    world.sum(1.0)


def one_save(world: World, freeze_me):
    """The last whole checkpoint is that of before; the next one is not written."""
    tensors = {"model": {f"rank {world.rank}": torch.ones(2)}}
    write_checkpoint(Path("unused"), tensors, {}, world)
    freeze_me()
    write_checkpoint(Path("unused"), tensors, {}, world)


def long_work(world: World, freeze_me):
    """Rank 0 alone works for three timeouts, and the others wait; then it is frozen in its work."""
    found = world.on_rank_0(lambda: time.sleep(3 * world.timeout.total_seconds()) or "the result")
    print(f"rank {world.rank} got {found}")
    world.on_rank_0(freeze_me)


# name -> (the rank that is frozen, what both ranks do)
CASES = {
    "sum-1": (1, one_sum),
    "sum-0": (0, one_sum),
    "dp-1": (1, functools.partial(one_step, layout=Layout(dp=2))),
    "tp-1": (1, functools.partial(one_step, layout=Layout(tp=2))),
    "pp-1": (1, functools.partial(one_step, layout=Layout(pp=2))),
    "pp-0": (0, functools.partial(one_step, layout=Layout(pp=2))),
    "save-1": (1, one_save),
    "rank-0-works-0": (0, long_work),
    "killed-1": (1, one_sum),
}


def run(name: str, folder: Path, seconds: float):
    """The work of one rank in a case."""
    frozen, work = CASES[name]
    os.chdir(folder)
    world = parallel.connect(seconds / 60)
    freeze_me = functools.partial(freeze, folder / f"{name}.frozen")
    try:
        work(world, freeze_me if world.rank == frozen else lambda: None)
    except (RuntimeError, OSError) as error:
        print(launch.describe_error(error, world)[0], flush=True)
        os._exit(1)


def main():
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    listeners = {name: distributed.free_port() for name in CASES}
    waited_for, to_kill = set(), []
    for name, (frozen, _) in CASES.items():
        for rank in (0, 1):
            log = folder / (f"{name}-frozen.log" if rank == frozen else f"{name}.log")
            work = functools.partial(run, name, folder, seconds)
            pid = distributed.fork(log, rank, 2, listeners[name], work)
            (to_kill.append if rank == frozen else waited_for.add)(pid)
    stores = [distributed.serve_store(listener) for listener in listeners.values()]
    while waited_for:
        pid, _ = os.wait()
        waited_for.discard(pid)
    for pid in to_kill:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    del stores


if __name__ == "__main__":
    main()
