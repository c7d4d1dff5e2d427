"""Tele-FLM is FLM-101B's decoder with other values of norm, activation, rotary and bias."""

import pytest
import torch

import grow
import muP
from flm import FLM, PRESETS, FLMConfig, count_parameters, parse_fields, preset
from sample import KVCache

SMALL = preset("tele-demo").replace(n_layers=2, d_model=32, n_heads=2, head_dim=16, d_ff=84)
WIDER = SMALL.replace(n_layers=3, d_model=48, n_heads=3, d_ff=126)


def wild(config, name, shape, seed, growths=0):
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))


def test_parameters_of_the_published_52b():
    """With the chat model's 80,896 words the count is the published one, to the parameter."""
    config = preset("tele-flm-52b")
    assert count_parameters(config) == 52_824_121_344
    assert count_parameters(config.replace(vocab_size=80896)) == 52_832_509_952
    assert [PRESETS[f"tele-flm-{n}"].logit_mult for n in ("52b", "1t")] == [1 / 32, 1 / 40]


def test_every_bad_choice_is_named():
    changes, problems = parse_fields(["norm=RMSNorm", "activation=relu", "rotary=1"])
    assert changes == {"norm": "rmsnorm", "activation": "relu", "rotary": "1"} and not problems
    with pytest.raises(ValueError, match="(?s)must be one of gelu.*must be one of xpos, rope"):
        FLMConfig(1, 8, 1, 8, 8, 8, 8, **changes)


@pytest.mark.parametrize("activation", ["swiglu", "gelu_tanh"])
def test_growth_of_all_dimensions_computes_the_same(activation):
    """At c = 0 in float64, whatever the new weights hold; and c matters after that."""
    old = muP.init_weights(FLM(SMALL.replace(activation=activation)), 0).double()
    tokens = torch.arange(24).view(2, 12)
    larger = WIDER.replace(activation=activation)
    new, _, record = grow.grow(old, larger, None, seed=1, draw=wild)
    new.set_masks(record, 0.0)
    torch.testing.assert_close(new(tokens), old(tokens), rtol=1e-9, atol=1e-10)
    new.set_masks(record, 0.5)
    assert (new(tokens) - old(tokens)).abs().max() > 1e-3


def test_growth_keeps_the_variant():
    other = WIDER.replace(norm="layernorm", activation="gelu", rotary="xpos", bias=True)
    with pytest.raises(ValueError, match="(?s)norm:.*activation:.*rotary:.*bias:"):
        grow.check_growth(SMALL, other)


def test_cache_past_the_trained_length():
    model = muP.init_weights(FLM(SMALL.replace(max_seq_len=8)), 0).double()
    tokens = torch.arange(30).view(1, 30)
    cache = KVCache(model, 30)
    steps = torch.cat([model(tokens[:, i : i + 1], cache=cache) for i in range(30)], 1)
    torch.testing.assert_close(steps, model(tokens))
