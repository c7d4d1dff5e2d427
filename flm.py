"""flm.py - the model of FLM-101B: a decoder-only transformer with xPos.

FLM-101B is arXiv 2309.03852; the model is in its sections 2.1 and 2.4. Read from top to bottom:

    1. FLMConfig, PRESETS     every number that defines a model
    2. xPos                   rotary positions with an exponential decay (arXiv 2212.10554)
    3. Norm ... Block         the pre-norm GPT block; visible_slots: what a token may attend to
    4. FLM                    embedding, blocks, final norm, head; the growth masks
    5. the loss               a sum over tokens, and the same without holding all logits

A `cache` is a sample.KVCache: for texts that grow token by token. In training there is none.

One set of letters stands for shapes everywhere in this repository:

    B batch   T sequence   C d_model   H heads   D head_dim   F d_ff   V vocabulary   L layers
    m width ratio (muP.py)   c a growth mask's value   S cache slots

Growth: FLM-101B was trained as a small model first, which was then made larger, twice (grow.py).
What is new in the larger model is multiplied by a mask, whose value c rises from 0 to 1 (Masked
Structural Growth, "MSG", arXiv 2305.02869). The masks are in this file.

The paper trains on two signals (section 2.2): plain text, and a teacher's label of a sentence,
true or false. The label is one of two emoji, which the model predicts like any other token. So
data.py turns both signals into (tokens, targets), and one loss serves both.

The model knows nothing of processes, devices or optimizers. All its state is in parameters and
buffers.

FLM-101B's successor, Tele-FLM (arXiv 2404.16645), is the same decoder with other values of the
fields norm, activation, rotary and bias.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from console import did_you_mean, refuse

IGNORE = -100  # a target that is not supervised: F.cross_entropy's own default


# --------------------------------------------------------------------------------------------------
# 1. Configuration

MUST_BE = {  # {type of a field: what its value must be}
    "bool": "true or false",
    "int": "a whole number above 0",
    "float": "a finite number above 0",
    "Share": "a number from 0 to 1",
}
Share = float
CHOICES = {  # {field: its values}, FLM-101B's first
    "norm": ("layernorm", "rmsnorm"),
    "activation": ("gelu", "gelu_tanh", "swiglu"),
    "rotary": ("xpos", "rope"),
}


def fits(kind: str, value: object) -> bool:
    """Whether `value` is what MUST_BE[kind] says. kind: the annotation of a field as it is written
    there, a text such as "int". (To Python, True is a whole number too.)"""
    if kind == "bool" or isinstance(value, bool):
        return kind == type(value).__name__
    number = int if kind == "int" else (int, float)
    if not isinstance(value, number):
        return False
    return 0 <= value <= 1 if kind == "Share" else 0 < value <= sys.float_info.max


@dataclass(frozen=True)
class FLMConfig:
    """Every number that defines a model (FLM-101B, sections 2.1, 2.4 and 3).

    All fields are plain JSON values. `n_heads * head_dim` need not equal `d_model`: growth adds
    heads and keeps `head_dim`, on which the rotary frequencies depend. The last eight fields are
    explained in muP.py; a "proxy" is a narrow model on which hyper-parameters are searched. Raises
    ValueError that names every field out of range.
    """

    n_layers: int
    d_model: int
    n_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    max_seq_len: int  # the trained length; xPos measures positions from its middle
    tie_embeddings: bool = True  # inferred: the report on FLM-101B's successor "unties" them
    norm: str = "layernorm"
    activation: str = "gelu"
    rotary: str = "xpos"  # "rope" is xPos without its decay
    bias: bool = True  # False: no linear layer or LayerNorm has a bias
    norm_eps: float = 1e-5
    rotary_theta: float = 10000.0  # rotary base
    xpos_scale_base: float = 512.0  # positions for one factor zeta of decay (section 2)
    mup: bool = True  # False: every width ratio m is 1 (the standard parametrization)
    mup_base_width: int = 256  # the proxy's width, where every width ratio m is 1
    mup_ff_ratio: float = 4.0  # the proxy's F / C
    init_std: float = 0.016  # found by the paper's search on the proxy
    input_mult: float = 1.0
    output_mult: float = 2.0  # the paper's "softmax temperature 2.0"
    depth_alpha: Share = 0.0  # 1: CompleteP; 0: nothing is multiplied by a power of the depth
    base_layers: int = 6  # of the proxy: CompleteP leaves a model of this depth as it is

    def __post_init__(self):
        refuse(self.check(), "this model configuration does not fit together:")

    def check(self) -> list[str]:
        """Every violated constraint, with its numbers."""
        fields = [f for f in dataclasses.fields(self) if f.name not in CHOICES]
        bad = {f.name: f.type for f in fields if not fits(f.type, getattr(self, f.name))}
        problems = [f"{k} = {getattr(self, k)!r}: must be {MUST_BE[t]}" for k, t in bad.items()]
        for name, allowed in CHOICES.items():
            given = getattr(self, name)
            if given not in allowed:
                problems.append(f"{name} = {given!r}: must be one of {', '.join(allowed)}")
        if "head_dim" not in bad and self.head_dim % 2:
            problems.append(f"head_dim = {self.head_dim}: must be even, pairs are rotated")
        if bad.keys().isdisjoint(("max_seq_len", "xpos_scale_base")):
            limit = self.xpos_limit()
            if self.max_seq_len > limit:
                problems.append(
                    f"max_seq_len = {self.max_seq_len}: must be at most {limit}, where the scale "
                    f"of a key leaves fp32 at xpos_scale_base = {self.xpos_scale_base}"
                )
        return problems

    @property
    def xpos_origin(self) -> int:
        """The position whose scale is 1: a constant of the model. RoPE, without scales, has 0.

        It must not follow the current length: a key that was rotated and cached at one length
        must still be right at another."""
        return self.max_seq_len // 2 if self.rotary == "xpos" else 0

    def xpos_limit(self) -> int:
        """The largest number of positions for which every key's scale stays in fp32.

        xpos_tables (section 2) multiplies a key by at most (0.4 / 1.4)^(-n/512), where n counts
        from xpos_origin. At the limit that is 2^110. fp32 ends at 2^128, so the key itself may be
        as large as 2^16. RoPE has no limit."""
        if self.rotary == "rope":
            return sys.maxsize
        positions = self.xpos_scale_base * (110 * math.log(2)) / -math.log(0.4 / 1.4)
        return self.xpos_origin + int(min(positions, 2.0**53))

    @property
    def m_width(self) -> float:
        """m of what reads the residual stream: q, k, v, up, gate and the logits."""
        return self.d_model / self.mup_base_width if self.mup else 1.0

    @property
    def m_attn(self) -> float:
        """m of the attention's output projection, whose fan-in is H*D."""
        return self.n_heads * self.head_dim / self.mup_base_width if self.mup else 1.0

    @property
    def m_ff(self) -> float:
        """m of the down projection, whose fan-in is F."""
        return self.d_ff / (self.mup_ff_ratio * self.mup_base_width) if self.mup else 1.0

    @property
    def logit_mult(self) -> float:
        """What muP multiplies the logits by."""
        return self.output_mult / self.m_width

    @property
    def branch_mult(self) -> float:
        """What CompleteP multiplies every branch of a block by; 1 at depth_alpha = 0."""
        return (self.base_layers / self.n_layers) ** self.depth_alpha

    def replace(self, **changes) -> FLMConfig:
        """The same configuration with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict:
        """{field: value}, plain JSON values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict) -> FLMConfig:
        """The inverse of to_dict. Raises ValueError with every unknown and missing field."""
        if not isinstance(values, dict):
            raise ValueError(f"not a model configuration: must be {{field: value}}, is {values!r}")
        fields = dataclasses.fields(FLMConfig)
        needed = [f.name for f in fields if f.default is dataclasses.MISSING]
        unknown = sorted(set(values) - {f.name for f in fields})
        problems = [f"unknown field {name!r}" for name in unknown]
        problems += [f"missing field {name!r}" for name in needed if name not in values]
        refuse(problems, "not a model configuration:")
        return FLMConfig(**values)


