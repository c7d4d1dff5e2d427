"""Assignment masked_norm (chapter 3): LayerNorm in which a channel counts as much as its mask.

Read tutorials/03-growth.md, section 3.1; FLM-101B, section 2.3; MSG is arXiv 2305.02869.
Grade it: python -m course.grade masked_norm
"""

import torch
from torch import Tensor


def masked_norm(x: Tensor, gain: Tensor, bias: Tensor, mask: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension, with a growth mask. All tensors are float64.

    x: (..., C), any number of dimensions before the channels: the LayerNorm of each vector (C,) is
    its own. gain, bias: (C,).
    mask: (C,), 1 for a channel that was there before the growth, c in [0, 1] for a new one. The
    channels need not be in that order. At least one mask is 1.
    Returns y (..., C).

        total = sum_i mask_i
        mean  = sum_i mask_i x_i / total
        var   = sum_i mask_i (x_i - mean)^2 / total
        y_i   = ((x_i - mean) / sqrt(var + eps) * gain_i + bias_i) * mask_i

    So at c = 0 nothing reads a new channel, and at c = 1 this is an ordinary LayerNorm.
    """
    raise NotImplementedError
