"""Assignment tensor_parallel (chapter 5): a linear layer cut over two ranks, by hand.

Read tutorials/05-parallel.md, sections 5.1 and 5.2; FLM-101B, section 2.4; Megatron-LM is arXiv
1909.08053. Grade it: python -m course.grade tensor_parallel

The grader calls each function on two ranks at the same time, in two processes. A process group on
gloo is there already: dist.all_reduce(tensor) puts the sum over both ranks into `tensor`, on both
(it changes the tensor that it is given, and returns None). Both ranks must call it, equally often.
All tensors are float64. No automatic differentiation: compute the gradients by these formulas.

A whole layer is y = x @ weight.T + bias, with x (N, inside), weight (outside, inside), bias
(outside,), y (N, outside). For a gradient d_y of y:

    d_x = d_y @ weight        d_weight = d_y.T @ x        d_bias = d_y summed over the N rows
"""

import torch
import torch.distributed as dist
from torch import Tensor


def column_linear(
    x: Tensor, weight: Tensor, bias: Tensor, d_y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A layer whose OUTPUTS are cut: each rank computes half of them.

    x: (N, inside), whole, the same on both ranks. weight: (outside / 2, inside), bias: (outside /
    2,) and d_y: (N, outside / 2): this rank's half.
    Returns y (N, outside / 2), this rank's half; d_x (N, inside), the gradient of the WHOLE layer's
    input; d_weight and d_bias, of this rank's half.
    """
    raise NotImplementedError


def row_linear(
    x: Tensor, weight: Tensor, bias: Tensor, d_y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A layer whose INPUTS are cut: each rank reads half of them.

    x: (N, inside / 2) and weight: (outside, inside / 2): this rank's half. bias: (outside,) and
    d_y: (N, outside): whole, the same on both ranks.
    Returns y (N, outside), whole on both ranks; d_x (N, inside / 2) and d_weight, of this rank's
    half; d_bias (outside,), whole.
    """
    raise NotImplementedError
