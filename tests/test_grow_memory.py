"""Tests of grow.py, section 4: a model in memory. Exactness is checked in float64, where rounding
is 1e-16; the oracle for a grown model is the model that it grew from."""

import copy
import json

import pytest
import torch
from growing import (
    BIGGER,
    adamw,
    growths,
    larger,
    logits,
    tensors_of,
    train_step,
    wild_draw,
)
from helpers import build, configs, difference, error, few, seeds, some_tokens, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import grow
import muP
from flm import FLM, growth_mask
from grow import DIMENSIONS
from sample import KVCache

# --------------------------------------------------------------------------------------------------
# The function


def assert_preserved(old_model, model, tokens):
    assert difference(logits(model, tokens), logits(old_model, tokens)) <= 1e-12


@pytest.mark.parametrize("dimension", DIMENSIONS)
@few
@given(st.data(), configs(), seeds, st.floats(0, 10))
def test_each_operator_alone_keeps_the_function(dimension, data, config, seed, sigma):
    """Growing one dimension moves no logit by more than 1e-12 of their size, whatever the new
    weights are."""
    new, layers = data.draw(growths(config, [dimension]))
    model = build(config, seed)
    tokens = some_tokens(config, 2, config.max_seq_len, seed=seed)
    options = {"seed": seed, "layers": layers, "draw": wild_draw(sigma)}
    grown, _, record = grow.grow(model, new, **options)
    assert grown.config == new and record == json.loads(json.dumps(record))
    assert_preserved(model, grown, tokens)


@settings(max_examples=60)
@given(st.data(), configs(), seeds, st.floats(0, 10))
def test_any_composition_keeps_the_function(data, config, seed, sigma):
    """The same for any dimensions at once, muP or not, tied or not, every rule for layers."""
    new, layers = data.draw(growths(config))
    model = build(config, seed)
    tokens = some_tokens(config, 2, config.max_seq_len, seed=seed)
    grown, _, _ = grow.grow(model, new, seed=seed, layers=layers, draw=wild_draw(sigma))
    assert_preserved(model, grown, tokens)


@few
@given(st.data(), configs(), seeds, st.floats(0, 10))
def test_two_growths_in_a_row_keep_the_function(data, config, seed, sigma):
    """The second growth keeps the function that the first one had reached at c = 1."""
    middle, layers = data.draw(growths(config))
    new, layers_2 = data.draw(growths(middle))
    tokens = some_tokens(config, 2, config.max_seq_len, seed=seed)
    draw = wild_draw(min(sigma, 0.5))
    first, _, record = grow.grow(build(config, seed), middle, seed=seed, layers=layers, draw=draw)
    first.set_masks(record, 1.0)
    options = {"seed": seed, "growths": 2, "layers": layers_2, "draw": wild_draw(sigma)}
    second, _, record = grow.grow(first, new, **options)
    assert record["growths"] == 2
    assert_preserved(first, second, tokens)


@few
@given(st.data(), configs(), seeds)
def test_the_cache_of_a_grown_model_holds_the_same_function(data, config, seed):
    """With a KV cache, prompt first and then token by token, the grown model's logits are the
    ungrown one's full pass."""
    new, layers = data.draw(growths(config))
    model = build(config, seed)
    tokens = some_tokens(config, 2, config.max_seq_len, seed=seed)
    grown, _, _ = grow.grow(model, new, seed=seed, layers=layers, draw=wild_draw(10))
    cache = KVCache(grown, config.max_seq_len)
    cut = data.draw(st.integers(1, config.max_seq_len))
    pieces = [tokens[:, :cut], *tokens[:, cut:].split(1, dim=1)]
    with torch.no_grad():
        ours = torch.cat([grown(piece, cache=cache) for piece in pieces if piece.shape[1]], dim=1)
    assert difference(ours, logits(model, tokens)) <= 1e-12


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@few
@given(st.data(), configs(), seeds)
def test_in_low_precision_the_function_is_kept_up_to_rounding(dtype, tolerance, data, config, seed):
    """Growth adds no error of its own: what is new is multiplied by exact zeros. But sums are taken
    in another order, LayerNorm's in other code, and muP's r rounds the last gain; each of those is
    a few roundings (fp32 6e-8, bf16 4e-3) per operation, some tens of operations deep: 1e-5 and
    0.1 of the logits' size with weights of 0.5."""
    new, layers = data.draw(growths(config))
    model = build(config, seed, dtype)
    tokens = some_tokens(config, 2, config.max_seq_len, seed=seed)
    grown, _, _ = grow.grow(model, new, seed=seed, layers=layers, draw=wild_draw(1))
    assert next(grown.parameters()).dtype == dtype
    ours, exact = logits(grown, tokens).double(), logits(model, tokens).double()
    assert difference(ours, exact) <= tolerance


