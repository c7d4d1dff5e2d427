"""Assignment xpos (chapter 1): rotary positions with a decay.

Read tutorials/01-model.md, sections 1.3 and 1.4; FLM-101B, section 2.1; xPos is arXiv 2212.10554.
Grade it: python -m course.grade xpos
"""

import torch
from torch import Tensor


def rotate(
    q: Tensor, k: Tensor, start: int, origin: int, theta: float, scale_base: float
) -> tuple[Tensor, Tensor]:
    """Queries and keys of one head, with their positions turned in. All tensors are float64.

    q, k: (T, D), D even. Row t is the token at position start + t of the text.
    Returns the new q and the new k, (T, D) each.

    Channels 2i and 2i+1 form pair i = 0 .. D/2-1. Read a pair as one complex number: channel 2i is
    the real part, channel 2i+1 the imaginary part. With n = start + t - origin and j the imaginary
    unit, a pair is multiplied by

        query    zeta_i ** (+n / scale_base) * exp(j n theta_i)
        key      zeta_i ** (-n / scale_base) * exp(j n theta_i)

        theta_i = theta ** (-2i / D)        zeta_i = (2i / D + 0.4) / 1.4

    (The paper has theta 10000 and scale_base 512.) Multiplying by exp(j a) turns the pair by the
    angle a: (x, y) becomes (x cos a - y sin a, x sin a + y cos a). The score of a query and a key
    is then a function of their distance alone, and decays with it.

    Positions count from `origin`, which belongs to the model: they must not depend on T.
    """
    raise NotImplementedError
