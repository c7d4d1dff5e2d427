"""lab/cluster.py - what a layout asks of a cluster, without the cluster.

    python -m lab.cluster rehearse --preset flm-16b --tp 2 --dp 96 --sequence-parallel
    python -m lab.cluster draw --pp 4 --micro-batches 8
    torchrun --standalone --nproc-per-node 2 -m lab.cluster trace --pp 2 --steps 1

rehearse says whether a run of train.py fits a cluster, and how long a step takes: memory, traffic
and time of each pipeline rank. It is this file. draw prints the timetable of a pipeline
(lab/timetable.py). trace trains, and prints a line for each collective (lab/collectives.py).

A rehearsal runs the very code of a training step, parallel.build_parts and Worker.gradients. Its
tensors have shapes and no numbers (fake tensors), and its messages are lost. The memory that the
tensors would take and the messages are counted; neither comes from a formula:

    1. Private names       what this file uses of PyTorch that PyTorch does not promise to keep
    2. The fake cluster    one rank of many; the others are not there
    3. Measuring           the memory and the collectives of one step of that rank
    4. The rehearsal       from two small steps of each pipeline rank to the real step, and its time
    5. The report          the rehearsal as text
    6. The command line
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import gc
import math
import multiprocessing
import os
import sys
import weakref
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

import console
import parallel
import settings
import train
from console import refuse
from flm import FLM, FLMConfig, count_parameters, forward_flops
from lab.collectives import Collectives, TracedRun, TracedStage, Watch
from lab.timetable import SCHEDULES, closed_bubble, draw
from launch import launch
from parallel import Layout, LeanPipelineStage, Worker, World, local
from settings import MODES, Settings, flag, layout_of, option, resolve, with_file

GiB = 2**30

# --------------------------------------------------------------------------------------------------
# 1. Private names, as PyTorch 2.13 has them. Neither training nor draw nor trace needs them.

try:
    # Tensors with a shape and without numbers, and the way out of their mode for a moment.
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

    # Before its first step a pipeline lets its ranks agree on shapes (_warmup_p2p).
    from torch.distributed.pipelining.schedules import _PipelineSchedule

    # STATIC is what they agree on where every stage was told its shapes.
    from torch.distributed.pipelining.stage import InferenceMode

    # DTensor finds the shape of a result with fake tensors of its own.
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    # With it, .item() of a fake tensor gives a symbol in place of an error.
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # A process group whose other ranks are not there.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    agree_on_shapes = _PipelineSchedule._warmup_p2p
    find_shape = ShardingPropagator._propagate_tensor_meta_non_cached
    missing_name = None
except (ImportError, AttributeError) as error:
    missing_name = str(error).split(" (")[0]  # without the path of the file


# --------------------------------------------------------------------------------------------------
# 2. The fake cluster


@dataclass(frozen=True)
class Job:
    """The training step that is rehearsed."""

    config: FLMConfig
    layout: Layout
    batch_size: int  # rows of the whole batch
    micro: int  # rows of a micro-batch
    weights: torch.dtype = torch.float32
    arithmetic: torch.dtype = torch.bfloat16

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one dp rank."""
        return self.batch_size // self.layout.dp // self.micro


class FakeWorld(World):
    """A World whose other ranks are not there, and whose tensors have no numbers to be summed."""

    def begin_sum(self, *numbers):
        return lambda: [1.0 for _ in numbers]


@contextlib.contextmanager
def fake_cluster(job: Job, pp_rank: int):
    """Make this process the rank at (pp_rank, dp 0, tp 0) of a layout whose other ranks are not
    there: what it sends is lost, and what it would receive is not written. Yields its World.

    DTensor remembers its first mesh, so a process can do this once."""
    layout = job.layout
    rank = pp_rank * layout.dp * layout.tp
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.size)
    shape = (layout.pp, layout.dp, layout.tp)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("pp", "dp", "tp"))
    world = FakeWorld(layout, rank, mesh)

    def stage_with_shapes(part, *args, **options):
        stage = LeanPipelineStage(part, *args, **options, **stage_shapes(job, part))
        stage._inference_mode = InferenceMode.STATIC
        return stage

    with (
        mock.patch.object(_PipelineSchedule, agree_on_shapes.__name__, lambda *_: None),
        mock.patch.object(parallel, "LeanPipelineStage", stage_with_shapes),
    ):
        yield world
    dist.destroy_process_group()


