"""Checks of chapter 3: the masked LayerNorm, growing a tensor, growing AdamW's moments.

The model that is grown here is this repository's (flm.py), in float64. The oracle is the model
before its growth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import grow
from course import oracles
from course.checking import check, expect, expect_close, normal, seeds, vectors
from flm import FLM, FLMConfig

# --------------------------------------------------------------------------------------------------
# masked_norm: masked_norm(x, gain, bias, mask, eps) -> y

values = st.sampled_from([0.0, 0.25, 0.5, 1.0])
small = st.integers(1, 4)
epsilons = st.sampled_from([1e-5, 0.1])


def mask_of(old: int, new: int, c: float) -> torch.Tensor:
    """1 for `old` channels, c for `new` ones."""
    return torch.tensor([1.0] * old + [c] * new, dtype=torch.float64)


@check("masked_norm", old=small, new=small, c=values, eps=epsilons, seed=seeds)
def each_row_is_the_formula(f, old, new, c, eps, seed):
    """Every position's vector is normalised over its channels, each counted as its mask says."""
    x, (gain, bias) = normal(seed, 2, 3, old + new), normal(seed + 1, 2, old + new)
    mask = mask_of(old, new, c).roll(seed % (old + new))  # new channels anywhere
    rows = [oracles.masked_norm(row, gain, bias, mask, eps) for row in x.flatten(0, 1)]
    exact = torch.stack(rows).view(x.shape)
    expect_close("y", f.masked_norm(x, gain, bias, mask, eps), exact, 1e-12)


@check("masked_norm", old=st.integers(2, 4), new=small, row=vectors(8), noise=st.integers(0, 99))
def at_zero_the_new_channels_are_not_read(f, old, new, row, noise):
    """At c = 0 the old channels are a LayerNorm of the old channels alone, whatever stands in the
    new ones, and the new channels are 0."""
    x = torch.tensor([row[: old + new]], dtype=torch.float64)
    x[:, old:] += noise
    gain, bias = normal(3, 2, old + new)
    y = f.masked_norm(x, gain, bias, mask_of(old, new, 0.0), 1e-5)
    exact = F.layer_norm(x[:, :old], (old,), gain[:old], bias[:old], 1e-5)
    expect_close("y", y, torch.cat([exact, torch.zeros(1, new)], 1), 1e-12)


@check("masked_norm", C=st.integers(2, 8), seed=seeds)
def at_one_it_is_a_layer_norm(f, C, seed):
    """With every mask at 1 it is PyTorch's LayerNorm."""
    x, (gain, bias) = normal(seed, 2, C), normal(seed + 1, 2, C)
    exact = F.layer_norm(x, (C,), gain, bias, 1e-5)
    expect_close("y", f.masked_norm(x, gain, bias, mask_of(C, 0, 1.0), 1e-5), exact, 1e-12)


# --------------------------------------------------------------------------------------------------
# grow_tensor: grow_parameter(name, old, fresh, r) -> tensor

NAMES = (
    "embedding.weight",
    "layers.0.attn_norm.weight",
    "layers.0.attn.qkv.weight",
    "layers.0.attn.qkv.bias",
    "layers.0.attn.o.weight",
    "layers.0.ff_norm.bias",
    "layers.0.ff.up.weight",
    "layers.0.ff.down.weight",
    "norm.weight",
    "norm.bias",
)
added = st.fixed_dictionaries(
    {"d_model": st.integers(0, 3), "n_heads": st.integers(0, 2), "d_ff": st.integers(0, 3)}
).map(lambda more: more if any(more.values()) else more | {"d_model": 1})


def small_config(**sizes) -> FLMConfig:
    """A small model; its base width makes muP's m differ from 1."""
    plain = dict(n_layers=1, d_model=4, n_heads=1, head_dim=2, d_ff=3, vocab_size=5)
    return FLMConfig(**{**plain, "max_seq_len": 4, "mup_base_width": 8, **sizes})


def larger(old: FLMConfig, more: dict) -> FLMConfig:
    """The configuration with so much more of each dimension."""
    return old.replace(**{name: getattr(old, name) + n for name, n in more.items()})


@torch.no_grad()
def wild_model(config: FLMConfig, seed: int) -> FLM:
    """A model in float64 with random numbers in every parameter."""
    model = FLM(config).double()
    for i, parameter in enumerate(model.parameters()):
        parameter.copy_(0.5 * normal(seed + i, *parameter.shape))
    return model


@torch.no_grad()
def grown_model(f, model: FLM, new: FLMConfig, seed: int) -> FLM:
    """The model grown by the function grow_parameter, with its masks at c = 0."""
    grown, old = wild_model(new, seed), dict(model.named_parameters())
    r = new.d_model / model.config.d_model
    for name, p in grown.named_parameters():
        value = f.grow_parameter(name, old[name].detach().clone(), p.detach().clone(), r)
        expect(isinstance(value, torch.Tensor), f"{name} is {value!r}, expected a tensor")
        shapes = f"{tuple(value.shape)}, expected {tuple(p.shape)}"
        expect(value.shape == p.shape, f"{name} has the shape {shapes}")
        p.copy_(value)
    grown.set_masks(grow.growth_record(model.config, new), 0.0)
    return grown


