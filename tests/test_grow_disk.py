"""Tests of grow.py, section 5 and the command: from checkpoint to checkpoint. The oracle is the
growth in memory, whose tests are in test_grow_memory.py."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from growing import BIGGER, adamw, growths, logits, tensors_of, train_step
from helpers import (
    ROOT,
    build,
    configs,
    difference,
    error,
    run_command,
    seeds,
    some_tokens,
    tiny,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import grow
import muP
from checkpoint import (
    load_model,
    read_info,
    read_tensors,
    stored_tensors,
    write_checkpoint,
)
from flm import FLM, FLMConfig, growth_mask
from grow import grow_checkpoint

fewer = settings(max_examples=8)


def save(folder: Path, model: FLM, optimizer=None, growth=None, samples: int = 80) -> Path:
    """A checkpoint of a model and, if given, its optimizer."""
    info = {
        "step": 5,
        "samples": samples,
        "config": model.config.to_dict(),
        "growth": growth,
        "tokenizer": "bytes",
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    return write_checkpoint(folder, tensors_of(model, optimizer), info)


def load(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every tensor of a checkpoint, under its own name."""
    tensors = {}
    for key, (size, dtype) in stored_tensors(folder).items():
        kind, name = key.split(".", 1)
        tensors.setdefault(kind, {})[name] = torch.empty(size, dtype=dtype)
    read_tensors(folder, tensors)
    return tensors


def assert_same_tensors(ours: dict, theirs: dict):
    assert ours.keys() == theirs.keys()
    for kind in ours:
        assert ours[kind].keys() == theirs[kind].keys()
        for name, tensor in ours[kind].items():
            other = theirs[kind][name]
            assert tensor.dtype == other.dtype and torch.equal(tensor, other), (kind, name)


def command(*words) -> str:
    """What grow.py prints, run in this process. (That freed memory goes back to the system at once
    would slow down the tests after it.)"""
    quiet = mock.patch.object(grow, "return_freed_memory")
    with contextlib.redirect_stdout(io.StringIO()) as out, quiet:
        assert grow.main([str(word) for word in words]) == 0
    return out.getvalue()


# --------------------------------------------------------------------------------------------------
# The same as in memory

PRECISIONS = st.sampled_from(["float32", "float64", "bfloat16"])


@fewer
@given(st.data(), configs(), seeds, PRECISIONS, st.booleans())
def test_on_disk_is_in_memory_bit_for_bit(tmp_path_factory, data, config, seed, dtype, moments):
    """grow_checkpoint writes the tensors, and the record, that grow makes: parameters and moments,
    every rule and dtype, the first growth and the second, with or without an optimizer; the loaded
    checkpoint computes the same logits."""
    folder = tmp_path_factory.mktemp("offline")
    model = build(config, seed, getattr(torch, dtype))
    optimizer = adamw(model) if moments else None
    if moments:
        train_step(model, optimizer, some_tokens(config, 2, config.max_seq_len + 1))
    path = save(folder / "0", model, optimizer)
    for i in (1, 2):
        new, layers = data.draw(growths(model.config))
        options = {"seed": seed, "layers": layers, "ramp": 0}
        model, optimizer, record = grow.grow(model, new, optimizer, growths=i, start=80, **options)
        info = grow_checkpoint(path, new, folder / str(i), **options)
        assert info["growth"] == record and info["config"] == new.to_dict()
        assert info["samples"] == 80 and info["step"] == 5
        path = folder / str(i)
        assert_same_tensors(load(path), tensors_of(model, optimizer))
        model.set_masks(record, 1.0)  # what a ramp of 0 means to a loader
        loaded, info = load_model(path)
        tokens = some_tokens(new, 1, 2)
        assert info["growth"] == record
        assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    shutil.rmtree(folder)


def test_a_grown_checkpoint_loads_with_its_mask(tmp_path):
    """A loader takes c from the record and the samples: 0 at first, so the logits are the old
    checkpoint's. The ramp is by default a tenth of the samples seen."""
    model, tokens = build(tiny()), some_tokens(tiny(), 2, 16)
    save(tmp_path / "a", model)
    info = grow_checkpoint(tmp_path / "a", BIGGER, tmp_path / "b", ramp=40)
    assert info["growth"]["start"] == 80 and growth_mask(info["growth"], 100) == 0.5
    loaded, _ = load_model(tmp_path / "b")
    assert difference(logits(loaded, tokens), logits(model, tokens)) <= 1e-12
    info = grow_checkpoint(tmp_path / "a", BIGGER, tmp_path / "c")
    assert info["growth"]["ramp"] == 8


SHARDED = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
tensors = torch.load(f"{folder}/blob")
for kind in tensors:
    for i, (name, tensor) in enumerate(tensors[kind].items()):
        if tensor.dim():
            side = i % tensor.dim()
            mine = tensor.chunk(2, side)[rank].contiguous()
            tensors[kind][name] = DTensor.from_local(
                mine, mesh, [Shard(side)], run_check=False,
                shape=tensor.shape, stride=tensor.stride(),
            )
