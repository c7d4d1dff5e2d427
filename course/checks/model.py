"""Checks of chapter 1: xPos, attention with a cache, the loss without all logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from course import oracles
from course.checking import (
    Wrong,
    check,
    expect,
    expect_close,
    normal,
    seeds,
    shown,
    vectors,
)

IGNORE = -100

# --------------------------------------------------------------------------------------------------
# xpos: rotate(q, k, start, origin, theta, scale_base) -> (q, k)

positions = st.integers(0, 3000)
origins = st.integers(0, 2048)
pairs = st.sampled_from([2, 6, 64]).flatmap(lambda D: st.tuples(vectors(D), vectors(D)))
thetas = st.sampled_from([10000.0, 100.0])
bases = st.sampled_from([512.0, 50.0])

near = st.integers(0, 100)


def score(f, q, k, n: int, m: int, origin: int, *rest: float) -> float:
    """The score of query q at position n and key k at position m."""
    x, y = torch.tensor([[q], [k]], dtype=torch.float64)
    turned_q, _ = f.rotate(x, y, n, origin, *rest)
    _, turned_k = f.rotate(x, y, m, origin, *rest)
    return (turned_q[0] @ turned_k[0]).item()


@check("xpos", q_and_k=pairs, n=positions, m=positions, theta=thetas, origin=origins)
def the_score_is_the_papers(f, q_and_k, n, m, theta, origin):
    """The score of a query at position n and a key at position m is the paper's."""
    q, k = q_and_k
    exact = oracles.xpos_score(q, k, n - m, theta, 512.0)
    size = math.hypot(*q) * math.hypot(*k) * max(1.0, (0.4 / 1.4) ** ((n - m) / 512))
    found = score(f, q, k, n, m, origin, theta, 512.0)
    # Angles reach 3000 and are rounded to 3000 * 1e-16: 1e-11 leaves a factor of 30.
    if not abs(found - exact) <= 1e-11 * max(size, 1e-3):
        raise Wrong(f"the score is {shown(found)}, the paper's formula gives {shown(exact)}")


@check("xpos", q_and_k=pairs, n=positions, m=positions, shift=st.integers(1, 900))
def the_score_depends_on_the_distance_alone(f, q_and_k, n, m, shift):
    """Moving query and key by the same number of positions does not change their score."""
    q, k = q_and_k
    here = score(f, q, k, n, m, 8, 10000.0, 512.0)
    there = score(f, q, k, n + shift, m + shift, 8, 10000.0, 512.0)
    size = math.hypot(*q) * math.hypot(*k) * max(1.0, (0.4 / 1.4) ** ((n - m) / 512))
    if not abs(here - there) <= 1e-11 * max(size, 1e-3):
        raise Wrong(f"the score is {shown(here)} here and {shown(there)} there")


@check("xpos", q_and_k=pairs, n=near, m=near, theta=thetas, scale_base=bases)
def theta_and_scale_base_are_what_is_given(f, q_and_k, n, m, theta, scale_base):
    """The score is the paper's for another rotary base and another decay."""
    q, k = q_and_k
    exact = oracles.xpos_score(q, k, n - m, theta, scale_base)
    size = math.hypot(*q) * math.hypot(*k) * max(1.0, (0.4 / 1.4) ** ((n - m) / scale_base))
    found = score(f, q, k, n, m, 8, theta, scale_base)
    if not abs(found - exact) <= 1e-11 * max(size, 1e-3):
        raise Wrong(f"the score is {shown(found)}, the paper's formula gives {shown(exact)}")


@check("xpos", T=st.integers(1, 6), start=st.integers(0, 40), row=st.integers(0, 5), seed=seeds)
def a_position_does_not_move_with_the_length(f, T, start, row, seed):
    """A row comes out the same alone as among others: a key that was rotated and cached when the
    text was short is right when it is long."""
    row %= T
    q, k = normal(seed, 2, T, 4)
    together = f.rotate(q, k, start, 10, 10000.0, 512.0)
    alone = f.rotate(q[row : row + 1], k[row : row + 1], start + row, 10, 10000.0, 512.0)
    for name, one, many in zip("qk", alone, together):
        expect_close(f"{name} alone", one, many[row : row + 1], 1e-13)


@check("xpos", origin=st.integers(0, 600), q_and_k=pairs)
def nothing_changes_at_the_origin(f, origin, q_and_k):
    """At position `origin` query and key stay as they are: the scale there is 1, the angle 0."""
    q, k = torch.tensor(q_and_k, dtype=torch.float64)[:, None]
    for name, before, after in zip("qk", (q, k), f.rotate(q, k, origin, origin, 10000.0, 512.0)):
        expect_close(f"{name} at the origin", after, before, 1e-14)


# --------------------------------------------------------------------------------------------------
# attention: attend(q, k, v, past) -> (y, past)


def attended(f, q, k, v, lengths: list[int]) -> torch.Tensor:
    """The answers to the chunks of a text, one after the other, with a cache: (B, H, T, D)."""
    past, answers = None, []
    for chunk in zip(*(x.split(lengths, dim=2) for x in (q, k, v))):
        y, past = f.attend(*chunk, past)
        answers.append(y)
    return torch.cat(answers, dim=2)


