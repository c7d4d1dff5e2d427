"""Puzzle puzzle_block (chapter 5): a transformer block in two all-reduces.

Read tutorials/05-parallel.md, sections 5.1 and 5.2; FLM-101B, section 2.4; Megatron-LM is arXiv
1909.08053. Grade it: python -m course.grade puzzle_block

Four ranks compute a block together. Each may hold a quarter of each weight, no more. You say how
each weight is cut, and what is done. Nothing is computed: the grader follows the layouts.

A tensor has one of these layouts over the four ranks:

    whole       each rank holds all of it
    channels    each rank holds a quarter of the last dimension (some heads, some hidden units)
    tokens      each rank holds a quarter of the positions
    terms       each rank holds one term: the tensor is the sum of the four

The weights (outputs, inputs): qkv (3C, C), o (C, C), up (F, C), down (C, F). Cut each by "rows":
a rank computes a quarter of the outputs, or by "columns": a rank reads a quarter of the inputs.

    linear(x, weight)    rows: takes whole, makes channels. columns: takes channels, makes terms
    attention(x)         of q, k and v together (what qkv makes): takes and makes whole or channels
    gelu(x)              takes and makes whole, channels or tokens
    norm(x)              takes and makes whole or tokens: it needs all channels of a position
    add(a, b)            two tensors of the same layout; it makes that layout
    all_reduce(x)        takes terms, makes whole; a rank sends 1.5 times the tensor
    reduce_scatter(x)    takes terms, makes tokens; a rank sends 0.75 times the tensor
    all_gather(x)        takes tokens or channels, makes whole; a rank sends 0.75 times the tensor
"""


def plan() -> tuple[dict[str, str], list[tuple[str, ...]]]:
    """How the weights are cut, and the steps.

    Returns ({"qkv": "rows" or "columns", ...}, [(result, operation, argument, ...), ...]). A step
    gives its result a name that later steps use: ("a", "norm", "x") or ("b", "linear", "a", "qkv").
    The tensor "x" (tokens, C) is there at the start, whole. At the end there must be "y", whole:

        z = x + o(attention(qkv(norm(x))))        y = z + down(gelu(up(norm(z))))

    a + b and b + a are the same. Target: in all steps together a rank sends no more than in two
    all-reduces of a tensor (tokens, C).
    """
    raise NotImplementedError
