"""lab/cluster.py - a cluster that is not there: rehearsal, timetable of a pipeline, trace."""
from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import inspect
import itertools
import math
import multiprocessing
import os
import sys
import types
import weakref
from collections import Counter
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import console
import parallel
import train
from flm import FLM, FLMConfig, forward_flops, loss_sum
from parallel import SCHEDULES, Layout, Worker, World, build, check, local, micro_rows


UNITS = {"F": 1, "B": 2, "I": 1, "W": 1}     # time of a forward pass, of a whole backward pass and of its two halves


def timetable(layout: Layout, n_microbatches: int) -> tuple[list[list[tuple]], float]:
    """When each process of a pipeline computes what, where sending takes no time and a backward pass twice a forward one.

    Returns (rows, bubble): for each of the pp processes its work in order, (start, kind, stage, micro-batch) with kind F (forward),
    B (backward), or I and W (the halves of a backward pass: gradients of the inputs, of the weights) and start in units of one
    forward pass through one stage; and the share of all processes' time that is idle. The order of work is that of PyTorch's
    schedules, the one that a run follows. Raises ValueError for what the schedule cannot do."""
    problems = pipeline_problems(layout, n_microbatches)
    if problems:
        raise ValueError("this pipeline cannot be drawn:\n  " + "\n  ".join(problems))
    # A schedule asks its stages for these alone until it runs.
    stages = [types.SimpleNamespace(stage_index=i, num_stages=layout.stages, group_size=layout.pp, group_rank=0, submod=None,
                                    is_first=i == 0, is_last=i == layout.stages - 1) for i in layout.stage_ids(0)]
    name = layout.schedule if layout.pp > 1 else "1F1B"
    schedule = get_schedule_class(name)(stages if layout.stages > layout.pp else stages[0], n_microbatches, loss_fn=loss_sum)
    waiting = [[(action.computation_type.value, action.stage_index, action.microbatch_index) for action in actions
                if action is not None and action.computation_type.value in UNITS] for _, actions in sorted(schedule.pipeline_order.items())]
    if name == "1F1B":                           # PyTorch 2.13 lists the last stage's forward passes as 1 ... m; it runs 0 ... m-1
        count = itertools.count()
        waiting[-1] = [(kind, stage, next(count) if kind == "F" else i) for kind, stage, i in waiting[-1]]
    done, rows, clock = {}, [[] for _ in waiting], [0] * layout.pp

    def ready(kind, stage, i):
        """When the work that this needs is done; None while it is not."""
        if kind == "F":
            return done.get(("F", stage - 1, i)) if stage else 0
        if kind == "W":
            return done.get(("I", stage, i))
        if stage == layout.stages - 1:
            return done.get(("F", stage, i))
        return done.get(("B", stage + 1, i), done.get(("I", stage + 1, i)))

    while any(waiting):
        before = len(done)
        for rank, work in enumerate(waiting):
            while work and (moment := ready(*work[0])) is not None:
                task, start = work.pop(0), max(clock[rank], moment)
                rows[rank].append((start, *task))
                clock[rank] = done[task] = start + UNITS[task[0]]
        assert len(done) > before, "a schedule whose processes wait for each other"
    busy = sum(UNITS[kind] for row in rows for _, kind, _, _ in row)
    return rows, 1 - busy / (layout.pp * max(clock))


def pipeline_problems(layout: Layout, n_microbatches: int) -> list[str]:
    if layout.schedule not in SCHEDULES:
        return [f"--schedule {layout.schedule}: there are {', '.join(SCHEDULES)}"]
    problems = [f"--{name} {n}: must be at least 1" for name, n in (("pp", layout.pp), ("micro-batches", n_microbatches)) if n < 1]
    if not problems and n_microbatches < layout.stages:
        problems.append(f"--micro-batches {n_microbatches}: --pp {layout.pp} --schedule {layout.schedule} has {layout.stages} stages "
                        f"and needs at least {layout.stages}")
    elif not problems and layout.stages > layout.pp and n_microbatches % layout.pp:
        problems.append(f"--micro-batches {n_microbatches}: must be a multiple of --pp {layout.pp} for --schedule {layout.schedule}")
    return problems


