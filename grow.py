"""grow.py - growth: a larger model that computes what the smaller one did (section 2.3 of FLM-101B,
arXiv 2309.03852).

    python grow.py apply runs/demo --to n_layers=12 --out runs/grown

FLM-101B was trained as a 16B model, then as a 51B model, then as 101B: most tokens were cheap. The
step between two sizes is Masked Structural Growth (MSG, arXiv 2305.02869). It widens tensors,
copies the old values into the leading block and fills the rest with ANY values, because everything
new is multiplied by a mask c:

    old tensor          grown tensor        the mask over channels, heads or hidden units
    +-------+           +-------+---+
    |  old  |   ---->   |  old  |   |       1 1 1 1 1 1 1 | c c c
    +-------+           +-------+   |
                        |    new    |       c = 0 at the growth, then a ramp up to 1
                        +-----------+

At c = 0 the grown model computes exactly what the old model did. At c = 1 there is no mask left.
The masks themselves are in flm.py (Norm, Attention, FeedForward, Block, FLM.set_masks).

Read it from top to bottom:

    1. what can grow        and what cannot, because the function would change
    2. four operators       which sides of which matrix grow; where a new layer comes from
    3. old tensors to new   growth_record, old_name; grow_tensor: a parameter or AdamW's state
    4. in memory            grow
    5. on disk              grow_checkpoint: from checkpoint to checkpoint, in little memory
    6. the command line

The paper says that its operators "originate from MSG" and that it grew checkpoints offline. It does
not say which dimensions grew, whether the mask had a ramp, or what became of the optimizer's state.
There the choice is ours, and each place says so.

Letters as in flm.py: C d_model, H heads, D head_dim, F d_ff, V vocabulary, L layers, m a width
ratio of muP, c the mask's value.
"""

import argparse
import ctypes
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

import console
import muP
from checkpoint import (
    OneProcess,
    find_checkpoint,
    read_info,
    read_tensors,
    stored_tensors,
    write_checkpoint,
)
from flm import FLM, PRESETS, FLMConfig, growth_mask, parse_fields, preset

# --------------------------------------------------------------------------------------------------
# 1. What can grow

DIMENSIONS = ("n_layers", "d_model", "n_heads", "d_ff")  # the fields that can grow
REASONS = {  # why another value of a field would change what the model computes
    "head_dim": "the rotary frequencies depend on it; add heads instead",
    "vocab_size": "a new token would take its share of every softmax",
    "max_seq_len": "xPos measures positions from its middle",
    "tie_embeddings": "two matrices would become one, or one two",
    "norm": "every layer would read other numbers",
    "activation": "every hidden unit would compute another function",
    "rotary": "attention would see positions in another way",
    "bias": "a bias would appear or go",
    "rotary_theta": "it is the base of the rotary frequencies",
    "xpos_scale_base": "it is the base of xPos's decay",
    "mup": "it sets the multiplier of the logits",
    "mup_base_width": "it sets the multiplier of the logits",
    "depth_alpha": "it sets the multiplier of every branch",
    "base_layers": "it sets the multiplier of every branch",
}


def check_growth(old: FLMConfig, new: FLMConfig):
    """Raise ValueError with every reason why `old` cannot grow into `new`: a dimension that
    shrinks, a field that must stay, nothing that grows. (init_std may differ: it only says how new
    weights are drawn.)"""
    problems = []
    for name, a in old.to_dict().items():
        b = getattr(new, name)
        if name in DIMENSIONS and b < a:
            problems.append(f"{name}: {a} -> {b} would shrink; growth only adds")
        elif name not in (*DIMENSIONS, "init_std") and a != b:
            reason = REASONS.get(name, "it changes what the model computes")
            problems.append(f"{name}: {a} -> {b} must stay as it is: {reason}")
    if not problems and old.replace(init_std=new.init_std) == new:
        sizes = ", ".join(f"{name} ({getattr(old, name)})" for name in DIMENSIONS)
        problems.append(f"the target is no larger: raise at least one of {sizes}")
    console.refuse(problems, "this model cannot grow into that one:")


