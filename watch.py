"""watch.py - what a person sees of a run, and the log of its numbers.

1. at the start    what the run will do; what each rank took to start
2. Watch           a bar or lines, metrics.jsonl, TensorBoard
3. a profile       where the time of a step goes
4. at the end      a sample, and what to type next
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import data
from checkpoint import Named, load_model
from flm import FLMConfig, count_parameters
from machine import Machine, memory_size, peak_memory
from parallel import World, local
from run_folder import program, read_run, resume_command
from sample import continue_texts
from schedule import Stage, flop_progress, total_steps
from settings import Settings

# --------------------------------------------------------------------------------------------------
# 1. At the start


def describe_config(config: FLMConfig) -> str:
    size = count_parameters(config)
    return f"{config.n_layers} layers of width {config.d_model}, {size:,} parameters"


def describe_run(
    s: Settings,
    stages: list[Stage],
    machine: Machine,
    world: World,
    corpus: data.Corpus,
    samples: int,
    resume: bool,
) -> str:
    """What a run will do from `samples` on, as it is printed before the first step."""
    T, (done, total) = corpus.seq_len, flop_progress(stages, samples)
    rest = f" left, from sample {samples:,}" if samples else ""
    tokens = corpus.n_rows("train", "language") * T
    mup = "on" if stages[-1].config.mup else "off"
    lines = [
        f"{'going on with' if resume else 'training'} {s.out}",
        f"  machine   {machine.why}",
        f"  layout    {world.layout}; what libraries print: {s.out}/rank-*.log",
        f"  data      {corpus.path}: {tokens:,} training tokens ({corpus.tokenizer.name})",
    ]
    for i, stage in enumerate(stages, 1):
        place = f"samples {stage.start:,} to {stage.end:,}"
        lines.append(f"  stage {i}   {describe_config(stage.config)}: {place}")
        if stage.warmup > stage.end - stage.start:
            lines.append(
                f"  note      the warm-up of {stage.warmup:,} samples is longer than this stage: "
                "the learning rate does not reach its peak"
            )
    job = f"batches of {s.batch_size} x {T} tokens, learning rate {s.lr:g}, muP {mup}"
    lines.append(f"  job       {job}: {(total - done) / 1e12:.3g} TFLOP{rest}")
    first = "a checkpoint is read" if resume else "weights are set, a checkpoint is written"
    lines.append(f"  starting  {first}")
    return "\n".join(line for line in lines if world.size > 1 or "  layout " not in line)


def describe_start(world: World, device: torch.device, named: Named, seconds: float) -> str:
    """What each rank took to start: time, and the largest memory so far. A table; of one process a
    line. named: the parameters that this rank keeps. All ranks call this."""
    used, whole = peak_memory(device), memory_size(device)
    memory = "" if used is None else f"{used:.2f}"
    memory += "" if whole is None else f" of {whole / 2**30:.1f}"
    axes, parameters = ("pp", "dp", "tp"), sum(local(p).numel() for _, p in named)
    row = [world.rank, *map(world.at, axes), f"{parameters:,}", memory, f"{seconds:.1f}"]
    rows = world.gather([str(cell) for cell in row])
    if world.size == 1:
        return f"  started   in {seconds:.1f} s; memory so far: {memory or 'not known'} GiB"
    rows.insert(0, ["rank", *axes, "parameters", "GiB so far", "seconds"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    return "\n".join(["  started:", *(f"    {line}" for line in lines)])


# --------------------------------------------------------------------------------------------------
# 2. While it goes on


def board_writer() -> type | None:
    """TensorBoard's writer; None where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter


def refuse_board(s: Settings):
    """Raise ValueError where --log-to asks for a package that is not installed."""
    if s.log_to == "tensorboard" and board_writer() is None:
        raise ValueError(
            "--log-to tensorboard needs a package that is not here: pip install tensorboard"
        )


