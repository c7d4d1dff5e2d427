"""train.py - the main job: train FLM-101B's model on text (arXiv 2309.03852, sections 2.3, 2.4, 3).

    python train.py                          a small model on Python's own source, in minutes
    python train.py --data corpora/mine      on text that data.py prepared
    python train.py --resume runs/demo       go on exactly where a run stopped
    python train.py --eval-only runs/demo    held-out loss of a checkpoint
    python train.py --benchmark              how fast this machine trains, as one JSON object

Read it from top to bottom. The options stand in settings.py, device and arithmetic in machine.py,
what a run keeps on the disk in run_folder.py, the held-out loss (and --eval-only) in evaluation.py.

    1. The parts of a step     this rank's share of the model, the optimizer, the update
    2. The run                 RunState and Run; the whole step is Run.train_step
    3. The loop                from the settings to the last checkpoint: train
    4. The benchmark           the times of a step
    5. The command line

Letters as in flm.py: B batch, in rows of T tokens. A row is a "sample"; everything is counted in
samples. What the paper says of training is here: AdamW (0.9, 0.95), decay 0.1, clipping at 1.0, a
cosine to 6e-6 / 4e-4 of the peak after a warm-up in samples, bf16 arithmetic over fp32 weights.
There is no dropout: the paper gives no rate.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import math
import os
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
from evaluation import describe, empty_worker, eval_only, evaluate, load_worker
from flm import FLMConfig, count_parameters, forward_flops, growth_mask
from machine import Machine, name_of, now, peak_memory, set_up
from parallel import Worker, World
from run_folder import (
    check_corpus,
    check_shared,
    check_tokenizer,
    claim_folder,
    cut_log,
    find_text,
    has_checkpoint,
    lock_folder,
    open_corpus,
    program,
    read_log,
    read_run,
    resume_command,
    resumed,
    resumed_stages,
    tell_repeats,
    write_run,
)
from sample import continue_texts
from schedule import RECIPES, Stage, learning_rate, training_flops
from settings import (
    FIELDS,
    MODES,
    Settings,
    check_same_settings,
    flag,
    make_parser,
    resolve,
)

# --------------------------------------------------------------------------------------------------
# 1. The parts of a step


def describe_config(config: FLMConfig) -> str:
    size = count_parameters(config)
    return f"{config.n_layers} layers of width {config.d_model}, {size:,} parameters"


def allocate(
    config: FLMConfig, machine: Machine, world: World = World(), compiled: bool = False
) -> Worker:
    """empty_worker for training. Raises ValueError where weights, gradients and AdamW's two moments
    cannot fit into the memory."""
    layout = world.layout
    pieces = layout.tp * layout.pp * (layout.dp if layout.sharded else 1)
    need = 4 * machine.weights.itemsize * count_parameters(config) / pieces
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


def make_optimizer(worker: Worker, s: Settings) -> torch.optim.AdamW:
    """AdamW over muP's groups of parameters, with the paper's betas (section 2.4)."""
    groups = [muP.param_groups(part, s.lr, s.weight_decay) for part in worker.parts]
    return torch.optim.AdamW(itertools.chain(*groups), betas=(0.9, 0.95), fused=True)


class NonFinite(RuntimeError):
    """The loss or the norm of the gradient is not a finite number."""


def update(
    worker: Worker,
    optimizer: torch.optim.Optimizer,
    clip: float,
    lr: float,
    nats: float,
    count: int,
    *numbers: float,
) -> tuple[float, ...]:
    """Check, clip, AdamW. Returns (loss in nats per supervised token, norm of the gradient before
    clipping), both of the whole batch, and the sums of `numbers` over all ranks.

    nats, count: what worker.gradients returned on this rank.
    Raises NonFinite on every rank, with the weights untouched, where either is not finite."""
    nats, square, *sums = worker.world.sum(nats, worker.grad_square(), *numbers)
    loss = nats / max(1, count)
    norm = math.sqrt(square) if square >= 0 else square  # NaN is not >= 0
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NonFinite(f"loss {loss}, gradient norm {norm}")
    parameters = [p for _, p in worker.named]
    total = torch.tensor(norm, dtype=parameters[0].dtype, device=worker.device)
    torch.nn.utils.clip_grads_with_norm_(parameters, clip, total)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm, *sums


# --------------------------------------------------------------------------------------------------
# 2. The run


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
        self.decay_step = None  # the last one before wsd's decay; its checkpoint is kept
        if settings.lr_decay is not None:
            self.decay_step = schedule.decay_step(stages, settings.lr_decay)
        self.worker = self.optimizer = None  # see build
        self.metrics = self.bar = None  # the open log and the progress bar; see train
        self.signals = []  # the numbers of those that this process has received
        self.asked = [0, 0]  # see questions
        self.saved, self.save_by = None, math.inf  # the newest checkpoint's step; time of the next
        self.warned = False  # of a utilisation that cannot be

    @property
    def stage(self) -> Stage:
        return self.stages[self.state.stage]

    @property
    def checkpoint(self) -> Path:
        """The step folder of the state that the run is in."""
        return self.folder / checkpoint.step_name(self.state.step)

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

        # This dp rank's rows, (B/dp, T) each.
        rows = {"rank": world.at("dp"), "ranks": world.layout.dp}
        rows["teacher_fraction"] = s.teacher_fraction
        tokens, targets = self.corpus.batch_ahead(s.seed, state.samples, B, **rows)

        # Forward and backward; check, clip, AdamW.
        micro = parallel.micro_rows(world.layout, B, s.micro_batch)
        cut = {"documents": self.corpus.documents(tokens)}
        nats, count = self.worker.gradients(tokens, targets, micro, self.begin_asking, **cut)
        lr = learning_rate(self.stages, state.samples + B, s.min_lr, s.lr_decay)
        step = self.worker, self.optimizer, s.clip, lr, nats, count
        loss, norm, *self.asked = update(*step, *self.questions())

        if self.is_sound(loss):  # the weights that the step began with had this loss
            self.remove_older_checkpoints()
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
            supervised=count,
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

    def questions(self) -> tuple[int, bool]:
        """Numbers of this rank, which all ranks add up: signals that it has received; on rank 0,
        whether a checkpoint is due by its clock. The sums are `asked`; the end of a step has them,
        with those of loss and norm."""
        return len(self.signals), self.world.rank == 0 and time.monotonic() > self.save_by

    def ask(self):
        """The same after what may have taken long."""
        self.asked = self.world.sum(*self.questions())

    def begin_asking(self) -> Callable[[], bool]:
        """Begin to ask all ranks whether one has received a signal. Returns a function that waits
        for the answer."""
        signals = self.world.begin_sum(len(self.signals))
        return lambda: signals()[0] > 0

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
            checkpoint.write_checkpoint(self.checkpoint, tensors, info, self.world)
            self.saved = self.state.step
        self.save_by = time.monotonic() + 60 * self.settings.save_minutes

    def is_sound(self, loss: float) -> bool:
        """Whether weights with this loss are worth going back to: not if they are twice as bad as a
        blind guess. A run that diverges may go on for long before a number is not finite."""
        return loss < 2 * math.log(self.stage.config.vocab_size)

    def remove_older_checkpoints(self):
        """Keep the newest checkpoints, if one of them is of this step, whose weights are sound."""
        if self.saved == self.state.step:
            options = self.folder, self.settings.keep, self.decay_step
            self.world.on_rank_0(checkpoint.remove_old_checkpoints, *options)

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
        info = grow.grow_checkpoint(self.checkpoint, config, grown, world=self.world, **options)
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

    def next_layout(self) -> str | None:
        """The options of the layout that the next stage names, if it is neither that of this job
        nor that of this stage: then the job ends, and the next job begins the stage on it."""
        following = self.stages[self.state.stage + 1]
        wanted = {k: getattr(following, k) for k in ("dp", "tp", "pp") if getattr(following, k)}
        for place in (self.world.layout, self.stage):
            if self.world.size == 1 or all(getattr(place, k) == n for k, n in wanted.items()):
                return None
        return " ".join(f"--{k} {n}" for k, n in wanted.items())

    def set_diverged_aside(self) -> str | None:
        """The newest checkpoint whose next step had a sound loss. Newer ones get another name, and
        so are no checkpoints any more; nothing happens where none is sound."""
        log = read_log(self.folder)
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
        s, sound = self.settings, self.world.on_rank_0(self.set_diverged_aside)
        text = f"step {self.state.step + 1} stopped before the optimizer: {error}.\n"
        fresh = (
            f"begin a new run with a smaller --lr (now {s.lr:g}), a longer --warmup (now "
            f"{s.warmup} samples) or --dtype float32"
        )
        if not sound:
            return f"{text}No checkpoint is sound: {fresh}"
        lower = min(s.lr / 10, RECIPES[s.preset]["lr"])
        go_on = f"{resume_command(self.world, self.folder)} --lr {lower:g}"
        return (
            f"{text}The newest sound checkpoint is {sound}; newer ones are named .diverged now. Go "
            f"on from it with a smaller learning rate:\n  {go_on}\nor {fresh}"
        )


# --------------------------------------------------------------------------------------------------
# 3. The loop


def read_state(source: str | None, resume: bool, stages: list[Stage]) -> tuple:
    """Where a run begins: (its RunState, the checkpoint, the checkpoint's tokenizer)."""
    if source is None:
        return RunState(), None, None
    path = find_checkpoint(source)
    info = read_info(path)
    state = RunState(samples=info["samples"], growth=info["growth"])
    if resume:
        state.step, state.stage = info["step"], info["stage"]
        if FLMConfig.from_dict(info["config"]) != stages[state.stage].config:
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
    if s.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the only switch of cuBLAS
        torch.use_deterministic_algorithms(True)
    machine, world = set_up(s, stages, world)

    if resume:
        world.on_rank_0(lock_folder, Path(s.out), stack)
    out = s.out if resume else world.on_rank_0(claim_folder, s, stack)
    if world.size > 1:
        lock = world.on_rank_0(Path.read_text, Path(out) / "lock")
        world.raise_on_all_ranks(check_shared, Path(out), lock)
    s = dataclasses.replace(s, dtype=name_of(machine.dtype), out=out)
    text, digest = world.on_rank_0(find_text, Path(out), s.data) if resume else (s.data, None)
    options = stages[-1].config, world, s.document_mask
    corpus = open_corpus(text, s.tokenizer, s.tokenizer_file, *options)
    check_corpus(s, corpus, digest)
    tell_repeats(corpus, stages[-1].end, s.teacher_fraction)
    source = out if resume else s.init_from
    state, path, tokenizer = world.raise_on_all_ranks(read_state, source, resume, stages)
    if path:
        check_tokenizer(corpus, tokenizer, path)

    run = run_class(s, stages, world, machine, corpus, state)
    run.build(path)
    if resume:
        run.saved = state.step
        world.on_rank_0(cut_log, run.folder, state.step, state.stage)
    world.on_rank_0(write_run, run.folder, s, stages, machine, corpus)
    print(describe_run(run, resume))
    log = run.folder / "metrics.jsonl" if world.rank == 0 else os.devnull
    run.metrics = stack.enter_context(open(log, "a"))
    run.save()  # a disk that cannot take a checkpoint shows now, not in an hour
    if world.size > 1:
        world.raise_on_all_ranks(parallel.redirect_library_output, run.folder, world.rank)
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
        f"  layout    {run.world.layout}; what libraries print: {run.folder}/rank-*.log",
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
            while state.step < run.last_step and state.step != stop_at and not run.asked[0]:
                if run.growth_is_due():
                    move = run.next_layout()
                    if move:
                        break
                    run.grow()
                run.train_step()
                # The log comes before the checkpoint. On --resume, newer lines of the log are
                # dropped and written again, so no evaluation is lost.
                last = state.step == run.last_step
                if last or state.step % s.eval_every == 0:
                    result = run.evaluate()
                    run.ask()
                due = last or state.step % s.save_every == 0 or state.step == run.decay_step
                if due or run.asked[1]:
                    run.save()
                    run.ask()
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
            run.remove_older_checkpoints()
        signals = {} if finished else dict(enumerate(run.world.gather(run.signals[:1])))
    return result | {
        "step": state.step,
        "samples": state.samples,
        "folder": str(run.folder),
        "signals": {rank: numbers[0] for rank, numbers in signals.items() if numbers},
        "move": move,
    }


# --------------------------------------------------------------------------------------------------
# 4. The benchmark


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
    for _ in range(rounds + 2):
        forward, _ = timed(device, worker.forward, *batch)
        both, found = timed(device, worker.gradients, *batch)
        optimize, _ = timed(device, update, worker, optimizer, s.clip, s.lr, *found)
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


# --------------------------------------------------------------------------------------------------
# 5. The command line


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
    room = read_run(result["folder"])[1][-1].config.max_seq_len
    words = ' --prompt "def "' if room > 4 else ""  # at most 4 tokens, and one to write
    longer = f"  train it twice as long          {go_on} --steps {2 * step}\n"
    print(
        f"\nWhat next?\n"
        f"  let it continue your words      python sample.py {folder}{words}\n"
        f"{longer if s.lr_schedule == 'cosine' else ''}"
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
        print(f"train.py: {text}", file=sys.stderr)
    return code


def describe_error(error: Exception, world: World) -> tuple[str, int]:
    """What this rank prints of an error (nothing where another rank does), and the exit code: 2 for
    a mistake, which torchrun does not repeat (parallel.leave), 1 for a fault, after which it may
    start again. An error that nobody but its author can mend is raised again."""
    for cause in checkpoint.causes(error):  # a rank may be lost in the middle of a save
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


def launch(main: Callable[..., int] = main):
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
                print(f"train.py: {error}", file=sys.stderr)
                return 1
        return call_main(main, world)

    try:
        console.run(start, "interrupted; what was saved before is whole")
    except SystemExit as end:
        if torchrun:
            parallel.leave(world, end.code)
        raise


if __name__ == "__main__":
    launch()
