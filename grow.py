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
import tempfile
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from tqdm import tqdm

import muP
import console
from checkpoint import find_checkpoint, read_info, read_tensors, write_checkpoint
from flm import FLM, FLMConfig, PRESETS, growth_mask, parse_fields, preset


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


def grow_checkpoint(checkpoint, new_config: FLMConfig, out, *, seed: int = 0, layers="stack", ramp: int | None = None, moments: str = "zeros",
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


# ---------------------------------------------------------------------------------------------------------------------
# 7. Is it worth it? The same size from scratch and by growth: runs of train.py, each with a full cosine of its own.


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
    args = parser.parse_args(argv)
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc keeps freed blocks under 32 MB for later, and PyTorch's aligned ones fit no second time: a heap that grows with
        # every tensor. -3 is M_MMAP_THRESHOLD: blocks from 64 KB go back to the system. Slower for training, so only here.
        libc.mallopt(-3, SMALL)
    path = find_checkpoint(args.checkpoint)
    before = read_info(path) if path.is_dir() else {"config": None}
    new = target_config(args.to, FLMConfig.from_dict(before["config"])) if path.is_dir() else None
    info = grow_checkpoint(path, new, args.out, seed=args.seed, layers=parse_layers(args.layers), ramp=args.ramp, moments=args.moments, finish_ramp=args.finish_ramp)
    record = info["growth"]
    if growth_mask(before["growth"], before["samples"]) < 1:
        print(f"{path} was in mid-ramp; its mask is now 1, so the grown model computes something else: python train.py --eval-only has the loss of either")
    print(f"grew {path} into {args.out}: " + ", ".join(f"{name} {record['old'][name]} -> {getattr(new, name)}" for name in GROWS
                                                        if record["old"][name] != getattr(new, name)))
    print(f"  the mask is 0 at sample {record['start']:,} and 1 at {record['start'] + record['ramp']:,}: "
          + ("it computes what the old one did" if record["ramp"] else "a ramp of 0, so there is no mask, and the function jumps"))
    return 0

if __name__ == "__main__":
    console.run(main)
