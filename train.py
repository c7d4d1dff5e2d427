"""train.py - the main job: train FLM-101B's model on text (arXiv 2309.03852, sections 2.3, 2.4, 3).

    python train.py                          a small model on Python's own source, in minutes
    python train.py --data corpora/mine      on text that data.py prepared
    python train.py --resume runs/demo       go on exactly where a run stopped
    python train.py --eval-only runs/demo    held-out loss of a checkpoint

Read it from top to bottom. The options stand in settings.py, device and arithmetic in machine.py,
what a run keeps on the disk in run_folder.py, what it shows in watch.py, the held-out loss (and
--eval-only) in evaluation.py.

    1. The parts of a step     this rank's share of the model, the optimizer, the update
    2. The run                 RunState and Run; the whole step is Run.train_step
    3. The loop                from the settings to the last checkpoint: train
    4. The command line

Letters as in flm.py: B batch, in rows of T tokens. A row is a "sample"; everything is counted in
samples. What the paper says of training is here: AdamW (0.9, 0.95), decay 0.1, clipping at 1.0, a
cosine to 6e-6 / 4e-4 of the peak after a warm-up in samples, bf16 arithmetic over fp32 weights.
There is no dropout: the paper gives no rate.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

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
from flm import FLMConfig, count_parameters, growth_mask
from launch import launch
from machine import Machine, memory_size, name_of, now, set_up
from parallel import NonFinite, Worker, World
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
    print_repeats,
    resume_command,
    resumed,
    resumed_stages,
    set_diverged_aside,
    write_run,
)
from schedule import RECIPES, Stage, learning_rate, training_flops
from settings import (
    FIELDS,
    MODES,
    Settings,
    check_same_settings,
    flag,
    make_parser,
    resolve,
    with_file,
)
from watch import Watch, describe_config, describe_run, describe_start, print_end, refuse_board

# --------------------------------------------------------------------------------------------------
# 1. The parts of a step


def allocate(
    config: FLMConfig, machine: Machine, world: World = World(), compiled: bool = False
) -> Worker:
    """empty_worker for training. Raises ValueError where weights, gradients and AdamW's two moments
    cannot fit into the memory; on a CPU, with the copy of all but the gradients that a save makes.
    """
    layout, cpu = world.layout, machine.device.type == "cpu"
    pieces = layout.tp * layout.pp * (layout.dp if layout.sharded else 1)
    need = (7 if cpu else 4) * machine.weights.itemsize * count_parameters(config) / pieces
    have = (memory_size(machine.device) or math.inf) / (world.neighbours if cpu else 1)
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


class Asked(NamedTuple):
    """What all ranks know of each other since the end of a step: sums over the ranks."""

    signals: float = 0  # that ranks have received
    due: float = 0  # 1: by the clock of rank 0 it is time for a checkpoint
    written: float = 0  # 1: the checkpoint that is being written is complete on rank 0


class Writing(NamedTuple):
    """The checkpoint that is being written; see checkpoint.write_in_background."""

    step: int
    done: Callable[[], bool]
    wait: Callable[[], None]


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
        self.watch = None  # the screen and the log; see open_run
        self.received = []  # the numbers of the signals that this process has received
        self.asked = Asked()
        self.saved, self.save_by = None, math.inf  # step of the newest checkpoint; time of the next
        self.writing: Writing | None = None
        self.sound = None  # step of the newest one whose weights have shown a sound loss

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
        self.worker = world.raise_on_all_ranks(
            allocate, self.stage.config, self.machine, world, s.compile
        )
        self.optimizer = make_optimizer(self.worker, s)
        if path is None:
            self.worker.init_weights(s.seed)
        else:
            world.raise_on_all_ranks(
                checkpoint.read_training, self.worker.named, self.optimizer, path
            )
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
        tokens, targets = self.corpus.batch_ahead(
            s.seed,
            state.samples,
            B,
            rank=world.at("dp"),
            ranks=world.layout.dp,
            teacher_fraction=s.teacher_fraction,
        )

        # Forward and backward; check, clip, AdamW.
        micro = parallel.micro_rows(world.layout, B, s.micro_batch)
        documents = self.corpus.documents(tokens)
        nats, count = self.worker.gradients(
            tokens, targets, micro, self.begin_asking, documents=documents
        )
        lr = learning_rate(self.stages, state.samples + B, s.min_lr, s.lr_decay)
        # The update sums numbers over all ranks; the questions go with them, at no extra wait.
        loss, norm, *answers = update(
            self.worker, self.optimizer, s.clip, lr, nats, count, *self.questions()
        )
        self.asked = Asked(*answers)
        self.note_sound(loss)
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

    # ----------------------------------------------------------------------------------------------
    # Between two steps

    def questions(self) -> Asked:
        """This rank's part of the sums in `asked`."""
        rank_0, written = self.world.rank == 0, bool(self.writing) and self.writing.done()
        due = time.monotonic() > self.save_by
        return Asked(len(self.received), rank_0 and due, rank_0 and written)

    def ask(self):
        """Ask all ranks again, after what may have taken long."""
        self.asked = Asked(*self.world.sum(*self.questions()))

    def begin_asking(self) -> Callable[[], bool]:
        """Begin to ask all ranks whether one has received a signal. Returns a function that waits
        for the answer."""
        signals = self.world.begin_sum(len(self.received))
        return lambda: signals()[0] > 0

    def log(self, **values):
        """One line of the log."""
        self.watch.log({"step": self.state.step, "samples": self.state.samples} | values)

    def held_out(self, worker: Worker) -> dict:
        """The held-out loss of this worker; see evaluate."""
        s = self.settings
        micro = parallel.micro_rows(self.world.layout, s.batch_size, s.micro_batch)
        return evaluate(worker, self.corpus, s.eval_rows, s.eval_batch or micro)

    def evaluate(self) -> dict:
        """Evaluate, log, print; measure the machine again. Raises NonFinite."""
        self.watch.doing("evaluating")
        result = self.held_out(self.worker)
        if not math.isfinite(result["val_loss"]):
            raise NonFinite(f"held-out loss {result['val_loss']} after step {self.state.step}")
        self.log(**result)
        self.watch.say(f"step {self.state.step:>6}: {describe(result)}")
        self.machine = self.machine.measure_again(self.world)
        return result

    def save(self):
        """Begin to write the checkpoint of this step, if there is none yet. It is a checkpoint when
        it is whole: see finish_save."""
        self.finish_save()
        step = self.state.step
        if self.saved != step:
            info = dataclasses.asdict(self.state) | {
                "config": self.stage.config.to_dict(),
                "tokenizer": self.corpus.tokenizer.name,
                "dtype": name_of(self.machine.weights),
                "layout": str(self.world.layout),
                "torch": torch.__version__,
            }
            tensors = checkpoint.training_tensors(self.worker.named, self.optimizer)
            written = checkpoint.write_in_background(self.checkpoint, tensors, info, self.world)
            self.writing = Writing(step, *written)
        self.save_by = time.monotonic() + 60 * self.settings.save_minutes

    def finish_save(self):
        """Wait until the checkpoint that is being written, if there is one, is whole. Raises
        OSError, on all ranks, where it cannot be written."""
        if self.writing:
            writing, self.writing = self.writing, None
            writing.wait()
            self.saved = writing.step
            self.remove_older_checkpoints()

    def save_and_wait(self):
        """The checkpoint of this step, whole."""
        self.save()
        self.finish_save()

    def close(self):
        """Wait until the thread that writes has ended: only then may the lock go, or checkpoints
        get other names."""
        if self.writing:
            with contextlib.suppress(OSError):
                self.writing.wait()

    def is_sound(self, loss: float) -> bool:
        """Whether weights with this loss are worth going back to: not if they are twice as bad as a
        blind guess. A run that diverges may go on for long before a number is not finite."""
        return loss < 2 * math.log(self.stage.config.vocab_size)

    def note_sound(self, loss: float):
        """The weights from before this step had this loss. If they are those of the newest
        checkpoint, and it is sound, older ones may go."""
        newest = self.writing.step if self.writing else self.saved
        if newest == self.state.step and self.is_sound(loss):
            self.sound = newest
            self.remove_older_checkpoints()

    def remove_older_checkpoints(self):
        """Keep the newest checkpoints, if the newest of all is whole and sound."""
        if self.saved == self.sound:
            options = self.folder, self.settings.keep, self.decay_step
            self.world.on_rank_0(checkpoint.remove_old_checkpoints, *options)

    def growth_is_due(self) -> bool:
        following = self.stages[self.state.stage + 1 :]
        return bool(following) and self.state.samples >= following[0].start

    def grow(self):
        """Go on to the next stage: save, grow the checkpoint on disk, load it. The larger model
        computes what the smaller one did; the log has the held-out loss of both, in the full
        precision of the weights."""
        self.save_and_wait()
        self.watch.doing("growing")
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
        self.log(
            stage=self.state.stage, grown=config.to_dict(), loss_before=before, loss_after=after
        )
        self.watch.say(
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

    def advice(self, error: NonFinite) -> str:
        """What to do about numbers that are not finite."""
        self.close()
        s = self.settings
        sound = self.world.on_rank_0(set_diverged_aside, self.folder, self.is_sound)
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
    s: Settings, resume: bool, world: World, stack: contextlib.ExitStack, run_class: type
) -> Run:
    """A run, ready for its first step: settings, layout, machine, folder, corpus, model. All that
    can be refused is refused here. `stack` keeps the lock and the log."""
    begun = world.begun or time.perf_counter()
    check_same_settings(world, s, resume)
    world.on_rank_0(refuse_board, s)
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
    corpus = open_corpus(
        text, s.tokenizer, s.tokenizer_file, stages[-1].config, world, s.document_mask
    )
    check_corpus(s, corpus, digest)
    print_repeats(corpus, stages[-1].end, s.teacher_fraction)
    source = out if resume else s.init_from
    state, path, tokenizer = world.raise_on_all_ranks(read_state, source, resume, stages)
    if path:
        check_tokenizer(corpus, tokenizer, path)

    run = run_class(s, stages, world, machine, corpus, state)
    stack.callback(run.close)
    print(describe_run(s, stages, machine, world, corpus, state.samples, resume))
    run.build(path)
    if resume:
        run.saved = state.step
        world.on_rank_0(cut_log, run.folder, state.step, state.stage)
    world.on_rank_0(write_run, run.folder, s, stages, machine, corpus)
    run.save_and_wait()  # a disk that cannot take a checkpoint shows now, not in an hour
    run.watch = Watch(s, stages, world, state.step, state.samples, stack)
    seconds = time.perf_counter() - begun
    print(describe_start(world, machine.device, run.worker.named, seconds))
    if world.size > 1:
        world.raise_on_all_ranks(parallel.redirect_library_output, run.folder, world.rank)
    return run


