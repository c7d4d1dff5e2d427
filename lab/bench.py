"""lab/bench.py - how fast this machine trains: the times of a step, as one JSON object.

    python -m lab.bench --model n_layers=2
    torchrun --standalone --nproc-per-node 2 -m lab.bench --tp 2

It takes those options of train.py that change how fast a step is.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import torch

import console
import parallel
import train
from flm import count_parameters, forward_flops
from launch import launch
from machine import name_of, now, peak_memory, set_up
from parallel import Worker, World
from settings import FIELDS, LAYOUT, Settings, add_option, check_same_settings, resolve


def timed(device: torch.device, action: Callable, *args) -> tuple[float, object]:
    """(seconds, result) of action(*args)."""
    start = now(device)
    result = action(*args)
    return now(device) - start, result


def time_steps(worker: Worker, optimizer, s: Settings, rounds: int) -> list[float]:
    """Median seconds of a forward pass alone, of forward and backward, and of the update, on random
    tokens; the first two rounds do not count."""
    world, T, device = worker.world, worker.config.max_seq_len, worker.device
    micro = parallel.micro_rows(world.layout, s.batch_size, s.micro_batch)
    draw = torch.Generator().manual_seed(s.seed + world.at("dp"))
    size = (s.batch_size // world.layout.dp, T + 1)
    rows = torch.randint(worker.config.vocab_size, size, generator=draw)
    batch, times = (rows[:, :-1], rows[:, 1:], micro), []
    for _ in console.progress(range(rounds + 2), desc="timing", unit="rounds"):
        forward, _ = timed(device, worker.forward, *batch)
        both, found = timed(device, worker.gradients, *batch)
        optimize, _ = timed(device, train.update, worker, optimizer, s.clip, s.lr, *found)
        times.append((forward, both, optimize))
    return [statistics.median(column) for column in zip(*times[2:])]


def benchmark(settings: Settings, world: World = World(), rounds: int = 5) -> dict:
    """Time training steps of the final model on random tokens. The backward pass is what forward
    and backward together take longer than a forward pass alone. Raises ValueError where the times
    make no sense, because the machine was busy with something else."""
    check_same_settings(world, settings)
    s, stages = world.raise_on_all_ranks(resolve, settings)
    config = stages[-1].config
    machine, world = set_up(s, stages[-1:], world)
    worker = world.raise_on_all_ranks(train.allocate, config, machine, world, s.compile)
    worker.init_weights(s.seed)
    forward, both, optimize = time_steps(worker, train.make_optimizer(worker, s), s, rounds)
    B, T, seconds = s.batch_size, config.max_seq_len, both + optimize
    achieved = 3 * forward_flops(config, T) * B * T / seconds
    peak, memory = machine.measure_again(world).peak, peak_memory(machine.device)
    if achieved > peak or forward > both:
        raise ValueError(
            f"these times make no sense: {achieved / 1e9:.1f} GFLOP/s of a measured peak of "
            f"{peak / 1e9:.1f}, and {both:.3g} s forward and backward, {forward:.3g} s forward "
            "alone. The machine was busy with something else; run the benchmark again"
        )
    return {
        "parameters": count_parameters(config),
        "batch_size": B,
        "seq_len": T,
        "layout": str(world.layout),
        "vocab_size": config.vocab_size,
        "dtype": name_of(machine.dtype),
        "compile": s.compile,
        "tokens_per_s": round(B * T / seconds, 1),
        "forward_ms": round(forward * 1e3, 2),
        "backward_ms": round((both - forward) * 1e3, 2),
        "optimizer_ms": round(optimize * 1e3, 2),
        "peak_memory_gib": memory and round(memory, 3),
        "achieved_gflops": round(achieved / 1e9, 1),
        "peak_gflops": round(peak / 1e9, 1),
        "utilisation": round(achieved / peak, 4),
        "machine": machine.why,
        "torch": torch.__version__,
    }


# The options of train.py that change how fast a step is.
USED = ("preset", "model", "mup", "seed", "batch_size", "micro_batch", *LAYOUT)
USED += ("device", "threads", "dtype", "compile", "timeout_minutes")


def make_parser() -> argparse.ArgumentParser:
    """The options of train.py in USED."""
    text = "Time training steps on random tokens. Prints one JSON object."
    parser = argparse.ArgumentParser(
        prog="lab.bench", description=text, argument_default=argparse.SUPPRESS
    )
    for field in FIELDS:
        if field.name in USED:
            add_option(parser, field)
    return parser


def main(argv: list[str] | None = None, world: World = World()) -> int:
    """The command line; returns the exit code."""
    given = vars(make_parser().parse_args(argv))
    print(json.dumps(benchmark(Settings(**given), world), indent=1))
    return 0


if __name__ == "__main__":
    launch(main)
