"""What a test of several ranks runs in each of them: python tests/distributed.py FOLDER SIZE

Starting a process takes seconds, its work here a tenth of one. So one group of ranks serves many
cases: this program imports PyTorch once and forks SIZE ranks. Each rank reads FOLDER/cases.pickle,
a list of (name, layout, options), meets the others once, and goes through the cases in order. Rank
0 writes FOLDER/results/NAME.pickle for each."""

import dataclasses
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import data
import grow
import muP
import parallel
import train
from checkpoint import read_info, read_training, training_tensors, write_checkpoint
from flm import IGNORE, FLMConfig, growth_mask
from tokenizer import EMOJI

CONFIG = FLMConfig(
    n_layers=4,
    d_model=24,
    n_heads=4,
    head_dim=6,
    d_ff=40,
    vocab_size=48,
    max_seq_len=16,
    mup_base_width=16,
)
DEEP = CONFIG.replace(depth_alpha=0.5, base_layers=2)  # CompleteP
BIGGER = DEEP.replace(n_layers=6, d_model=36, n_heads=6, d_ff=64)
ROWS, STEPS, CLIP = 16, 3, 0.05
# A growth in mid-ramp, at MID_RAMP samples, so that its mask is at 0.4.
MID_RAMP = 40
GROWTH = {
    "old": {"n_layers": 3, "d_model": 12, "n_heads": 2, "d_ff": 20},
    "layer_map": [0, 1, None, 2],
    "start": 0,
    "ramp": 100,
    "growths": 1,
}
CPU = torch.device("cpu")


