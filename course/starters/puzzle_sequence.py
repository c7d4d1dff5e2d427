"""Puzzle puzzle_sequence (chapter 5): sequence parallelism.

Solve puzzle_block first: layouts, weights and operations are explained there.
Read tutorials/05-parallel.md, section 5.2; FLM-101B, section 2.4; sequence parallelism is arXiv
2205.05198. Grade it: python -m course.grade puzzle_sequence
"""


def plan() -> tuple[dict[str, str], list[tuple[str, ...]]]:
    """How the weights are cut, and the steps, as in puzzle_block.

    In puzzle_block every rank normalises and adds the whole of x, four times the same. Here "x" is
    cut by tokens at the start, and "y" must be cut by tokens at the end. Every norm and every add
    must make the layout tokens, so that each rank keeps a quarter of the residual stream.

    Target: in all steps together a rank sends no more than in two all-reduces of a tensor
    (tokens, C).
    """
    raise NotImplementedError
