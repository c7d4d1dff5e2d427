"""An independent model: the papers' formulas in numpy and loops. The oracle of the tests."""

import math
from types import SimpleNamespace

import numpy as np

from course.oracles import xpos_score
from flm import FLM, FLMConfig


def slow_score(q, k, distance: int, config: FLMConfig) -> float:
    """xPos's score of a query and a key (D,), as the paper has it.

    `distance` is the position of the query less that of the key."""
    # An infinite base is RoPE: no decay.
    scale_base = config.xpos_scale_base if config.rotary == "xpos" else math.inf
    return xpos_score(q, k, distance, config.rotary_theta, scale_base)


def causal(n: int, m: int) -> bool:
    """Whether position n attends to position m in plain causal attention."""
    return m <= n


class SlowModel:
    """The whole model on one sequence.

    sees(n, m): whether position n attends to position m.
    live: the growth masks: channels (C,), heads (H,), hidden (F,) and layers (L,)."""

    def __init__(self, model: FLM, sees=causal, live: dict | None = None):
        self.config, self.sees = model.config, sees
        self.w = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        c = model.config
        ones = {"channels": c.d_model, "heads": c.n_heads, "hidden": c.d_ff, "layers": c.n_layers}
        live = live or {name: np.ones(size) for name, size in ones.items()}
        self.live = SimpleNamespace(**live)

    def linear(self, x, name):
        return x @ self.w[name + ".weight"].T + self.w.get(name + ".bias", 0.0)

    def norm(self, x, name):
        c = self.live.channels
        mean = (x * c).sum(1, keepdims=True) / c.sum()
        if self.config.norm == "rmsnorm":
            mean = 0.0
        variance = ((x - mean) ** 2 * c).sum(1, keepdims=True) / c.sum()
        x = (x - mean) / np.sqrt(variance + self.config.norm_eps)
        return (x * self.w[name + ".weight"] + self.w.get(name + ".bias", 0.0)) * c

    def head(self, q, k, v):
        """One head: q, k, v (T, D) -> (T, D)."""
        T, D = q.shape
        out = np.zeros((T, D))
        for n in range(T):
            seen = [m for m in range(T) if self.sees(n, m)]
            scores = [slow_score(q[n], k[m], n - m, self.config) / math.sqrt(D) for m in seen]
            weights = np.exp(scores) / np.exp(scores).sum()
            out[n] = sum(weight * v[m] for weight, m in zip(weights, seen))
        return out

    def attention(self, x, name):
        rows, D, heads = self.linear(x, name + ".qkv"), self.config.head_dim, []
        for h, live in enumerate(self.live.heads):
            q, k, v = (rows[:, (3 * h + part) * D : (3 * h + part + 1) * D] for part in range(3))
            heads.append(self.head(q, k, v) * live)
        return self.linear(np.concatenate(heads, axis=1), name + ".o")

    def feed_forward(self, x, name):
        y = self.linear(x, name + ".up")
        if self.config.activation == "swiglu":
            gate = self.linear(x, name + ".gate")
            y = gate / (1 + np.exp(-gate)) * y
        elif self.config.activation == "gelu_tanh":
            y = y / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        else:
            y = y / 2 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        return self.linear(y * self.live.hidden, name + ".down")

    def logits(self, tokens):
        """tokens (T,) -> logits (T, V)."""
        c = self.config
        x = self.w["embedding.weight"][np.asarray(tokens)] * c.input_mult
        mult = 1.0
        if c.depth_alpha > 0:  # CompleteP
            mult = 1 / (c.n_layers / c.base_layers) ** c.depth_alpha
        for i, live in enumerate(self.live.layers * mult):
            layer = f"layers.{i}"
            x = x + live * self.attention(self.norm(x, layer + ".attn_norm"), layer + ".attn")
            x = x + live * self.feed_forward(self.norm(x, layer + ".ff_norm"), layer + ".ff")
        head = self.w["embedding.weight" if c.tie_embeddings else "head.weight"]
        m = c.d_model / c.mup_base_width if c.mup else 1
        return self.norm(x, "norm") @ head.T * c.output_mult / m


def slow_forward(model: FLM, tokens, sees=causal, live: dict | None = None) -> np.ndarray:
    """tokens (T,) -> logits (T, V). The other arguments are SlowModel's."""
    return SlowModel(model, sees, live).logits(tokens)
