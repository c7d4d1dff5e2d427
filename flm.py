"""flm.py - the model of FLM-101B: a decoder-only transformer with xPos (FLM-101B, arXiv 2309.03852, sections 2.1 and 2.4).

Read it from top to bottom:

    1. FLMConfig, PRESETS     every number that defines a model
    2. xPos                   rotary positions with an exponential decay (arXiv 2212.10554)
    3. LayerNorm ... Block    the pre-LayerNorm GPT block, each part with a place for its growth mask (MSG, arXiv 2305.02869)
    4. FLM                    embedding, blocks, final LayerNorm, head; the loss; the count of its floating point operations
    5. KVCache, generate      one token at a time without computing anything twice
    6. checkpoints            from a folder on disk to a model
    7. the command line       python flm.py sample CHECKPOINT --prompt "def "

One set of letters stands for shapes everywhere in this repository:

    B batch   T sequence   C d_model   H heads   D head_dim   F d_ff   V vocabulary   L layers   S cache slots

FreeLM's two signals need nothing from the model: the teacher's label is one of two emoji, predicted like any other
token (section 2.2), so data.py turns both signals into (tokens, targets) and the loss below serves both.

The model knows nothing of processes, devices or optimizers, and keeps no state outside parameters and buffers.
"""
from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

IGNORE = -100      # a target that is not supervised: F.cross_entropy's own default


# ---------------------------------------------------------------------------------------------------------------------
# 1. Configuration

@dataclass(frozen=True)
class FLMConfig:
    """Every number that defines a model. All fields are plain JSON values; `check` names all that do not fit together.

    `n_heads * head_dim` need not equal `d_model`: growth adds heads without touching `head_dim`, on which the rotary
    frequencies depend. The last four fields are the parametrization (section 3 of the paper; muP.py explains them).
    """
    n_layers: int
    d_model: int
    n_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    max_seq_len: int                  # the trained length; xPos measures positions from its middle
    tie_embeddings: bool = True       # inferred for FLM-101B: its successor's report says that it "unties" them
    layer_norm_eps: float = 1e-5
    xpos_theta: float = 10000.0       # rotary base
    xpos_scale_base: float = 512.0    # positions over which the fastest pair decays by its zeta
    mup: bool = True                  # False: every width ratio m is 1 (the standard parametrization)
    mup_base_width: int = 256         # the proxy's width, where m = 1
    init_std: float = 0.016           # found by the paper's search on the proxy
    input_mult: float = 1.0
    output_mult: float = 2.0          # the paper's "softmax temperature 2.0"

    def __post_init__(self):
        problems = self.check()
        if problems:
            raise ValueError("this model configuration does not fit together:\n  " + "\n  ".join(problems))

    def check(self) -> list[str]:
        """Every violated constraint, with its numbers."""
        problems, sound = [], {}
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.type
            if kind == "bool":
                ok, want = isinstance(value, bool), "true or false"
            elif kind == "int":
                ok = isinstance(value, int) and not isinstance(value, bool) and value > 0
                want = "a whole number above 0"
            else:
                ok = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
                want = "a finite number above 0"
            sound[field.name] = ok
            if not ok:
                problems.append(f"{field.name} = {value!r}: must be {want}")
        if sound["head_dim"] and self.head_dim % 2:
            problems.append(f"head_dim = {self.head_dim}: must be even, xPos rotates pairs")
        if all(sound[k] for k in ("max_seq_len", "xpos_scale_base", "head_dim")) and self.max_seq_len > self.xpos_limit():
            problems.append(f"max_seq_len = {self.max_seq_len}: must be at most {self.xpos_limit()}, "
                            f"where the scale of a key leaves fp32 at xpos_scale_base = {self.xpos_scale_base}")
        return problems

    def xpos_limit(self) -> int:
        """The length at which the fastest pair of keys, scaled by zeta**(-n/512), leaves fp32: about 31,100 positions past the
        origin. The scale itself is then 2**110, which leaves 2**16 for the key that it multiplies; fp32 ends at 2**128."""
        largest = 110 * math.log(2)
        return self.xpos_origin + int(min(self.xpos_scale_base * largest / -math.log(0.4 / 1.4), 2.0 ** 53))

    @property
    def xpos_origin(self) -> int:
        """The position with scale 1. It is a constant of the model, never of the current length: a key that was
        rotated and cached at one length must still be right at another."""
        return self.max_seq_len // 2

    @property
    def m_width(self) -> float:
        """Width ratio of what reads the residual stream: q, k, v, up and the logits."""
        return self.d_model / self.mup_base_width if self.mup else 1.0

    @property
    def m_attn(self) -> float:
        """Width ratio of the attention's output projection, whose fan-in is H*D."""
        return self.n_heads * self.head_dim / self.mup_base_width if self.mup else 1.0

    @property
    def m_ff(self) -> float:
        """Width ratio of the feed-forward's down projection, whose fan-in is F (four times the width at the base)."""
        return self.d_ff / (4 * self.mup_base_width) if self.mup else 1.0

    @property
    def logit_mult(self) -> float:
        return self.output_mult / self.m_width

    def replace(self, **changes) -> FLMConfig:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict) -> FLMConfig:
        names = {f.name: f.default for f in dataclasses.fields(FLMConfig)}
        unknown = sorted(set(values) - set(names))
        missing = [k for k, default in names.items() if default is dataclasses.MISSING and k not in values]
        if unknown or missing:
            raise ValueError("not a model configuration:" + "".join(f"\n  unknown field {k!r}" for k in unknown)
                             + "".join(f"\n  missing field {k!r}" for k in missing))
        return FLMConfig(**values)


