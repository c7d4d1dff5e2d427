"""Tests of flm.py, in the module's own order. Exactness is checked in float64, where rounding is 1e-16."""
import contextlib
import io
import json
import math
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import flm
from data import decodable, get_tokenizer
from flm import (FLM, FLMConfig, HeadLoss, IGNORE, KVCache, PRESETS, choose, find_checkpoint, forward_flops, generate,
                 growth_mask, load_model, loss_sum, preset, read_info, rotate, write_checkpoint, xpos_tables)
from muP import init_weights

few = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**31 - 1)


# ---- helpers --------------------------------------------------------------------------------------------------------

def tiny(**changes) -> FLMConfig:
    """A small configuration in which no two sizes agree: H*D != C, F != 4C, and a base width other than the width."""
    return FLMConfig(**{**dict(n_layers=2, d_model=12, n_heads=3, head_dim=6, d_ff=20, vocab_size=23, max_seq_len=16,
                               mup_base_width=8), **changes})


@st.composite
def configs(draw, **fixed):
    """Random small configurations."""
    sizes = dict(n_layers=st.integers(1, 3), d_model=st.integers(4, 14), n_heads=st.integers(1, 3),
                 head_dim=st.sampled_from([2, 4, 6]), d_ff=st.integers(3, 14), vocab_size=st.integers(5, 30),
                 max_seq_len=st.integers(2, 16), tie_embeddings=st.booleans(), layer_norm_eps=st.sampled_from([1e-5, 0.1]),
                 xpos_theta=st.sampled_from([100.0, 10000.0]), xpos_scale_base=st.sampled_from([20.0, 512.0]),
                 mup=st.booleans(), mup_base_width=st.sampled_from([4, 8]), input_mult=st.sampled_from([1.0, 1.7]),
                 output_mult=st.sampled_from([1.0, 2.0]))
    return FLMConfig(**{name: fixed[name] if name in fixed else draw(values) for name, values in sizes.items()})