def stage_shapes(job: Job, part: FLM) -> dict:
    """What a pipeline stage receives and sends. Without this, it would ask its neighbours."""
    T, C, tp = job.config.max_seq_len, job.config.d_model, job.layout.tp
    like = dict(dtype=job.arithmetic, device="meta", requires_grad=True)
    positions = T // tp if job.layout.sequence_parallel else T
    x = y = torch.empty(job.micro, positions, C, **like)
    shapes = {"input_grads": x.detach(), "output_grads": x.detach()}
    if part.embedding is not None:
        x = torch.empty(job.micro, T, dtype=torch.long, device="meta")
    if part.head is not None:
        y, shapes["output_grads"] = torch.empty((), **like | {"dtype": torch.float32}), None
    return shapes | {"input_args": x, "output_args": y}


class Memory(Watch):
    """Follows the bytes of all tensors of one FakeTensorMode: `now`, and `peak` since it was last
    set."""

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.fake, self.sizes, self.now, self.peak = fake, {}, 0, 0
        self.resize = torch.UntypedStorage.resize_

    def see(self, func, args, out):
        for t in tree_leaves((args, out)):
            if isinstance(t, torch.Tensor) and getattr(t, "fake_mode", None) is self.fake:
                self.follow(t.untyped_storage())

    def follow(self, storage: torch.UntypedStorage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            weakref.finalize(storage, self.forget, key)
        self.now += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peak = max(self.peak, self.now)

    def forget(self, key: int):
        self.now -= self.sizes.pop(key)

    def resized(self, storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        """In place of UntypedStorage.resize_, with which fully_shard allocates and frees what it
        gathers. No dispatcher sees that."""
        self.resize(storage, size)
        if storage._cdata in self.sizes:
            self.follow(storage)
        return storage


@contextlib.contextmanager
def fake_tensors():
    """Inside, every FLM is allocated in fake tensors. Yields their FakeTensorMode, and the Memory
    that they would take."""
    fake, allocate = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()), FLM.to_empty
    memory = Memory(fake)

    def to_empty(part, device):
        with fake:
            return allocate(part, device=device)

    def find_shape_outside(propagator, schema):
        with unset_fake_temporarily():  # the tensors in which DTensor finds a shape do not count
            return find_shape(propagator, schema)

    with (
        mock.patch.object(FLM, "to_empty", to_empty),
        mock.patch.object(torch.UntypedStorage, "resize_", lambda s, n: memory.resized(s, n)),
        mock.patch.object(ShardingPropagator, find_shape.__name__, find_shape_outside),
        memory,
    ):
        yield fake, memory


# --------------------------------------------------------------------------------------------------
# 3. Measuring

WITHOUT, WITH = "without activation checkpointing", "with activation checkpointing"
CASES = (WITHOUT, WITH)


ticks = None  # in a process of measure_ranks: the queue to the process that shows the progress


def begin_reporting(queue: multiprocessing.SimpleQueue):
    """What a process of measure_ranks does first."""
    global ticks
    ticks = queue


def tick():
    """One more forward pass of a micro-batch is done."""
    if ticks is not None:
        ticks.put(1)


def measure(job: Job, world: World, n: int) -> dict:
    """What a rank of a fake cluster holds and sends in a step of n micro-batches.

    parameters, parameters_tp: numbers that the rank keeps, and that it computes with (gathered
    along dp). weights, moments, gradients: their bytes between the passes and the optimizer's step.
    peak, peak_update: the largest number of bytes in the passes, and in the optimizer's step. sent:
    see Collectives."""
    with fake_tensors() as (fake, memory):
        dtypes = job.weights, job.arithmetic
        parts = parallel.build_parts(job.config, world, torch.device("cpu"), *dtypes)
        worker = Worker(parts, world, job.arithmetic)
        parameters = [p for _, p in worker.named]
        with fake:
            optimizer = torch.optim.AdamW(parameters, fused=True)
            for p in parameters:  # a first update makes the moments
                p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad()
            tokens = torch.zeros(n * job.micro, job.config.max_seq_len, dtype=torch.long)
            gc.collect()
            memory.peak = memory.now
            for part in parts:
                part.register_forward_hook(lambda *_: tick())
            with Collectives(worker) as collectives:
                worker.gradients(tokens, tokens, job.micro)
            peak, memory.peak = memory.peak, memory.now
            optimizer.step()
        states = optimizer.state.values()
        return {
            "parameters": sum(local(p).numel() for p in parameters),
            "parameters_tp": sum(p.numel() // tp_shards(p) for p in parameters),
            "weights": sum(local(p).nbytes for p in parameters),
            "moments": sum(local(s[k]).nbytes for s in states for k in ("exp_avg", "exp_avg_sq")),
            "gradients": sum(local(p.grad).nbytes for p in parameters),
            "peak": peak,
            "peak_update": memory.peak,
            "sent": collectives.sent,
        }


def tp_shards(p: torch.Tensor) -> int:
    """Into how many pieces tensor parallelism cuts a parameter."""
    if not isinstance(p, DTensor):
        return 1
    axes = zip(p.device_mesh.mesh_dim_names, p.device_mesh.shape, p.placements)
    return math.prod(n for axis, n, place in axes if axis == "tp" and not place.is_replicate())


def measure_rank(job: Job, pp_rank: int, counts: list[int]) -> list[dict]:
    """measure(...) of one rank for each number of micro-batches. To be called in a new process."""
    with fake_cluster(job, pp_rank) as world:
        return [measure(job, world, n) for n in counts]


def measure_ranks(job: Job, counts: list[int]) -> dict[str, list[list[dict]]]:
    """{case: [measure_rank(...) for each pp rank]}, each in a process of its own, as many at once
    as there are cores. The progress counts their forward passes of a micro-batch."""
    pp, tasks = job.layout.pp, []
    for case in CASES:
        layout = dataclasses.replace(job.layout, activation_checkpointing=case == WITH)
        tasks += [(dataclasses.replace(job, layout=layout), rank, counts) for rank in range(pp)]
    workers = min(len(tasks), os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")  # a forked process would inherit process groups
    queue = spawn.SimpleQueue()
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, spawn, begin_reporting, (queue,), max_tasks_per_child=1
    )
    passes = len(tasks) * sum(counts) * job.layout.pipeline_stages // pp
    desc = f"measuring {len(tasks)} ranks, {workers} at a time"
    with pool, console.progress(total=passes, desc=desc, unit="passes", delay=0) as bar:
        found = running = [pool.submit(measure_rank, *task) for task in tasks]
        while running:
            _, running = concurrent.futures.wait(running, timeout=1)
            while not queue.empty():
                bar.update(queue.get())
            bar.refresh()
        found = [task.result() for task in found]
    return {WITHOUT: found[:pp], WITH: found[pp:]}


# --------------------------------------------------------------------------------------------------
# 4. The rehearsal


@dataclass(frozen=True)
class Cluster:
    """What a rehearsal assumes. By default the paper's A800: 80 GiB, and an NVLink of 400 GB/s in
    both directions together. The paper names neither the network nor the utilisation."""

    memory_gb: float = option(80, "memory of a GPU in GiB")
    peak_tflops: float = option(312, "TFLOP/s of a GPU, dense bf16")
    utilisation: float = option(0.6, "share of them that a GPU reaches while it computes")
    tp_link: float = option(200, "GB/s that a rank sends along tp")
    network: float = option(25, "GB/s that a rank sends along dp and pp")


def check_rehearsal(job: Job, cluster: Cluster) -> list[str]:
    """Every reason why this step cannot be rehearsed."""
    layout = job.layout
    problems = parallel.check_layout(layout, job.config, job.batch_size, job.micro)
    for name, value in dataclasses.asdict(cluster).items():
        if not 0 < value < math.inf:
            problems.append(f"{flag(name)} {value}: must be a number above 0")
    if layout.dp > 1 and not layout.sharded:
        problems.append(
            f"--dp {layout.dp}: add --shard-optimizer; without it, gradients are exchanged outside "
            "Python, where a rehearsal does not see it"
        )
    if missing_name is not None:
        problems.append(
            f"a rehearsal needs private names of PyTorch 2.13, and this is {torch.__version__}: "
            f"{missing_name}; pip install torch==2.13.*"
        )
    return problems


def counts_to_measure(job: Job) -> list[int]:
    """Two numbers of micro-batches from which the real one can be extrapolated; or the real one.

    From the first one on, a rank has as many micro-batches in memory as it will ever have."""
    layout = job.layout
    few = [layout.pp + 1, layout.pp + 2]
    if layout.pipeline_stages > layout.pp:
        few = [2 * layout.pp, 3 * layout.pp]
    return few if job.micro_batches > few[1] else [job.micro_batches]


def extrapolate(counts: list[int], values: list, n: int):
    """The value at n of the line through `values` at `counts`; for dicts, of each of their values.

    >>> extrapolate([2, 3], [{"peak": 10}, {"peak": 14}], 10)
    {'peak': 42}
    """
    if len(counts) == 1:
        return values[0]
    if isinstance(values[0], dict):
        return {k: extrapolate(counts, [v[k] for v in values], n) for k in values[0]}
    (a, b), (at_a, at_b) = counts, values
    return at_a + (at_b - at_a) * (n - a) // (b - a)


def forward_flop(job: Job, pp_rank: int) -> tuple[int, int]:
    """FLOP of one rank in the forward passes of a step: (blocks, head)."""
    config, layout = job.config, job.layout
    tokens = job.batch_size // layout.dp * config.max_seq_len
    head = 2 * config.vocab_size * config.d_model
    blocks = (forward_flops(config, config.max_seq_len) - head) // layout.pp
    last = pp_rank == layout.pp - 1
    return blocks * tokens // layout.tp, last * head * tokens // layout.tp


def sent_bytes(sent: dict, layout: Layout) -> dict[str, float]:
    """Bytes that leave a rank along each axis. In a ring of N ranks all but 1/N of a gathered or
    scattered tensor passes through each rank, of an all-reduced tensor twice as much."""
    total = {"tp": 0.0, "pp": 0.0, "dp": 0.0}
    for what, found in sent.items():
        axis, kind = what.split()
        ring = (
            2 if axis == "pp" else getattr(layout, axis)
        )  # along pp: the ends of a tied embedding
        share = {"send": 1, "receive": 0, "all-reduce": 2 * (ring - 1) / ring}
        total[axis] += found["bytes"] * share.get(kind, (ring - 1) / ring)
    return total


def step_time(job: Job, ranks: list[dict], cluster: Cluster) -> dict[str, float]:
    """Seconds of a step, by what they go to. Nothing overlaps: the slowest pp rank's time, and the
    bubble."""
    speed, times = cluster.peak_tflops * cluster.utilisation * 1e12, []
    links = {"tp": cluster.tp_link, "pp": cluster.network, "dp": cluster.network}
    for rank in ranks:
        sent = sent_bytes(rank["sent"], job.layout)
        time = {axis: sent[axis] / (link * 1e9) for axis, link in links.items()}
        times.append({"compute": rank["flop_computed"] / speed, **time})
    time = max(times, key=lambda t: t["compute"] + t["tp"] + t["pp"])
    bubble = closed_bubble(job.layout.pp, job.micro_batches, job.layout.schedule)[1]
    time["bubble"] = (time["compute"] + time["tp"] + time["pp"]) * bubble / (1 - bubble)
    return time | {"step": sum(time.values())}


def peak(ranks: list[dict]) -> float:
    """The largest memory of any rank in GiB."""
    return max(rank["peak"] for rank in ranks) / GiB


def choose_case(cases: dict[str, list[dict]], layout: Layout, memory_gb: float) -> str:
    """The case that the layout asks for; WITH where the memory is too small without. Raises
    ValueError where it is too small in both cases."""
    if min(map(peak, cases.values())) > memory_gb:
        found = "\n  ".join(verdicts(cases, layout, memory_gb))
        advice = "raise --tp or --pp, lower --micro-batch, or add --sequence-parallel"
        raise ValueError(f"{layout} needs more memory than a GPU has:\n  {found}\n{advice}")
    again = layout.activation_checkpointing or peak(cases[WITHOUT]) > memory_gb
    return WITH if again else WITHOUT


def rehearse(job: Job, cluster: Cluster = Cluster()) -> dict:
    """A training step of a layout of any size, on this machine: one rank of each pipeline stage,
    with all its layers, without and with activation checkpointing. What grows with the number of
    micro-batches is measured for two small numbers, and extrapolated.

    Returns plain JSON values: sizes in bytes, times in seconds; see `report`. Raises ValueError
    with every reason why the step cannot be rehearsed, and where it does not fit the memory."""
    refuse(check_rehearsal(job, cluster), "this layout cannot be rehearsed:")
    counts, cases = counts_to_measure(job), {}
    for case, found in measure_ranks(job, counts).items():
        cases[case] = [extrapolate(counts, values, job.micro_batches) for values in found]
        for pp_rank, rank in enumerate(cases[case]):
            blocks, head = forward_flop(job, pp_rank)
            rank["peak"] = max(rank["peak"], rank["peak_update"])
            rank["flop"] = 3 * (blocks + head)
            rank["flop_computed"] = rank["flop"] + blocks * (case == WITH)
    case, T = choose_case(cases, job.layout, cluster.memory_gb), job.config.max_seq_len
    time = step_time(job, cases[case], cluster)
    flop = 3 * forward_flops(job.config, T) * job.batch_size * T
    return {
        "cases": cases,
        "case": case,
        "time": time,
        "flop": flop,
        "tflops": flop / job.layout.size / time["step"] / 1e12,
        "tokens_per_second": job.batch_size * T / time["step"],
    }


# --------------------------------------------------------------------------------------------------
# 5. The report


def table_of_ranks(cases: dict[str, list[dict]], case: str) -> list[str]:
    """A line for each quantity, a column for each pp rank."""
    ranks = cases[case]
    rows = [["pp rank", *map(str, range(len(ranks)))]]
    rows.append(["parameters it computes with", *(f"{r['parameters_tp']:,}" for r in ranks)])
    rows.append(["parameters it keeps", *(f"{r['parameters']:,}" for r in ranks)])
    sizes = {name: [r[name] for r in ranks] for name in ("weights", "moments", "gradients")}
    sizes |= {f"peak {c}": [r["peak"] for r in cases[c]] for c in CASES}
    for name, values in sizes.items():
        rows.append([f"{name}, GiB", *(f"{size / GiB:.2f}" for size in values)])
    for what in sorted({what for r in ranks for what in r["sent"]}):
        found = [r["sent"].get(what) for r in ranks]
        cells = [f"{s['bytes'] / GiB:,.2f} ({s['calls']:,})" if s else "-" for s in found]
        rows.append([f"{what}, GiB (calls)", *cells])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]) for r in rows]


