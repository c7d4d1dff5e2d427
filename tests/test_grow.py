"""Tests of grow.py, sections 1 to 3 and 6: what can grow, the operators, one tensor, the words of a
command line."""

import pytest
import torch
from growing import BIGGER, larger
from helpers import configs, error, few, tiny
from hypothesis import given
from hypothesis import strategies as st

import grow
import muP
from flm import FLM, PRESETS, FLMConfig
from grow import check_growth, grow_tensor, layer_origins

pytestmark = pytest.mark.quick


# --------------------------------------------------------------------------------------------------
# What can grow


def test_every_violation_is_named_at_once():
    """A target that shrinks two dimensions and changes every field that must stay is refused once,
    with all of them, their numbers and a reason; init_std alone may differ."""
    old = tiny()
    new = FLMConfig(
        n_layers=1,
        d_model=9,
        n_heads=4,
        head_dim=4,
        d_ff=20,
        vocab_size=29,
        max_seq_len=14,
        tie_embeddings=False,
        norm_eps=1e-6,
        rotary_theta=500.0,
        xpos_scale_base=100.0,
        mup=False,
        mup_base_width=4,
        init_std=0.5,
        input_mult=3.0,
        output_mult=3.0,
    )
    text = error(check_growth, old, new)
    for said in (
        "n_layers: 2 -> 1 would shrink",
        "d_model: 12 -> 9 would shrink",
        "head_dim: 6 -> 4",
        "rotary",
        "vocab_size: 23 -> 29",
        "max_seq_len: 16 -> 14",
        "tie_embeddings: True -> False",
        "norm_eps",
        "rotary_theta",
        "xpos_scale_base",
        "mup: True",
        "mup_base_width: 8 -> 4",
        "input_mult",
        "output_mult",
    ):
        assert said in text
    assert "init_std" not in text and "n_heads" not in text and "d_ff" not in text
    check_growth(old, larger(old, d_ff=1).replace(init_std=1.0))


def test_nothing_to_grow_is_refused():
    """The same size again is not a growth, whatever init_std says."""
    assert "no larger" in error(check_growth, tiny(), tiny(init_std=0.5))


# --------------------------------------------------------------------------------------------------
# Four operators


@few
@given(configs())
def test_the_operators_know_every_parameter(config):
    """Each side of each parameter of the model grows with exactly one dimension of the config, or
    is the vocabulary and grows with none."""
    with torch.device("meta"):
        model = FLM(config)
    for name, p in model.named_parameters():
        _, part = grow.split_name(name)
        assert grow.shape(part, config) == tuple(p.shape), name
        grown = [grow.shape(part, larger(config, **{name: 1})) for name in grow.DIMENSIONS]
        for axis, length in enumerate(p.shape):
            vocabulary = axis == 0 and part in ("embedding.weight", "head.weight")
            assert sum(size[axis] != length for size in grown) == (0 if vocabulary else 1)


def test_layer_rules_in_small_cases():
    """Written out by hand, for 3 layers that become 5, 6 and 8: 1 is the old layer 1, 1' a copy of
    it, - a fresh layer."""

    def row(new_L, rule):
        origins = layer_origins(3, new_L, rule)
        words = [str(kept) if kept is not None else f"{copied}'" for kept, copied in origins]
        return " ".join("-" if word == "None'" else word for word in words)

    assert row(5, "stack") == "0 1 2 1' 2'"
    assert row(6, "stack") == "0 1 2 0' 1' 2'"
    assert row(8, "stack") == "0 1 2 0' 1' 2' 1' 2'"
    assert row(5, "interleave") == "0 0' 1 1' 2"
    assert row(6, "interleave") == "0 0' 1 1' 2 2'"
    assert row(5, "fresh") == "0 1 2 - -"
    assert row(6, [None, 0, 0, 1, None, 2]) == "- 0 0' 1 - 2"
    assert row(3, "stack") == row(3, "interleave") == row(3, "fresh") == "0 1 2"