@torch.no_grad()
def wild(model: FLM, seed: int = 0) -> FLM:
    """Random numbers in every parameter, gains and biases too: initial values would hide a bias that is left out."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.5, generator=generator)
    return model


def build(config: FLMConfig, seed: int = 0, **parts) -> FLM:
    """A float64 model with wild weights."""
    return wild(FLM(config, **parts).double(), seed)


def some_tokens(config: FLMConfig, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def some_targets(config: FLMConfig, *shape: int, seed: int = 0) -> torch.Tensor:
    """Targets of which about a third are not supervised."""
    targets = some_tokens(config, *shape, seed=seed + 1)
    targets[torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.33] = IGNORE
    return targets


def error(ours, exact) -> float:
    """The largest difference, relative to the largest number."""
    ours, exact = torch.as_tensor(ours).detach(), torch.as_tensor(exact).detach()
    assert ours.shape == exact.shape
    return ((ours - exact).abs().max() / exact.abs().max()).item()


def slow_score(q, k, distance: int, config: FLMConfig) -> float:
    """xPos's score of a query and a key (D,), `distance` = position of the query - position of the key, as the paper
    has it: the sum over pairs of Re[q_i conj(k_i) exp(j distance theta_i)] zeta_i ** (distance / 512)."""
    D, total = config.head_dim, 0.0
    for i in range(D // 2):
        theta, zeta = config.xpos_theta ** (-2 * i / D), (2 * i / D + 0.4) / 1.4
        product = complex(q[2 * i], q[2 * i + 1]) * complex(k[2 * i], -k[2 * i + 1])
        angle = complex(math.cos(distance * theta), math.sin(distance * theta))
        total += (product * angle).real * zeta ** (distance / config.xpos_scale_base)
    return total


def slow_forward(model: FLM, tokens, sees=lambda n, m: m <= n, live=None) -> np.ndarray:
    """The whole model on one sequence (T,) -> logits (T, V), by the formulas, in numpy and loops.

    sees(n, m): whether position n attends to position m. live: the growth masks of the channels (C,), heads (H,),
    hidden units (F,) and layers (L,)."""
    c, w = model.config, {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    live = live or {"channels": np.ones(c.d_model), "heads": np.ones(c.n_heads), "hidden": np.ones(c.d_ff),
                    "layers": np.ones(c.n_layers)}
    T, H, D = len(tokens), c.n_heads, c.head_dim

    def norm(x, name):
        a = live["channels"]
        mean = (x * a).sum(1, keepdims=True) / a.sum()
        variance = ((x - mean) ** 2 * a).sum(1, keepdims=True) / a.sum()
        return ((x - mean) / np.sqrt(variance + c.layer_norm_eps) * w[name + ".weight"] + w[name + ".bias"]) * a

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def attention(x, name):
        rows, heads = linear(x, name + ".qkv"), []
        for h in range(H):
            q, k, v = (rows[:, (3 * h + part) * D:(3 * h + part + 1) * D] for part in range(3))
            out = np.zeros((T, D))
            for n in range(T):
                seen = [m for m in range(T) if sees(n, m)]
                weights = np.exp([slow_score(q[n], k[m], n - m, c) / math.sqrt(D) for m in seen])
                out[n] = sum(weight * v[m] for weight, m in zip(weights / weights.sum(), seen))
            heads.append(out * live["heads"][h])
        return linear(np.concatenate(heads, axis=1), name + ".o")

    def feed_forward(x, name):
        y = linear(x, name + ".up")
        return linear(y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) * live["hidden"], name + ".down")

    x = w["embedding.weight"][np.asarray(tokens)] * c.input_mult
    for i in range(c.n_layers):
        x = x + live["layers"][i] * attention(norm(x, f"layers.{i}.attn_norm"), f"layers.{i}.attn")
        x = x + live["layers"][i] * feed_forward(norm(x, f"layers.{i}.ff_norm"), f"layers.{i}.ff")
    m = c.d_model / c.mup_base_width if c.mup else 1
    return norm(x, "norm") @ w["embedding.weight" if c.tie_embeddings else "head.weight"].T * c.output_mult / m


# ---- 1. configuration -----------------------------------------------------------------------------------------------

def count(config: FLMConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in FLM(config).parameters())


def test_presets_have_the_papers_sizes():
    """flm-101b has the published shape and exactly 80 (12 C^2 + 13 C) + 2 C + V C parameters; the proxy has the paper's
    width, heads and upper bound; our own 16B and 51B shapes are about as large as their names say."""
    big, C, V = PRESETS["flm-101b"], 10240, 100352
    assert (big.n_layers, big.d_model, big.n_heads, big.head_dim, big.d_ff) == (80, 10240, 80, 128, 40960)
    assert (big.vocab_size, big.max_seq_len) == (100352, 2048)
    assert count(big) == 80 * (12 * C * C + 13 * C) + 2 * C + V * C == 101_701_570_560
    proxy = PRESETS["flm-proxy"]
    assert (proxy.d_model, proxy.n_heads, proxy.head_dim) == (256, 2, 128) and count(proxy) < 100e6
    assert abs(count(PRESETS["flm-16b"]) / 1e9 - 15.6) < 0.1
    assert abs(count(PRESETS["flm-51b"]) / 1e9 - 50.8) < 0.1


def test_presets_only_grow():
    """From 16B to 51B to 101B no dimension shrinks, and heads keep their size: each can be grown into the next."""
    shapes = [(c.n_layers, c.d_model, c.n_heads, c.d_ff) for c in map(preset, ("flm-16b", "flm-51b", "flm-101b"))]
    assert all(a <= b for small, large in zip(shapes, shapes[1:]) for a, b in zip(small, large))
    assert {c.head_dim for name, c in PRESETS.items() if name not in ("demo", "iq-demo")} == {128}


def test_unknown_preset_names_the_nearest():
    """A mistyped preset is a ValueError that quotes it, suggests the nearest and lists them all."""
    with pytest.raises(ValueError, match=r"'flm-101'.*did you mean flm-101b") as caught:
        preset("flm-101")
    assert all(name in str(caught.value) for name in PRESETS)
    with pytest.raises(ValueError, match="unknown preset ''"):
        preset("")


@few
@given(configs())
def test_config_survives_json(config):
    """to_dict gives plain JSON values and from_dict takes them back to an equal configuration."""
    assert FLMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_from_dict_names_every_unknown_and_missing_field():
    """A dictionary with fields too many and too few is refused once, with all of them."""
    values = {**tiny().to_dict(), "n_experts": 8, "dropout": 0.1}
    del values["d_ff"], values["vocab_size"]
    with pytest.raises(ValueError) as caught:
        FLMConfig.from_dict(values)
    assert all(name in str(caught.value) for name in ("'n_experts'", "'dropout'", "'d_ff'", "'vocab_size'"))
    assert "'d_model'" not in str(caught.value)


BAD = {int: [0, -3, 2.0, True, "12", None], float: [0, -1.5, math.nan, math.inf, True, "1", None], bool: [0, 1, "yes", None]}


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_config_lists_every_violation(data):
    """Whatever fields are broken, the one error has a line for each of them, with its value, and for no other."""
    sound = tiny().to_dict()
    names = data.draw(st.lists(st.sampled_from(sorted(sound)), min_size=1, unique=True))
    broken = {name: data.draw(st.sampled_from(BAD[type(sound[name])])) for name in names}
    with pytest.raises(ValueError) as caught:
        FLMConfig(**{**sound, **broken})
    lines = str(caught.value).splitlines()[1:]
    assert sorted(line.split(":")[0].strip() for line in lines) == sorted(f"{k} = {v!r}" for k, v in broken.items())


def test_config_refuses_numbers_that_do_not_fit_together():
    """An odd head_dim and a length past xPos's range are named, together with any other violation."""
    with pytest.raises(ValueError) as caught:
        tiny(head_dim=7, max_seq_len=100_000, n_heads=0)
    for text in ("head_dim = 7: must be even", "max_seq_len = 100000: must be at most", "n_heads = 0"):
        assert text in str(caught.value)


@pytest.mark.parametrize("broken", [{"xpos_scale_base": 1e308}, {"init_std": 10**400}])
def test_config_survives_huge_numbers(broken):
    """A number too large to compute with is either accepted or a ValueError, never another exception."""
    with contextlib.suppress(ValueError):
        tiny(**broken)


@few
@given(configs())
def test_width_ratios(config):
    """m is C/base, H*D/base and F/(4 base); without muP all are 1; the logits are multiplied by output_mult/m."""
    base = config.mup_base_width
    on, off = config.replace(mup=True), config.replace(mup=False)
    assert on.m_width == config.d_model / base and on.m_attn == config.n_heads * config.head_dim / base
    assert on.m_ff == config.d_ff / (4 * base) and on.logit_mult == config.output_mult / (config.d_model / base)
    assert (off.m_width, off.m_attn, off.m_ff, off.logit_mult) == (1, 1, 1, config.output_mult)


# ---- 2. xPos --------------------------------------------------------------------------------------------------------

def our_score(config, q, k, n, m, length) -> float:
    """The score of query q at position n and key k at position m, with tables made for `length` positions."""
    x = torch.zeros(1, length, 1, 2, config.head_dim, dtype=torch.float64)
    x[0, n, 0, 0], x[0, m, 0, 1] = q, k
    y = rotate(x, xpos_tables(config, length, dtype=torch.float64))
    return (y[0, n, 0, 0] @ y[0, m, 0, 1]).item()


def query_and_key(D, seed):
    return torch.randn(2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).unbind(0)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from([2, 6, 64, 128]), st.integers(0, 3000), st.integers(0, 3000), st.integers(1, 4096), seeds)