def _flm(n_layers, d_model, n_heads, vocab_size=100352, max_seq_len=2048, head_dim=128):
    return FLMConfig(n_layers, d_model, n_heads, head_dim, 4 * d_model, vocab_size, max_seq_len)


PRESETS = {
    # For a laptop: bytes (256 and the end-of-text token, padded to a multiple of 32).
    "demo": _flm(6, 256, 4, vocab_size=288, max_seq_len=256, head_dim=64),
    # For the IQ evaluation's tasks (iqeval.py): small and narrow, but with a context for few-shot prompts in bytes.
    "iq-demo": _flm(4, 128, 4, vocab_size=288, max_seq_len=768, head_dim=32),
    # The paper: width 256, 2 heads, under 100M parameters, everything else as in the 16B model (section 3).
    "flm-proxy": _flm(48, 256, 2),
    # The paper prints no shape for its 16B and 51B models. These are OURS: the sizes fit, heads of 128 as in the
    # 101B model, and from one to the next every dimension only grows.
    "flm-16b": _flm(48, 5120, 40),
    "flm-51b": _flm(62, 8192, 64),
    # The paper's: 80 layers, width 10240, 80 heads (section 2.4). Its vocabulary of 100,256 counts cl100k_base's
    # merges; the published weights have 100,352 rows, which also holds the special tokens and divides by 512.
    "flm-101b": _flm(80, 10240, 80),
}


def parse_fields(words) -> tuple[dict, list[str]]:
    """Words FIELD=VALUE from a command line -> ({field: value}, what is wrong with the others)."""
    names, changes, problems = [field.name for field in dataclasses.fields(FLMConfig)], {}, []
    for word in words:
        name, equals, value = word.partition("=")
        try:
            if not equals:
                problems.append(f"{word}: not FIELD=VALUE")
            elif name not in names:
                problems.append(f"{word}: there is no field {name!r}; there are {', '.join(names)}")
            else:
                changes[name] = json.loads(value.lower())
        except json.JSONDecodeError:
            problems.append(f"{word}: {value!r} is no number, true or false")
    return changes, problems


def preset(name: str) -> FLMConfig:
    """The preset of that name. Raises ValueError with the nearest names."""
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown preset {name!r}: {hint}there are {', '.join(PRESETS)}")
    return PRESETS[name]


# ---------------------------------------------------------------------------------------------------------------------
# 2. xPos

