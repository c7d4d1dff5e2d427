"""grow.py - growth: make a trained model larger without changing what it computes (FLM-101B, arXiv 2309.03852, section 2.3).

    python grow.py plan                                            what growth saved the paper, in days, FLOPs and dollars
    python grow.py apply runs/demo --to n_layers=12 --out runs/grown       a larger checkpoint from a small one
    python grow.py bench                                           how much sooner a grown model gets to the same loss

FLM-101B was trained as a 16B model, then as a 51B one, then as 101B: the early tokens are cheap. The step between two
sizes is Masked Structural Growth (MSG, arXiv 2305.02869). It widens tensors, copies the old values into the leading
block and fills the rest with ANY values, because all that is new is multiplied by a mask c. At c = 0 the grown model
computes exactly what the old one did; c then ramps to 1 while training goes on, and the mask is gone:

    old tensor          grown tensor        the mask over a vector of channels, heads or hidden units
    +-------+           +-------+---+
    |  old  |   ---->   |  old  |   |       1 1 1 1 1 1 1 | c c c
    +-------+           +-------+   |
                        |    new    |
                        +-----------+

The masks are flm.py's (LayerNorm, Attention, FeedForward, Block, FLM.set_masks). Here is all the rest. Read from top to bottom:

    1. what can grow     and what cannot preserve the function, hence is refused
    2. four operators    d_model, n_heads, d_ff say which side of which tensor is theirs, layer_plan where layers come from
    3. one tensor        grow_tensor: a parameter or an AdamW moment, in memory or on disk
    4. in memory         grow, set_mask, g_stack
    5. on disk           apply: checkpoint to checkpoint, in little memory; "offline", as the paper did it
    6. the plan          what a schedule costs, and the paper's own three stages
    7. is it worth it    bench: the same size from scratch and by growth
    8. the command line

The paper says that its operators "originate from MSG" and that it grew checkpoints offline. It does not say which dimensions
grew, whether the mask ramped, or what became of the optimizer's state. There the choice is ours, and each place says so.

Letters as in flm.py: C d_model, H heads, D head_dim, F d_ff, V vocabulary, L layers, T sequence; c the mask's value.
"""
from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from tqdm import tqdm

import muP
from flm import (FLM, FLMConfig, PRESETS, find_checkpoint, forward_flops, growth_mask, parse_fields, preset, read_info, read_tensors,
                 write_checkpoint)


# ---------------------------------------------------------------------------------------------------------------------
# 1. What can grow

GROWS = ("n_layers", "d_model", "n_heads", "d_ff")
REASONS = {                                      # why another value of a field would not preserve the function
    "head_dim": "the rotary frequencies depend on it; add heads instead",
    "vocab_size": "a new token would take its share of every softmax",
    "max_seq_len": "xPos measures positions from its middle",
    "tie_embeddings": "two matrices would become one, or one two",
    "xpos_theta": "it is the base of xPos's frequencies", "xpos_scale_base": "it is the base of xPos's decay",
    "mup": "it sets the multiplier of the logits", "mup_base_width": "it sets the multiplier of the logits",
}


def check_growth(old: FLMConfig, new: FLMConfig):
    """Raise ValueError that names everything which keeps `old` from growing into `new` without changing its function.
    (init_std may differ: it only says how new weights are drawn.)"""
    problems = [f"{name}: {getattr(old, name)} -> {getattr(new, name)} would shrink; growth only adds" for name in GROWS
                if getattr(new, name) < getattr(old, name)]
    for field in dataclasses.fields(FLMConfig):
        name, a, b = field.name, getattr(old, field.name), getattr(new, field.name)
        if name not in GROWS and name != "init_std" and a != b:
            problems.append(f"{name}: {a} -> {b} must stay as it is: {REASONS.get(name, 'it changes what the model computes')}")
    if not problems and all(getattr(old, name) == getattr(new, name) for name in GROWS):
        problems.append("the target is no larger: raise at least one of " + ", ".join(f"{name} ({getattr(old, name)})" for name in GROWS))
    if problems:
        raise ValueError("this model cannot grow into that one:\n  " + "\n  ".join(problems))


# ---------------------------------------------------------------------------------------------------------------------
# 2. Four operators. A part is a parameter's name without its layer ("attn.qkv.weight"); each of the first three says which
#    sides of a part belong to its dimension and how long they are: {axis: length}. Rows (axis 0) write, columns (axis 1) read.

def d_model(part: str, config: FLMConfig) -> dict[int, int]:
    """Channels of the residual stream: rows of what writes to it, columns of what reads it, and the LayerNorms' gains.

    A LayerNorm mixes all channels in its mean and variance. So the LayerNorms carry the mask, mean and variance over the
    live channels alone, and everything else follows: what the new channels hold is never read while c = 0."""
    if part in ("embedding.weight", "head.weight", "attn.qkv.weight", "ff.up.weight"):
        return {1: config.d_model}
    return {0: config.d_model} if part.split(".")[-2] in ("o", "down", "norm", "attn_norm", "ff_norm") else {}


def n_heads(part: str, config: FLMConfig) -> dict[int, int]:
    """Heads, whole ones, appended after the old: qkv's rows are laid out (H, 3, D). The mask is on the new heads' outputs."""
    if part.startswith("attn.qkv."):
        return {0: 3 * config.n_heads * config.head_dim}
    return {1: config.n_heads * config.head_dim} if part == "attn.o.weight" else {}


def d_ff(part: str, config: FLMConfig) -> dict[int, int]:
    """Hidden units of the feed-forward part. The mask is on their activations."""
    if part.startswith("ff.up."):
        return {0: config.d_ff}
    return {1: config.d_ff} if part == "ff.down.weight" else {}