def test_xpos_scores_are_the_papers(D, n, m, max_seq_len, seed):
    """A score is the paper's, for positions in any order and a model of any trained length."""
    config, (q, k) = tiny(head_dim=D, max_seq_len=max_seq_len), query_and_key(D, seed)
    exact = slow_score(q.tolist(), k.tolist(), n - m, config)
    size = (q.norm() * k.norm()).item() * max(1.0, (0.4 / 1.4) ** ((n - m) / 512))
    # Angles reach 3000 and are rounded to 3000 * 1e-16: 1e-11 leaves a factor of 30.
    assert abs(our_score(config, q, k, n, m, max(n, m) + 1) - exact) < 1e-11 * size


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 1500), st.integers(0, 700), seeds)
def test_xpos_scores_depend_on_distance_alone(m, distance, shift, extra, seed):
    """Moving query and key by the same offset, in tables of another length, leaves their score as it was."""
    config, (q, k) = tiny(head_dim=16), query_and_key(16, seed)
    here = our_score(config, q, k, m + distance, m, m + distance + 1)
    there = our_score(config, q, k, m + distance + shift, m + shift, m + distance + shift + 1 + extra)
    assert abs(here - there) < 1e-11 * (q.norm() * k.norm()).item()             # rounded angles, as above


@few
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 512))
def test_xpos_positions_do_not_move_with_the_length(a, b, max_seq_len):
    """Tables of any two lengths agree bit for bit where both reach, so a key that was rotated and cached at one length
    is right at another. (Public implementations centre positions on the current length: there they differ.)"""
    config, common = tiny(max_seq_len=max_seq_len), min(a, b)
    assert torch.equal(xpos_tables(config, a)[:common], xpos_tables(config, b)[:common])


def test_xpos_scale_is_one_at_the_middle_of_the_trained_length():
    """At position max_seq_len // 2 both scales are 1: the factors there only rotate."""
    tables = xpos_tables(tiny(max_seq_len=40), 40, dtype=torch.float64)
    assert error(tables[20].abs(), torch.ones(2, 3, dtype=torch.float64)) < 1e-15


def test_xpos_scores_decay():
    """Every pair's largest possible score falls by zeta_i per 512 positions. The largest score over the directions of the key
    is the length of (score against (1, 0), score against (0, 1))."""
    config = tiny(head_dim=8)
    for i in range(4):
        q, along, across = torch.zeros(3, 8, dtype=torch.float64)
        q[2 * i] = along[2 * i] = across[2 * i + 1] = 1
        sizes = [math.hypot(our_score(config, q, along, d, 0, d + 1), our_score(config, q, across, d, 0, d + 1))
                 for d in (0, 1, 100, 512, 1024)]
        zeta = (i / 4 + 0.4) / 1.4
        assert sizes == pytest.approx([zeta ** (d / 512) for d in (0, 1, 100, 512, 1024)], rel=1e-12)
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5


@settings(deadline=None, max_examples=10)
@given(st.sampled_from([0.5, 3.0, 100.0, 512.0]), st.integers(1, 60))
def test_xpos_limit_is_where_fp32_ends(scale_base, max_seq_len):
    """At the limit every factor is a normal fp32 number and leaves room for keys up to 2**16; one more position is refused;
    and the limit is no earlier than it must: 2% further from the origin that room is gone."""
    config = tiny(xpos_scale_base=scale_base, max_seq_len=max_seq_len, head_dim=2)
    limit = config.xpos_limit()
    size = xpos_tables(config, limit).to(torch.complex128).abs()
    # 1e-6: the factors are fp32 numbers, rounded to 6e-8
    assert (size * 2.0 ** 16 < torch.finfo(torch.float32).max).all() and size.min() >= torch.finfo(torch.float32).tiny * (1 - 1e-6)
    with pytest.raises(ValueError, match=f"{limit + 1:,} is past {limit:,}"):
        xpos_tables(config, limit + 1)
    past = 1.02 * (limit + 1 - max_seq_len // 2)
    assert 3.5 ** (past / scale_base) > 2.0 ** 110


def test_lengths_past_xpos_limit_are_refused():
    """Neither a sequence nor a cache may pass the limit: a ValueError that gives it, not infinities."""
    config = tiny(xpos_scale_base=0.5)
    model, limit = build(config), config.xpos_limit()
    assert model(some_tokens(config, 1, limit)).isfinite().all()
    with pytest.raises(ValueError, match=str(limit)):
        model(some_tokens(config, 1, limit + 1))
    with pytest.raises(ValueError, match=str(limit)):
        KVCache(model, limit + 1)


CASTS = {"to bfloat16": lambda m: m.to(torch.bfloat16), "bfloat16": lambda m: m.bfloat16(), "double": lambda m: m.double(),
         "to float64": lambda m: m.to(torch.float64), "and back": lambda m: m.double().float(),
         "to_empty": lambda m: m.to("meta").to_empty(device="cpu"), "to cpu": lambda m: m.to("cpu")}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_tables_and_tie_survive_casts(cast):
    """After a cast or to_empty the tables are those of the parameters' dtype, fp32 or wider, and never the narrow ones
    converted; a tied head is still the embedding; and the user sees no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = cast(FLM(tiny()))
    wide = torch.float64 if model.norm.weight.dtype == torch.float64 else torch.float32
    assert torch.equal(model.xpos, xpos_tables(tiny(), 16, dtype=wide))
    assert model.xpos.real.dtype == wide
    assert model.head.weight is model.embedding.weight


def test_state_dict_is_parameters_only():
    """Neither tables nor masks are in the state dict: its keys are the parameters' names (and the tied head's)."""
    model = build(tiny())
    model.set_masks({"old": {"n_layers": 1, "d_model": 4, "n_heads": 1, "d_ff": 4}, "layer_map": [0, None]}, 0.5)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters(remove_duplicate=False)}


# ---- 3 and 4. the model ---------------------------------------------------------------------------------------------

@few
@given(configs(), st.integers(1, 10), seeds)
def test_forward_is_the_formula(config, T, seed):
    """Logits equal a slow reference in numpy loops: every bias, gain and multiplier, H*D != C, tied and untied."""
    model, tokens = build(config, seed), some_tokens(config, 2, T, seed=seed)
    exact = np.stack([slow_forward(model, row) for row in tokens])
    assert error(model(tokens), exact) < 1e-10              # rounding is 1e-15; a softmax or a norm may amplify it


@few
@given(configs(max_seq_len=8), st.integers(1, 20), seeds)
def test_blockwise_attention_is_the_papers(config, T, seed):
    """With `blockwise` a query sees its own block of max_seq_len/2 positions, up to itself, and the one before."""
    model, tokens = build(config, seed), some_tokens(config, T, seed=seed)
    exact = slow_forward(model, tokens, sees=lambda n, m: m <= n and n // 4 - m // 4 <= 1)
    assert error(model(tokens[None], blockwise=True)[0], exact) < 1e-10


@few
@given(configs(), st.integers(2, 20), st.booleans(), st.data())
def test_causality(config, T, blockwise, data):
    """Changing a token changes no earlier logit, not even in the last bit, and does change its own position's."""
    model, at = build(config), data.draw(st.integers(1, T - 1))
    before = some_tokens(config, 1, T)
    after = before.clone()
    after[0, at] = (after[0, at] + 1) % config.vocab_size
    a, b = model(before, blockwise=blockwise), model(after, blockwise=blockwise)
    assert torch.equal(a[:, :at], b[:, :at])
    assert not torch.equal(a[:, at], b[:, at])


