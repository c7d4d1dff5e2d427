"""course/oracles.py - the papers' formulas in plain Python and loops, slow and independent.

What the checks of course/checks/ and the tests compare answers with. Nothing here uses the modules
that it judges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def xpos_score(q, k, distance: int, theta: float, scale_base: float) -> float:
    """xPos's score of a query and a key (D,), as the paper has it (arXiv 2212.10554).

    The sum over pairs of Re[q_i conj(k_i) exp(j distance theta_i)] zeta_i ** (distance / 512);
    `distance` is the position of the query less that of the key; 512 is scale_base."""
    D, total = len(q), 0.0
    for i in range(D // 2):
        theta_i, zeta = theta ** (-2 * i / D), (2 * i / D + 0.4) / 1.4
        product = complex(q[2 * i], q[2 * i + 1]) * complex(k[2 * i], -k[2 * i + 1])
        angle = complex(math.cos(distance * theta_i), math.sin(distance * theta_i))
        total += (product * angle).real * zeta ** (distance / scale_base)
    return total


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of one head, query by query: q, k, v (T, D) -> (T, D)."""
    rows = []
    for n in range(len(q)):
        scores = [(q[n] @ k[m]).item() / math.sqrt(q.shape[1]) for m in range(n + 1)]
        sizes = [math.exp(score - max(scores)) for score in scores]
        rows.append(sum(size / sum(sizes) * v[m] for m, size in enumerate(sizes)))
    return torch.stack(rows)


def token_loss(logits: Sequence[float], target: int) -> float:
    """-log of the softmax's probability of the target, in nats."""
    top = max(logits)
    return math.log(sum(math.exp(z - top) for z in logits)) + top - logits[target]


def masked_norm(x, gain, bias, mask, eps: float) -> torch.Tensor:
    """LayerNorm of one vector (C,), in which channel i counts mask[i], channel by channel."""
    channels = range(len(x))
    total = sum(float(mask[i]) for i in channels)
    mean = sum(float(mask[i] * x[i]) for i in channels) / total
    variance = sum(float(mask[i] * (x[i] - mean) ** 2) for i in channels) / total
    size = math.sqrt(variance + eps)
    row = [((x[i] - mean) / size * gain[i] + bias[i]) * mask[i] for i in channels]
    return torch.tensor(row, dtype=torch.float64)


def mup_row(name: str, config: dict) -> tuple[float, float]:
    """(m, initial std) of a parameter, from the table of muP (arXiv 2203.03466, and section 3 of
    FLM-101B). A vector's std is 0: it starts as a constant.

    name: "embedding", "head", "norm" or, in a layer, "qkv", "o", "up", "down", "bias". config: the
    keys n_layers, d_model, n_heads, head_dim, d_ff, base_width and init_std."""
    s, base, branches = config["init_std"], config["base_width"], 2 * config["n_layers"]
    width = config["d_model"] / base
    attention = config["n_heads"] * config["head_dim"] / base
    hidden = config["d_ff"] / (4 * base)
    return {
        "embedding": (1.0, s),
        "head": (1.0, s),
        "norm": (1.0, 0.0),
        "bias": (1.0, 0.0),
        "qkv": (width, s / math.sqrt(width)),
        "up": (width, s / math.sqrt(width)),
        "o": (attention, s / math.sqrt(branches * attention)),
        "down": (hidden, s / math.sqrt(branches * hidden)),
    }[name]
