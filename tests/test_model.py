"""Tests of the model: the whole and its parts, operations, growth masks."""

import math

import numpy as np
import pytest
import torch
from helpers import build, configs, difference, few, seeds, some_tokens, tiny
from hypothesis import given
from hypothesis import strategies as st
from slow_model import slow_forward
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flm import FLM, FLMConfig, forward_flops, growth_mask
from sample import KVCache

pytestmark = pytest.mark.quick


@few
@given(configs(), st.integers(1, 10), seeds)
def test_forward_is_the_formula(config, T, seed):
    """Logits equal a slow reference: every bias, gain and multiplier, H*D != C, tied and not."""
    model, tokens = build(config, seed), some_tokens(config, 2, T, seed=seed)
    exact = np.stack([slow_forward(model, row) for row in tokens])
    assert (
        difference(model(tokens), exact) < 1e-10
    )  # rounding is 1e-15; a softmax or a norm may amplify it


@few
@given(configs(max_seq_len=8), st.integers(1, 20), seeds)
def test_blockwise_attention_is_the_papers(config, T, seed):
    """With `blockwise` a query sees its own block of max_seq_len/2, up to itself, and the last."""
    model, tokens = build(config, seed), some_tokens(config, T, seed=seed)
    exact = slow_forward(model, tokens, sees=lambda n, m: m <= n and n // 4 - m // 4 <= 1)
    assert difference(model(tokens[None], blockwise=True)[0], exact) < 1e-10


@few
@given(configs(), st.integers(2, 20), st.booleans(), st.data())
def test_causality(config, T, blockwise, data):
    """Changing a token changes no earlier logit, not in the last bit; and does change its own."""
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
    """A model cut into three pipeline stages computes what the whole computes, bit for bit.

    Some stages may have no layer. Their state dicts together have the whole's keys."""
    a, b = sorted((a, b))
    whole, tokens = build(config, seed), some_tokens(config, 2, 6)
    stages = [
        FLM(config, layers=range(a), head=False),
        FLM(config, layers=range(b, 3), embed=False),
    ]
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
    assert (
        difference(model(tokens, last_only=True), model(tokens)[:, -1:]) < 1e-14
    )  # another shape of product rounds otherwise


# ----------------------------------------------------------------------------------------------
# Floating point operations


@few
@given(configs(), st.integers(1, 20))
def test_forward_flops_counts_what_pytorch_counts(config, T):
    """forward_flops is PyTorch's own count of the matrix products, per token.

    SDPA's plain kernel computes attention over all T positions: the convention's count."""
    model, tokens = FLM(config), some_tokens(config, 2, T)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens)
    assert counter.get_total_flops() == 2 * T * forward_flops(config, T)


@few
@given(
    st.integers(1, 100),
    st.integers(1, 100),
    st.sampled_from([64, 128]),
    st.integers(1, 10**5),
    st.integers(1, 4096),
)
def test_forward_flops_is_narayanans(L, H, D, V, T):
    """Where d_ff = 4C and H*D = C, a sequence takes 72 T L C^2 (1 + T/6C) + 6 T V C operations."""
    C = H * D
    config = FLMConfig(L, C, H, D, 4 * C, V, T)
    assert (
        3 * T * forward_flops(config, T) == 72 * T * L * C * C + 12 * T * T * L * C + 6 * T * V * C
    )


# ----------------------------------------------------------------------------------------------
# Growth masks

GROWTH = {
    "old": {"n_layers": 1, "d_model": 7, "n_heads": 2, "d_ff": 11},
    "layer_map": [0, None],
    "start": 0,
    "ramp": 10,
}


def masks(model) -> list:
    return [b for name, b in model.named_buffers(remove_duplicate=False) if name.endswith("mask")]


@pytest.mark.parametrize("growth, c", [(GROWTH, 1), (GROWTH, 1.0), (None, 0.5), (None, 1.0)])
def test_no_mask_is_left_at_the_end_of_a_growth(growth, c):
    """At c = 1, or without a growth, no mask is left.

    The logits are bit for bit those of a model that never had any."""
    model, tokens = build(tiny()), some_tokens(tiny(), 1, 6)
    before, keys = model(tokens), list(model.state_dict())
    model.set_masks(GROWTH, 0.4)
    assert (
        len(masks(model)) == 2 * 4 + 1 + 1
    )  # two norms, heads, hidden units; the new layer; the last norm
    assert not torch.equal(model(tokens), before) and list(model.state_dict()) == keys
    model.set_masks(growth, c)
    assert (
        masks(model) == []
        and torch.equal(model(tokens), before)
        and list(model.state_dict()) == keys
    )