def xpos_tables(config: FLMConfig, length: int, device=None, dtype=torch.float32) -> torch.Tensor:
    """xPos for positions 0 .. length-1 (arXiv 2212.10554): a complex tensor (length, 2, D/2), queries and keys.

    The paper writes a pair of channels as one complex number, and a position as a factor:

        query at position n:   q * zeta_i ** (+n / 512) * exp(j n theta_i)        theta_i = 10000 ** (-2i / D)
        key   at position n:   k * zeta_i ** (-n / 512) * exp(j n theta_i)        zeta_i  = (2i/D + 0.4) / 1.4

    so a score depends on the distance n_query - n_key alone, and decays with it. n counts from config.xpos_origin.
    `dtype` is that of the real parts: computed in float64, kept in fp32 or wider. Raises ValueError past xpos_limit().
    """
    if length > config.xpos_limit():
        raise ValueError(f"a length of {length:,} is past {config.xpos_limit():,}, where xPos's key scale leaves fp32 "
                         f"(trained length {config.max_seq_len:,}): use a shorter text")
    D = config.head_dim
    two_i = torch.arange(0, D, 2, dtype=torch.float64)                                   # (D/2,)
    n = torch.arange(length, dtype=torch.float64)[:, None, None] - config.xpos_origin    # (length, 1, 1)
    theta, zeta = config.xpos_theta ** (-two_i / D), (two_i / D + 0.4) / 1.4
    sign = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)                            # (2, 1): query, key
    tables = torch.polar(zeta ** (sign * n / config.xpos_scale_base), (n * theta).expand(-1, 2, -1))
    return tables.to(device=device, dtype=torch.complex128 if dtype == torch.float64 else torch.complex64)


def rotate(x: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """xPos on x (B, T, H, 2, D), the 2 being query and key: the pairs (2i, 2i+1) times the first T of tables (>= T, 2, D/2)."""
    wide = x.float() if tables.dtype == torch.complex64 else x
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))                           # (B, T, H, 2, D/2)
    return torch.view_as_real(pairs * tables[:x.shape[1], None]).flatten(-2).type_as(x)  # (B, T, H, 2, D)


# ---------------------------------------------------------------------------------------------------------------------
# 3. The block. Every `mask` is None, and costs nothing, unless a growth is under way (grow.py): then it holds 1 for
#    what was there before and c in [0, 1] for what is new. Buffers outside the state dict, so keys never change.

class LayerNorm(nn.LayerNorm):
    """LayerNorm over the live channels (MSG): mean and variance weighted by the mask, and the output times the mask, so
    that what new channels of the residual stream hold is never read while c = 0."""

    def __init__(self, C: int, eps: float):
        super().__init__(C, eps)
        self.register_buffer("mask", None, persistent=False)                             # (C,)

    def forward(self, x):                                                                # (B, T, C)
        if self.mask is None:
            return super().forward(x)
        c = self.mask.to(x.dtype)
        live = c.sum()
        mean = (x * c).sum(-1, keepdim=True) / live
        var = ((x - mean).square() * c).sum(-1, keepdim=True) / live
        return ((x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias) * c


class Attention(nn.Module):
    """Causal self-attention. `qkv`'s rows are laid out (H, 3, D), head by head, so that a head is one contiguous block:
    growth appends it, tensor parallelism cuts between them."""

    def __init__(self, config: FLMConfig):
        super().__init__()
        self.D, HD = config.head_dim, config.n_heads * config.head_dim
        self.qkv = nn.Linear(config.d_model, 3 * HD)
        self.o = nn.Linear(HD, config.d_model)
        self.register_buffer("mask", None, persistent=False)                             # (H,)

    def forward(self, x, tables, visible, cache, layer):
        qk, v = self.qkv(x).unflatten(-1, (-1, 3, self.D)).split((2, 1), dim=3)          # (B, T, H, 2, D), (B, T, H, 1, D)
        q, k = rotate(qk, tables).transpose(1, 2).unbind(3)                              # (B, H, T, D) each
        v = v.squeeze(3).transpose(1, 2)                                                 # (B, H, T, D)
        if cache is not None:
            k, v = cache.extend(layer, k, v)                                             # (B, H, S, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None and q.shape[2] > 1)
        y = y.transpose(1, 2)                                                            # (B, T, H, D)
        if self.mask is not None:
            y = y * self.mask[:, None].to(y.dtype)
        return self.o(y.flatten(2))                                                      # (B, T, H*D) -> (B, T, C)


class FeedForward(nn.Module):
    def __init__(self, config: FLMConfig):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)
        self.register_buffer("mask", None, persistent=False)                             # (F,)

    def forward(self, x):
        # The published config's "gelu_fast" is the tanh approximation of this; on a CPU the exact one is 2 to 5 times faster.
        y = F.gelu(self.up(x))                                                           # (B, T, F)
        if self.mask is not None:
            y = y * self.mask.to(y.dtype)
        return self.down(y)