def verdicts(cases: dict[str, list[dict]], layout: Layout, memory_gb: float) -> list[str]:
    """What fits the memory: without and with activation checkpointing, and without the distributed
    optimizer."""
    sizes = {case: peak(ranks) for case, ranks in cases.items()}
    if layout.sharded and layout.dp > 1:
        others = layout.dp - 1  # they keep the rest of the weights and moments
        sizes["without the distributed optimizer"] = peak(
            [
                r | {"peak": r["peak"] + others * (r["weights"] + r["moments"])}
                for r in cases[WITHOUT]
            ]
        )
    return [
        f"{words}: {size:.1f} GiB of {memory_gb:g}: {'fits' if size <= memory_gb else 'too much'}"
        for words, size in sizes.items()
    ]


def report(job: Job, cluster: Cluster, result: dict) -> str:
    """What `rehearse` returned, for a person."""
    config, layout, n, t = job.config, job.layout, job.micro_batches, result["time"]
    counts = counts_to_measure(job)
    scaled = f"; what grows with them is scaled to {n}" if len(counts) > 1 else ""
    formula, bubble = closed_bubble(layout.pp, n, layout.schedule)
    lines = [
        f"{count_parameters(config) / 1e9:.1f} billion parameters on {layout.size} GPUs of "
        f"{cluster.memory_gb:g} GiB: {layout}",
        f"a step: {job.batch_size} rows of {config.max_seq_len} tokens, {n} micro-batches of "
        f"{job.micro} per dp rank",
        "measured on tensors without numbers: one rank at each place along pp, all its "
        f"{config.n_layers // layout.pp} layers, {' and '.join(map(str, counts))} micro-batches"
        + scaled,
        "",
        *table_of_ranks(result["cases"], result["case"]),
        "",
        *verdicts(result["cases"], layout, cluster.memory_gb),
        "not in these numbers: fragmentation, the libraries' own buffers, --compile's savings",
        "",
        f"bubble of the pipeline: {formula} = {bubble:.2%}",
        f"a step {result['case']}: {t['step']:.1f} s = {t['compute']:.1f} computing + "
        f"{t['tp']:.1f} tp + {t['pp']:.1f} pp + {t['bubble']:.1f} bubble + {t['dp']:.1f} dp",
        f"  at {cluster.peak_tflops:g} TFLOP/s, {cluster.utilisation:.0%} of it (assumed) while "
        f"computing, {cluster.tp_link:g} GB/s each way along tp, {cluster.network:g} GB/s",
        "  (assumed) along dp and pp, nothing overlapping",
        f"  {result['flop'] / 1e15:,.0f} PFLOP of the model (closed formula, flm.forward_flops): "
        f"{result['tflops']:.0f} TFLOP/s per GPU, "
        f"{result['tflops'] / cluster.peak_tflops:.1%} of its peak; "
        f"{result['tokens_per_second']:,.0f} tokens/s",
    ]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# 6. The command line

