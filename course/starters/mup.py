"""Assignment mup (chapter 4): what muP makes of the proxy's hyper-parameters.

Read tutorials/04-mup.md, section 4.1; FLM-101B, section 3; muP is arXiv 2203.03466.
Grade it: python -m course.grade mup

Both functions take:

kind: what the parameter is: "embedding", "head" (untied), "norm" (the gain of a LayerNorm), "bias"
    (of a layer or of a LayerNorm), or a matrix of a block: "qkv", "o", "up", "down".
config: {"n_layers": L, "d_model": C, "n_heads": H, "head_dim": D, "d_ff": F, "base_width": the
    width of the proxy, on which the hyper-parameters were searched, "init_std": s, found there}.

m, the width ratio of a matrix, is its fan-in divided by the fan-in that it has in the proxy. The
fan-in is the number of channels that a matrix reads: C for qkv and up, H * D for o, F for down. The
proxy has C = H * D = base_width and F = 4 * base_width. For everything that is no matrix of a block
m is 1.
"""


def initial_std(kind: str, config: dict) -> float:
    """The standard deviation of the initial values of a matrix, an embedding or a head.

    s for the embedding and the head; s / sqrt(m) for qkv and up; for o and down, which write into
    the residual stream, where 2 L branches add up, s / sqrt(2 L m).
    """
    raise NotImplementedError


def adamw_group(kind: str, config: dict, lr: float, decay: float) -> tuple[float, float]:
    """AdamW's learning rate and weight decay for a parameter of this kind.

    lr, decay: those of the proxy. The learning rate is lr / m. In a step AdamW takes the share
    (learning rate * weight decay) off each weight, and that share must not depend on the width.
    Biases and norms do not decay at all.
    """
    raise NotImplementedError
