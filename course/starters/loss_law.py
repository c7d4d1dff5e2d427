"""Assignment loss_law (chapter 4): the law by which the loss falls with the size.

Read tutorials/04-mup.md, section 4.3; FLM-101B, section 3; muScaling is arXiv 2304.06875.
Grade it: python -m course.grade loss_law
"""


def fit_law(N: list[float], loss: list[float]) -> tuple[float, float, float]:
    """The law L = a N**b + c through some sizes and their losses, by least squares.

    N: sizes in millions of parameters, above 0. loss: a loss for each, in nats per token. The same
        size may be there twice.
    Returns a, b and c with the smallest sum of (a N_i**b + c - loss_i)**2, for b between -4 and
    -0.02. Raises ValueError where there are fewer than 4 different sizes.

    c is the loss of an infinitely large model, and not 0. At a given b the law is linear in a and
    c, and the best a and c are those of a straight line through (N_i**b, loss_i). So b alone has to
    be searched: try many, then finer ones around the best. The grader asks for squares within a
    millionth of the smallest, and for b to 0.0001. numpy is allowed, scipy.optimize is not.
    """
    raise NotImplementedError
