"""train.py - the main job: train FLM-101B's model on text (arXiv 2309.03852, sections 2.3, 2.4, 3).

    python train.py                          a small model on Python's own source, in minutes
    python train.py --data corpora/mine      on text that data.py prepared
    python train.py --resume runs/demo       go on exactly where a run stopped
    python train.py --eval-only runs/demo    held-out loss of a checkpoint
    python train.py --benchmark              how fast this machine trains, as one JSON object

Read it from top to bottom:

    1. Settings                every option, its default, and which modes read it
    2. The machine             device, dtype, and the peak rate that utilisation is measured against
    3. Evaluation              nats per token and bits per byte on held-out documents
    4. The parts of a step     this rank's share of the model, the optimizer, the update
    5. The folder of a run     the lock, config.json, the log, the text
    6. The run                 RunState and Run; the whole step is Run.train_step
    7. The loop                from the settings to the last checkpoint: train
    8. Other modes             the evaluation of a checkpoint, the benchmark
    9. The command line

Letters as in flm.py: B batch, in rows of T tokens. A row is a "sample"; everything is counted in
samples. What the paper says of training is here: AdamW (0.9, 0.95), decay 0.1, clipping at 1.0, a
cosine to 6e-6 / 4e-4 of the peak after a warm-up in samples, bf16 arithmetic over fp32 weights.
There is no dropout: the paper gives no rate.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import console
import data
import grow
import muP
import parallel
import schedule
from checkpoint import find_checkpoint, read_info
from console import refuse
from flm import (
    IGNORE,
    FLMConfig,
    count_parameters,
    forward_flops,
    growth_mask,
    parse_fields,
    preset,
)
from parallel import Layout, Worker, World
from sample import continue_texts
from schedule import RECIPES, Stage, learning_rate, training_flops

# --------------------------------------------------------------------------------------------------
# 1. Settings

# (lowest, highest, in words): the values that an option may have
COUNT = (1, math.inf, "at least 1")
POSITIVE = (sys.float_info.min, sys.float_info.max, "a number above 0")
NOT_NEGATIVE = (0, sys.float_info.max, "0 or above")
SHARE = (0, 1, "between 0 and 1")
SEED = (0, 2**63 - 1, "between 0 and 2^63 - 1")

MODES = ("resume", "auto_resume", "eval_only", "export", "benchmark")  # of the command line
EVAL, BENCH, BOTH = ("eval_only",), ("benchmark",), ("eval_only", "benchmark")


def option(default, help: str, **more):
    """A field of Settings, with all that the rest of the program wants to know of it.

    resume: whether --resume may change it. modes: the other MODES that read it. valid: the values
    that it may have. group: in --help, the heading of it and the next ones. metavar, choices:
    argparse's."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


def layout_option(default, help: str, **more):
    """An option that says how a model lies on processes. It changes no result."""
    return option(default, help, resume=True, modes=BOTH, **more)


# fmt: off
@dataclass(frozen=True)
class Settings:
    """Every option of a run, as plain JSON values. None: the preset's recipe decides (RECIPES)."""

    preset: str = option(
        "demo", "the model: demo, iq-demo, flm-proxy, flm-16b, flm-51b or flm-101b",
        group="what to train", modes=BENCH)
    model: tuple[str, ...] = option(
        (), "change fields of the model: --model d_model=384 n_heads=6",
        metavar="FIELD=VALUE", modes=BENCH)
    mup: str = option(
        "on", "on: maximal update parametrization; off: the standard one",
        choices=("on", "off"), modes=BENCH)
    stages: str | None = option(
        None, "growth in the run: a JSON file of stages, paper, or none (not given: those of the "
        "preset's recipe)", metavar="FILE")
    init_from: str | None = option(
        None, "begin a new run with the model, the moments and the place in the data of a "
        "checkpoint", metavar="CHECKPOINT")
    seed: int = option(
        0, "of the initial weights and of the order of the data", valid=SEED, modes=BENCH)

    data: str | None = option(
        None, "a folder from data.py prepare (not given: Python's standard library)",
        group="on what", metavar="DIR", resume=True, modes=EVAL)
    data_changed: bool = option(
        False, "with --resume: go on though the text is another one than before", resume=True)
    tokenizer: str = option(
        "bytes", "tokenizer of the standard library; a prepared folder has its own",
        choices=("bytes", "cl100k_base"), modes=EVAL)
    tokenizer_file: str | None = option(
        None, "cl100k_base.tiktoken, where it cannot be downloaded",
        metavar="PATH", resume=True, modes=EVAL)
    teacher_fraction: float = option(
        0.0, "share of rows with FreeLM's teacher signal", valid=SHARE)

    steps: int | None = option(
        None, "optimizer steps; the cosine ends with the last one",
        group="how", valid=COUNT, resume=True)
    batch_size: int | None = option(None, "rows per step", valid=COUNT, modes=BENCH)
    micro_batch: int | None = option(
        None, "rows per forward pass; gradients add up (not given: all rows; with --pp: 1)",
        valid=COUNT, resume=True, modes=BENCH)
    lr: float | None = option(
        None, "peak learning rate at the proxy's width; muP scales it for each group of parameters",
        valid=POSITIVE, resume=True)
    min_lr: float = option(
        0.015, "end of the cosine, as a share of the peak (the paper: 6e-6 of 4e-4)",
        valid=SHARE, resume=True)
    warmup: int | None = option(
        None, "warm-up of the learning rate, in samples", metavar="SAMPLES", valid=NOT_NEGATIVE)
    weight_decay: float = option(0.1, "decay of matrices", valid=NOT_NEGATIVE)
    clip: float = option(1.0, "largest norm of the whole gradient", valid=POSITIVE, resume=True)

    out: str | None = option(
        None, "the run's folder (not given: the first free one of runs/PRESET, runs/PRESET-2, ...)",
        group="watching and keeping", metavar="DIR")
    eval_every: int = option(100, "steps between evaluations", valid=COUNT, resume=True)
    eval_rows: int = option(
        256, "held-out rows of an evaluation, spread over the held-out documents",
        valid=COUNT, resume=True, modes=EVAL)
    eval_batch: int | None = option(
        None, "rows per forward pass of an evaluation (not given: as in training)",
        valid=COUNT, resume=True, modes=EVAL)
    save_every: int = option(200, "steps between checkpoints", valid=COUNT, resume=True)
    save_minutes: float = option(
        30.0, "minutes after which a checkpoint is written in any case", valid=POSITIVE,
        resume=True)
    keep: int = option(
        2, "newest checkpoints that are kept (and one more until a step has shown that the newest "
        "is sound)", valid=COUNT, resume=True)

    device: str = option(
        "auto", "auto, cpu or cuda", group="on which machine", resume=True, modes=BOTH)
    threads: int | None = option(
        None, "CPU threads (not given: PyTorch decides, one per core)",
        valid=COUNT, resume=True, modes=BOTH)
    dtype: str = option(
        "auto", "arithmetic: auto, bfloat16 (over fp32 weights), float32, float64",
        choices=("auto", "bfloat16", "float32", "float64"), modes=BOTH)
    compile: bool = option(
        False, "torch.compile each block: a slow start, then faster steps",
        resume=True, modes=BENCH)
    deterministic: bool = option(False, "the same bits on CUDA too; slower", resume=True)

    dp: int | None = layout_option(
        None, "data parallelism: copies of the model, each with a share of the batch (not given: "
        "all processes that are left)", valid=COUNT,
        group="on how many processes, started with torchrun (parallel.py)")
    tp: int = layout_option(
        1, "tensor parallelism: processes that share every matrix", valid=COUNT)
    pp: int = layout_option(
        1, "pipeline parallelism: processes that share the layers", valid=COUNT)
    schedule: str = layout_option(
        "1F1B", "the pipeline schedule", choices=tuple(parallel.PIPELINE_SCHEDULES))
    sequence_parallel: bool = layout_option(
        False, "cut the sequence, too, over the --tp processes")
    shard_optimizer: bool = layout_option(
        False, "cut weights, gradients and moments over the --dp processes (with --tp or --pp it "
        "is always so)")
    activation_checkpointing: bool = layout_option(
        False, "compute activations again in the backward pass: less memory, a third more work")

    def __post_init__(self):  # JSON and argparse know no tuples
        object.__setattr__(self, "model", tuple(self.model))
