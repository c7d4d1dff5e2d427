"""What the tests of lab/publish.py share: published models of random numbers, and an independent
model of FLM-101B's code base that is written from the description of its format alone."""

import json
import math
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers")  # optional for users; .ci/run installs it
from safetensors.torch import load_file  # noqa: E402

# --------------------------------------------------------------------------------------------------
# FLM-101B's code base, one head and one position at a time where it matters


def flm_normed(c: dict, w: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    eps = c["layer_norm_epsilon"]
    if c["use_RMSNorm"]:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]
    x = x - x.mean(-1, keepdim=True)
    return (
        x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]
        + w[f"{name}.bias"]
    )


def flm_linear(w: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)  # stored (in, out)


def flm_turned(c: dict, x: torch.Tensor, sign: int) -> torch.Tensor:
    """Rotary positions on one head (T, D), whose pairs are (i, i + D/2)."""
    T, D = x.shape
    turned = torch.empty_like(x)
    for n in range(T):
        for i in range(D // 2):
            a = n * c["rotary_theta"] ** (-2 * i / D)
            zeta = (2 * i + 0.4 * D) / (1.4 * D) if c["rotary_use_xpos"] else 1.0
            size = zeta ** (sign * (n - math.ceil(T / 2)) / c["rotary_xpos_scale_base"])
            p, q = x[n, i], x[n, i + D // 2]
            turned[n, i] = size * (p * math.cos(a) - q * math.sin(a))
            turned[n, i + D // 2] = size * (q * math.cos(a) + p * math.sin(a))
    return turned


def flm_attention(c: dict, w: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    C, D, T = c["n_embd"], c["n_embd"] // c["n_head"], len(x)
    q, k, v = flm_linear(w, f"{name}.c_attn", x).split(C, dim=1)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    heads = []
    for begin in range(0, C, D):
        head = slice(begin, begin + D)
        scores = flm_turned(c, q[:, head], 1) @ flm_turned(c, k[:, head], -1).T / math.sqrt(D)
        heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, head])
    return flm_linear(w, f"{name}.c_proj", torch.cat(heads, dim=1))


def flm_active(kind: str, x: torch.Tensor) -> torch.Tensor:
    if kind == "silu":  # a gate and what it multiplies, side by side
        gate, up = x.chunk(2, dim=-1)
        return gate / (1 + (-gate).exp()) * up
    if kind == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def flm_logits(c: dict, w: dict, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of tokens (T,). c: config.json. w: {published name: tensor}."""
    x = w["transformer.wte.weight"][tokens] * (c["input_mult"] if c["use_mup"] else 1.0)
    for i in range(c["n_layer"]):
        block = f"transformer.h.{i}"
        x = x + flm_attention(c, w, f"{block}.attn", flm_normed(c, w, f"{block}.ln_1", x))
        y = flm_linear(w, f"{block}.mlp.c_fc", flm_normed(c, w, f"{block}.ln_2", x))
        x = x + flm_linear(w, f"{block}.mlp.c_proj", flm_active(c["activation_function"], y))
    x = flm_normed(c, w, "transformer.ln_f", x)
    head = w["transformer.wte.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
    return x @ head.T * (c["output_mult"] / c["mup_scale_factor"] if c["use_mup"] else 1.0)


def flm_model(seed: int, dtype=torch.float64, **changes) -> tuple[dict, dict]:
    """(config.json, {published name: random tensor}) in FLM-101B's naming."""
    c = {
        "n_layer": 2,
        "n_embd": 12,
        "n_head": 2,
        "n_inner": 20,
        "vocab_size": 23,
        "n_positions": 16,
        "activation_function": "gelu_fast",
        "layer_norm_epsilon": 1e-5,
        "use_RMSNorm": False,
        "add_bias_linear": True,
        "tie_word_embeddings": True,
        "relative_encoding": "rotary",
        "rotary_use_xpos": True,
        "rotary_theta": 10000,
        "rotary_xpos_scale_base": 512,
        "use_mup": True,
        "mup_scale_factor": 3.0,
        "input_mult": 1.7,
        "output_mult": 2.0,
        "initializer_range": 0.02,
        "resid_pdrop": 0.1,
        "scale_attn_by_inverse_layer_idx": True,
        **changes,
    }
    C, F, V = c["n_embd"], c["n_inner"], c["vocab_size"]
    up = 2 * F if c["activation_function"] == "silu" else F
    inner = {"attn.c_attn": 3 * C, "attn.c_proj": C, "mlp.c_fc": up, "mlp.c_proj": C}
    shapes = {"transformer.wte.weight": (V, C)}
    for i in range(c["n_layer"]):
        for name, size in inner.items():
            fan_in = F if name == "mlp.c_proj" else C
            shapes[f"transformer.h.{i}.{name}.weight"] = (fan_in, size)
            if c["add_bias_linear"]:
                shapes[f"transformer.h.{i}.{name}.bias"] = (size,)
    norms = [f"transformer.h.{i}.ln_{j}" for i in range(c["n_layer"]) for j in (1, 2)]
    for name in [*norms, "transformer.ln_f"]:
        shapes[f"{name}.weight"] = (C,)
        if not c["use_RMSNorm"]:
            shapes[f"{name}.bias"] = (C,)
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, C)
    g = torch.Generator().manual_seed(seed)
    return c, {
        k: torch.randn(s, generator=g, dtype=torch.float64).to(dtype) / 2 for k, s in shapes.items()
    }


# --------------------------------------------------------------------------------------------------
# Folders


def write_bins(folder: Path, values: dict, weights: dict, shards: int = 2) -> Path:
    """A published folder of pickled shards with their index, and the buffers that such shards have
    beside the weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    buffers = {
        f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(values["n_layer"])
    }
    names, where = list(weights | buffers), {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        part = {name: (weights | buffers)[name] for name in names[i::shards]}
        torch.save(part, folder / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def read_folder(folder: Path) -> tuple[dict, dict]:
    """(config.json, {name: tensor}) by the library's own reader, through the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weights = {}
    for file in sorted(set(index["weight_map"].values())):
        found = load_file(folder / file)
        assert all(index["weight_map"][name] == file for name in found)
        weights |= found
    assert weights.keys() == index["weight_map"].keys()
    assert sum(t.nbytes for t in weights.values()) == index["metadata"]["total_size"]
    return json.loads((folder / "config.json").read_text()), weights


class Wide:
    """The module torch, in which float32 is float64."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextmanager
def in_float64(module):
    """transformers computes norms and angles in fp32, whatever the model is in. Here `module`
    of it computes them in float64, so that a wrong formula is not taken for rounding."""
    widened = mock.patch.object(torch.Tensor, "float", torch.Tensor.double)
    with mock.patch.object(module, "torch", Wide()), widened:
        yield