HELP = {
    "rehearse": "Rehearse a training step of any layout on this machine. Takes the options of "
    "train.py; those that change nothing here, such as --data, are ignored.",
    "draw": "Print which rank of a pipeline computes what at which time, and its bubble.",
    "trace": "Train, and print a line for each collective of each step. Takes the options of "
    "train.py; start it with torchrun.",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lab.cluster",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="What a layout asks of a cluster, without the cluster.",
        epilog="examples:\n" + __doc__.split("\n\n")[1],
    )
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {}
    for name, text in HELP.items():
        parents = [] if name == "draw" else [settings.make_parser()]
        parsers[name] = commands.add_parser(
            name, help=text, description=text, parents=parents, conflict_handler="resolve"
        )
    group = parsers["rehearse"].add_argument_group("on which cluster")
    for field in dataclasses.fields(Cluster):
        text = field.metadata["help"] + " (default %(default)g)"
        default = field.default
        group.add_argument(flag(field.name), type=float, default=default, metavar="X", help=text)
    add = parsers["draw"].add_argument
    add("--pp", type=int, required=True, metavar="N", help="ranks of the pipeline")
    add("--micro-batches", type=int, required=True, metavar="N", help="micro-batches of a step")
    names = ", ".join(SCHEDULES)
    add("--schedule", default="1F1B", metavar="NAME", help=f"one of {names} (default 1F1B)")
    return parser


