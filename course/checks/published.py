"""Checks of chapter 7: a published model's queries, keys and values."""

from __future__ import annotations

import cmath

import torch
from hypothesis import strategies as st

from course.checking import check, expect, expect_close, normal, seeds

# --------------------------------------------------------------------------------------------------
# published_qkv: read_qkv(published, heads) -> ours; write_qkv(ours, heads) -> (q, k, v)

sizes = {"H": st.integers(1, 3), "D": st.sampled_from([2, 4, 6, 8]), "C": st.integers(1, 3)}


def score(q: torch.Tensor, k: torch.Tensor, distance: int, pairs: list[tuple[int, int]]) -> float:
    """The score of a query and a key (D,) so many positions apart, with rotary positions.

    pairs: the channels of each pair, the real part first, in the order of their speeds."""
    total = 0.0
    for i, (real, imaginary) in enumerate(pairs):
        turn = cmath.exp(1j * distance * 10000 ** (-i / len(pairs)))
        query, key = complex(q[real], q[imaginary]), complex(k[real], k[imaginary])
        total += (query * turn * key.conjugate()).real
    return total


@check("published_qkv", **sizes, distance=st.integers(0, 30), seed=seeds)
def a_model_reads_the_same(f, H, D, C, distance, seed):
    """With our pairs our weights make the scores that theirs make with their pairs, in every head
    and at every distance, and the same values."""
    theirs, x = normal(seed, C, 3 * H * D), normal(seed + 1, 2, C)
    rows = f.read_qkv(theirs.clone(), H)
    shapes = f"{tuple(rows.shape)}, expected {(3 * H * D, C)}"
    expect(rows.shape == (3 * H * D, C), f"our weight has the shape {shapes}")
    published, ours = (x @ theirs).view(2, 3, H, D), (x @ rows.T).view(2, H, 3, D)
    halves = [(i, i + D // 2) for i in range(D // 2)]
    neighbours = [(2 * i, 2 * i + 1) for i in range(D // 2)]
    for head in range(H):
        q, k, v = published[0, 0, head], published[1, 1, head], published[0, 2, head]
        exact = score(q, k, distance, halves)
        found = score(ours[0, head, 0], ours[1, head, 1], distance, neighbours)
        expect_close(f"the score of head {head}", found, exact, 1e-11)
        expect_close(f"v of head {head}", ours[0, head, 2], v, 1e-12)


@check("published_qkv", H=sizes["H"], D=sizes["D"])
def a_bias_has_the_order_of_its_weight(f, H, D):
    """The bias of each output goes where the weights of that output go."""
    numbers = torch.arange(3.0 * H * D, dtype=torch.float64)
    weight = f.read_qkv(numbers[None].clone(), H)[:, 0]
    expect_close("read_qkv of a bias", f.read_qkv(numbers.clone(), H), weight, 0.0)
    weights, biases = f.write_qkv(numbers[:, None].clone(), H), f.write_qkv(numbers.clone(), H)
    for name, one, many in zip("qkv", biases, weights, strict=True):
        expect_close(f"write_qkv of a bias: {name}", one, many[:, 0], 0.0)


@check("published_qkv", **sizes)
def what_was_read_goes_out_again(f, H, D, C):
    """Read from FLM-101B's layout and written in Tele-FLM's, q, k and v are the three parts of the
    matrix that was read, transposed, number by number."""
    theirs = torch.arange(3.0 * C * H * D, dtype=torch.float64).view(C, 3 * H * D)
    found = f.write_qkv(f.read_qkv(theirs.clone(), H), H)
    expect(len(found) == 3, f"write_qkv returns {len(found)} tensors, expected q, k and v")
    for name, part, exact in zip("qkv", found, theirs.split(H * D, dim=1)):
        expect_close(name, part, exact.T, 0.0)