# --------------------------------------------------------------------------------------------------
# 2. Four operators
#
# An operator grows one dimension. The operators for C, H and F widen every matrix in which their
# letter stands below; the operator for L adds layers (layer_origins). Where the mask c is:
#
#     C    on the output of every LayerNorm. A LayerNorm's mean and variance are taken over all
#          channels; while c = 0, over the old channels alone. All that reads the residual stream
#          comes after a LayerNorm, so nothing reads what the new channels of the stream hold.
#     H    on the outputs of the new heads. Heads are added whole, after the old ones: the rows of
#          qkv are laid out (H, 3, D).
#     F    on the activations of the new hidden units
#     L    on both branches of a new layer. With CompleteP (muP.py) the multiplier of all branches
#          falls by a factor r when L grows. Then an old layer has a mask too, which goes from r to
#          1: at c = 0 its branches are what they were, with the same weights, gradients and moments
#
# All other parameters are vectors: a bias has the rows of its matrix, a LayerNorm has C.

MATRICES = {  # matrix: (rows, columns)
    "embedding": ("V", "C"),
    "head": ("V", "C"),
    "attn.qkv": ("3HD", "C"),
    "attn.o": ("C", "HD"),
    "ff.up": ("F", "C"),
    "ff.gate": ("F", "C"),
    "ff.down": ("C", "F"),
}


def shape(part: str, config: FLMConfig) -> tuple[int, ...]:
    """The shape of a part, which is the name of a parameter without its layer.

    >>> shape("attn.qkv.weight", preset("flm-101b")), shape("attn_norm.bias", preset("flm-101b"))
    ((30720, 10240), (10240,))
    """
    HD = config.n_heads * config.head_dim
    lengths = {"V": config.vocab_size, "C": config.d_model, "F": config.d_ff}
    lengths |= {"HD": HD, "3HD": 3 * HD}
    module, _, leaf = part.rpartition(".")
    sides = MATRICES.get(module, ("C",))
    return tuple(lengths[side] for side in (sides[:1] if leaf == "bias" else sides))


