"""lab/collectives.py - what a rank sends, receives and reduces: counted, or printed line by line.

    torchrun --standalone --nproc-per-node 2 -m lab.cluster trace --pp 2 --steps 1

Every operation of PyTorch goes through a dispatcher, and a TorchDispatchMode sees it there. So
nothing in parallel.py or train.py has to know that somebody counts:

    1. Watch          sees every operation on this rank's own tensors
    2. Collectives    counts calls and bytes by axis and kind; lab/cluster.py rehearses with it
    3. TracedRun      a run of train.py that prints a line for each collective
"""

from __future__ import annotations

import sys
from functools import partialmethod

import torch
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from machine import name_of
from parallel import LeanPipelineStage, Worker


class Watch(TorchDispatchMode):
    """Inside, `see` is called for each operation of PyTorch on this rank's own tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # the operation comes back with the pieces that this rank holds
        out = func(*args, **(kwargs or {}))
        self.see(func, args, out)
        return out


# --------------------------------------------------------------------------------------------------
# 2. Collectives


class Collectives(Watch):
    """Counts the collectives of this rank: sent = {"dp all-gather": {"calls": 21, "bytes": ...}}.

    The first word is the axis, or "world" for another process group. The bytes are those of the
    whole tensor: the result of an all-gather, the argument of a reduce-scatter."""

    KINDS = {
        "allgather": "all-gather",
        "reducescatter": "reduce-scatter",
        "allreduce": "all-reduce",
        "broadcast": "broadcast",
        "send": "send",
        "recv": "receive",
    }

    def __init__(self, worker: Worker):
        super().__init__()
        mesh, self.sent = worker.world.mesh, {}
        self.axes = {mesh.get_group(axis).group_name: axis for axis in ("dp", "tp", "pp")}
        if worker.tie is not None:
            self.axes[worker.tie.group_name] = "pp"

    def see(self, func, args, out):
        if func.namespace not in ("c10d", "_c10d_functional"):
            return
        name = func._overloadpacket.__name__.replace("_", "")
        kind = next((kind for part, kind in self.KINDS.items() if part in name), None)
        if kind is not None:
            tensors = [t for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor)]
            self.count(self.axis(args), kind, max(tensors, key=lambda t: t.nbytes))

    def axis(self, args: tuple) -> str:
        """The axis of the process group in a collective's arguments, as a name or boxed."""
        for x in args:
            if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()):
                x = ProcessGroup.unbox(x).group_name
            if isinstance(x, str) and x in self.axes:
                return self.axes[x]
        return "world"

    def count(self, axis: str, kind: str, tensor: torch.Tensor):
        total = self.sent.setdefault(f"{axis} {kind}", {"calls": 0, "bytes": 0})
        total["calls"] += 1
        total["bytes"] += tensor.nbytes


# --------------------------------------------------------------------------------------------------
# 3. The trace


def in_backward() -> bool:
    """Whether autograd is at work in this thread. PyTorch has no public name for this."""
    return torch._C._current_graph_task_id() != -1


class Trace(Collectives):
    """Prints a line for each collective: rank, step, micro-batch, pass, axis, kind, shape, bytes.

    It does not see the collectives of a compiled block."""

    micro = 0  # the micro-batch that this rank works on

    def __init__(self, worker: Worker, step: int):
        super().__init__(worker)
        place = ", ".join(f"{axis} {worker.world.at(axis)}" for axis in ("pp", "dp", "tp"))
        self.who = f"rank {worker.world.rank} ({place})  step {step}"

    def count(self, axis, kind, tensor):
        super().count(axis, kind, tensor)
        where = getattr(tensor, "passing", "")
        if axis in ("dp", "tp"):
            where = f"micro-batch {Trace.micro} {'backward' if in_backward() else 'forward'}"
        shape = str(tuple(tensor.shape))
        # Not print: on ranks above 0, train.py has no stdout.
        sys.__stdout__.write(
            f"{self.who}  {where:<22}  {axis:<5} {kind:<14} {shape:<18} "
            f"{name_of(tensor.dtype):<9} {tensor.nbytes:,} bytes\n"
        )
        sys.__stdout__.flush()


class TracedStage(LeanPipelineStage):
    """A pipeline stage that notes on which micro-batch it works and, in each tensor that it sends
    or receives, to which micro-batch and pass the tensor belongs."""

    def work(self, method, micro, *args, **options):
        Trace.micro = micro
        return method(self, micro, *args, **options)

    forward_one_chunk = partialmethod(work, LeanPipelineStage.forward_one_chunk)
    backward_one_chunk = partialmethod(work, LeanPipelineStage.backward_one_chunk)

    def messages(self, method, which, micro):
        found = method(self, micro)
        for message in found:
            message.tensor.passing = f"micro-batch {micro} {which}"
        return found

    get_fwd_recv_ops = partialmethod(messages, LeanPipelineStage.get_fwd_recv_ops, "forward")
    get_fwd_send_ops = partialmethod(messages, LeanPipelineStage.get_fwd_send_ops, "forward")
    get_bwd_recv_ops = partialmethod(messages, LeanPipelineStage.get_bwd_recv_ops, "backward")
    get_bwd_send_ops = partialmethod(messages, LeanPipelineStage.get_bwd_send_ops, "backward")


def next_micro_batch(module, inputs):
    Trace.micro += 1


class TracedRun(train.Run):
    """A run that prints a line for each collective of its training steps."""

    def build(self, checkpoint=None):
        super().build(checkpoint)
        if self.world.layout.pp == 1:  # the micro-batches come one after the other
            self.worker.parts[0].register_forward_pre_hook(next_micro_batch, prepend=True)

    def train_step(self):
        self.watch.bar.close()  # the lines would go through it
        Trace.micro = -1
        with Trace(self.worker, self.state.step + 1):
            super().train_step()