@given(st.integers(1, 9), st.integers(0, 20), st.sampled_from(["stack", "interleave", "fresh"]))
def test_every_rule_keeps_every_layer_in_its_order(old_L, added, rule):
    """Kept layers are 0 .. L-1 in order, and each copy comes after its original: the two facts that
    preservation and copying need. Copies are spread evenly: no layer has two more than another
    (but for stack's last, partial round)."""
    origins = layer_origins(old_L, old_L + added, rule)
    assert len(origins) == old_L + added
    assert [kept for kept, _ in origins if kept is not None] == list(range(old_L))
    seen, copies = set(), [copied for _, copied in origins if copied is not None]
    for kept, copied in origins:
        assert copied is None or (kept is None and copied in seen)
        seen.add(kept)
    assert len(copies) == (0 if rule == "fresh" else added)
    counts = [copies.count(layer) for layer in range(old_L)]
    assert rule == "fresh" or max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    "rule, said",
    [
        ("shuffle", "unknown rule 'shuffle'"),
        (7, "unknown rule 7"),
        ([0, 1, 1], "must be 4 entries"),
        ([1, 0, 0, 1], "old order"),
        ([0, 0, 0, 0], "old order"),
        ([0, 1, 2, 0], "old order"),
        ([None] * 4, "old order"),
    ],
)
def test_bad_layer_rules(rule, said):
    """A rule that is none, and a row of the wrong length, out of order, with a layer missing or one
    that is not there, are refused with what they must be."""
    assert said in error(layer_origins, 2, 4, rule)


# --------------------------------------------------------------------------------------------------
# One tensor


def test_heads_are_appended_whole():
    """The old heads' query, key and value rows stay the first rows of qkv, and o reads the new
    heads in its last columns."""
    old, new = tiny(), larger(tiny(), n_heads=2)
    D, x = old.head_dim, torch.arange(3 * 3 * 6 * 12.0).view(54, 12)
    y = grow_tensor("layers.0.attn.qkv.weight", x, old, new, seed=0)
    assert y.shape == (90, 12) and torch.equal(y.view(5, 3, D, 12)[:3], x.view(3, 3, D, 12))
    x = x.view(12, 54)[:, :18]
    y = grow_tensor("layers.1.attn.o.weight", x, old, new, seed=0)
    assert y.shape == (12, 30) and torch.equal(y[:, :18], x)


NAMES = (
    "embedding.weight",
    "layers.1.attn.qkv.weight",
    "layers.1.ff.down.weight",
    "norm.weight",
    "layers.0.attn.o.bias",
)


@pytest.mark.parametrize("name", NAMES)
def test_new_weights_are_those_of_initialisation(name):
    """Outside the old block a tensor holds muP.initial_value of the larger configuration under
    (seed, new name, growths): its std has the new width and depth, gains are 1, biases 0, and a
    second growth draws other numbers."""
    old, new = tiny(), BIGGER
    start = torch.full(grow.shape(grow.split_name(name)[1], old), 3.0)
    grown = grow_tensor(name, start, old, new, seed=4, growths=2)
    expected = muP.initial_value(new, name, grown.shape, 4, 2)
    inside = torch.zeros(grown.shape, dtype=bool)
    inside[tuple(slice(n) for n in start.shape)] = True
    assert torch.equal(grown[~inside], expected[~inside])
    scale = new.m_width / old.m_width if name.startswith("norm.") else 1
    assert torch.equal(grown[inside], torch.full_like(grown[inside], 3.0) * scale)
    again = grow_tensor(name, start, old, new, seed=4, growths=3)
    assert muP.kind(name) == "vector" or not torch.equal(grown, again)


def test_a_fresh_layer_is_drawn_whole():
    """Without an old tensor the whole is muP.initial_value, of the first growth by default."""
    name = "layers.4.ff.up.weight"
    grown = grow_tensor(name, None, tiny(), BIGGER, seed=4)
    assert torch.equal(grown, muP.initial_value(BIGGER, name, (29, 19), 4, 1))


def test_a_tensor_of_another_shape_is_refused():
    """A tensor that the old configuration does not describe is named with both shapes."""
    name = "layers.0.ff.up.bias"
    message = error(grow_tensor, name, torch.zeros(9), tiny(), BIGGER, seed=0)
    assert message == f"{name} has the shape (9,), the configuration says (20,)"


# --------------------------------------------------------------------------------------------------
# The words of a command line


def test_the_target_of_a_growth():
    """--to takes changes to the checkpoint's own configuration, a preset, and changes on top of it;
    what is neither is named, every word."""
    old = tiny()
    assert grow.target_config(["n_layers=9", "d_ff=99"], old) == old.replace(n_layers=9, d_ff=99)
    demo = PRESETS["demo"].replace(mup=False, n_layers=7)
    assert grow.target_config(["demo", "mup=false", "n_layers=7"], old) == demo
    message = error(grow.target_config, ["layers=3", "d_ff=many"], old)
    assert "--to layers=3: there is no field" in message and "'many' is no number" in message


def test_the_rows_of_layers():
    """--layers is a rule or a row; a row of something else is refused."""
    assert grow.parse_layers("0,1,-, 1") == [0, 1, None, 1]
    assert grow.parse_layers("fresh") == "fresh"
    assert "--layers 0,x" in error(grow.parse_layers, "0,x")