def closed_bubble(layout: Layout, n_microbatches: int) -> tuple[str, float] | None:
    """The formula for the bubble and its value; None for the schedules that have none (zero-bubble ones)."""
    p, m, v = layout.pp, n_microbatches, SCHEDULES[layout.schedule]
    if "ZB" in layout.schedule or "ZeroBubble" in layout.schedule:
        return None
    return ("(p-1)/(m+p-1)" if v == 1 else f"(p-1)/({v}m+p-1)"), (p - 1) / (v * m + p - 1)


def draw(layout: Layout, n_microbatches: int) -> str:
    """The timetable as text: a row per process, a column per unit of time."""
    rows, bubble = timetable(layout, n_microbatches)
    end = max(start + UNITS[kind] for row in rows for start, kind, _, _ in row)
    several = layout.stages > layout.pp
    grid = [["."] * end for _ in rows]
    for cells, row in zip(grid, rows):
        for start, kind, stage, i in row:
            cells[start:start + UNITS[kind]] = [f"{kind}{i}" + f":{stage}" * several] + ["-"] * (UNITS[kind] - 1)
    width = max(len(cell) for cells in grid for cell in cells)
    lines = [f"process {rank}  " + " ".join(cell.ljust(width) for cell in cells).rstrip() for rank, cells in enumerate(grid)]
    formula = closed_bubble(layout, n_microbatches)
    legend = [f"F3 the forward pass of micro-batch 3 through a stage, 1 unit of time; B3 the backward pass, {UNITS['B']} units"]
    if any(kind == "W" for row in rows for _, kind, _, _ in row):
        legend += ["I3 and W3 its halves, 1 unit each: the gradients of the inputs, for which a neighbour waits, and of the weights"]
    legend += ["F3:5 the same in stage 5; a process holds two"] * several
    told = f"{formula[0]} = {formula[1]:.1%}" if formula else "no closed formula"
    title = f"pp {layout.pp}, {n_microbatches} micro-batches, {layout.schedule}: {end} units of time, bubble {bubble:.1%} ({told})"
    return "\n".join([title, "", *lines, "", *legend])


class Collectives(TorchDispatchMode):
    """Counts what this process says to others: calls and bytes by (axis, kind), axis dp, tp or pp ("world" for any other group),
    kind all-gather, reduce-scatter, all-reduce, broadcast, send or receive. The bytes are those of the whole tensor: what an
    all-gather gives, what a reduce-scatter takes.

    tell: called with one line for each (see `trace`)."""

    KINDS = (("allgather", "all-gather"), ("reducescatter", "reduce-scatter"), ("allreduce", "all-reduce"), ("broadcast", "broadcast"),
             ("send", "send"), ("recv", "receive"))

    def __init__(self, worker: Worker, tell=None, step: int = 0):
        super().__init__()
        world = worker.world
        self.axes = {world.mesh[axis].get_group().group_name: axis for axis in ("dp", "tp", "pp")} if world.mesh is not None else {}
        if worker.tie is not None:
            self.axes[worker.tie.group_name] = "pp"      # the tied embedding's two ends
        self.who = f"rank {world.rank} (" + ", ".join(f"{axis} {world.at(axis)}" for axis in ("pp", "dp", "tp")) + f")  step {step}"
        self.calls, self.bytes, self.tell, self.micro, self.pass_of = Counter(), Counter(), tell, None, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented                # it comes back with what the processes hold
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._overloadpacket.__name__.replace("_", "")
            kind = next((kind for part, kind in self.KINDS if part in name), None)
            if kind is not None:
                self._count(kind, args, out)
        return out

    def _count(self, kind, args, out):
        group = next(name for name in map(group_name, args) if name is not None)
        key = (self.axes.get(group, "world"), kind)
        tensors = max(([t for t in tree_leaves(side) if isinstance(t, torch.Tensor)] for side in (*args, out)), key=nbytes)
        self.calls[key] += 1
        self.bytes[key] += nbytes(tensors)
        if self.tell is None:
            return
        backward = torch._C._current_graph_task_id() != -1       # no public way to ask whether autograd is at work
        where = "" if self.micro is None else f"micro-batch {self.micro} {'backward' if backward else 'forward'}"
        for t in tensors:                        # sends and receives go in batches, of two passes at once: each tensor knows its own
            where = self.pass_of.pop(id(t), where)
            self.tell(f"{self.who}  {where:<23}  {key[0]:<5} {kind:<14} {str(tuple(t.shape)):<20} {str(t.dtype)[6:]:<9} "
                      f"{nbytes([t]):,} bytes")