@few
@given(configs(n_layers=3), st.integers(0, 3), st.integers(0, 3), seeds)
def test_stages_compose_to_the_whole(config, a, b, seed):
    """A model cut into three pipeline stages, of which some may have no layer, computes what the whole computes, bit for bit;
    the stages' state dicts together have the whole's keys."""
    a, b = sorted((a, b))
    whole, tokens = build(config, seed), some_tokens(config, 2, 6)
    stages = [FLM(config, layers=range(a), head=False), FLM(config, layers=range(b, 3), embed=False)]
    if a < b:
        stages.insert(1, FLM(config, layers=range(a, b), embed=False, head=False))
    x, keys = tokens, set()
    for stage in stages:
        own = stage.double().state_dict()
        stage.load_state_dict({name: whole.state_dict()[name] for name in own})
        x, keys = stage(x), keys | set(own)
    assert torch.equal(x, whole(tokens)) and keys == set(whole.state_dict())


def test_last_only_gives_the_last_position():
    """`last_only` returns logits (B, 1, V), those of the last position."""
    model, tokens = build(tiny()), some_tokens(tiny(), 2, 7)
    assert error(model(tokens, last_only=True), model(tokens)[:, -1:]) < 1e-14          # another shape of product rounds otherwise


# ---- the loss and its gradient

@few
@given(configs(), seeds)
def test_loss_of_a_batch_is_the_sum_over_its_tokens(config, seed):
    """loss_sum, and the model called with targets, equal -log p(target) added up token by token in plain Python."""
    model, tokens, targets = build(config, seed), some_tokens(config, 3, 5), some_targets(config, 3, 5, seed=seed)
    logits, exact = model(tokens), 0.0
    for row, row_targets in zip(logits.tolist(), targets.tolist()):
        for z, target in zip(row, row_targets):
            if target != IGNORE:
                exact += math.log(sum(math.exp(value - z[target]) for value in z))
    scale = max(1.0, logits.abs().max().item()) * 15        # a sum of 15 numbers of at most this size
    assert abs(loss_sum(logits, targets).item() - exact) < 1e-13 * scale
    assert abs(model(tokens, targets).item() - exact) < 1e-13 * scale


@few
@given(st.integers(1, 12), st.integers(1, 6), st.integers(2, 9), st.sampled_from([1, 9, 31, 2**25]), seeds)
def test_head_loss_equals_loss_sum(N, C, V, piece, seed):
    """HeadLoss has loss_sum's value and gradients, however many rows it takes at a time, with targets left out."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, C, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(V, C, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = some_targets(tiny(vocab_size=V), N, seed=seed)
    exact = loss_sum(hidden @ weight.T, targets)
    with mock.patch.object(HeadLoss, "PIECE", piece):
        ours = HeadLoss.apply(hidden, weight, targets, True)
    assert ours.item() == pytest.approx(exact.item(), rel=1e-12, abs=1e-12)
    for a, b in zip(torch.autograd.grad(0.3 * ours, (hidden, weight)), torch.autograd.grad(0.3 * exact, (hidden, weight))):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_head_loss_of_large_logits():
    """Logits of a thousand overflow no exponential: the loss is finite and right."""
    hidden, weight = torch.tensor([[1000.0], [-1000.0]]), torch.tensor([[1.0], [0.0], [-1.0]])
    assert HeadLoss.apply(hidden, weight, torch.tensor([0, 1]), False).item() == 1000.0


def test_nothing_supervised():
    """With every target left out the loss is 0 and every gradient exactly 0, not NaN."""
    model = build(tiny())
    loss = model(some_tokens(tiny(), 2, 5), torch.full((2, 5), IGNORE))
    loss.backward()
    assert loss.item() == 0 and all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("target", [-1, 23])
def test_a_target_outside_the_vocabulary_is_refused(target):
    """A target that is neither an id nor IGNORE is an error, as in F.cross_entropy, never silently another token."""
    model, targets = build(tiny()), torch.tensor([[1, target, 2]])
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        model(some_tokens(tiny(), 1, 3), targets)


def test_loss_without_gradient():
    """Under no_grad the loss is the same number and carries no graph."""
    model, tokens, targets = build(tiny()), some_tokens(tiny(), 2, 5), some_targets(tiny(), 2, 5)
    with_graph = model(tokens, targets)
    with torch.no_grad():
        without = model(tokens, targets)
    assert without.item() == with_graph.item() and with_graph.requires_grad and not without.requires_grad


@pytest.mark.parametrize("piece", [50, 2**25])
def test_head_loss_under_autocast(piece):
    """Under bf16 autocast the loss and its gradients are those of loss_sum under the same autocast."""
    config = tiny()
    model, tokens, targets = init_weights(FLM(config), 0), some_tokens(config, 4, 12), some_targets(config, 4, 12)
    with torch.autocast("cpu", torch.bfloat16), mock.patch.object(HeadLoss, "PIECE", piece):
        ours, exact = model(tokens, targets), loss_sum(model(tokens), targets)
    assert ours.dtype == torch.float32
    # The same bf16 products in another order: the value agrees to fp32's rounding over 48 terms. A gradient passes through bf16
    # once per layer, each time rounded by 2^-9, and sums of many such roundings stay below 2^-6 of the largest entry.
    assert ours.item() == pytest.approx(exact.item(), rel=1e-5)
    grads = zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in (ours, exact)))
    for (name, _), (a, b) in zip(model.named_parameters(), grads):
        assert a.dtype == torch.float32 and error(a, b) < 2**-6, name


@settings(deadline=None, max_examples=6)
@given(configs(), st.booleans(), seeds)
def test_gradients_are_the_derivatives(config, growing, seed):
    """For every parameter, tied or not, with and without growth masks: the loss's slope along a random direction, by
    central differences, is the gradient's component along it."""
    model, tokens, targets = build(config, seed), some_tokens(config, 2, 5), some_targets(config, 2, 5, seed=seed)
    targets[0, 0] = 1                                       # something is supervised
    if growing:
        old = {"n_layers": 1, "d_model": 3, "n_heads": 1, "d_ff": 2}
        model.set_masks({"old": old, "layer_map": [0] + [None] * (config.n_layers - 1)}, 0.3)
    model(tokens, targets).backward()
    generator, step = torch.Generator().manual_seed(seed), 1e-5
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        losses = []
        with torch.no_grad():
            for by in (step, -2 * step, step):
                parameter += by * direction
                losses.append(model(tokens, targets).item())
        slope, exact = (losses[0] - losses[1]) / (2 * step), (parameter.grad * direction).sum().item()
        # Central differences err by step^2 = 1e-10 times the third derivative, and by rounding / step = 1e-10.
        assert abs(slope - exact) < 1e-5 * (1 + parameter.grad.norm().item()), name