tokens = torch.tensor([[1, 0, 3, 2], [4, 4, 0, 1]])


@check("grow_tensor", more=added, seed=seeds)
def the_grown_model_computes_the_same(f, more, seed):
    """A model whose every tensor was grown computes what it did before, while its masks are 0,
    whatever the new values are."""
    old = small_config()
    new, model = larger(old, more), wild_model(old, seed)
    grown = grown_model(f, model, new, seed + 99)
    with torch.no_grad():
        expect_close("the logits", grown(tokens), model(tokens), 1e-11)


@check("grow_tensor", name=st.sampled_from(NAMES), wider=st.sampled_from([0, 2, 4]), seed=seeds)
def new_entries_are_the_fresh_ones(f, name, wider, seed):
    """All that is new has the value that `fresh` has there."""
    old, new = small_config(), larger(small_config(), {"d_model": wider, "n_heads": 1, "d_ff": 1})
    r = new.d_model / old.d_model
    part = name.removeprefix("layers.0.")
    small_shape, shape = grow.shape(part, old), grow.shape(part, new)
    start, fresh = normal(seed, *small_shape), normal(seed + 1, *shape)
    found = f.grow_parameter(name, start.clone(), fresh.clone(), r)
    exact = fresh.clone()
    factor = r if part in ("norm.weight", "norm.bias") else 1.0
    exact[tuple(slice(n) for n in small_shape)] = factor * start
    expect_close(name, found, exact, 1e-14)


# --------------------------------------------------------------------------------------------------
# grow_moments: grow_moments(name, state, shape, r) -> state

STATES = ("exp_avg", "exp_avg_sq", "step")


def first_moments(model: FLM) -> dict[str, dict[str, torch.Tensor]]:
    """{parameter: AdamW's state after one step}: (1 - beta) times the gradient and its square."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.0)
    with torch.enable_grad():
        (model(tokens[:, :-1], tokens[:, 1:]) / 6).backward()
    optimizer.step()
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}


@check("grow_moments", more=added, seed=seeds)
def growing_and_taking_a_gradient_commute(f, more, seed):
    """Growing the moments of a model's first step gives the moments of the grown model's own first
    step, by automatic differentiation."""
    old = small_config()
    new = larger(old, more)
    model, r = wild_model(old, seed), new.d_model / old.d_model
    grown, _, _ = grow.grow(model, new, seed=seed % 1000)
    exact, before = first_moments(grown), first_moments(model)
    for name, state in before.items():
        given = {key: value.detach().clone() for key, value in state.items()}
        found = f.grow_moments(name, given, list(exact[name]["exp_avg"].shape), r)
        expect(isinstance(found, dict), f"{name}: the state is {found!r}, expected a dictionary")
        missing = set(STATES) ^ set(found)
        expect(not missing, f"{name}: the state's keys differ from {STATES} in {sorted(missing)}")
        for key in STATES:
            scale = max(1e-30, exact[name][key].abs().max().item())
            found_here = torch.as_tensor(found[key]) / scale
            what = f"{key} of {name}, in units of {scale:.3g},"
            expect_close(what, found_here, exact[name][key] / scale, 1e-8)


@check("grow_moments", steps=st.integers(1, 500), old=small, more=small)
def the_number_of_steps_is_kept(f, steps, old, more):
    """`step` is what it was, and new entries of both moments are 0: AdamW's bias correction goes on
    as if they had seen gradients of 0."""
    state = {"exp_avg": torch.full((old,), 2.0), "exp_avg_sq": torch.full((old,), 3.0)}
    state = {key: value.double() for key, value in state.items()}
    given = state | {"step": torch.tensor(float(steps))}
    found = f.grow_moments("layers.0.ff.up.bias", given, [old + more], 1.0)
    for key, exact in (("exp_avg", 2.0), ("exp_avg_sq", 3.0)):
        row = torch.tensor([exact] * old + [0.0] * more)
        expect_close(key, found[key], row)
    expect_close("step", found["step"], float(steps))


@check("grow_moments", shape=st.lists(small, min_size=2, max_size=2))
def a_fresh_layer_has_seen_nothing(f, shape):
    """Without an old state both moments are zeros of the new shape, and step is 0."""
    found = f.grow_moments("layers.1.ff.up.weight", None, shape, 1.5)
    for key in ("exp_avg", "exp_avg_sq"):
        expect_close(key, found[key], torch.zeros(shape))
    expect_close("step", found["step"], 0.0)
