"""Tests of xPos: the decay of scores, the tables and their limits. That a score is the paper's and
depends on the distance alone is a check of the course (tests/test_course_ours.py)."""

import math
import warnings

import pytest
import torch
from helpers import build, few, some_tokens, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from flm import FLM, rotate, xpos_tables
from sample import KVCache

pytestmark = pytest.mark.quick


def our_score(config, q, k, n, m, length) -> float:
    """The score of query q at n and key k at m, with tables made for `length` positions."""
    x = torch.zeros(1, length, 1, 2, config.head_dim, dtype=torch.float64)
    x[0, n, 0, 0], x[0, m, 0, 1] = q, k
    y = rotate(x, xpos_tables(config, length, dtype=torch.float64))
    return (y[0, n, 0, 0] @ y[0, m, 0, 1]).item()


@few
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 512))
def test_xpos_positions_do_not_move_with_the_length(a, b, max_seq_len):
    """Tables of any two lengths agree bit for bit where both reach.

    So a key that was rotated and cached at one length is right at another. (Public
    implementations centre positions on the current length: there the tables differ.)"""
    config, common = tiny(max_seq_len=max_seq_len), min(a, b)
    assert torch.equal(xpos_tables(config, a)[:common], xpos_tables(config, b)[:common])


def test_xpos_scores_decay():
    """Every pair's largest possible score falls by zeta_i per 512 positions.

    The largest score over the directions of the key is the length of the vector (score against
    (1, 0), score against (0, 1))."""
    config, distances = tiny(head_dim=8), (0, 1, 100, 512, 1024)
    for i in range(4):
        q, along, across = torch.zeros(3, 8, dtype=torch.float64)
        q[2 * i] = along[2 * i] = across[2 * i + 1] = 1
        scores = [
            [our_score(config, q, key, d, 0, d + 1) for key in (along, across)] for d in distances
        ]
        sizes = [math.hypot(*pair) for pair in scores]
        zeta = (i / 4 + 0.4) / 1.4
        assert sizes == pytest.approx([zeta ** (d / 512) for d in distances], rel=1e-12)
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5


@settings(max_examples=10)
@given(st.sampled_from([0.5, 3.0, 100.0, 512.0]), st.integers(1, 60))
def test_xpos_limit_is_where_fp32_ends(scale_base, max_seq_len):
    """At the limit every factor is a normal fp32 number and leaves room for keys up to 2**16.

    One more position is refused. The limit is no earlier than it must be: 2% further from the
    origin that room is gone."""
    config = tiny(xpos_scale_base=scale_base, max_seq_len=max_seq_len, head_dim=2)
    limit = config.xpos_limit()
    size = xpos_tables(config, limit).to(torch.complex128).abs()
    fp32 = torch.finfo(torch.float32)
    assert (size * 2.0**16 < fp32.max).all()
    assert size.min() >= fp32.tiny * (1 - 1e-6)  # the factors are fp32 numbers, rounded to 6e-8
    with pytest.raises(ValueError, match=f"{limit + 1:,} is past {limit:,}"):
        xpos_tables(config, limit + 1)
    past = 1.02 * (limit + 1 - max_seq_len // 2)
    assert 3.5 ** (past / scale_base) > 2.0**110


def test_lengths_past_xpos_limit_are_refused():
    """Neither a sequence nor a cache may pass the limit: a ValueError that gives it."""
    config = tiny(xpos_scale_base=0.5)
    model, limit = build(config), config.xpos_limit()
    assert model(some_tokens(config, 1, limit)).isfinite().all()
    with pytest.raises(ValueError, match=str(limit)):
        model(some_tokens(config, 1, limit + 1))
    with pytest.raises(ValueError, match=str(limit)):
        KVCache(model, limit + 1)


CASTS = {
    "to bfloat16": lambda m: m.to(torch.bfloat16),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to float64": lambda m: m.to(torch.float64),
    "and back": lambda m: m.double().float(),
    "to_empty": lambda m: m.to("meta").to_empty(device="cpu"),
    "to cpu": lambda m: m.to("cpu"),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_tables_and_tie_survive_casts(cast):
    """After a cast or to_empty the tables fit the parameters' dtype, fp32 or wider.

    They are never the narrow ones
    converted; a tied head is still the embedding; and the user sees no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = cast(FLM(tiny()))
    wide = torch.float64 if model.norm.weight.dtype == torch.float64 else torch.float32
    assert torch.equal(model.xpos, xpos_tables(tiny(), 16, dtype=wide))
    assert model.xpos.real.dtype == wide
    assert model.head.weight is model.embedding.weight


def test_state_dict_is_parameters_only():
    """No tables, no masks: the state dict's keys are the parameters' names (and a tied head's)."""
    model = build(tiny())
    model.set_masks(
        {"old": {"n_layers": 1, "d_model": 4, "n_heads": 1, "d_ff": 4}, "layer_map": [0, None]}, 0.5
    )
    assert set(model.state_dict()) == {
        name for name, _ in model.named_parameters(remove_duplicate=False)
    }
