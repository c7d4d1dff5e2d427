"""train.py - the main job: train FLM-101B's model on real text (FLM-101B, arXiv 2309.03852, sections 2.4 and 3).

    python train.py                                    a small model on Python's own source, in a few minutes on a laptop
    python train.py --data corpora/mine                on text that data.py prepared
    python train.py --resume runs/demo                 go on exactly where a run stopped
    python train.py --eval-only runs/demo              held-out loss of a checkpoint
    python train.py --benchmark                        how fast this machine trains, as one JSON object

Read it from top to bottom:

    1. Settings       every option, its default and why
    2. the machine    device, dtype, and the rate that utilisation is measured against
    3. the schedule   the learning rate as a function of samples
    4. evaluation     nats per token and bits per byte on held-out documents
    5. one step       forward, backward, the global checks, AdamW
    6. the run        folder, checkpoints, resume, the loop
    7. benchmark, command line

Letters as in flm.py: B batch (rows of T tokens, the "samples" that everything is counted in), T sequence.
Whatever the paper says of training is here: AdamW (0.9, 0.95), decay 0.1, clip 1.0, cosine to 6e-6 / 4e-4 of the peak
after a warm-up in samples, bf16 arithmetic over fp32 weights. It has no dropout: the paper mentions none.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import platform
import resource
import shlex
import shutil
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import data
import muP
from flm import (FLM, FLMConfig, IGNORE, find_checkpoint, forward_flops, growth_mask, load_model, pick_device, preset, read_info,
                 read_tensors, sample, write_checkpoint)


# ---------------------------------------------------------------------------------------------------------------------
# 1. Settings

def option(default, help: str, **extra):
    return dataclasses.field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True)
class Settings:
    """Every option of a run, as plain JSON values. None means: the preset's recipe decides (see RECIPES)."""
    # what to train
    preset: str = option("demo", "the model: demo, small, flm-proxy, flm-16b, flm-51b, flm-101b")
    model: tuple[str, ...] = option((), "change fields of the model, for example --model d_model=384 n_heads=6", metavar="FIELD=VALUE")
    mup: str = option("on", "the maximal update parametrization; off: the standard one", choices=("on", "off"))
    seed: int = option(0, "of the initial weights and the order of the data")
    # on what
    data: str | None = option(None, "a folder from data.py prepare (none: Python's standard library)", metavar="DIR")
    tokenizer: str = option("bytes", "tokenizer of the default corpus; a prepared folder has its own", choices=("bytes", "cl100k_base"))
    tokenizer_file: str | None = option(None, "cl100k_base.tiktoken, where it cannot be downloaded", metavar="PATH")
    teacher_fraction: float = option(0.0, "share of rows that carry FreeLM's teacher signal, 0 to 1")
    # how
    steps: int | None = option(None, "optimizer steps; the cosine ends with the last")
    batch_size: int | None = option(None, "rows per step")
    micro_batch: int | None = option(None, "rows per forward pass; gradients accumulate (none: the whole batch)")
    lr: float | None = option(None, "peak learning rate at the proxy's width; muP scales it per group")
    min_lr: float = option(0.015, "where the cosine ends, as a share of the peak (the paper's 6e-6 of 4e-4)")
    warmup: int | None = option(None, "warm-up of the learning rate in samples", metavar="SAMPLES")
    weight_decay: float = option(0.1, "decay, of matrices only")
    clip: float = option(1.0, "largest norm of the whole gradient")
    # watching and keeping
    out: str | None = option(None, "the run's folder (none: the first free one of runs/PRESET, runs/PRESET-2, ...)", metavar="DIR")
    eval_every: int = option(100, "steps between evaluations")
    eval_rows: int = option(256, "held-out rows per evaluation, spread over the held-out documents")
    eval_batch: int | None = option(None, "rows per forward pass of an evaluation (none: that of training)")
    save_every: int = option(200, "steps between checkpoints")
    keep: int = option(2, "checkpoints kept, the newest ones")
    # on which machine
    device: str = option("auto", "auto, cpu or cuda")
    threads: int | None = option(None, "CPU threads (none: PyTorch's choice, one per core)")
    dtype: str = option("auto", "arithmetic: auto, bfloat16 (over fp32 weights), float32, float64")
    compile: bool = option(False, "torch.compile each block: a slow start, then faster steps")
    deterministic: bool = option(False, "bit-for-bit repeatable on CUDA too, slower")


