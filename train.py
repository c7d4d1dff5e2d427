"""train.py - the main job: train FLM-101B's model on real text (FLM-101B, arXiv 2309.03852, sections 2.3, 2.4 and 3).

    python train.py                                 a small model on Python's own source, in a few minutes on a laptop
    python train.py --data corpora/mine             on text that data.py prepared
    python train.py --resume runs/demo              go on exactly where a run stopped
    python train.py --eval-only runs/demo           held-out loss of a checkpoint
    python train.py --benchmark                     how fast this machine trains, as one JSON object

Read it from top to bottom:

    1. Settings       every option, its default and why
    2. stages         the schedule: which model, which learning rate, as functions of the samples seen
    3. the machine    device, dtype, and the rate that utilisation is measured against
    4. evaluation     nats per token and bits per byte on held-out documents
    5. one step       forward, backward, the global checks, AdamW
    6. the run        folder, checkpoints, resume, growth, the loop
    7. benchmark, command line

Letters as in flm.py: B batch (rows of T tokens, the "samples" that everything is counted in), T sequence.
Whatever the paper says of training is here: AdamW (0.9, 0.95), decay 0.1, clip 1.0, cosine to 6e-6 / 4e-4 of the peak
after a warm-up in samples, bf16 arithmetic over fp32 weights. It has no dropout: the paper gives no rate.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
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
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import grow
import muP
import parallel
from checkpoint import (export_weights, find_checkpoint, load_model, pick_device, read_info, read_tensors,
                        write_checkpoint)
from flm import FLM, FLMConfig, IGNORE, forward_flops, growth_mask, parse_fields, preset
from sample import continue_texts
from schedule import RECIPES, learning_rate, plan_stages, training_flops


# ---------------------------------------------------------------------------------------------------------------------
# 1. Settings

def option(default, help: str, **extra):
    return dataclasses.field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True)
class Settings:
    """Every option of a run, as plain JSON values. None means: the preset's recipe decides (see RECIPES)."""
    # what to train
    preset: str = option("demo", "the model: demo, iq-demo, flm-proxy, flm-16b, flm-51b or flm-101b")
    model: tuple[str, ...] = option((), "change fields of the model, as in --model d_model=384 n_heads=6",
                                    metavar="FIELD=VALUE")
    mup: str = option("on", "the maximal update parametrization; off: the standard one", choices=("on", "off"))
    stages: str | None = option(None, "growth in the run: a JSON file of stages, paper, or none (none given: the recipe's)",
                                metavar="FILE")
    init_from: str | None = option(None, "begin a new run with a checkpoint's model, moments and place in the data",
                                   metavar="CHECKPOINT")
    seed: int = option(0, "of the initial weights and the order of the data")
    # on what
    data: str | None = option(None, "a folder from data.py prepare (none: Python's standard library)", metavar="DIR")
    tokenizer: str = option("bytes", "tokenizer of the default corpus; a prepared folder has its own",
                            choices=("bytes", "cl100k_base"))
    tokenizer_file: str | None = option(None, "cl100k_base.tiktoken, where it cannot be downloaded", metavar="PATH")
    teacher_fraction: float = option(0.0, "share of rows that carry FreeLM's teacher signal, 0 to 1")
    # how
    steps: int | None = option(None, "optimizer steps; the cosine ends with the last")
    batch_size: int | None = option(None, "rows per step")
    micro_batch: int | None = option(None, "rows per forward pass; gradients accumulate (none: all rows; with --pp: 1)")
    lr: float | None = option(None, "peak learning rate at the proxy's width; muP scales it per group")
    min_lr: float = option(0.015, "where the cosine ends, as a share of the peak (the paper's 6e-6 of 4e-4)")
    warmup: int | None = option(None, "warm-up of the learning rate in samples", metavar="SAMPLES")
    weight_decay: float = option(0.1, "decay, of matrices only")
    clip: float = option(1.0, "largest norm of the whole gradient")
    # watching and keeping
    out: str | None = option(None, "the run's folder (none: the first free one of runs/PRESET, runs/PRESET-2, ...)",
                             metavar="DIR")
    eval_every: int = option(100, "steps between evaluations")
    eval_rows: int = option(256, "held-out rows per evaluation, spread over the held-out documents")
    eval_batch: int | None = option(None, "rows per forward pass of an evaluation (none: that of training)")
    save_every: int = option(200, "steps between checkpoints")
    keep: int = option(2, "checkpoints kept, the newest ones")
    # on which machine
    device: str = option("auto", "auto, cpu or cuda")
    threads: int | None = option(None, "CPU threads (none: PyTorch's choice, one per core)")
    dtype: str = option("auto", "arithmetic: auto, bfloat16 (over fp32 weights), float32, float64",
                        choices=("auto", "bfloat16", "float32", "float64"))
    compile: bool = option(False, "torch.compile each block: a slow start, then faster steps")
    activation_checkpointing: bool = option(False, "compute activations again in the backward pass: less memory, a third more work")
    deterministic: bool = option(False, "bit-for-bit repeatable on CUDA too, slower")
    # on how many processes (started with torchrun; parallel.py)
    dp: int | None = option(None, "data parallelism: copies of the model, each with a share of the batch (none: all processes that "
                            "are left)")
    tp: int = option(1, "tensor parallelism: processes that share every matrix")
    pp: int = option(1, "pipeline parallelism: processes that share the layers")
    schedule: str = option("1F1B", "the pipeline's order of work", choices=tuple(parallel.SCHEDULES))
    sequence_parallel: bool = option(False, "cut the sequence, too, among the --tp processes")
    shard_optimizer: bool = option(False, "cut weights, gradients and moments among the --dp processes (always so with --tp or --pp)")


# What may change when a run is resumed; everything else is fixed by the run.
LAYOUT = {"dp", "tp", "pp", "schedule", "sequence_parallel", "shard_optimizer", "activation_checkpointing"}
CHANGEABLE = {"steps", "lr", "min_lr", "clip", "data", "tokenizer_file", "eval_every", "eval_rows", "eval_batch", "save_every",
              "keep", "device", "threads", "compile", "deterministic", "micro_batch"} | LAYOUT

RECIPES["flm-proxy"] = RECIPES["flm-16b"]        # what the paper's search on the proxy was for


