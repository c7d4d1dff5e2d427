"""parallel.py - one model on many processes: data, tensor, sequence and pipeline parallelism (FLM-101B, arXiv 2309.03852,
section 2.4 and Table 2: 24 servers of 8 GPUs, 3D parallelism, sequence parallelism and a distributed optimizer).

    torchrun --standalone --nproc-per-node 8 train.py --dp 2 --tp 2 --pp 2       a training run on eight processes
    python train.py --preset flm-101b --tp 4 --pp 4 --dp 12 --dry-run            the paper's cluster, rehearsed on one CPU
    python parallel.py draw --pp 4 --micro-batches 8                             who computes what, when

The model in flm.py does not know any of this. Everything here is applied to it from outside, by PyTorch's own engine:

    1. Layout, check       how many processes do what, and every reason why a layout cannot work
    2. World               this process among the others: the mesh, and sums of plain numbers
    3. tensor parallelism  a table from module name to style; sequence parallelism is the same table with another placement
    4. Worker              this process's share of the model: its layers, its shard of the optimizer, its part of a step
    5. drawing, tracing    the timetable of a pipeline and its bubble; who says what to whom
    6. the rehearsal       one process of each pipeline stage of a large cluster, without the cluster

Letters as in flm.py. dp, tp and pp are the numbers of processes along the three axes of the mesh; a process is (pp, dp, tp),
and neighbours in rank are neighbours in tp, where the traffic is heaviest.
"""
from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import os
import platform
import sys
import time
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import muP
from flm import FLM, FLMConfig, loss_sum


# ---------------------------------------------------------------------------------------------------------------------
# 1. Layouts

# Pipeline schedule -> how many stages of the pipeline one process holds.
SCHEDULES = {"1F1B": 1, "GPipe": 1, "Interleaved1F1B": 2, "InterleavedZeroBubble": 2, "ZBVZeroBubble": 2}