def layer_plan(old_L: int, new_L: int, rule="stack") -> list[tuple[int | None, int | None]]:
    """n_layers, the fourth operator: for each layer of the grown model, (the old layer that it continues or None, the old layer that a new one copies or
    None): (3, None) is the old layer 3, (None, 3) a new one with its weights, (None, None) one drawn as at initialisation.

    rule: written out for 3 layers that become 5,
        "stack"       0 1 2 1 2    whole copies on top while they fit, then the last layers (StackBERT's and MSG's order)
        "interleave"  0 0 1 1 2    copies next to their originals, spread evenly
        "fresh"       0 1 2 - -    new ones on top, where "stack" puts them: only their weights differ
        a list        such a row itself, with None for a fresh layer

    The first time a row names an old layer is that layer itself, trained and unmasked; every later one is a masked copy. A
    masked block passes the residual stream through, so the old layers in their old order ARE the old model, wherever the
    new ones stand: that order is the one demand. Raises ValueError where a row breaks it.
    """
    added = new_L - old_L
    if rule == "stack":
        row = [*range(old_L)] * (new_L // old_L) + [*range(old_L - new_L % old_L, old_L)]
    elif rule == "interleave":
        row = [i * old_L // new_L for i in range(new_L)]
    elif rule == "fresh":
        row = [*range(old_L)] + [None] * added
    elif isinstance(rule, str):
        raise ValueError(f"unknown rule {rule!r} for new layers: use stack, interleave, fresh, or a list such as 0,1,2,1,2")
    else:
        row = list(rule)
    plan = [(None, layer) if layer is None or layer in row[:i] else (layer, None) for i, layer in enumerate(row)]
    if len(row) != new_L or [kept for kept, _ in plan if kept is not None] != [*range(old_L)]:
        raise ValueError(f"the layers {row} must be {new_L} entries in which every old layer, 0 to {old_L - 1}, comes first in the old "
                         f"order: later mentions are copies, None is a fresh layer")
    return plan


OPERATORS = (d_model, n_heads, d_ff)             # of a tensor's sides; layer_plan says which tensor to start from


def shape(part: str, config: FLMConfig) -> tuple[int, ...]:
    """The shape of a part: what each operator says of its sides, and the vocabulary, which never grows."""
    sides = {0: config.vocab_size} if part in ("embedding.weight", "head.weight") else {}
    for operator in OPERATORS:
        sides |= operator(part, config)
    return tuple(length for _, length in sorted(sides.items()))


def source(name: str, plan: list) -> str | None:
    """The name of the old tensor that the new tensor `name` starts from; None for one of a fresh layer."""
    if not name.startswith("layers."):
        return name
    _, layer, rest = name.split(".", 2)
    kept, copied = plan[int(layer)]
    old = copied if kept is None else kept
    return None if old is None else f"layers.{old}.{rest}"


# ---------------------------------------------------------------------------------------------------------------------
# 3. One tensor

def norm_scale(part: str, state: str, old: FLMConfig, new: FLMConfig) -> float:
    """What muP multiplies the old values of a part by when d_model grows.

    The logits are output_mult / m times what the final LayerNorm feeds the head, and m grows by r = m_new / m_old. So that
    LayerNorm's gain and bias are multiplied by r, whether the head is tied or not, and the logits stay. Its gradients are
    then 1/r of what they were, hence exp_avg is multiplied by 1/r and exp_avg_sq by 1/r**2. The function is kept; the
    trajectory is not, and need not be: m is also in the learning rates and decays, which muP.param_groups works out anew."""
    if part not in ("norm.weight", "norm.bias"):
        return 1.0
    r = new.m_width / old.m_width
    return {"": r, "exp_avg": 1 / r, "exp_avg_sq": 1 / r ** 2}[state]


@torch.no_grad()
def grow_tensor(name: str, old: torch.Tensor | None, old_config: FLMConfig, new_config: FLMConfig, *, seed: int, growths: int = 1,
                moments: str = "zeros", draw=muP.initial_value) -> torch.Tensor:
    """The grown tensor, from the old one (of the kept or copied layer) or from None, for a fresh layer.

    name: the new tensor's name in a checkpoint: "layers.5.attn.o.weight" for a parameter, and ".exp_avg", ".exp_avg_sq" or
    ".step" after it for AdamW's state. New weights come from draw(new_config, parameter, shape, seed, growths), as at
    initialisation of the larger model; any other function will do. Returns the old dtype and device, or fp32 on the CPU.

    AdamW's state: the old block copied, zeros elsewhere, `step` kept, as in the public MSG code; a copied layer takes its
    source's (ours), a fresh one zeros and step 0. With the bias correction long over, a new entry's first step is then
    0.1 g / sqrt(0.05 g^2) = 0.45 of the learning rate, and 1.1 after 20 alike ones: near the most that AdamW ever does. So the
    learning rate warms up again after a growth (the paper: 230,400 samples). moments="mean" instead starts new exp_avg_sq entries
    at the old block's mean, which makes those first steps small.

    Raises ValueError where the old tensor's shape is not that of old_config."""
    parameter, _, state = name.rpartition(".") if name.rpartition(".")[2] in ("exp_avg", "exp_avg_sq", "step") else (name, "", "")
    if state == "step":
        return torch.zeros(()) if old is None else old.clone()
    part = parameter.split(".", 2)[2] if parameter.startswith("layers.") else parameter
    size = shape(part, new_config)
    if state:
        new = torch.zeros(size)
    else:
        new = draw(new_config, parameter, size, seed, growths)
    if old is None:
        return new
    if tuple(old.shape) != shape(part, old_config):
        raise ValueError(f"{name} has the shape {tuple(old.shape)}, the configuration says {shape(part, old_config)}")
    new, scale = new.to(old), norm_scale(part, state, old_config, new_config)
    old = old if scale == 1 else old * scale
    if state == "exp_avg_sq" and moments == "mean":
        new.fill_(old.mean())
    new[tuple(slice(n) for n in old.shape)] = old
    return new


# ---------------------------------------------------------------------------------------------------------------------
# 4. In memory

def prepare(old: FLMConfig, new: FLMConfig, layers, moments: str, start: int, ramp: int, growths: int) -> tuple[list, dict]:
    """The checks that both paths share. Returns the layer plan, and the growth's record: what FLM.set_masks and flm.growth_mask
    need to know, as plain JSON for the checkpoint. The mask's value is computed from it, c = (samples - start) / ramp up to 1,
    never accumulated: a run stopped in mid-ramp resumes exactly."""
    check_growth(old, new)
    wrong = [f"{name} = {value!r}: must be a whole number of samples, 0 or above" for name, value in (("start", start), ("ramp", ramp))
             if isinstance(value, bool) or not isinstance(value, int) or value < 0]
    if moments not in ("zeros", "mean"):
        wrong.append(f"moments = {moments!r}: new entries of exp_avg_sq start at zeros or at the old block's mean")
    if wrong:
        raise ValueError("this growth cannot be:\n  " + "\n  ".join(wrong))
    plan = layer_plan(old.n_layers, new.n_layers, layers)
    return plan, {"old": {name: getattr(old, name) for name in GROWS}, "layer_map": [kept for kept, _ in plan],
                  "copied_from": [copied for _, copied in plan], "start": start, "ramp": ramp, "growths": growths}


def masked(model: FLM) -> list:
    """The modules that hold a growth mask."""
    return [module for module in model.modules() if getattr(module, "mask", None) is not None]


@torch.no_grad()
def grow(model: FLM, new_config: FLMConfig, optimizer: torch.optim.AdamW | None = None, *, seed: int, layers="stack", growths: int = 1,
         start: int = 0, ramp: int = 0, moments: str = "zeros", finish_ramp: bool = False,
         draw=muP.initial_value) -> tuple[FLM, torch.optim.AdamW | None, dict]:
    """A larger model that computes the same: (model, optimizer, record), its masks at c = 0. `model` is left as it is.

    optimizer: an AdamW over muP.param_groups(model, ...); the grown one has its hyper-parameters, muP's groups of the new
    width and the grown state. seed, growths: new weights are drawn from (seed, name, number of growths so far), this one
    included. layers: see layer_plan. start, ramp: in samples; ramp 0 means that the next training step has no mask at all, a
    jump. moments, draw: see grow_tensor. finish_ramp: grow a model in mid-ramp as if its own mask had reached 1.
    Raises ValueError for a target that cannot preserve, a model in mid-ramp, or a part of a model."""
    old_config = model.config
    plan, record = prepare(old_config, new_config, layers, moments, start, ramp, growths)
    if masked(model) and not finish_ramp:
        raise ValueError("this model is still growing: train it to the end of its ramp, or say finish_ramp, which changes what it computes")
    if model.embedding is None or model.head is None or len(model.layers) != old_config.n_layers:
        raise ValueError("this is a part of a model: save a checkpoint, grow that (grow.py apply) and load it")
    options = dict(seed=seed, growths=growths, moments=moments, draw=draw)
    parameters = dict(model.named_parameters())
    some = next(model.parameters())
    with torch.device("meta"):
        grown = FLM(new_config)
    grown = grown.to(some.dtype).to_empty(device=some.device).train(model.training)
    for name, p in grown.named_parameters():
        p.copy_(grow_tensor(name, parameters.get(source(name, plan)), old_config, new_config, **options))
    grown.set_masks(record, 0.0)
    if optimizer is None:
        return grown, None, record

    if type(optimizer) is not torch.optim.AdamW or any(group["amsgrad"] or "lr_scale" not in group for group in optimizer.param_groups):
        raise ValueError("the optimizer must be an AdamW (without amsgrad) over muP.param_groups(model, ...): other state is not known here")
    base = [group for group in optimizer.param_groups if group["lr_scale"] == 1]         # the groups where m = 1
    keep = {k: base[0][k] for k in ("betas", "eps", "maximize", "foreach", "capturable", "differentiable", "fused")}
    larger = torch.optim.AdamW(muP.param_groups(grown, base[0]["lr"], max(group["weight_decay"] for group in base)), **keep)
    keys = sorted({key for state in optimizer.state.values() for key in state})          # none before the first step
    for name, p in grown.named_parameters():
        old = source(name, plan)
        state = {} if old is None else optimizer.state.get(parameters[old], {})
        for key in keys if old is None else state:
            like = torch.zeros((), device=some.device) if key == "step" else p           # a fused AdamW keeps `step` beside p
            larger.state[p][key] = grow_tensor(f"{name}.{key}", state.get(key), old_config, new_config, **options).to(
                like if old is None else state[key])
    return grown, larger, record


def set_mask(model: FLM, c: float):
    """Set the mask of a growing model to c in [0, 1]. The masks themselves tell what is new, by entries below 1, so the
    model needs no memory of its growth; at c = 1 they are removed, and it is an ordinary model, for good. (Training calls
    model.set_masks(record, c), which also puts masks on a model that has just been loaded.)
    Raises ValueError for another c, or where nothing grows."""
    growing = masked(model)
    if not growing:
        raise ValueError("this model is not growing: it has no mask to set (model.set_masks(record, c) puts a growth's masks on)")
    if not 0 <= c <= 1:
        raise ValueError(f"a growth mask of {c}: must lie in [0, 1]")
    for module in growing:
        module.mask = None if c == 1 else module.mask.masked_fill(module.mask < 1, c)


def g_stack(model: FLM, times: int, optimizer: torch.optim.AdamW | None = None, *, start: int = 0, growths: int = 1):
    """G_stack ("Stacking Your Transformers", arXiv 2405.15319): the whole stack `times` times over and no mask. It does NOT
    preserve the function; the comparison that every reader asks for. Returns what `grow` returns, with c = 1."""
    if times < 2:
        raise ValueError(f"a stack {times} times over: at least 2")
    grown, larger, record = grow(model, model.config.replace(n_layers=times * model.config.n_layers), optimizer, seed=0, layers="stack",
                                 growths=growths, start=start, ramp=0)
    grown.set_masks(record, 1.0)
    return grown, larger, record


# ---------------------------------------------------------------------------------------------------------------------
# 5. On disk, as the paper did it: training stops, a program extends the checkpoint, training loads it in its new layout

SMALL = 2 ** 16                                  # bytes


def file_backed(size: tuple[int, ...], dtype: torch.dtype, folder: Path) -> torch.Tensor:
    """A tensor of zeros that lives in an unnamed file of `folder`: the system may write its pages out, so it needs no memory
    that counts, and the file is gone with the tensor or the process, whatever ends it. A SMALL one (biases, LayerNorms: a
    ten-thousandth of a checkpoint) is an ordinary tensor. OSError on a full disk."""
    n = math.prod(size)
    if n * dtype.itemsize < SMALL:
        return torch.zeros(size, dtype=dtype)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".grow-") as file:
        if hasattr(os, "posix_fallocate"):       # reserve the space now: a full disk found later kills the process
            os.posix_fallocate(file.fileno(), 0, n * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=n, dtype=dtype).view(size)


def apply(checkpoint, new_config: FLMConfig, out, *, seed: int = 0, layers="stack", ramp: int | None = None, moments: str = "zeros",
          finish_ramp: bool = False, draw=muP.initial_value) -> dict:
    """Grow a CHECKPOINT (see flm.find_checkpoint) into the folder `out`; returns the new checkpoint's info. The same tensors,
    bit for bit, as `grow` makes. Options as there; ramp, in samples, is by default a tenth of the samples seen (ours).

    One layer at a time is read and grown, through file-backed tensors, so the memory it takes is a few times the
    largest single tensor; for a while the disk holds the new tensors twice. A checkpoint may have been saved by any
    layout, and with or without an optimizer. `out` appears whole or not at all.
    Raises ValueError for what cannot grow, a checkpoint in mid-ramp without finish_ramp, or an `out` that exists."""
    path, out = find_checkpoint(checkpoint), Path(out)
    if path.is_file():
        raise ValueError(f"{path} is a file of weights: grow the step folder that it was exported from")
    if out.exists():
        raise ValueError(f"{out} exists: choose another folder for the grown checkpoint")
    info = read_info(path)
    old_config, done = FLMConfig.from_dict(info["config"]), info["growth"]
    c, growths = growth_mask(done, info["samples"]), 1 if done is None else done.get("growths", 1) + 1
    ramp = info["samples"] // 10 if ramp is None else ramp
    plan, record = prepare(old_config, new_config, layers, moments, info["samples"], ramp, growths)
    if c < 1 and not finish_ramp:
        raise ValueError(f"{path} is in mid-ramp: its mask is at c = {c:.3f} and reaches 1 at sample {done['start'] + done['ramp']:,}. Train it to "
                         f"there, or add --finish-ramp, which sets c = 1 now and so changes what it computes")

    stored = FileSystemReader(path).read_metadata().state_dict_metadata                  # {"model.norm.weight": shape, dtype, chunks}
    with torch.device("meta"):
        names = [name for name, _ in FLM(new_config).named_parameters()]
    states = sorted({key.rpartition(".")[2] for key in stored if key.startswith("optimizer.")})
    out.parent.mkdir(parents=True, exist_ok=True)
    grown = {"model": {}} | ({"optimizer": {}} if states else {})
    for layer in tqdm([None, *range(new_config.n_layers)], desc="growing", unit="layer", disable=None):
        mine = [name for name in names if (name.split(".")[1] if name.startswith("layers.") else None) == (layer if layer is None else str(layer))]
        wanted = [("model", name) for name in mine] + [("optimizer", f"{name}.{state}") for name in mine for state in states]
        old = {kind: {} for kind in grown}
        for kind, name in wanted:
            if (came := source(name, plan)) is not None:
                if f"{kind}.{came}" not in stored:
                    raise ValueError(f"{path} does not hold the tensor {kind}.{came}")
                meta = stored[f"{kind}.{came}"]
                old[kind][came] = file_backed(tuple(meta.size), meta.properties.dtype, out.parent)
        if any(old.values()):
            read_tensors(path, old)
        for kind, name in wanted:
            value = grow_tensor(name, old[kind].get(source(name, plan)), old_config, new_config, seed=seed, growths=growths, moments=moments, draw=draw)
            like = stored[f"{kind}.{source(name, [(0, None)] * new_config.n_layers)}"]    # a fresh layer's dtype is layer 0's
            grown[kind][name] = file_backed(tuple(value.shape), like.properties.dtype, out.parent).copy_(value)
    info = {k: v for k, v in info.items() if k not in ("format", "files")} | {"config": new_config.to_dict(), "growth": record}
    write_checkpoint(out, grown, info)
    return info


# ---------------------------------------------------------------------------------------------------------------------
# 6. The plan

# The paper's three stages. lr (at the stage's start), warmup (samples), days, tokens: its Table 1. batch_size (rows of 2048
# tokens), tp, pp, dp, tflops (per GPU, while training): its Table 2. (Table 1's "4.31M tokens" for the last batch is not 2160 rows,
# which are 4.42M.) The shapes behind the presets flm-16b and flm-51b are OURS, as are layers and ramp: the paper prints none.
PAPER_STAGES = [
    {"name": "16B", "preset": "flm-16b", "lr": 4e-4, "warmup": 4_608_000, "batch_size": 2304, "tokens": 245.37e9, "days": 9.63,
     "tp": 2, "pp": 1, "dp": 96, "tflops": 162},
    {"name": "51B", "preset": "flm-51b", "lr": 3.4e-4, "warmup": 230_400, "batch_size": 2304, "tokens": 39.64e9, "days": 5.37,
     "tp": 4, "pp": 2, "dp": 24, "tflops": 160, "layers": "stack", "ramp": 230_400},
    {"name": "101B", "preset": "flm-101b", "lr": 2e-4, "warmup": 230_400, "batch_size": 2160, "tokens": 26.54e9, "days": 6.54,
     "tp": 4, "pp": 4, "dp": 12, "tflops": 165, "layers": "stack", "ramp": 230_400},
]
PAPER_BUDGET = 100_000                           # dollars: the paper's title
PAPER_SCRATCH_DAYS = 76.74                       # its own estimate of 101B throughout (section 2.3)
STAGE_FIELDS = {"name", "preset", "config", "start", "ramp", "layers", "moments", "lr", "warmup", "batch_size", "steps", "tokens", "days", "tp", "pp", "dp",
                "gpus", "tflops"}
STAGE_NUMBERS = {"lr", "tokens", "days", "tflops"}                                       # above 0; the other numbers are whole


def read_stages(stages: list[dict]) -> list[dict]:
    """Check a schedule; returns it with each stage's "config" as an FLMConfig, and with "start", "ramp" and "layers" filled in.

    A stage: {"preset": name, and/or "config": {fields}} is its model (fields not named are the preset's, or the stage's before),
    "tokens" or the next stage's "start" (in samples) its length; STAGE_FIELDS are all the keys. Training reads lr, warmup,
    batch_size, layers, moments and ramp, the plan days, gpus (or tp, pp, dp) and tflops.
    Raises ValueError naming all that is wrong with the first bad stage (the later ones build on it): unknown keys, impossible
    values, a shrinking target, a start that goes backwards, or that lies in the ramp of the stage before."""
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError('a schedule is a list of stages, such as [{"preset": "flm-16b", "tokens": 245.37e9}, ...]')
    result = []
    for i, given in enumerate(stages):
        before = result[-1] if result else None
        stage = {"name": given.get("preset", f"stage {i + 1}"), "layers": "stack", "moments": "zeros", "ramp": 0, **given}
        problems = [f"unknown key {key!r}; there are {', '.join(sorted(STAGE_FIELDS))}" for key in given if key not in STAGE_FIELDS]
        for key in STAGE_FIELDS & {*stage} - {"name", "preset", "config", "layers", "moments"}:
            value, kind = stage[key], (int, float) if key in STAGE_NUMBERS else int
            if not isinstance(value, kind) or isinstance(value, bool) or not (0 < value < math.inf or value == 0 and key in ("start", "ramp", "warmup")):
                problems.append(f"{key} = {value!r}: must be a {'number' if key in STAGE_NUMBERS else 'whole number'} above 0")
        try:
            base = preset(stage["preset"]).to_dict() if "preset" in stage else before["config"].to_dict() if before else {}
            stage["config"] = FLMConfig.from_dict(base | dict(stage.get("config", {})))
            if before:
                prepare(before["config"], stage["config"], stage["layers"], stage["moments"], 0, 0, 1)
        except (ValueError, TypeError) as error:
            problems.append(str(error))
        if not problems and not before and stage.setdefault("start", 0):
            problems.append(f"starts at sample {stage['start']:,}; the first stage starts at 0")
        if not problems and before:
            if "start" not in stage and "tokens" in before:
                stage["start"] = before["start"] + round(before["tokens"] / before["config"].max_seq_len)
            if "start" not in stage:
                problems.append("needs a start in samples, or the stage before it its tokens")
            elif stage["start"] <= before["start"]:
                problems.append(f"starts at sample {stage['start']:,}, which is not after stage {i}'s start, {before['start']:,}")
            elif stage["start"] < before["start"] + before["ramp"]:
                problems.append(f"starts at sample {stage['start']:,}, before stage {i}'s ramp is over, at {before['start'] + before['ramp']:,}")
            else:
                before.setdefault("tokens", (stage["start"] - before["start"]) * before["config"].max_seq_len)
        if problems:
            raise ValueError(f"this schedule does not work: stage {i + 1} ({stage['name']})\n  " + "\n  ".join(problems))
        result.append(stage)
    return result


def narayanan_flops(L: int, C: int, V: int, T: int, tokens: float, factor: float = 72) -> float:
    """Floating point operations of training on `tokens`, by the formula that the paper uses (section 4; Narayanan et al.
    2104.04473, equation 3): 72 without recomputation, 96 with all of it, 84 with an error of 12 where that is not known.

    The bracket was made for 96, where it counts the head, never recomputed, at 96/16 VC = 6 VC a token, as many as are multiplied; with
    72 it counts 4.5 VC, so 3 * flm.forward_flops, which counts what is multiplied, is larger than the 72-form by 1.5 VC a token."""
    return factor * tokens * L * C * C * (1 + T / (6 * C) + V / (16 * L * C))


def plan(stages: list[dict] | None = None, price: float | None = None) -> dict:
    """What a schedule costs, by stage and in total, and the same tokens at the final size throughout. Plain JSON.

    stages: see read_stages; none: the paper's. Each needs tokens, gpus (or tp, pp, dp), and days or tflops. price: dollars per
    GPU-hour, by default what makes the paper's budget. "scratch" takes the last stage's rate; "flop" counts what is
    multiplied, without recomputation; "tflops" is that over the stage's days, so it counts every pause too."""
    ours, paper = stages is None, sum(24 * s["days"] * s["tp"] * s["pp"] * s["dp"] for s in PAPER_STAGES)
    price = PAPER_BUDGET / paper if price is None else price
    if not 0 < price < math.inf:
        raise ValueError(f"a price of {price} dollars per GPU-hour: must be above 0")
    rows, problems = [], []
    for stage in read_stages(PAPER_STAGES if ours else stages):
        config, gpus = stage["config"], stage.get("gpus", stage.get("tp", 0) * stage.get("pp", 0) * stage.get("dp", 0))
        if "tokens" not in stage or not gpus or not ("days" in stage or "tflops" in stage):
            problems.append(f"{stage['name']}: needs tokens, gpus (or tp, pp and dp), and days or tflops (per GPU)")
            continue
        flop = 3 * forward_flops(config, config.max_seq_len) * stage["tokens"]
        days = stage["days"] if "days" in stage else flop / (gpus * stage["tflops"] * 1e12 * 86400)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in FLM(config).parameters())
        rows.append({"name": stage["name"], "n_layers": config.n_layers, "d_model": config.d_model, "n_heads": config.n_heads, "d_ff": config.d_ff,
                     "parameters": parameters, "tokens": stage["tokens"], "days": days, "gpus": gpus, "gpu_hours": 24 * days * gpus,
                     "dollars": 24 * days * gpus * price, "flop": flop, "tflops": flop / (days * 86400 * gpus) / 1e12,
                     "narayanan_72": narayanan_flops(config.n_layers, config.d_model, config.vocab_size, config.max_seq_len, stage["tokens"])})
    if problems:
        raise ValueError("this schedule cannot be costed:\n  " + "\n  ".join(problems))
    last, summed = rows[-1], ("tokens", "days", "gpu_hours", "dollars", "flop", "narayanan_72")
    total = {key: sum(row[key] for row in rows) for key in summed}
    scratch = {key: last[key] * total["tokens"] / last["tokens"] for key in summed}
    return {"stages": rows, "total": total, "scratch": scratch, "price": price,
            "saving": {"days": 1 - total["days"] / scratch["days"], "times": scratch["days"] / total["days"],
                       "flop": 1 - total["flop"] / scratch["flop"], "flop_times": scratch["flop"] / total["flop"]},
            "sources": {"tokens": "the paper, Table 1" if ours else "the schedule",
                        "days": "the paper, Table 1" if ours else "the schedule, or ours from its tflops",
                        "gpus": "the paper, Table 2" if ours else "the schedule",
                        "shapes": "101B: the paper; 16B and 51B: ours" if ours else "the schedule",
                        "parameters, flop, tflops, narayanan_72": "ours, from the shapes",
                        "gpu_hours, scratch, saving": "ours, from days, tokens and GPUs",
                        "dollars": "ours: the price per GPU-hour " + ("that makes the paper's $100K" if price == PAPER_BUDGET / paper else "given")},
            **({"paper_scratch_days": PAPER_SCRATCH_DAYS, "paper_zettaflop": 52.76,
                "paper_tflops": {stage["name"]: stage["tflops"] for stage in PAPER_STAGES}} if ours else {})}


