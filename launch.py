"""launch.py - start a command in one process, or as one of torchrun's; its errors for people.

console.py does the same for a command of one process. Here an error may be that of all ranks, of
one, or of a rank that is lost.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

import console
import parallel
from checkpoint import causes
from parallel import NonFinite, World


def advice_for(error: RuntimeError) -> str | None:
    """What to do about an error of PyTorch that a user can mend; None for any other error."""
    # PyTorch has no class of its own for a CPU without memory.
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory: try a smaller --micro-batch or --eval-batch, or a smaller model"
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return (
            "--compile: PyTorch cannot compile here. It needs a C++ compiler (g++ or clang++): "
            f"install one, or leave --compile out\n  {str(error).strip().splitlines()[0]}"
        )
    return None


def call_main(main: Callable[..., int], world: World) -> int:
    """main(world=world), with its errors printed for people; returns the exit code."""
    if world.rank > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        return main(world=world)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        text, code = describe_error(error, world)
    if text:
        print(f"{console.program_name()}: {text}", file=sys.stderr)
    return code


def describe_error(error: Exception, world: World) -> tuple[str, int]:
    """What this rank prints of an error (nothing where another rank does), and the exit code: 2 for
    a mistake, which torchrun does not repeat (parallel.leave), 1 for a fault, after which it may
    start again. An error that nobody but its author can mend is raised again."""
    for cause in causes(error):  # a rank may be lost in the middle of a save
        lost = parallel.explain_lost_rank(world, cause)
        if lost is not None:
            return lost, 1
    if isinstance(error, (ValueError, OSError, NonFinite)):  # all ranks have it
        mistake = isinstance(error, ValueError) or world.size == 1 and isinstance(error, OSError)
        return "" if world.rank > 0 else str(error), 2 if mistake else 1
    advice = advice_for(error)
    if not advice:
        raise error
    return advice if world.size == 1 else f"rank {world.rank}: {advice}", 2


def early_timeout() -> float:
    """--timeout-minutes, read before all other options: connecting needs it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--timeout-minutes", type=float, default=10.0)
    try:
        return max(0.01, parser.parse_known_args()[0].timeout_minutes)
    except argparse.ArgumentError:
        return 10.0  # the parser of all options will say what is wrong


def launch(main: Callable[..., int]):
    """Run main(world=...) as a program, in one process or as one of torchrun's. Errors are printed
    for people. Exit codes: those of console.run; 1 after NonFinite."""
    torchrun = dist.is_torchelastic_launched()
    world = World(rank=int(os.environ["RANK"]) if torchrun else 0)

    def start() -> int:
        nonlocal world
        if torchrun:
            try:
                world = parallel.connect(early_timeout())
            except (TimeoutError, ConnectionError) as error:  # the ranks do not know who says it
                print(f"{console.program_name()}: {error}", file=sys.stderr)
                return 1
        return call_main(main, world)

    try:
        console.run(start, "interrupted; what was saved before is whole")
    except SystemExit as end:
        if torchrun:
            parallel.leave(world, end.code)
        raise