def _flm(L: int, C: int, H: int, V: int = 100352, T: int = 2048, D: int = 128) -> FLMConfig:
    return FLMConfig(L, C, H, D, 4 * C, V, T)


def _tele(L: int, C: int, H: int, F: int, V: int = 80384, **changes) -> FLMConfig:
    variant = {"norm": "rmsnorm", "activation": "swiglu", "rotary": "rope", "bias": False}
    proxy = {"mup_base_width": 512, "mup_ff_ratio": 1344 / 512, "init_std": 4e-3}
    values = {"tie_embeddings": False, **variant, **proxy, "output_mult": 0.5}
    return _flm(L, C, H, V, T=4096).replace(d_ff=F, **values | changes)


PRESETS = {
    # For a laptop: bytes (256 and the end-of-text token, padded to a multiple of 32). Its learning
    # rate was searched at this width.
    "demo": _flm(6, 128, 4, V=288, T=256, D=32).replace(mup_base_width=128),
    # For the IQ evaluation's tasks (iqeval.py): small, with room for few-shot prompts in bytes.
    "iq-demo": _flm(4, 128, 4, V=288, T=768, D=32),
    # The paper: width 256, 2 heads, under 100M parameters, all else as in the 16B model (section 3)
    "flm-proxy": _flm(48, 256, 2),
    # OURS: as deep for its width as the 101B model, of 1.01 billion parameters.
    "flm-1b": _flm(16, 2048, 16),
    # The paper prints no shape for its 16B and 51B models. These are OURS: the sizes fit, heads of
    # 128 as in the 101B model, and from one to the next every dimension only grows.
    "flm-16b": _flm(48, 5120, 40),
    "flm-51b": _flm(62, 8192, 64),
    # The paper's: 80 layers, width 10240, 80 heads (section 2.4). Its vocabulary of 100,256 counts
    # cl100k_base's merges. The published weights have 100,352 rows: these hold the special tokens
    # too, and divide by 512.
    "flm-101b": _flm(80, 10240, 80),
    # Tele-FLM. Printed: all of proxy, 52B and 1T, where the logits' multiplier is 0.5, 1/32, 1/40.
    # The reports print no shape for 102B: it is OURS, and so is the model for a laptop.
    "tele-demo": _tele(
        *(6, 256, 4, 672, 288), max_seq_len=256, head_dim=64, mup_base_width=256, init_std=0.016
    ),
    "tele-flm-proxy": _tele(64, 512, 4, 1344),
    "tele-flm-52b": _tele(64, 8192, 64, 21824),
    "tele-flm-102b": _tele(80, 10240, 80, 27264),
    "tele-flm-1t": _tele(140, 20480, 160, 98304, 81920, output_mult=1.0),
}