@contextlib.contextmanager
def trace(worker: Worker, step: int, tell=None):
    """Inside, one line for each send, receive and collective of this process: rank and place, step, micro-batch and pass, axis, kind,
    shape, dtype and bytes of the tensor. tell(line): by default to the screen. Yields the `Collectives` that counts.

    A compiled block talks past this: leave --compile out."""
    said = Collectives(worker, tell or (lambda line: sys.stdout.write(line + "\n")), step)

    def works(name):                             # a stage's work on a micro-batch, its first argument
        action = getattr(PipelineStage, name)

        def act(stage, micro, *args, **options):
            said.micro = micro
            return action(stage, micro, *args, **options)
        return mock.patch.object(PipelineStage, name, act)

    def sends(name):                             # what a stage will send and receive for a micro-batch
        action = getattr(PipelineStage, name)

        def act(stage, micro):
            ops = action(stage, micro)
            said.pass_of.update((id(op.tensor), f"micro-batch {micro} {'forward' if 'fwd' in name else 'backward'}") for op in ops)
            return ops
        return mock.patch.object(PipelineStage, name, act)

    def counts(module, args):                    # without a pipeline the micro-batches come one after the other
        said.micro = 0 if said.micro is None else said.micro + 1

    def run(*args, **options):
        try:
            return going(*args, **options)
        finally:
            said.micro = None

    going = worker.run
    with contextlib.ExitStack() as stack:
        for name in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
            stack.enter_context(works(name))
        for name in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
            stack.enter_context(sends(name))
        if worker.world.layout.pp == 1:
            stack.callback(worker.parts[0].register_forward_pre_hook(counts, prepend=True).remove)
        stack.enter_context(mock.patch.object(worker, "run", run))
        stack.enter_context(said)
        yield said


def nbytes(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


def group_name(argument) -> str | None:
    """The name of a process group among a collective's arguments, which hold it as a name or boxed."""
    if isinstance(argument, str):
        return argument if argument not in ("sum", "avg", "max", "min") else None
    boxed = isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type())
    return dist.ProcessGroup.unbox(argument).group_name if boxed else None