def batch(step: int, teacher: bool):
    """ROWS rows with a rule in them; with `teacher`, rows that supervise few and uneven numbers of
    tokens."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randint(48, (ROWS, 17), generator=generator)
    x[:, 1::2] = (x[:, 0:-1:2] * 7 + 3) % 48
    tokens, targets = x[:, :-1], x[:, 1:].clone()
    if teacher:
        for row in range(0, ROWS, 2):
            targets[row, row // 2 + 1 :] = IGNORE
            targets[row, : row // 4] = IGNORE
        targets[3] = IGNORE  # a row without any
    return tokens, targets


def rows_of(world: parallel.World, step: int, teacher: bool):
    """The rows of this dp rank."""
    b = ROWS // world.layout.dp
    mine = slice(world.at("dp") * b, (world.at("dp") + 1) * b)
    tokens, targets = batch(step, teacher)
    return tokens[mine], targets[mine]


class Rows:
    """A held-out corpus of 13 language rows and 9 teacher rows, each with two labels."""

    seq_len, tokenizer = 16, data.get_tokenizer("bytes")

    def rows_by_source(self, split, signal):
        return {"en": 11, "zh": 2} if signal == "language" else {"teacher": 9}

    def documents(self, tokens):
        return (tokens % 8 == 0).cumsum(1)

    def rows(self, split, signal, start, count):
        generator = torch.Generator().manual_seed(start + 1000 * (signal == "teacher"))
        tokens = torch.randint(256, (count, 17), generator=generator)
        targets = tokens[:, 1:].clone()
        if signal == "teacher":
            labels = [self.tokenizer.encode_ordinary(EMOJI[k])[-1] for k in (0, 1)]
            targets[:] = IGNORE
            targets[:, 4], targets[:, 11] = labels[start % 2], labels[start // 2 % 2]
        return tokens[:, :-1], targets


def evaluate(world: parallel.World, micro: int) -> dict:
    """train.evaluate of a model whose weights are untrained and not small."""
    config = CONFIG.replace(vocab_size=288, init_std=0.5)
    parts = parallel.build_parts(config, world, CPU, torch.float64, torch.float64)
    worker = parallel.Worker(parts, world, torch.float64)
    worker.init_weights(3)
    return train.evaluate(worker, Rows(), 100, micro)


@dataclasses.dataclass
class Job:
    """A few steps of training. Every field is an option of a case."""

    config: FLMConfig = CONFIG
    micro: int | None = None
    teacher: bool = False
    growth: dict | None = None
    dtype: str = "float64"  # of the weights
    arithmetic: str | None = None  # of the products, where it is another
    compiled: bool = False
    mask: bool = False  # cut attention at every 8th token's id
    load: Path | None = None
    save: Path | None = None
    first: int = 0
    count: int = STEPS


def make_worker(world: parallel.World, job: Job):
    """A worker and its optimizer, from a checkpoint or from the same start in any layout."""
    weights = getattr(torch, job.dtype)
    arithmetic = getattr(torch, job.arithmetic or job.dtype)
    parts = parallel.build_parts(job.config, world, CPU, weights, arithmetic, job.compiled)
    worker = parallel.Worker(parts, world, arithmetic)
    optimizer = train.make_optimizer(worker, train.Settings(lr=1e-2, weight_decay=0.1))
    if job.load:
        read_training(worker.named, optimizer, job.load)
        return worker, optimizer
    worker.init_weights(0)
    with torch.no_grad():  # biases and gains that are not 0 and 1, the same in every layout
        for name, p in worker.named:
            if p.dim() == 1:
                value = muP.initial_value(job.config, "embedding.weight", (p.shape[0], 3), 5)
                value = value[:, 0].to(p.dtype) * 20
                parallel.local(p).add_(parallel.local(cut(value, p)))
    return worker, optimizer


def steps(world: parallel.World, **options):
    """A few AdamW steps: [(loss, norm)], the held-out loss before and after, the gradients of the
    last step and the weights after it, whole."""
    job = Job(**options)
    torch.manual_seed(0)
    worker, optimizer = make_worker(world, job)
    growth, samples = job.growth, MID_RAMP
    if growth == "of the checkpoint":  # just grown: its mask is at 0
        growth = read_info(job.load)["growth"]
        samples = growth["start"]
    worker.set_masks(growth, growth_mask(growth, samples))
    micro = parallel.micro_rows(world.layout, ROWS, job.micro)

    def documents(tokens):
        return (tokens % 8 == 0).cumsum(1) if job.mask else None

    def held_out() -> float:
        rows = rows_of(world, 99, job.teacher)
        found = worker.forward(*rows, micro, documents=documents(rows[0]))
        (total,) = world.sum(found.item() if world.at("tp") == 0 else 0.0)
        return total

    log, grads, before = [], {}, held_out()
    for step in range(job.first, job.first + job.count):
        x, y = rows_of(world, step, job.teacher)
        nats, count = worker.gradients(x, y, micro, documents=documents(x))
        grads = {name: whole(p.grad) for name, p in worker.named}
        log.append(train.update(worker, optimizer, CLIP, 1e-2, nats, count))
    if job.save:
        info = {"step": STEPS, "samples": MID_RAMP, "stage": 0, "config": job.config.to_dict()}
        info |= {"growth": growth, "tokenizer": "bytes", "dtype": job.dtype}
        tensors = training_tensors(worker.named, optimizer)
        write_checkpoint(job.save, tensors, info, world)
    weights = {name: whole(p) for name, p in worker.named}
    return log, (before, held_out()), gathered(world, grads), gathered(world, weights)


def grow_on_disk(world: parallel.World, source: Path, out: Path):
    """Grow a checkpoint in all four dimensions, each rank its share."""
    grow.grow_checkpoint(source, BIGGER, out, seed=1, world=world)


def cut(value: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """`value` placed like the parameter p."""
    if not isinstance(p, parallel.DTensor):
        return value
    return parallel.distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the whole of a tensor."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, parallel.DTensor) else tensor).clone()


def gathered(world: parallel.World, tensors: dict) -> dict:
    """The tensors of all pipeline stages, on every rank."""
    found = {}
    for part in world.gather(tensors):
        found |= part
    return found


def run_cases(folder: Path):
    """The work of one rank."""
    connected = parallel.connect()
    worlds = {}  # mesh -> world: process groups are made once
    kinds = {"evaluate": evaluate, "grow": grow_on_disk}
    for name, layout, options in pickle.loads((folder / "cases.pickle").read_bytes()):
        shape = (layout.pp, layout.dp, layout.tp)
        if shape not in worlds:
            worlds[shape] = parallel.arrange(connected, layout, CPU)
        world = dataclasses.replace(worlds[shape], layout=layout)
        result = kinds.get(name.split()[0], steps)(world, **options)
        if connected.rank == 0:
            file = folder / "results" / f"{name}.pickle"
            file.with_suffix(".tmp").write_bytes(pickle.dumps(result))
            file.with_suffix(".tmp").rename(file)
    parallel.leave(connected, 0)


def fork(log: Path, rank: int, size: int, listener: socket.socket, work: Callable) -> int:
    """Start a rank that calls work(); what it prints goes to `log`. Returns its process number.

    listener: from free_port, for the store through which the ranks meet."""
    pid = os.fork()
    if pid:
        return pid
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ |= environment(rank, size, listener.getsockname()[1])
    listener.close()
    torch.set_num_threads(1)
    try:
        work()
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells its processes on one machine."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    names |= {"TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0}
    return {name: str(value) for name, value in names.items()}


def free_port() -> socket.socket:
    """A socket on a free port, for serve_store."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    return listener


def serve_store(listener: socket.socket) -> dist.TCPStore:
    """A store like that of torchrun. It has threads, so all ranks must be forked before."""
    port, fd = listener.getsockname()[1], listener.detach()
    return dist.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=fd
    )


def main():
    folder, size = Path(sys.argv[1]), int(sys.argv[2])
    (folder / "results").mkdir()
    listener = free_port()
    logs = {}  # process number -> log
    for rank in range(size):
        log = folder / f"rank-{rank}.log"
        logs[fork(log, rank, size, listener, lambda: run_cases(folder))] = log
    store = serve_store(listener)
    while logs:
        pid, status = os.wait()
        log = logs.pop(pid)
        if status:  # the others wait for this one
            print(f"{log.stem} ended with {os.waitstatus_to_exitcode(status)}")
            print(log.read_text()[-4000:])
            for other in logs:
                os.kill(other, signal.SIGKILL)
            os._exit(1)
    del store


if __name__ == "__main__":
    main()
