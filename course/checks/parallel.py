"""Checks of chapter 5: the order of 1F1B, linear layers on two ranks, a cut gradient's norm."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from course.checking import Wrong, check, expect, expect_close, normal, seeds
from lab.timetable import UNITS, idle_share, picture, start_times

# --------------------------------------------------------------------------------------------------
# one_f_one_b: order(rank, ranks, micro_batches) -> [("F" or "B", micro-batch), ...]

pipelines = st.integers(2, 6).flatmap(
    lambda ranks: st.tuples(st.just(ranks), st.integers(ranks, ranks + 6))
)


def orders_of(f, ranks: int, micro_batches: int) -> list[list[tuple]]:
    """The order of every rank, in the form of lab/timetable.py: rank r holds pipeline stage r."""
    orders = []
    for rank in range(ranks):
        order = f.order(rank, ranks, micro_batches)
        expect(isinstance(order, list), f"the order of rank {rank} is {order!r}, expected a list")
        orders.append([(kind, rank, micro) for kind, micro in order])
    return orders


def expect_each_pass_once(orders: list[list[tuple]], homes: list[list[int]], micro_batches: int):
    """Raise Wrong unless each rank does both passes of every micro-batch in each of its pipeline
    stages, homes[rank], once."""
    for rank, (order, stages) in enumerate(zip(orders, homes)):
        passes = itertools.product("FB", stages, range(micro_batches))
        missing, twice = set(passes) - set(order), [w for w in order if order.count(w) > 1]
        foreign = set(order) - set(itertools.product("FB", stages, range(micro_batches)))
        for what, found in (("lacks", missing), ("repeats", twice), ("has the unknown", foreign)):
            expect(not found, f"rank {rank} {what} {named(min(found, default=()))}")


def named(task: tuple) -> str:
    """A task as the timetable names it."""
    return "" if not task else f"{task[0]}{task[2]} of pipeline stage {task[1]}"


def pass_name(kind: str, stage: int, micro: int) -> str:
    """A pass in a picture of one pipeline stage a rank."""
    return f"{kind}{micro}"


def timed(orders: list[list[tuple]], last: int, length=lambda task: UNITS[task[0]]) -> list:
    """lab.timetable.start_times; Wrong where the ranks wait for each other."""
    try:
        return start_times(orders, last, length)
    except ValueError as error:
        raise Wrong(
            f"this pipeline never ends, {error} (kind, pipeline stage, micro-batch)"
        ) from None


def peaks_of(orders: list[list[tuple]], kept=lambda task: 1.0) -> list[float]:
    """For each rank the most that it keeps at a time: kept(task) from each forward pass until the
    backward pass of its micro-batch."""
    peaks = []
    for order in orders:
        now, most, held = 0.0, 0.0, {}
        for task in order:
            if task[0] == "B":
                now -= held.pop(task[1:], 0.0)
                continue
            held[task[1:]] = kept(task)
            now += held[task[1:]]
            most = max(most, now)
        peaks.append(most)
    return peaks


@check("one_f_one_b", ranks_and_micro_batches=pipelines)
def every_rank_does_every_pass_once(f, ranks_and_micro_batches):
    """Each rank does the forward and the backward pass of every micro-batch once, and the ranks do
    not wait for each other without end."""
    ranks, micro_batches = ranks_and_micro_batches
    orders = orders_of(f, ranks, micro_batches)
    expect_each_pass_once(orders, [[rank] for rank in range(ranks)], micro_batches)
    timed(orders, ranks - 1)


@check("one_f_one_b", ranks_and_micro_batches=pipelines)
def the_bubble_is_the_formula(f, ranks_and_micro_batches):
    """The ranks idle (p-1) / (m+p-1) of the time, for p ranks and m micro-batches, where a backward
    pass takes twice as long as a forward pass."""
    ranks, micro_batches = ranks_and_micro_batches
    rows = timed(orders_of(f, ranks, micro_batches), ranks - 1)
    bubble, exact = idle_share(rows), (ranks - 1) / (micro_batches + ranks - 1)
    drawn = [f"rank {rank}  {row}" for rank, row in enumerate(picture(rows, pass_name))]
    text = "\n".join([f"the bubble is {bubble:.4f}, expected {exact:.4f}:", *drawn])
    expect(abs(bubble - exact) < 1e-12, text)


@check("one_f_one_b", ranks_and_micro_batches=pipelines)
def few_activations_are_kept(f, ranks_and_micro_batches):
    """Rank r keeps the activations of at most p - r micro-batches (4, 3, 2, 1 for four ranks),
    however many micro-batches there are."""
    ranks, micro_batches = ranks_and_micro_batches
    found = [int(peak) for peak in peaks_of(orders_of(f, ranks, micro_batches))]
    limit = [ranks - rank for rank in range(ranks)]
    text = f"the ranks keep {found} micro-batches, the limit is {limit}"
    expect(all(a <= b for a, b in zip(found, limit)), text)


@check("one_f_one_b", ranks_and_micro_batches=pipelines)
def micro_batches_come_in_order(f, ranks_and_micro_batches):
    """Forward passes, and backward passes, come in the order of the micro-batches: messages between
    two ranks are received in the order in which they were sent."""
    for rank, order in enumerate(orders_of(f, *ranks_and_micro_batches)):
        for kind in "FB":
            found = [task[2] for task in order if task[0] == kind]
            expect(found == sorted(found), f"rank {rank} does the {kind} passes {found}")


# --------------------------------------------------------------------------------------------------
# tensor_parallel: column_linear and row_linear(x, weight, bias, d_y) -> (y, d_x, d_weight, d_bias)

sizes = {"N": st.integers(1, 3), "inside": st.integers(1, 3), "outside": st.integers(1, 3)}
ANSWERS = ("y", "d_x", "d_weight", "d_bias")


def exact_linear(N: int, inside: int, outside: int, seed: int) -> tuple[list, list]:
    """Arguments x, weight, bias, d_y of a whole linear layer, and what it answers (ANSWERS)."""
    x, weight = normal(seed, N, inside), normal(seed + 1, outside, inside)
    bias, d_y = normal(seed + 2, outside), normal(seed + 3, N, outside)
    with torch.enable_grad():
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        y = F.linear(*leaves)
        gradients = torch.autograd.grad(y, leaves, d_y)
    return [x, weight, bias, d_y], [y.detach(), *gradients]


def compare(f, name: str, given: list, exact: list, cuts: dict[str, int | None]):
    """Cut arguments and answers over two ranks along the given dimensions (None: whole on both),
    call the function on both, and compare."""

    def cut(values, names):
        shards = [
            [value] * 2 if cuts[key] is None else value.chunk(2, dim=cuts[key])
            for key, value in zip(names, values, strict=True)
        ]
        return [tuple(part.clone() for part in parts) for parts in zip(*shards)]

    calls, expected = cut(given, ("x", "weight", "bias", "d_y")), cut(exact, ANSWERS)
    for rank, found in enumerate(f.on_ranks(name, calls)):
        for key, ours, theirs in zip(ANSWERS, found, expected[rank], strict=True):
            expect_close(f"{key} on rank {rank}", ours, theirs, 1e-12)


@check("tensor_parallel", examples=15, **sizes, seed=seeds)
def columns_are_the_whole_layer(f, N, inside, outside, seed):
    """column_linear: each rank computes its half of the outputs, and the gradient of the whole
    input."""
    given, exact = exact_linear(N, inside, 2 * outside, seed)
    cuts = {"x": None, "weight": 0, "bias": 0, "d_y": 1, "y": 1, "d_x": None}
    compare(f, "column_linear", given, exact, cuts | {"d_weight": 0, "d_bias": 0})


@check("tensor_parallel", examples=15, **sizes, seed=seeds)
def rows_are_the_whole_layer(f, N, inside, outside, seed):
    """row_linear: each rank has half of the input, and ends with the whole output; the bias counts
    once."""
    given, exact = exact_linear(N, 2 * inside, outside, seed)
    cuts = {"x": 1, "weight": 1, "bias": None, "d_y": None, "y": None, "d_x": 1}
    compare(f, "row_linear", given, exact, cuts | {"d_weight": 1, "d_bias": None})


# --------------------------------------------------------------------------------------------------
# grad_norm: square_share(pieces, mesh) -> float; clipped(pieces, square, max_norm) -> [tensor, ...]

meshes = st.fixed_dictionaries({axis: st.integers(1, 3) for axis in ("dp", "tp")})
placements = st.fixed_dictionaries(
    {axis: st.sampled_from(["shard", "replicate"]) for axis in ("dp", "tp")}
)


def pieces_of(gradients: list, cuts: list[dict], mesh: dict, at: dict) -> list[tuple]:
    """(piece, placement along each axis) of every gradient on the rank with coordinates `at`."""
    pieces = []
    for gradient, cut in zip(gradients, cuts):
        for dim, axis in enumerate(("dp", "tp")):
            if cut[axis] == "shard":
                gradient = gradient.chunk(mesh[axis], dim=dim)[at[axis]]
        pieces.append((gradient.clone(), cut))
    return pieces


def total_square(f, gradients: list, cuts: list[dict], mesh: dict) -> float:
    """The sum of square_share over all ranks of the mesh."""
    ranks = [dict(zip(mesh, at)) for at in itertools.product(*map(range, mesh.values()))]
    return sum(f.square_share(pieces_of(gradients, cuts, mesh, at), mesh) for at in ranks)


@check("grad_norm", mesh=meshes, cuts=st.lists(placements, min_size=1, max_size=3), seed=seeds)
def the_shares_add_up(f, mesh, cuts, seed):
    """Summed over all ranks the shares are the square of the whole gradient's norm, however each
    gradient is cut over dp and tp."""
    gradients = [normal(seed + i, mesh["dp"] * 2, mesh["tp"] * 2) for i in range(len(cuts))]
    exact = sum(gradient.square().sum().item() for gradient in gradients)
    expect_close("the sum of all shares", total_square(f, gradients, cuts, mesh), exact, 1e-10)


@check("grad_norm", mesh=meshes, cuts=st.lists(placements, min_size=1, max_size=3), seed=seeds)
def a_clipped_gradient_has_the_largest_norm(f, mesh, cuts, seed):
    """After clipping the whole gradient has the norm max_norm and the direction that it had."""
    gradients = [normal(seed + i, mesh["dp"] * 2, mesh["tp"] * 2) for i in range(len(cuts))]
    square = sum(gradient.square().sum().item() for gradient in gradients)
    factor = 0.5 / math.sqrt(square)
    pieces = pieces_of(gradients, cuts, mesh, {"dp": 0, "tp": 0})
    found = f.clipped(pieces, square, 0.5)
    expect(len(found) == len(pieces), f"{len(found)} pieces came back, expected {len(pieces)}")
    for i, (ours, (piece, _)) in enumerate(zip(found, pieces)):
        expect_close(f"piece {i}", ours, factor * piece, 1e-5)  # PyTorch adds 1e-6 to the norm


@check("grad_norm", size=st.sampled_from([0.0, 1e-3, 0.99]))
def a_short_gradient_stays(f, size):
    """A gradient whose norm is below max_norm is not changed, and one of zeros makes no NaN."""
    piece = torch.tensor([size, 0.0], dtype=torch.float64)
    found = f.clipped([(piece, {"dp": "replicate", "tp": "shard"})], size**2, 1.0)
    expect_close("the piece", found[0], piece, 1e-14)