@contextlib.contextmanager
def alone(config: FLMConfig, layout: Layout, pp_rank: int, micro: int, arithmetic: torch.dtype):
    """This process as the one at (pp_rank, dp 0, tp 0) of a layout whose other processes are not there: what it says to them is lost,
    what it would hear is not written. Yields its World. micro: the rows of its micro-batches."""
    # Only here and in `measure`: names that PyTorch keeps to itself, as they are in 2.13. Training needs none of them.
    from torch.distributed.pipelining.schedules import _PipelineSchedule
    from torch.distributed.pipelining.stage import InferenceMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=pp_rank * layout.dp * layout.tp, world_size=layout.size)
    mesh = init_device_mesh("cpu", (layout.pp, layout.dp, layout.tp), mesh_dim_names=("pp", "dp", "tp"))
    T, asking = config.max_seq_len, PipelineStage
    stream = torch.empty(micro, T // layout.tp if layout.sequence_parallel else T, config.d_model, dtype=arithmetic, device="meta")

    def stage(part, *args, **options):
        """A stage of a pipeline asks its neighbours for shapes in its first step; here it is told."""
        first, last = part.embedding is not None, part.head is not None
        logits = torch.empty(micro, T, config.vocab_size // layout.tp, dtype=arithmetic, device="meta")
        if layout.tp > 1:
            logits = DTensor.from_local(logits, mesh["tp"], [Shard(2)], run_check=False)
        y = (logits if last else stream).detach().requires_grad_()
        x = torch.empty(micro, T, dtype=torch.long, device="meta") if first else stream.detach().requires_grad_()
        return asking(part, *args, input_args=x, output_args=y, input_grads=None if first else stream,
                      output_grads=None if last else stream, **options)

    def static(schedule, stages, *_):            # in place of a vote among the stages: there is no public way to skip it
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    with mock.patch.object(_PipelineSchedule, "_warmup_p2p", static), mock.patch.object(parallel, "PipelineStage", stage):
        yield World(layout, dist.get_rank(), mesh)
    dist.destroy_process_group()


class Memory(TorchDispatchMode):
    """Follows the bytes of all tensors of one FakeTensorMode: `now`, and `peak` since it was last set."""

    def __init__(self, fake):
        super().__init__()
        self.fake, self.alive, self.now, self.peak = fake, {}, 0, 0
        self.resize = torch.UntypedStorage.resize_

    def follow(self, storage: torch.UntypedStorage):
        key, size = storage._cdata, storage.nbytes()     # the storage itself: Python's view of it comes and goes
        if key not in self.alive:
            self.alive[key] = [weakref.ref(storage, functools.partial(self.forget, key)), 0]
        self.now += size - self.alive[key][1]
        self.alive[key][1] = size
        self.peak = max(self.peak, self.now)

    def forget(self, key, _):
        self.now -= self.alive.pop(key)[1]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented                # it comes back with what this process holds
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, out)):
            if isinstance(t, torch.Tensor) and getattr(t, "fake_mode", None) is self.fake:
                self.follow(t.untyped_storage())
        return out

    def resized(self, storage, size):            # fully_shard allocates and frees what it gathers like this, past every dispatch
        self.resize(storage, size)
        if storage._cdata in self.alive:
            self.follow(storage)
        return storage


