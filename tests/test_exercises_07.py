"""The exercises of tutorials/07-published-models.md: a docstring states the answer, the code checks
it."""

import torch
from helpers import build, difference, some_tokens, tiny

from flm import count_parameters, preset
from lab.publish import halves_from_pairs


def test_07_exercise_1_without_the_permutation():
    """Nothing fails: the shapes are right, and the sum is the same. The logits are wrong as soon as
    a text has a second token; at one token there is no distance, and they are right."""
    model = build(tiny())
    wrong = build(tiny())
    for block in wrong.layers.values():
        for parameter in (block.attn.qkv.weight, block.attn.qkv.bias):
            rows = halves_from_pairs(parameter.data, model.config.head_dim)
            H = model.config.n_heads
            parameter.data = rows.unflatten(0, (3, H, -1)).transpose(0, 1).flatten(0, 2)
    a, b = (m.layers["0"].attn.qkv.weight.sum() for m in (model, wrong))
    assert torch.isclose(a, b)
    tokens = some_tokens(model.config, 1, 6)
    assert difference(wrong(tokens[:, :1]), model(tokens[:, :1])) < 1e-12
    assert difference(wrong(tokens), model(tokens)) > 1e-3


def test_07_exercise_2_to_the_byte():
    """64: one scalar "masked_bias" in each layer, a constant of the code."""
    parameters = count_parameters(preset("tele-flm-52b").replace(vocab_size=80_896))
    assert 105_665_020_032 // 2 - parameters == 64
