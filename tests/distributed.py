"""What a test of several processes runs in each of them: python distributed.py FOLDER RANK WORLD

Starting a process takes seconds, its work here a tenth of one, so one group of processes serves many cases: each reads
FOLDER/cases.pickle, a list of (name, layout, settings), meets the others once, and goes through the cases in order on a mesh of
their own. Rank 0 writes FOLDER/results.pickle."""
import dataclasses
import os
import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import data  # noqa: E402
import muP  # noqa: E402
import parallel  # noqa: E402
import train  # noqa: E402
from flm import FLMConfig, IGNORE, growth_mask, read_info, write_checkpoint  # noqa: E402

CONFIG = FLMConfig(n_layers=4, d_model=24, n_heads=4, head_dim=6, d_ff=40, vocab_size=48, max_seq_len=16, mup_base_width=16)
ROWS, STEPS, CLIP = 16, 3, 0.05
# A growth in mid-ramp: 4 layers of which the first was there before, and so on in each dimension.
MID_RAMP = 40                                    # samples at which the growth below stands, so that its mask is at 0.4
GROWTH = {"old": {"n_layers": 3, "d_model": 12, "n_heads": 2, "d_ff": 20}, "layer_map": [0, 1, None, 2], "start": 0, "ramp": 100, "growths": 1}
PLAIN = train.Machine(torch.device("cpu"), torch.float64, 1.0, "")


def batch(step: int, teacher: bool):
    """ROWS rows of numbers with a rule in them; with `teacher`, rows that supervise few and uneven numbers of tokens."""
    g = torch.Generator().manual_seed(100 + step)
    x = torch.randint(48, (ROWS, 17), generator=g)
    x[:, 1::2] = (x[:, 0:-1:2] * 7 + 3) % 48
    tokens, targets = x[:, :-1], x[:, 1:].clone()
    if teacher:
        for row in range(0, ROWS, 2):
            targets[row, row // 2 + 1:] = IGNORE
            targets[row, :row // 4] = IGNORE
        targets[3] = IGNORE                      # and a row without any
    return tokens, targets


class Rows:
    """A held-out corpus of 13 language rows and 9 teacher rows, each of which supervises two labels."""
    seq_len, tokenizer = 16, data.get_tokenizer("bytes")

    def n_rows(self, split, signal):
        return 13 if signal == "language" else 9

    def rows(self, split, signal, start, count):
        g = torch.Generator().manual_seed(start + 1000 * (signal == "teacher"))
        tokens = torch.randint(256, (count, 17), generator=g)
        targets = tokens[:, 1:].clone()
        if signal == "teacher":
            labels = [self.tokenizer.encode_ordinary(data.EMOJI[k])[-1] for k in (0, 1)]
            targets[:] = IGNORE
            targets[:, 4], targets[:, 11] = labels[start % 2], labels[start // 2 % 2]
        return tokens[:, :-1], targets


def evaluate(world, micro) -> dict:
    """train.evaluate of a model with untrained, not small, weights."""
    config = CONFIG.replace(vocab_size=288, init_std=0.5)
    worker = parallel.Worker(parallel.build(config, world, PLAIN.device, torch.float64, torch.float64), world, torch.float64)
    worker.init_weights(3)
    return train.evaluate(worker, Rows(), 100, micro)


def steps(world, config=CONFIG, micro=None, teacher=False, growth=None, dtype="float64", compiled=False, arithmetic=None, load=None, save=None,
          first=0, count=STEPS):
    """A few AdamW steps from the same start in any layout: [(loss, norm)], the held-out loss before and after, the gradients of the last
    step and the weights after it, whole."""
    machine = dataclasses.replace(PLAIN, dtype=getattr(torch, arithmetic or dtype))
    weights = getattr(torch, dtype)
    torch.manual_seed(0)
    worker = parallel.Worker(parallel.build(config, world, machine.device, weights, machine.dtype, compiled), world, machine.dtype)
    s = train.Settings(lr=1e-2, weight_decay=0.1)
    optimizer = train.make_optimizer(worker, s)
    if load:
        train.read_into(worker, optimizer, load)
    else:
        worker.init_weights(0)
        with torch.no_grad():                    # biases and gains that are not 0 and 1, the same everywhere
            for name, p in worker.named:
                if p.dim() == 1:
                    value = muP.initial_value(config, "embedding.weight", (p.shape[0], 3), 5)[:, 0].to(p.dtype) * 20
                    parallel.local(p).add_(parallel.local(cut(value, p)))
    if growth == "of the checkpoint":            # just grown: its mask is at 0
        growth = read_info(Path(load))["growth"]
        worker.set_masks(growth, growth_mask(growth, growth["start"]))
    else:
        worker.set_masks(growth, growth_mask(growth, MID_RAMP))
    log, grads, layout = [], {}, world.layout
    b = ROWS // layout.dp

    def held_out():
        x, y = (z[world.at("dp") * b:(world.at("dp") + 1) * b] for z in batch(99, teacher))
        found = worker.run(x, y, parallel.micro_rows(layout, ROWS, micro))
        return world.sum(found.item() if world.at("tp") == 0 else 0.0)[0]

    before = held_out()
    for step in range(first, first + count):
        x, y = (z[world.at("dp") * b:(world.at("dp") + 1) * b] for z in batch(step, teacher))
        supervised, = world.sum(int((y != IGNORE).sum()) if world.at("tp") == world.at("pp") == 0 else 0)
        nats = worker.gradients(x, y, parallel.micro_rows(layout, ROWS, micro), supervised)
        grads = {name: whole(p.grad) for name, p in worker.named}
        log.append(train.update(worker, optimizer, CLIP, 1e-2, nats, supervised))
    if save:
        write_checkpoint(Path(save), train.tensors_of(worker, optimizer), {
            "step": STEPS, "samples": MID_RAMP, "stage": 0, "config": config.to_dict(), "growth": growth, "tokenizer": "bytes",
            "dtype": dtype}, world.control)
    return log, (before, held_out()), gathered(world, grads), gathered(world, {name: whole(p) for name, p in worker.named})


def masked_loss(model, x, y) -> float:
    with torch.no_grad():
        return model(x, y).item()


def cut(value, p):
    if not isinstance(p, parallel.DTensor):
        return value
    return parallel.distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)


def whole(tensor):
    return (tensor.detach().full_tensor() if isinstance(tensor, parallel.DTensor) else tensor.detach()).clone()


def gathered(world, tensors: dict) -> dict:
    """The tensors of all pipeline stages, on every process."""
    if world.control is None:
        return tensors
    found = {}
    for part in world.gather(tensors):
        found |= part
    return found


def main():
    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    alone = parallel.World(rank=rank, control=dist.new_group(backend="gloo"))
    results = {}
    for name, layout, options in pickle.loads((folder / "cases.pickle").read_bytes()):
        world = parallel.arrange(alone, layout, torch.device("cpu"))
        results[name] = (evaluate if "evaluate" in name else steps)(world, **options)
    if rank == 0:
        (folder / "results.pickle").write_bytes(pickle.dumps(results))
    dist.barrier(alone.control)
    os._exit(0)                                  # see parallel.leave


if __name__ == "__main__":
    main()