def show_plan(p: dict) -> str:
    """The plan as a table; what is marked * is ours."""
    heads = ("stage", "parameters*", "tokens", "days", "GPUs", "GPU-hours*", "dollars*", "zettaFLOP*", "TFLOP/s per GPU*")

    def row(name, r, parameters="", gpus="", rate=""):
        return (name, parameters, f"{r['tokens'] / 1e9:.2f} B", f"{r['days']:.2f}", gpus, f"{r['gpu_hours']:,.0f}", f"{r['dollars']:,.0f}",
                f"{r['flop'] / 1e21:.2f}", rate)

    table = [heads, *(row(r["name"], r, f"{r['parameters'] / 1e9:.2f} B", str(r["gpus"]), f"{r['tflops']:.0f}") for r in p["stages"]),
             row("grown", p["total"]), row(f"{p['stages'][-1]['name']} throughout*", p["scratch"])]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join([line[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(line[1:], widths[1:]))]).rstrip() for line in table]
    s = p["saving"]
    lines += ["", f"growth saves {s['days']:.0%} of the days ({s['times']:.2f} times fewer) and {s['flop']:.0%} of the FLOPs ({s['flop_times']:.2f} times fewer)*, "
              f"at ${p['price']:.4f} per GPU-hour", "", "where the numbers come from:"]
    lines += [f"  {what}: {where}" for what, where in p["sources"].items()]
    if "paper_scratch_days" in p:
        lines += [f"beside the paper's own: {p['paper_scratch_days']} days for 101B throughout (ours: {p['scratch']['days']:.2f}, from the last stage's tokens per day); "
                  f"{p['paper_zettaflop']} zettaFLOP",
                  f"in all (ours: {p['total']['narayanan_72'] / 1e21:.2f} by its formula's 72-form, {p['total']['flop'] / 1e21:.2f} with the head in full); "
                  + ", ".join(f"{v} ({k})" for k, v in p["paper_tflops"].items()) + " TFLOP/s per GPU while",
                  "training, where ours divides by all the days of a stage."]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Is it worth it? The same size from scratch and by growth: runs of train.py, each with a full cosine of its own.