def job_of(given: dict) -> Job:
    """A training step in the last stage of the run that these options of train.py describe."""
    s, stages = resolve(Settings(**with_file(given)))
    layout = layout_of(s, stages[-1:], (s.dp or 1) * s.tp * s.pp)
    batch_size = stages[-1].batch_size
    return Job(
        stages[-1].config,
        layout,
        batch_size,
        parallel.micro_rows(layout, batch_size, s.micro_batch),
        torch.float64 if s.dtype == "float64" else torch.float32,
        getattr(torch, "bfloat16" if s.dtype == "auto" else s.dtype),
    )


def main(argv: list[str] | None = None, world: World = World()) -> int:
    """The command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    given = vars(make_parser().parse_args(words))
    command = given.pop("command")
    if command == "draw":
        print(draw(**given))
        return 0
    unused = [flag(name) for name in (*MODES, "compile") if given.get(name)]
    refuse(f"{name}: {command} makes no use of it, leave it out" for name in unused)
    if command == "rehearse":
        names = [field.name for field in dataclasses.fields(Cluster)]
        cluster = Cluster(**{name: given.pop(name) for name in names})
        job = job_of(given)
        print(report(job, cluster, rehearse(job, cluster)))
        return 0
    if world.size == 1:
        raise ValueError(
            "one process has no collectives: start several, as in\n  torchrun --standalone "
            "--nproc-per-node 2 -m lab.cluster trace --pp 2 --steps 1"
        )
    with mock.patch.object(parallel, "LeanPipelineStage", TracedStage):
        return train.main(words[1:], world, TracedRun)


if __name__ == "__main__":
    launch(main)