# --------------------------------------------------------------------------------------------------
# The mask


def new_entries(model: FLM, record: dict) -> dict[str, torch.Tensor]:
    """{name: bool mask of the entries that are new}."""
    old, result = model.config.replace(**record["old"]), {}
    for name, p in model.named_parameters():
        layer, part = grow.split_name(name)
        result[name] = torch.ones(p.shape, dtype=bool)
        if layer is None or record["layer_map"][layer] is not None:
            result[name][tuple(slice(n) for n in grow.shape(part, old))] = False
    return result


@few
@given(st.data(), configs(), seeds)
def test_new_weights_have_no_gradient_until_the_mask_opens(data, config, seed):
    """At c = 0 the gradient of every new weight is exactly 0 (so they stay what they were drawn,
    but for decay); at c > 0 every tensor with new entries receives some."""
    new, layers = data.draw(growths(config))
    model = build(config, seed)
    grown, _, record = grow.grow(model, new, seed=seed, layers=layers, draw=wild_draw(1))
    tokens = some_tokens(config, 3, config.max_seq_len + 1, seed=seed)
    fresh = new_entries(grown, record)
    for c in (0.0, 0.4):
        grown.set_masks(record, c)
        grown.zero_grad()
        grown(tokens[:, :-1], tokens[:, 1:]).backward()
        for name, p in grown.named_parameters():
            if fresh[name].any():
                assert (p.grad[fresh[name]] != 0).any() == (c > 0), (name, c)


@few
@given(st.data(), configs(), seeds, st.floats(0, 0.99))
def test_the_output_is_continuous_in_c(data, config, seed, c):
    """A step of 1e-9 in c moves the logits by less than 1e-4 of their size, from c = 0, from
    between, and into c = 1, where the masks are no longer there."""
    new, layers = data.draw(growths(config))
    model = build(config, seed)
    grown, _, record = grow.grow(model, new, seed=seed, layers=layers, draw=wild_draw(0.5))
    tokens = some_tokens(config, 2, config.max_seq_len, seed=seed)
    for a, b in ((0.0, 1e-9), (c, c + 1e-9), (1 - 1e-9, 1.0)):
        grown.set_masks(record, a)
        before = logits(grown, tokens)
        grown.set_masks(record, b)
        assert difference(logits(grown, tokens), before) < 1e-4


@few
@given(st.data(), configs(), seeds)
def test_at_c_1_nothing_is_left_behind(data, config, seed):
    """With the mask at 1 the model is one of the target configuration that was handed its weights:
    the same logits bit for bit, the same keys, no mask anywhere."""
    new, layers = data.draw(growths(config))
    model = build(config, seed)
    grown, _, record = grow.grow(model, new, seed=seed, layers=layers, draw=wild_draw(1))
    grown.set_masks(record, 1.0)
    plain = FLM(new).double()
    assert list(plain.state_dict()) == list(grown.state_dict())
    plain.load_state_dict(grown.state_dict())
    tokens = some_tokens(config, 2, config.max_seq_len, seed=seed)
    assert torch.equal(logits(grown, tokens), logits(plain, tokens))
    assert {name for name, _ in grown.named_buffers()} == {"xpos"}


def test_copied_layers_are_copies_and_stacking_does_not_preserve():
    """A stacked layer holds its source's weights and moments. G_stack (arXiv 2405.15319) is that
    without a mask: L layers twice over, an ordinary model at once, which computes something
    else."""
    model, tokens = build(tiny()), some_tokens(tiny(), 2, 16)
    optimizer = adamw(model)
    train_step(model, optimizer, some_tokens(tiny(), 2, 17))
    stacked, its_optimizer, record = grow.grow(model, tiny(n_layers=4), optimizer, seed=0)
    stacked.set_masks(record, 1.0)
    assert stacked.config.n_layers == 4 and growth_mask(record, 80) == 1
    assert {name for name, _ in stacked.named_buffers()} == {"xpos"}
    ours, theirs = tensors_of(stacked, its_optimizer), tensors_of(model, optimizer)
    for kind in ("model", "optimizer"):
        for name, tensor in ours[kind].items():
            layer, part = grow.split_name(name)
            old = name if layer is None else f"layers.{layer % 2}.{part}"
            assert torch.equal(tensor, theirs[kind][old]), name
    assert difference(logits(stacked, tokens), logits(model, tokens)) > 1e-3