dcp.save(tensors, checkpoint_id=f"{folder}/sharded")
os._exit(0)  # gloo's threads may abort Python's own shutdown
"""


def test_a_checkpoint_of_another_layout_grows_the_same(tmp_path):
    """Two ranks (gloo) that each hold about half of every tensor, some cut by rows and some by
    columns, save a checkpoint of two files; growing it gives what growing the whole one gives."""
    model = build(tiny())
    optimizer = adamw(model)
    train_step(model, optimizer, some_tokens(tiny(), 2, 17))
    whole = save(tmp_path / "whole", model, optimizer)
    torch.save(tensors_of(model, optimizer), tmp_path / "blob")
    words = [sys.executable, "-c", SHARDED, str(tmp_path)]
    ranks = [
        subprocess.Popen([*words, str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        _, err = rank.communicate()
        assert rank.returncode == 0, err
    sharded, info = tmp_path / "sharded", read_info(whole)
    files = {p.name: p.stat().st_size for p in sharded.iterdir()}
    assert len([name for name in files if name.endswith(".distcp")]) == 2
    (sharded / "checkpoint.json").write_text(json.dumps(info | {"files": files}))
    grow_checkpoint(whole, BIGGER, tmp_path / "a", seed=3)
    grow_checkpoint(sharded, BIGGER, tmp_path / "b", seed=3)
    assert_same_tensors(load(tmp_path / "a"), load(tmp_path / "b"))


# --------------------------------------------------------------------------------------------------
# In little memory

LIMITED = """
import resource, sys
from pathlib import Path
import torch, grow

def run(checkpoint, to, out):
    grow.main(["apply", checkpoint, "--to", *to, "--out", out])

def data():  # the process's private memory in bytes
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmData")).split()[1])

folder, headroom = Path(sys.argv[1]), int(sys.argv[2])
run(str(folder / "warm"), ["n_layers=2"], str(folder / "warmer"))  # PyTorch loads parts of itself
limit = data() + headroom
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    torch.empty(headroom + 2 ** 20, dtype=torch.uint8)
    raise SystemExit("the limit limits nothing")
except RuntimeError:
    pass