# What may change when a run is resumed; everything else is fixed by the run.
CHANGEABLE = {"steps", "lr", "min_lr", "clip", "data", "tokenizer_file", "eval_every", "eval_rows", "eval_batch", "save_every", "keep",
              "device", "threads", "compile", "deterministic"}

PAPER = {"steps": 52_000, "batch_size": 2304, "lr": 4e-4, "warmup": 4_608_000}        # Table 1, stage 16B; steps inferred
RECIPES = {                                      # ours, found by trying, where it is not the paper's
    "demo": {"steps": 600, "batch_size": 16, "lr": 3e-3, "warmup": 800},
    "small": {"steps": 2000, "batch_size": 12, "lr": 2e-3, "warmup": 1200},
    "flm-proxy": PAPER, "flm-16b": PAPER,
    "flm-51b": {"steps": 8_400, "batch_size": 2304, "lr": 3.4e-4, "warmup": 230_400},
    "flm-101b": {"steps": 6_000, "batch_size": 2160, "lr": 2e-4, "warmup": 230_400},
}


def resolve(settings: Settings) -> tuple[Settings, FLMConfig]:
    """Fill in the recipe, build the model's configuration, check everything. Raises ValueError with all violations."""
    config = preset(settings.preset)
    recipe = {k: v for k, v in RECIPES[settings.preset].items() if getattr(settings, k) is None}
    s = dataclasses.replace(settings, **recipe)
    problems, changes = [], {"mup": s.mup == "on"}
    fields = {f.name: f.type for f in dataclasses.fields(FLMConfig)}
    for text in s.model:
        name, _, value = text.partition("=")
        try:
            if name not in fields:
                raise ValueError(f"there is no field {name!r}; there are {', '.join(fields)}")
            changes[name] = json.loads(value.lower())
        except ValueError as error:
            problems.append(f"--model {text}: " + (str(error) if name not in fields else f"{value!r} is no number, true or false"))
    if not problems:
        try:
            config = config.replace(**changes)
        except ValueError as error:
            problems.append(str(error))
    for name in ("steps", "batch_size", "eval_every", "eval_rows", "save_every", "keep"):
        if getattr(s, name) < 1:
            problems.append(f"--{name.replace('_', '-')} {getattr(s, name)}: must be at least 1")
    for name in ("micro_batch", "eval_batch", "threads"):
        if getattr(s, name) is not None and getattr(s, name) < 1:
            problems.append(f"--{name.replace('_', '-')} {getattr(s, name)}: must be at least 1")
    if s.micro_batch and s.micro_batch > 0 and s.batch_size % s.micro_batch:
        problems.append(f"--micro-batch {s.micro_batch}: must divide --batch-size {s.batch_size}")
    for name, low, high in (("lr", 0, math.inf), ("clip", 0, math.inf)):
        if not low < getattr(s, name) < high:
            problems.append(f"--{name} {getattr(s, name)}: must be above 0")
    for name, high in (("min_lr", 1), ("teacher_fraction", 1), ("weight_decay", math.inf), ("warmup", math.inf)):
        if not 0 <= getattr(s, name) <= high:
            problems.append(f"--{name.replace('_', '-')} {getattr(s, name)}: must lie between 0 and {high}")
    if s.dtype not in ("auto", "float32", "bfloat16", "float64"):
        problems.append(f"--dtype {s.dtype}: must be auto, bfloat16, float32 or float64")
    if problems:
        raise ValueError("these settings do not fit together:\n  " + "\n  ".join(problems))
    return s, config


# ---------------------------------------------------------------------------------------------------------------------
# 2. The machine