# ---- floating point operations

@few
@given(configs(), st.integers(1, 20))
def test_forward_flops_counts_what_pytorch_counts(config, T):
    """forward_flops is PyTorch's own count of the matrix products, per token. (With SDPA's plain kernel, which computes attention
    over all T positions: the convention's count.)"""
    model, tokens = FLM(config), some_tokens(config, 2, T)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens)
    assert counter.get_total_flops() == 2 * T * forward_flops(config, T)


@few
@given(st.integers(1, 100), st.integers(1, 100), st.sampled_from([64, 128]), st.integers(1, 10**5), st.integers(1, 4096))
def test_forward_flops_is_narayanans(L, H, D, V, T):
    """Where d_ff = 4C and H*D = C, training takes 72 T L C^2 (1 + T/6C) + 6 T V C operations per sequence: exactly."""
    C = H * D
    config = FLMConfig(L, C, H, D, 4 * C, V, T)
    assert 3 * T * forward_flops(config, T) == 72 * T * L * C * C + 12 * T * T * L * C + 6 * T * V * C


# ---- growth masks

GROWTH = {"old": {"n_layers": 1, "d_model": 7, "n_heads": 2, "d_ff": 11}, "layer_map": [0, None], "start": 0, "ramp": 10}


def masks(model) -> list:
    return [b for name, b in model.named_buffers(remove_duplicate=False) if name.endswith("mask")]


@pytest.mark.parametrize("growth, c", [(GROWTH, 1), (GROWTH, 1.0), (None, 0.5), (None, 1.0)])
def test_no_mask_is_left_at_the_end_of_a_growth(growth, c):
    """At c = 1, or without a growth, no mask is left, and the logits are bit for bit those of a model that never had any."""
    model, tokens = build(tiny()), some_tokens(tiny(), 1, 6)
    before, keys = model(tokens), list(model.state_dict())
    model.set_masks(GROWTH, 0.4)
    assert len(masks(model)) == 2 * 4 + 1 + 1               # two norms, heads, hidden units; the new layer; the last norm
    assert not torch.equal(model(tokens), before) and list(model.state_dict()) == keys
    model.set_masks(growth, c)
    assert masks(model) == [] and torch.equal(model(tokens), before) and list(model.state_dict()) == keys


@pytest.mark.parametrize("c", [-0.01, 1.01, math.nan])
def test_a_mask_outside_its_range_is_refused(c):
    """c must lie in [0, 1]: anything else is a ValueError that quotes it."""
    with pytest.raises(ValueError, match=str(c)):
        build(tiny()).set_masks(GROWTH, c)


@few
@given(configs(), st.floats(0, 0.99), seeds, st.data())
def test_masked_forward_is_the_formula(config, c, seed, data):
    """With masks at any c the logits equal the slow reference's, where channels count c in every LayerNorm's mean and
    variance, and new heads, hidden units and layers contribute c times what they compute."""
    size = {k: data.draw(st.integers(1, getattr(config, k))) for k in ("d_model", "n_heads", "d_ff")}
    layer_map = [data.draw(st.sampled_from([0, None])) for _ in range(config.n_layers)]
    model, tokens = build(config, seed), some_tokens(config, 6, seed=seed)
    model.set_masks({"old": {"n_layers": layer_map.count(0), **size}, "layer_map": layer_map}, c)

    def mask(old, new):
        return np.where(np.arange(new) < old, 1.0, c)

    live = {"channels": mask(size["d_model"], config.d_model), "heads": mask(size["n_heads"], config.n_heads),
            "hidden": mask(size["d_ff"], config.d_ff), "layers": np.array([c if i is None else 1.0 for i in layer_map])}
    assert error(model(tokens[None])[0], slow_forward(model, tokens, live=live)) < 1e-10


