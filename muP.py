"""muP.py - the maximal update parametrization of FLM-101B (section 3 of the paper; TP-V, arXiv 2203.03466).

A narrow proxy (width 256) is cheap enough for a search over learning rate, init std and output multiplier. muP says how
each must change with width so that what the search found holds for the wide model. With m the ratio of a width to the
proxy's (FLMConfig.m_width, .m_attn, .m_ff), s = init_std and n = the learning rate:

    parameter                      init std           AdamW lr   weight decay   forward        standard (every m = 1)
    embedding (tied or not)        s                  n          wd             x input_mult   the same
    q, k, v, up                    s / sqrt(m)        n / m      wd * m         1              s, n, wd
    o, down                        s / sqrt(2L m)     n / m      wd * m         1              s / sqrt(2L), n, wd
    LayerNorm gain; bias; biases   1; 0; 0            n          0              1              the same
    logits (untied head)           s                  n          wd             x output_mult / m    x output_mult

The column "init std" is `init_std`, the columns "AdamW lr" and "weight decay" are `param_groups`, the column "forward"
is two lines of FLM.forward. `mup=False` in the config sets every m to 1 and changes nothing else, so at the base width
both are the same model, bit for bit.

Every value is a plain number in the config or in a parameter group, never an attribute of a tensor: it survives
torch.compile, DTensor, fully_shard, checkpoints and growth.

The paper's search found n = 4e-4, s = 1.6e-2 and output_mult = 2.0 at width 256 with 2 heads.
"""
from __future__ import annotations

import hashlib

import torch

from flm import FLM, FLMConfig


def kind(name: str) -> str:
    """The table's row for a parameter of that name: 'vector', 'embedding', 'head', 'qkv', 'o', 'up' or 'down'."""
    *_, module, leaf = name.split(".")
    if leaf == "bias" or module.endswith("norm"):
        return "vector"
    return module


def width_mult(config: FLMConfig, name: str) -> float:
    """m for a parameter: how much wider its fan-in is than the proxy's; 1 for what is not a matrix of the blocks."""
    ratios = {"qkv": config.m_width, "up": config.m_width, "o": config.m_attn, "down": config.m_ff}
    return ratios.get(kind(name), 1.0)


def init_std(config: FLMConfig, name: str) -> float:
    """Standard deviation of a matrix's or an embedding's initial values."""
    std = config.init_std / width_mult(config, name) ** 0.5
    if kind(name) in ("o", "down"):              # 2L branches add up in the residual stream
        std /= (2 * config.n_layers) ** 0.5
    return std


def initial_value(config: FLMConfig, name: str, shape, seed: int, growths: int = 0) -> torch.Tensor:
    """The whole initial tensor of the parameter `name`: fp32, on the CPU.

    A function of (seed, name, number of growths so far) alone: whoever needs a slice draws the whole and cuts it, so every
    layout and every rank starts from the same numbers. A tied head is the embedding, wherever it lives.
    """
    if kind(name) == "vector":
        return torch.ones(shape) if name.endswith("norm.weight") else torch.zeros(shape)
    if config.tie_embeddings and name == "head.weight":
        name = "embedding.weight"
    key = hashlib.sha256(f"{seed}/{name}/{growths}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
    return torch.empty(shape).normal_(0.0, init_std(config, name), generator=generator)


@torch.no_grad()
def init_weights(model: FLM, seed: int) -> FLM:
    """Fill every parameter of the model; returns it."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(model.config, name, parameter.shape, seed))
    return model


def param_groups(model: FLM, lr: float, weight_decay: float) -> list[dict]:
    """AdamW's parameter groups, one per row of the table that the model has.

    Each carries `lr_scale` = 1/m: a schedule sets group["lr"] = lr(samples) * group["lr_scale"]. AdamW multiplies decay by
    the learning rate, so decay is multiplied by m: what a step takes off a weight does not depend on the width. Biases
    and LayerNorms are not decayed.
    """
    rows: dict[tuple, list] = {}
    for name, parameter in model.named_parameters():
        decay = 0.0 if kind(name) == "vector" else weight_decay
        rows.setdefault((width_mult(model.config, name), decay), []).append(parameter)
    return [{"params": parameters, "lr": lr / m, "lr_scale": 1 / m, "weight_decay": decay * m}
            for (m, decay), parameters in rows.items()]