BENCH = ["--model", "n_layers=8", "d_model=32", "n_heads=1", "head_dim=32", "d_ff=128", "max_seq_len=128", "mup_base_width=32", "init_std=0.05",
         "--lr", "0.016", "--batch-size", "8", "--warmup", "400", "--eval-rows", "512", "--threads", "1", "--dtype", "float32"]
SCHEDULES = {                                    # start, ramp and warm-up in shares of the run, as in train.py's DEMO_STAGES
    "small": [{"config": {"n_layers": 2}}],      # never grown: what the final size has to beat
    "early": [{"config": {"n_layers": 2}}, {"config": {"n_layers": 8}, "start": 0.3, "ramp": 0.1, "warmup": 0.02}],
    "once": [{"config": {"n_layers": 2}}, {"config": {"n_layers": 8}, "start": 0.5, "ramp": 0.1, "warmup": 0.02}],
}


def shares(stages: list[dict], samples: int) -> list[dict]:
    """A schedule in shares of a run as one in samples, for train.py --stages. Raises ValueError for what is no share."""
    wrong = [f"{key} = {stage[key]!r}" for stage in stages for key in ("start", "ramp", "warmup") if key in stage
             and not (isinstance(stage[key], (int, float)) and 0 <= stage[key] < 1)]
    if wrong:
        raise ValueError(f"a schedule of the bench is in shares of its run, from 0 to 1, whatever its length; this one has {', '.join(wrong)}")
    return [{k: round(v * samples) if k in ("start", "ramp", "warmup") else v for k, v in stage.items()} for stage in stages]