# Dense bf16 peaks in FLOP/s, from the makers' data sheets; the longest name that a card's own name contains counts.
PEAKS = {"A100": 312e12, "A800": 312e12, "H100": 989e12, "H800": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "B200": 2250e12,
         "A10": 125e12, "A40": 150e12, "A6000": 155e12, "L4": 121e12, "L40": 181e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def matmul_rate(device: torch.device, dtype: torch.dtype, n: int = 2048) -> float:
    """FLOP/s of the best of a few n x n matrix products."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(6):
        start = now(device)
        a @ b
        best = min(best, now(device) - start)
    return 2 * n ** 3 / best


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
    return Machine(device, getattr(torch, dtype), peak, f"cpu with {torch.get_num_threads()} threads, {dtype}{reason}; utilisation is "
                   f"against {peak / 1e9:.0f} GFLOP/s, a matrix product measured just now")


# ---------------------------------------------------------------------------------------------------------------------
# 3. The schedule

def learning_rate(s: Settings, samples: int) -> float:
    """At the end of the step that brings the run to `samples`: a straight warm-up, then half a cosine from the peak to
    min_lr of it at the last sample."""
    total = s.steps * s.batch_size
    if samples < s.warmup:
        return s.lr * samples / s.warmup
    progress = min(1.0, (samples - s.warmup) / max(1, total - s.warmup))
    return s.lr * (s.min_lr + (1 - s.min_lr) * (1 + math.cos(math.pi * progress)) / 2)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Evaluation

@torch.no_grad()
def evaluate(model: FLM, corpus: data.Corpus, machine: Machine, rows: int, micro: int) -> dict:
    """Held-out loss. {"val_loss": nats per token, "val_bpb": bits per byte of text, "val_tokens"}, and, where the corpus
    has a teacher signal, {"teacher_loss": nats per label token, "teacher_accuracy": share of labels whose last token, read
    as a choice between the two emoji, is right}.

    Bits per byte divide by the bytes that the predicted tokens stand for, so tokenizers can be compared."""
    lengths = torch.from_numpy(data.byte_lengths(corpus.tokenizer))
    result = {}
    for signal_name in ("language", "teacher"):
        n_rows = corpus.n_rows("val", signal_name)
        if n_rows == 0:
            continue
        rows_here, nats, count, length, right, labels = min(rows, n_rows), 0.0, 0, 0, 0, 0
        angry, devil = (corpus.tokenizer.encode_ordinary(data.EMOJI[k])[-1] for k in (1, 0))
        for i in range(0, rows_here, micro):
            n = min(micro, rows_here - i)
            tokens, targets = corpus.rows("val", signal_name, i * (n_rows - n) // max(1, rows_here - n), n)
            x, y = tokens.to(machine.device), targets.to(machine.device)
            with machine.autocast():
                if signal_name == "language":
                    nats += model(x, y).item()
                    length += int(lengths[targets[targets != IGNORE]].sum())
                else:
                    logits = model(x)
                    nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), ignore_index=IGNORE,
                                                              reduction="sum").item()
                    last = (y == angry) | (y == devil)
                    guess = torch.where(logits[..., angry] > logits[..., devil], angry, devil)
                    right, labels = right + int((guess == y)[last].sum()), labels + int(last.sum())
            count += int((targets != IGNORE).sum())
        if signal_name == "language":
            result |= {"val_loss": nats / count, "val_bpb": nats / math.log(2) / length, "val_tokens": count}
        else:
            result |= {"teacher_loss": nats / count, "teacher_accuracy": right / labels, "teacher_labels": labels}
    return result


def describe(result: dict) -> str:
    text = f"held-out loss {result['val_loss']:.4f} nats per token, {result['val_bpb']:.4f} bits per byte"
    if "teacher_loss" in result:
        text += f"; teacher {result['teacher_loss']:.4f} nats per label token, {result['teacher_accuracy']:.1%} of {result['teacher_labels']} labels right"
    return text


# ---------------------------------------------------------------------------------------------------------------------
# 5. One step

class NonFinite(RuntimeError):
    """The loss or the gradient's norm is not a finite number; the weights are those from before the step."""


def gradients(model: FLM, tokens, targets, machine: Machine, micro: int) -> float:
    """Add this batch's gradient to the parameters' .grad; returns the loss, nats per supervised token.

    Every micro-batch is divided by the whole batch's count of supervised tokens, so the number of micro-batches changes
    nothing but the rounding, and teacher rows weigh by the labels that they hold."""
    count, loss = max(1, int((targets != IGNORE).sum())), torch.zeros((), device=machine.device)
    for x, y in zip(tokens.split(micro), targets.split(micro)):
        x, y = (z.to(machine.device, non_blocking=True) for z in (x, y))
        with machine.autocast():
            part = model(x, y) / count
        part.backward()
        loss += part.detach()
    return loss.item()


def update(model: FLM, optimizer: torch.optim.Optimizer, s: Settings, samples: int, loss: float) -> tuple[float, float]:
    """Check, clip, set the learning rate, step. Returns (gradient norm before clipping, learning rate)."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NonFinite(f"loss {loss}, gradient norm {norm}")
    lr = learning_rate(s, samples)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.step()
    optimizer.zero_grad()
    return norm, lr


def make_optimizer(model: FLM, s: Settings) -> torch.optim.AdamW:
    return torch.optim.AdamW(muP.param_groups(model, s.lr, s.weight_decay), betas=(0.9, 0.95), eps=1e-8, fused=True)


def optimizer_tensors(model: FLM, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """AdamW's state under the parameters' names: {"layers.0.attn.o.weight.exp_avg": tensor, ...}. State that is not there
    yet is made (zeros, as the first step would make it), so that a checkpoint can be read into it."""
    tensors = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        tensors |= {f"{name}.{key}": value for key, value in state.items()}
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# 6. The run

def open_corpus(s: Settings, config: FLMConfig) -> data.Corpus:
    """The prepared folder, or the default corpus, prepared on first use. Raises ValueError where ids exceed the vocabulary."""
    folder = s.data
    if folder is None:
        folder = f"corpora/stdlib-{platform.python_version()}-{s.tokenizer}"
        if not Path(folder).exists():
            print(f"preparing the default corpus, Python {platform.python_version()}'s own source, in {folder}")
            data.prepare({"stdlib": data.stdlib_files()}, folder, data.get_tokenizer(s.tokenizer, s.tokenizer_file))
    corpus = data.Corpus(folder, config.max_seq_len, s.tokenizer_file)
    if corpus.tokenizer.n_vocab > config.vocab_size:
        fit = -(-corpus.tokenizer.n_vocab // 128) * 128
        raise ValueError(f"{folder} is made of {corpus.tokenizer.name} tokens, whose ids go up to {corpus.tokenizer.n_vocab - 1}; the model's "
                         f"vocabulary ends at {config.vocab_size - 1}: add --model vocab_size={fit}")
    if s.teacher_fraction and not corpus.n_rows("train", "teacher"):
        raise ValueError(f"--teacher-fraction {s.teacher_fraction}, but {folder} has no teacher signal: prepare it with --teacher FILE.jsonl")
    return corpus


def run_folder(s: Settings) -> Path:
    """Where a new run goes. Raises ValueError for a folder that holds something."""
    if s.out is None:
        base, n = Path("runs") / s.preset, 1
        while (folder := base if n == 1 else base.with_name(f"{s.preset}-{n}")).exists():
            n += 1
        return folder
    folder = Path(s.out)
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds another run: go on with it (--resume {folder}) or choose another folder (--out)")
    if folder.is_dir() and any(folder.iterdir()) or folder.is_file():
        raise ValueError(f"{folder} exists and is not a run: choose another folder (--out)")
    return folder


def write_json(path: Path, value):
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(json.dumps(value, indent=1) + "\n")
    tmp.replace(path)


def read_run(folder: Path) -> tuple[Settings, FLMConfig]:
    """Settings and model configuration of an existing run."""
    try:
        run = json.loads((folder / "config.json").read_text())
        s = Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in run["settings"].items()})
        return s, FLMConfig.from_dict(run["config"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} is not the folder of a run: its config.json is missing or unreadable ({error})") from error


def cut_log(path: Path, step: int):
    """Drop what the log says of steps after `step`: the run writes them again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text("".join(kept))
    tmp.replace(path)


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


def train(settings: Settings, *, resume: bool = False, stop_at: int | None = None) -> dict:
    """Run, or with `resume` go on with, the job that `settings` describe; returns the last evaluation with "step", "folder"
    and "stopped" (the signal's number, or None). `stop_at` saves and leaves at that step, as a signal would.

    The run is a function of its settings: batches of (seed, samples seen), weights of (seed, name). So N steps straight are k
    steps, a stop and N-k more, bit for bit on a CPU, and on CUDA with --deterministic."""
    if resume:
        folder = Path(settings.out)
        s, (_, config) = settings, read_run(folder)
    else:
        s, config = resolve(settings)
        folder = run_folder(s)
    if s.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")      # cuBLAS reads no other switch
        torch.use_deterministic_algorithms(True)
    if s.threads:
        torch.set_num_threads(s.threads)
    machine = pick_machine(s.device, s.dtype)
    s = dataclasses.replace(s, dtype=str(machine.dtype).removeprefix("torch."), out=str(folder))
    corpus = open_corpus(s, config)

    model = FLM(config).to(machine.weights).to(machine.device)
    optimizer = make_optimizer(model, s)
    tensors = {"model": dict(model.named_parameters()), "optimizer": optimizer_tensors(model, optimizer)}
    step, growth = 0, None
    if resume:
        newest = find_checkpoint(folder)
        info = read_info(newest)
        read_tensors(newest, tensors)
        step, growth = info["step"], info["growth"]
        cut_log(folder / "metrics.jsonl", step)
    else:
        muP.init_weights(model, s.seed)
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"settings": dataclasses.asdict(s), "config": config.to_dict(), "torch": torch.__version__,
                                        "python": platform.python_version(), "machine": machine.why})
    model.set_masks(growth, growth_mask(growth, step * s.batch_size))
    if s.compile:
        for block in model.layers.values():
            block.compile()

    micro, T = s.micro_batch or s.batch_size, config.max_seq_len
    flops = 3 * forward_flops(config, T) * T * s.batch_size
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{'going on with' if resume else 'training'} {folder}: {parameters:,} parameters, {config.n_layers} layers of width {config.d_model}, "
          f"muP {'on' if config.mup else 'off'}\n"
          f"  machine   {machine.why}\n"
          f"  data      {corpus.path}: {corpus.n_rows('train', 'language') * T:,} training tokens ({corpus.tokenizer.name})\n"
          f"  job       steps {step} to {s.steps} of {s.batch_size} x {T} tokens, learning rate {s.lr:g}: {flops * (s.steps - step) / 1e12:.3g} TFLOP")

    def save():
        write_checkpoint(folder / f"step-{step:08d}", tensors,
                         {"step": step, "samples": step * s.batch_size, "config": config.to_dict(), "growth": growth, "tokenizer": corpus.tokenizer.name,
                          "dtype": str(machine.weights).removeprefix("torch."), "torch": torch.__version__})
        old = sorted(p for p in folder.glob("step-*") if p.suffix != ".tmp")[:-s.keep]
        for path in old + list(folder.glob("step-*.tmp")):
            shutil.rmtree(path, ignore_errors=True)

    def held_out():
        model.eval()
        result = evaluate(model, corpus, machine, s.eval_rows, s.eval_batch or micro)
        model.train()
        log.write(json.dumps({"step": step, **result}) + "\n")
        log.flush()
        bar.write(f"step {step:>6}: {describe(result)}")
        return result

    if not resume:
        save()                                   # a disk that cannot take a checkpoint shows now, not in an hour
    result, saved = {}, step
    with open(folder / "metrics.jsonl", "a") as log, stop_on_signal() as asked, \
            tqdm(total=s.steps, initial=step, unit="step", dynamic_ncols=True) as bar:
        while step < s.steps and not asked and step != stop_at:
            start = now(machine.device)
            tokens, targets = corpus.batch(s.seed, step * s.batch_size, s.batch_size, teacher_fraction=s.teacher_fraction)
            loss = gradients(model, tokens, targets, machine, micro)
            try:
                norm, lr = update(model, optimizer, s, (step + 1) * s.batch_size, loss)
            except NonFinite as error:
                if saved != step:
                    save()
                raise NonFinite(f"step {step + 1} stopped before the optimizer: {error}. The weights from before it are in {folder}.\n"
                                f"Try a smaller --lr (now {s.lr:g}), a longer --warmup (now {s.warmup} samples), or --dtype float32") from None
            step += 1
            seconds = now(machine.device) - start
            rate = s.batch_size * T / seconds
            log.write(json.dumps({"step": step, "samples": step * s.batch_size, "loss": loss, "grad_norm": norm, "lr": lr,
                                  "supervised": int((targets != IGNORE).sum()), "tokens_per_s": rate,
                                  "utilisation": flops / seconds / machine.peak}) + "\n")
            log.flush()
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tok/s, MFU {flops / seconds / machine.peak:.0%}")
            if step % s.save_every == 0 and step < s.steps:
                save()
                saved = step
            if step % s.eval_every == 0 and step < s.steps:
                result = held_out()
        if saved != step:
            save()
        if step == s.steps:
            result = held_out()
    return {**result, "step": step, "folder": str(folder), "stopped": asked[0] if asked else None}


