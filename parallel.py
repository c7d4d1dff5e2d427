"""parallel.py - one model on many ranks: data, tensor, sequence and pipeline parallelism.

FLM-101B was trained on 24 servers of 8 GPUs with 3D parallelism, sequence parallelism and a
distributed optimizer (arXiv 2309.03852, section 2.4 and Table 2). Here:

    torchrun --standalone --nproc-per-node 8 train.py --dp 2 --tp 2 --pp 2

The model in flm.py knows nothing of this. This file applies a layout to it from outside, with
PyTorch's own engine:

    1. Layout              how many ranks do what; every reason why a layout cannot work
    2. World               this rank among the others: the mesh, sums of plain numbers
    3. tensor parallelism  a table from module name to placement
    4. build_parts         this rank's share of the model, cut and wrapped
    5. Worker              what a rank does in a step
    6. connect, leave      starting and ending together under torchrun; ranks that are lost

A rank is one process, usually with one GPU. The ranks form a mesh with three axes: pp, dp, tp.
With --pp 2 --dp 2 --tp 2:

                   dp 0                    dp 1
             tp 0       tp 1         tp 0       tp 1
          +----------+----------+ +----------+----------+
    pp 0  |  rank 0  |  rank 1  | |  rank 2  |  rank 3  |  embedding, first half of the layers
          +----------+----------+ +----------+----------+
    pp 1  |  rank 4  |  rank 5  | |  rank 6  |  rank 7  |  second half, final LayerNorm, head, loss
          +----------+----------+ +----------+----------+

    along tp (ranks 0 and 1)  each rank holds a shard of every matrix: collectives in every block
    along dp (ranks 0 and 2)  each rank has other rows of the batch: one sum of gradients a step
    along pp (ranks 0 and 4)  each rank has other layers: hidden states go down, gradients go up

Neighbours in rank are neighbours along tp, where the traffic is heaviest. Letters as in flm.py.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import os
import platform
import queue
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import console
import muP
from flm import FLM, IGNORE, FLMConfig, head_loss

# --------------------------------------------------------------------------------------------------
# 1. Layouts

PATIENCE = 10  # seconds after which a rank says for whom it waits

# Pipeline schedule -> how many pipeline stages one rank holds.
PIPELINE_SCHEDULES = {"1F1B": 1, "GPipe": 1, "Interleaved1F1B": 2}


@dataclass(frozen=True)
class Layout:
    """How a model lies on dp * tp * pp ranks."""

    dp: int = 1  # copies of the model, each with its own rows of the batch
    tp: int = 1  # shards of every matrix
    pp: int = 1  # groups of layers
    sequence_parallel: bool = False  # between the cut matrices, each tp rank holds T/tp positions
    shard_optimizer: bool = False  # weights, gradients and AdamW's moments are cut over dp
    reshard: bool = False  # of the weights and gradients, a rank holds one block's whole
    schedule: str = "1F1B"  # the pipeline schedule
    activation_checkpointing: bool = False  # keep a block's input; compute the rest again

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.dp * self.tp * self.pp

    @property
    def pipeline_stages(self) -> int:
        """Number of pipeline stages; 1 without a pipeline."""
        return self.pp * PIPELINE_SCHEDULES[self.schedule] if self.pp > 1 else 1

    @property
    def sharded(self) -> bool:
        """Whether fully_shard holds the weights. Otherwise DistributedDataParallel is enough."""
        return self.shard_optimizer or self.reshard or self.tp > 1 or self.pp > 1

    def stage_ids(self, pp_rank: int) -> list[int]:
        """The pipeline stages on one rank.

        >>> Layout(pp=2, schedule="Interleaved1F1B").stage_ids(0)
        [0, 2]
        """
        return list(range(pp_rank, self.pipeline_stages, self.pp))

    def __str__(self):
        words = [f"dp {self.dp}", f"tp {self.tp}", f"pp {self.pp}"]
        words += ["sequence parallel"] * self.sequence_parallel
        words += ["sharded optimizer"] * (self.sharded and self.dp > 1)
        words += ["resharded"] * self.reshard
        words += [self.schedule] * (self.pp > 1)
        words += ["activation checkpointing"] * self.activation_checkpointing
        return ", ".join(words)


def check_layout(
    layout: Layout, config: FLMConfig, batch_size: int | None, micro_batch: int | None = None
) -> list[str]:
    """Every reason why this model and this batch do not fit the layout, with its numbers. The
    layout's own values are in their ranges, as settings.check_settings wants them.

    batch_size: rows of the whole batch; None for an evaluation, which adds the rows that a layout
    needs. micro_batch: rows of one forward pass on one rank."""
    dp, tp, pp, n_stages = layout.dp, layout.tp, layout.pp, layout.pipeline_stages
    pipeline = f"the {n_stages} pipeline stages of --pp {pp} --schedule {layout.schedule}"
    limits = [
        ("n_heads", config.n_heads, tp, f"--tp {tp}"),
        ("d_ff", config.d_ff, tp, f"--tp {tp}"),
        ("vocab_size", config.vocab_size, tp, f"--tp {tp}"),
        ("n_layers", config.n_layers, n_stages, pipeline),
    ]
    if batch_size is not None:
        limits.append(("--batch-size", batch_size, dp, f"--dp {dp}"))
    if layout.sequence_parallel:
        limits.append(("max_seq_len", config.max_seq_len, tp, f"--tp {tp} (--sequence-parallel)"))
    problems = []
    for name, value, n, what in limits:
        if value % n:
            problems.append(f"{name} {value}: must be a multiple of {what} (remainder {value % n})")
    if layout.sequence_parallel and tp == 1:
        problems.append("--sequence-parallel: needs --tp 2 or more; add --no-sequence-parallel")
    if layout.reshard and (dp == 1 or pp > 1):
        problems.append(
            f"--reshard: needs --dp 2 or more (now {dp}) and --pp 1 (now {pp}); add --no-reshard"
        )
    if batch_size is not None and batch_size % dp == 0:
        problems += check_micro_batches(
            layout, batch_size, micro_rows(layout, batch_size, micro_batch)
        )
    return problems


def check_micro_batches(layout: Layout, batch_size: int, micro: int) -> list[str]:
    """Every reason why the rows of a dp rank do not make micro-batches that the pipeline takes."""
    rows, stages = batch_size // layout.dp, layout.pipeline_stages
    source = f"--batch-size {batch_size} / --dp {layout.dp}"
    if rows % micro:
        return [f"--micro-batch {micro}: must divide the {rows} rows of a dp rank ({source})"]
    n = rows // micro
    found = f"{n} micro-batches ({source} / --micro-batch {micro})"
    pipeline = f"--pp {layout.pp} --schedule {layout.schedule}"
    if layout.pp > 1 and n < stages:
        return [f"{found}: {pipeline} needs at least {stages}, one for each pipeline stage"]
    if stages > layout.pp and n % layout.pp:
        return [f"{found}: {pipeline} needs a multiple of {layout.pp} (remainder {n % layout.pp})"]
    return []


def micro_rows(layout: Layout, batch_size: int, micro_batch: int | None) -> int:
    """Rows of one forward pass: as asked for; else 1 in a pipeline, which needs many micro-batches,
    and all rows of the dp rank without one."""
    return micro_batch or (1 if layout.pp > 1 else batch_size // layout.dp)


def rows_needed(layout: Layout, rows: int, micro: int) -> int:
    """`rows` rounded up to what a pipeline takes: whole micro-batches, enough for its schedule.

    >>> rows_needed(Layout(pp=4), rows=5, micro=2)
    8
    """
    if layout.pp == 1:
        return rows
    unit = layout.pp if layout.pipeline_stages > layout.pp else 1
    n = -(-rows // micro // unit) * unit
    return micro * max(layout.pipeline_stages, n)


# --------------------------------------------------------------------------------------------------
# 2. The world
#
# An error on one rank has to end all ranks, or the others would wait for it. So what may fail is
# called through a method of World:
#
#     raise_on_all_ranks   what every rank does, in less time than a timeout
#     on_all_ranks         what every rank does, and what may take hours; it uses no collective
#     on_rank_0            what rank 0 does for all, and what may take hours
#
# In one process the methods of World do nothing, and no process group exists. A process group of
# one rank would spare World this case, but gloo would then resolve the machine's host name at every
# start (which fails on some laptops), and abort in Python's shutdown one time in five.


@dataclass(frozen=True)
class World:
    """This rank among the others. In one process there is no mesh and no process group."""

    layout: Layout = Layout()
    rank: int = 0
    mesh: DeviceMesh | None = None  # axes pp, dp, tp
    control: dist.ProcessGroup | None = None  # all ranks: plain numbers
    files: dist.ProcessGroup | None = None  # all ranks: checkpoints, which a thread writes
    neighbours: int = 1  # ranks on this machine
    roll_call: dist.ProcessGroup | None = None  # all ranks: who still answers after a failure
    timeout: datetime.timedelta = datetime.timedelta(minutes=10)  # of every wait for another rank
    begun: float | None = None  # when the ranks began to meet, by time.perf_counter

    @property
    def size(self) -> int:
        """Number of ranks that were started."""
        return 1 if self.control is None else self.control.size()

    def at(self, axis: str) -> int:
        """This rank's coordinate along "pp", "dp" or "tp"."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(axis)

    @property
    def last(self) -> bool:
        """Whether this rank has the last pipeline stage, which computes the loss."""
        return self.at("pp") == self.layout.pp - 1

    def begin_sum(self, *numbers: float) -> Callable[[], list[float]]:
        """Begin to sum each number over all ranks, in float64. Returns a function that waits for
        the sums; until it is called, this rank can do something else."""
        if self.control is None:
            return lambda: list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        work = dist.all_reduce(total, group=self.control, async_op=True)

        def wait() -> list[float]:
            work.wait()
            return total.tolist()

        return wait

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over all ranks, in float64."""
        return self.begin_sum(*numbers)()

    def gather(self, value) -> list:
        """Every rank's value, in the order of ranks, on every rank."""
        if self.control is None:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast_from_rank_0(self, value):
        """Rank 0's value, on every rank."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def raise_on_all_ranks(self, action: Callable, *args, **options):
        """Run action(*args, **options) on every rank and return this rank's result.

        A ValueError or OSError of any rank is raised on all ranks, so that no rank waits for one
        that has left. ValueError, with the number of each rank, where the ranks' errors differ."""
        return self.settle(*attempt(action, *args, **options))

    def on_all_ranks(self, action: Callable, *args, **options):
        """raise_on_all_ranks for what may take hours, and uses no collective."""
        with self.all_wait():
            outcome = attempt(action, *args, **options)
        return self.settle(*outcome)

    def settle(self, result, failure: Exception | None):
        """This rank's result where no rank has a failure, else what raise_on_all_ranks raises."""
        failures = self.gather(failure)
        if not any(failures):
            return result
        first_rank = {}  # text of an error -> the first rank that has it
        for rank, error in enumerate(failures):
            if error:
                first_rank.setdefault(str(error), rank)
        if all(failures) and len(first_rank) == 1:
            raise failure
        raise ValueError("\n".join(f"rank {rank}: {text}" for text, rank in first_rank.items()))

    def on_rank_0(self, action: Callable, *args, **options):
        """Run action(*args, **options) on rank 0 alone, which may take hours; its result, or its
        ValueError or OSError, on every rank."""
        outcome = None
        with self.all_wait():
            if self.rank == 0:
                outcome = attempt(action, *args, **options)
        result, failure = self.broadcast_from_rank_0(outcome)
        if failure:
            raise failure
        return result

    @contextlib.contextmanager
    def all_wait(self):
        """What stands inside may take hours on some ranks (to prepare a corpus, to grow a
        checkpoint): no rank leaves before all are done, and each waits as long as the others live.

        A thread tells the others that this rank lives, four times in each timeout. Inside, no
        collective of `control` is possible."""
        if self.control is None:
            yield
            return
        done = threading.Event()

        def say_alive():
            while True:
                done.wait(self.timeout.total_seconds() / 4)
                if all(self.gather(done.is_set())):
                    return

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            others_done = pool.submit(say_alive)
            try:
                yield
            finally:
                done.set()
            others_done.result()  # raises what a lost rank causes