def preset(name: str) -> FLMConfig:
    """The preset of that name. Raises ValueError with the nearest names."""
    if name not in PRESETS:
        hint = did_you_mean(name, PRESETS)
        raise ValueError(f"unknown preset {name!r}: {hint}there are {', '.join(PRESETS)}")
    return PRESETS[name]


def parse_fields(words: Iterable[str]) -> tuple[dict, list[str]]:
    """Words FIELD=VALUE of a command line -> ({field: value}, what is wrong with the others).

    >>> parse_fields(["n_layers=4", "tie_embeddings=False", "d_ff"])
    ({'n_layers': 4, 'tie_embeddings': False}, ['d_ff: not FIELD=VALUE'])
    """
    names = [field.name for field in dataclasses.fields(FLMConfig)]
    changes, problems = {}, []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            problems.append(f"{word}: not FIELD=VALUE")
        elif name not in names:
            problems.append(f"{word}: there is no field {name!r}; there are {', '.join(names)}")
        elif name in CHOICES:
            changes[name] = value.lower()
        else:
            try:
                changes[name] = json.loads(value.lower())
            except ValueError:
                problems.append(f"{word}: {value!r} is no number, true or false")
    return changes, problems


# --------------------------------------------------------------------------------------------------
# 2. xPos


def xpos_tables(
    config: FLMConfig, length: int, device=None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """xPos for positions 0 .. length-1 (arXiv 2212.10554): a complex tensor (length, 2, D/2).

    The 2 are queries and keys. Two channels of a head, a pair, are written as one complex number,
    and a position as a factor. For pair i = 0 .. D/2-1, with j the imaginary unit:

        query at position n    q * zeta_i^(+n/512) * exp(j n theta_i)    theta_i = 10000^(-2i/D)
        key   at position n    k * zeta_i^(-n/512) * exp(j n theta_i)    zeta_i = (2i/D + 0.4) / 1.4

    so a score depends on the distance n_query - n_key alone, and decays with it (fastest for pair
    0). n counts from config.xpos_origin. 10000 is config.rotary_theta, 512 is xpos_scale_base.
    RoPE is the same with every zeta_i = 1.
    `dtype` is that of the real parts, float32 or float64; the computation is in float64. Raises
    ValueError for a length past config.xpos_limit().
    """
    if length > config.xpos_limit():
        raise ValueError(
            f"a length of {length:,} is past {config.xpos_limit():,}, where xPos's key scale "
            "leaves fp32: use a shorter text"
        )
    D = config.head_dim
    two_i = torch.arange(0, D, 2, dtype=torch.float64)  # (D/2,)
    n = torch.arange(length, dtype=torch.float64)[:, None, None] - config.xpos_origin
    theta = config.rotary_theta ** (-two_i / D)  # (D/2,)
    zeta = (two_i / D + 0.4) / 1.4 if config.rotary == "xpos" else torch.ones_like(two_i)  # (D/2,)
    sign = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)  # (2, 1): query, key
    size = zeta ** (sign * n / config.xpos_scale_base)  # (length, 2, D/2)
    tables = torch.polar(size, (n * theta).expand(-1, 2, -1))
    return tables.to(device, torch.complex128 if dtype == torch.float64 else torch.complex64)


