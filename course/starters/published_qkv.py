"""Assignment published_qkv (chapter 7): the queries, keys and values of a published model.

Read tutorials/07-published-models.md, section 7.2. Our own layout is in tutorials/01-model.md,
sections 1.2 and 1.3. The layouts are those of published files; no paper states them.
Grade it: python -m course.grade published_qkv

One linear layer makes q, k and v of all heads in one product. Its numbers are the same in three
layouts, and stand in another order in each. H is the number of heads, D (even) the channels of a
head, C the width of x.

    ours       weight (3*H*D, C), y = x @ weight.T + bias. The rows are laid out (H, 3, D): q, k and
               v of head 0, then q, k and v of head 1, and so on
    FLM-101B   weight (C, 3*H*D), y = x @ weight + bias. The columns are laid out (3, H, D): q of
               head 0, q of head 1, and so on, then k of all heads, then v of all heads
    Tele-FLM   three weights (H*D, C), for q, k and v, with y = x @ weight.T + bias. The rows of
               each are laid out (H, D)

A bias has the order of the outputs of its weight. D is not given: it follows from the number of
outputs, 3*H*D, and H.

The three also differ in the pairs of channels that rotary positions turn. For us a pair is channels
2i and 2i+1 of a head. In both published layouts it is channels i and i + D/2. The first of a pair
is the real part of a complex number, the second the imaginary part; i = 0 .. D/2-1 says how fast
the pair turns. Rotary positions turn q and k. They do not turn v, and the order of its channels
must stay: the next matrix reads them in that order.
"""

import torch
from torch import Tensor


def read_qkv(published: Tensor, heads: int) -> Tensor:
    """From the layout of FLM-101B's published weights to ours.

    published: the weight (C, 3*H*D) or the bias (3*H*D,). heads: H.
    Returns the weight (3*H*D, C) or the bias (3*H*D,) in our layout: the same numbers, none
    changed. Do not change `published`.
    """
    raise NotImplementedError


def write_qkv(ours: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """From our layout to that of Tele-FLM.

    ours: the weight (3*H*D, C) or the bias (3*H*D,). heads: H.
    Returns q, k and v: the weights (H*D, C) or the biases (H*D,). Do not change `ours`.
    """
    raise NotImplementedError