def attempt(action: Callable, *args, **options) -> tuple:
    """(the result of action(*args, **options), None), or (None, its ValueError or OSError)."""
    try:
        return action(*args, **options), None
    except (ValueError, OSError) as error:
        return None, error


def arrange(world: World, layout: Layout, device: torch.device) -> World:
    """The same world with a layout and its mesh. All ranks call this with the same layout."""
    if layout.size == 1:  # no mesh, and nothing to cut the optimizer over
        layout = dataclasses.replace(layout, shard_optimizer=False, reshard=False)
        return dataclasses.replace(world, layout=layout)
    ranks = torch.arange(layout.size).view(layout.pp, layout.dp, layout.tp)
    groups = []
    for axis in range(3):  # not init_device_mesh: its groups would have a timeout of their own
        lines = ranks.movedim(axis, -1).flatten(0, 1).tolist()  # each line: ranks along this axis
        groups.append(dist.new_subgroups_by_enumeration(lines, timeout=world.timeout)[0])
    mesh = DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=("pp", "dp", "tp"))
    return dataclasses.replace(world, layout=layout, mesh=mesh)


# --------------------------------------------------------------------------------------------------
# 3. Tensor and sequence parallelism
#
# A DTensor is a tensor with a placement along its mesh: whole on each rank (Replicate()), cut along
# a dimension (Shard(dim)), or still to be summed (Partial()). Where a module gets another placement
# than it needs, PyTorch inserts a collective, and the matching one in the backward pass (Megatron's
# functions f and g).


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's piece of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def tensor_parallel(part: FLM, mesh: DeviceMesh, sequence_parallel: bool):
    """Cut a model, or a pipeline stage of one, over the tp mesh.

    The residual stream (B, T, C) between the cut matrices is whole on each rank; with
    sequence_parallel, each rank holds T/tp positions of it."""
    stream = Shard(1) if sequence_parallel else Replicate()
    # Cut by rows of the weight (out, in): each rank computes some of the outputs. Forward: under
    # Shard(1) an all-gather of the positions. Backward: the sum of the inputs' gradients, with a
    # reduce-scatter (Shard(1)) or an all-reduce (Replicate()).
    into_block = ColwiseParallel(input_layouts=stream)
    # Cut by columns: each rank computes some terms of every output. Forward: their sum, with a
    # reduce-scatter (Shard(1)) or an all-reduce (Replicate()). Backward: under Shard(1) an
    # all-gather.
    out_of_block = RowwiseParallel(output_layouts=stream)
    table = {
        # As into_block; each rank keeps the logits of V/tp words, for loss_parallel.
        "head": ColwiseParallel(
            input_layouts=stream, output_layouts=Shard(-1), use_local_output=False
        ),
    }
    for i in part.layers:
        into = ("attn.qkv", "ff.up") + ("ff.gate",) * (part.layers[i].ff.gate is not None)
        table.update({f"layers.{i}.{name}": into_block for name in into})
        table[f"layers.{i}.attn.o"] = table[f"layers.{i}.ff.down"] = out_of_block
    modules = dict(part.named_modules())
    for name, module in modules.items():
        if name.endswith("norm"):
            replicate_norm(module, mesh, stream)
    present = {name: style for name, style in table.items() if modules.get(name) is not None}
    parallelize_module(part, mesh, present, src_data_rank=None)
    if part.embedding is not None:
        cut_embedding(part.embedding, mesh, stream)
    if part.head is not None:
        part.head_loss = functools.partial(cut_head_loss, part.head, mesh, stream)


