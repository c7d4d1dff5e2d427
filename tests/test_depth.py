"""Tests of CompleteP (depth_alpha), in muP's table, in the coordinate check and through growth.

Other files draw the field at random: the model against the slow one (test_model.py), the table
(test_muP.py), exact growth in float64 (test_grow_memory.py), tp and pp (test_parallel.py)."""

import json

import pytest
import torch
from growing import logits, train_step
from helpers import CHECKED, build, configs, difference, error, few, seeds, some_tokens, tiny
from hypothesis import given
from hypothesis import strategies as st

import grow
import muP
from flm import FLM, growth_mask
from muP import LAYERS, exponents, init_std, init_weights, verdict

DEEP = tiny(depth_alpha=1.0, base_layers=2)  # it has 2 layers


@pytest.mark.quick
@few
@given(configs(n_layers=2), st.floats(0.01, 1), seeds)
def test_at_the_proxys_depth_alpha_is_nothing(config, alpha, seed):
    """At L = base_layers every alpha is the same model: the same bits at the start and after a
    step of AdamW."""
    found = []
    for value in (0.0, alpha):
        model = init_weights(FLM(config.replace(depth_alpha=value, base_layers=2)), seed)
        optimizer = torch.optim.AdamW(muP.param_groups(model, 1e-2, 0.1))
        train_step(model, optimizer, some_tokens(config, 2, config.max_seq_len + 1))
        found.append(dict(model.named_parameters()))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


# --------------------------------------------------------------------------------------------------
# The coordinate check over depths

DEPTHS = (2, 4, 8, 16, 32)


def test_flat_with_completep_growing_without_it():
    """From 2 to 32 layers, in the first steps of AdamW: with alpha = 1 every layer's mean
    |activation| is flat. Without it, steps of the same sign from all layers add up in the residual
    stream, which grows with p > 1/2 although its initial values were right."""
    batch = muP.text_batch(4, 32, 256)
    sizes = muP.coord_check(CHECKED, DEPTHS, batch, 0.01, 2, range(4), "depth")
    assert torch.equal(sizes["alpha 1"][0], sizes["alpha 0"][0])  # at the base they are one model
    assert verdict(*exponents(sizes["alpha 1"], DEPTHS)) == "flat"
    p, noise = exponents(sizes["alpha 0"], DEPTHS)
    assert verdict(p, noise) == "not flat"
    block = LAYERS.index("block")
    assert abs(p[0, block]) < 0.1 and p[2, block] - noise[2, block] > 0.5


def test_the_command(tmp_path, capsys):
    """--depths checks depths, and says so; widths that are no depths are refused."""
    words = "coord-check --depths 2 4 8 --widths 16 --steps 1 --seeds 0 1 2 3"
    words += f" --model head_dim=8 max_seq_len=32 --json {tmp_path / 'c.json'}"
    assert muP.main(words.split()) == 0
    out, report = capsys.readouterr().out, json.loads((tmp_path / "c.json").read_text())
    assert "at depth 8 over depth 2" in out and "alpha 1 is farthest from flat" in out
    assert report["sizes"]["alpha 0"].keys() == {"2", "4", "8"}
    assert "2 depths" in error(muP.main, ["coord-check", "--depths", "4"])
    words = ["coord-check", "--depths", "0", "4"]
    assert "--depths [0, 4]" in error(muP.main, words)
    words = "coord-check --depths 2 4 --model n_layers=3".split()
    assert "--model n_layers: the check decides it" in error(muP.main, words)


# --------------------------------------------------------------------------------------------------
# Growth


@pytest.mark.quick
def test_the_masks_of_a_growth_by_hand():
    """2 layers to 6 at alpha = 1: all branches are multiplied by 1/3 of what they were. So an old
    layer has the mask 3 at c = 0, 2 half-way, and none at the end; a new one has c."""
    grown, _, record = grow.grow(build(DEEP), DEEP.replace(n_layers=6), seed=0)
    assert grown.config.branch_mult == pytest.approx(1 / 3)
    for c, old in (0.0, 3.0), (0.5, 2.0):
        grown.set_masks(record, c)
        masks = [block.mask.item() for block in grown.layers.values()]
        assert masks == pytest.approx([old, old, c, c, c, c])
    grown.set_masks(record, 1.0)
    assert all(block.mask is None for block in grown.layers.values())


@pytest.mark.quick
@few
@given(seeds, st.sampled_from([0.5, 1.0]), st.sampled_from(["stack", "interleave", "fresh"]))
def test_growth_after_growth_keeps_the_function(seed, alpha, rule):
    """Two growths in depth one after the other, 2 to 3 to 7 layers: at each the logits stay, to
    1e-12, and no weight of an old layer changes."""
    config = tiny(depth_alpha=alpha, base_layers=3)
    model, tokens = build(config, seed), some_tokens(config, 2, 16, seed=seed)
    for growths, L in (1, 3), (2, 7):
        target = config.replace(n_layers=L)
        options = {"seed": seed, "layers": rule, "growths": growths}
        grown, _, record = grow.grow(model, target, **options)
        assert difference(logits(grown, tokens), logits(model, tokens)) <= 1e-12
        old = dict(model.named_parameters())
        for name, p in grown.named_parameters():
            layer, _ = grow.split_name(name)
            if layer is not None and record["layer_map"][layer] is not None:
                assert torch.equal(p, old[grow.old_name(name, record)])
        grown.set_masks(record, growth_mask(record, 0))
        model = grown


@pytest.mark.quick
def test_copies_start_as_layers_of_the_deeper_model():
    """A model that was only initialised, and copied from 2 layers to 8. With CompleteP the copies
    have the standard deviation that the deeper model's own initial values have; without it theirs
    was made for 2 layers, and is sqrt(8 / 2) times as large."""
    for alpha, factor in (1.0, 1.0), (0.0, 2.0):
        old = tiny(depth_alpha=alpha, base_layers=2, d_ff=400)
        new = old.replace(n_layers=8)
        grown, _, _ = grow.grow(init_weights(FLM(old), 0), new, seed=0)
        for name in ("layers.7.attn.o.weight", "layers.7.ff.down.weight"):
            value = grown.get_parameter(name)
            expected = factor * init_std(new, name)
            # of n draws the deviation scatters by a share of 1 / sqrt(2n)
            assert value.std().item() == pytest.approx(expected, rel=5 / (2 * value.numel()) ** 0.5)


@pytest.mark.quick
def test_what_may_not_change_in_a_growth():
    """alpha and the proxy's depth must stay: both set the multiplier of every branch."""
    text = error(grow.check_growth, DEEP, DEEP.replace(n_layers=4, depth_alpha=0.5, base_layers=3))
    assert "depth_alpha: 1.0 -> 0.5 must stay" in text and "base_layers: 2 -> 3 must stay" in text
    assert "from 0 to 1" in error(tiny, depth_alpha=1.5)
