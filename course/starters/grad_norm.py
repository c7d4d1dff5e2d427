"""Assignment grad_norm (chapter 5): the norm of a gradient that is cut over many ranks.

Read tutorials/05-parallel.md, sections 5.3 and 5.4; FLM-101B clips the gradient at 1.0 (section
2.4). Grade it: python -m course.grade grad_norm

A rank's gradients are a list of (piece, placement). piece: a float64 tensor, what this rank holds
of the gradient of one parameter. placement: for each axis of the mesh, {"dp": ..., "tp": ...},
"shard": the ranks along this axis hold different pieces, or "replicate": they hold copies of the
same numbers.
"""

import torch
from torch import Tensor


def square_share(pieces: list[tuple[Tensor, dict[str, str]]], mesh: dict[str, int]) -> float:
    """This rank's share of the squared norm of the whole gradient.

    The whole gradient is that of all parameters together, as one process would have it. Its squared
    norm is the sum of the squares of all its numbers, each counted once.
    mesh: the number of ranks along each axis, such as {"dp": 2, "tp": 4}: 8 ranks.
    Returns a float. The grader adds the shares of all ranks: the sum must be the squared norm.
    """
    raise NotImplementedError


def clipped(
    pieces: list[tuple[Tensor, dict[str, str]]], square: float, max_norm: float
) -> list[Tensor]:
    """This rank's pieces of the clipped gradient, in the same order.

    square: the squared norm of the whole gradient, the sum over all ranks. A gradient whose norm is
    above max_norm is multiplied by max_norm / norm; any other stays as it is. A gradient of zeros
    makes no NaN. Do not change the pieces that you are given.
    """
    raise NotImplementedError
