"""Puzzle puzzle_1f1b (chapter 5): a pipeline with little waiting and little memory.

Read tutorials/05-parallel.md, section 5.5. Grade it: python -m course.grade puzzle_1f1b
The grader draws your timetable: try some orders, and look.

Four ranks hold one pipeline stage each: rank r holds stage r. There are eight micro-batches, 0 to
7. A forward pass ("F") takes 1 unit of time and needs the forward pass of the stage before. A
backward pass ("B") takes 2 units and needs the backward pass of the stage after; on the last rank
it needs the forward pass there. A rank works in its order, and waits where the next work is not
possible yet. It keeps the activations of a micro-batch from its F to its B.
"""


def orders() -> list[list[tuple[str, int]]]:
    """What each rank does, in order: four lists of ("F", micro-batch) and ("B", micro-batch).

    Target: all is done after 33 units of time, and ranks 0, 1, 2 and 3 keep at most 4, 3, 2 and 1
    micro-batches at a time.
    """
    raise NotImplementedError