def bench_plan(args) -> list[dict]:
    """Every run of the bench: {"name", "budget", "seed", "steps", "folder", "options", "stages", "tflop"}. A schedule's run has the steps
    whose FLOPs are those of `budget` steps from scratch. Raises ValueError for what train.py would refuse, before anything runs."""
    import train                                 # only here: train.py itself imports this module

    def resolve(options):
        given = vars(train.make_parser().parse_args(options))
        return train.resolve(train.Settings(**given | {"model": tuple(given["model"])}))

    settings, (whole,) = resolve([*BENCH, *args.train, "--steps", str(min(args.steps + (args.at or []))), "--stages", "none"])
    final, cost = whole["config"], lambda config: forward_flops(config, config.max_seq_len)
    schedules, runs, out = {"scratch": None}, [], Path(args.out)
    for word in args.stages:
        try:
            stages = SCHEDULES[word] if word in SCHEDULES else json.loads(Path(word).read_text())
            schedules |= stages if isinstance(stages, dict) else {Path(word).stem: stages}
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"--stages {word}: neither one of {', '.join(SCHEDULES)} nor a readable JSON file ({error})") from error
    out.mkdir(parents=True, exist_ok=True)
    for name, stages in schedules.items():
        for budget in args.steps if name == "scratch" else args.at or [min(args.steps)]:
            steps, file = budget, "none"
            if stages is not None:
                stages = [{**stages[0], "config": final.to_dict() | stages[0].get("config", {})}, *stages[1:]]
                plan = read_stages(shares(stages, 10 ** 6))
                ends = [*(stage["start"] for stage in plan[1:]), 10 ** 6]
                mean = sum(cost(stage["config"]) * (end - stage["start"]) for stage, end in zip(plan, ends)) / 10 ** 6
                steps, file = max(2 * len(plan), round(budget * cost(final) / mean)), str(out / f"{name}-{budget}.json")
                Path(file).write_text(json.dumps(shares(stages, steps * settings.batch_size), indent=1) + "\n")
            for seed in args.seeds:
                folder = out / f"{name}-{budget}-seed{seed}"
                options = [*BENCH, *args.train, "--steps", str(steps), "--seed", str(seed), "--stages", file, "--out", str(folder),
                           "--eval-every", str(steps), "--save-every", str(steps), "--keep", "1"]
                s, planned = resolve(options)
                if (folder / "cost.json").exists():
                    there = train.read_run(folder)
                    changed = [k for k, v in dataclasses.asdict(s).items() if k not in ("out", "threads", "stages") and getattr(there[0], k) != v != "auto"]
                    if changed or there[1] != planned:
                        raise ValueError(f"{folder} is a run of another bench ({', '.join(changed) or 'other stages'}): choose another --out")
                runs.append({"name": name, "budget": budget, "seed": seed, "steps": steps, "folder": folder, "options": options, "stages": planned,
                             "tflop": train.training_flops(planned, planned[-1]["end"]) / 1e12})
    train.open_corpus(settings.data, settings.tokenizer, settings.tokenizer_file, final)     # prepared once, before any run
    return runs