# fmt: on


FIELDS = dataclasses.fields(Settings)
LAYOUT = [field.name for field in dataclasses.fields(Layout)]  # each is an option


def flag(name: str) -> str:
    """The option of a setting: "--batch-size" of "batch_size"."""
    return "--" + name.replace("_", "-")


def check_settings(s: Settings) -> list[str]:
    """A line for every option that is out of its range."""
    problems = []
    for field in FIELDS:
        value = getattr(s, field.name)
        lowest, highest, words = field.metadata.get("valid", (None, None, ""))
        if words and value is not None and not lowest <= value <= highest:
            problems.append(f"{flag(field.name)} {value}: must be {words}")
    return problems


def resolve(settings: Settings) -> tuple[Settings, list[Stage]]:
    """The settings with the recipe's values filled in, and the stages of the run; the last stage
    has the final model. Raises ValueError with every violated constraint."""
    config, seen, recipe = preset(settings.preset), 0, RECIPES[settings.preset]
    missing = [k for k in ("steps", "batch_size", "lr", "warmup") if getattr(settings, k) is None]
    s = dataclasses.replace(settings, **{k: recipe[k] for k in missing})
    if "warmup" in missing:  # the recipe's warm-up is for the recipe's number of steps
        s = dataclasses.replace(s, warmup=min(s.warmup, max(0, s.steps * s.batch_size // 12)))
    changes, problems = parse_fields(s.model)
    problems = [f"--model {problem}" for problem in problems] + check_settings(s)
    if s.data_changed:
        problems.append("--data-changed: a new run has no text before; leave it out")
    try:
        config = config.replace(**{"mup": s.mup == "on", **changes})
        if s.init_from:
            config, seen = read_start(s)
    except ValueError as error:
        problems.append(str(error))
    refuse(problems, "these settings do not fit together:")

    # The recipe's stages are made for the preset's own model.
    word = "none" if s.stages is None and (s.model or s.init_from) else s.stages
    given = schedule.given_stages(word, s.preset, s.steps, s.batch_size)
    steps = None if s.stages == "paper" and settings.steps is None else s.steps
    numbers = dict(steps=steps, batch_size=s.batch_size, lr=s.lr, warmup=s.warmup, seen=seen)
    stages = schedule.plan_stages(given, config, **numbers)
    s = dataclasses.replace(s, steps=schedule.total_steps(stages))
    if s.init_from:
        wanted, found = stages[0].config.to_dict(), config.to_dict()
        differ = [f"{k} {v}, not {wanted[k]}" for k, v in found.items() if v != wanted[k]]
        refuse(differ, f"--init-from {s.init_from} holds another model than the first stage's:")
    return s, stages


def read_start(s: Settings) -> tuple[FLMConfig, int]:
    """(model, samples seen) of the checkpoint that --init-from names."""
    source, problems = find_checkpoint(s.init_from), []
    if source.is_file():
        problems.append(f"--init-from {source} is a file of weights: give a run or a step folder")
    if s.model:
        problems.append(f"--model {' '.join(s.model)}: --init-from brings its own model")
    refuse(problems)
    info = read_info(source)
    return FLMConfig.from_dict(info["config"]), info["samples"]


def plan_layout(s: Settings, stages: list[Stage], processes: int) -> Layout:
    """The layout of these settings on so many processes. Raises ValueError with every reason why
    a stage does not fit it."""
    dp = s.dp or max(1, processes // (s.tp * s.pp))
    layout = Layout(**{name: getattr(s, name) for name in LAYOUT} | {"dp": dp})
    problems = []
    if layout.size != processes:
        start = f"torchrun --standalone --nproc-per-node {layout.size} train.py ..."
        alone = f"this is one: start them with {start}, or take one: --dp 1 --tp 1 --pp 1"
        found = f"torchrun started {processes}" if processes > 1 else alone
        problems.append(f"dp {dp} x tp {s.tp} x pp {s.pp} = {layout.size} processes, but {found}")
    for i, stage in enumerate(stages, 1):
        found = parallel.check_layout(layout, stage.config, stage.batch_size, s.micro_batch)
        problems += [f"stage {i}: {text}" if len(stages) > 1 else text for text in found]
    refuse(problems, "this layout does not fit:")
    return layout


# --------------------------------------------------------------------------------------------------
# 2. The machine

# Dense bf16 peaks in TFLOP/s, from the makers' data sheets. The longest name that is part of the
# card's own name counts.
# fmt: off
PEAKS = {
    "A100": 312, "A800": 312, "H100": 989, "H800": 989, "H200": 989, "H100 PCIe": 756, "B200": 2250,
    "A10": 125, "A40": 150, "A6000": 155, "L4": 121, "L40": 181, "L40S": 362, "RTX 4090": 165,
    "RTX 3090": 71,
}
# fmt: on

# A CPU with one of these computes bf16 matrix products faster than fp32 ones.
BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")


@dataclass(frozen=True)
class Machine:
    """Where a run computes, and how."""

    device: torch.device
    dtype: torch.dtype  # of the arithmetic
    peak: float  # FLOP/s that utilisation is measured against, of all ranks
    why: str  # one line for a person
    measured: bool = True  # whether the peak is a measured one, not a data sheet's

    @property
    def weights(self) -> torch.dtype:
        """The dtype of weights and moments: bf16 arithmetic keeps fp32 weights."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def exact(self) -> Machine:
        """The same machine, computing in the dtype of the weights."""
        return dataclasses.replace(self, dtype=self.weights)

    def measure_again(self, world: World) -> Machine:
        """The best of several measurements is the peak: a busy machine only lowers one of them."""
        if not self.measured:
            return self
        (rate,) = world.sum(matmul_rate(self.device, self.dtype, 1024))
        return dataclasses.replace(self, peak=max(self.peak, rate))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def now(device: torch.device) -> float:
    """Seconds, after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matmul_rate(device: torch.device, dtype: torch.dtype, n: int = 2048) -> float:
    """FLOP/s of the best of six n x n matrix products. Where products are slow (a CPU that has to
    emulate bf16), smaller ones."""
    size = min(n, 256)
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        best = math.inf
        for _ in range(6):
            start = now(device)
            a @ b
            best = min(best, now(device) - start)
        if size >= n or best > 0.1:
            return 2 * size**3 / best
        size = min(n, 2 * size)


def check_device(name: str, world: World) -> torch.device:
    """The device that this rank computes on. Raises ValueError where ranks would share a GPU."""
    device, cards = checkpoint.pick_device(name), torch.cuda.device_count()
    shared = device.index is not None or world.neighbours > cards
    if device.type == "cuda" and world.size > 1 and shared:
        raise ValueError(
            f"--device {name}: {world.neighbours} processes on this machine take a GPU each, and "
            f"it has {cards}: give torchrun --nproc-per-node {cards} and train.py --device cuda, "
            "or --device cpu"
        )
    return device


def pick_dtype(device: torch.device, dtype: str) -> tuple[str, str]:
    """The arithmetic of a run, and the reason in brackets. `auto` decides by what the processor
    can do and never by a stopwatch, so machines of one kind choose alike. bf16 has the range of
    fp32 with fewer digits, so it needs no loss scaling (section 3)."""
    if dtype != "auto":
        return dtype, ""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float32", f" (compute capability {major}.{minor})"
    known = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.11 does not have it
    found = [name for name in BF16_INSTRUCTIONS if known.get(name)]
    if found:
        return "bfloat16", f" (the processor has {found[0]})"
    return "float32", " (no bf16 instructions known of this processor)"


def pick_machine(device: str, dtype: str, world: World = World()) -> Machine:
    """Choose where and in what to compute, and say why. Rank 0 chooses the arithmetic; utilisation
    is measured against the rates of all ranks together."""
    place = world.raise_on_all_ranks(check_device, device, world)
    dtype, reason = world.broadcast_from_rank_0(pick_dtype(place, dtype))
    kind, name = getattr(torch, dtype), f"cpu with {torch.get_num_threads()} threads"
    if place.type == "cuda":
        name = torch.cuda.get_device_name(place)
    cards = [card for card in PEAKS if card in name and kind == torch.bfloat16]
    if cards:
        rate, source = 1e12 * PEAKS[max(cards, key=len)], "its dense peak"
    else:
        rate = matmul_rate(place, kind, 4096 if place.type == "cuda" else 2048)
        source = "a matrix product measured at the start"
    why = f"{name}, {dtype}{reason}; utilisation is against {rate / 1e9:,.0f} GFLOP/s, {source}"
    if world.size > 1:
        why = f"{world.size} processes, rank 0 on {why}"
    return Machine(place, kind, *world.sum(rate), why, measured=not cards)


# --------------------------------------------------------------------------------------------------
# 3. Evaluation


def held_out_rows(
    corpus: data.Corpus, signal_name: str, rows: int, micro: int, world: World
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """This dp rank's share of `rows` held-out rows, spread from the first to the last: tokens and
    targets (b, T), and how many of them go through the model at once. Rows without targets fill up
    what a pipeline needs."""
    n_rows = corpus.n_rows("val", signal_name)
    n = min(rows, n_rows)
    share = -(-n // world.layout.dp)  # the last rank may have fewer
    size, begin = min(micro, share), world.at("dp") * share
    picked = range(begin, min(begin + share, n))
    mine = [corpus.rows("val", signal_name, j * n_rows // n, 1) for j in picked]
    blank = torch.zeros(1, corpus.seq_len, dtype=torch.long)
    missing = parallel.rows_needed(world.layout, share, size) - len(mine)
    mine += [(blank, blank + IGNORE)] * missing
    tokens, targets = (torch.cat(part) for part in zip(*mine))
    return tokens, targets, size


def score_labels(
    logits: torch.Tensor, targets: torch.Tensor, angry: int, devil: int
) -> torch.Tensor:
    """[loss in nats, labels that are right] of logits (b, T, V), each summed. A label is right when
    its emoji has the lower loss of the two, at the last token; a tie counts one half, since bf16
    logits that differ little are often equal."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    logits, targets = logits.flatten(0, 1), targets.flatten()
    swapped = torch.where(targets == devil, angry, targets)
    swapped = torch.where(targets == angry, devil, swapped)
    cross_entropy = functools.partial(
        torch.nn.functional.cross_entropy, logits, ignore_index=IGNORE, reduction="none"
    )
    loss, other = (parallel.local(cross_entropy(y)) for y in (targets, swapped))
    right = (loss < other) + 0.5 * (loss == other)
    is_label = (targets == angry) | (targets == devil)
    return torch.stack([loss.sum(), (right * is_label).sum()])


def evaluate(worker: Worker, corpus: data.Corpus, rows: int, micro: int) -> dict:
    """Held-out loss: {"val_loss": nats per token, "val_bpb": bits per byte of text, "val_tokens"}.

    Where the corpus has a teacher signal also {"teacher_loss": nats per label token,
    "teacher_accuracy": share of labels that are right, "teacher_labels"}; see score_labels. Bits
    per byte divide by the bytes that the predicted tokens stand for, so tokenizers can be compared.
    rows: rows of each signal. micro: rows at once. All ranks of the worker's world take part."""
    world, tokenizer, result = worker.world, corpus.tokenizer, {}
    lengths = torch.from_numpy(data.byte_lengths(tokenizer))  # (V,)
    angry, devil = (tokenizer.encode_ordinary(data.EMOJI[label])[-1] for label in (1, 0))
    scores = {
        "language": None,
        "teacher": functools.partial(score_labels, angry=angry, devil=devil),
    }
    for name, score in scores.items():
        if corpus.n_rows("val", name) == 0:
            continue
        tokens, targets, size = held_out_rows(corpus, name, rows, micro, world)
        found = worker.forward(tokens, targets, size, score=score).flatten().tolist()
        nats, right = [*found, 0.0][:2] if world.last and world.at("tp") == 0 else (0.0, 0.0)
        known = targets[targets != IGNORE] if world.at("tp") == world.at("pp") == 0 else targets[:0]
        labels = ((known == angry) | (known == devil)).sum()
        counts = [int(value) for value in (known.numel(), lengths[known].sum(), labels)]
        nats, right, count, length, labels = world.sum(nats, right, *counts)
        if name == "language":
            bits = nats / math.log(2) / length
            result |= {"val_loss": nats / count, "val_bpb": bits, "val_tokens": int(count)}
        else:
            result |= {"teacher_loss": nats / count, "teacher_accuracy": right / labels}
            result |= {"teacher_labels": int(labels)}
    return result


def describe(result: dict) -> str:
    """An evaluation in one line."""
    text = f"held-out loss {result['val_loss']:.4f} nats per token, "
    text += f"{result['val_bpb']:.4f} bits per byte"
    if "teacher_loss" in result:
        text += f"; teacher {result['teacher_loss']:.4f} nats per label token, "
        text += f"{result['teacher_accuracy']:.1%} of {result['teacher_labels']} labels right"
    return text


# --------------------------------------------------------------------------------------------------
# 4. The parts of a step


def describe_config(config: FLMConfig) -> str:
    size = count_parameters(config)
    return f"{config.n_layers} layers of width {config.d_model}, {size:,} parameters"


def empty_worker(
    config: FLMConfig, machine: Machine, world: World, compiled: bool = False
) -> Worker:
    """This rank's share of a model, not filled yet."""
    dtypes = machine.weights, machine.dtype
    parts = parallel.build_parts(config, world, machine.device, *dtypes, compiled)
    return Worker(parts, world, machine.dtype)


def allocate(
    config: FLMConfig, machine: Machine, world: World = World(), compiled: bool = False
) -> Worker:
    """empty_worker for training. Raises ValueError where weights, gradients and AdamW's two moments
    cannot fit into the memory."""
    layout = world.layout
    share = layout.tp * layout.pp * (layout.dp if layout.sharded else 1)
    need = 4 * machine.weights.itemsize * count_parameters(config) / share
    have = math.inf
    if machine.device.type == "cuda":
        have = torch.cuda.mem_get_info(machine.device)[1]
    elif hasattr(os, "sysconf"):
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / world.neighbours
    if need > have:
        raise ValueError(
            f"{describe_config(config)}, take {need / 2**30:,.0f} GiB a process to train with "
            f"AdamW, and this machine has {have / 2**30:,.0f}: choose a smaller --preset or "
            "--model, or more processes (torchrun, --tp, --pp, --shard-optimizer)"
        )
    return empty_worker(config, machine, world, compiled)


def load_worker(path: Path, machine: Machine, world: World) -> tuple[Worker, dict]:
    """The model of a checkpoint for an evaluation, its masks in place, and its info. A step folder
    is read in any layout, an exported file by one process."""
    if path.is_file():
        model, info = checkpoint.load_model(path, machine.device)
        return Worker([model.to(machine.weights)], world, machine.dtype), info
    info = world.raise_on_all_ranks(read_info, path)
    worker = empty_worker(FLMConfig.from_dict(info["config"]), machine, world)
    tensors = {"model": dict(worker.named)}
    world.raise_on_all_ranks(checkpoint.read_tensors, path, tensors)
    worker.set_masks(info["growth"], growth_mask(info["growth"], info["samples"]))
    return worker, info


def make_optimizer(worker: Worker, s: Settings) -> torch.optim.AdamW:
    """AdamW over muP's groups of parameters, with the paper's betas (section 2.4)."""
    groups = [muP.param_groups(part, s.lr, s.weight_decay) for part in worker.parts]
    return torch.optim.AdamW(itertools.chain(*groups), betas=(0.9, 0.95), eps=1e-8, fused=True)


class NonFinite(RuntimeError):
    """The loss or the norm of the gradient is not a finite number."""


def update(
    worker: Worker,
    optimizer: torch.optim.Optimizer,
    clip: float,
    lr: float,
    nats: float,
    count: float,
) -> tuple[float, float]:
    """Check, clip, AdamW. Returns (loss in nats per supervised token, norm of the gradient before
    clipping), both of the whole batch.

    nats: what worker.gradients returned on this rank; count: supervised tokens of the whole batch.
    Raises NonFinite on every rank, with the weights untouched, where either is not finite."""
    nats, square = worker.world.sum(nats, worker.grad_square())
    loss, norm = nats / count, math.sqrt(square) if square >= 0 else square  # NaN is not >= 0
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NonFinite(f"loss {loss}, gradient norm {norm}")
    parameters = [p for _, p in worker.named]
    total = torch.tensor(norm, dtype=parameters[0].dtype, device=worker.device)
    torch.nn.utils.clip_grads_with_norm_(parameters, clip, total)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm


# --------------------------------------------------------------------------------------------------
# 5. The folder of a run

LOCK_MARK = (
    "locked by train.py: "  # how the lock of a run begins; by this a folder is known as ours
)


def replace_file(path: Path, text: str):
    """Write a file whole or not at all."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        tmp.write_text(text)
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def read_run(folder) -> tuple[Settings, list[Stage]]:
    """Settings and stages of an existing run. Raises ValueError where there is none."""
    try:
        run = json.loads((Path(folder) / "config.json").read_text())
        return Settings(**run["settings"]), [Stage.from_dict(stage) for stage in run["stages"]]
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{folder} is not the folder of a run: no readable config.json in it ({error})"
        ) from error


def find_text(run: Path, given: str | None) -> tuple[str, str | None]:
    """(where the text of an existing run is, its digest when the run began). given: --data. Raises
    ValueError where the folder of before is gone."""
    config = json.loads((run / "config.json").read_text())
    text = given or config["corpus"]
    if text == config["corpus"] and not Path(text).exists():
        raise ValueError(
            f"the text of {run} was in {text}, and from here there is no such folder: say where it "
            "is with --data DIR"
        )
    return text, config.get("corpus_digest")


def write_run(
    folder: Path, s: Settings, stages: list[Stage], machine: Machine, corpus: data.Corpus
):
    """Write config.json: everything that the run can be repeated from."""
    content = {
        "settings": dataclasses.asdict(s) | {"data_changed": False},  # said once, not for ever
        "stages": [stage.to_dict() for stage in stages],
        "corpus": str(corpus.path),
        "corpus_digest": corpus.digest,
        "machine": machine.why,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    replace_file(folder / "config.json", json.dumps(content, indent=1) + "\n")


def has_checkpoint(folder) -> bool:
    """Whether there is a run in the folder that can be resumed."""
    try:
        return find_checkpoint(folder).is_dir()
    except ValueError:
        return False


def check_unused(folder: Path):
    """Raises ValueError where a new run must not write. A folder of ours without a checkpoint is
    fine: its run was killed in its first save, and nothing of it is lost."""
    if has_checkpoint(folder):
        where = shlex.quote(str(folder))
        raise ValueError(
            f"{folder} holds another run: go on with it (--resume {where}) or choose another "
            "folder (--out)"
        )
    lock = folder / "lock"
    ours = lock.is_file() and lock.read_text().startswith(LOCK_MARK)
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()) and not ours:
        raise ValueError(f"{folder} exists and is not a run: choose another folder (--out)")


def lock_folder(folder: Path, stack: contextlib.ExitStack):
    """Hold the lock of a run until `stack` closes; the system releases it however the process
    ends. Raises ValueError where another process holds it. Windows has no such lock."""
    lock = stack.enter_context(open(folder / "lock", "a+"))
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError:
        lock.seek(0)
        holder = lock.read().strip().removeprefix(LOCK_MARK) or "still starting"
        raise ValueError(
            f"{folder} is being written by another run ({holder}): wait for it, or choose another "
            "folder (--out)"
        ) from None
    lock.truncate(0)
    lock.write(f"{LOCK_MARK}process {os.getpid()} on {platform.node()}\n")
    lock.flush()


def claim_folder(s: Settings, stack: contextlib.ExitStack) -> str:
    """Choose, make and lock the folder of a new run; two runs that start at once get two folders.

    If the run ends before its first checkpoint, what was made is removed again, and nothing else.
    Raises ValueError for a folder that holds something, OSError where it cannot be made."""
    for n in itertools.count(1):
        folder = Path(s.out or f"runs/{s.preset}" + (f"-{n}" if n > 1 else ""))
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        if s.out:
            check_unused(folder)
        try:
            folder.mkdir(parents=True, exist_ok=bool(s.out))
            break
        except FileExistsError:  # a run of ours, perhaps one that began a moment ago
            continue
        except OSError as error:
            problem = f"cannot make the run's folder {folder}: {error.strerror}"
            raise OSError(f"{problem}; choose another (--out)") from error
    lock_folder(folder, stack)
    check_unused(folder)
    stack.callback(remove_unbegun, folder, made)
    return str(folder)


def remove_unbegun(folder: Path, made: list[Path]):
    """Remove what a run has made before its first checkpoint, if it has none."""
    if has_checkpoint(folder):
        return
    for name in ("config.json", "metrics.jsonl", "lock"):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty: somebody else's files
        for path in made:
            path.rmdir()


def cut_log(path: Path, step: int, stage: int):
    """Drop the log's lines on steps and growths after the checkpoint of that step and stage: the
    run writes them again. A last line that was cut off is dropped too."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            continue
        try:
            entry = json.loads(line)
            if entry["step"] <= step and entry.get("stage", 0) <= stage:
                kept.append(line)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number} is not a line of a log, which is JSON with a step "
                f"({error!r}): remove that line"
            ) from error
    replace_file(path, "".join(kept))


def default_corpus(tokenizer: str, tokenizer_file: str | None, config: FLMConfig) -> str:
    """The folder of the default corpus, Python's standard library, prepared on first use."""
    version = platform.python_version()
    folder = f"corpora/stdlib-{version}-{tokenizer}"
    if not Path(folder).exists():
        encoding = data.get_tokenizer(tokenizer, tokenizer_file)
        check_vocabulary(encoding, config, folder)
        print(f"preparing the default corpus, Python {version}'s own source, in {folder}")
        try:
            data.prepare({"stdlib": data.stdlib_files()}, folder, encoding)
        except (ValueError, OSError):
            if not Path(folder).exists():  # else another run was faster, with the same text
                raise
    return folder


def check_vocabulary(encoding, config: FLMConfig, folder: str):
    if encoding.n_vocab > config.vocab_size:
        raise ValueError(
            f"{folder} is made of {encoding.name} tokens, whose ids go up to "
            f"{encoding.n_vocab - 1}; the model's vocabulary ends at {config.vocab_size - 1}: add "
            f"--model vocab_size={-(-encoding.n_vocab // 128) * 128}"
        )


def open_corpus(
    folder: str | None,
    tokenizer: str,
    tokenizer_file: str | None,
    config: FLMConfig,
    world: World = World(),
) -> data.Corpus:
    """A prepared folder; None: the default corpus, which rank 0 prepares on first use. Raises
    ValueError where its ids exceed the model's vocabulary."""
    folder = folder or world.on_rank_0(default_corpus, tokenizer, tokenizer_file, config)
    corpus = world.raise_on_all_ranks(data.Corpus, folder, config.max_seq_len, tokenizer_file)
    check_vocabulary(corpus.tokenizer, config, folder)
    for split, n in corpus.teacher_left_out.items():
        if n:
            too_long = f"longer than {config.max_seq_len} tokens and left out"
            print(f"{folder}: {n:,} teacher items ({split}) are {too_long}")
    return corpus


def check_corpus(s: Settings, corpus: data.Corpus, digest: str | None):
    """Raises ValueError for a text that a run cannot use, or that is not the text of before."""
    if s.teacher_fraction and not corpus.n_rows("train", "teacher"):
        raise ValueError(
            f"--teacher-fraction {s.teacher_fraction}, but {corpus.path} has no teacher signal: "
            "prepare it with --teacher FILE.jsonl"
        )
    if digest not in (None, corpus.digest) and not s.data_changed:
        raise ValueError(
            f"the text in {corpus.path} is not the one that this run began with, so the batches "
            "would be other ones: give the folder of the same text (--data DIR), or say that you "
            "want another text (--data-changed)"
        )


def check_tokenizer(corpus: data.Corpus, name: str, where):
    if corpus.tokenizer.name != name:
        raise ValueError(
            f"{corpus.path} is made of {corpus.tokenizer.name} tokens, {where} was trained on "
            f"{name}: prepare the text with --tokenizer {name}"
        )


# --------------------------------------------------------------------------------------------------
# 6. The run


@dataclass
class RunState:
    """Where a run stands: what checkpoint.json keeps of it."""

    step: int = 0  # optimizer steps that are done
    samples: int = 0  # rows that are seen, with those of a checkpoint from --init-from
    stage: int = 0  # index into the stages
    growth: dict | None = None  # the record of the last growth


class Run:
    """A run in progress on this rank. `train` has its loop.

    A run is a function of its settings: a batch is a function of (seed, samples seen), a new
    weight of (seed, name, number of growths), a mask of the samples seen. So N steps are k steps, a
    stop and N - k steps more, bit for bit, on a CPU with as many threads, and on CUDA with
    --deterministic. Another layout computes the same up to rounding."""

    def __init__(
        self,
        settings: Settings,
        stages: list[Stage],
        world: World,
        machine: Machine,
        corpus: data.Corpus,
        state: RunState,
    ):
        self.settings, self.stages, self.world = settings, stages, world
        self.machine, self.corpus, self.state = machine, corpus, state
        self.folder = Path(settings.out)
        self.last_step = state.step + schedule.total_steps(stages, state.samples)
        self.worker = self.optimizer = None  # see build
        self.metrics = self.bar = None  # the open log and the progress bar; see train
        self.signals = []  # the numbers of those that this process has received
        self.saved, self.save_by = None, math.inf  # the newest checkpoint's step; time of the next
        self.save_is_due = self.warned = False

    @property
    def stage(self) -> Stage:
        return self.stages[self.state.stage]

    @property
    def checkpoint(self) -> Path:
        """The step folder of the state that the run is in."""
        return self.folder / f"step-{self.state.step:08d}"

    def build(self, path: Path | None = None):
        """The model of the present stage and its optimizer: from a checkpoint, or with initial
        weights. The model before it is freed first."""
        self.free()
        s, world, state = self.settings, self.world, self.state
        options = self.stage.config, self.machine, world, s.compile
        self.worker = world.raise_on_all_ranks(allocate, *options)
        self.optimizer = make_optimizer(self.worker, s)
        if path is None:
            self.worker.init_weights(s.seed)
        else:
            mine = self.worker.named, self.optimizer
            world.raise_on_all_ranks(checkpoint.read_training, *mine, path)
            self.worker.set_masks(state.growth, growth_mask(state.growth, state.samples))

    def free(self):
        """Free the model. Pipeline stages and their schedule refer to each other, so only
        gc.collect() frees them."""
        self.worker = self.optimizer = None
        gc.collect()
        if self.machine.device.type == "cuda":
            torch.cuda.empty_cache()

    # ----------------------------------------------------------------------------------------------
    # The step

    def train_step(self):
        """One optimizer step, all of it. Raises NonFinite before the update changes a weight, and
        parallel.Stopped between two micro-batches where a rank has received a signal."""
        s, state, world, B = self.settings, self.state, self.world, self.stage.batch_size
        start = now(self.machine.device)

        # This dp rank's rows, (B/dp, T) each; the number of targets in the whole batch.
        share = dict(
            rank=world.at("dp"), ranks=world.layout.dp, teacher_fraction=s.teacher_fraction
        )
        tokens, targets = self.corpus.batch(s.seed, state.samples, B, **share)
        counts_here = world.at("tp") == world.at("pp") == 0  # so that each row counts once
        (count,) = world.sum(counts_here * int((targets != IGNORE).sum()))

        # Forward and backward; check, clip, AdamW.
        micro = parallel.micro_rows(world.layout, B, s.micro_batch)
        nats = self.worker.gradients(tokens, targets, micro, max(1, count), self.stopped)
        lr = learning_rate(self.stages, state.samples + B, s.min_lr)
        loss, norm = update(self.worker, self.optimizer, s.clip, lr, nats, max(1, count))

        if self.is_sound(loss):  # the loss of the weights that the step began with
            self.confirm()
        flops = training_flops(self.stages, state.samples + B)
        flops -= training_flops(self.stages, state.samples)
        state.step, state.samples = state.step + 1, state.samples + B
        growth = state.growth
        if growth and growth["start"] + growth["ramp"] > state.samples - B:
            self.worker.set_masks(growth, growth_mask(growth, state.samples))

        seconds = now(self.machine.device) - start
        rate, used = B * self.corpus.seq_len / seconds, flops / seconds / self.machine.peak
        self.log(
            loss=loss,
            grad_norm=norm,
            lr=lr,
            supervised=int(count),
            tokens_per_s=rate,
            utilisation=used,
        )
        self.show(f"loss {loss:.3f}, {rate:,.0f} tok/s, MFU {used:.0%}", used)

    # ----------------------------------------------------------------------------------------------
    # Between two steps

    def show(self, text: str, used: float):
        """Move the bar on. Says once that a utilisation cannot be."""
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if used > 1 and not self.warned:
            peak = f"{self.machine.peak / 1e9:,.0f} GFLOP/s"
            self.bar.write(
                f"a utilisation of {used:.0%} cannot be: the peak of {peak} was measured while the "
                "machine was busy; the next evaluation measures it again"
            )
            self.warned = True

    def stopped(self) -> bool:
        """Whether any rank has received a signal; all ranks learn it here. They also learn whether
        a checkpoint is due by rank 0's clock (save_is_due)."""
        late = self.world.rank == 0 and time.monotonic() > self.save_by
        asked, late = self.world.sum(len(self.signals), late)
        self.save_is_due = late > 0
        return asked > 0

    def log(self, **values):
        """One line of metrics.jsonl."""
        where = {"step": self.state.step, "samples": self.state.samples}
        self.metrics.write(json.dumps(where | values) + "\n")
        self.metrics.flush()

    def held_out(self, worker: Worker) -> dict:
        """The held-out loss of this worker; see evaluate."""
        s = self.settings
        micro = parallel.micro_rows(self.world.layout, s.batch_size, s.micro_batch)
        return evaluate(worker, self.corpus, s.eval_rows, s.eval_batch or micro)

    def evaluate(self) -> dict:
        """Evaluate, log, print; measure the machine again. Raises NonFinite."""
        result = self.held_out(self.worker)
        if not math.isfinite(result["val_loss"]):
            raise NonFinite(f"held-out loss {result['val_loss']} after step {self.state.step}")
        self.log(**result)
        self.bar.write(f"step {self.state.step:>6}: {describe(result)}")
        self.machine = self.machine.measure_again(self.world)
        return result

    def save(self):
        """Write the checkpoint of this step, if there is none yet."""
        if self.saved != self.state.step:
            info = dataclasses.asdict(self.state) | {
                "config": self.stage.config.to_dict(),
                "tokenizer": self.corpus.tokenizer.name,
                "dtype": name_of(self.machine.weights),
                "layout": str(self.world.layout),
                "torch": torch.__version__,
            }
            tensors = checkpoint.training_tensors(self.worker.named, self.optimizer)
            checkpoint.write_checkpoint(self.checkpoint, tensors, info, self.world.control)
            self.saved = self.state.step
        self.save_by = time.monotonic() + 60 * self.settings.save_minutes

    def is_sound(self, loss: float) -> bool:
        """Whether weights with this loss are worth going back to: not if they are twice as bad as a
        blind guess. A run that diverges may go on for long before a number is not finite."""
        return loss < 2 * math.log(self.stage.config.vocab_size)

    def confirm(self):
        """Older checkpoints may go, if there is one of this step: its weights are sound."""
        if self.saved == self.state.step:
            keep = self.settings.keep
            self.world.on_rank_0(checkpoint.remove_old_checkpoints, self.folder, keep)

    def growth_is_due(self) -> bool:
        following = self.stages[self.state.stage + 1 :]
        return bool(following) and self.state.samples >= following[0].start

    def grow(self):
        """Go on to the next stage: save, grow the checkpoint on disk, load it. The larger model
        computes what the smaller one did; the log has the held-out loss of both, in the full
        precision of the weights."""
        self.save()
        before = self.loss_of(self.checkpoint)
        self.state.stage += 1
        config, grown = self.stage.config, self.folder / f"stage-{self.state.stage}.tmp"
        options = dict(seed=self.settings.seed, layers=self.stage.layers, ramp=self.stage.ramp)
        self.world.on_rank_0(shutil.rmtree, grown, ignore_errors=True)  # of a run that was killed
        info = self.world.on_rank_0(grow.grow_checkpoint, self.checkpoint, config, grown, **options)
        self.state.growth = info["growth"]
        after = self.loss_of(grown)
        self.build(grown)
        self.world.on_rank_0(shutil.rmtree, grown)
        record = {"grown": config.to_dict(), "loss_before": before, "loss_after": after}
        self.log(stage=self.state.stage, **record)
        self.bar.write(
            f"step {self.state.step:>6}: grown to {describe_config(config)}; held-out loss "
            f"{before:.4f} before, {after:.4f} after, {after - before:+.4f}"
        )

    def loss_of(self, path: Path) -> float:
        """The held-out loss of a checkpoint, in the full precision of its weights."""
        self.free()
        worker, _ = load_worker(path, self.machine.exact, self.world)
        return self.held_out(worker)["val_loss"]

    def other_layout(self) -> str | None:
        """The options of the layout that the next stage names, if it is neither that of this job
        nor that of this stage: then the job ends, and the next job begins the stage on it."""
        following = self.stages[self.state.stage + 1]
        wanted = {k: getattr(following, k) for k in ("dp", "tp", "pp") if getattr(following, k)}
        for place in (self.world.layout, self.stage):
            if self.world.size == 1 or all(getattr(place, k) == n for k, n in wanted.items()):
                return None
        return " ".join(f"--{k} {n}" for k, n in wanted.items())

    def sound_checkpoint(self) -> str | None:
        """The newest checkpoint whose next step had a sound loss. Newer ones get another name, and
        so are no checkpoints any more; nothing happens where none is sound."""
        log = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        losses = {line["step"] - 1: line["loss"] for line in log if "loss" in line}
        ruined = []
        for path in reversed(checkpoint.list_checkpoints(self.folder)):
            if self.is_sound(losses.get(checkpoint.step_of(path.name), math.inf)):
                for old in ruined:
                    names = (old.with_name(f"{old.name}.diverged-{n}") for n in itertools.count(1))
                    old.rename(next(name for name in names if not name.exists()))
                return str(path)
            ruined.append(path)
        return None

    def advice(self, error: NonFinite) -> str:
        """What to do about numbers that are not finite."""
        s, sound = self.settings, self.world.on_rank_0(self.sound_checkpoint)
        text = f"step {self.state.step + 1} stopped before the optimizer: {error}.\n"
        fresh = f"begin a new run with a smaller --lr (now {s.lr:g}), a longer --warmup (now "
        fresh += f"{s.warmup} samples) or --dtype float32"
        if not sound:
            return f"{text}No checkpoint is sound: {fresh}"
        lower = min(s.lr / 10, RECIPES[s.preset]["lr"])
        go_on = f"{resume_command(self.world, self.folder)} --lr {lower:g}"
        text += (
            f"The newest sound checkpoint is {sound}; newer ones are named .diverged now. Go on "
        )
        return f"{text}from it with a smaller learning rate:\n  {go_on}\nor {fresh}"


# --------------------------------------------------------------------------------------------------
# 7. The loop


def resumed_stages(s: Settings) -> list[Stage]:
    """The stages of the run in s.out, with what --resume may change: its end, and the peak of the
    learning rate."""
    old, stages = read_run(s.out)
    return schedule.extend_stages(stages, s.steps - old.steps, s.lr / old.lr)


def check_same_settings(world: World, s: Settings, resume: bool = False):
    """Raises ValueError, on every rank, where the ranks were started with different options."""
    everyone, differ = world.gather({**dataclasses.asdict(s), "resume": resume}), []
    for name in everyone[0]:
        ranks = {}  # value: the ranks that have it
        for rank, settings in enumerate(everyone):
            ranks.setdefault(repr(settings[name]), []).append(rank)
        found = [f"{value} on {len(who)} (rank {who[0]} ...)" for value, who in ranks.items()]
        if len(found) > 1:
            differ.append(f"{flag(name)}: {', '.join(found)}")
    refuse(differ, "the processes were started with different arguments:")


def read_state(source: str | None, resume: bool, stages: list[Stage]) -> tuple:
    """Where a run begins: (its RunState, the checkpoint, the checkpoint's tokenizer)."""
    if source is None:
        return RunState(), None, None
    path = find_checkpoint(source)
    info = read_info(path)
    state = RunState(samples=info["samples"], growth=info["growth"])
    if resume:
        state.step, state.stage = info["step"], info["stage"]
        if info["config"] != stages[state.stage].config.to_dict():
            place = f"stage {state.stage + 1} of {Path(source) / 'config.json'}"
            raise ValueError(f"{path} holds another model than {place}: one of them was edited")
    return state, path, info["tokenizer"]


def open_run(
    settings: Settings, resume: bool, world: World, stack: contextlib.ExitStack, run_class: type
) -> Run:
    """A run, ready for its first step: settings, layout, machine, folder, corpus, model. All that
    can be refused is refused here. `stack` keeps the lock and the log."""
    check_same_settings(world, settings, resume)
    s = settings
    if resume:
        stages = world.raise_on_all_ranks(resumed_stages, s)
    else:
        s, stages = world.raise_on_all_ranks(resolve, s)
    layout = plan_layout(s, stages, world.size)
    if s.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the only switch of cuBLAS
        torch.use_deterministic_algorithms(True)
    if s.threads:
        torch.set_num_threads(s.threads)
    machine = pick_machine(s.device, s.dtype, world)
    world = parallel.arrange(world, layout, machine.device)

    if resume:
        world.on_rank_0(lock_folder, Path(s.out), stack)
    out = s.out if resume else world.on_rank_0(claim_folder, s, stack)
    s = dataclasses.replace(s, dtype=name_of(machine.dtype), out=out)
    text, digest = world.on_rank_0(find_text, Path(out), s.data) if resume else (s.data, None)
    corpus = open_corpus(text, s.tokenizer, s.tokenizer_file, stages[-1].config, world)
    check_corpus(s, corpus, digest)
    source = out if resume else s.init_from
    state, path, tokenizer = world.raise_on_all_ranks(read_state, source, resume, stages)
    if path:
        check_tokenizer(corpus, tokenizer, path)

    run = run_class(s, stages, world, machine, corpus, state)
    run.build(path)
    if resume:
        run.saved = state.step
        world.on_rank_0(cut_log, run.folder / "metrics.jsonl", state.step, state.stage)
    world.on_rank_0(write_run, run.folder, s, stages, machine, corpus)
    print(describe_run(run, resume))
    log = run.folder / "metrics.jsonl" if world.rank == 0 else os.devnull
    run.metrics = stack.enter_context(open(log, "a"))
    run.save()  # a disk that cannot take a checkpoint shows now, not in an hour
    return run


def describe_run(run: Run, resume: bool) -> str:
    """What a run will do, as it is printed before the first step."""
    s, stages, samples, T = run.settings, run.stages, run.state.samples, run.corpus.seq_len
    total = training_flops(stages, stages[-1].end) - training_flops(stages, samples)
    rest = f" left, from sample {samples:,}" if samples else ""
    tokens = run.corpus.n_rows("train", "language") * T
    mup = "on" if stages[-1].config.mup else "off"
    lines = [
        f"{'going on with' if resume else 'training'} {run.folder}",
        f"  machine   {run.machine.why}",
        f"  layout    {run.world.layout}",
        f"  data      {run.corpus.path}: {tokens:,} training tokens ({run.corpus.tokenizer.name})",
    ]
    for i, stage in enumerate(stages, 1):
        place = f"samples {stage.start:,} to {stage.end:,}"
        lines.append(f"  stage {i}   {describe_config(stage.config)}: {place}")
    job = f"batches of {s.batch_size} x {T} tokens, learning rate {s.lr:g}, muP {mup}"
    lines.append(f"  job       {job}: {total / 1e12:.3g} TFLOP{rest}")
    return "\n".join(line for line in lines if run.world.size > 1 or "  layout " not in line)


def progress_bar(run: Run) -> tqdm:
    return tqdm(
        total=run.last_step,
        initial=run.state.step,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5,
        disable=run.world.rank > 0,
    )


SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # Windows has the first two


@contextlib.contextmanager
def receive_signals(received: list[int]):
    """Append the numbers of signals that ask a run to stop, in place of what they do otherwise; a
    second Ctrl-C stops at once. A signal that the caller ignores (nohup) stays ignored."""

    def receive(number, frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        with contextlib.suppress(ValueError):  # only the main thread may handle signals
            for number in before:
                signal.signal(number, receive)
        yield
    finally:
        with contextlib.suppress(ValueError):
            for number, handler in before.items():
                signal.signal(number, handler)


def train(
    settings: Settings,
    *,
    resume: bool = False,
    stop_at: int | None = None,
    world: World = World(),
    run_class: type[Run] = Run,
) -> dict:
    """Run the job that `settings` describe, or go on with it. Returns the last evaluation with
    "step", "samples", "folder", "signals" (the first one of each rank that received one: {rank:
    number}; empty at the end of a run) and "move" (the layout that the next stage asks for).

    stop_at: save and leave at that step, as a signal would. run_class: a subclass of Run. Every
    rank of `world` calls this with the same settings. Raises ValueError for settings that do not
    fit, OSError for a disk that does not take the run, NonFinite."""
    with contextlib.ExitStack() as stack:
        run = open_run(settings, resume, world, stack, run_class)
        state, s, result, move = run.state, run.settings, {}, None
        stack.enter_context(receive_signals(run.signals))
        run.bar = stack.enter_context(progress_bar(run))
        try:
            while state.step < run.last_step and state.step != stop_at and not run.stopped():
                if run.growth_is_due():
                    move = run.other_layout()
                    if move:
                        break
                    run.grow()
                run.train_step()
                # The log comes before the checkpoint. On --resume, newer lines of the log are
                # dropped and written again, so no evaluation is lost.
                last = state.step == run.last_step
                if last or state.step % s.eval_every == 0:
                    result = run.evaluate()
                if last or state.step % s.save_every == 0 or run.save_is_due:
                    run.save()
        except parallel.Stopped:
            pass  # half a step is thrown away; the weights are those from before it
        except NonFinite as error:
            raise NonFinite(run.advice(error)) from None
        except OSError as error:  # a full disk under the log, a closed terminal
            if run.world.size == 1:
                run.save()
            go_on = resume_command(run.world, run.folder)
            raise OSError(f"{error}\nsaved at step {run.saved}; to go on: {go_on}") from error
        run.save()
        finished = state.step == run.last_step
        if finished:
            run.confirm()
        signals = {} if finished else dict(enumerate(run.world.gather(run.signals[:1])))
    return result | {
        "step": state.step,
        "samples": state.samples,
        "folder": str(run.folder),
        "signals": {rank: numbers[0] for rank, numbers in signals.items() if numbers},
        "move": move,
    }


def program(world: World) -> str:
    return "python train.py" if world.size == 1 else "torchrun ... train.py"


def resume_command(world: World, folder) -> str:
    return f"{program(world)} --resume {shlex.quote(str(folder))}"


def resumed(folder: str, given: dict) -> Settings:
    """The settings of the run in `folder`, changed by what was given. Raises ValueError for what
    --resume may not change, and where the run is already at its end."""
    where = shlex.quote(str(folder))
    if (Path(folder) / "checkpoint.json").exists():
        parent = shlex.quote(str(Path(folder).parent))
        raise ValueError(f"{folder} is one checkpoint; --resume takes its run: --resume {parent}")
    s, _ = read_run(folder)
    wanted = dataclasses.replace(s, **given)
    changed = {k: getattr(wanted, k) for k in given if getattr(wanted, k) != getattr(s, k)}
    fixed = {field.name for field in FIELDS if not field.metadata.get("resume")} & set(changed)
    problems = [f"{flag(k)} {changed[k]}: this run has {getattr(s, k)}" for k in sorted(fixed)]
    refuse(problems, "a run fixes these, start a new one to change them:")
    info = read_info(find_checkpoint(folder))
    s = dataclasses.replace(s, out=str(folder), **changed)
    refuse(check_settings(s))
    if not schedule.total_steps(resumed_stages(s), info["samples"]):
        more = f"ask for more, as in --resume {where} --steps {2 * info['step']}"
        raise ValueError(f"{folder} has done its {info['step']} steps: {more}")
    for name in {"steps", "lr", "min_lr"} & set(changed):
        follows = "the learning rate follows the new schedule from here on"
        print(f"{flag(name)} is now {changed[name]}: {follows}")
    return s


# --------------------------------------------------------------------------------------------------
# 8. Other modes


def eval_only(source: str, given: dict, world: World = World()) -> dict:
    """Print the held-out loss of a checkpoint, and return it. A step folder in its run is evaluated
    like the run, a file with default settings; `given` has the options that differ."""
    path = world.raise_on_all_ranks(find_checkpoint, source)
    if path.is_file() and world.size > 1:
        raise ValueError(f"{path} holds weights for one process: give a run or a step folder")
    run = path.parent if path.is_dir() and (path.parent / "config.json").exists() else None
    s = read_run(run)[0] if run else Settings(batch_size=16)
    defaults = {field.name: field.default for field in FIELDS if field.name in LAYOUT}
    s = dataclasses.replace(s, **defaults | given)
    check_same_settings(world, s)
    refuse(check_settings(s))
    if s.threads:
        torch.set_num_threads(s.threads)
    machine = pick_machine(s.device, s.dtype, world)
    stages = []
    if path.is_dir():  # an evaluation fills up the rows that a layout needs, so any number fits
        config = FLMConfig.from_dict(world.raise_on_all_ranks(read_info, path)["config"])
        rows = (s.dp or world.size) * s.pp * parallel.PIPELINE_SCHEDULES[s.schedule]
        stages = [argparse.Namespace(config=config, batch_size=rows)]
    layout = plan_layout(dataclasses.replace(s, micro_batch=1), stages, world.size)
    world = parallel.arrange(world, layout, machine.device)
    worker, info = load_worker(path, machine, world)
    text = world.on_rank_0(find_text, run, s.data)[0] if run else s.data
    tokenizer = s.tokenizer if run or "tokenizer" in given else info["tokenizer"]
    corpus = open_corpus(text, tokenizer, s.tokenizer_file, worker.config, world)
    check_tokenizer(corpus, info["tokenizer"], path)
    micro = s.eval_batch or (1 if s.pp > 1 else s.micro_batch or s.batch_size)
    result = evaluate(worker, corpus, s.eval_rows, micro)
    print(f"{path}, on {corpus.path}, in {name_of(machine.dtype)}: {describe(result)}")
    return result


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
    batch, count, times = (rows[:, :-1], rows[:, 1:], micro), s.batch_size * T, []
    for _ in range(rounds + 2):
        forward, _ = timed(device, worker.forward, *batch)
        both, nats = timed(device, worker.gradients, *batch, count)
        optimize, _ = timed(device, update, worker, optimizer, s.clip, s.lr, nats, count)
        times.append((forward, both, optimize))
    return [statistics.median(column) for column in zip(*times[2:])]


def peak_memory(device: torch.device) -> float | None:
    """GiB that this process has used at most; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def benchmark(settings: Settings, world: World = World(), rounds: int = 5) -> dict:
    """Time training steps of the final model on random tokens. The backward pass is what forward
    and backward together take longer than a forward pass alone. Raises ValueError where the times
    make no sense, because the machine was busy with something else."""
    check_same_settings(world, settings)
    s, stages = world.raise_on_all_ranks(resolve, settings)
    config, layout = stages[-1].config, plan_layout(s, stages[-1:], world.size)
    if s.threads:
        torch.set_num_threads(s.threads)
    machine = pick_machine(s.device, s.dtype, world)
    world = parallel.arrange(world, layout, machine.device)
    worker = world.raise_on_all_ranks(allocate, config, machine, world, s.compile)
    worker.init_weights(s.seed)
    forward, both, optimize = time_steps(worker, make_optimizer(worker, s), s, rounds)
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
        "layout": str(layout),
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


# --------------------------------------------------------------------------------------------------
# 9. The command line


def add_option(group, field: dataclasses.Field):
    """The command line's word for one field of Settings."""
    text = field.metadata["help"]
    extra = {k: v for k, v in field.metadata.items() if k in ("metavar", "choices")}
    if field.type == "bool":
        extra["action"] = argparse.BooleanOptionalAction
    elif field.type.startswith("tuple"):
        extra["nargs"] = "+"
    else:
        kind = {"int": int, "float": float, "str": str}[field.type.split(" ")[0]]
        extra["type"] = kind
        if kind is not str:
            extra.setdefault("metavar", "N" if kind is int else "X")
        if field.default is not None:
            text += f" (default {field.default})"
        elif field.name in RECIPES["demo"] and field.name != "stages":
            text += f" (demo: {RECIPES['demo'][field.name]})"
    group.add_argument(flag(field.name), help=text, **extra)


def make_parser() -> argparse.ArgumentParser:
    """The options of train.py: every field of Settings, and the other modes."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="%(prog)s [options]",
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n" + __doc__.split("\n\n")[1],
        description="Train FLM-101B's model. With no arguments: a small one, on Python's own "
        "source, in a few minutes.",
    )
    for field in FIELDS:
        if "group" in field.metadata:
            group = parser.add_argument_group(field.metadata["group"])
        add_option(group, field)
    modes = parser.add_argument_group("something else").add_mutually_exclusive_group()
    modes.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    modes.add_argument(
        "--auto-resume",
        action="store_true",
        help="go on with the run in --out if there is one, else begin it: for torchrun "
        "--max-restarts and job queues",
    )
    modes.add_argument(
        "--eval-only",
        metavar="CHECKPOINT",
        help="print the held-out loss of a checkpoint (on --data, or on the text of its run)",
    )
    modes.add_argument(
        "--export",
        nargs=2,
        metavar=("CHECKPOINT", "FILE"),
        help="write a checkpoint's weights into one file",
    )
    modes.add_argument(
        "--benchmark", action="store_true", help="time training steps; prints one JSON object"
    )
    return parser


def main(argv=None, world: World = World(), run_class: type[Run] = Run) -> int:
    """The command line; returns the exit code."""
    given = vars(make_parser().parse_args(argv))
    mode = next((name for name in MODES if name in given), None)
    value = given.pop(mode, None)
    if mode in ("eval_only", "export", "benchmark"):
        used = {field.name for field in FIELDS if mode in field.metadata.get("modes", ())}
        extra = ", ".join(map(flag, sorted(set(given) - used)))
        refuse([f"{flag(mode)} makes no use of {extra}: leave it out"] if extra else [])
    if mode == "benchmark":
        print(json.dumps(benchmark(Settings(**given), world), indent=1))
        return 0
    if mode == "eval_only":
        eval_only(value, given, world)
        return 0
    if mode == "export":
        if world.size > 1:
            raise ValueError("--export needs one process: run it without torchrun")
        checkpoint.export_weights(*value)
        return 0
    if mode == "auto_resume":
        if "out" not in given:
            raise ValueError(
                "--auto-resume goes on with the run in --out if there is one: add --out DIR"
            )
        if world.on_rank_0(has_checkpoint, given["out"]):
            mode, value = "resume", given.pop("out")
    start, resume = time.perf_counter(), mode == "resume"
    if resume:
        s = world.raise_on_all_ranks(resumed, value, given)
    else:
        s = Settings(**given)
    result = train(s, resume=resume, world=world, run_class=run_class)
    return tell(result, s, world, time.perf_counter() - start)


def tell(result: dict, s: Settings, world: World, seconds: float) -> int:
    """Print what came out of a run and what to type next; returns the exit code."""
    step, signals, move = result["step"], result["signals"], result["move"]
    folder, go_on = shlex.quote(result["folder"]), resume_command(world, result["folder"])
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
    if move:
        print(
            f"saved at step {step}: the next stage lies on another layout; it begins when you "
            f"type, on as many processes:\n  {go_on} {move}"
        )
        return 0
    print(f"done in {seconds:.0f} s.")
    if world.rank == 0 and s.tp == s.pp == 1:
        print_sample(result["folder"], s)
    print(
        f"\nWhat next?\n"
        f'  let it continue your words      python sample.py {folder} --prompt "def "\n'
        f"  train it twice as long          {go_on} --steps {2 * step}\n"
        f"  train on your own text          python data.py prepare mine.txt --out corpora/mine\n"
        f"                                  {program(world)} --data corpora/mine"
    )
    return 0


def print_sample(folder: str, s: Settings):
    """What the model writes from the start of a document."""
    model, info = checkpoint.load_model(folder)
    room = min(400, model.config.max_seq_len - 1)
    if room:
        print("A sample, from the start of a new document:\n")
        options = dict(max_new_tokens=room, temperature=0.8, tokenizer_file=s.tokenizer_file)
        continue_texts(model, info, [""], stream=sys.stdout, **options)


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
    """main(world=world), with the errors that console.run does not know. An error that all ranks
    have is printed by rank 0 alone."""
    if world.rank > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        return main(world=world)
    except NonFinite as error:
        if world.rank == 0:
            print(f"train.py: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError):
        if world.rank == 0:
            raise
        return 2
    except RuntimeError as error:
        if world.size > 1 and re.search("Connection (closed|reset) by peer", str(error)):
            return 1  # another rank has failed, and says why
        text = advice_for(error)
        if not text:
            raise
        rank = f"rank {world.rank}: " if world.size > 1 else ""
        print(f"train.py: {rank}{text}", file=sys.stderr)
        return 2


def launch(main: Callable[..., int] = main):
    """Run main(world=...) as a program, in one process or as one of torchrun's. Errors are printed
    for people. Exit codes: those of console.run; 1 after NonFinite."""
    torchrun = dist.is_torchelastic_launched()
    world = World(rank=int(os.environ["RANK"]) if torchrun else 0)

    def start() -> int:
        nonlocal world
        if torchrun:
            world = parallel.connect()
        return call_main(main, world)

    try:
        console.run(start, "interrupted; what was saved before is whole")
    except SystemExit as end:
        if torchrun:
            parallel.leave(world, end.code)
        raise


if __name__ == "__main__":
    launch()