def test_growing_in_mid_ramp_is_refused_unless_finished():
    """A model whose mask is below 1 does not grow again; with its masks set to 1 it does, and what
    grows is what it computes then."""
    grown, _, record = grow.grow(build(tiny()), BIGGER, seed=0)
    grown.set_masks(record, 0.3)
    target, tokens = larger(BIGGER, d_ff=2), some_tokens(tiny(), 2, 16)
    assert "set_masks" in error(grow.grow, grown, target, seed=0, growths=2)
    grown.set_masks(record, 1.0)
    again, _, _ = grow.grow(grown, target, seed=0, growths=2)
    assert_preserved(grown, again, tokens)


@pytest.mark.parametrize(
    "options, said",
    [({"ramp": -1}, "ramp = -1"), ({"start": -2}, "start = -2"), ({"layers": "pile"}, "pile")],
)
def test_bad_options_of_a_growth(options, said):
    """Each impossible option is refused with its value."""
    assert said in error(grow.grow, build(tiny()), BIGGER, seed=0, **options)


def test_a_part_of_a_model_and_a_foreign_optimizer_are_refused():
    """A pipeline stage grows by way of a checkpoint; an optimizer of another kind, or without muP's
    groups, has state that is not known here."""
    part = FLM(tiny(), layers=[0], head=False)
    assert "part of a model" in error(grow.grow, part, BIGGER, seed=0)
    model = build(tiny())
    sgd, plain = torch.optim.SGD(model.parameters(), 0.1), torch.optim.AdamW(model.parameters())
    groups = muP.param_groups(model, 1e-2, 0.1)
    for optimizer in (sgd, plain, torch.optim.AdamW(groups, amsgrad=True)):
        assert "AdamW" in error(grow.grow, model, BIGGER, optimizer, seed=0)


# --------------------------------------------------------------------------------------------------
# Training


@few
@given(st.data(), st.sampled_from((0.0, 1.0)), seeds, st.integers(0, 2), st.integers(1, 4))
def test_held_at_0_a_grown_model_trains_as_the_ungrown_one(data, alpha, seed, before, k):
    """Standard parametrization or CompleteP, whose learning rates do not depend on the depth (its
    eps does, and is the same here), mask held at 0: k AdamW steps with clipping and decay, from a
    fresh optimizer or a warm one, give the same losses and the same old weights, to 1e-9. (The old
    weights see the same gradients, and the new ones, whose gradients are 0, add nothing to the norm
    that is clipped. AdamW divides by sqrt(v) + 1e-8, which may enlarge a rounding of 1e-16 by up to
    1e8.)"""
    config = data.draw(configs(mup=False, depth_alpha=alpha))
    new, layers = data.draw(growths(config))
    model = build(config, seed)
    optimizer = adamw(model)

    def batch(i):
        return some_tokens(config, 2, config.max_seq_len + 1, seed=seed + i)

    for i in range(before):
        train_step(model, optimizer, batch(-i))
    options = {"seed": seed, "layers": layers, "draw": wild_draw(3)}
    grown, its_optimizer, record = grow.grow(model, new, optimizer, **options)
    for group in optimizer.param_groups + its_optimizer.param_groups:
        group["eps"] = 1e-8
    for i in range(k):
        loss = train_step(model, optimizer, batch(i))
        assert train_step(grown, its_optimizer, batch(i)) == pytest.approx(loss, rel=1e-9)
    fresh, old = new_entries(grown, record), dict(model.named_parameters())
    for name, p in grown.named_parameters():
        if not fresh[name].all():
            part = old[grow.old_name(name, record)]
            assert difference(p.detach()[~fresh[name]], part.detach().flatten()) <= 1e-9, name


@few
@given(st.data(), configs(), seeds)
def test_growing_and_taking_a_gradient_commute(data, config, seed):
    """After one step without decay or clipping, the moments are (1 - beta) times the gradient and
    its square. Growing these moments gives what the grown model's own gradient gives: 1/r and
    1/r^2 at the final LayerNorm under muP, the same everywhere else, 0 in all that is new. This
    checks the multipliers against automatic differentiation."""
    new, layers = data.draw(growths(config))
    tokens = some_tokens(config, 2, config.max_seq_len + 1, seed=seed)
    model = build(config, seed)
    start = copy.deepcopy(model)
    optimizer = adamw(model, 1e-3, 0.0)
    train_step(model, optimizer, tokens, clip=None)
    moved, after, record = grow.grow(model, new, optimizer, seed=seed, layers=layers)
    grown, _, _ = grow.grow(start, new, seed=seed, layers=layers)
    own = adamw(grown, 1e-3, 0.0)
    train_step(grown, own, tokens, clip=None)
    kept = [layer is not None for layer in record["layer_map"]]
    ours, theirs = tensors_of(moved, after)["optimizer"], tensors_of(grown, own)["optimizer"]
    assert ours.keys() == theirs.keys()
    for name in ours:
        layer, _ = grow.split_name(name)
        if layer is None or kept[layer]:
            far = (ours[name] - theirs[name]).abs().max()
            assert far <= 1e-12 * max(1e-3, theirs[name].abs().max()), name