def measure(world: World, config: FLMConfig, n: int, micro: int, weights: torch.dtype, arithmetic: torch.dtype) -> dict:
    """What a process that is `alone` holds and says in a step of n micro-batches of `micro` rows; sizes in bytes:

    parameters         numbers of the model that lie here; parameters_tp: of which shares, gathered over dp, it computes with
    weights, moments, gradients      as they lie here between the passes and the optimizer's step
    peak, peak_update  largest sum of all tensors alive in the passes, and in the optimizer's step
    said               {"dp all-gather": [calls, bytes], ...} (see Collectives)"""
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
    from torch.distributed.tensor._sharding_prop import ShardingPropagator
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())      # with a ShapeEnv .item() is a symbol, not an error
    memory, allocate, propagate = Memory(fake), FLM.to_empty, ShardingPropagator._propagate_tensor_meta_non_cached

    def to_empty(part, device):
        with fake:
            return allocate(part, device=device)

    def outside(propagator, schema):
        """DTensor's work on shapes has a fake mode of its own: in ours it would count as tensors of the whole, uncut size."""
        with unset_fake_temporarily():
            return propagate(propagator, schema)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(FLM, "to_empty", to_empty))
        stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", lambda storage, size: memory.resized(storage, size)))
        stack.enter_context(mock.patch.object(ShardingPropagator, propagate.__name__, outside))
        stack.enter_context(memory)
        worker = Worker(build(config, world, torch.device("cpu"), weights, arithmetic), world, arithmetic)
        said = stack.enter_context(Collectives(worker))
        stack.enter_context(fake)
        parameters = [p for _, p in worker.named]
        optimizer = torch.optim.AdamW(parameters, fused=True)
        for p in parameters:                     # the moments are there from the second step on: make them
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        tokens = torch.zeros(n * micro, config.max_seq_len, dtype=torch.long)
        said.calls.clear()
        said.bytes.clear()
        gc.collect()
        memory.peak = memory.now
        worker.gradients(tokens, tokens, micro, 1.0)
        peak, memory.peak = memory.peak, memory.now
        optimizer.step()

        def cut(p):                              # by tensor parallelism
            named = zip(p.device_mesh.mesh_dim_names, p.device_mesh.shape, p.placements) if isinstance(p, DTensor) else ()
            return math.prod(size for name, size, placement in named if name == "tp" and not placement.is_replicate())

        return {"parameters": sum(local(p).numel() for p in parameters), "parameters_tp": sum(p.numel() // cut(p) for p in parameters),
                "weights": nbytes([local(p) for p in parameters]), "gradients": nbytes([local(p.grad) for p in parameters]),
                "moments": nbytes([local(t) for state in optimizer.state.values() for name, t in state.items() if name != "step"]),
                "peak": peak, "peak_update": memory.peak,
                "said": {f"{axis} {kind}": [said.calls[axis, kind], said.bytes[axis, kind]] for axis, kind in said.calls}}


def measure_all(config, layout, pp_rank, counts: list[int], micro, weights, arithmetic, checkpointing: list[bool]) -> dict:
    """{(activation checkpointing, micro-batches): measure(...)} for one process. DTensor remembers its first world, so that a process
    can be alone in one only."""
    with alone(config, layout, pp_rank, micro, arithmetic) as world:
        worlds = {again: dataclasses.replace(world, layout=dataclasses.replace(layout, activation_checkpointing=again)) for again in checkpointing}
        return {(again, n): measure(worlds[again], config, n, micro, weights, arithmetic) for again in checkpointing for n in counts}


def line(a, b, at_a, at_b, n):
    """The value at n of the line through (a, at_a) and (b, at_b); for dicts and lists, of each of their numbers."""
    if isinstance(at_a, dict):
        return {key: line(a, b, at_a[key], at_b[key], n) for key in at_a}
    if isinstance(at_a, list):
        return [line(a, b, x, y, n) for x, y in zip(at_a, at_b)]
    return at_a if a == b else at_a + (at_b - at_a) * (n - a) // (b - a)


MODES = {"plain": "without activation checkpointing", "checkpointing": "with activation checkpointing"}


def judge(modes: dict, layout: Layout, memory_gb: float) -> list[str]:
    """The modes that fit the memory; raises ValueError where none does."""
    fitting = [name for name, found in modes.items() if found["peak"] <= memory_gb * 2 ** 30]
    if not fitting:
        raise ValueError(f"{layout}: does not fit GPUs of {memory_gb:g} GiB: "
                         + ", ".join(f"{found['peak'] / 2 ** 30:.2f} GiB {MODES[name]}" for name, found in modes.items())
                         + "; raise --tp or --pp, lower --micro-batch, or cut what tp leaves whole with --sequence-parallel")
    return fitting


def rehearse(config: FLMConfig, layout: Layout, batch_size: int, micro_batch: int | None = None, *, weights: torch.dtype = torch.float32,
             arithmetic: torch.dtype = torch.bfloat16, memory_gb: float = 80, peak: float = 312e12, utilisation: float = 0.6,
             tp_link: float = 200e9, network: float = 25e9) -> dict:
    """Rehearse a training step of a layout of any size on this machine: one process of each pipeline stage, with all its layers and
    few micro-batches; what grows with the micro-batches is measured for two numbers of them and scaled to the real one. With and
    without activation checkpointing, where the schedule allows both.

    memory_gb: of a GPU, in GiB. peak: FLOP/s of a GPU (dense bf16 on the paper's A800); utilisation: the share of it that a GPU
    reaches while it computes. tp_link, network: bytes per second that a GPU sends between processes of tp (A800: NVLink, 400 GB/s
    both ways together) and of dp and pp (ours: 200 Gbit/s each; the paper does not tell). utilisation is our choice as well.
    Nothing is taken to overlap: the time is that of computing, plus that of everything said, plus the pipeline's bubble.

    Returns plain JSON values (see `describe_rehearsal`), sizes in bytes. Raises ValueError where the model cannot lie like that, and
    where it does not fit the memory even with activation checkpointing."""
    problems = check(layout, config, batch_size, micro_batch)
    if layout.dp > 1 and not layout.sharded:
        problems.append(f"--dp {layout.dp} without --shard-optimizer: DistributedDataParallel cannot be rehearsed, its C++ part wants real "
                        "answers; add --shard-optimizer")
    if problems:
        raise ValueError("this layout cannot be rehearsed:\n  " + "\n  ".join(problems))
    micro = micro_rows(layout, batch_size, micro_batch)
    n = batch_size // layout.dp // micro
    # From these on, a process has as many micro-batches under way at once as it ever will, and then one more.
    few = (2, 3) if layout.pp == 1 else (layout.pp + 1, layout.pp + 2) if layout.stages == layout.pp else (2 * layout.pp, 3 * layout.pp)
    a, b = few if n > few[1] else (n, n)
    checkpointing = [False] if "ZeroBubble" in layout.schedule and layout.pp > 1 else [False, True]
    jobs = [(config, layout, rank, sorted({a, b}), micro, weights, arithmetic, checkpointing) for rank in range(layout.pp)]
    # One process each (see measure_all), started afresh: a forked one would inherit this one's threads and process groups.
    workers, spawn = min(len(jobs), os.cpu_count() or 1), multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, max_tasks_per_child=1) as pool:
        measured = list(pool.map(measure_all, *zip(*jobs)))
    modes = {}
    for again in checkpointing:
        processes = []
        for found in measured:
            process = line(a, b, found[again, a], found[again, b], n)
            process["peak"] = max(process["peak"], process["peak_update"])
            processes.append(process)
        modes["checkpointing" if again else "plain"] = {"processes": processes, "peak": max(process["peak"] for process in processes)}
    fitting, (_, bubble) = judge(modes, layout, memory_gb), timetable(layout, n)
    mode = "checkpointing" if layout.activation_checkpointing or "plain" not in fitting else "plain"
    T, tokens, processes = config.max_seq_len, n * micro * config.max_seq_len, modes[mode]["processes"]
    head = 2 * config.vocab_size * config.d_model        # forward_flops = n_layers * block + head
    block, times = (forward_flops(config, T) - head) // config.n_layers, []
    for rank, process in enumerate(processes):
        stages = layout.stage_ids(rank)
        blocks = config.n_layers // layout.stages * len(stages) * block * tokens // layout.tp
        process["flop"] = 3 * (blocks + head * (layout.stages - 1 in stages) * tokens // layout.tp)
        computed = process["flop"] + blocks * (mode == "checkpointing")
        sent = sent_bytes(process["said"], layout)
        times.append({"compute": computed / (peak * utilisation), "tp": sent["tp"] / tp_link, "pp": sent["pp"] / network, "dp": sent["dp"] / network})
    time = max(times, key=lambda t: t["compute"] + t["tp"] + t["pp"])                  # the pipeline goes at the pace of its slowest process
    time["bubble"] = (time["compute"] + time["tp"] + time["pp"]) * bubble / (1 - bubble)
    time["step"] = sum(time.values())
    flop, closed = 3 * forward_flops(config, T) * batch_size * T, closed_bubble(layout, n)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in FLM(config).parameters())
    return {"layout": dataclasses.asdict(layout), "description": str(layout), "gpus": layout.size, "memory_gb": memory_gb, "parameters": parameters,
            "weights": str(weights)[6:], "arithmetic": str(arithmetic)[6:], "layers_per_process": config.n_layers // layout.pp,
            "batch_size": batch_size, "seq_len": T, "micro_batch": micro, "micro_batches": n, "measured_micro_batches": sorted({a, b}),
            "modes": modes, "fits": fitting, "mode": mode, "bubble": bubble, "closed_bubble": closed and list(closed), "time": time,
            "flop": flop, "tflops": flop / layout.size / time["step"] / 1e12, "tokens_per_second": batch_size * T / time["step"],
            "peak": peak, "utilisation": utilisation, "tp_link": tp_link, "network": network}