def bench_run(run: dict) -> dict:
    """Train where that is not done yet (a run that was interrupted begins again); returns what the run says of itself: its held-out loss, the
    losses around each growth, its seconds. cost.json, written last, says that it is whole. Raises ValueError with train.py's last words."""
    import resource                              # not on Windows, where all the rest works

    folder, log = run["folder"], run["folder"].with_suffix(".log")
    if not (folder / "cost.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        with open(log, "w") as output:
            code = subprocess.call([sys.executable, str(Path(__file__).with_name("train.py")), *run["options"]], stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=subprocess.STDOUT)
        if code:
            last = "\n  ".join(log.read_text(errors="replace").strip().splitlines()[-4:])
            raise ValueError(f"{folder.name}: train.py ended with code {code}, its last words (all of them are in {log}):\n  {last}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        (folder / "cost.json").write_text(json.dumps({"cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
                                                      "wall_seconds": round(time.perf_counter() - start, 1)}))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads((folder / "cost.json").read_text()) | {
        "loss": [line["val_loss"] for line in lines if "val_loss" in line][-1],
        "growths": [[line["loss_before"], line["loss_after"]] for line in lines if "grown" in line]}


def speed_up(scratch: dict[float, float], flop: float, loss: float) -> tuple[float | None, bool]:
    """(the FLOPs that training from scratch needs for `loss`, over `flop`; whether that is extrapolated). scratch: {FLOPs: loss} of two runs
    or more. Between two of them loss is a straight line in log FLOPs; beyond the ends the nearest line goes on. None where there is no line,
    or one on which more training is worse."""
    points = sorted(scratch.items())
    if len(points) < 2 or not all(b < a for (_, a), (_, b) in zip(points, points[1:])):
        return None, True
    i = next((i for i, (_, b) in enumerate(points[1:-1]) if loss >= b), len(points) - 2)
    (f, a), (g, b) = points[i:i + 2]
    return f * (g / f) ** ((a - loss) / (a - b)) / flop, not points[-1][1] <= loss <= points[0][1]