def rotate(x: Tensor, tables: Tensor) -> Tensor:
    """xPos on x (B, T, H, 2, D), the 2 being query and key; tables: at least (T, 2, D/2).

    Channels 2i and 2i+1 are the real and imaginary part of one number."""
    wide = x.float() if tables.dtype == torch.complex64 else x
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))  # (B, T, H, 2, D/2)
    turned = pairs * tables[: x.shape[1], None]  # (T, 1, 2, D/2): all heads alike
    return torch.view_as_real(turned).flatten(-2).type_as(x)  # (B, T, H, 2, D)


# --------------------------------------------------------------------------------------------------
# 3. The block
#
# Every `mask` is None, and costs nothing, unless a growth is under way. Then it holds 1 for what
# was there before, and c in [0, 1] for what is new (FLM.set_masks, section 4; with CompleteP an old
# block's mask goes from r to 1). Masks are buffers outside the state dict: a growth changes none of
# its keys.


class Norm(nn.LayerNorm):
    """LayerNorm (B, T, C) -> (B, T, C), in which a channel counts as much as its mask (MSG).

    kind: "rmsnorm" is a LayerNorm with a mean of 0 and no bias (arXiv 1910.07467).
    The mask weighs the mean and the variance, and multiplies the output. So nothing reads the
    new channels of the residual stream while c = 0."""

    def __init__(self, C: int, eps: float, kind: str = "layernorm", bias: bool = True):
        self.rms = kind == "rmsnorm"
        super().__init__(C, eps, bias=bias and not self.rms)
        self.register_buffer("mask", None, persistent=False)  # (C,)

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            if self.rms:
                return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
            return super().forward(x)
        c = self.mask.to(x.dtype)
        total = c.sum()  # how many channels count: C once every c is 1
        mean = 0 if self.rms else (x * c).sum(-1, keepdim=True) / total
        var = ((x - mean).square() * c).sum(-1, keepdim=True) / total
        y = (x - mean) * torch.rsqrt(var + self.eps) * self.weight
        return (y if self.bias is None else y + self.bias) * c