def loop(run: Run, stop_at: int | None) -> tuple[dict, str | None]:
    """Train until the end of the run, a signal, the step `stop_at`, or a stage that asks for
    another layout. Returns (the last evaluation, that layout)."""
    s, state, result = run.settings, run.state, {}
    while state.step < run.last_step and state.step != stop_at and not run.asked.signals:
        if run.growth_is_due():
            move = run.next_layout()
            if move:
                return result, move
            run.grow()
        try:
            run.train_step()
        except parallel.Stopped:
            break  # half a step is thrown away; the weights are those from before it
        # The log comes before the checkpoint. On --resume, newer lines of the log are dropped and
        # written again, so no evaluation is lost.
        last = state.step == run.last_step
        if last or state.step % s.eval_every == 0:
            result = run.evaluate()
            run.ask()
        if run.asked.written:
            run.finish_save()
        due = last or state.step % s.save_every == 0 or state.step == run.decay_step
        if due or run.asked.due:
            run.save()
            run.ask()
    return result, None


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
        state = run.state
        stack.enter_context(console.receive_signals(run.received))
        try:
            result, move = loop(run, stop_at)
            finished = state.step == run.last_step
            if finished:
                run.sound = state.step
            run.save_and_wait()
        except NonFinite as error:
            raise NonFinite(run.advice(error)) from None
        except OSError as error:  # a full disk, a closed terminal
            if run.world.size == 1:
                with contextlib.suppress(OSError):
                    run.save_and_wait()
            go_on = resume_command(run.world, run.folder)
            raise OSError(f"{error}\nsaved at step {run.saved}; to go on: {go_on}") from error
        signals = {} if finished else dict(enumerate(run.world.gather(run.received[:1])))
    return result | {
        "step": state.step,
        "samples": state.samples,
        "folder": str(run.folder),
        "signals": {rank: numbers[0] for rank, numbers in signals.items() if numbers},
        "move": move,
    }


# --------------------------------------------------------------------------------------------------
# 4. The command line


def main(argv=None, world: World = World(), run_class: type[Run] = Run) -> int:
    """The command line; returns the exit code."""
    given = vars(make_parser().parse_args(argv))
    mode = next((name for name in MODES if name in given), None)
    value = given.pop(mode, None)
    if mode == "eval_only":
        used = {field.name for field in FIELDS if field.metadata.get("evaluate")}
        extra = ", ".join(map(flag, sorted(set(given) - used)))
        refuse([f"--eval-only makes no use of {extra}: leave it out"] if extra else [])
        eval_only(value, given, world)
        return 0
    if mode == "resume" and "settings" in given:
        raise ValueError("--settings: a run that goes on has its own settings, leave it out")
    given = world.raise_on_all_ranks(with_file, given)
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
    return print_end(result, s, world, time.perf_counter() - start)


if __name__ == "__main__":
    launch(main)