sizes = {"B": st.integers(1, 2), "H": st.integers(1, 2), "D": st.sampled_from([2, 4])}
chunks = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@check("attention", **sizes, T=st.integers(1, 6), seed=seeds)
def one_call_is_causal_attention(f, B, H, D, T, seed):
    """Without a cache every query attends to itself and all before it."""
    q, k, v = normal(seed, 3, B, H, T, D)
    heads = zip(*(x.flatten(0, 1) for x in (q, k, v)))
    exact = torch.stack([oracles.causal_attention(*head) for head in heads])
    expect_close("y", f.attend(q, k, v, None)[0], exact.view(B, H, T, D), 1e-12)


@check("attention", **sizes, lengths=chunks, seed=seeds)
def chunks_are_the_whole(f, B, H, D, lengths, seed):
    """However a text is cut into chunks, with a cache the answers are those of one call."""
    q, k, v = normal(seed, 3, B, H, sum(lengths), D)
    heads = zip(*(x.flatten(0, 1) for x in (q, k, v)))
    exact = torch.stack([oracles.causal_attention(*head) for head in heads]).view(q.shape)
    expect_close("y", attended(f, q, k, v, lengths), exact, 1e-12)


@check("attention", lengths=chunks, at=st.integers(0, 20), seed=seeds)
def nothing_sees_the_future(f, lengths, at, seed):
    """Changing a token's key and value changes no earlier answer."""
    T = sum(lengths)
    q, k, v = normal(seed, 3, 1, 1, T, 2)
    before, at = attended(f, q, k, v, lengths), at % T
    k[:, :, at], v[:, :, at] = 3.0, -5.0
    expect_close("an earlier y", attended(f, q, k, v, lengths)[:, :, :at], before[:, :, :at], 0.0)


@check("attention", size=st.sampled_from([1e3, 1e5]), T=st.integers(1, 3), seed=seeds)
def large_scores_do_not_overflow(f, size, T, seed):
    """Scores of a million make no infinity and no NaN: the softmax is that of the differences."""
    q, k, v = normal(seed, 3, 1, 1, T, 2)
    y, _ = f.attend(size * q, size * k, v, None)
    expect(bool(torch.isfinite(y).all()), f"y holds {shown(y)}")


# --------------------------------------------------------------------------------------------------
# loss: chunked_loss(hidden, weight, targets, rows) -> (loss, d_hidden, d_weight)


def case_of(N: int, C: int, V: int, ignored: int, seed: int) -> tuple:
    """hidden (N, C), weight (V, C), targets (N,), of which the first `ignored` are IGNORE."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(V, (N,), generator=generator)
    targets[:ignored] = IGNORE
    return normal(seed, N, C), normal(seed + 1, V, C), targets


rows = st.integers(1, 7)
counts = {"N": st.integers(1, 6), "C": st.integers(1, 4), "V": st.integers(2, 5)}


@check("loss", **counts, ignored=st.integers(0, 5), rows=rows, seed=seeds)
def the_loss_is_the_sum_over_tokens(f, N, C, V, ignored, rows, seed):
    """The loss is -log p(target), added up over the supervised tokens, for any number of rows at a
    time."""
    hidden, weight, targets = case_of(N, C, V, ignored, seed)
    exact = 0.0
    for logits, target in zip((hidden @ weight.T).tolist(), targets.tolist()):
        exact += 0.0 if target == IGNORE else oracles.token_loss(logits, target)
    expect_close("the loss", f.chunked_loss(hidden, weight, targets, rows)[0], exact, 1e-12)


@check("loss", **counts, ignored=st.integers(0, 5), rows=rows, seed=seeds)
def the_gradients_are_autograds(f, N, C, V, ignored, rows, seed):
    """d_hidden and d_weight are what automatic differentiation of the plain loss gives."""
    hidden, weight, targets = case_of(N, C, V, ignored, seed)
    with torch.enable_grad():
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        plain = F.cross_entropy(x @ w.T, targets, ignore_index=IGNORE, reduction="sum")
        exact = torch.autograd.grad(plain, (x, w))
    _, *found = f.chunked_loss(hidden, weight, targets, rows)
    for name, ours, theirs in zip(("d_hidden", "d_weight"), found, exact, strict=True):
        expect_close(name, ours, theirs, 1e-12)


@check("loss", N=st.integers(1, 3), rows=rows)
def nothing_supervised(f, N, rows):
    """With every target left out the loss is 0 and every gradient exactly 0, not NaN."""
    hidden, weight, targets = case_of(N, 2, 3, N, 0)
    for name, value in zip(
        ("the loss", "d_hidden", "d_weight"), f.chunked_loss(hidden, weight, targets, rows)
    ):
        expect_close(name, value, torch.zeros_like(torch.as_tensor(value).double()), 0.0)


@check("loss", size=st.sampled_from([1000.0, 1e5]))
def large_logits_do_not_overflow(f, size):
    """Logits of a thousand overflow no exponential: the loss is finite and right."""
    hidden = torch.tensor([[size], [-size]], dtype=torch.float64)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], dtype=torch.float64)
    expect_close("the loss", f.chunked_loss(hidden, weight, torch.tensor([0, 1]), 1)[0], size)


@check("loss", rows=st.sampled_from([4, 8]))
def all_logits_never_exist_at_once(f, rows):
    """No tensor is as large as all logits: at most rows x V numbers of them are held at a time."""
    hidden, weight, targets = case_of(64, 4, 512, 3, 0)
    f.chunked_loss(hidden, weight, targets, rows)
    limit = 2 * max(rows * 512, 4 * 512)
    text = (
        f"a tensor has {f.largest:,} numbers; all logits are {64 * 512:,}, the limit is {limit:,}"
    )
    expect(f.largest <= limit, text)