def hyper_parameters(groups) -> dict:
    keys = ("lr", "lr_scale", "weight_decay", "eps")
    return {id(p): [group[key] for key in keys] for group in groups for p in group["params"]}


@few
@given(st.data(), configs(), seeds)
def test_the_grown_optimizer_has_mups_groups_of_the_new_width(data, config, seed):
    """Learning rate, lr_scale and decay of every parameter are those of muP.param_groups on the
    target, betas and eps those of the old optimizer; before its first step it has no state,
    afterwards `step` is kept, and 0 in a fresh layer."""
    new, layers = data.draw(growths(config))
    model = build(config, seed)
    groups = muP.param_groups(model, 3e-3, 0.2, 1e-7)
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.7))
    grown, its_optimizer, _ = grow.grow(model, new, optimizer, seed=seed, layers=layers)
    assert not its_optimizer.state
    want = hyper_parameters(muP.param_groups(grown, 3e-3, 0.2, 1e-7))
    assert want == hyper_parameters(its_optimizer.param_groups)
    assert all(group["betas"] == (0.8, 0.7) for group in its_optimizer.param_groups)
    for _ in range(2):
        train_step(model, optimizer, some_tokens(config, 2, config.max_seq_len + 1))
    grown, its_optimizer, record = grow.grow(model, new, optimizer, seed=seed, layers=layers)
    for name, p in grown.named_parameters():
        layer, _ = grow.split_name(name)
        origins = (record["layer_map"], record["copied_from"])
        fresh = layer is not None and all(row[layer] is None for row in origins)
        assert its_optimizer.state[p]["step"] == (0 if fresh else 2)
        assert its_optimizer.state[p]["exp_avg_sq"].shape == p.shape
    train_step(grown, its_optimizer, some_tokens(config, 2, config.max_seq_len + 1))


@pytest.mark.parametrize("tied", [True, False])
def test_mup_after_a_growth_in_width_by_hand(tied):
    """Width 8 to 16 on base 8, so r = 2: the final gain and bias are doubled, their moments 1/2 and
    1/4; the groups' lr_scale is 1/2 for qkv and up, 1 for o and down (their fan-ins did not grow),
    decay the inverse; the logits are the same with the multiplier halved."""
    sizes = {"d_model": 8, "n_heads": 2, "head_dim": 4, "d_ff": 32, "mup_base_width": 8}
    old = tiny(tie_embeddings=tied, **sizes)
    new, model, tokens = old.replace(d_model=16), build(old), some_tokens(old, 2, 12)
    optimizer = adamw(model)
    train_step(model, optimizer, some_tokens(old, 2, 13))
    grown, its_optimizer, _ = grow.grow(model, new, optimizer, seed=0)
    assert new.logit_mult == old.logit_mult / 2
    assert_preserved(model, grown, tokens)
    for name in ("weight", "bias"):
        ours, theirs = getattr(grown.norm, name), getattr(model.norm, name)
        start = torch.full((8,), float(name == "weight"))  # gains are 1, biases 0
        assert torch.equal(ours[:8], 2 * theirs) and torch.equal(ours[8:], start)
        state, old_state = its_optimizer.state[ours], optimizer.state[theirs]
        for key, factor in (("exp_avg", 2), ("exp_avg_sq", 4)):
            assert torch.equal(state[key][:8], old_state[key] / factor)
            assert not state[key][8:].any()
    found = hyper_parameters(its_optimizer.param_groups)
    scale = {key: values[1:3] for key, values in found.items()}
    block = grown.layers["0"]
    assert scale[id(block.attn.qkv.weight)] == scale[id(block.ff.up.weight)] == [0.5, 0.2]
    assert scale[id(block.attn.o.weight)] == scale[id(block.ff.down.weight)] == [1.0, 0.1]
    assert scale[id(grown.embedding.weight)] == [1.0, 0.1]
    assert scale[id(grown.norm.weight)] == [1.0, 0.0]
