"""Tests of the configuration: FLMConfig, presets, FIELD=VALUE, the number of parameters."""

import contextlib
import json
import math

import pytest
from helpers import configs, error, few, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from flm import FLM, PRESETS, FLMConfig, count_parameters, parse_fields, preset

pytestmark = pytest.mark.quick


# ----------------------------------------------------------------------------------------------
# Presets


def test_presets_have_the_papers_sizes():
    """flm-101b has the published shape, and 80 (12 C^2 + 13 C) + 2 C + V C parameters exactly.

    The proxy has the paper's width, heads and upper bound. Our own 16B and 51B shapes are about
    as large as their names say."""
    big, C, V = PRESETS["flm-101b"], 10240, 100352
    assert (big.n_layers, big.d_model, big.n_heads) == (80, C, 80)
    assert (big.head_dim, big.d_ff, big.vocab_size, big.max_seq_len) == (128, 40960, V, 2048)
    exact = 80 * (12 * C * C + 13 * C) + 2 * C + V * C
    assert count_parameters(big) == exact == 101_701_570_560
    proxy = PRESETS["flm-proxy"]
    assert (proxy.d_model, proxy.n_heads, proxy.head_dim) == (256, 2, 128)
    assert count_parameters(proxy) < 100e6
    assert abs(count_parameters(PRESETS["flm-16b"]) / 1e9 - 15.6) < 0.1
    assert abs(count_parameters(PRESETS["flm-51b"]) / 1e9 - 50.8) < 0.1


def test_presets_only_grow():
    """From 16B to 51B to 101B no dimension shrinks, and heads keep their size."""
    chain = [preset(name) for name in ("flm-16b", "flm-51b", "flm-101b")]
    for name in ("n_layers", "d_model", "n_heads", "d_ff"):
        sizes = [getattr(config, name) for config in chain]
        assert sizes == sorted(sizes)
    paper = [c for name, c in PRESETS.items() if not name.endswith("demo")]
    assert {c.head_dim for c in paper} == {128}


def test_unknown_preset_names_the_nearest():
    """A mistyped preset is a ValueError that quotes it, suggests the nearest and lists them all."""
    message = error(preset, "flm-101")
    assert "'flm-101'" in message and "did you mean flm-101b" in message
    assert all(name in message for name in PRESETS)
    assert "unknown preset ''" in error(preset, "")


@few
@given(configs())
def test_every_parameter_is_counted_once(config):
    """count_parameters is the number of numbers that the optimizer moves, a tied head once."""
    assert count_parameters(config) == sum(p.numel() for p in FLM(config).parameters())


# ----------------------------------------------------------------------------------------------
# Fields


@few
@given(configs())
def test_config_survives_json(config):
    """to_dict gives plain JSON values. from_dict takes them back to an equal configuration."""
    assert FLMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_names_every_unknown_and_missing_field():
    """A dictionary with fields too many and too few is refused once, with all of them."""
    values = {**tiny().to_dict(), "n_experts": 8, "dropout": 0.1}
    del values["d_ff"], values["vocab_size"]
    message = error(FLMConfig.from_dict, values)
    assert all(f"'{name}'" in message for name in ("n_experts", "dropout", "d_ff", "vocab_size"))
    assert "'d_model'" not in message


@pytest.mark.parametrize("values", [[1, 2], None, "demo", 7])
def test_from_dict_refuses_what_is_no_dictionary(values):
    """Another JSON value than an object is a ValueError that shows it."""
    message = error(FLMConfig.from_dict, values)
    assert "not a model configuration" in message and repr(values) in message


BAD = {
    str: ["relu", "", 3, None],
    int: [0, -3, 2.0, True, "12", None],
    float: [0, -1.5, math.nan, math.inf, True, "1", None],
    bool: [0, 1, "yes", None],
}


@settings(max_examples=50)
@given(st.data())
def test_config_lists_every_violation(data):
    """Whatever fields are broken: one error, with a line for each of them, and for no other."""
    sound = tiny().to_dict()
    names = data.draw(st.lists(st.sampled_from(sorted(sound)), min_size=1, unique=True))
    bad = {name: BAD[type(value)] for name, value in sound.items()}
    bad["depth_alpha"] = [1.5, *BAD[float][1:]]  # 0 is one of its values
    broken = {name: data.draw(st.sampled_from(bad[name])) for name in names}
    lines = error(lambda: FLMConfig(**{**sound, **broken})).splitlines()[1:]
    named = sorted(line.split(":")[0].strip() for line in lines)
    assert named == sorted(f"{k} = {v!r}" for k, v in broken.items())


def test_config_refuses_numbers_that_do_not_fit_together():
    """An odd head_dim and a length past xPos's range are named beside any other violation."""
    message = error(tiny, head_dim=7, max_seq_len=100_000, n_heads=0)
    assert "head_dim = 7: must be even" in message
    assert "max_seq_len = 100000: must be at most" in message
    assert "n_heads = 0" in message


@pytest.mark.parametrize("broken", [{"xpos_scale_base": 1e308}, {"init_std": 10**400}])
def test_config_survives_huge_numbers(broken):
    """A number too large to compute with is accepted or a ValueError, never another exception."""
    with contextlib.suppress(ValueError):
        tiny(**broken)


@few
@given(configs())
def test_width_ratios(config):
    """m is C/base, H*D/base and F/(ratio base); without muP all are 1. Logits: output_mult/m."""
    base = config.mup_base_width
    on, off = config.replace(mup=True), config.replace(mup=False)
    assert on.m_width == config.d_model / base
    assert on.m_attn == config.n_heads * config.head_dim / base
    assert on.m_ff == config.d_ff / (config.mup_ff_ratio * base)
    assert on.logit_mult == config.output_mult / (config.d_model / base)
    assert (off.m_width, off.m_attn, off.m_ff, off.logit_mult) == (1, 1, 1, config.output_mult)


# ----------------------------------------------------------------------------------------------
# FIELD=VALUE


@few
@given(configs())
def test_words_are_the_fields(config):
    """A configuration written as words FIELD=VALUE, as Python or as JSON, is read back equal."""
    fields = config.to_dict()
    for as_json in (json.dumps, str):

        def write(value):
            return value if isinstance(value, str) else as_json(value)

        assert parse_fields(f"{k}={write(v)}" for k, v in fields.items()) == (fields, [])


def test_every_bad_word_is_named():
    """Each bad word is quoted with its reason, and the good ones are read all the same."""
    changes, problems = parse_fields(["d_ff=7", "d_ff", "d_f=7", "n_heads=many", "=1"])
    assert changes == {"d_ff": 7}
    assert problems[0] == "d_ff: not FIELD=VALUE"
    assert "no field 'd_f'; there are n_layers, d_model" in problems[1]
    assert problems[2] == "n_heads=many: 'many' is no number, true or false"
    assert "no field ''" in problems[3] and len(problems) == 4
