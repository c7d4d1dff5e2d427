"""Puzzle puzzle_interleaved (chapter 5): two pipeline stages on each rank.

Solve puzzle_1f1b first: the rules of time are there.
Read tutorials/05-parallel.md, section 5.5; Narayanan et al., arXiv 2104.04473, section 2.2.
Grade it: python -m course.grade puzzle_interleaved

The layers are cut into eight pipeline stages, 0 to 7. Rank r holds the stages r and r + 4, so a
micro-batch passes through every rank twice. A unit of time is a forward pass through one of these
smaller stages, and a stage keeps half of what a stage kept in puzzle_1f1b. In these units
puzzle_1f1b takes 66.
"""


def orders() -> list[list[tuple[str, int, int]]]:
    """What each of the four ranks does, in order: ("F" or "B", pipeline stage, micro-batch).

    Each rank does F and B of its two stages for the micro-batches 0 to 7.

    Target: all is done after 57 units of time, and ranks 0, 1, 2 and 3 keep at most 4, 3.5, 3 and
    2.5 micro-batches at a time (a stage's share of one counts 0.5). PyTorch's own order takes 57
    too, but keeps 5.5, 4.5, 3.5 and 2.5: it starts with more forward passes, so that messages,
    which take no time here, have time to arrive.

    A way: take the micro-batches in groups of four. Forward passes: the four in stage r, the same
    four in stage r + 4, then the next group. Backward passes: the four in stage r + 4, then in
    stage r, then the next group. Begin with some forward passes, then do one of each in turn. How
    many of them come first on rank r?
    """
    raise NotImplementedError
