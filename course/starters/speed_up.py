"""Assignment speed_up (chapter 8): what a run is worth, measured at equal loss.

Read tutorials/03-growth.md, section 3.7, and tutorials/08-recipe.md, section 8.4. G_stack (arXiv
2405.15319) reports this number less 1, in percent. The straight line between the runs and the
bounds beyond them are this project's choice. (lab.growth bends the line towards a third run.)
Grade it: python -m course.grade speed_up
"""


def speed_up(
    scratch: list[tuple[float, float]], flops: float, loss: float
) -> tuple[float | None, str]:
    """The FLOPs that training from scratch needs for a loss, divided by what another run needed.

    scratch: (FLOPs, loss) of each run from scratch, in any order, no two with the same FLOPs. They
        are runs of one model with different budgets.
    flops: what the other run took, in the same unit. loss: what it reached. All FLOPs are above 0.
    Returns a number and a mark, "", "<" or ">". The grader asks for five digits.

    Let F1 and F2 be the FLOPs of two runs from scratch that are neighbours in the order of FLOPs,
    with the losses L1 > L2. Between them the loss is a straight line in log FLOPs:

        loss(F) = L1 + (L2 - L1) * log(F / F1) / log(F2 / F1)

    The number is F / flops, for the F at which this line has the loss; the mark is "". At a run's
    own loss, F is that run's FLOPs. No line is extended beyond the runs. There the number is a
    bound, and the mark says so:

        the loss is above that of the run with the fewest FLOPs: (its FLOPs / flops, "<")
        the loss is below that of the run with the most FLOPs:   (its FLOPs / flops, ">")

    (None, ""), whatever the loss, where there is no line that falls: with fewer than two runs, and
    where a run has the same loss as a run with fewer FLOPs, or a higher one.

    Example: speed_up([(1.0, 3.0), (4.0, 2.0)], 1.0, 2.5) is (2.0, ""): halfway down in loss is
    halfway in log FLOPs.
    """
    raise NotImplementedError