def bench(args) -> dict[tuple, dict]:
    """Run all, print the table, write bench.json and the plot."""
    def times(value):
        return "-" if value is None else f"{value:.2f}"

    def describe(stages):
        return " -> ".join(f"{stage['config'].n_layers}x{stage['config'].d_model}" + (
            f" at {stage['start'] / stages[-1]['end']:.0%}, ramp {stage['ramp'] / stages[-1]['end']:.0%}" if stage["start"] else "") for stage in stages)

    rows: dict[tuple, dict] = {}
    for run in tqdm(bench_plan(args), unit="run", dynamic_ncols=True):
        row = rows.setdefault((run["name"], run["budget"]), {k: run[k] for k in ("name", "budget", "steps", "tflop")} | {"stages": describe(run["stages"])})
        for key, value in bench_run(run).items():
            row.setdefault(key, {})[run["seed"]] = value
    scratch = [row for row in rows.values() if row["name"] == "scratch"]
    for row in rows.values():
        row |= {"mean": {key: statistics.mean(row[key].values()) for key in ("loss", "cpu_seconds", "wall_seconds")}}
    for row in rows.values():
        row["speed_up"], row["extrapolated"] = speed_up({r["tflop"]: r["mean"]["loss"] for r in scratch}, row["tflop"], row["mean"]["loss"])
        row["by_seed"] = {seed: speed_up({r["tflop"]: r["loss"][seed] for r in scratch}, row["tflop"], loss)[0] for seed, loss in row["loss"].items()}

    print(f"\n{'run':22}{'steps':>6}{'TFLOP':>8}{'CPU s':>7}{'wall s':>7}{'loss':>8}{'speed-up':>10}{'by seed' if len(args.seeds) > 1 else '':>14}   stages")
    for row in sorted(rows.values(), key=lambda row: (row["name"] != "scratch", row["budget"], row["mean"]["loss"])):
        seeds = " to ".join(times(value) for value in sorted(row["by_seed"].values(), key=lambda v: v or 0)[::len(args.seeds) - 1]) if len(args.seeds) > 1 else ""
        print(f"{row['name'] + ' ' + str(row['budget']):22}{row['steps']:6}{row['tflop']:8.2f}{row['mean']['cpu_seconds']:7.0f}{row['mean']['wall_seconds']:7.0f}"
              f"{row['mean']['loss']:8.4f}{times(row['speed_up']):>9}{'*' if row['extrapolated'] else ' '}{seeds:>14}   {row['stages']}")
    print(f"loss: held out, nats per token, mean of {len(args.seeds)} seed(s). speed-up: the FLOPs that scratch training needs for that loss, over those spent,\n"
          "by straight lines in log FLOPs between the scratch runs; * where a line is extended. Seconds: the whole process. Stages: layers x width, in shares of the run.")
    muP.write_json(Path(args.out) / "bench.json", {"options": [*BENCH, *args.train], "torch": torch.__version__, "rows": list(rows.values())})
    if args.plot:
        muP.plot(args.plot, 2, [("one size, several ways", label, "held-out loss", {
            name: zip(*sorted((row["mean"].get(key, row["tflop"]), row["mean"]["loss"]) for row in rows.values() if row["name"] == name))
            for name in dict.fromkeys(row["name"] for row in rows.values())}) for label, key in (("TFLOP", "tflop"), ("CPU seconds", "cpu_seconds"))])
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# 8. The command line

def target_config(words: list[str], old: FLMConfig) -> FLMConfig:
    """--to: a preset, a JSON file (a model's fields, or a run's config.json), and changes FIELD=VALUE; without the first, the
    changes are to the checkpoint's own. Raises ValueError naming every word that is none of these."""
    if "=" not in words[0]:
        first, words = words[0], words[1:]
        if first.endswith(".json"):
            try:
                values = json.loads(Path(first).read_text())
            except (OSError, json.JSONDecodeError) as error:
                raise ValueError(f"--to {first}: not a readable JSON file ({error})") from error
            old = FLMConfig.from_dict(values.get("config", values))
        else:
            old = preset(first)
    changes, problems = parse_fields(words)
    if problems:
        raise ValueError("\n".join(f"--to {problem}" for problem in problems))
    return old.replace(**changes)