ARITHMETIC = {"device", "threads", "dtype"}
USABLE = {                                       # the options that the other modes of train.py read
    "eval_only": ARITHMETIC | {"data", "tokenizer", "tokenizer_file", "eval_rows", "eval_batch"} | LAYOUT,
    "benchmark": ARITHMETIC | {"preset", "model", "mup", "seed", "batch_size", "micro_batch", "compile"} | LAYOUT,
    "export": set(),
}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def violations(s: Settings) -> list[str]:
    """Every option out of its range."""
    problems = []

    def limits(names, low, high, want):
        for name in names:
            value = getattr(s, name)
            if value is not None and not low <= value <= high:
                problems.append(f"{flag(name)} {value}: must be {want}")

    limits(("steps", "batch_size", "micro_batch", "eval_every", "eval_rows", "eval_batch", "save_every", "keep",
            "threads", "dp", "tp", "pp"), 1, math.inf, "at least 1")
    limits(("lr", "clip"), sys.float_info.min, sys.float_info.max, "a number above 0")
    limits(("weight_decay", "warmup"), 0, sys.float_info.max, "0 or above")
    limits(("min_lr", "teacher_fraction"), 0, 1, "between 0 and 1")
    return problems


def resolve(settings: Settings) -> tuple[Settings, list[dict]]:
    """Fill in the recipe, plan the stages, check everything; the last stage's "config" is the final model's.
    Raises ValueError with all violations."""
    config, seen = preset(settings.preset), 0
    recipe = {k: v for k, v in RECIPES[settings.preset].items() if k != "stages" and getattr(settings, k) is None}
    s = dataclasses.replace(settings, **recipe)
    if settings.warmup is None:                  # the recipe's is for its own number of steps
        s = dataclasses.replace(s, warmup=min(s.warmup, max(0, s.steps * s.batch_size // 12)))
    changes, problems = parse_fields(s.model)
    problems = [f"--model {problem}" for problem in problems]
    try:
        config = config.replace(**{"mup": s.mup == "on", **changes})
        if s.init_from:
            source = find_checkpoint(s.init_from)
            if source.is_file():
                raise ValueError(f"--init-from {source} holds weights only, and not the moments: give a run or a step folder")
            info = read_info(source)
            config, seen = FLMConfig.from_dict(info["config"]), info["samples"]
            if s.model:
                problems.append(f"--model {' '.join(s.model)}: --init-from brings its own model (grow.py apply grows it)")
    except ValueError as error:
        problems.append(str(error))

    problems += violations(s)
    if problems:
        raise ValueError("these settings do not fit together:\n  " + "\n  ".join(problems))
    stages = plan_stages(s, config, seen)
    first = stages[0]["config"].to_dict()
    if s.init_from and first != config.to_dict():
        raise ValueError(f"--init-from {s.init_from} holds another model than the first stage's: " + ", ".join(
            f"{k} {v}, not {first[k]}" for k, v in config.to_dict().items() if v != first[k]))
    return s, stages


def plan_layout(s: Settings, stages: list[dict], processes: int) -> parallel.Layout:
    """The layout of these settings on so many processes. Raises ValueError with everything that does not fit it, in any stage."""
    dp = s.dp or max(1, processes // (s.tp * s.pp))
    layout = parallel.Layout(dp, s.tp, s.pp, s.sequence_parallel, s.shard_optimizer, s.schedule, s.activation_checkpointing)
    problems = []
    if layout.size != processes:
        given = f"dp {dp} x tp {s.tp} x pp {s.pp} = {layout.size} processes"
        problems.append(f"{given}, torchrun started {processes}" if processes > 1 else f"{given}, this is one: start them with torchrun "
                        f"--standalone --nproc-per-node {layout.size} train.py ..., or take one: --dp 1 --tp 1 --pp 1")
    for i, stage in enumerate(stages):
        found = parallel.check(layout, stage["config"], stage["batch_size"], s.micro_batch, s.compile)
        problems += [f"stage {i + 1}: {problem}" if len(stages) > 1 else problem for problem in found]
    if problems:
        raise ValueError("this layout does not fit:\n  " + "\n  ".join(dict.fromkeys(problems)))
    return layout


# ---------------------------------------------------------------------------------------------------------------------
# 2. Stages. Everything is counted in samples: rows of T tokens, whatever the batch size.


# ---------------------------------------------------------------------------------------------------------------------
# 3. The machine

# Dense bf16 peaks in FLOP/s, from the makers' data sheets; the longest name that a card's own name contains counts.
PEAKS = {"A100": 312e12, "A800": 312e12, "H100": 989e12, "H800": 989e12, "H200": 989e12, "H100 PCIe": 756e12,
         "B200": 2250e12, "A10": 125e12, "A40": 150e12, "A6000": 155e12, "L4": 121e12, "L40": 181e12, "L40S": 362e12,
         "RTX 4090": 165e12, "RTX 3090": 71e12}


def matmul_rate(device: torch.device, dtype: torch.dtype, n: int = 2048) -> float:
    """FLOP/s of the best of a few n x n matrix products, or of smaller ones where those take long already (a CPU that has to
    emulate bf16)."""
    size = min(n, 256)
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        best = math.inf
        for _ in range(6):
            start = now(device)
            a @ b
            best = min(best, now(device) - start)
        if size >= n or best > 0.1:
            return 2 * size ** 3 / best
        size = min(n, 2 * size)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Machine:
    device: torch.device
    dtype: torch.dtype        # of the arithmetic
    peak: float               # FLOP/s that utilisation is measured against
    why: str                  # one line for a person

    @property
    def weights(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.dtype == torch.bfloat16 else contextlib.nullcontext()


def pick_machine(device: str, dtype: str) -> Machine:
    """Choose, and say why. bf16 has fp32's range with fewer digits, so it needs no loss scaling (section 3 of the paper)."""
    device = pick_device(device)
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        if dtype == "auto":
            dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
        known = max((name for name in PEAKS if name in card), key=len, default=None) if dtype == "bfloat16" else None
        kind = getattr(torch, dtype)
        peak = PEAKS[known] if known else matmul_rate(device, kind, 4096)
        source = "its dense peak" if known else "a matrix product measured just now"
        return Machine(device, kind, peak, f"{card}, {dtype}; utilisation is against {peak / 1e12:.0f} TFLOP/s, {source}")
    rates = {name: matmul_rate(device, getattr(torch, name)) for name in ("float32", "bfloat16") if dtype in ("auto", name)}
    reason = ""
    if dtype == "auto":
        faster = rates["bfloat16"] / rates["float32"]
        dtype = "bfloat16" if faster > 1.3 else "float32"
        reason = f" (a bf16 matrix product runs at {faster:.1f} times the rate of an fp32 one)"
    peak = rates.get(dtype) or matmul_rate(device, getattr(torch, dtype), 1024)
    return Machine(device, getattr(torch, dtype), peak, f"cpu with {torch.get_num_threads()} threads, {dtype}{reason}; "
                   f"utilisation is against {peak / 1e9:.0f} GFLOP/s, a matrix product measured just now")


# ---------------------------------------------------------------------------------------------------------------------
# 4. Evaluation

def evaluate(worker: parallel.Worker, corpus: data.Corpus, rows: int, micro: int) -> dict:
    """Held-out loss. {"val_loss": nats per token, "val_bpb": bits per byte of text, "val_tokens"}, and, where the corpus
    has a teacher signal, {"teacher_loss": nats per label token, "teacher_accuracy": share of labels whose last token, read
    as a choice between the two emoji, is right; a tie counts half}.

    Bits per byte divide by the bytes that the predicted tokens stand for, so tokenizers can be compared. Every process takes
    part: the dp ranks share the rows."""
    lengths, world, result = torch.from_numpy(data.byte_lengths(corpus.tokenizer)), worker.world, {}
    angry, devil = (corpus.tokenizer.encode_ordinary(data.EMOJI[k])[-1] for k in (1, 0))

    def labels_right(logits, y):                 # the other emoji in the label's place would cost more
        wide, y = (logits if logits.dtype == torch.float64 else logits.float()).flatten(0, 1), y.flatten()
        cost, swapped = (parallel.local(torch.nn.functional.cross_entropy(wide, target, ignore_index=IGNORE, reduction="none"))
                         for target in (y, torch.where(y == angry, devil, torch.where(y == devil, angry, y))))
        won = (cost < swapped) + 0.5 * (cost == swapped)         # a tie is a coin: bf16 logits that differ little are often equal
        return torch.stack([cost.sum(), (won * ((y == angry) | (y == devil))).sum()])

    for signal_name in ("language", "teacher"):
        n_rows = corpus.n_rows("val", signal_name)
        if n_rows == 0:
            continue
        n = min(rows, n_rows)
        share = -(-n // world.layout.dp)         # rows of a dp rank; the last ones of the last rank may be empty
        mine = [corpus.rows("val", signal_name, j * n_rows // n, 1) for j in range(world.at("dp") * share, min((world.at("dp") + 1) * share, n))]
        size = min(micro, share)
        blank = torch.zeros(1, corpus.seq_len, dtype=torch.long)
        mine += [(blank, blank + IGNORE)] * (parallel.rows_needed(world.layout, share, size) - len(mine))
        tokens, targets = (torch.cat(part) for part in zip(*mine))                       # (b, T) each
        found = worker.run(tokens, targets, size, score=None if signal_name == "language" else labels_right)
        known = targets[targets != IGNORE]
        once = world.at("tp") == world.at("pp") == 0
        values = found.flatten().tolist() if world.last and world.at("tp") == 0 else []
        nats, right = (values + [0.0, 0.0])[:2]
        nats, right, count, length, labels = world.sum(nats, right, *(once * int(v) for v in (
            len(known), lengths[known].sum(), ((known == angry) | (known == devil)).sum())))
        if signal_name == "language":
            result |= {"val_loss": nats / count, "val_bpb": nats / math.log(2) / length, "val_tokens": int(count)}
        else:
            result |= {"teacher_loss": nats / count, "teacher_accuracy": right / labels, "teacher_labels": int(labels)}
    return result


def describe(result: dict) -> str:
    text = f"held-out loss {result['val_loss']:.4f} nats per token, {result['val_bpb']:.4f} bits per byte"
    if "teacher_loss" in result:
        text += (f"; teacher {result['teacher_loss']:.4f} nats per label token, "
                 f"{result['teacher_accuracy']:.1%} of {result['teacher_labels']} labels right")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# 5. One step

class NonFinite(RuntimeError):
    """The loss or the gradient's norm is not a finite number; the weights are those from before the step."""


def update(worker: parallel.Worker, optimizer: torch.optim.Optimizer, clip: float, lr: float, nats: float, count: float) -> tuple[float, float]:
    """Check, clip, set the learning rate, step; returns the whole batch's loss in nats per supervised token and the norm of
    the whole gradient before clipping. Raises NonFinite, with the weights untouched, on every process, where either is not finite.

    nats: worker.gradients's, of this process; count: the whole batch's supervised tokens."""
    nats, square = worker.world.sum(nats, worker.grad_square())
    loss, norm = nats / count, math.sqrt(square) if square >= 0 else square              # NaN compares with nothing
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NonFinite(f"loss {loss}, gradient norm {norm}")
    torch.nn.utils.clip_grads_with_norm_([p for _, p in worker.named], clip, torch.tensor(norm, dtype=worker.named[0][1].dtype, device=worker.device))
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm


def allocate(config: FLMConfig, machine: Machine, world=parallel.World(), compiled: bool = False) -> parallel.Worker:
    """This process's share of an empty model. Raises ValueError where weights, gradients and AdamW's two moments cannot fit."""
    with torch.device("meta"):
        model = FLM(config)
    layout = world.layout
    share = layout.tp * layout.pp * (layout.dp if layout.sharded else 1)
    need = 4 * machine.weights.itemsize * sum(p.numel() for p in model.parameters()) / share / 2 ** 30
    if machine.device.type == "cuda":
        have = torch.cuda.mem_get_info(machine.device)[1] / 2 ** 30
    elif hasattr(os, "sysconf"):
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 ** 30 / world.neighbours
    else:
        have = math.inf
    if need > have:
        raise ValueError(f"{describe_config(config)}, take {need:,.0f} GiB a process to train with AdamW, this machine has {have:,.0f}: "
                         f"choose a smaller --preset or --model, or more processes (torchrun, --tp, --pp, --shard-optimizer)")
    return parallel.Worker(parallel.build(config, world, machine.device, machine.weights, machine.dtype, compiled), world, machine.dtype)


def make_optimizer(worker: parallel.Worker, s: Settings) -> torch.optim.AdamW:
    groups = [group for part in worker.parts for group in muP.param_groups(part, s.lr, s.weight_decay)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)


def tensors_of(worker: parallel.Worker, optimizer: torch.optim.AdamW) -> dict[str, dict[str, torch.Tensor]]:
    """What a checkpoint holds of this process: {"model": {"layers.0.attn.o.weight": tensor, ...}, "optimizer":
    {"layers.0.attn.o.weight.exp_avg": tensor, ...}}. AdamW's state that is not there yet is made (zeros, as the first step would
    make it), so that a checkpoint can be read into it."""
    tensors = {"model": {}, "optimizer": {}}
    for name, p in worker.named:
        state = optimizer.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        if name not in tensors["model"]:         # both ends of a tied embedding may lie here: one is enough
            tensors["model"][name] = p
            tensors["optimizer"] |= {f"{name}.{key}": value for key, value in state.items()}
    return tensors


def read_into(worker: parallel.Worker, optimizer: torch.optim.AdamW, path: Path):
    """Read a checkpoint of any layout into a worker of any other; moments and all."""
    tensors = tensors_of(worker, optimizer)
    read_tensors(path, tensors)
    with torch.no_grad():
        for name, p in worker.named:
            if (first := tensors["model"][name]) is not p:
                p.copy_(first)
                for key, value in optimizer.state[p].items():
                    value.copy_(tensors["optimizer"][f"{name}.{key}"])


# ---------------------------------------------------------------------------------------------------------------------
# 6. The run

def open_corpus(folder: str | None, tokenizer: str, tokenizer_file: str | None, config: FLMConfig) -> data.Corpus:
    """The prepared folder, or the default corpus, prepared on first use. Raises ValueError where its ids exceed the model's
    vocabulary."""
    def check(encoding):
        if encoding.n_vocab > config.vocab_size:
            raise ValueError(f"{folder} is made of {encoding.name} tokens, whose ids go up to {encoding.n_vocab - 1}; the "
                             f"model's vocabulary ends at {config.vocab_size - 1}: add --model vocab_size="
                             f"{-(-encoding.n_vocab // 128) * 128}")

    if folder is None:
        folder = f"corpora/stdlib-{platform.python_version()}-{tokenizer}"
        if not Path(folder).exists():
            check(encoding := data.get_tokenizer(tokenizer, tokenizer_file))
            print(f"preparing the default corpus, Python {platform.python_version()}'s own source, in {folder}")
            data.prepare({"stdlib": data.stdlib_files()}, folder, encoding)
    corpus = data.Corpus(folder, config.max_seq_len, tokenizer_file)
    check(corpus.tokenizer)
    for split, left_out in corpus.teacher_left_out.items():
        if left_out:
            print(f"{folder}: {left_out:,} teacher items ({split}) are longer than {config.max_seq_len} tokens and left out")
    return corpus


def same_tokens(corpus: data.Corpus, info: dict, where):
    if corpus.tokenizer.name != info["tokenizer"]:
        raise ValueError(f"{corpus.path} is made of {corpus.tokenizer.name} tokens, {where} was trained on {info['tokenizer']}: "
                         f"prepare the text with --tokenizer {info['tokenizer']}")


def run_folder(s: Settings) -> Path:
    """Where a new run goes. Raises ValueError for a folder that holds something."""
    if s.out is None:
        base, n = Path("runs") / s.preset, 1
        while (folder := base if n == 1 else base.with_name(f"{s.preset}-{n}")).exists():
            n += 1
        return folder
    folder = Path(s.out)
    saved = any(path.suffix != ".tmp" for path in folder.glob("step-*"))
    if (folder / "config.json").exists() and not saved:
        return folder                            # killed in its first save: there is nothing to lose
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds another run: go on with it (--resume {shlex.quote(str(folder))}) or choose another "
                         f"folder (--out)")
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not a run: choose another folder (--out)")
    return folder


def replace_file(path: Path, text: str):
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text)
    tmp.replace(path)


def read_run(folder) -> tuple[Settings, list[dict]]:
    """Settings and stages of an existing run. Raises ValueError where there is none."""
    try:
        run = json.loads((Path(folder) / "config.json").read_text())
        s = Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in run["settings"].items()})
        return s, [{**stage, "config": FLMConfig.from_dict(stage["config"])} for stage in run["stages"]]
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder} is not the folder of a run: no readable config.json in it ({error})") from error


def recorded_corpus(folder) -> str | None:
    """Where the text of an existing run lay: the default corpus is that of the Python that began it."""
    return json.loads((Path(folder) / "config.json").read_text()).get("corpus")


def write_run(folder: Path, s: Settings, stages: list[dict], machine: Machine, corpus: data.Corpus):
    replace_file(folder / "config.json", json.dumps({
        "settings": dataclasses.asdict(s), "stages": [{**stage, "config": stage["config"].to_dict()} for stage in stages],
        "corpus": str(corpus.path),
        "machine": machine.why, "torch": torch.__version__, "python": platform.python_version()}, indent=1) + "\n")


def cut_log(path: Path, step: int, stage: int):
    """Drop what the log says of steps and growths after the checkpoint of that step and stage: the run writes them again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            if line.endswith("\n"):              # a killed process may have left half a line
                entries.append((line, json.loads(line)))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}): remove that line") from error
    replace_file(path, "".join(line for line, entry in entries if entry["step"] <= step and entry.get("stage", 0) <= stage))


@contextlib.contextmanager
def stop_on_signal():
    """Ctrl-C and SIGTERM ask the loop to stop after the current step; a second Ctrl-C stops at once."""
    asked = []

    def ask(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:                           # not in the main thread: whoever called handles signals
        old = {}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def resumed_stages(s: Settings) -> list[dict]:
    """The stages of the run in s.out, with what may change on resume: where it ends, and the peak of the learning rate."""
    old, stages = read_run(s.out)
    stages[-1]["end"] += (s.steps - old.steps) * s.batch_size
    for stage in stages:
        stage["lr"] = stage["lr"] and stage["lr"] * (s.lr / old.lr)
    return stages


@contextlib.contextmanager
def sole_writer(folder: Path):
    """Hold the run's lock, which the system lets go of however the process ends. Raises ValueError where another holds it."""
    try:
        import fcntl                             # not on Windows, where nobody is kept out
    except ImportError:
        yield
        return
    with open(folder / "lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise ValueError(f"{folder} is being written by another run ({lock.read().strip() or 'still starting'}): wait for it, or choose "
                             f"another folder (--out)") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}\n")
        lock.flush()
        yield


def same_arguments(world: parallel.World, s: Settings, resume: bool):
    """Raises ValueError, on every process, where they were not all started with the same arguments."""
    differ, everyone = [], world.gather({**dataclasses.asdict(s), "resume": resume})
    for k in everyone[0]:
        ranks = {}                               # value: who has it
        for rank, theirs in enumerate(everyone):
            ranks.setdefault(repr(theirs[k]), []).append(rank)
        if len(ranks) > 1:
            differ.append(f"{flag(k)}: " + ", ".join(f"{value} on {len(who)} (rank {who[0]}{' ...' if len(who) > 1 else ''})"
                                                     for value, who in ranks.items()))
    if differ:
        raise ValueError("the processes were started with different arguments:\n  " + "\n  ".join(differ))


def agree_on_machine(world: parallel.World, device: str, dtype: str) -> Machine:
    """Rank 0 chooses the arithmetic; utilisation is against all processes' rates together."""
    if world.control is None:
        return pick_machine(device, dtype)

    def mine(dtype):
        machine, cards = pick_machine(device, dtype), torch.cuda.device_count()
        if machine.device.type == "cuda" and (machine.device.index is not None or world.neighbours > cards):
            raise ValueError(f"--device {device}: {world.neighbours} processes on this machine take a GPU each, and it has {cards}: ask torchrun for "
                             f"--nproc-per-node {cards} with --device cuda, or give --device cpu")
        return machine

    dtype = world.told(world.together(lambda: str(mine(dtype).dtype).removeprefix("torch.") if world.rank == 0 else None))
    machine = world.together(mine, dtype)
    peak, n = world.sum(machine.peak, 1)
    return dataclasses.replace(machine, peak=peak, why=f"{n:.0f} processes, rank 0 on {machine.why}")


def train(settings: Settings, *, resume: bool = False, stop_at: int | None = None, world=parallel.World()) -> dict:
    """Run, or with `resume` go on with, the job that `settings` describe; returns the last evaluation with "step", "folder"
    and "stopped" (the signal's number, or None). `stop_at` saves and leaves at that step, as a signal would. Every process
    of `world` calls this with the same settings.

    A run is a function of its settings: batches of (seed, samples seen), new weights of (seed, name, growths), masks of
    the samples seen. So N steps straight are k steps, a stop and N-k more, bit for bit on a CPU with as many threads, and on
    CUDA with --deterministic. Another layout computes the same up to rounding, in bf16 up to bf16's."""
    same_arguments(world, settings, resume)
    s, stages = (settings, world.together(resumed_stages, settings)) if resume else world.together(resolve, settings)
    processes = len(world.gather(None))
    layout = plan_layout(s, stages, processes)
    folder = Path(s.out) if resume else world.told(world.together(run_folder, s))
    if s.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")      # cuBLAS reads no other switch
        torch.use_deterministic_algorithms(True)
    if s.threads:
        torch.set_num_threads(s.threads)
    machine = agree_on_machine(world, s.device, s.dtype)
    world = parallel.arrange(world, layout, machine.device)
    s = dataclasses.replace(s, dtype=str(machine.dtype).removeprefix("torch."), out=str(folder))
    text = s.data or (recorded_corpus(folder) if resume else None)
    opened = lambda: open_corpus(text, s.tokenizer, s.tokenizer_file, stages[-1]["config"])
    corpus = world.together(opened if world.rank == 0 else bool)     # rank 0 first: it may have to prepare the default corpus
    corpus = world.together(bool if world.rank == 0 else opened) or corpus
    if s.teacher_fraction and not corpus.n_rows("train", "teacher"):
        raise ValueError(f"--teacher-fraction {s.teacher_fraction}, but {corpus.path} has no teacher signal: prepare it with "
                         f"--teacher FILE.jsonl")

    # Where the run stands: steps and samples done, the stage, the record of the last growth.
    source = world.together(find_checkpoint, folder if resume else s.init_from) if resume or s.init_from else None
    info = world.together(read_info, source) if source else {"samples": 0, "growth": None, "tokenizer": corpus.tokenizer.name}
    same_tokens(corpus, info, source)
    step, k = (info["step"], info["stage"]) if resume else (0, 0)
    samples, growth = info["samples"], info["growth"]
    if resume and info["config"] != stages[k]["config"].to_dict():
        raise ValueError(f"{source} holds another model than stage {k + 1} of {folder / 'config.json'}: one of them was edited")
    T = corpus.seq_len

    def equip(config, path, arithmetic=machine):
        """A worker with its optimizer, filled from a checkpoint, or with initial weights."""
        worker = world.together(allocate, config, arithmetic, world, s.compile)
        optimizer = make_optimizer(worker, s)
        if path is None:
            worker.init_weights(s.seed)
        else:
            world.together(read_into, worker, optimizer, path)
            worker.set_masks(growth, growth_mask(growth, samples))
        return worker, optimizer

    def save():
        write_checkpoint(folder / f"step-{step:08d}", tensors_of(worker, optimizer), {
            "step": step, "samples": samples, "stage": k, "config": worker.config.to_dict(), "growth": growth,
            "tokenizer": corpus.tokenizer.name, "dtype": str(machine.weights).removeprefix("torch."), "layout": str(layout),
            "torch": torch.__version__}, world.control)
        if world.rank == 0:
            old = sorted(path for path in folder.glob("step-*") if path.suffix != ".tmp")[:-s.keep]
            for path in old + list(folder.glob("step-*.tmp")):
                shutil.rmtree(path, ignore_errors=True)
        return step

    def note(**values):
        log.write(json.dumps({"step": step, "samples": samples, **values}) + "\n")
        log.flush()

    def held_out(worker):
        return evaluate(worker, corpus, s.eval_rows, s.eval_batch or parallel.micro_rows(layout, s.batch_size, s.micro_batch))

    def drop():
        """Let go of the worker before there is another: a pipeline's schedules and their stages hold each other."""
        nonlocal worker, optimizer
        worker = optimizer = None
        gc.collect()
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()

    def grown():
        """The next stage's model, which computes what this one does; its held-out loss before and after, both in full precision."""
        nonlocal worker, optimizer, growth
        stage, exact = stages[k], dataclasses.replace(machine, dtype=machine.weights)
        if world.control is None:
            before = held_out(parallel.Worker(worker.parts, world, exact.dtype))
            model, optimizer, growth = grow.grow(
                worker.parts[0], stage["config"], optimizer, seed=s.seed, growths=(growth or {"growths": 0})["growths"] + 1,
                start=samples, ramp=stage["ramp"], layers=stage["layers"], moments=stage["moments"])
            parallel.dress(model, layout, s.compile)
            worker = parallel.Worker([model], world, machine.dtype)
            worker.set_masks(growth, growth_mask(growth, samples))
            return before, held_out(parallel.Worker(worker.parts, world, exact.dtype))
        # Several processes: over the disk, one layer at a time, as the paper's own growth between its stages had to be.
        path, out, config = folder / f"step-{step:08d}", folder / "grown", worker.config
        if exact != machine:
            drop()
            worker, optimizer = equip(config, path, exact)
        before = held_out(worker)
        drop()
        if world.rank == 0:
            shutil.rmtree(out, ignore_errors=True)
        world.together(lambda: world.rank == 0 and grow.grow_checkpoint(path, stage["config"], out, seed=s.seed, layers=stage["layers"],
                                                              ramp=stage["ramp"], moments=stage["moments"]))
        growth = world.together(read_info, out)["growth"]
        worker, optimizer = equip(stage["config"], out, exact)
        after = held_out(worker)
        if exact != machine:
            drop()
            worker, optimizer = equip(stage["config"], out)
        world.together(lambda: world.rank == 0 and shutil.rmtree(out))
        return before, after

    worker, optimizer = equip(stages[k]["config"], source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the run's folder {folder}: {error.strerror}; choose another (--out)") from error
    with contextlib.ExitStack() as stack:
        world.together(lambda: world.rank == 0 and stack.enter_context(sole_writer(folder)))
        if resume:
            world.together(lambda: world.rank == 0 and (cut_log(folder / "metrics.jsonl", step, k), write_run(folder, s, stages, machine, corpus)))
        print(describe_run(folder, s, stages, machine, layout, corpus, samples, resume))
        result, saved, move = {}, step, None
        if not resume:
            try:
                world.together(lambda: world.rank == 0 and write_run(folder, s, stages, machine, corpus))
                save()                           # a disk that cannot take a checkpoint shows now, not in an hour
            except BaseException:                # there is no run yet: nothing that could be resumed is left behind
                shutil.rmtree(folder, ignore_errors=True)
                raise
        todo = step + sum(-(-(stage["end"] - max(stage["start"], samples)) // stage["batch_size"]) for stage in stages[k:])
        log = stack.enter_context(open(folder / "metrics.jsonl" if world.rank == 0 else os.devnull, "a"))
        asked = stack.enter_context(stop_on_signal())
        bar = stack.enter_context(tqdm(total=todo, initial=step, unit="step", dynamic_ncols=True, mininterval=0.5,
                                       disable=world.rank > 0))
        try:
            while step < todo and step != stop_at and not any(world.sum(len(asked))):
                if k + 1 < len(stages) and samples >= stages[k + 1]["start"]:
                    if move := other_layout(stages[k], stages[k + 1], layout, world):
                        break
                    if saved != step:
                        saved = save()
                    k += 1
                    before, after = grown()
                    bar.write(f"step {step:>6}: grown to {describe_config(worker.config)}; held-out loss {before['val_loss']:.4f} before, "
                              f"{after['val_loss']:.4f} after, {after['val_loss'] - before['val_loss']:+.4f}")
                    note(stage=k, grown=stages[k]["config"].to_dict(), loss_before=before["val_loss"], loss_after=after["val_loss"])
                start, B = now(machine.device), stages[k]["batch_size"]
                tokens, targets = corpus.batch(s.seed, samples, B, rank=world.at("dp"), ranks=layout.dp, teacher_fraction=s.teacher_fraction)
                once = world.at("tp") == world.at("pp") == 0
                count, = world.sum(once * int((targets != IGNORE).sum()))
                nats = worker.gradients(tokens, targets, parallel.micro_rows(layout, B, s.micro_batch), max(1, count))
                try:
                    lr = learning_rate(s, stages, samples + B)
                    loss, norm = update(worker, optimizer, s.clip, lr, nats, max(1, count))
                except NonFinite as error:
                    if saved != step:
                        save()
                    raise NonFinite(f"step {step + 1} stopped before the optimizer: {error}. The weights from before it are in "
                                    f"{folder}.\nTry --resume {folder} with a smaller --lr (now {s.lr:g}), or a new run with a longer "
                                    f"--warmup (now {s.warmup} samples) or --dtype float32") from None
                flops = training_flops(stages, samples + B) - training_flops(stages, samples)
                step, samples = step + 1, samples + B
                if growth and growth["start"] + growth["ramp"] > samples - B:
                    worker.set_masks(growth, growth_mask(growth, samples))
                seconds = now(machine.device) - start
                note(loss=loss, grad_norm=norm, lr=lr, supervised=int(count),
                     tokens_per_s=B * T / seconds, utilisation=flops / seconds / machine.peak)
                bar.set_postfix_str(f"loss {loss:.3f}, {B * T / seconds:,.0f} tok/s, MFU {flops / seconds / machine.peak:.0%}",
                                    refresh=False)
                bar.update()
                # First the log, then the checkpoint: who resumes drops what the log says of later steps, and misses nothing.
                if step % s.eval_every == 0 or step == todo:
                    result = held_out(worker)
                    note(**result)
                    bar.write(f"step {step:>6}: {describe(result)}")
                if step % s.save_every == 0 or step == todo:
                    saved = save()
        except OSError as error:                 # a full disk under the log, a closed terminal: keep what can be kept
            if saved != step and world.control is None:
                save()
            command = "torchrun ... train.py" if world.control else "python train.py"
            raise OSError(f"{error}\nsaved at step {saved if world.control else step}; to go on: {command} --resume "
                          f"{shlex.quote(str(folder))}") from error
        if saved != step:
            save()
        stopped = next((number for number in world.gather(asked[0] if asked else None) if number), None)
    return {**result, "step": step, "samples": samples, "folder": str(folder), "stopped": stopped if step < todo else None, "move": move}


def other_layout(stage: dict, following: dict, layout: parallel.Layout, world: parallel.World) -> str | None:
    """The options of the layout that the following stage names, where it is neither this job's nor the stage's before: the job then
    ends, for the next one to begin on it."""
    names = ("dp", "tp", "pp")
    wanted = {k: following[k] for k in names if k in following}
    if world.control is None or wanted in ({k: stage[k] for k in names if k in stage}, {k: getattr(layout, k) for k in wanted}):
        return None
    return " ".join(f"--{k} {v}" for k, v in wanted.items())


def describe_config(c: FLMConfig) -> str:
    with torch.device("meta"):
        size = sum(p.numel() for p in FLM(c).parameters())
    return f"{c.n_layers} layers of width {c.d_model}, {size:,} parameters"


def describe_run(folder, s, stages, machine, layout, corpus, samples, resume) -> str:
    T, lines = corpus.seq_len, [f"  layout    {layout}"] if layout.size > 1 else []
    for i, stage in enumerate(stages):
        lines.append(f"  stage {i + 1}   {describe_config(stage['config'])}: samples {stage['start']:,} to {stage['end']:,}")
    total = training_flops(stages, stages[-1]["end"]) - training_flops(stages, samples)
    return "\n".join([
        f"{'going on with' if resume else 'training'} {folder}",
        f"  machine   {machine.why}",
        f"  data      {corpus.path}: {corpus.n_rows('train', 'language') * T:,} training tokens ({corpus.tokenizer.name})",
        *lines,
        f"  job       batches of {s.batch_size} x {T} tokens, learning rate {s.lr:g}, "
        f"muP {'on' if stages[-1]['config'].mup else 'off'}: {total / 1e12:.3g} TFLOP"
        + (f" left, from sample {samples:,}" if samples else "")])


# ---------------------------------------------------------------------------------------------------------------------
# 7. Benchmark and command line

def benchmark(settings: Settings, world=parallel.World(), rounds: int = 5) -> dict:
    """Time training steps on random tokens: the median of a few rounds after two that are not counted. The backward pass is
    what a step takes longer than a forward pass alone."""
    same_arguments(world, settings, False)
    s, stages = world.together(resolve, settings)
    stages = stages[-1:]
    config, layout = stages[0]["config"], plan_layout(s, stages, len(world.gather(None)))
    if s.threads:
        torch.set_num_threads(s.threads)
    machine = agree_on_machine(world, s.device, s.dtype)
    world = parallel.arrange(world, layout, machine.device)
    worker = world.together(allocate, config, machine, world, s.compile)
    worker.init_weights(s.seed)
    optimizer = make_optimizer(worker, s)
    B, T, micro = s.batch_size, config.max_seq_len, parallel.micro_rows(layout, s.batch_size, s.micro_batch)
    draw = torch.Generator().manual_seed(s.seed + world.at("dp"))
    tokens = torch.randint(config.vocab_size, (B // layout.dp, T + 1), generator=draw)
    times = []
    for _ in range(rounds + 2):
        marks = [now(machine.device)]
        worker.run(tokens[:, :-1], tokens[:, 1:], micro)
        marks.append(now(machine.device))
        nats = worker.gradients(tokens[:, :-1], tokens[:, 1:], micro, B * T)
        marks.append(now(machine.device))
        update(worker, optimizer, s.clip, s.lr, nats, B * T)
        marks.append(now(machine.device))
        times.append([end - start for start, end in zip(marks, marks[1:])])
    forward, both, optimize = (statistics.median(column) for column in zip(*times[2:]))
    seconds = both + optimize
    achieved = 3 * forward_flops(config, T) * B * T / seconds
    if machine.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(machine.device)
    else:
        import resource                          # not on Windows, where all the rest works
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in FLM(config).parameters())
    return {"parameters": parameters, "batch_size": B, "seq_len": T, "layout": str(layout),
            "vocab_size": config.vocab_size, "dtype": str(machine.dtype).removeprefix("torch."), "compile": s.compile,
            "tokens_per_s": round(B * T / seconds, 1), "forward_ms": round(forward * 1e3, 2),
            "backward_ms": round((both - forward) * 1e3, 2), "optimizer_ms": round(optimize * 1e3, 2),
            "peak_memory_gib": round(memory / 2 ** 30, 3), "achieved_gflops": round(achieved / 1e9, 1),
            "peak_gflops": round(machine.peak / 1e9, 1), "utilisation": round(achieved / machine.peak, 4),
            "machine": machine.why, "torch": torch.__version__}


GROUPS = {"preset": "what to train", "data": "on what", "steps": "how", "out": "watching and keeping",
          "device": "on which machine", "dp": "on how many processes"}         # the first option of each


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py", usage="%(prog)s [options]", argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog="examples:\n" + __doc__.split("\n\n")[1],
        description="Train FLM-101B's model. With no arguments: a small one, on Python's own source, in a few minutes.")
    for field in dataclasses.fields(Settings):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        text, extra = field.metadata["help"], {k: v for k, v in field.metadata.items() if k != "help"}
        if field.type == "bool":
            group.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, help=text)
        elif field.type.startswith("tuple"):
            group.add_argument(flag(field.name), nargs="+", help=text, **extra)
        else:
            kind = {"int": int, "float": float, "str": str}[field.type.split(" ")[0]]
            if kind is not str and "metavar" not in extra:
                extra["metavar"] = "N" if kind is int else "X"
            if field.name in RECIPES["demo"] and field.default is None and field.name != "stages":
                text += f" (demo: {RECIPES['demo'][field.name]})"
            elif field.default is not None:
                text += f" (default {field.default})"
            group.add_argument(flag(field.name), type=kind, help=text, **extra)
    modes = parser.add_argument_group("something else").add_mutually_exclusive_group()
    modes.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    modes.add_argument("--auto-resume", action="store_true",
                       help="go on with the run in --out if there is one, else begin it: for torchrun --max-restarts and job queues")
    modes.add_argument("--eval-only", metavar="CHECKPOINT",
                       help="print the held-out loss of a checkpoint (on --data, or its run's own)")
    modes.add_argument("--export", nargs=2, metavar=("CHECKPOINT", "FILE"), help="write a checkpoint's weights into one file")
    modes.add_argument("--benchmark", action="store_true", help="time training steps; prints one JSON object")
    return parser


def resumed(folder: str, given: dict) -> Settings:
    """The settings of the run in `folder`, changed by what was given. Raises ValueError for what a run fixes."""
    if (Path(folder) / "checkpoint.json").exists():
        raise ValueError(f"{folder} is one checkpoint; --resume takes its run: --resume {shlex.quote(str(Path(folder).parent))}")
    s, stages = read_run(folder)
    fixed = [f"{flag(k)} {v}: this run has {getattr(s, k)}" for k, v in given.items()
             if k not in CHANGEABLE and v != getattr(s, k)]
    if fixed:
        raise ValueError("a run fixes these, start a new one to change them:\n  " + "\n  ".join(fixed))
    changed = {k: v for k, v in given.items() if v != getattr(s, k)}
    info = read_info(find_checkpoint(folder))
    s = dataclasses.replace(s, out=str(folder), **changed)
    if problems := violations(s):
        raise ValueError("\n".join(problems))
    if info["samples"] >= resumed_stages(s)[-1]["end"]:
        raise ValueError(f"{folder} has done its {info['step']} steps: ask for more, as in --resume {shlex.quote(str(folder))} "
                         f"--steps {2 * info['step']}")
    for name in {"steps", "lr", "min_lr"} & set(changed):
        print(f"{flag(name)} is now {changed[name]}: the learning rate follows the new schedule from here on")
    return s


def eval_only(checkpoint: str, given: dict, world=parallel.World()) -> dict:
    path = world.together(find_checkpoint, checkpoint)
    if path.is_file() and world.control:
        raise ValueError(f"{path} holds weights for one process: give a run or a step folder")
    run = path.parent if (path.parent / "config.json").exists() else None
    s = dataclasses.replace(read_run(run)[0] if run else Settings(batch_size=16), **{k: Settings.__dataclass_fields__[k].default for k in LAYOUT})
    s = dataclasses.replace(s, **given)
    same_arguments(world, s, False)
    if problems := violations(s):
        raise ValueError("\n".join(problems))
    if s.threads:
        torch.set_num_threads(s.threads)
    machine = agree_on_machine(world, s.device, s.dtype)
    if world.control is None:
        model, info = load_model(path, machine.device)
        worker = parallel.Worker([model.to(machine.weights)], world, machine.dtype)
    else:
        info = world.together(read_info, path)
        config, n = FLMConfig.from_dict(info["config"]), len(world.gather(None))
        rows = (s.dp or max(1, n // (s.tp * s.pp))) * s.pp * parallel.SCHEDULES[s.schedule]      # an evaluation fills up what is missing
        layout = plan_layout(dataclasses.replace(s, micro_batch=1), [{"config": config, "batch_size": rows}], n)
        world = parallel.arrange(world, layout, machine.device)
        worker = world.together(allocate, config, machine, world)
        world.together(read_tensors, path, {"model": dict(reversed(worker.named))})
        worker.set_masks(info["growth"], growth_mask(info["growth"], info["samples"]))
    corpus = open_corpus(s.data or (recorded_corpus(run) if run else None), s.tokenizer if run or "tokenizer" in given else info["tokenizer"],
                         s.tokenizer_file, worker.config)
    same_tokens(corpus, info, path)
    result = evaluate(worker, corpus, s.eval_rows, s.eval_batch or (1 if s.pp > 1 else s.micro_batch or s.batch_size))
    print(f"{path}, on {corpus.path}, in {str(machine.dtype).removeprefix('torch.')}: {describe(result)}")
    return result


def main(argv=None, world=parallel.World()) -> int:
    given = vars(make_parser().parse_args(argv))
    if "model" in given:
        given["model"] = tuple(given["model"])
    modes = {k: given.pop(k) for k in ("resume", "auto_resume", "eval_only", "export", "benchmark") if k in given}
    for mode, usable in USABLE.items():
        if mode in modes and (extra := sorted(set(given) - usable)):
            raise ValueError(f"{flag(mode)} makes no use of {', '.join(map(flag, extra))}: leave it out")
    if "benchmark" in modes:
        print(json.dumps(benchmark(Settings(**given), world), indent=1))
        return 0
    if "eval_only" in modes:
        eval_only(modes["eval_only"], given, world)
        return 0
    if "export" in modes:
        if world.control:
            raise ValueError("--export works alone: run it without torchrun")
        export_weights(*modes["export"])
        return 0

    start = time.perf_counter()
    if "auto_resume" in modes:
        if "out" not in given:
            raise ValueError("--auto-resume goes on with the run in --out if there is one: add --out DIR")
        if world.told(any(path.suffix != ".tmp" for path in Path(given["out"]).glob("step-*"))):
            modes["resume"] = given.pop("out")
    settings = world.together(resumed, modes["resume"], given) if "resume" in modes else Settings(**given)
    result = train(settings, resume="resume" in modes, world=world)
    folder = shlex.quote(result["folder"])
    command = "torchrun ... train.py" if world.control else "python train.py"
    if result["stopped"]:
        print(f"stopped by {signal.Signals(result['stopped']).name} after step {result['step']}, saved; to go on:\n"
              f"  {command} --resume {folder}")
        return 128 + result["stopped"]
    if result["move"]:
        print(f"saved at step {result['step']}: the next stage lies on another layout; it begins when you type, on as many processes:\n"
              f"  torchrun ... train.py --resume {folder} {result['move']}")
        return 0
    if world.control and (settings.tp > 1 or settings.pp > 1):
        print(f"done in {time.perf_counter() - start:.0f} s")
    elif world.rank == 0:
        print(f"done in {time.perf_counter() - start:.0f} s. A sample, from the start of a new document:\n")
        model, info = load_model(result["folder"])
        continue_texts(model, info, [""], max_new_tokens=min(400, model.config.max_seq_len - 1), temperature=0.8, stream=sys.stdout,
               tokenizer_file=settings.tokenizer_file)
    print(f"\nWhat next?\n"
          f"  let it continue your words      python flm.py sample {folder} --prompt \"def \"\n"
          f"  train it twice as long          {command} --resume {folder} --steps {2 * result['step']}\n"
          f"  train on your own text          python data.py prepare mine.txt --out corpora/mine\n"
          f"                                  {command} --data corpora/mine")
    return 0


def run() -> int:
    """main, with errors for people: one screen, and an exit code. Of several processes rank 0 speaks."""
    sys.stdout.reconfigure(errors="backslashreplace")    # not every terminal knows every character
    world, code = parallel.World(rank=int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0), 1

    def say(text):
        if world.rank == 0:
            print(f"train.py: {text}", file=sys.stderr)

    try:
        if dist.is_torchelastic_launched():      # one of several, started by torchrun
            world = parallel.connect()
            if world.rank > 0:
                sys.stdout = open(os.devnull, "w")
        code = main(world=world)
    except (ValueError, OSError) as error:       # a user's mistake, or the machine's limit: one screen
        say(error)
        code = 2
    except NonFinite as error:
        say(error)
        code = 1
    except RuntimeError as error:                # PyTorch has no class of its own for a CPU that runs out of memory
        if world.control is not None and re.search("Connection (closed|reset) by peer", str(error)):
            code = 1                             # another rank has failed, and says why
        elif not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        else:
            print(f"train.py: {f'rank {world.rank}: ' if world.control else ''}out of memory: try a smaller --micro-batch or --eval-batch, or a smaller model",
                  file=sys.stderr)
            code = 2
    except KeyboardInterrupt:                    # before the first step, or a second Ctrl-C
        say("interrupted; what was saved before is whole")
        code = 130
    except SystemExit as leaving:                # argparse
        code = leaving.code
    parallel.leave(world, code)
    return code


if __name__ == "__main__":
    sys.exit(run())