def numbers_of(record: dict) -> Iterator[tuple[str, float]]:
    """(name, number) of a line of the log; what is inside another has a name such as a/b."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", number) for inner, number in numbers_of(value))
        if isinstance(value, (int, float)) and name != "step":
            yield name, value


INTERVAL = 0.5  # seconds between two states of the bar


class Watch:
    """What a run shows, and its log. Ranks above 0 show nothing and log nothing.

    A terminal has a bar; without one there is a line every `log_every` steps. Bar and time left
    count FLOPs: after a growth a step takes longer."""

    def __init__(
        self,
        s: Settings,
        stages: list[Stage],
        world: World,
        step: int,
        samples: int,
        stack: contextlib.ExitStack,
    ):
        self.stages, self.log_every, rank_0 = stages, s.log_every, world.rank == 0
        self.last_step = step + total_steps(stages, samples)
        file = Path(s.out, "metrics.jsonl") if rank_0 else os.devnull
        self.file = stack.enter_context(open(file, "a"))
        self.board = None
        if s.log_to == "tensorboard" and rank_0:
            # What an earlier process logged of later steps is not shown.
            folder = Path(s.out, "tensorboard")
            self.board = stack.enter_context(board_writer()(folder, purge_step=step + 1))
        self.profiler = None
        if s.profile:
            steps = profiled_steps(s.profile, step, self.last_step)
            self.profiler = stack.enter_context(profile_steps(s.out, world, step, steps))
        self.warned = False  # of a utilisation that cannot be
        self.shown = 0  # step of the last line
        self.begun, self.total = flop_progress(stages, samples)
        self.start = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=self.total,
            initial=self.begun,
            bar_format="{percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}{postfix}]",
            smoothing=0,
            dynamic_ncols=True,
            mininterval=INTERVAL,
            disable=not (rank_0 and self.terminal),
        )
        stack.enter_context(self.bar)

    def say(self, text: str):
        """Print a line, above the bar where there is one."""
        tqdm.write(text)

    def doing(self, what: str):
        """Say on the bar what takes the time."""
        self.bar.set_description_str(what)

    def log(self, record: dict):
        """One line of metrics.jsonl. Numbers go to TensorBoard, those of a step to the screen."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.board:
            for name, value in numbers_of(record):
                self.board.add_scalar(name, value, record["step"])
        if "tokens_per_s" in record:
            self.show(record)
        if "tokens_per_s" in record and self.profiler:
            self.profiler.step()

    def show(self, record: dict):
        """Move the bar on, or print a line. Says once that a utilisation cannot be."""
        step, used = record["step"], record["utilisation"]
        speed = f"{record['tokens_per_s']:,.0f} tok/s, MFU {used:.0%}"
        done = flop_progress(self.stages, record["samples"])[0]
        self.bar.set_description_str(f"step {step} of {self.last_step}", refresh=False)
        self.bar.set_postfix_str(f"loss {record['loss']:.3f}, {speed}", refresh=False)
        self.bar.update(done - self.bar.n)
        due = step % self.log_every == 0 or not self.shown or step == self.last_step
        if due and not self.terminal:
            left = (self.total - done) / (done - self.begun) * (time.monotonic() - self.start)
            self.say(
                f"step {step:>6} of {self.last_step}: loss {record['loss']:.3f}, "
                f"lr {record['lr']:.3g}, {speed}, {tqdm.format_interval(left)} left"
            )
            self.shown = step
        if used > 1 and not self.warned:
            self.say(
                f"a utilisation of {used:.0%} cannot be: the machine's peak was measured while the "
                "machine was busy; the next evaluation measures it again"
            )
            self.warned = True


# --------------------------------------------------------------------------------------------------
# 3. A profile

WARM_UP = 3  # steps before the profile: the first ones allocate and compile


def profiled_steps(n: int, step: int, last_step: int) -> range:
    """The steps that are profiled of a run that has done `step` of its steps: n of them after
    WARM_UP ones, or as many as there are, at least one.

    >>> [profiled_steps(2, 10, last) for last in (20, 14, 12, 11)]
    [range(14, 16), range(14, 15), range(12, 13), range(11, 12)]
    """
    first = min(step + WARM_UP + 1, last_step)
    return range(first, min(first + n, last_step + 1))