def parse_layers(text: str):
    """stack, interleave, fresh, or a row such as 0,1,2,1,- (see layer_plan)."""
    if "," not in text:
        return text
    try:
        return [None if word.strip() == "-" else int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--layers {text}: use stack, interleave, fresh, or a row of old layers such as 0,1,2,1,- (- is a fresh one)") from None


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="grow.py", description="Growth: a larger model from a trained one, and what that saves.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("apply", help="grow a checkpoint into a larger one",
                            description="Grow a checkpoint into a larger one that computes the same until its mask leaves 0. Needs little memory, and "
                            "for a while twice the new checkpoint's room on disk.",
                            epilog="example: python grow.py apply runs/demo --to n_layers=12 d_ff=2048 --out runs/grown --ramp 1600")
    p.add_argument("checkpoint", help="a run folder (its newest checkpoint) or a step folder")
    p.add_argument("--to", required=True, nargs="+", metavar="TARGET", help=f"the model to grow into: a preset ({', '.join(PRESETS)}), a config.json, "
                   "and/or FIELD=VALUE ... (d_model, n_heads, d_ff, n_layers)")
    p.add_argument("--out", required=True, metavar="CHECKPOINT", help="the folder to write; it must not exist")
    p.add_argument("--layers", default="stack", help="new layers: stack, interleave, fresh, or a row of old layers such as 0,1,2,1,- "
                   "(default %(default)s)")
    p.add_argument("--ramp", type=int, metavar="SAMPLES", help="samples until the mask is at 1; 0: no mask, a jump (default: a tenth of the samples seen)")
    p.add_argument("--seed", type=int, default=0, help="of the new weights (default %(default)s)")
    p.add_argument("--moments", default="zeros", choices=("zeros", "mean"), help="new entries of AdamW's exp_avg_sq: zeros, or the old ones' mean "
                   "(default %(default)s)")
    p.add_argument("--finish-ramp", action="store_true", help="grow a checkpoint in mid-ramp: sets its mask to 1 first, which changes what it computes")
    p = commands.add_parser("plan", help="what a schedule of growth costs and saves",
                            description="Tokens, FLOPs, days, GPU-hours and dollars of each stage, and the saving against training the final size throughout. "
                            "With no arguments: the paper's schedule.", epilog="example: python grow.py plan --schedule stages.json --price 2.5")
    p.add_argument("--schedule", metavar="FILE.json", help='a list of stages: [{"preset": "flm-16b", "tokens": 245.37e9, "gpus": 192, "days": 9.63}, ...]; '
                   '"tflops" (per GPU) in place of "days"; "config": {"n_layers": 12} in place of, or on top of, "preset"')
    p.add_argument("--price", type=float, metavar="DOLLARS", help="per GPU-hour (default: what makes the paper's $100K of its 99 thousand hours)")
    p.add_argument("--json", action="store_true", help="print JSON in place of the table")
    p = commands.add_parser("bench", help="how much sooner does a grown model get to the same loss?", formatter_class=argparse.RawDescriptionHelpFormatter,
                            description="Train one size from scratch with several budgets, and by growth, each a run of train.py with its own full cosine, one\n"
                            "after the other. Stop it at any time: the same command goes on, and does not run finished runs again.\n"
                            "What follows -- goes to train.py, for every run; without it: " + " ".join(BENCH),
                            epilog="examples:\n  python grow.py bench --seeds 0 1 2 --plot runs/bench.png\n  python grow.py bench --stages mine.json --at 2000 4000 -- --data corpora/mine")
    p.add_argument("--out", default="runs/bench", metavar="DIR", help="a folder for the runs and bench.json (default %(default)s)")
    p.add_argument("--steps", type=int, nargs="+", default=[2000, 4000], help="budgets from scratch (default 2000 4000)")
    p.add_argument("--at", type=int, nargs="+", metavar="STEPS", help="budgets of the schedules, in steps from scratch that cost as much (default: the smallest)")
    p.add_argument("--stages", nargs="+", default=list(SCHEDULES), metavar="SCHEDULE", help="one of " + ", ".join(SCHEDULES) + ", or a JSON file: stages as train.py's, "
                   "but start, ramp and warmup in shares of the run; or several, {name: stages} (default: those named)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and data; their mean is shown (default 0)")
    p.add_argument("--plot", metavar="FILE", help="draw it, as .png, .pdf or .svg (needs matplotlib)")
    argv = sys.argv[1:] if argv is None else list(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    args.train = argv[end + 1:]
    if args.train and args.command != "bench":
        raise ValueError(f"-- {' '.join(args.train)}: only bench hands options on to train.py")
    if args.command == "bench":
        if args.plot:
            muP.pyplot()                         # a missing matplotlib shows now, not after an hour
        bench(args)
        return 0
    if args.command == "plan":
        stages = None
        if args.schedule:
            try:
                stages = json.loads(Path(args.schedule).read_text())
            except json.JSONDecodeError as error:
                raise ValueError(f"{args.schedule} is not JSON: {error}") from error
        result = plan(stages, args.price)
        print(json.dumps(result, indent=1) if args.json else show_plan(result))
        return 0

    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc keeps freed blocks under 32 MB for later, and PyTorch's aligned ones fit no second time: a heap that grows with
        # every tensor. -3 is M_MMAP_THRESHOLD: blocks from 64 KB go back to the system. Slower for training, so only here.
        libc.mallopt(-3, SMALL)
    path = find_checkpoint(args.checkpoint)
    before = read_info(path) if path.is_dir() else {"config": None}
    new = target_config(args.to, FLMConfig.from_dict(before["config"])) if path.is_dir() else None
    info = apply(path, new, args.out, seed=args.seed, layers=parse_layers(args.layers), ramp=args.ramp, moments=args.moments, finish_ramp=args.finish_ramp)
    record = info["growth"]
    if growth_mask(before["growth"], before["samples"]) < 1:
        print(f"{path} was in mid-ramp; its mask is now 1, so the grown model computes something else: python train.py --eval-only has the loss of either")
    print(f"grew {path} into {args.out}: " + ", ".join(f"{name} {record['old'][name]} -> {getattr(new, name)}" for name in GROWS
                                                        if record["old"][name] != getattr(new, name)))
    print(f"  the mask is 0 at sample {record['start']:,} and 1 at {record['start'] + record['ramp']:,}: "
          + ("it computes what the old one did" if record["ramp"] else "a ramp of 0, so there is no mask, and the function jumps"))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)    # as Ctrl-C: the bench's run in hand ends with it
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"grow.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ngrow.py: stopped; nothing half done is left that counts, and the same command of bench goes on", file=sys.stderr)
        sys.exit(130)
