"""Assignment attention (chapter 1): causal attention with a cache.

Read tutorials/01-model.md, section 1.5; FLM-101B, section 2.1.
Grade it: python -m course.grade attention
"""

import torch
from torch import Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Attention of the newest T tokens to themselves and to all tokens before them.

    q, k, v: (B, H, T, D), float64, of the newest tokens. Positions are turned into q and k already.
    past: None at the start of a text; else what the call before returned: the keys and the values
    of all P tokens so far, (B, H, P, D) each.
    Returns y (B, H, T, D), and the keys and the values of all P + T tokens, for the next call.

    Query t of this call is token P + t of the text. It sees the tokens 0 .. P + t, itself included:

        y_t = sum over m <= P + t of w_m v_m,    w = softmax over those m of (q_t . k_m / sqrt(D))

    However a text is cut into calls, the answers are those of one call. Scores may be as large as
    10 billion: a softmax does not change when all its scores are lowered by the same number.
    """
    raise NotImplementedError
