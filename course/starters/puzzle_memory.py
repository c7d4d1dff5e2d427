"""Puzzle puzzle_memory (chapter 5): less memory, and some work twice.

Solve puzzle_1f1b first: the rules of time are there.
Read tutorials/05-parallel.md, section 5.9. Grade it: python -m course.grade puzzle_memory

As in puzzle_1f1b, but no rank has memory for more than 2.5 micro-batches. There is a second kind of
forward pass, "f": it keeps the input of the stage alone, which is a quarter of a micro-batch. Its
backward pass computes the rest again: it takes 3 units of time in place of 2, and while it runs the
rank keeps the whole micro-batch.
"""


def orders() -> list[list[tuple[str, int]]]:
    """What each of the four ranks does: lists of ("F" or "f", micro-batch) and ("B", micro-batch).

    A rank may do "F" for some micro-batches and "f" for others: one of them for each.

    Target: no rank keeps more than 2.5 micro-batches at a time, and all is done after 36 units of
    time. (With "f" everywhere it takes 44, and without any "f", by waiting, 69.)
    """
    raise NotImplementedError