def profile_steps(out: str, world: World, step: int, steps: range) -> torch.profiler.profile:
    """PyTorch's profiler for these steps of a run that has done `step`. Each rank writes a trace,
    which chrome://tracing and ui.perfetto.dev open; rank 0 prints the costliest operations. Of a
    run that stops before, nothing is written."""
    file = Path(out, f"trace-step-{steps[0]}-rank-{world.rank}.json")
    before = steps[0] - step - 1
    warm_up = min(1, before)
    actions = {"wait": before - warm_up, "warmup": warm_up, "active": len(steps), "repeat": 1}

    def finish(profiler: torch.profiler.profile):
        last = step + profiler.step_num
        if last < steps[0]:
            return
        profiler.export_chrome_trace(str(file))
        table = costliest(profiler, f"steps {steps[0]} to {last}")
        tqdm.write(f"{table}\n  trace: {file}, for ui.perfetto.dev")

    schedule = torch.profiler.schedule(**actions)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=finish)


def costliest(profiler: torch.profiler.profile, steps: str, n: int = 10) -> str:
    """The n operations of a profile that took most time, without what they call. On a GPU its own
    time counts."""
    events = [e for e in profiler.key_averages() if not e.key.startswith("ProfilerStep")]
    kind = "device" if any(e.self_device_time_total for e in events) else "cpu"
    times = {e.key: getattr(e, f"self_{kind}_time_total") for e in events}
    calls, total = {e.key: e.count for e in events}, sum(times.values())
    lines = [f"profile of {steps}, {kind} time", f"  {'operation':60}{'calls':>8}{'ms':>11}  share"]
    for key in sorted(times, key=times.get, reverse=True)[:n]:
        share = times[key] / max(total, 1e-9)
        lines.append(f"  {key[:59]:60}{calls[key]:8,}{times[key] / 1e3:11,.1f}{share:7.1%}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# 4. At the end

# What the default corpus, Python's own source, goes on with as a function. The start of a new
# document, or a lower temperature, often ends in white space.
PROMPT, TEMPERATURE = "\n\ndef ", 0.8


def print_end(result: dict, s: Settings, world: World, seconds: float) -> int:
    """Print what came of a run (train.train's result) and what to type next; returns the exit
    code."""
    step, signals, folder = result["step"], result["signals"], result["folder"]
    go_on = resume_command(world, folder)
    if signals:
        number = next(iter(signals.values()))
        name = signal.Signals(number).name
        print(f"stopped by {name} after step {step}, saved; to go on:\n  {go_on}")
        if len(signals) < world.size:
            ranks = ", ".join(map(str, signals))
            print(
                f"torchrun takes this for a failure, since only rank {ranks} received the signal: "
                "with --max-restarts it starts the run again"
            )
        return 128 + number
    if result["move"]:
        print(
            f"saved at step {step}: the next stage lies on another layout; it begins when you "
            f"type, on as many processes:\n  {go_on} {result['move']}"
        )
        return 0
    print(f"done in {seconds:.0f} s.")
    print_next(folder, step, s, world)
    return 0


def print_next(folder: str, step: int, s: Settings, world: World):
    """Print a sample of a finished run, and what to type next."""
    where, go_on = shlex.quote(folder), resume_command(world, folder)
    if world.rank == 0 and s.tp == s.pp == 1:
        print_sample(folder, s)
    room = read_run(folder)[1][-1].config.max_seq_len
    words = ' --prompt "def "' if room > 4 else ""  # at most 4 tokens, and one to write
    longer = f"  train it twice as long          {go_on} --steps {2 * step}\n"
    print(
        f"\nWhat next?\n"
        f"  let it continue your words      python sample.py {where}{words}\n"
        f"{longer if s.lr_schedule == 'cosine' else ''}"
        f"  train on your own text          python data.py prepare mine.txt --out corpora/mine\n"
        f"                                  {program(world)} --data corpora/mine"
    )


def print_sample(folder: str, s: Settings):
    """What the model writes: after PROMPT, or where a document starts if the corpus is another."""
    model, info = load_model(folder)
    prompt = "" if s.data else PROMPT
    room = min(400, model.config.max_seq_len - max(1, len(prompt)))
    if room > 0:
        print("A sample, from the start of a new document:\n" if s.data else "A sample:")
        options = dict(temperature=TEMPERATURE, tokenizer_file=s.tokenizer_file)
        continue_texts(model, info, [prompt], max_new_tokens=room, stream=sys.stdout, **options)