def sent_bytes(said: dict, layout: Layout) -> dict[str, float]:
    """Bytes that leave a process, by axis: around a ring of N processes all but 1/N of a gathered or scattered tensor passes through
    each, of an all-reduced one twice that; what it sends along the pipeline, once."""
    sent = {"dp": 0.0, "tp": 0.0, "pp": 0.0}
    for what, (_, size) in said.items():
        axis, kind = what.split()
        ring = 2 if axis == "pp" else getattr(layout, axis)      # the tied embedding's two ends
        share = {"send": 1, "receive": 0, "all-reduce": 2 * (ring - 1) / ring}.get(kind, (ring - 1) / ring)
        sent[axis] += size * share
    return sent


def describe_rehearsal(r: dict) -> str:
    """The rehearsal's result for a person."""
    layout, mode, plain = Layout(**r["layout"]), r["modes"][r["mode"]], next(iter(r["modes"].values()))
    width, GiB = {"float32": 4, "bfloat16": 2, "float64": 8}, 2 ** 30
    rows = []

    def row(name, values):
        rows.append([name, *values])

    def gib(name, sizes):
        row(name, [f"{size / GiB:.2f}" for size in sizes])

    processes = plain["processes"]
    row("process of the pipeline", [str(i) for i in range(len(processes))])
    row("parameters it computes with, B", [f"{p['parameters_tp'] / 1e9:.3f}" for p in processes])
    row("parameters it holds", [f"{p['parameters']:,}" for p in processes])
    gib(f"weights, {r['weights']}, GiB", [p["weights"] for p in processes])
    gib("AdamW's two moments", [p["moments"] for p in processes])
    gib("gradients", [p["gradients"] for p in processes])
    gathered = [[p["parameters_tp"] * width[dtype] * layout.sharded for p in processes]
                for dtype in (r["arithmetic"], "float32" if r["arithmetic"] != r["weights"] else r["weights"])]
    if layout.sharded:
        gib(f"weights gathered, {r['arithmetic']}", gathered[0])
        gib("gradients gathered, float32", gathered[1])
    for name, found in r["modes"].items():
        gib(f"peak {MODES[name]}", [p["peak"] for p in found["processes"]])
    row("TFLOP of the model", [f"{p['flop'] / 1e12:,.0f}" for p in mode["processes"]])
    for what in sorted({what for p in mode["processes"] for what in p["said"]}):
        said = [p["said"].get(what, (0, 0)) for p in mode["processes"]]
        row(f"{what}, GiB (calls)", [f"{size / GiB:,.2f} ({calls:,})" if calls else "-" for calls, size in said])
    widths = [max(map(len, column)) for column in zip(*rows)]
    t, counts = r["time"], " and ".join(map(str, r["measured_micro_batches"]))
    lines = [f"{r['parameters'] / 1e9:.1f} billion parameters on {r['gpus']} GPUs of {r['memory_gb']:g} GiB: {r['description']}",
             f"a step: {r['batch_size']} rows of {r['seq_len']} tokens, {r['micro_batches']} micro-batches of {r['micro_batch']} per dp rank",
             f"measured on tensors without numbers: one process of each place in the pipeline, all its {r['layers_per_process']} layers, "
             f"{counts} micro-batches" + (f"; what grows with them is scaled to {r['micro_batches']}" if len(r["measured_micro_batches"]) > 1 else ""),
             "", *("  ".join([cells[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(cells[1:], widths[1:]))]) for cells in rows), ""]
    for name, found in r["modes"].items():
        lines.append(f"{MODES[name]}: {found['peak'] / GiB:.1f} GiB of {r['memory_gb']:g}: {'fits' if name in r['fits'] else 'does not fit'}")
    if layout.sharded and layout.dp > 1:
        whole = max(p["peak"] + (layout.dp - 1) * (p["weights"] + p["moments"]) for p in processes) / GiB
        lines.append(f"the distributed optimizer keeps 1/{layout.dp} of the {r['weights']} weights and moments here; whole, they would make "
                     f"{whole:.1f} GiB: " + ("it makes the layout fit" if whole > r["memory_gb"] else "that would fit as well"))
    if "checkpointing" in r["modes"]:
        saved = (plain["peak"] - r["modes"]["checkpointing"]["peak"]) / GiB
        lines.append(f"activation checkpointing saves {saved:.1f} GiB and computes every block's forward pass twice" + ("" if "plain" in r["fits"] else ": it makes the layout fit"))
    lines += ["not in these numbers: fragmentation, the libraries' own buffers, a compiled block's savings", ""]
    closed = f" ({r['closed_bubble'][0]} = {r['closed_bubble'][1]:.2%})" if r["closed_bubble"] else ""
    lines += [f"bubble of the pipeline: {r['bubble']:.2%}{closed}",
              f"a step {MODES[r['mode']]}: {t['step']:.1f} s = {t['compute']:.1f} computing + {t['tp']:.1f} tp + {t['pp']:.1f} pp "
              f"+ {t['bubble']:.1f} bubble + {t['dp']:.1f} dp",
              f"  at {r['peak'] / 1e12:.0f} TFLOP/s, {r['utilisation']:.0%} of it (assumed) while computing, {r['tp_link'] / 1e9:.0f} GB/s each way "
              f"between tp processes, {r['network'] / 1e9:.0f} GB/s (assumed) between others, nothing overlapping",
              f"  {r['flop'] / 1e15:,.0f} PFLOP of the model (closed formula, flm.forward_flops): {r['tflops']:.0f} TFLOP/s per GPU, "
              f"{r['tflops'] * 1e12 / r['peak']:.1%} of its peak; {r['tokens_per_second']:,.0f} tokens/s"]
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="lab.cluster", description="Who computes what, when. Training on many processes is train.py's.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("draw", help="print the timetable of a pipeline and its bubble",
                            description="Print which process of a pipeline computes what at which time, and the share of time it idles.",
                            epilog="example: python parallel.py draw --pp 4 --micro-batches 8 --schedule Interleaved1F1B")
    p.add_argument("--pp", type=int, required=True, metavar="N", help="processes of the pipeline")
    p.add_argument("--micro-batches", type=int, required=True, metavar="N", help="micro-batches of a step")
    p.add_argument("--schedule", default="1F1B", metavar="NAME", help=f"one of {', '.join(SCHEDULES)} (default %(default)s)")
    args = parser.parse_args(argv)
    print(draw(Layout(pp=args.pp, schedule=args.schedule), args.micro_batches))
    return 0