class Attention(nn.Module):
    """Causal self-attention with xPos (section 2.1).

    The rows of `qkv` are laid out (H, 3, D), head by head. So a head is one contiguous block:
    growth appends heads, and tensor parallelism cuts between them."""

    def __init__(self, config: FLMConfig):
        super().__init__()
        self.D = config.head_dim
        HD = config.n_heads * config.head_dim
        self.qkv = nn.Linear(config.d_model, 3 * HD, bias=config.bias)
        self.o = nn.Linear(HD, config.d_model, bias=config.bias)
        self.register_buffer("mask", None, persistent=False)  # (H,)

    def forward(
        self,
        x: Tensor,
        tables: Tensor,
        visible: Tensor | None = None,
        cache=None,
        layer: int = 0,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C).

        tables: xPos's factors for the positions of x, at least (T, 2, D/2).
        visible: bool (B or 1, 1, T, S), what each query may attend to; None: causal attention.
        cache: None in training; else where the keys and values of earlier tokens are, and where
        these ones go (sample.KVCache).
        layer: the number of this block in the whole model, under which the cache keeps them.
        """
        qkv = self.qkv(x).unflatten(-1, (-1, 3, self.D))  # (B, T, H, 3, D)
        qk, v = qkv.split((2, 1), dim=3)  # (B, T, H, 2, D), (B, T, H, 1, D)
        q, k = rotate(qk, tables).transpose(1, 2).unbind(3)  # (B, H, T, D) each
        v = v.squeeze(3).transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, H, S, D) each
        causal = visible is None and q.shape[2] > 1  # a single query sees all that is there
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal)
        y = y.transpose(1, 2)  # (B, T, H, D)
        if self.mask is not None:
            y = y * self.mask[:, None].to(y.dtype)  # (H, 1)
        return self.o(y.flatten(2))  # (B, T, H*D) -> (B, T, C)


class FeedForward(nn.Module):
    """down(GELU(up(x))): (B, T, C) -> (B, T, C), with F hidden units.

    SwiGLU is down(SiLU(gate(x)) * up(x)) (arXiv 2002.05202).
    The published configuration's "gelu_fast" is an approximation by tanh. The exact GELU here is
    2 to 5 times faster on a CPU; "gelu_tanh" is theirs."""

    def __init__(self, config: FLMConfig):
        super().__init__()
        C, hidden, bias = config.d_model, config.d_ff, config.bias
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.up = nn.Linear(C, hidden, bias=bias)
        self.gate = nn.Linear(C, hidden, bias=bias) if config.activation == "swiglu" else None
        self.down = nn.Linear(hidden, C, bias=bias)
        self.register_buffer("mask", None, persistent=False)  # (F,)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)  # (B, T, F)
        if self.gate is None:
            y = F.gelu(y, approximate=self.approximate)
        else:
            y = F.silu(self.gate(x)) * y
        if self.mask is not None:
            y = y * self.mask.to(y.dtype)
        return self.down(y)


class Block(nn.Module):
    """Pre-norm GPT block (section 2.1)."""

    def __init__(self, config: FLMConfig):
        super().__init__()
        norm = (config.d_model, config.norm_eps, config.norm, config.bias)
        self.attn_norm = Norm(*norm)
        self.attn = Attention(config)
        self.ff_norm = Norm(*norm)
        self.ff = FeedForward(config)
        self.branch_mult = config.branch_mult
        self.register_buffer("mask", None, persistent=False)  # (), see FLM.set_masks

    def forward(self, x: Tensor, *attention) -> Tensor:
        """x (B, T, C) -> (B, T, C). attention: what Attention.forward takes besides x."""
        x = self.add(x, self.attn(self.attn_norm(x), *attention))
        return self.add(x, self.ff(self.ff_norm(x)))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """The residual stream x (B, T, C) with the output y of a branch added to it."""
        y = y if self.mask is None else y * self.mask.to(y.dtype)
        return torch.add(x, y, alpha=self.branch_mult)


def visible_slots(
    start: int,
    T: int,
    pad: Tensor | None,
    block: int | None,
    device,
    documents: Tensor | None = None,
) -> Tensor | None:
    """Which of the S = start+T slots each of the last T queries may attend to. `start` slots of a
    cache are filled already; in training there are none, and S = T.

    pad (B,): slots at the left of each row that hold padding. block: length of a block of
    blockwise attention. documents (B, T): as in FLM.forward, without a cache. Returns bool (B or 1,
    1, T, S); or None where plain causal attention is asked for, which
    F.scaled_dot_product_attention does faster without a mask."""
    if block is None and pad is None and documents is None and (start == 0 or T == 1):
        return None
    if documents is not None:
        T = documents.shape[1]  # under sequence parallelism a rank may hold less of x
    q = torch.arange(start, start + T, device=device)[:, None]  # (T, 1)
    k = torch.arange(start + T, device=device)  # (S,)
    left = torch.zeros(1, dtype=torch.long, device=device) if pad is None else pad
    left = left[:, None, None]  # (B or 1, 1, 1): the first slot that is no padding
    visible = (k <= q) & (k >= left)  # (B or 1, T, S)
    if block is not None:
        visible &= (q - left) // block - (k - left) // block <= 1
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None, :])
    # A query in the padding sees itself. Else its softmax were empty, and its NaN would reach
    # other positions as 0 * NaN.
    return (visible | (k == q))[:, None]


# --------------------------------------------------------------------------------------------------
# 4. The model


class FLM(nn.Module):
    """The decoder: tokens (B, T) int64 -> logits (B, T, V).

    layers: the numbers of the blocks to build (by default all: 0 .. L-1).
    embed, head: whether the embedding, and the final norm with the head, are here.
    A pipeline stage (parallel.py) is this class with parts left out: hidden states (B, T, C) go in
    or come out.
    The constructor only allocates; muP.init_weights(model, seed) fills the parameters.
    """

    def __init__(
        self,
        config: FLMConfig,
        layers: Iterable[int] | None = None,
        embed: bool = True,
        head: bool = True,
    ):
        super().__init__()
        self.config = config
        V, C = config.vocab_size, config.d_model
        numbers = range(config.n_layers) if layers is None else layers
        self.embedding = nn.Embedding(V, C) if embed else None
        self.layers = nn.ModuleDict({str(i): Block(config) for i in numbers})
        self.norm = Norm(C, config.norm_eps, config.norm, config.bias) if head else None
        self.head = nn.Linear(C, V, bias=False) if head else None
        self.register_buffer("xpos", None, persistent=False)  # (max_seq_len, 2, D/2), complex
        self._derive()

    def _derive(self):
        """Set what follows from the rest: the tied head, and xPos's tables, in fp32 or float64."""
        tied = self.config.tie_embeddings
        if tied and self.embedding is not None and self.head is not None:
            self.head.weight = self.embedding.weight
        parameter = next(self.parameters())
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        self.xpos = xpos_tables(self.config, self.config.max_seq_len, parameter.device, dtype)

    def _apply(self, fn, recurse=True):
        """Derive again after .to(), .double(), .to_empty() and the like, which come through here.

        They would leave the tables empty or too narrow, or cast complex numbers to real ones;
        and .to_empty() unties the head."""
        self.xpos = None
        super()._apply(fn, recurse)
        self._derive()
        return self

    def forward(
        self,
        x: Tensor,
        targets: Tensor | None = None,
        *,
        cache=None,
        blockwise: bool = False,
        last_only: bool = False,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, T) -> logits (B, T, V), or (B, 1, V) with `last_only`.

        targets: (B, T); then the result is loss_sum(logits, targets) of section 5, a number, and
        all logits never exist at once.
        cache: a sample.KVCache; x continues what it holds.
        blockwise: blockwise causal attention (arXiv 2212.10554, section 3.2), for inference past
        the trained length: a query sees its own block of max_seq_len/2 positions and the block
        before. Training never uses it.
        documents: (B, T), the number of the document that each token belongs to: attention is cut
        between documents. Scores depend on distances alone, so each document is then computed as
        if it stood alone.
        Raises ValueError where x does not fit the cache, or its length leaves xPos's range.
        """
        T, config = x.shape[1], self.config
        start, pad = (0, None) if cache is None else (cache.length, cache.pad)
        block_length = max(1, config.max_seq_len // 2) if blockwise else None
        visible = visible_slots(start, T, pad, block_length, x.device, documents)
        tables = self._tables(start, T, cache)
        if self.embedding is not None:
            x = self.embedding(x) * config.input_mult  # (B, T) -> (B, T, C)
        for number, block in self.layers.items():
            x = block(x, tables, visible, cache, int(number))
        if cache is not None:
            cache.length += T
        if self.head is None:
            return x
        x = x[:, -1:] if last_only else x
        # muP's multiplier goes where it is cheap: on C numbers of a token, not on V.
        x = self.norm(x) * config.logit_mult
        if targets is None:
            return self.head(x)  # (B, T, C) -> (B, T, V)
        return self.head_loss(x, targets)

    def head_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """loss_sum(head(hidden), targets) of hidden (B, T, C). parallel.py puts another function in
        its place where the head is cut."""
        return head_loss(hidden, self.head.weight, targets)

    def _tables(self, start: int, T: int, cache) -> Tensor:
        """xPos's factors from position `start` on; attention takes the first T of them."""
        if cache is None and T <= self.config.max_seq_len:
            return self.xpos
        if cache is None:
            return xpos_tables(self.config, T, self.xpos.device, self.xpos.real.dtype)
        if start + T > cache.capacity:
            raise ValueError(f"{start + T} tokens do not fit a cache of {cache.capacity} slots")
        return cache.tables[start:]

    def set_masks(self, record: dict | None, c: float):
        """Put the growth masks in place: 1 for what the old model had, c for what is new (MSG).

        record: a growth's record, plain JSON: {"old": {"n_layers", "d_model", "n_heads", "d_ff"},
        "layer_map": for each layer the old layer that it continues, or None for a new one,
        "start" and "ramp" in samples}. At c = 1, or without a record, no mask is left: this is an
        ordinary model. Raises ValueError for a c outside [0, 1].

        A new block's mask is c. With CompleteP an old block has one too: branch_mult is smaller in
        the deeper model, by a factor r, and the mask goes from r down to 1 (ours).
        """
        if not 0 <= c <= 1:
            raise ValueError(f"a growth mask of {c}: must lie in [0, 1]")
        config = self.config
        old, layer_map = config.to_dict(), range(config.n_layers)  # as if nothing were new
        if record is not None and c < 1:
            old, layer_map = record["old"], record["layer_map"]
        names = ("d_model", "n_heads", "d_ff")
        channels, heads, hidden = (self._mask(old[k], getattr(config, k), c) for k in names)
        new_layer = self._mask(0, 1, c).squeeze()  # (): c as a tensor
        r = (config.n_layers / old["n_layers"]) ** config.depth_alpha
        old_layer = None if r == 1 else new_layer + (1 - c) * r
        for number, block in self.layers.items():
            block.attn_norm.mask = block.ff_norm.mask = channels
            block.attn.mask = heads
            block.ff.mask = hidden
            block.mask = new_layer if layer_map[int(number)] is None else old_layer
        if self.norm is not None:
            self.norm.mask = channels

    def _mask(self, old: int, size: int, c: float) -> Tensor | None:
        """(size,): 1 for the first `old` entries and c for the others; None where all are old."""
        if old == size:
            return None
        mask = torch.full((size,), c, device=self.xpos.device, dtype=self.xpos.real.dtype)
        mask[:old] = 1
        return mask


