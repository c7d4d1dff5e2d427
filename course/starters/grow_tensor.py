"""Assignment grow_tensor (chapter 3): a larger tensor that starts from a smaller one.

Read tutorials/03-growth.md, sections 3.1 and 3.3; FLM-101B, section 2.3; MSG is arXiv 2305.02869.
Grade it: python -m course.grade grow_tensor
"""

import torch
from torch import Tensor


def grow_parameter(name: str, old: Tensor, fresh: Tensor, r: float) -> Tensor:
    """The grown value of a parameter. All tensors are float64.

    name: the parameter, one of
        embedding.weight (V, C), tied: it is the head too
        layers.N.attn_norm.weight, layers.N.attn_norm.bias, and the same of ff_norm: (C,)
        layers.N.attn.qkv.weight (3*H*D, C) and .bias: the rows are laid out (H, 3, D), that is:
            q, k and v of head 0, then q, k and v of head 1, and so on
        layers.N.attn.o.weight (C, H*D) and .bias
        layers.N.ff.up.weight (F, C), layers.N.ff.down.weight (C, F), and their biases
        norm.weight, norm.bias (C,): the final LayerNorm, before the head
    old: its value in the small model.
    fresh: a tensor of the new shape, with the values that everything new starts from. Any of C, H
        and F may be larger than in the small model; D and V are not.
    r: how much wider the model becomes, new C / old C.
    Returns the new tensor, of the shape of `fresh`. Do not change `old` or `fresh`.

    The old values stand in the leading block; new heads come after the old ones; all that is new
    is as in `fresh`. The grown model then computes exactly what the small one did, while its growth
    masks are 0. One thing is left to do for that. muP multiplies the logits by a number that is
    proportional to 1 / C, so the growth divides them by r. The old values of the parameters that
    feed the head make up for it. (The embedding is not one of them: it also feeds the first layer.)
    """
    raise NotImplementedError