@few
@given(configs(mup=False), st.integers(0, 3), st.integers(0, 2), st.integers(0, 9), st.integers(0, 9), seeds, st.data())
def test_growth_at_zero_preserves_the_function(old, layers, heads, channels, hidden, seed, data):
    """A model widened by hand in all four dimensions (the old block copied, wild numbers elsewhere) has at c = 0 the logits it
    had before, also through a cache."""
    new = old.replace(n_layers=old.n_layers + layers, n_heads=old.n_heads + heads, d_model=old.d_model + channels,
                      d_ff=old.d_ff + hidden)
    layer_map = data.draw(st.permutations([True] * old.n_layers + [False] * layers))    # where the old layers go ...
    layer_map = [sum(layer_map[:i]) if is_old else None for i, is_old in enumerate(layer_map)]      # ... in their order
    small, large = build(old, seed), build(new, seed + 1)
    values = small.state_dict()
    with torch.no_grad():
        for name, parameter in large.named_parameters():
            parts = name.split(".")
            if parts[0] == "layers":
                parts[1] = str(layer_map[int(parts[1])])
            value = values.get(".".join(parts))             # None in a new layer
            if value is not None:
                parameter[tuple(slice(n) for n in value.shape)] = value     # qkv's rows are (H, 3, D): the old heads come first
    sizes = {k: getattr(old, k) for k in ("n_layers", "d_model", "n_heads", "d_ff")}
    large.set_masks({"old": sizes, "layer_map": layer_map}, 0.0)
    tokens, cache = some_tokens(old, 2, 7), KVCache(large, 7)
    assert error(large(tokens), small(tokens)) < 1e-12      # rounding alone: 1e-15, amplified a little by softmax and norms
    cached = torch.cat([large(tokens[:, :3], cache=cache), large(tokens[:, 3:], cache=cache)], 1)
    assert error(cached, small(tokens)) < 1e-12


@few
@given(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(0, 2 * 10**6))
def test_growth_mask_is_a_ramp_in_samples(start, ramp, samples):
    """c is 0 up to the start, then rises in a straight line to 1 after `ramp` samples, and stays."""
    c = growth_mask({"start": start, "ramp": ramp}, samples)
    assert c == pytest.approx(min(1, max(0, (samples - start) / ramp)), abs=1e-12)
    assert growth_mask({"start": start, "ramp": ramp}, start + ramp) == 1 and growth_mask(None, samples) == 1


@pytest.mark.parametrize("samples", [0, 5, 9])
def test_growth_without_a_ramp(samples):
    """A ramp of 0 samples is a step from 0 to 1 at the start."""
    assert growth_mask({"start": 5, "ramp": 0}, samples) == (samples >= 5)


# ---- 5. the cache and generation ------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=30)
@given(configs(), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 30), st.booleans(), seeds)
def test_cached_logits_are_the_uncached(config, chunks, spare, blockwise, seed):
    """However a sequence is cut into chunks, in a cache of whatever size, also past the trained length and with blockwise
    attention: the logits of every position are those of one call without a cache, to 1e-10 of their size."""
    T = sum(chunks)
    model, tokens = build(config, seed), some_tokens(config, 2, T, seed=seed)
    cache = KVCache(model, T + spare)
    cached = torch.cat([model(x, cache=cache, blockwise=blockwise) for x in tokens.split(chunks, 1)], 1)
    assert cache.length == T
    assert error(cached, model(tokens, blockwise=blockwise)) < 1e-10


def test_cache_far_past_the_trained_length():
    """The same at 600 positions for a model trained at 16, one token at a time at the end."""
    config = tiny(n_layers=1)
    model, tokens = build(config), some_tokens(config, 1, 600)
    cache = KVCache(model, 2000)
    cached = torch.cat([model(x, cache=cache) for x in tokens.split([590] + [1] * 10, 1)], 1)
    assert error(cached, model(tokens)) < 1e-10


@few
@given(configs(), st.lists(st.integers(1, 12), min_size=2, max_size=4), st.lists(st.integers(1, 3), max_size=3), st.booleans(), seeds)
def test_left_padding_changes_nothing(config, lengths, chunks, blockwise, seed):
    """Prompts of different lengths, aligned at their ends in one cache and continued together, have the logits that each
    has on its own, whatever stands in the padding."""
    longest, total = max(lengths), max(lengths) + sum(chunks)
    model, rows = build(config, seed), some_tokens(config, len(lengths), total, seed=seed)
    pads = torch.tensor([longest - n for n in lengths])
    cache = KVCache(model, total, pads)
    together = torch.cat([model(x, cache=cache, blockwise=blockwise) for x in rows.split([longest] + chunks, 1)], 1)
    assert together.isfinite().all()
    for row, logits, pad in zip(rows, together, pads):
        assert error(logits[pad:], model(row[None, pad:], blockwise=blockwise)[0]) < 1e-10


def test_every_query_sees_something():
    """With padding and blockwise attention no query, not even one in the padding, is left without a position to attend to: its
    softmax would be 0 / 0 in some of SDPA's kernels."""
    visible = flm._visible(3, 9, torch.tensor([0, 5, 11]), 4, "cpu")                     # (3, 1, 9, 12)
    assert visible.any(-1).all()


def test_a_full_cache_is_refused():
    """One token more than the cache holds is a ValueError that names both numbers."""
    model = build(tiny())
    cache = KVCache(model, 5)
    model(some_tokens(tiny(), 1, 4), cache=cache)
    with pytest.raises(ValueError, match="6 tokens do not fit a cache of 5"):
        model(some_tokens(tiny(), 1, 2), cache=cache)