def growth_mask(record: dict | None, samples: int) -> float:
    """The mask's value c after `samples` training samples (MSG; a linear ramp is our choice).

    It is a function of the growth's record, never accumulated, so a resumed run has it exactly.

    >>> [growth_mask({"start": 100, "ramp": 50}, samples) for samples in (90, 100, 120, 150)]
    [0.0, 0.0, 0.4, 1.0]
    """
    if record is None:
        return 1.0
    elapsed, ramp = samples - record["start"], record["ramp"]
    return 1.0 if elapsed >= ramp else max(0, elapsed) / max(1, ramp)


def count_parameters(config: FLMConfig) -> int:
    """How many parameters a model has; a tied head counts once. No memory is allocated.

    >>> f"{count_parameters(PRESETS['flm-101b']):,}"
    '101,701,570,560'
    """
    with torch.device("meta"):
        return sum(p.numel() for p in FLM(config).parameters())


def forward_flops(config: FLMConfig, T: int) -> int:
    """Floating point operations of one forward pass over one token of a sequence of T.

    Two for each weight that multiplies the token, and attention's two products over all T
    positions. (That is the convention. A causal kernel does half of the latter.) Training takes
    three times as many: Narayanan et al., arXiv 2104.04473, have for d_ff = 4C and a batch
    72 B T L C^2 (1 + T/6C) + 6 B T V C.
    """
    HD = config.n_heads * config.head_dim
    ff = 3 if config.activation == "swiglu" else 2  # matrices
    layer = 2 * (config.d_model * 4 * HD + config.d_model * ff * config.d_ff) + 4 * T * HD
    return config.n_layers * layer + 2 * config.vocab_size * config.d_model


