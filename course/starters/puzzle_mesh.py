"""Puzzle puzzle_mesh (chapter 5): which rank stands where.

Read tutorials/05-parallel.md, its beginning and section 5.10; FLM-101B, section 2.4 and Table 2.
Grade it: python -m course.grade puzzle_mesh

Sixteen ranks run on four machines of four GPUs: ranks 0 to 3 on machine 0, ranks 4 to 7 on machine
1, and so on. The layout is pp 4, dp 2, tp 2: each rank has coordinates (pp, dp, tp), pp from 0 to
3, dp and tp 0 or 1. In a step two ranks whose coordinates differ only

    in tp exchange 8 GB        in dp exchange 2 GB        in pp by 1 exchange 0.5 GB

Inside a machine that is fast; between machines it is slow.
"""


def place() -> list[tuple[int, int, int]]:
    """The coordinates of ranks 0 to 15: a list of 16 tuples (pp, dp, tp), entry r for rank r.

    Target: all pairs of ranks on different machines together exchange no more than 6 GB in a step.
    """
    raise NotImplementedError