class Block(nn.Module):
    """Pre-LayerNorm GPT block with biases: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: FLMConfig):
        super().__init__()
        self.attn_norm = LayerNorm(config.d_model, config.layer_norm_eps)
        self.attn = Attention(config)
        self.ff_norm = LayerNorm(config.d_model, config.layer_norm_eps)
        self.ff = FeedForward(config)
        self.register_buffer("mask", None, persistent=False)                             # ()

    def forward(self, x, tables, visible=None, cache=None, layer=0):                     # (B, T, C)
        y = self.attn(self.attn_norm(x), tables, visible, cache, layer)
        x = x + (y if self.mask is None else y * self.mask.to(y.dtype))
        y = self.ff(self.ff_norm(x))
        return x + (y if self.mask is None else y * self.mask.to(y.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# 4. The model

class FLM(nn.Module):
    """The decoder. tokens (B, T) int64 -> logits (B, T, V).

    `layers` names the global numbers of the blocks to build and `embed` / `head` whether the two ends are here: a
    pipeline stage is the same class with parts left out, then hidden states (B, T, C) go in or come out.
    The constructor only allocates; muP.init_weights(model, seed) fills the parameters.
    """

    def __init__(self, config: FLMConfig, layers=None, embed: bool = True, head: bool = True):
        super().__init__()
        self.config = config
        layers = range(config.n_layers) if layers is None else layers
        self.embedding = nn.Embedding(config.vocab_size, config.d_model) if embed else None
        self.layers = nn.ModuleDict({str(i): Block(config) for i in layers})
        self.norm = LayerNorm(config.d_model, config.layer_norm_eps) if head else None
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False) if head else None
        self.register_buffer("xpos", None, persistent=False)                             # (max_seq_len, 2, D/2), complex
        self._derive()

    def _derive(self):
        """What follows from the rest: the tied head, and the xPos tables on the parameters' device, fp32 or wider."""
        if self.config.tie_embeddings and self.embedding is not None and self.head is not None:
            self.head.weight = self.embedding.weight
        parameter = next(self.parameters())
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        self.xpos = xpos_tables(self.config, self.config.max_seq_len, parameter.device, dtype)

    def _apply(self, fn, recurse=True):
        """.to(), .double(), .to_empty() ... come through here: they would leave the tables uninitialised or at the old
        width, or cast complex numbers to real ones; and .to_empty() unties the head."""
        self.xpos = None
        super()._apply(fn, recurse)
        self._derive()
        return self

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None, *, cache: KVCache | None = None,
                blockwise: bool = False, last_only: bool = False) -> torch.Tensor:
        """tokens (B, T) -> logits (B, T, V), or (B, 1, V) with `last_only`; with a cache, x continues what it holds.
        With targets (B, T): the summed loss, equal to loss_sum(logits, targets), without ever holding all logits.

        `blockwise`: blockwise causal attention (arXiv 2212.10554, section 3.2), for inference past the trained length:
        a query sees its own block of max_seq_len/2 positions and the one before. Training never uses it.
        Raises ValueError where x does not fit the cache or its length leaves xPos's range.
        """
        T, start = x.shape[1], 0 if cache is None else cache.length
        if cache is not None and start + T > cache.capacity:
            raise ValueError(f"{start + T} tokens do not fit a cache of {cache.capacity}: make it larger")
        if cache is not None:
            tables = cache.tables
        elif T <= self.config.max_seq_len:
            tables = self.xpos
        else:
            tables = xpos_tables(self.config, T, x.device, self.xpos.real.dtype)
        tables = tables[start:]          # attention takes the first T: a pipeline stage may hold only some positions of x
        pad = None if cache is None else cache.pad
        visible = None                           # None: plain causal attention, which SDPA does without a mask
        if blockwise or pad is not None or (start > 0 and T > 1):
            visible = _visible(start, T, pad, self.config.max_seq_len // 2 if blockwise else None, x.device)

        if self.embedding is not None:
            x = self.embedding(x) * self.config.input_mult                               # (B, T) -> (B, T, C)
        for number, block in self.layers.items():
            x = block(x, tables, visible, cache, int(number))                            # (B, T, C)
        if cache is not None:
            cache.length += T
        if self.head is None:
            return x
        x = x[:, -1:] if last_only else x
        x = self.norm(x) * self.config.logit_mult       # muP's multiplier, where it is cheaper: on C numbers, not on V
        if targets is None:
            return self.head(x)                                                          # (B, T, C) -> (B, T, V)
        return HeadLoss.apply(x.flatten(0, 1), self.head.weight, targets.flatten(), torch.is_grad_enabled())

    def set_masks(self, growth: dict | None, c: float):
        """Put the growth masks in place: 1 for what `growth["old"]` had, c for what is new. At c = 1, or with no
        growth, the masks are removed and this is an ordinary model.

        growth: {"old": {"n_layers", "d_model", "n_heads", "d_ff"}, "layer_map": for each layer the old layer that it
        continues, or None for a new one, "start" and "ramp" in samples}: plain JSON, kept in the checkpoint.
        """
        if not 0 <= c <= 1:
            raise ValueError(f"a growth mask of {c}: must lie in [0, 1]")
        done, new = growth is None or c == 1, self.config

        def mask(old, size):
            if done or old == size:
                return None
            values = torch.full((size,), c, device=self.xpos.device, dtype=self.xpos.real.dtype)
            values[:old] = 1
            return values

        old = growth["old"] if growth else {}
        channels, heads = mask(old.get("d_model"), new.d_model), mask(old.get("n_heads"), new.n_heads)
        hidden = mask(old.get("d_ff"), new.d_ff)
        for number, block in self.layers.items():
            block.attn_norm.mask = block.ff_norm.mask = channels
            block.attn.mask, block.ff.mask = heads, hidden
            fresh = not done and growth["layer_map"][int(number)] is None
            block.mask = torch.tensor(c, device=self.xpos.device, dtype=self.xpos.real.dtype) if fresh else None
        if self.norm is not None:
            self.norm.mask = channels


def growth_mask(growth: dict | None, samples: int) -> float:
    """The mask's value c after `samples` training samples: a function of the record, never accumulated."""
    if growth is None:
        return 1.0
    elapsed = samples - growth["start"]
    return 1.0 if elapsed >= growth["ramp"] else max(0, elapsed) / max(1, growth["ramp"])


def loss_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, summed over the supervised tokens: logits (B, T, V), targets (B, T) with IGNORE elsewhere.

    A sum, because the loss is divided once, by the global count of supervised tokens: teacher rows supervise few tokens,
    so a mean per micro-batch or per rank would weigh tokens differently."""
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="sum")


class HeadLoss(torch.autograd.Function):
    """loss_sum(head(hidden), targets) for hidden (N, C), weight (V, C), targets (N,), some rows at a time.

    The logits of 3072 tokens over 50,304 words are 620 MB, and so is each step of their softmax and its gradient: more
    time goes into that memory than into arithmetic. Here a piece of them lives only until its gradient, which is
    softmax - one-hot, has been multiplied into those of hidden and weight."""

    PIECE = 2 ** 25      # logits held at a time

    @staticmethod
    def forward(ctx, hidden, weight, targets, with_gradient):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        w, rows = weight.to(dtype), max(1, HeadLoss.PIECE // len(weight))
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        if with_gradient:
            d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=total.dtype)       # summed in fp32, whatever the weight's
        with torch.autocast(device, enabled=False):
            for i in range(0, len(hidden), rows):
                x, t = hidden[i:i + rows].to(dtype), targets[i:i + rows, None]
                supervised, t = t != IGNORE, t.masked_fill(t == IGNORE, 0)       # any other id outside fails in gather
                z = (x @ w.T).to(total.dtype)                                            # (rows, V)
                z -= z.amax(-1, keepdim=True)
                chosen = z.gather(-1, t)
                Z = z.exp_().sum(-1, keepdim=True)
                total += ((Z.log() - chosen) * supervised).sum()
                if not with_gradient:
                    continue
                z *= supervised / Z                                                      # softmax
                z.scatter_add_(-1, t, -supervised.to(z.dtype))                           # - one-hot
                z = z.to(dtype)
                d_hidden[i:i + rows] = z @ w
                d_weight += z.T @ x
        if with_gradient:
            ctx.save_for_backward(d_hidden, d_weight)
            ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, d_total):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_total, (d_weight * d_total).to(ctx.dtype), None, None


def forward_flops(config: FLMConfig, T: int) -> int:
    """Floating point operations of one forward pass over one token of a sequence of T: two for each weight that
    multiplies it, and attention's two products over all T positions (the convention; a causal kernel does half).

    Training takes three times as many (Narayanan et al. 2104.04473: 72 B T L C^2 (1 + T/6C) + 6 B T V C for d_ff = 4C).
    """
    HD = config.n_heads * config.head_dim
    layer = 2 * (config.d_model * 4 * HD + config.d_model * 2 * config.d_ff) + 4 * T * HD
    return config.n_layers * layer + 2 * config.vocab_size * config.d_model


# ---------------------------------------------------------------------------------------------------------------------
# 5. Generation

def _visible(start, T, pad, block, device):
    """Which of the S = start+T slots each of the last T queries may attend to: bool (B or 1, 1, T, S)."""
    q = torch.arange(start, start + T, device=device)[:, None]                           # (T, 1)
    k = torch.arange(start + T, device=device)                                           # (S,)
    left = torch.zeros(1, 1, 1, dtype=torch.long, device=device) if pad is None else pad[:, None, None]
    visible = (k <= q) & (k >= left)                                                     # (B, T, S)
    if block is not None:
        visible &= (q - left) // block - (k - left) // block <= 1
    # A query in the padding sees itself, lest its softmax be empty and its NaN reach the others through 0 * NaN.
    return (visible | (k == q))[:, None]


class KVCache:
    """Rotated keys and values of every layer, in `capacity` slots: (B, H, S, D) each.

    pad (B,): how many slots at the left of each row hold padding. Prompts of different lengths are aligned at their
    ends; as scores depend on distances alone, a row's logits are those it would have on its own."""

    def __init__(self, model: FLM, capacity: int, pad: torch.Tensor | None = None):
        self.capacity, self.pad, self.length, self.kv = capacity, pad, 0, {}
        self.tables = xpos_tables(model.config, capacity, model.xpos.device, model.xpos.real.dtype)

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        """Append k and v (B, H, T, D); return all so far (B, H, S, D)."""
        if layer not in self.kv:                 # here, and not before, the dtype is known (autocast)
            B, H, _, D = k.shape
            self.kv[layer] = k.new_empty(B, H, self.capacity, D), v.new_empty(B, H, self.capacity, D)
        end = self.length + k.shape[2]
        for slots, fresh in zip(self.kv[layer], (k, v)):
            slots[:, :, self.length:end] = fresh
        return tuple(slots[:, :, :end] for slots in self.kv[layer])


def choose(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator) -> int:
    """One token from logits (V,): the most likely one at temperature 0, else a draw among the `top_k` most likely, cut
    to the smallest set whose probability reaches `top_p`."""
    if temperature == 0:
        return int(logits.argmax())
    logits, ids = ((logits.double() - logits.max()) / temperature).sort(descending=True, stable=True)
    if top_k:
        logits, ids = logits[:top_k], ids[:top_k]
    p = logits.softmax(-1)
    p = p * (p.cumsum(-1) - p < top_p)                                  # what precedes a token has not reached top_p
    return int(ids[torch.multinomial(p, 1, generator=generator)])


@torch.inference_mode()
def generate(model: FLM, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, seed: int = 0, stop: tuple[int, ...] = (), allowed: torch.Tensor | None = None,
             capacity: int | None = None, blockwise: bool = False, on_token=None) -> list[list[int]]:
    """Continue each prompt by up to `max_new_tokens` tokens; returns the new tokens of each, a stop token not included.

    prompts: lists of ids, of any lengths. stop: ids that end a row. allowed: bool (V,), the ids that may be drawn (a
    padded vocabulary has rows that no tokenizer decodes). capacity: cache slots, by default the trained length.
    on_token(row, id) is called for each new token. A row draws from a generator of its own (seed, row), on the CPU.
    Raises ValueError that names every argument out of range; a prompt must leave room for the new tokens.
    """
    config, B = model.config, len(prompts)
    capacity = config.max_seq_len if capacity is None else capacity
    longest = max((len(p) for p in prompts), default=0)
    problems = [f"prompt {i} is empty: give at least one token" for i, p in enumerate(prompts) if not p]
    problems += [f"prompt {i} holds the token {next(t for t in p if not 0 <= t < config.vocab_size)}: the vocabulary ends at {config.vocab_size - 1}"
                 for i, p in enumerate(prompts) if p and not (0 <= min(p) and max(p) < config.vocab_size)]
    if not prompts:
        problems.append("no prompt given")
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    if longest + max(max_new_tokens, 0) > capacity:
        problems.append(f"a prompt of {longest} tokens and {max_new_tokens} new ones need {longest + max_new_tokens} cache "
                        f"slots, there are {capacity}: give a shorter prompt, fewer new tokens (--max-new-tokens), or more "
                        f"slots (--cache {longest + max_new_tokens}; trained at {config.max_seq_len}, past that xPos carries "
                        f"best with --blockwise)")
    if not (temperature >= 0 and math.isfinite(temperature)):
        problems.append(f"temperature = {temperature}: must be 0 (greedy) or above")
    if top_k < 0:
        problems.append(f"top_k = {top_k}: must be 0 (off) or above")
    if not 0 < top_p <= 1:
        problems.append(f"top_p = {top_p}: must lie in (0, 1]")
    if allowed is not None and (len(allowed) > config.vocab_size or not allowed.any()):
        problems.append(f"allowed marks {int(allowed.sum())} of {len(allowed)} ids: must mark at least one, of at most {config.vocab_size}")
    if problems:
        raise ValueError("cannot generate:\n  " + "\n  ".join(problems))

    device = model.xpos.device
    pads = [longest - len(p) for p in prompts]
    x = torch.tensor([[p[0]] * n + list(p) for p, n in zip(prompts, pads)], device=device)          # (B, longest)
    cache = KVCache(model, capacity, torch.tensor(pads, device=device) if any(pads) else None)
    generators = [torch.Generator().manual_seed((seed * 1_000_003 + row) % 2 ** 63) for row in range(B)]
    new, live = [[] for _ in prompts], set(range(B))
    for _ in range(max_new_tokens):
        logits = model(x, cache=cache, blockwise=blockwise, last_only=True)[:, -1].float().cpu()         # (B, V)
        if allowed is not None:
            logits[:, :len(allowed)].masked_fill_(~allowed, -math.inf)
            logits[:, len(allowed):] = -math.inf
        picked = [choose(row, temperature, top_k, top_p, g) for row, g in zip(logits, generators)]
        for row in sorted(live):
            if picked[row] in stop:
                live.discard(row)
                continue
            new[row].append(picked[row])
            if on_token is not None:
                on_token(row, picked[row])
        if not live:
            break
        x = torch.tensor(picked, device=device)[:, None]                                 # (B, 1)
    return new


# ---------------------------------------------------------------------------------------------------------------------
# 6. Checkpoints. A run folder holds step-00001234/ folders; one of them holds the tensors, written by PyTorch's
#    distributed checkpoint (DCP) under the parameters' names, and checkpoint.json, which a person can read. DCP's metadata
#    is a pickle: trust a folder as you trust code. One-file weights (train.py --export) are the form to pass around.


# ---------------------------------------------------------------------------------------------------------------------
# 7. The command line