run(str(folder / "big"), ["n_layers=4", "d_ff=2200"], str(folder / "grown"))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_checkpoint_four_times_the_memory_grows(tmp_path):
    """A process that may take 24 MB of private memory more than PyTorch itself has taken
    (RLIMIT_DATA; shared file mappings do not count) grows a checkpoint of at least 96 MB,
    parameters and moments: it never holds more than five times the largest tensor, of 4.5 MB."""
    headroom = 24 * 2**20
    for name, config in (
        ("warm", tiny(n_layers=1)),
        ("big", FLMConfig(3, 512, 8, 64, 2048, 288, 256)),
    ):
        model, optimizer = FLM(config), {}
        for key, p in model.named_parameters():
            optimizer[f"{key}.exp_avg"] = torch.full_like(p, 0.1)
            optimizer[f"{key}.exp_avg_sq"] = torch.full_like(p, 0.2)
            optimizer[f"{key}.step"] = torch.tensor(5.0)
        info = read_info(save(tmp_path / name, model))
        tensors = {"model": dict(model.named_parameters()), "optimizer": optimizer}
        write_checkpoint(tmp_path / name, tensors, {**info, "step": 5})
    assert sum(read_info(tmp_path / "big")["files"].values()) >= 4 * headroom
    words = [sys.executable, "-c", LIMITED, str(tmp_path), str(headroom)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = load(tmp_path / "grown"), load(tmp_path / "big")
    up, down = "layers.3.ff.up.weight", "layers.1.ff.down.weight.exp_avg"
    assert ours["model"][up].shape == (2200, 512)
    assert torch.equal(ours["model"][up][:2048], theirs["model"]["layers.2.ff.up.weight"])
    assert torch.equal(ours["optimizer"][down][:, :2048], theirs["optimizer"][down])


# --------------------------------------------------------------------------------------------------
# What goes wrong

KILLED = """
import os, signal, sys
import torch.distributed.checkpoint as dcp, grow

def kill(tensors, storage_writer, **options):
    (storage_writer.path / "__0_0.distcp").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

dcp.save = kill
grow.main(["apply", sys.argv[1], "--to", "d_ff=30", "--out", sys.argv[2]])
"""


def disk_full(*args, **options):
    raise OSError(28, "No space left on device")


def draw_until_the_disk_is_full():
    """muP.initial_value, five times."""
    calls = []

    def draw(*args):
        calls.append(1)
        return muP.initial_value(*args) if len(calls) <= 5 else disk_full()

    return draw


@pytest.mark.parametrize("where", ["drawing", "writing", "killed"])
def test_an_interrupted_growth_leaves_nothing_that_loads(tmp_path, where):
    """Whether it fails while it grows, while it writes, or is killed by a signal that nobody can
    catch: no CHECKPOINT stands under the output's name, no scratch file stays, and the next try
    succeeds."""
    save(tmp_path / "a", build(tiny()))
    paths = [str(tmp_path / name) for name in "ab"]
    if where == "killed":
        words = [sys.executable, "-c", KILLED, *paths]
        assert subprocess.run(words, cwd=ROOT, capture_output=True).returncode == -9
    elif where == "drawing":
        with pytest.raises(OSError, match="No space left"):
            grow_checkpoint(paths[0], BIGGER, paths[1], draw=draw_until_the_disk_is_full())
    else:
        full = mock.patch.object(checkpoint.dcp, "save", disk_full)
        with full, pytest.raises(OSError, match="No space left"):
            grow_checkpoint(paths[0], BIGGER, paths[1])
    assert "no checkpoint" in error(load_model, paths[1])
    left = {"a", "b.tmp"} if where == "killed" else {"a"}
    assert {p.name for p in tmp_path.iterdir()} == left
    grow_checkpoint(paths[0], BIGGER, paths[1])
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


def test_a_checkpoint_in_mid_ramp_is_refused_unless_finished(tmp_path):
    """The message has the mask's value, the sample at which it ends, and the option; with it the
    growth starts from c = 1, and the command says that the function changed."""
    model, _, record = grow.grow(build(tiny()), BIGGER, seed=0, start=60, ramp=100)
    save(tmp_path / "a", model, growth=record)
    words = ["apply", tmp_path / "a", "--to", "d_ff=40", "--out", tmp_path / "b"]
    message = error(command, *words)
    assert "c = 0.200" in message and "160" in message and "--finish-ramp" in message
    out = command(*words, "--finish-ramp", "--ramp", 10)
    assert "mid-ramp" in out and "0 at sample 80 and 1 at 90" in out
    model.set_masks(record, 1.0)
    (loaded, info), tokens = load_model(tmp_path / "b"), some_tokens(tiny(), 1, 9)
    assert info["growth"]["growths"] == 2
    assert difference(logits(loaded, tokens), logits(model, tokens)) <= 1e-12


def test_a_growth_that_cannot_be_says_why(tmp_path):
    """A folder that exists, a file of weights, a checkpoint whose tensors are not its
    configuration's, a missing one: each by its own message, and nothing is written."""
    model, out = build(tiny()), tmp_path / "b"
    save(tmp_path / "a", model)
    message = error(grow_checkpoint, tmp_path / "a", BIGGER, tmp_path / "a")
    assert "exists: choose another folder" in message
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")  # before the work: no rename replaces it
    message = error(grow_checkpoint, tmp_path / "a", BIGGER, tmp_path / "link")
    assert "exists: choose another folder" in message
    torch.save({}, tmp_path / "weights.pt")
    words = ("apply", tmp_path / "weights.pt", "--to", "n_layers=9", "--out", out)
    assert "file of weights" in error(command, *words)
    assert "no checkpoint at" in error(grow_checkpoint, tmp_path / "nowhere", BIGGER, out)
    info = read_info(tmp_path / "a")
    for name, config, target, said in (
        ("c", tiny(n_layers=3), tiny(n_layers=4), "does not hold the tensor model.layers.2"),
        ("d", tiny(d_ff=12), tiny(d_ff=14), "the configuration says"),
    ):
        write_checkpoint(tmp_path / name, tensors_of(model), info | {"config": config.to_dict()})
        assert said in error(grow_checkpoint, tmp_path / name, target, out)
    assert not out.exists()


# --------------------------------------------------------------------------------------------------
# The command


def test_the_command_grows_a_checkpoint(tmp_path):
    """What grow.py apply prints names old and new and the ramp, and the grown checkpoint computes
    the same."""
    model, tokens = muP.init_weights(FLM(tiny()), 0), some_tokens(tiny(), 2, 16)
    save(tmp_path / "run" / "step-00000005", model)
    words = ["apply", tmp_path / "run", "--to", "n_layers=5", "d_model=16"]
    words += ["--layers", "0,-,1,0,1", "--out", tmp_path / "b", "--ramp", 8, "--seed", 7]
    out = command(*words)
    assert "n_layers 2 -> 5, d_model 12 -> 16\n" in out and "1 at 88" in out
    loaded, info = load_model(tmp_path / "b")
    assert info["growth"]["layer_map"] == [0, None, 1, None, None]
    assert info["growth"]["copied_from"] == [None, None, None, 0, 1]
    assert difference(logits(loaded, tokens), logits(model, tokens)) <= 1e-5  # fp32


def test_a_mistake_is_one_screen(tmp_path):
    """A target that does not fit ends python grow.py with exit code 2 and the reasons, without a
    traceback, and leaves nothing."""
    save(tmp_path / "a", build(tiny(), dtype=torch.float32))
    words = ("apply", tmp_path / "a", "--to", "demo", "--out", tmp_path / "b")
    code, _, err = run_command("grow", *words)
    assert code == 2 and "Traceback" not in err
    assert err.startswith("grow.py: this model cannot grow")
    assert "vocab_size: 23 -> 288" in err and len(err.splitlines()) < 12
    assert not (tmp_path / "b").exists()