@dataclass
class Words:
    """The words that a tp rank holds of the embedding or the head: V/tp rows from `first` on."""

    first: int
    count: int
    group: dist.ProcessGroup

    @staticmethod
    def of(weight: DTensor) -> Words:
        mesh, count = weight.device_mesh, len(local(weight))
        return Words(mesh.get_local_rank() * count, count, mesh.get_group())

    def find(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which row each id is here (0 for those of other ranks), and whether it is here."""
        rows = ids - self.first
        here = (rows >= 0) & (rows < self.count)
        return rows.masked_fill(~here, 0), here

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """x, in place, summed over the ranks that share the words."""
        dist.all_reduce(x, dist.ReduceOp.SUM, self.group)
        return x

    def max(self, x: torch.Tensor) -> torch.Tensor:
        """The largest of each entry of x, in place, over the ranks that share the words."""
        dist.all_reduce(x, dist.ReduceOp.MAX, self.group)
        return x


def cut_embedding(embedding: torch.nn.Embedding, mesh: DeviceMesh, stream: Shard | Replicate):
    """Cut an embedding by words. Each rank looks up those that it holds, 0 for others. Forward:
    their sum, as out_of_block. Its gradient has the rows of this rank alone; that of DTensor's own
    embedding had all V."""
    weight = distribute_tensor(embedding.weight, mesh, [Shard(0)], src_data_rank=None)
    embedding.weight = torch.nn.Parameter(weight)

    def forward(tokens):
        rows, here = Words.of(embedding.weight).find(tokens)
        y = torch.nn.functional.embedding(rows, local(embedding.weight)) * here[..., None]
        y = DTensor.from_local(y, mesh, [Partial()], run_check=False)
        # A compiled block drops the gradient of a tensor whose collective is not finished: clone.
        return y.redistribute(placements=[stream]).to_local().clone()

    embedding.forward = forward


def cut_head_loss(
    head: torch.nn.Linear,
    mesh: DeviceMesh,
    stream: Shard | Replicate,
    hidden: torch.Tensor,
    targets: torch.Tensor,
) -> torch.Tensor:
    """FLM.head_loss where the head is cut by words: the same HeadLoss on each rank's words.
    Forward: under Shard(1) an all-gather of the positions. Backward: as into_block."""
    hidden = DTensor.from_local(hidden, mesh, [stream], run_check=False)
    hidden = hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    return head_loss(hidden, local(head.weight), targets, Words.of(head.weight))


def replicate_norm(norm: torch.nn.Module, mesh: DeviceMesh, stream: Shard | Replicate):
    """Keep a LayerNorm's weights whole; each rank normalises the positions that it holds.

    Its weights' gradients are Partial under Shard(1): one small all-reduce in the backward pass."""

    def as_dtensor(module, inputs, mesh):
        return DTensor.from_local(inputs[0], mesh, [stream], run_check=False)

    distribute_module(norm, mesh, None, as_dtensor, lambda module, y, mesh: y.to_local())


def set_masks(part: FLM, record: dict | None, c: float, layout: Layout, mesh: DeviceMesh | None):
    """FLM.set_masks on a part that is cut over tp: each mask is cut like what it masks."""
    part.set_masks(record, c)
    if layout.tp == 1:
        return
    tp = mesh["tp"]

    def replicate(mask):
        if mask is None:
            return None
        return DTensor.from_local(mask, tp, [Replicate()], run_check=False)

    def shard(mask):
        return None if mask is None else mask.chunk(layout.tp)[tp.get_local_rank()]

    for block in part.layers.values():
        block.attn_norm.mask = block.ff_norm.mask = replicate(block.attn_norm.mask)
        block.attn.mask, block.ff.mask = shard(block.attn.mask), shard(block.ff.mask)
    if part.norm is not None:
        part.norm.mask = replicate(part.norm.mask)


# --------------------------------------------------------------------------------------------------
# 4. This rank's share of the model


def wrap_blocks(part: FLM, layout: Layout, compiled: bool):
    """Apply activation checkpointing and torch.compile to each block."""
    for block in part.layers.values():
        if layout.activation_checkpointing:
            block.forward = functools.partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
        if compiled:
            block.compile()


def build_parts(
    config: FLMConfig,
    world: World,
    device: torch.device,
    weights: torch.dtype,
    arithmetic: torch.dtype,
    compiled: bool = False,
) -> list[FLM]:
    """The parts of the model on this rank, one for each pipeline stage that it holds: allocated,
    cut and wrapped, but not filled.

    weights, arithmetic: dtypes of the parameters and of the matrix products (bf16 over fp32)."""
    layout, mesh = world.layout, world.mesh
    depth = config.n_layers // layout.pipeline_stages
    parts = []
    for stage in layout.stage_ids(world.at("pp")):
        layers = range(stage * depth, (stage + 1) * depth)
        first, last = stage == 0, stage == layout.pipeline_stages - 1
        with torch.device("meta"):
            part = FLM(config, layers, embed=first, head=last).to(weights)
        if layout.tp > 1:
            tensor_parallel(part, mesh["tp"], layout.sequence_parallel)
        part.to_empty(device=device)  # also ties the head again, which parallelize_module untied
        wrap_blocks(part, layout, compiled)
        if layout.sharded:
            policy = MixedPrecisionPolicy()
            if arithmetic != weights:
                policy = MixedPrecisionPolicy(arithmetic, reduce_dtype=torch.float32)
            # Along dp: one all-gather of weights and one reduce-scatter of gradients for each block
            # and step. The last group is what no block holds, both ends of a tied embedding in it.
            for module in (*part.layers.values(), part):
                options = {"reshard_after_forward": layout.reshard, "mp_policy": policy}
                fully_shard(module, mesh=mesh["dp"], **options)
        parts.append(part)
    return parts


# --------------------------------------------------------------------------------------------------
# 5. The worker


class LeanPipelineStage(PipelineStage):
    """A pipeline stage that holds a buffer for what it receives as long as it is in use. PyTorch's
    own allocates one for every micro-batch before the first, and keeps all of them, and the
    gradients that autograd puts into them."""

    empty = False  # whether PyTorch's own buffers are gone

    def make_empty(self):
        if not self.empty:
            for received in (*self.args_recv_info.values(), *self.grad_recv_info.values()):
                set_buffers(received, there=False)
            self.empty = True

    def get_fwd_recv_ops(self, micro: int):
        self.make_empty()
        set_buffers(self.args_recv_info[micro], there=True)
        return super().get_fwd_recv_ops(micro)

    def get_bwd_recv_ops(self, micro: int):
        set_buffers(self.grad_recv_info.get(micro, ()), there=True)  # an evaluation has none
        return super().get_bwd_recv_ops(micro)

    def forward_one_chunk(self, micro: int, *args, **options):
        self.make_empty()
        output = super().forward_one_chunk(micro, *args, **options)
        if output.requires_grad and micro == self.chunks - 1:
            # PyTorch would sum the gradients along dp after the last backward pass, not under it.
            output.register_hook(lambda _: exchange_gradients(self.submod, True))
        return output

    def backward_one_chunk(self, micro: int, *args, **options):
        super().backward_one_chunk(micro, *args, **options)
        for received in self.args_recv_info[micro], self.grad_recv_info.get(micro, ()):
            set_buffers(received, there=False)


def exchange_gradients(part: FSDPModule, last: bool):
    """Whether the next backward pass is the last one: each block's gradients are then summed along
    dp as soon as they are complete, while the pass goes on."""
    part.set_requires_gradient_sync(last)
    part.set_is_last_backward(last)
    part.set_reshard_after_backward(last)


def set_buffers(received: tuple, there: bool):
    """Allocate a buffer for each tensor of a message, or free it: one number keeps its shape."""
    for info in received:
        if info.buffer is not None:
            new, shape = info.buffer.new_empty, info.buffer.shape
            info.buffer = new(shape) if there else new(()).expand(shape)


class Stopped(Exception):
    """Worker.gradients was asked to stop between two micro-batches: the step is not complete."""


class NonFinite(RuntimeError):
    """The loss or the norm of the gradient is not a finite number; every rank has this error."""


@functools.cache
def group_of_tied_ends(mesh: DeviceMesh, timeout: datetime.timedelta) -> dist.ProcessGroup | None:
    """The process group of the first and the last pp rank with this rank's dp and tp coordinates;
    None on the pp ranks between them.

    Cached: a run that grows builds several Workers, and a process group is never freed."""
    if len(mesh.mesh) == 2:
        return mesh.get_group("pp")
    pairs = mesh.mesh[[0, -1]].flatten(1).T.tolist()  # (dp*tp, 2) ranks
    return dist.new_subgroups_by_enumeration(pairs, timeout=timeout)[0]


class Worker:
    """One rank's share of the model and what the rank does in a step. In one process: one FLM.

    named: [(name in a checkpoint, parameter)]; a tied head has its embedding's name."""

    def __init__(self, parts: list[FLM], world: World, arithmetic: torch.dtype):
        self.parts, self.world, self.arithmetic = parts, world, arithmetic
        self.config, self.device = parts[0].config, parts[0].xpos.device
        tied = {"head.weight": "embedding.weight"} if self.config.tie_embeddings else {}
        parameters = [item for part in parts for item in part.named_parameters()]
        self.named = [(tied.get(name, name), p) for name, p in parameters]
        self.pipelines = {}  # number of micro-batches -> pipeline schedule
        self.supervised = None  # waits for the supervised tokens of the batch
        self.ddp = self.tie = self.tied_end = None
        layout = world.layout
        if layout.dp > 1 and not layout.sharded:
            self.ddp = data_parallel(parts[0], world.mesh["dp"])
        if self.config.tie_embeddings and layout.pp > 1:
            # The embedding and the head are two parameters on two ranks, with one gradient.
            self.tie = group_of_tied_ends(world.mesh, world.timeout)
            if world.at("pp") == 0:
                self.tied_end = parts[0].embedding.weight
            elif world.last:
                self.tied_end = parts[-1].head.weight

    @torch.no_grad()
    def init_weights(self, seed: int):
        """muP.init_weights for a share: each rank draws the whole of each of its parameters and
        keeps its shard, so all layouts start from the same numbers."""
        for name, p in console.progress(
            self.named, desc="drawing", unit="tensors", leave=False, disable=self.world.rank > 0
        ):
            value = muP.initial_value(self.config, name, p.shape, seed)
            if isinstance(p, DTensor):
                value = value.to(self.device, p.dtype)
                value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
            p.copy_(value)

    def set_masks(self, record: dict | None, c: float):
        """FLM.set_masks on every part: the growth's record and the mask's value c."""
        for part in self.parts:
            set_masks(part, record, c, self.world.layout, self.world.mesh)

    @torch.no_grad()
    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        micro: int,
        score: Callable | None = None,
        documents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """score(logits, targets) of this dp rank's rows, summed over the micro-batches; by default
        the loss in nats, summed over the supervised tokens. No gradients.

        tokens, targets: (b, T), the rows of this dp rank; micro: rows of one forward pass;
        documents: (b, T), between which attention is cut, see FLM.forward. Returns zeros on ranks
        that do not have the last pipeline stage."""
        x, y = tokens.to(self.device), targets.to(self.device)
        documents = documents if documents is None else documents.to(self.device)
        run = self.run_pipeline if self.world.layout.pp > 1 else self.run_micro_batches
        over_shards = score is not None and self.world.layout.tp > 1  # logits of V/tp words
        with loss_parallel() if over_shards else contextlib.nullcontext():
            total = run(x, y, micro, score, documents=documents)
        self.reshard()
        return total

    def gradients(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        micro: int,
        stop: Callable[[], Callable[[], bool]] | None = None,
        documents: torch.Tensor | None = None,
    ) -> tuple[float, int]:
        """Add to .grad the gradient of the whole batch's loss: nats per supervised token.

        tokens, targets: (b, T), the rows of this dp rank; micro: rows of one forward pass. Returns
        the loss of these rows in nats, summed, on one rank of each dp rank, and 0 on its other
        ranks; and the supervised tokens of the whole batch.

        stop: called in each micro-batch but the last, not in a pipeline. The function that it
        returns is called before the next one; where that says True, Stopped is raised, and what
        .grad holds is worthless. documents: as for `forward`."""
        first = self.world.at("tp") == self.world.at("pp") == 0  # the others have the same rows
        self.supervised = self.world.begin_sum((targets != IGNORE).sum().item() if first else 0)
        x = tokens.to(self.device, non_blocking=True)
        y = targets.to(self.device, non_blocking=True)
        cut = {"documents": documents if documents is None else documents.to(self.device)}
        if self.world.layout.pp > 1:
            nats = self.run_pipeline(x, y, micro, None, training=True, **cut)
        else:
            nats = self.run_micro_batches(x, y, micro, None, True, stop, **cut)
        if self.tied_end is not None:  # both ends get the sum of their gradients
            dist.all_reduce(local(self.tied_end.grad), group=self.tie)
        return nats.item() if self.world.at("tp") == 0 else 0.0, int(self.supervised()[0])

    def scale(self) -> float:
        """Factor of the loss in nats in a training step. PyTorch's engines average over dp. The
        first call waits for the sum over all ranks."""
        return self.world.layout.dp / max(1, self.supervised()[0])

    def run_micro_batches(
        self, x, y, micro, score, training=False, stop=None, documents=None
    ) -> torch.Tensor:
        """Without a pipeline: forward passes of `micro` rows and, when training, backward passes.
        Returns score(logits, targets), summed over the micro-batches; without a score the model's
        loss, which needs no tensor of all logits."""
        model = self.ddp if training and self.ddp is not None else self.parts[0]
        autocast = self.arithmetic == torch.bfloat16 and not self.world.layout.sharded
        total, stopped = 0, None
        for i in range(0, len(x), micro):
            if stopped is not None and stopped():
                raise Stopped
            rows, targets = x[i : i + micro], y[i : i + micro]
            cut = {"documents": documents if documents is None else documents[i : i + micro]}
            with self.gradient_exchange(model, training, last=i + micro >= len(x)):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
                    if score is None:
                        value = model(rows, targets, **cut)
                    else:
                        value = score(model(rows, **cut), targets)
                if stop is not None and i + micro < len(x):
                    stopped = stop()  # the ranks tell each other during the backward pass
                if training:
                    (value * self.scale()).backward()
            total = total + local(value.detach())
        return total

    def gradient_exchange(self, model: torch.nn.Module, training: bool, last: bool):
        """The context of one micro-batch: gradients are exchanged along dp after the last one."""
        if training and isinstance(model, FSDPModule):
            exchange_gradients(model, last or self.world.layout.reshard)
        if model is self.ddp and not last:
            return model.no_sync()
        return contextlib.nullcontext()

    def run_pipeline(self, x, y, micro, score, training=False, documents=None) -> torch.Tensor:
        """One pass of all micro-batches through the pipeline: forward and, when training, backward.

        Along pp, hidden states (micro, T, C) are sent forward and their gradients back. Of
        `documents` nothing is sent: all ranks of a pipeline have the same rows. The schedule of
        training is kept; that of an evaluation holds activations, and goes."""
        n, by_model = len(x) // micro, score is None
        if training:
            if n not in self.pipelines:
                self.pipelines[n] = self.make_pipeline(n, lambda nats, _: nats * self.scale())
            pipeline, stages = self.pipelines[n]
        else:
            pipeline, stages = self.make_pipeline(n, (lambda nats, _: nats) if by_model else score)
        inputs = [x] if self.world.at("pp") == 0 else []
        losses, options = [], {"documents": documents}
        if self.world.last:
            options |= {"target": y, "losses": losses} | ({"targets": y} if by_model else {})
        run = pipeline.step if training else pipeline.eval
        run(*inputs, return_outputs=False, **options)
        if not training:
            for stage in stages:
                stage.clear_runtime_states()
        if not self.world.last:
            return torch.zeros((), device=self.device)
        total = sum(local(value.detach()) for value in losses)
        return total / self.scale() if training else total

    def make_pipeline(self, n: int, loss: Callable) -> tuple:
        """PyTorch's pipeline schedule for n micro-batches, and its stages: this rank's parts."""
        layout, group = self.world.layout, self.world.mesh.get_group("pp")
        ids = layout.stage_ids(self.world.at("pp"))
        stages = [
            LeanPipelineStage(part, i, layout.pipeline_stages, self.device, group=group)
            for i, part in zip(ids, self.parts)
        ]
        held = stages if len(stages) > 1 else stages[0]
        schedule = get_schedule_class(layout.schedule)
        return schedule(held, n_microbatches=n, loss_fn=loss, scale_grads=False), stages

    def reshard(self):
        """Free the weights that a forward pass gathered along dp and no backward pass has freed."""
        for part in self.parts:
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def grad_square(self) -> float:
        """This rank's share of the squared norm of the whole gradient. What n ranks hold counts
        1/n on each."""
        layout, by_copies = self.world.layout, {}
        for name, p in self.named:
            if p.grad is None or p is self.tied_end and self.world.last:
                continue  # the rank with the embedding counts the tied gradient
            copies = layout.dp if self.ddp is not None else 1
            if isinstance(p, DTensor):
                for size, placement in zip(p.device_mesh.shape, p.placements):
                    copies *= size if placement.is_replicate() else 1
            by_copies.setdefault(copies, []).append(local(p.grad))
        norms = {n: torch.nn.utils.get_total_norm(grads).item() for n, grads in by_copies.items()}
        return sum(norm**2 / n for n, norm in norms.items())


def data_parallel(part: FLM, mesh: DeviceMesh) -> DistributedDataParallel:
    """The model with one all-reduce of its gradients along dp in the backward pass."""
    with warnings.catch_warnings():
        # PyTorch 2.13 calls broadcast_buffers old; its new name sends buffers around at the start.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            part,
            process_group=mesh.get_group(),
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


# --------------------------------------------------------------------------------------------------
# 6. Starting and ending together, under torchrun


def connect(timeout_minutes: float = 10) -> World:
    """Connect to the other ranks that torchrun started. The layout comes later, when all agree.

    timeout_minutes: how long a rank waits for another one, here and in every collective. Raises
    ValueError where torchrun could not restart the ranks, TimeoutError where a rank is missing,
    ConnectionError where a rank cannot be reached."""
    if sys.platform == "win32":
        raise ValueError("several processes need Linux or macOS: on Windows, use WSL")
    begun, rank, size = time.perf_counter(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = datetime.timedelta(minutes=timeout_minutes)
    # With fewer GPUs than ranks, --device cpu still works.
    if dist.get_node_local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(dist.get_node_local_rank())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"

    def form_groups():
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        return [dist.new_group(backend="gloo", timeout=timeout) for _ in range(2)]

    try:
        store = open_store(rank, timeout)
        call_ranks(store, rank, size)
        roll_call, files = run_with_timeout(form_groups, store, rank, timeout)
    except (dist.DistError, TimeoutError) as error:
        text = f"rank {rank} has not met the {size - 1} other ranks in {timeout_minutes:g} minutes"
        raise TimeoutError(f"{text}: {str(error).splitlines()[0]}") from error
    groups = {"control": dist.group.WORLD, "files": files, "roll_call": roll_call}
    world = World(rank=rank, timeout=timeout, begun=begun, **groups)
    machines = world.gather(platform.node())
    return dataclasses.replace(world, neighbours=machines.count(platform.node()))


def run_with_timeout(form: Callable, store: dist.Store, rank: int, timeout: datetime.timedelta):
    """form(), in which ranks connect to each other; its result. A rank that fails tells the others
    why, and no rank waits for them longer than `timeout`: gloo by itself waits five times as long.

    Raises ConnectionError with what the first rank said that failed, TimeoutError, DistError."""
    outcome, news = queue.SimpleQueue(), store.clone()  # form() may keep `store` busy

    def work():
        try:
            outcome.put((form(), None))
        except Exception as error:
            outcome.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    end = time.monotonic() + timeout.total_seconds()
    while not news.check(["failed"]):
        if time.monotonic() > end:
            problem = "some ranks have not come, or do not reach the others"
            raise TimeoutError(f"{problem}. {INTERFACES}")
        with contextlib.suppress(queue.Empty):
            result, error = outcome.get(timeout=0.5)
            if error is None:
                return result
            if isinstance(error, dist.DistError) or not isinstance(error, RuntimeError):
                raise error  # a rank is missing, or there is a fault
            news.compare_set("failed", "", explain_no_connection(rank, error))
    raise ConnectionError(news.get("failed").decode())


INTERFACES = (
    "On each host, `ip -brief address` lists the interfaces; set GLOO_SOCKET_IFNAME to the one by "
    "which the other hosts reach it, and open all ports between the hosts"
)


def explain_no_connection(rank: int, error: RuntimeError) -> str:
    """What to say where gloo cannot connect, or not even listen."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    used = f"interface {interface} (GLOO_SOCKET_IFNAME)" if interface else "the address of its name"
    line = str(error).splitlines()[0]
    reason = re.sub(r".*\[.*?\] |\$\d+$", "", line)  # without places in gloo's code
    reason = reason.removeprefix("ifa != nullptr. ")
    return (
        f"rank {rank} on {platform.node()} cannot connect to the other ranks: {reason}\n"
        f"It uses {used}. {INTERFACES}"
    )


def open_store(rank: int, timeout: datetime.timedelta) -> dist.Store:
    """The key-value store through which the ranks find each other: torchrun's, or one on rank 0.

    torchrun's store outlives a restart, so each start has keys of its own. Several torchruns do not
    always count their restarts alike, so this works on one machine only."""
    several_machines = os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]
    shared = os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    if shared and several_machines and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
        raise ValueError(
            "--max-restarts on several machines: restarted ranks would look for each other at the "
            "addresses of the dead ones, which torchrun (PyTorch 2.13) keeps; start it with\n"
            "  TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --rdzv-backend c10d --max-restarts ..."
        )
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    notice = f"rank {rank} waits for an answer from {host}, port {port}: does rank 0 run there?"
    timer = threading.Timer(PATIENCE, print, [notice], {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    serves = rank == 0 and not shared
    store = dist.TCPStore(
        host, port, is_master=serves, timeout=timeout, wait_for_workers=False, multi_tenant=True
    )
    timer.cancel()
    start = os.environ["TORCHELASTIC_RESTART_COUNT"] if shared else "0"
    return dist.PrefixStore(f"start {start}", store)


def call_ranks(store: dist.Store, rank: int, size: int):
    """Write into the store that this rank is here. Rank 0 says which ranks are late."""
    keys = [f"rank {r} is here" for r in range(size)]
    store.set(keys[rank], "")
    if rank > 0:
        return
    try:
        store.wait(keys, datetime.timedelta(seconds=PATIENCE))
    except dist.DistStoreError:
        late = [str(r) for r in range(size) if not store.check([keys[r]])]
        print(f"waiting for {len(late)} of {size} ranks: {', '.join(late[:20])}", file=sys.stderr)


def redirect_library_output(folder: Path, rank: int) -> Path:
    """Send what libraries print to FOLDER/rank-N.log, for the rest of this process. Returns the
    file. What our own code prints (sys.stdout, sys.stderr) stays on the screen.

    PyTorch's C++ code and its loggers print on every rank, and much when a rank is lost. They hold
    the streams that the process began with, so those get the file, and sys.stderr a new one."""
    path = folder / f"rank-{rank}.log"
    screen = open(os.dup(2), "w", buffering=1, errors="backslashreplace")
    log = open(path, "a", buffering=1)
    os.dup2(log.fileno(), 2)
    sys.stderr = screen

    def to_log(message, category, filename, lineno, file=None, line=None):
        log.write(warnings.formatwarning(message, category, filename, lineno, line))

    warnings.showwarning = to_log
    return path


def explain_lost_rank(world: World, error: BaseException) -> str | None:
    """What to say of an error in a collective: which ranks do not answer any more, as far as this
    rank can know. Empty where another rank says it; None if the error has another cause.

    Rank 0 asks all ranks, for half a timeout. The others wait longer for it: it leaves when it
    knows. So all ranks end within twice the timeout."""
    failed = "Timed out|Connection closed|Connection reset|Broken pipe"
    in_collective = isinstance(error, dist.DistError) or re.search(failed, str(error))
    if world.size == 1 or not isinstance(error, RuntimeError) or not in_collective:
        return None
    minutes = world.timeout.total_seconds() / 60
    try:
        wait = world.timeout / 2 if world.rank == 0 else world.timeout
        dist.monitored_barrier(world.roll_call, wait, wait_all_ranks=True)
        late = f"one of them took over {minutes:g} minutes (--timeout-minutes)"
        return f"all ranks answer, but {late}"
    except RuntimeError as answer:
        found = re.search(r"Ranks ([\d, ]+) failed", str(answer))
        if found is None and "Timed out" not in str(answer):
            return explain_closed_connection(f"{error} {answer}")
    lost = found[1] if found else "0"
    return (
        f"no answer from rank {lost} (for {minutes:g} minutes, or the connection was closed): "
        f"{GO_ON}"
    )


GO_ON = (
    "this job ends. torchrun --max-restarts N starts all ranks again, and train.py --auto-resume "
    "goes on from the last checkpoint"
)


def explain_closed_connection(text: str) -> str:
    """What the first rank of each host says where gloo has told in `text` that another rank has
    closed its connection; gloo knows only the address."""
    if dist.get_node_local_rank(fallback_rank=0) > 0:
        return ""
    found = re.search(r"peer \[(.*?)\]", text)
    return (
        f"a rank on {found[1] if found else 'another host'} has closed its connection: it has "
        f"ended, and torchrun says there why, or its host has; {GO_ON}"
    )


def leave(world: World, code: int):
    """End this process with os._exit, and where `code` is 2, a mistake, torchrun as well: it would
    otherwise repeat the mistake --max-restarts times.

    Python's normal shutdown aborts in gloo's threads about one time in five."""
    if code == 0:
        world.gather(None)
    elif world.rank > 0:
        time.sleep(1)  # torchrun stops all ranks when one has failed: let rank 0 say why
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 2 and dist.get_node_local_rank() == 0:
        if os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
            os.kill(os.getppid(), signal.SIGTERM)
    os._exit(code)
