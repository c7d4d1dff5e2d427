"""Assignment grow_moments (chapter 3): AdamW's state of a parameter that grew.

Read tutorials/03-growth.md, sections 3.2 and 3.3; FLM-101B, section 2.3. What becomes of the
optimizer is not stated there; this is this repository's choice.
Grade it: python -m course.grade grow_moments
"""

import torch
from torch import Tensor


def grow_moments(
    name: str, state: dict[str, Tensor] | None, shape: list[int], r: float
) -> dict[str, Tensor]:
    """AdamW's state of a grown parameter.

    name: the parameter, such as "layers.0.ff.up.weight", "layers.0.ff_norm.weight", "norm.weight"
        or "norm.bias". The last two are those of the final LayerNorm.
    state: AdamW's state in the small model: {"exp_avg": a running mean of the gradient,
        "exp_avg_sq": of the gradient's square, "step": the number of updates, a tensor ()}. None
        for a layer that is new. The moments are float64, of one or two dimensions; AdamW counts
        `step` in float32.
    shape: the new shape of the parameter, of as many dimensions. r: new d_model / old d_model.
    Returns the new state, with the same three keys: the moments float64, `step` a tensor ().

    The old moments stand in the leading block, and new entries are 0, as if their gradients had
    been 0 so far. `step` is kept. A layer that is new has moments of 0 and step 0.

    In the assignment grow_tensor the old values of the final LayerNorm, norm.weight and norm.bias,
    are multiplied by r, and what the model computes stays. Let f be the loss of the small model as
    a function of such a parameter w, and g that of the grown model: f(w) = g(r w). How do the
    gradients of f at w and of g at r w compare? The moments of these two parameters must be those
    of g's gradients: exp_avg_sq is a mean of squares.
    """
    raise NotImplementedError
