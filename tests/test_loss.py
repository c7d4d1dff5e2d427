"""Tests of the loss and its gradient. That HeadLoss is the plain loss, however many rows it takes
at a time, is a check of the course (tests/test_course_ours.py)."""

import math
from unittest import mock

import pytest
import torch
from helpers import (
    build,
    configs,
    difference,
    few,
    seeds,
    some_targets,
    some_tokens,
    tiny,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from flm import FLM, IGNORE, HeadLoss, loss_sum
from muP import init_weights

pytestmark = pytest.mark.quick


@few
@given(configs(), seeds)
def test_loss_of_a_batch_is_the_sum_over_its_tokens(config, seed):
    """loss_sum, and the model called with targets, are -log p(target) added up in plain Python."""
    model, tokens, targets = (
        build(config, seed),
        some_tokens(config, 3, 5),
        some_targets(config, 3, 5, seed=seed),
    )
    logits, exact = model(tokens), 0.0
    for row, row_targets in zip(logits.tolist(), targets.tolist()):
        for z, target in zip(row, row_targets):
            if target != IGNORE:
                exact += math.log(sum(math.exp(value - z[target]) for value in z))
    scale = max(1.0, logits.abs().max().item()) * 15  # a sum of 15 numbers of at most this size
    assert abs(loss_sum(logits, targets).item() - exact) < 1e-13 * scale
    assert abs(model(tokens, targets).item() - exact) < 1e-13 * scale


def test_nothing_supervised():
    """With every target left out the loss is 0 and every gradient exactly 0, not NaN."""
    model = build(tiny())
    loss = model(some_tokens(tiny(), 2, 5), torch.full((2, 5), IGNORE))
    loss.backward()
    assert loss.item() == 0 and all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("target", [-1, 23])
def test_a_target_outside_the_vocabulary_is_refused(target):
    """A target that is neither an id nor IGNORE is an error, never silently another token."""
    model, targets = build(tiny()), torch.tensor([[1, target, 2]])
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        model(some_tokens(tiny(), 1, 3), targets)


def test_loss_without_gradient():
    """Under no_grad the loss is the same number and carries no graph."""
    model, tokens, targets = build(tiny()), some_tokens(tiny(), 2, 5), some_targets(tiny(), 2, 5)
    with_graph = model(tokens, targets)
    with torch.no_grad():
        without = model(tokens, targets)
    assert (
        without.item() == with_graph.item()
        and with_graph.requires_grad
        and not without.requires_grad
    )


@pytest.mark.parametrize("piece", [50, 2**25])
def test_head_loss_under_autocast(piece):
    """Under bf16 autocast the loss and its gradients are those of loss_sum under it."""
    config = tiny()
    model, tokens, targets = (
        init_weights(FLM(config), 0),
        some_tokens(config, 4, 12),
        some_targets(config, 4, 12),
    )
    with torch.autocast("cpu", torch.bfloat16), mock.patch.object(HeadLoss, "PIECE", piece):
        ours, exact = model(tokens, targets), loss_sum(model(tokens), targets)
    assert ours.dtype == torch.float32
    # The same bf16 products in another order: the value agrees to fp32's rounding over 48 terms.
    # A gradient passes through bf16 once per layer, each time rounded by 2^-9. Sums of many such
    # roundings stay below 2^-6 of the largest entry.
    assert ours.item() == pytest.approx(exact.item(), rel=1e-5)
    grads = zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in (ours, exact)))
    for (name, _), (a, b) in zip(model.named_parameters(), grads):
        assert a.dtype == torch.float32 and difference(a, b) < 2**-6, name


@settings(max_examples=6)
@given(configs(), st.booleans(), seeds)
def test_gradients_are_the_derivatives(config, growing, seed):
    """For every parameter the loss's slope along a random direction, by central differences, is
    the gradient's component along it: tied or not, with and without growth masks."""
    model, tokens, targets = (
        build(config, seed),
        some_tokens(config, 2, 5),
        some_targets(config, 2, 5, seed=seed),
    )
    targets[0, 0] = 1  # something is supervised
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
        slope, exact = (
            (losses[0] - losses[1]) / (2 * step),
            (parameter.grad * direction).sum().item(),
        )
        # Central differences err by step^2 = 1e-10 times the third derivative, and by
        # rounding / step = 1e-10.
        assert abs(slope - exact) < 1e-5 * (1 + parameter.grad.norm().item()), name