# --------------------------------------------------------------------------------------------------
# 5. The loss


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the supervised tokens (section 2.2).

    logits (B, T, V); targets (B, T), with IGNORE where a token is not supervised. It is a sum
    because the loss is divided once, by the number of supervised tokens in the whole batch. A row
    of the teacher signal supervises few tokens, so a mean over each part of a batch would weigh
    tokens differently."""
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(
        wide.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, words=None) -> Tensor:
    """loss_sum(hidden @ weight.T, targets) without all logits at once: hidden (B, T, C), weight
    (V, C), targets (B, T). words: see HeadLoss."""
    with_gradient = torch.is_grad_enabled()
    return HeadLoss.apply(hidden.flatten(0, 1), weight, targets.flatten(), with_gradient, words)


class HeadLoss(torch.autograd.Function):
    """The loss of the head, some rows (tokens) at a time.

    hidden (B*T, C), weight (V, C), targets (B*T,), with_gradient: whether a backward pass may
    follow. (forward cannot find out: PyTorch switches gradients off in it.)
    words: a parallel.Words where the weight has V/tp of the words, and other processes have the
    rest. Then all of them get the whole loss, and the part of hidden's gradient that comes from
    their own words.

    The logits of 3072 tokens over 50,304 words are 620 MB, and so is each step of their softmax
    and its gradient: memory takes more time than arithmetic. Here a piece of the logits lives
    only until its gradient, softmax - one-hot, is multiplied into those of hidden and weight. So
    forward computes the gradients too, and backward only multiplies them by d_total."""

    PIECE = 2**25  # logits held at a time

    @staticmethod
    def forward(ctx, hidden, weight, targets, with_gradient, words=None):
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        w = weight.to(dtype)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        if with_gradient:
            d_hidden = torch.empty_like(hidden)
            d_weight = torch.zeros_like(weight, dtype=total.dtype)
        rows = max(1, HeadLoss.PIECE // len(weight))
        with torch.autocast(device, enabled=False):
            for i in range(0, len(hidden), rows):
                x = hidden[i : i + rows].to(dtype)
                t = targets[i : i + rows, None]  # (rows, 1)
                supervised = t != IGNORE
                t = t.masked_fill(~supervised, 0)  # an id outside the vocabulary fails in gather
                # Whether the target is among these words: always, without `words`.
                here = supervised
                z = (x @ w.T).to(total.dtype)  # logits (rows, V); then, in place, what follows
                largest = z.amax(-1, keepdim=True)  # (rows, 1)
                if words is not None:
                    t, here = words.find(t)
                    here &= supervised
                    largest = words.max(largest)
                z -= largest
                chosen = z.gather(-1, t) * here  # (rows, 1)
                normalizer = z.exp_().sum(-1, keepdim=True)  # (rows, 1)
                if words is not None:
                    chosen, normalizer = words.sum(torch.stack((chosen, normalizer)))
                total += ((normalizer.log() - chosen) * supervised).sum()
                if with_gradient:
                    z *= supervised / normalizer  # softmax; 0 where not supervised
                    z.scatter_add_(-1, t, -here.to(z.dtype))  # - one-hot
                    z = z.to(dtype)
                    d_hidden[i : i + rows] = z @ w
                    d_weight += z.T @ x
        if with_gradient:
            ctx.save_for_backward(d_hidden, d_weight)
            ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, d_total):
        d_hidden, d_weight = ctx.saved_tensors
        scaled = torch.empty_like(d_weight, dtype=ctx.dtype)  # no second one in fp32
        torch.mul(d_weight, d_total, out=scaled)
        return d_hidden * d_total, scaled, None, None, None