def layer_origins(old_L: int, new_L: int, rule="stack") -> list[tuple[int | None, int | None]]:
    """Where each layer of the grown model comes from: the operator for n_layers.

    Each entry is (kept, copied). (2, None) is the old layer 2, trained and without a mask.
    (None, 2) is a new layer that starts as a copy of layer 2. (None, None) is a fresh layer, which
    is drawn as at initialisation. New layers are masked.

    rule: "stack" puts whole copies on top while they fit, then the last layers (the order of
    StackBERT and MSG). "interleave" puts copies next to their originals, spread evenly. "fresh"
    puts fresh layers on top. A list is a row of old layers, None for a fresh one: the first
    mention of a layer keeps it, a later one copies it.

    >>> layer_origins(3, 5, "stack")  # the row 0 1 2 1 2
    [(0, None), (1, None), (2, None), (None, 1), (None, 2)]
    >>> layer_origins(3, 5, "interleave")  # the row 0 0 1 1 2
    [(0, None), (None, 0), (1, None), (None, 1), (2, None)]
    >>> layer_origins(3, 4, [0, None, 1, 2])
    [(0, None), (None, None), (1, None), (2, None)]

    A masked block passes the residual stream through. So the old layers, in their old order, are
    the old model, wherever the new ones stand. Raises ValueError for a row that breaks the order.
    """
    if rule == "stack":
        row = [*range(old_L)] * (new_L // old_L) + [*range(old_L - new_L % old_L, old_L)]
    elif rule == "interleave":
        row = [i * old_L // new_L for i in range(new_L)]
    elif rule == "fresh":
        row = [*range(old_L)] + [None] * (new_L - old_L)
    elif isinstance(rule, list):
        row = rule
    else:
        raise ValueError(
            f"unknown rule {rule!r} for new layers: use stack, interleave, fresh, or a row of old "
            "layers such as 0,1,2,1,2"
        )
    first = [layer is not None and layer not in row[:i] for i, layer in enumerate(row)]
    origins = [(layer, None) if new else (None, layer) for layer, new in zip(row, first)]
    if len(row) != new_L or [kept for kept, _ in origins if kept is not None] != [*range(old_L)]:
        raise ValueError(
            f"the layers {row} must be {new_L} entries in which every old layer, 0 to {old_L - 1}, "
            "comes first in the old order: later mentions are copies, None is a fresh layer"
        )
    return origins


def split_name(name: str) -> tuple[int | None, str]:
    """The layer and the part of a parameter.

    >>> split_name("layers.4.ff.up.weight"), split_name("norm.bias")
    ((4, 'ff.up.weight'), (None, 'norm.bias'))
    """
    if not name.startswith("layers."):
        return None, name
    _, layer, part = name.split(".", 2)
    return int(layer), part


# --------------------------------------------------------------------------------------------------
# 3. From old tensors to new ones


def growth_record(
    old: FLMConfig,
    new: FLMConfig,
    *,
    layers="stack",
    start: int = 0,
    ramp: int = 0,
    growths: int = 1,
) -> dict:
    """The record of a growth: plain JSON for the checkpoint, all that FLM.set_masks and
    flm.growth_mask need. layers: see layer_origins. start, ramp: in samples. growths: how often the
    model has grown, this growth included.

    The mask's value is computed from the record, c = (samples - start) / ramp up to 1, and never
    added up: a run that stops in mid-ramp goes on exactly. Raises ValueError for a growth that
    cannot be."""
    check_growth(old, new)
    if start < 0 or ramp < 0:
        raise ValueError(f"start = {start}, ramp = {ramp}: must be 0 samples or above")
    origins = layer_origins(old.n_layers, new.n_layers, layers)
    return {
        "old": {name: getattr(old, name) for name in DIMENSIONS},
        "layer_map": [kept for kept, _ in origins],
        "copied_from": [copied for _, copied in origins],
        "start": start,
        "ramp": ramp,
        "growths": growths,
    }


def old_name(name: str, record: dict) -> str | None:
    """The name of the old tensor that the new tensor `name` starts from; None for a fresh layer.
    record: see growth_record.

    >>> record = growth_record(preset("demo"), preset("demo").replace(n_layers=8))
    >>> old_name("layers.7.ff.up.weight", record), old_name("norm.bias", record)
    ('layers.5.ff.up.weight', 'norm.bias')
    """
    layer, part = split_name(name)
    if layer is None:
        return name
    kept, copied = record["layer_map"][layer], record["copied_from"][layer]
    old = copied if kept is None else kept
    return None if old is None else f"layers.{old}.{part}"


# What AdamW keeps of each parameter: the first moment (a running mean of the gradient), the second
# moment (of the gradient's square), and the number of its updates.
STATES = ("exp_avg", "exp_avg_sq", "step")


def final_norm_factor(state: str, old: FLMConfig, new: FLMConfig) -> float:
    """By what muP multiplies the final LayerNorm's old values when d_model grows (ours; the paper
    does not mention it). state: one of STATES, or "" for gain and bias themselves.

    The logits are output_mult / m times what the final LayerNorm feeds the head, and m grows by
    r = m_new / m_old. So gain and bias of that LayerNorm are multiplied by r, and the logits stay.
    Their gradients are then 1/r of what they were, hence exp_avg is multiplied by 1/r and
    exp_avg_sq by 1/r**2. What the model computes is kept. How it trains from there is not: m is
    also in muP's learning rates, which muP.param_groups works out for the new width."""
    r = new.m_width / old.m_width
    return {"": r, "exp_avg": 1 / r, "exp_avg_sq": 1 / r**2}[state]


@torch.no_grad()
def grow_tensor(
    name: str,
    old: torch.Tensor | None,
    old_config: FLMConfig,
    new_config: FLMConfig,
    *,
    seed: int,
    growths: int = 1,
    draw: Callable = muP.initial_value,
) -> torch.Tensor:
    """The grown tensor. old: the tensor that it starts from; None for a fresh layer.

    name: the new tensor's name in a checkpoint: "layers.5.attn.o.weight" for a parameter, with
    ".exp_avg", ".exp_avg_sq" or ".step" after it for AdamW's state.
    draw(new_config, parameter, shape, seed, growths): the new weights, by default those of the
    larger model's initialisation; any other function will do.
    Returns the dtype and device of `old`; without it fp32 on the CPU.

    AdamW's state: the old block is copied, new entries are zeros, `step` is kept, as in MSG's
    public code. A copied layer takes the state of its source (ours); a fresh one has zeros and
    step 0. Zeros beside an old `step` make a new entry's first step 0.1 g / sqrt(0.05 g^2) = 0.45
    of the learning rate, and 1.1 after 20 equal gradients, which is near the most that AdamW ever
    does. So the learning rate warms up again after a growth (the paper: 230,400 samples).

    Raises ValueError where `old` has not the shape that old_config says."""
    ending = name.rpartition(".")[2]
    state = ending if ending in STATES else ""
    if state == "step":
        return torch.zeros(()) if old is None else old.clone()
    parameter = name.removesuffix(f".{state}")
    part = split_name(parameter)[1]
    size = shape(part, new_config)
    new = torch.zeros(size) if state else draw(new_config, parameter, size, seed, growths)
    if old is None:
        return new
    expected = shape(part, old_config)
    if tuple(old.shape) != expected:
        raise ValueError(
            f"{name} has the shape {tuple(old.shape)}, the configuration says {expected}"
        )
    new = new.to(old)
    old_block = new[tuple(slice(length) for length in expected)]
    old_block.copy_(old)
    if part in ("norm.weight", "norm.bias"):
        old_block *= final_norm_factor(state, old_config, new_config)
    return new


def grown_tensors(
    names: Iterable[str],
    old: dict[str, torch.Tensor],
    new_config: FLMConfig,
    record: dict,
    **options,
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(kind, name, tensor) of all that the grown model has, one after the other: of each parameter
    in `names`, and of AdamW's state of it if `old` has any.

    A kind is "model" or "optimizer", as in a checkpoint. old: {"model.norm.weight": tensor,
    "optimizer.norm.weight.exp_avg": tensor, ...}. options: seed and draw of grow_tensor. Raises
    ValueError where `old` lacks a tensor."""
    has_optimizer = any(key.startswith("optimizer.") for key in old)
    kinds = [("model", "")] + [("optimizer", f".{state}") for state in STATES if has_optimizer]
    old_config, growths = new_config.replace(**record["old"]), record["growths"]
    for name in names:
        source = old_name(name, record)
        for kind, end in kinds:
            key = f"{kind}.{source}{end}"
            if source is not None and key not in old:
                raise ValueError(f"the checkpoint does not hold the tensor {key}")
            configs = old_config, new_config
            value = grow_tensor(name + end, old.get(key), *configs, growths=growths, **options)
            # A fresh layer has the dtype and device of all others.
            yield kind, name + end, value.to(old[f"{kind}.norm.weight{end}"])


# --------------------------------------------------------------------------------------------------
# 4. In memory


def check_model(model: FLM):
    """Raise ValueError for a model in mid-ramp, or a part of a model."""
    if any(name.endswith("mask") for name, _ in model.named_buffers()):
        raise ValueError(
            "this model is still growing: train it to the end of its ramp, or set its masks to 1 "
            "(FLM.set_masks), which changes what it computes"
        )
    if model.embedding is None or model.head is None or len(model.layers) != model.config.n_layers:
        raise ValueError("this is a part of a model: save a checkpoint and grow that on disk")


@torch.no_grad()
def grow(
    model: FLM,
    new_config: FLMConfig,
    optimizer: torch.optim.AdamW | None = None,
    *,
    seed: int,
    draw: Callable = muP.initial_value,
    **options,
) -> tuple[FLM, torch.optim.AdamW | None, dict]:
    """A larger model that computes the same, for the classroom and as the tests' oracle of
    grow_checkpoint: (model, optimizer, record). Its masks are at c = 0; `model` stays as it is.

    optimizer: an AdamW over muP.param_groups(model, ...). The grown one has its hyper-parameters,
    muP's groups of the new width and the grown state.
    seed, draw: see grow_tensor. New weights are drawn from (seed, name, number of growths).
    options: layers, start, ramp and growths of growth_record. At a ramp of 0 the next training step
    has no mask at all, a jump.

    Raises ValueError for a target that cannot be, a model in mid-ramp, or a part of a model."""
    record = growth_record(model.config, new_config, **options)
    check_model(model)
    some = next(model.parameters())
    with torch.device("meta"):
        grown = FLM(new_config)
    grown = grown.to(some.dtype).to_empty(device=some.device).train(model.training)
    larger = None if optimizer is None else larger_optimizer(optimizer, grown)
    old, states = {}, {} if optimizer is None else optimizer.state
    for name, parameter in model.named_parameters():
        old[f"model.{name}"] = parameter
        for state, value in states.get(parameter, {}).items():
            old[f"optimizer.{name}.{state}"] = value
    new = dict(grown.named_parameters())
    for kind, name, value in grown_tensors(new, old, new_config, record, seed=seed, draw=draw):
        if kind == "model":
            new[name].copy_(value)
        else:
            name, _, state = name.rpartition(".")
            larger.state[new[name]][state] = value
    grown.set_masks(record, 0.0)
    return grown, larger, record


def larger_optimizer(optimizer: torch.optim.AdamW, grown: FLM) -> torch.optim.AdamW:
    """The AdamW of a grown model, still without its state. Raises ValueError for an optimizer whose
    state is not known here."""
    groups = optimizer.param_groups
    known = all("eps_scale" in group and not group["amsgrad"] for group in groups)
    if type(optimizer) is not torch.optim.AdamW or not known:
        raise ValueError(
            "the optimizer must be an AdamW (without amsgrad) over muP.param_groups(model, ...): "
            "other state is not known here"
        )
    # the groups that muP leaves as they are, the embedding's among them
    base = [group for group in groups if group["lr_scale"] == group["eps_scale"] == 1]
    weight_decay = max(group["weight_decay"] for group in base)
    new_groups = muP.param_groups(grown, base[0]["lr"], weight_decay, base[0]["eps"])
    return torch.optim.AdamW([{**base[0], **group} for group in new_groups])  # betas, eps, ...


# --------------------------------------------------------------------------------------------------
# 5. On disk, as the paper did it: training stops, a program extends the checkpoint, training loads
#    it. A run of train.py grows in this way too.


def step_folder(checkpoint) -> Path:
    """find_checkpoint, for what holds moments. Raises ValueError for a file of weights."""
    path = find_checkpoint(checkpoint)
    if path.is_file():
        raise ValueError(
            f"{path} is a file of weights: grow the step folder that it was exported from"
        )
    return path


def next_record(
    path: Path,
    info: dict,
    new_config: FLMConfig,
    *,
    layers="stack",
    ramp: int | None = None,
    finish_ramp: bool = False,
) -> dict:
    """growth_record for a checkpoint; info: what its checkpoint.json says. ramp, in samples, is by
    default a tenth of those seen (ours). Raises ValueError for a checkpoint in mid-ramp, unless
    finish_ramp: then it grows as if its own mask had reached 1."""
    last_growth, samples = info["growth"], info["samples"]
    c = growth_mask(last_growth, samples)
    if c < 1 and not finish_ramp:
        raise ValueError(
            f"{path} is in mid-ramp: its mask is at c = {c:.3f} and reaches 1 at sample "
            f"{last_growth['start'] + last_growth['ramp']:,}. Train it to there, or add "
            "--finish-ramp, which sets c = 1 now and so changes what it computes"
        )
    growths = last_growth["growths"] + 1 if last_growth else 1
    ramp = samples // 10 if ramp is None else ramp
    old_config = FLMConfig.from_dict(info["config"])
    options = {"layers": layers, "start": samples, "ramp": ramp, "growths": growths}
    return growth_record(old_config, new_config, **options)


SMALLEST_FILE = 2**16  # bytes


def file_backed(size: tuple[int, ...], dtype: torch.dtype, folder: Path) -> torch.Tensor:
    """A tensor whose memory is an unnamed file in `folder`. The system may write its pages to the
    disk and free them, so it takes no memory that counts. The file is gone with the tensor or with
    the process. A tensor of less than SMALLEST_FILE bytes is an ordinary one: a file costs more
    time than its memory is worth. Raises OSError on a full disk."""
    length = math.prod(size)
    if length * dtype.itemsize < SMALLEST_FILE:
        return torch.empty(size, dtype=dtype)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".grow-") as file:
        if hasattr(os, "posix_fallocate"):  # now: a disk found full later would kill the process
            os.posix_fallocate(file.fileno(), 0, length * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=length, dtype=dtype).view(size)


def grow_checkpoint(
    checkpoint,
    new_config: FLMConfig,
    out,
    *,
    seed: int = 0,
    draw: Callable = muP.initial_value,
    world=OneProcess(),
    **options,
) -> dict:
    """Grow a CHECKPOINT (see find_checkpoint) into the folder `out`; returns the info of the new
    checkpoint. It holds the same tensors, bit for bit, as `grow` makes.

    seed, draw: see grow_tensor. options: layers, ramp and finish_ramp of next_record.

    world: a parallel.World, whose ranks all call this; each grows its share of the tensors, on a
    file system that all of them see.

    Any layout may have saved the checkpoint, with or without an optimizer. Old and new tensors lie
    in file-backed memory, so the memory that this takes is a few times the largest tensor. For a
    while the disk holds all of them twice. `out` appears whole or not at all.

    Raises ValueError for what cannot grow, a checkpoint in mid-ramp without finish_ramp, or an
    `out` that exists; OSError where the disk is full."""
    job = checkpoint, new_config, Path(out), world
    info, grown = world.on_all_ranks(grow_share, *job, options, seed=seed, draw=draw)
    write_checkpoint(Path(out), grown, info, world)
    return info


def grow_share(
    checkpoint, new_config: FLMConfig, out: Path, world, of_record: dict, **of_weights
) -> tuple[dict, dict]:
    """(info of the new checkpoint, this rank's share of its tensors: {kind: {name: tensor}}).

    The first four are those of grow_checkpoint. of_record: options of next_record, which say what
    the growth is. of_weights: seed and draw of grow_tensor, which say what new weights are."""
    path = step_folder(checkpoint)
    if out.exists() or out.is_symlink():  # a link to nowhere: nothing can be renamed to it
        raise ValueError(f"{out} exists: choose another folder for the grown checkpoint")
    info = read_info(path)
    record = next_record(path, info, new_config, **of_record)
    folder = out.parent
    console.make_folder(folder)
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in FLM(new_config).named_parameters()}
    by_size = sorted(sizes, key=sizes.get, reverse=True)  # so that all ranks have as much to do
    mine = by_size[world.rank :: world.size]
    total, grown = sum(sizes[name] for name in mine), {}
    count = {"total": total, "unit": "weights", "unit_scale": True, "disable": world.rank > 0}
    with console.progress(desc="growing", **count) as bar:
        old = old_tensors(path, {old_name(name, record) for name in mine}, folder)
        for kind, name, value in grown_tensors(mine, old, new_config, record, **of_weights):
            tensor = file_backed(value.shape, value.dtype, folder).copy_(value)
            grown.setdefault(kind, {})[name] = tensor
            bar.update(value.numel() if kind == "model" else 0)
    kept = {key: value for key, value in info.items() if key not in ("format", "files")}
    return {**kept, "config": new_config.to_dict(), "growth": record}, grown


def old_tensors(path: Path, names: set[str | None], folder: Path) -> dict[str, torch.Tensor]:
    """The parameters `names` of a checkpoint and AdamW's states of them, and of the final norm,
    which has the dtype of all: {"model.norm.weight": tensor, ...}."""
    stored, old = stored_tensors(path), {}
    for name in names | {"norm.weight"}:
        for key in (f"model.{name}", *(f"optimizer.{name}.{state}" for state in STATES)):
            if key in stored:
                old[key] = file_backed(*stored[key], folder)
    read_tensors(path, old)
    return old


# --------------------------------------------------------------------------------------------------
# 6. The command line


def target_config(words: list[str], old: FLMConfig) -> FLMConfig:
    """--to: a preset, and changes FIELD=VALUE; without a preset, the changes are to the
    checkpoint's own configuration. Raises ValueError naming every word that is none of these.

    >>> target_config(["flm-16b", "n_layers=62"], preset("demo")).n_layers
    62
    """
    if "=" not in words[0]:
        old, words = preset(words[0]), words[1:]
    changes, problems = parse_fields(words)
    console.refuse(f"--to {problem}" for problem in problems)
    return old.replace(**changes)


def parse_layers(text: str) -> str | list[int | None]:
    """--layers: the name of a rule, or a row of old layers (see layer_origins).

    >>> parse_layers("stack"), parse_layers("0,1,2,1,-")
    ('stack', [0, 1, 2, 1, None])
    """
    if "," not in text:
        return text
    try:
        return [None if word.strip() == "-" else int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--layers {text}: use stack, interleave, fresh, or a row of old layers such as "
            "0,1,2,1,- (- is a fresh one)"
        ) from None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="grow.py", description="Make a trained model larger.")
    commands = parser.add_subparsers(dest="command", required=True)
    apply = commands.add_parser(
        "apply",
        help="grow a checkpoint into a larger one",
        description="Grow a checkpoint into a larger one that computes the same until its mask "
        "leaves 0. It needs little memory, and for a while room on the disk for the old tensors "
        "and for twice the new ones.",
        epilog="example: python grow.py apply runs/demo --to n_layers=12 d_ff=2048 "
        "--out runs/grown --ramp 1600",
    )
    add = apply.add_argument
    add("checkpoint", help="a run folder (its newest checkpoint) or a step folder")
    target = f"the model to grow into: a preset ({', '.join(PRESETS)}) and/or "
    target += f"FIELD=VALUE ... ({', '.join(DIMENSIONS)})"
    add("--to", required=True, nargs="+", metavar="TARGET", help=target)
    add("--out", required=True, metavar="CHECKPOINT", help="the folder to write; it must not exist")
    rules = "new layers: stack, interleave, fresh, or a row of old layers such as 0,1,2,1,-"
    add("--layers", default="stack", help=f"{rules} (default %(default)s)")
    ramp = "samples until the mask is at 1; 0: no mask, a jump (default: a tenth of those seen)"
    add("--ramp", type=int, metavar="SAMPLES", help=ramp)
    add("--seed", type=int, default=0, help="of the new weights (default %(default)s)")
    finish = "grow a checkpoint in mid-ramp: sets its mask to 1, which changes what it computes"
    add("--finish-ramp", action="store_true", help=finish)
    return parser


def return_freed_memory():
    """Ask glibc to give freed blocks of SMALLEST_FILE bytes and more back to the system at once.

    By default it keeps freed blocks of less than 32 MB, and PyTorch's aligned blocks do not fit
    into them again. Measured on a checkpoint of 900 MB (24 layers of width 512, no tensor over
    5 MB): to grow it takes 642 MB of memory without this call, and 17 MB with it. It would slow
    down training, so only the command line calls it."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, SMALLEST_FILE)  # -3: M_MMAP_THRESHOLD


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    return_freed_memory()
    path = step_folder(args.checkpoint)
    before = read_info(path)
    target = target_config(args.to, FLMConfig.from_dict(before["config"]))
    options = {"seed": args.seed, "layers": parse_layers(args.layers), "ramp": args.ramp}
    info = grow_checkpoint(path, target, args.out, finish_ramp=args.finish_ramp, **options)
    if growth_mask(before["growth"], before["samples"]) < 1:
        print(
            f"{path} was in mid-ramp and its mask is now 1, so the grown model computes something "
            "else: python train.py --eval-only has the loss of either"
        )
    record, new = info["growth"], info["config"]
    sizes = [f"{k} {old} -> {new[k]}" for k, old in record["old"].items() if old != new[k]]
    print(f"grew {path} into {args.out}: {', '.join(sizes)}")
    meaning = "until it leaves 0, the model computes what the old one did"
    if not record["ramp"]:
        meaning = "a ramp of 0: there is no mask, and what the model computes jumps"
    start, end = record["start"], record["start"] + record["ramp"]
    print(f"  the mask is 0 at sample {start:,} and 1 at {end:,}: {meaning}")
    return 0


if __name__ == "__main__":
    console.run(main)