@dataclass(frozen=True)
class Layout:
    """How a model lies on dp * tp * pp processes."""
    dp: int = 1                              # copies of the model, each with its own rows of the batch
    tp: int = 1                              # cuts of every matrix
    pp: int = 1                              # cuts of the stack of layers
    sequence_parallel: bool = False          # tp also cuts the sequence where tensor parallelism leaves it whole
    shard_optimizer: bool = False            # weights, gradients and AdamW's moments cut over dp as well
    schedule: str = "1F1B"
    activation_checkpointing: bool = False   # keep a block's input alone, compute the rest again in the backward pass

    @property
    def size(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def stages(self) -> int:
        """Stages of the pipeline; 1 where there is none."""
        return self.pp * SCHEDULES[self.schedule] if self.pp > 1 else 1

    @property
    def sharded(self) -> bool:
        """Whether fully_shard holds the weights. Plain DistributedDataParallel serves where data parallelism is all there is."""
        return self.shard_optimizer or self.tp > 1 or self.pp > 1

    def stage_ids(self, pp_rank: int) -> list[int]:
        """The stages of the pipeline on one process: in a V (first and last together) for ZBV, else in a loop."""
        if self.stages <= self.pp:
            return [pp_rank]
        return [pp_rank, self.stages - 1 - pp_rank if self.schedule == "ZBVZeroBubble" else pp_rank + self.pp]

    def __str__(self):
        words = [f"dp {self.dp}", f"tp {self.tp}", f"pp {self.pp}"]
        words += ["sequence parallel"] * self.sequence_parallel + ["sharded optimizer"] * (self.sharded and self.dp > 1)
        words += [self.schedule] * (self.pp > 1) + ["activation checkpointing"] * self.activation_checkpointing
        return ", ".join(words)


def check(layout: Layout, config: FLMConfig, batch_size: int, micro_batch: int | None = None, compiled: bool = False) -> list[str]:
    """Every reason why this model and batch cannot lie like that, with its numbers."""
    problems = [f"--{name} {n}: must be at least 1" for name, n in (("dp", layout.dp), ("tp", layout.tp), ("pp", layout.pp)) if n < 1]
    if layout.schedule not in SCHEDULES:
        problems.append(f"--schedule {layout.schedule}: there are {', '.join(SCHEDULES)}")
    if problems:
        return problems
    dp, tp, stages = layout.dp, layout.tp, layout.stages

    def divides(n, size, what, how):
        if size % n:
            problems.append(f"{what} {size}: must be a multiple of {how} (remainder {size % n})")

    divides(tp, config.n_heads, "n_heads", f"--tp {tp}")
    divides(tp, config.d_ff, "d_ff", f"--tp {tp}")
    divides(tp, config.vocab_size, "vocab_size", f"--tp {tp}")
    if layout.sequence_parallel:
        divides(tp, config.max_seq_len, "max_seq_len", f"--tp {tp}, for --sequence-parallel")
        if tp == 1:
            problems.append("--sequence-parallel: cuts the sequence between the processes of --tp, which is 1: add --no-sequence-parallel")
    divides(stages, config.n_layers, "n_layers", f"the {stages} stages of --pp {layout.pp} --schedule {layout.schedule}")
    divides(dp, batch_size, "--batch-size", f"--dp {dp}")
    rows = batch_size // dp
    micro = micro_rows(layout, batch_size, micro_batch)
    if batch_size % dp == 0 and rows:
        if rows % micro:
            each = f"the {rows} rows of each dp rank, --batch-size {batch_size} / --dp {dp}" if dp > 1 else f"--batch-size {batch_size}"
            problems.append(f"--micro-batch {micro}: must divide {each}")
        if layout.pp > 1 and rows % micro == 0:
            n = rows // micro
            if n < stages:
                problems.append(f"{n} micro-batches (--batch-size {batch_size} / --dp {dp} / --micro-batch {micro}): the {stages} stages of "
                                f"--pp {layout.pp} --schedule {layout.schedule} need at least {stages}")
            elif stages > layout.pp:
                divides(layout.pp, n, "micro-batches", f"--pp {layout.pp}, for --schedule {layout.schedule}")
    zero_bubble = layout.pp > 1 and "ZeroBubble" in layout.schedule
    if zero_bubble and layout.activation_checkpointing:
        problems.append(f"--activation-checkpointing: --schedule {layout.schedule} runs a backward pass in two halves and would "
                        f"compute everything again for each; use 1F1B or Interleaved1F1B")
    if zero_bubble and compiled:
        problems.append(f"--compile: --schedule {layout.schedule} splits the backward pass, a compiled block has just one; use 1F1B or Interleaved1F1B")
    return problems


def micro_rows(layout: Layout, batch_size: int, micro_batch: int | None) -> int:
    """Rows of a forward pass: as asked for, else all of the dp rank's, and in a pipeline, which lives on many micro-batches, 1."""
    return micro_batch or (1 if layout.pp > 1 else batch_size // layout.dp)


def rows_needed(layout: Layout, rows: int, micro: int) -> int:
    """`rows` rounded up to what a pipeline can take: whole micro-batches, enough of them for the schedule."""
    if layout.pp == 1:
        return rows
    unit = layout.pp if layout.stages > layout.pp else 1
    return micro * max(layout.stages, -(-rows // micro // unit) * unit)


# ---------------------------------------------------------------------------------------------------------------------
# 2. The world

@dataclass(frozen=True)
class World:
    """This process among the others. Alone, mesh and control are None and everything below does nothing."""
    layout: Layout = Layout()
    rank: int = 0
    mesh: DeviceMesh | None = None           # (pp, dp, tp)
    control: dist.ProcessGroup | None = None # all processes, on the CPU: plain numbers, checkpoints, waiting
    neighbours: int = 1                      # processes on this machine

    def at(self, axis: str) -> int:
        """This process's place along pp, dp or tp."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(axis)

    @property
    def last(self) -> bool:
        """Whether the loss is computed here."""
        return self.layout.stages - 1 in self.layout.stage_ids(self.at("pp"))

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over all processes, in float64."""
        if self.control is None:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def told(self, value):
        """Rank 0's value, on every process."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value) -> list:
        """Every process's value, on every process, by rank."""
        if self.control is None:
            return [value]
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.control)
        return values

    def together(self, action, *args, **options):
        """action(...) on every process; a ValueError or OSError on any of them is raised on all, so that nobody waits for one that
        has gone."""
        result, failure = None, None
        try:
            result = action(*args, **options)
        except (ValueError, OSError) as error:
            failure = error
        failures = self.gather(failure)
        if any(failures):
            texts = {str(f): rank for rank, f in reversed(list(enumerate(failures))) if f}
            if failure is not None and len(texts) == 1 and all(failures):
                raise failure
            raise ValueError("\n".join(f"rank {rank}: {text}" for text, rank in sorted(texts.items(), key=lambda item: item[1])))
        return result


def connect() -> World:
    """Meet the other processes that torchrun started; the layout comes later, when all agree on one. Raises ValueError where torchrun
    is to restart processes that could then not meet."""
    if int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) and os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True":
        raise ValueError("--max-restarts: restarted processes would look for each other at the addresses of the dead ones, which torchrun "
                         "(PyTorch 2.13) keeps; start it with\n  TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --max-restarts ...")
    if dist.get_node_local_rank() < torch.cuda.device_count():       # with fewer cards than processes, --device cpu still works
        torch.cuda.set_device(dist.get_node_local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    # The control group waits for rank 0 while it grows a checkpoint or prepares a corpus: hours, for a large one.
    control = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=12))
    world = World(rank=dist.get_rank(), control=control)
    return dataclasses.replace(world, neighbours=world.gather(platform.node()).count(platform.node()))


def leave(world: World, code: int):
    """Leave: at once, where others are waiting for one that failed, and without Python's own shutdown, during which gloo's threads
    abort one process in five."""
    if world.control is not None:
        if code == 0:
            dist.barrier(world.control)
        elif world.rank > 0:
            time.sleep(1)                        # torchrun stops all when one has failed: let rank 0 say why
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def arrange(world: World, layout: Layout, device: torch.device) -> World:
    """The same world with its layout and mesh, once all processes agree on one. Alone there is nothing to shard."""
    if world.control is None:
        return dataclasses.replace(world, layout=dataclasses.replace(layout, shard_optimizer=False))
    mesh = init_device_mesh(device.type, (layout.pp, layout.dp, layout.tp), mesh_dim_names=("pp", "dp", "tp"))
    return dataclasses.replace(world, layout=layout, mesh=mesh)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Tensor and sequence parallelism. Megatron's two functions f and g are placements here: where a DTensor that is whole
#    (Replicate) or cut (Shard) meets a matrix cut by columns or rows, PyTorch inserts the all-reduce, all-gather or
#    reduce-scatter, and its mirror image in the backward pass.

def tensor_parallel(part: FLM, mesh: DeviceMesh, sequence_parallel: bool):
    """Cut a model, or a stage of one, over the tp mesh. Between the cut matrices the residual stream is whole on each process,
    or, with sequence_parallel, each holds T/tp positions of it."""
    stream = Shard(1) if sequence_parallel else Replicate()                              # of (B, T, C)
    table = {"embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=stream),         # rows are words
             "head": ColwiseParallel(input_layouts=stream, output_layouts=Shard(-1), use_local_output=False)}
    for i in part.layers:
        table |= {f"layers.{i}.{name}": ColwiseParallel(input_layouts=stream) for name in ("attn.qkv", "ff.up")}
        table |= {f"layers.{i}.{name}": RowwiseParallel(output_layouts=stream) for name in ("attn.o", "ff.down")}
    modules = dict(part.named_modules())
    for name, module in modules.items():
        if name.endswith("norm"):                # its weights stay whole; each process normalises the positions it holds
            distribute_module(module, mesh, None,
                              lambda module, x, mesh: DTensor.from_local(x[0], mesh, [stream], run_check=False),
                              lambda module, y, mesh: y.to_local())
    parallelize_module(part, mesh, {name: style for name, style in table.items() if modules.get(name) is not None}, src_data_rank=None)
    if part.embedding is not None:               # a compiled block would drop the gradient of a tensor still under way
        part.embedding.register_forward_hook(lambda module, x, y: y.clone())


def set_masks(part: FLM, growth: dict | None, c: float, mesh: DeviceMesh | None):
    """FLM.set_masks on a model that is cut: each mask is cut like what it masks."""
    part.set_masks(growth, c)
    if mesh is None or mesh.size() == 1:
        return
    whole = lambda mask: None if mask is None else DTensor.from_local(mask, mesh, [Replicate()], run_check=False)
    mine = lambda mask: None if mask is None else mask.chunk(mesh.size())[mesh.get_local_rank()]
    for block in part.layers.values():
        block.attn_norm.mask, block.ff_norm.mask = whole(block.attn_norm.mask), whole(block.ff_norm.mask)
        block.attn.mask, block.ff.mask = mine(block.attn.mask), mine(block.ff.mask)
    if part.norm is not None:
        part.norm.mask = whole(part.norm.mask)


# ---------------------------------------------------------------------------------------------------------------------
# 4. The worker

def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def dress(part: FLM, layout: Layout, compiled: bool):
    """What each block gets, alone as among others: activation checkpointing, torch.compile."""
    for block in part.layers.values():
        if layout.activation_checkpointing:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        if compiled:
            block.compile()


def build(config: FLMConfig, world: World, device: torch.device, weights: torch.dtype, arithmetic: torch.dtype,
          compiled: bool = False) -> list[FLM]:
    """The parts of the model that lie on this process, one per pipeline stage it holds: allocated, cut and wrapped, not filled.
    weights, arithmetic: dtypes of the parameters and of the products; they differ for bf16 over fp32."""
    layout, mesh, depth, parts = world.layout, world.mesh, config.n_layers // world.layout.stages, []
    for stage in layout.stage_ids(world.at("pp")):
        with torch.device("meta"):
            part = FLM(config, range(stage * depth, (stage + 1) * depth), stage == 0, stage == layout.stages - 1).to(weights)
        if layout.tp > 1:
            tensor_parallel(part, mesh["tp"], layout.sequence_parallel)
        part.to_empty(device=device)             # and ties the head again, which cutting it has untied
        dress(part, layout, compiled)
        if layout.sharded:
            policy = MixedPrecisionPolicy(arithmetic, torch.float32) if arithmetic != weights else MixedPrecisionPolicy()
            for module in (*part.layers.values(), part):             # what no block holds is one group, the tied ends in it
                fully_shard(module, mesh=mesh["dp"], reshard_after_forward=False, mp_policy=policy)
        parts.append(part)
    return parts


class Worker:
    """One process's share of the model and what it does in a step. Alone in the world, it is one whole FLM."""

    def __init__(self, parts: list[FLM], world: World, arithmetic: torch.dtype):
        self.parts, self.world, self.arithmetic = parts, world, arithmetic
        self.config, self.device, self.schedules, self.ddp, self.scale = parts[0].config, parts[0].xpos.device, {}, None, None
        # (name in a checkpoint, parameter): the head of a tied model is its embedding, wherever it lies.
        tied = "head.weight" if self.config.tie_embeddings else None
        self.named = [("embedding.weight" if name == tied else name, p) for part in parts for name, p in part.named_parameters()]
        if world.layout.dp > 1 and not world.layout.sharded:
            with warnings.catch_warnings():      # PyTorch 2.13 calls this name old; the new one sends buffers around at the start
                warnings.simplefilter("ignore", FutureWarning)
                self.ddp = DistributedDataParallel(parts[0], process_group=world.mesh["dp"].get_group(), broadcast_buffers=False,
                                                   gradient_as_bucket_view=True)
        self._tie()

    def _tie(self):
        """A tied embedding whose two ends lie in different stages is two parameters with one gradient: `ends` are the ones
        here, `tie` the group of the two processes."""
        layout, world = self.world.layout, self.world
        self.ends, self.tie = [], None
        if not self.config.tie_embeddings or layout.stages == 1:
            return
        self.ends = [part.embedding.weight for part in self.parts if part.embedding is not None]
        self.ends += [part.head.weight for part in self.parts if part.head is not None]
        holder = next(rank for rank in range(layout.pp) if layout.stages - 1 in layout.stage_ids(rank))
        if holder != 0:
            ranks = world.mesh.mesh[[0, holder]].flatten(1).T.tolist()                   # (dp*tp, 2)
            self.tie, _ = dist.new_subgroups_by_enumeration(ranks)

    def init_weights(self, seed: int):
        """muP.init_weights for a share: every process draws the whole of each of its parameters and keeps its piece, so all
        layouts start from the same numbers."""
        with torch.no_grad():
            for name, p in self.named:
                value = muP.initial_value(self.config, name, p.shape, seed)
                if isinstance(p, DTensor):
                    value = distribute_tensor(value.to(self.device, p.dtype), p.device_mesh, p.placements, src_data_rank=None)
                p.copy_(value)

    def set_masks(self, growth: dict | None, c: float):
        for part in self.parts:
            set_masks(part, growth, c, self.world.mesh and self.world.mesh["tp"])

    # A step. -------------------------------------------------------------------------------------------------------

    def run(self, tokens: torch.Tensor, targets: torch.Tensor, micro: int, *, scale: float | None = None, score=None) -> torch.Tensor:
        """This process's part of a forward pass over its dp rank's rows, tokens and targets (b, T), `micro` rows at a time. With
        `scale`, of a backward pass too: the gradient of scale * loss, averaged over dp as PyTorch's engines do, is added to .grad.

        Returns score(logits, targets), by default the loss summed over the supervised tokens, summed over the micro-batches; zeros
        where the loss is not computed."""
        loss, x, y = score or loss_sum, tokens.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
        self.scale = scale
        with contextlib.ExitStack() as stack:
            if scale is None:
                stack.enter_context(torch.no_grad())
            if self.world.layout.tp > 1:         # each process holds V/tp of the logits: so the loss, and its backward
                stack.enter_context(loss_parallel())
            if self.world.layout.pp > 1:
                return self._pipeline(x, y, x.shape[0] // micro, loss)
            if self.arithmetic == torch.bfloat16 and not self.world.layout.sharded:
                autocast = functools.partial(torch.autocast, self.device.type, torch.bfloat16)
            else:
                autocast = contextlib.nullcontext
            whole = score is None and self.world.layout.tp == 1      # then the model makes the loss without all its logits
            model, total = self.ddp if self.ddp is not None and scale is not None else self.parts[0], 0
            for i in range(0, x.shape[0], micro):
                more = i + micro < x.shape[0]
                if isinstance(model, FSDPModule) and scale is not None:          # one reduce-scatter for all micro-batches
                    model.set_requires_gradient_sync(not more)
                    model.set_is_last_backward(not more)
                    model.set_reshard_after_backward(not more)
                with model.no_sync() if more and model is self.ddp else contextlib.nullcontext():
                    with autocast():
                        part = model(x[i:i + micro], y[i:i + micro]) if whole else loss(model(x[i:i + micro]), y[i:i + micro])
                    if scale is not None:
                        (part * scale).backward()
                total = total + local(part.detach())
            if scale is None:
                self._reshard()
        return total

    def _reshard(self):
        """A forward pass without a backward one leaves the gathered parameters in place; outside a step only the shards count."""
        for part in self.parts:
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _pipeline(self, x, y, n: int, loss) -> torch.Tensor:
        """A step of the pipeline. Its schedule is kept for training; an evaluation's holds activations, and goes with it."""
        training = torch.is_grad_enabled()
        schedule, losses = self.schedules.get(n) if training else None, []
        if schedule is None:
            layout, group = self.world.layout, self.world.mesh["pp"].get_group()
            stages = [PipelineStage(part, i, layout.stages, self.device, group=group) for part, i in zip(self.parts, layout.stage_ids(self.world.at("pp")))]
            scaled = (lambda logits, y: loss(logits, y) * self.scale) if training else loss
            schedule = get_schedule_class(layout.schedule)(
                stages if layout.stages > layout.pp else stages[0], n_microbatches=n, loss_fn=scaled, scale_grads=False)
            if training:
                self.schedules[n] = schedule
            elif layout.stages > layout.pp:      # ZBV fails in eval() unless it has no backward actions
                forward = ("FORWARD", "SEND_F", "RECV_F", "UNSHARD", "RESHARD")
                schedule.pipeline_order_with_comms = {rank: [action for action in actions if action.computation_type.name in forward]
                                                      for rank, actions in schedule.pipeline_order_with_comms.items()}
        first, last = self.parts[0].embedding is not None, self.world.last
        (schedule.step if training else schedule.eval)(*([x] if first else []), **({"target": y, "losses": losses} if last else {}),
                                                       return_outputs=False)
        if not training:
            self._reshard()
            for stage in stages:
                stage.clear_runtime_states()
        total = sum(local(value.detach()) for value in losses) if last else torch.zeros((), device=self.device)
        return total / self.scale if training and last else total

    def gradients(self, tokens: torch.Tensor, targets: torch.Tensor, micro: int, count: float) -> float:
        """Add the gradient of the whole batch's loss, divided by its `count` of supervised tokens, from this dp rank's rows;
        returns the rows' loss in nats, summed, on one process of each dp rank and 0 on its others."""
        nats = self.run(tokens, targets, micro, scale=self.world.layout.dp / count)
        if self.ends:
            total = sum(local(end.grad) for end in self.ends)
            if self.tie is not None:
                dist.all_reduce(total, group=self.tie)
            for end in self.ends:
                local(end.grad).copy_(total)
        return nats.item() if self.world.at("tp") == 0 else 0.0

    def grad_square(self) -> float:
        """This process's share of the squared norm of the whole gradient: what several processes hold counts once in the sum."""
        by_copies = {}
        for name, p in self.named:
            if p.grad is None or self.ends and p is self.ends[-1] and self.world.last:   # the tied head: the embedding has it
                continue
            copies = self.world.layout.dp if self.ddp is not None else 1
            if isinstance(p, DTensor):
                for size, placement in zip(p.device_mesh.shape, p.placements):
                    copies *= size if placement.is_replicate() else 1
            by_copies.setdefault(copies, []).append(local(p.grad))
        return sum(torch.nn.utils.get_total_norm(grads).item() ** 2 / copies for copies, grads in by_copies.items())


# ---------------------------------------------------------------------------------------------------------------------
# 5. Drawing and tracing: who computes what, when; and who says what to whom


# ---------------------------------------------------------------------------------------------------------------------
# 6. The rehearsal: one process of each pipeline stage goes through a step of the real code, build and Worker, on tensors that have
#    shapes and no numbers, among processes that are not there. Memory is what such tensors would take, communication what is said.


# ---------------------------------------------------------------------------------------------------------------------
# 7. The command line