@pytest.mark.parametrize("c", [-0.01, 1.01, math.nan])
def test_a_mask_outside_its_range_is_refused(c):
    """c must lie in [0, 1]: anything else is a ValueError that quotes it."""
    with pytest.raises(ValueError, match=str(c)):
        build(tiny()).set_masks(GROWTH, c)


@few
@given(configs(), st.floats(0, 0.99), seeds, st.data())
def test_masked_forward_is_the_formula(config, c, seed, data):
    """With masks at any c the logits equal the slow reference's.

    There channels count c in every LayerNorm's mean and variance, and new heads, hidden units
    and layers contribute c times what they compute. With CompleteP an old layer contributes what
    it did in a model of the old depth, r times as much, at c = 0; at c = 1 the same as all."""
    size = {
        k: data.draw(st.integers(1, getattr(config, k))) for k in ("d_model", "n_heads", "d_ff")
    }
    layer_map = [data.draw(st.sampled_from([0, None])) for _ in range(config.n_layers)]
    model, tokens = build(config, seed), some_tokens(config, 6, seed=seed)
    old_L = max(1, layer_map.count(0))
    model.set_masks({"old": {"n_layers": old_L, **size}, "layer_map": layer_map}, c)
    r = (config.n_layers / old_L) ** config.depth_alpha

    def mask(old, new):
        return np.where(np.arange(new) < old, 1.0, c)

    live = {
        "channels": mask(size["d_model"], config.d_model),
        "heads": mask(size["n_heads"], config.n_heads),
        "hidden": mask(size["d_ff"], config.d_ff),
        "layers": np.array([c if i is None else c + (1 - c) * r for i in layer_map]),
    }
    assert difference(model(tokens[None])[0], slow_forward(model, tokens, live=live)) < 1e-10


@few
@given(
    configs(mup=False),
    st.integers(0, 3),
    st.integers(0, 2),
    st.integers(0, 9),
    st.integers(0, 9),
    seeds,
    st.data(),
)
def test_growth_at_zero_preserves_the_function(old, layers, heads, channels, hidden, seed, data):
    """A model widened by hand in all four dimensions has at c = 0 the logits it had before.

    The old block is copied, and wild numbers stand elsewhere. It holds through a cache too."""
    new = old.replace(
        n_layers=old.n_layers + layers,
        n_heads=old.n_heads + heads,
        d_model=old.d_model + channels,
        d_ff=old.d_ff + hidden,
    )
    layer_map = data.draw(
        st.permutations([True] * old.n_layers + [False] * layers)
    )  # where the old layers go ...
    layer_map = [
        sum(layer_map[:i]) if is_old else None for i, is_old in enumerate(layer_map)
    ]  # ... in their order
    small, large = build(old, seed), build(new, seed + 1)
    values = small.state_dict()
    with torch.no_grad():
        for name, parameter in large.named_parameters():
            parts = name.split(".")
            if parts[0] == "layers":
                parts[1] = str(layer_map[int(parts[1])])
            value = values.get(".".join(parts))  # None in a new layer
            if value is not None:
                parameter[tuple(slice(n) for n in value.shape)] = (
                    value  # qkv's rows are (H, 3, D): the old heads come first
                )
    sizes = {k: getattr(old, k) for k in ("n_layers", "d_model", "n_heads", "d_ff")}
    large.set_masks({"old": sizes, "layer_map": layer_map}, 0.0)
    tokens, cache = some_tokens(old, 2, 7), KVCache(large, 7)
    assert (
        difference(large(tokens), small(tokens)) < 1e-12
    )  # rounding alone: 1e-15, amplified a little by softmax and norms
    cached = torch.cat([large(tokens[:, :3], cache=cache), large(tokens[:, 3:], cache=cache)], 1)
    assert difference(cached, small(tokens)) < 1e-12


@few
@given(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(0, 2 * 10**6))
def test_growth_mask_is_a_ramp_in_samples(start, ramp, samples):
    """c is 0 up to the start, then rises in a straight line to 1 after `ramp` samples."""
    c = growth_mask({"start": start, "ramp": ramp}, samples)
    assert c == pytest.approx(min(1, max(0, (samples - start) / ramp)), abs=1e-12)
    assert (
        growth_mask({"start": start, "ramp": ramp}, start + ramp) == 1
        and growth_mask(None, samples) == 1
    )


@pytest.mark.parametrize("samples", [0, 5, 9])
def test_growth_without_a_ramp(samples):
    """A ramp of 0 samples is a step from 0 to 1 at the start."""
    assert growth_mask({"start": 5, "ramp": 0}, samples) == (samples >= 5)
