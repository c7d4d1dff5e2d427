"""Assignment loss (chapter 1): the loss and its gradients without all logits.

Read tutorials/01-model.md, section 1.6; FLM-101B, section 2.2.
Grade it: python -m course.grade loss
"""

import torch
from torch import Tensor


def chunked_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed cross-entropy of N tokens, and its gradients, `rows` tokens at a time.

    hidden: (N, C), float64, what the last norm gives for each token.
    weight: (V, C), float64, the head: token i has the logits weight @ hidden[i], (V,).
    targets: (N,), int64: the right id of each token, or -100 where the token is not supervised.
    rows: how many tokens' logits may exist at a time. The last piece may be shorter.
    Returns the loss (), its gradient d_hidden (N, C), and its gradient d_weight (V, C).

    The loss is the SUM over the supervised tokens of -log softmax(logits)[target], in nats. (It is
    divided later, once, by the number of supervised tokens in the whole batch.) With p the softmax
    of a token's logits, and "one-hot" 1 at the target and 0 elsewhere:

        d_logits = p - one-hot      for a supervised token, 0 for any other
        d_hidden = d_logits @ weight
        d_weight = the sum over tokens of d_logits (as a column) times hidden (as a row)

    No tensor may hold more than about rows x V numbers (or as many as weight has). Logits may be as
    large as 100,000: lower all logits of a token by their maximum before the exponential. No
    automatic differentiation is needed; the grader calls you with it switched off.
    """
    raise NotImplementedError
