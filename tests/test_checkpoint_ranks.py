"""Tests of checkpoint.py with several processes that write one checkpoint."""

import subprocess
import sys

import torch
from helpers import ROOT, build, tiny

from checkpoint import load_model

TWO_RANKS = """
import os, resource, sys
from pathlib import Path
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from checkpoint import write_checkpoint
from parallel import World

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
mesh, everyone = init_device_mesh("cpu", (2,)), dist.group.WORLD
world = World(rank=rank, control=everyone, files=dist.new_group(backend="gloo"))
blob = torch.load(folder / "blob.pt")
pieces = {name: tensor.chunk(2)[rank].contiguous() for name, tensor in blob["model"].items()}
sharded = {
    name: DTensor.from_local(
        piece, mesh, [Shard(0)], run_check=False,
        shape=blob["model"][name].shape, stride=blob["model"][name].stride(),
    )
    for name, piece in pieces.items()
}


def attempt(name):
    try:
        write_checkpoint(folder / name, {"model": sharded}, blob["info"], world)
        (folder / f"{rank} {name.split('/')[-1]}.txt").write_text("written")
    except OSError as error:
        (folder / f"{rank} {name.split('/')[-1]}.txt").write_text(str(error))


attempt("step-00000001")
attempt("a file/step-00000002")
if rank == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
attempt("step-00000003")
if rank == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
dist.barrier()
os._exit(0)  # gloo's threads may abort Python's own shutdown
"""


def test_a_failure_of_one_rank_reaches_all(tmp_path):
    """Two ranks write their halves of each tensor, and one process reads the whole. Where rank 0
    cannot make the folder, or rank 1's disk is full, both ranks raise an OSError that names the
    checkpoint, nobody waits, and nothing is left of it."""
    model = build(tiny(), dtype=torch.float32)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    info = {"config": tiny().to_dict(), "dtype": "float32", "samples": 0, "growth": None}
    info["tokenizer"] = "bytes"
    torch.save({"model": weights, "info": info}, tmp_path / "blob.pt")
    (tmp_path / "a file").write_text("no folder")
    words = [sys.executable, "-c", TWO_RANKS, str(tmp_path)]
    ranks = [
        subprocess.Popen([*words, str(rank)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        assert rank.wait() == 0, rank.stderr.read()
    said = {path.name: path.read_text() for path in tmp_path.glob("? step-*.txt")}
    assert len(said) == 6
    for rank in range(2):
        assert said[f"{rank} step-00000001.txt"] == "written"
        assert "could not write the checkpoint" in said[f"{rank} step-00000002.txt"]
        assert "could not write the checkpoint" in said[f"{rank} step-00000003.txt"]
    loaded = dict(load_model(tmp_path)[0].named_parameters())
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step-00000001"]