def slow_greedy(model, prompt, n, blockwise=False) -> list[int]:
    """Greedy continuation that recomputes everything for every token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]), blockwise=blockwise)[0, -1].argmax()))
    return ids[len(prompt):]


@few
@given(configs(vocab_size=29), st.lists(st.integers(1, 10), min_size=1, max_size=3), st.integers(1, 8), st.booleans(), seeds)
def test_greedy_generation_is_a_slow_loop(config, lengths, n, blockwise, seed):
    """At temperature 0 every prompt of a batch, whatever the other prompts' lengths, continues as in a loop that recomputes all
    without a cache, also past the trained length."""
    model = build(config, seed)
    prompts = [some_tokens(config, length, seed=seed + i).tolist() for i, length in enumerate(lengths)]
    new = generate(model, prompts, n, temperature=0, capacity=40, blockwise=blockwise)
    assert new == [slow_greedy(model, prompt, n, blockwise) for prompt in prompts]


@few
@given(st.lists(st.lists(st.integers(0, 22), min_size=1, max_size=6), min_size=2, max_size=3), seeds)
def test_a_rows_draws_depend_on_no_other_row(prompts, seed):
    """Row 0 of a batch draws what it draws alone; the same seed draws the same batch again."""
    model = build(tiny())
    new = generate(model, prompts, 6, seed=seed)
    assert new == generate(model, prompts, 6, seed=seed)
    assert new[:1] == generate(model, prompts[:1], 6, seed=seed)


def test_other_seeds_draw_other_texts():
    """Ten seeds, and the ten rows of one batch with the same prompt, give ten different texts."""
    model = init_weights(FLM(tiny()), 0)                    # nearly uniform: 23 ** 10 texts are about equally likely
    texts = [generate(model, [[1]], 10, seed=seed)[0] for seed in range(10)]
    assert len(set(map(tuple, texts))) == 10
    assert len(set(map(tuple, generate(model, [[1]] * 10, 10)))) == 10


@pytest.mark.parametrize("seed", [-3, 10**14, 2**64])
def test_any_seed_is_taken_or_named(seed):
    """A seed of any size works, or the ValueError names it."""
    try:
        assert len(generate(build(tiny()), [[1]], 2, seed=seed)[0]) == 2
    except ValueError as problem:
        assert str(seed) in str(problem)


@few
@given(st.floats(0.1, 5), seeds)
def test_top_k_of_one_is_greedy(temperature, seed):
    """Drawing among the single likeliest token is greedy decoding at any temperature."""
    model = build(tiny())
    assert generate(model, [[3, 1]], 8, temperature=temperature, top_k=1, seed=seed) == [slow_greedy(model, [3, 1], 8)]


def slow_distribution(logits, temperature, top_k, top_p) -> dict[int, float]:
    """The probability of each token that may be drawn, in plain Python."""
    ids = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k or None]
    weights = [math.exp((logits[i] - logits[ids[0]]) / temperature) for i in ids]
    kept, reached = {}, 0.0
    for i, weight in zip(ids, weights):
        if reached >= top_p - 1e-12:                        # the smallest set that reaches top_p, up to rounding
            break
        kept[i] = weight / sum(weights)
        reached += kept[i]
    return {i: p / sum(kept.values()) for i, p in kept.items()}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-50, 50).map(lambda i: i / 10), min_size=1, max_size=12), st.floats(0.1, 3), st.integers(0, 14),
       st.floats(0.01, 1), seeds)
def test_choose_draws_from_the_set(logits, temperature, top_k, top_p, seed):
    """A drawn token is among the top_k likeliest and in the smallest set of them that reaches top_p. (Logits in steps of 0.1:
    two that differ by less than rounding are a tie to the one and not to the other.)"""
    allowed = slow_distribution(torch.tensor(logits).tolist(), temperature, top_k, top_p - 1e-9)     # rounding at the set's edge
    allowed |= slow_distribution(torch.tensor(logits).tolist(), temperature, top_k, top_p + 1e-9)
    generator = torch.Generator().manual_seed(seed)
    assert {choose(torch.tensor(logits), temperature, top_k, top_p, generator) for _ in range(20)} <= set(allowed)


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.7), (1.5, 4, 0.8)])
def test_choose_draws_with_the_right_probabilities(temperature, top_k, top_p):
    """Over 4000 draws every token of the set comes as often as its probability says."""
    logits, n = [0.3, 1.5, -0.7, 2.0, 1.4, -3.0], 4000
    generator = torch.Generator().manual_seed(0)
    drawn = np.bincount([choose(torch.tensor(logits), temperature, top_k, top_p, generator) for _ in range(n)], minlength=6)
    exact = slow_distribution(logits, temperature, top_k, top_p)
    for i in range(6):
        p = exact.get(i, 0.0)
        assert abs(drawn[i] - n * p) <= 5 * math.sqrt(n * p * (1 - p))          # five standard deviations of a binomial


def test_the_coldest_temperature_is_greedy():
    """As the temperature goes to 0 sampling becomes greedy; the smallest number above 0 breaks nothing."""
    model = build(tiny())
    for temperature in (1e-3, 1e-100, 5e-324):
        assert generate(model, [[3, 1]], 5, temperature=temperature) == [slow_greedy(model, [3, 1], 5)]


def test_stop_tokens_end_a_row():
    """A stop token ends its row, is not returned, and leaves the other rows as they were."""
    model, prompts = build(tiny(), 4), [[1, 2], [5], [7, 7, 9]]
    free = generate(model, prompts, 8, temperature=0)
    stop = (free[0][3], free[1][6])
    cut = [row[:min([row.index(s) for s in stop if s in row], default=8)] for row in free]
    assert generate(model, prompts, 8, temperature=0, stop=stop) == cut
    assert cut != free
    assert generate(model, [[1, 2]], 8, temperature=0, stop=(free[0][0],)) == [[]]


@few
@given(st.sets(st.integers(0, 22), min_size=1), st.booleans(), st.integers(0, 5), st.integers(23, 30), seeds)
def test_only_allowed_ids_are_drawn(ids, greedy, top_k, V, seed):
    """Only ids marked in `allowed` are drawn; a vocabulary padded past its end counts as not allowed there."""
    model, allowed = build(tiny(vocab_size=V), seed), torch.zeros(23, dtype=torch.bool)
    allowed[list(ids)] = True
    new = generate(model, [[1], [2, 3]], 6, temperature=0.0 if greedy else 1.0, top_k=top_k, seed=seed, allowed=allowed)
    assert set(sum(new, [])) <= ids and [len(row) for row in new] == [6, 6]


def test_on_token_streams_what_is_returned():
    """on_token gets every returned token of every row, in order, and no other."""
    streamed = [[], []]
    model = build(tiny(), 4)
    stop = (generate(model, [[1], [2, 3]], 8)[0][4],)
    new = generate(model, [[1], [2, 3]], 8, stop=stop, on_token=lambda row, token: streamed[row].append(token))
    assert streamed == new and len(new[0]) < 8


def test_generate_names_every_bad_argument():
    """All bad arguments are in one ValueError, each with its numbers."""
    with pytest.raises(ValueError) as caught:
        generate(build(tiny()), [[], [1, 23], [1] * 30], 0, temperature=-1.0, top_k=-2, top_p=0.0)
    for text in ("prompt 0 is empty", "prompt 1 holds the token 23: the vocabulary ends at 22", "max_new_tokens = 0",
                 "a prompt of 30 tokens", "there are 16", "temperature = -1.0", "top_k = -2", "top_p = 0.0"):
        assert text in str(caught.value)


@pytest.mark.parametrize("prompts, options, text", [
    ([], {}, "no prompt"), ([[1], []], {}, "prompt 1 is empty"), ([[-1, 5]], {}, "token -1"), ([[22, 99]], {}, "token 99"),
    ([[1] * 13], {}, "need 17 cache slots, there are 16"), ([[1] * 3], {"capacity": 6}, "need 7 cache slots, there are 6"),
    ([[1]], {"temperature": math.nan}, "temperature"), ([[1]], {"temperature": math.inf}, "temperature"),
    ([[1]], {"top_p": 1.5}, "top_p = 1.5"), ([[1]], {"top_p": math.nan}, "top_p"),
    ([[1]], {"capacity": 10**6}, "is past 31,"),
    ([[1]], {"allowed": torch.zeros(23, dtype=torch.bool)}, "allowed"),
    ([[1]], {"allowed": torch.ones(24, dtype=torch.bool)}, "allowed"),
])
def test_generate_refuses(prompts, options, text):
    """Each bad argument by itself is a ValueError that says which."""
    with pytest.raises(ValueError, match=text):
        generate(build(tiny()), prompts, 4, **options)


def test_a_prompt_may_fill_the_cache_to_the_last_slot():
    """Prompt and new tokens together may be as many as there are slots."""
    assert len(generate(build(tiny()), [[1] * 12], 4)[0]) == 4


# ---- 7. the command line --------------------------------------------------------------------------------------------

def byte_model(tmp_path) -> Path:
    """A checkpoint of a small model over bytes, whose vocabulary is padded."""
    config = tiny(vocab_size=288, max_seq_len=64)
    return save(tmp_path / "step-00000001", wild(FLM(config)), dtype="float32")


def test_sample_on_a_bad_checkpoint(tmp_path):
    """`python flm.py sample` on a checkpoint that is cut off: exit code 2, one short screen on stderr, no traceback."""
    folder = byte_model(tmp_path)
    truncate(folder)
    done = subprocess.run([sys.executable, flm.__file__, "sample", folder, "--prompt", "a"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert "cut off or damaged" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 10


@pytest.mark.parametrize("options, text", [
    (["--device", "tpu"], "unknown device 'tpu'|'tpu' is not supported"), (["--device", "cuda:99"], "--device cpu"),
    (["--max-new-tokens", "100"], "cache slots, there are 64"), (["--cache", "40"], "there are 40"), (["--top-p", "2"], "top_p = 2.0"),
    (["--tokenizer-file", "nowhere.tiktoken"], "nowhere.tiktoken")])
def test_sample_refuses_bad_options(tmp_path, capsys, options, text):
    """A bad option is a ValueError (exit code 2) that names it, before anything is printed."""
    folder = byte_model(tmp_path)
    with pytest.raises(ValueError, match=text):
        flm.main(["sample", str(folder), "--prompt", "def", "--max-new-tokens", "50"] + options)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("prompt", ["def ", "", "naïve 😡"])
def test_sample_continues_a_prompt(tmp_path, capsys, prompt):
    """`sample` prints the prompt and its continuation: the tokens of `generate`, decoded. An empty prompt starts a document."""
    folder, tokenizer = byte_model(tmp_path), get_tokenizer("bytes")
    arguments = ["--max-new-tokens", "40", "--temperature", "0.9", "--top-k", "50", "--top-p", "0.9", "--seed", "3"]
    assert flm.main(["sample", str(folder), "--prompt", prompt, "--device", "cpu"] + arguments) == 0
    allowed = torch.tensor(list(decodable(tokenizer)))
    allowed[256] = True                                     # the end of the text may be drawn: it ends the row
    ids = list(prompt.encode()) or [256]
    new = generate(load_model(folder)[0], [ids], 40, temperature=0.9, top_k=50, top_p=0.9, seed=3, stop=(256,), allowed=allowed)
    assert capsys.readouterr().out == prompt + bytes(new[0]).decode(errors="replace") + "\n"


def test_sample_continues_several_prompts(tmp_path, capsys):
    """Several prompts are continued as one batch, each under its number."""
    folder = byte_model(tmp_path)
    assert flm.main(["sample", str(folder), "--prompt", "one", "--prompt", "three", "--max-new-tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert "--- 1 ---\none" in out and "--- 2 ---\nthree" in out


@few
@given(st.text(max_size=5), seeds)
def test_streamed_text_is_the_returned_text(prompt, seed):
    """What streams to the terminal, where a token may end inside a character, is the text that is returned."""
    model = wild(FLM(tiny(vocab_size=288, max_seq_len=64)), 1)
    stream = io.StringIO()
    texts = flm.sample(model, {"tokenizer": "bytes"}, [prompt], max_new_tokens=30, seed=seed, stream=stream)
    assert texts[0].startswith(prompt) and stream.getvalue() == texts[0] + "\n"