# What --dry-run assumes of a cluster, as rehearse has it: GiB of a GPU, FLOP/s, the share of them that is reached, bytes/s.
CLUSTER = {name: field.default for name, field in inspect.signature(rehearse).parameters.items()
           if field.kind is field.KEYWORD_ONLY and isinstance(field.default, (int, float))}


def dry_run(settings: train.Settings, words: list[str]) -> dict:
    """Rehearse a step of the last stage on a cluster that is not there; prints the report."""
    cluster, problems = {}, []
    for word in words:
        name, _, value = word.partition("=")
        try:
            cluster[name] = float(value)
            if name not in CLUSTER or not 0 < cluster[name] < math.inf:
                raise ValueError
        except ValueError:
            problems.append(f"--dry-run {word}: give FIELD=NUMBER with a number above 0; fields are {', '.join(CLUSTER)}")
    if problems:
        raise ValueError("\n".join(problems))
    s, stages = train.resolve(settings)
    layout = train.plan_layout(s, stages[-1:], (s.dp or 1) * s.tp * s.pp)
    result = rehearse(stages[-1]["config"], layout, stages[-1]["batch_size"], s.micro_batch, **cluster,
                               arithmetic=getattr(torch, "bfloat16" if s.dtype == "auto" else s.dtype),
                               weights=torch.float64 if s.dtype == "float64" else torch.float32)
    print(describe_rehearsal(result))
    return result




if __name__ == "__main__":
    console.run(main)