# ---------------------------------------------------------------------------------------------------------------------
# 7. Benchmark and command line

def benchmark(settings: Settings, rounds: int = 5) -> dict:
    """Time training steps on random tokens: the median of a few rounds after two that are not counted."""
    s, config = resolve(settings)
    machine = pick_machine(s.device, s.dtype)
    model = muP.init_weights(FLM(config), s.seed).to(machine.weights).to(machine.device)
    optimizer = make_optimizer(model, s)
    if s.compile:
        for block in model.layers.values():
            block.compile()
    B, T, micro = s.batch_size, config.max_seq_len, s.micro_batch or s.batch_size
    tokens = torch.randint(config.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(s.seed)).to(machine.device)
    times = []
    for _ in range(rounds + 2):
        marks, spent = [now(machine.device)], [0.0, 0.0, 0.0]
        for x, y in zip(tokens[:, :-1].split(micro), tokens[:, 1:].split(micro)):
            with machine.autocast():
                loss = model(x, y) / (B * T)
            marks.append(now(machine.device))
            loss.backward()
            marks.append(now(machine.device))
            spent[0] += marks[-2] - marks[-3]
            spent[1] += marks[-1] - marks[-2]
        update(model, optimizer, s, B, loss.item())
        spent[2] = now(machine.device) - marks[-1]
        times.append(spent)
    forward, backward, optimize = (statistics.median(column) for column in zip(*times[2:]))
    seconds = forward + backward + optimize
    achieved = 3 * forward_flops(config, T) * B * T / seconds
    memory = (torch.cuda.max_memory_allocated(machine.device) if machine.device.type == "cuda"
              else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return {"parameters": sum(p.numel() for p in model.parameters()), "batch_size": B, "seq_len": T, "vocab_size": config.vocab_size,
            "dtype": str(machine.dtype).removeprefix("torch."), "compile": s.compile, "tokens_per_s": round(B * T / seconds, 1),
            "forward_ms": round(forward * 1e3, 2), "backward_ms": round(backward * 1e3, 2), "optimizer_ms": round(optimize * 1e3, 2),
            "peak_memory_gib": round(memory / 2 ** 30, 3), "achieved_gflops": round(achieved / 1e9, 1), "peak_gflops": round(machine.peak / 1e9, 1),
            "utilisation": round(achieved / machine.peak, 4), "machine": machine.why, "torch": torch.__version__}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train.py", description="Train FLM-101B's model. With no arguments: a small one, on Python's own "
                                     "source, in a few minutes.", argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(Settings):
        flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
        extra = {k: v for k, v in field.metadata.items() if k != "help"}
        if field.type == "bool":
            parser.add_argument(flag, action="store_true", help=text)
        elif field.type.startswith("tuple"):
            parser.add_argument(flag, nargs="+", help=text, **extra)
        else:
            kind = {"int": int, "float": float, "str": str}[field.type.split(" ")[0]]
            default = f" (default {field.default})" if field.default is not None else ""
            parser.add_argument(flag, type=kind, help=text + default, **extra)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    modes.add_argument("--eval-only", metavar="CHECKPOINT", help="print the held-out loss of a checkpoint (on --data, or its run's own)")
    modes.add_argument("--export", nargs=2, metavar=("CHECKPOINT", "FILE"), help="write a checkpoint's weights into one file")
    modes.add_argument("--benchmark", action="store_true", help="time training steps; prints one JSON object")
    return parser


def resumed(folder: str, given: dict) -> Settings:
    """The settings of the run in `folder`, changed by what was given. Raises ValueError for what a run fixes."""
    folder = Path(folder)
    s, _ = read_run(folder)
    fixed = [f"--{k.replace('_', '-')} {v}: this run has {getattr(s, k)}" for k, v in given.items() if k not in CHANGEABLE and v != getattr(s, k)]
    if fixed:
        raise ValueError("a run fixes these, start a new one to change them:\n  " + "\n  ".join(fixed))
    changed = {k: v for k, v in given.items() if k in CHANGEABLE}
    step = read_info(find_checkpoint(folder))["step"]
    if step >= changed.get("steps", s.steps):
        raise ValueError(f"{folder} has done its {step} steps: ask for more, as in --resume {folder} --steps {2 * step}")
    for name in ("steps", "lr", "min_lr"):
        if name in changed and changed[name] != getattr(s, name):
            print(f"--{name.replace('_', '-')} was {getattr(s, name)}, is {changed[name]}: the learning rate follows the new schedule from here on")
    return resolve(dataclasses.replace(s, out=str(folder), **changed))[0]


def eval_only(checkpoint: str, given: dict) -> dict:
    path = find_checkpoint(checkpoint)
    model, info = load_model(path, pick_device(given.get("device", "auto")))
    run = path.parent if (path.parent / "config.json").exists() else None
    s = dataclasses.replace(read_run(run)[0] if run else Settings(tokenizer=info["tokenizer"]), **given)
    machine = pick_machine(s.device, s.dtype)
    corpus = open_corpus(dataclasses.replace(s, teacher_fraction=0.0), model.config)
    if corpus.tokenizer.name != info["tokenizer"]:
        raise ValueError(f"{corpus.path} is made of {corpus.tokenizer.name} tokens, {path} was trained on {info['tokenizer']}: prepare the text "
                         f"with --tokenizer {info['tokenizer']}")
    result = evaluate(model.eval(), corpus, machine, s.eval_rows, s.eval_batch or s.micro_batch or s.batch_size or 16)
    print(f"{path}, on {corpus.path}, in {str(machine.dtype).removeprefix('torch.')}: {describe(result)}")
    return result


def export(checkpoint: str, file: str):
    """One file that torch.load(weights_only=True) reads: {"info": ..., "model": {name: tensor}}."""
    model, info = load_model(checkpoint)
    tmp = Path(file + ".tmp")
    try:
        torch.save({"info": {k: v for k, v in info.items() if k != "files"}, "model": {k: p.detach() for k, p in model.named_parameters()}}, tmp)
        tmp.replace(file)
    except (OSError, RuntimeError) as error:
        tmp.unlink(missing_ok=True)
        raise OSError(f"could not write {file}: {error}") from error
    print(f"wrote {file}: python flm.py sample {shlex.quote(file)} --prompt TEXT")


def main(argv=None) -> int:
    given = vars(make_parser().parse_args(argv))
    if "model" in given:
        given["model"] = tuple(given["model"])
    modes = {k: given.pop(k) for k in ("resume", "eval_only", "export", "benchmark") if k in given}
    if "benchmark" in modes:
        print(json.dumps(benchmark(Settings(**given)), indent=1))
        return 0
    if "eval_only" in modes:
        eval_only(modes["eval_only"], given)
        return 0
    if "export" in modes:
        export(*modes["export"])
        return 0

    start = time.perf_counter()
    settings = resumed(modes["resume"], given) if "resume" in modes else Settings(**given)
    result = train(settings, resume="resume" in modes)
    folder = shlex.quote(result["folder"])
    if result["stopped"]:
        print(f"stopped by {signal.Signals(result['stopped']).name} after step {result['step']}, saved; to go on:\n  python train.py --resume {folder}")
        return 128 + result["stopped"]
    print(f"done in {time.perf_counter() - start:.0f} s. A sample, from the start of a new document:\n")
    model, info = load_model(result["folder"])
    sample(model, info, [""], max_new_tokens=min(400, model.config.max_seq_len - 1), temperature=0.8, stream=sys.stdout,
           tokenizer_file=settings.tokenizer_file)
    print(f"\nWhat next?\n"
          f"  python flm.py sample {folder} --prompt \"def \"                 let it continue your words\n"
          f"  python train.py --resume {folder} --steps {2 * result['step']}                train it twice as long\n"
          f"  python data.py prepare mine.txt --out corpora/mine && python train.py --data corpora/mine      train on your own text")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:       # a user's mistake, or the machine's limit: one screen
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except NonFinite as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(1)
