"""lab/timetable.py - which rank of a pipeline computes what, and when.

    python -m lab.cluster draw --pp 4 --micro-batches 8

A pipeline cuts the stack of layers into pipeline stages. While the first micro-batch is on its way
to the last rank, the other ranks wait. The share of all ranks' time in which they wait is the
bubble. A pipeline schedule is the order in which each rank does its work:

    GPipe                  all forward passes, then all backward passes
    1F1B                   a backward pass as soon as there is one: less is in memory
    Interleaved1F1B        two pipeline stages on each rank: a smaller bubble, more messages
    InterleavedZeroBubble  the same, with the backward pass cut in two
    ZBVZeroBubble          the same, with the stages in a V: rank 0 has the first and the last

The order of work is that of PyTorch's own schedules. A run of train.py can use the first three; the
last two are only drawn. Time is counted in forward passes of one micro-batch through one pipeline
stage. A backward pass takes twice as long, and a message takes no time.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable

from torch.distributed.pipelining.schedules import get_schedule_class

import parallel
from console import refuse
from flm import loss_sum

# Pipeline schedule -> how many pipeline stages one rank holds.
SCHEDULES = parallel.PIPELINE_SCHEDULES | {"InterleavedZeroBubble": 2, "ZBVZeroBubble": 2}

# Time of a forward pass (F), of a backward pass (B), and of the two halves of a backward pass: the
# gradient of the inputs (I), for which the stage before waits, and of the weights (W).
UNITS = {"F": 1, "B": 2, "I": 1, "W": 1}


def check_pipeline(pp: int, micro_batches: int, schedule: str) -> list[str]:
    """Every reason why this schedule cannot run so many micro-batches on so many ranks."""
    problems = []
    if schedule not in SCHEDULES:
        problems.append(f"--schedule {schedule}: must be one of {', '.join(SCHEDULES)}")
    for name, value in {"pp": pp, "micro-batches": micro_batches}.items():
        if value < 1:
            problems.append(f"--{name} {value}: must be at least 1")
    if problems:
        return problems
    stages, needs = pp * SCHEDULES[schedule], f"--pp {pp} --schedule {schedule} needs"
    if micro_batches < stages:
        return [f"--micro-batches {micro_batches}: {needs} at least {stages}"]
    if stages > pp and micro_batches % pp:
        return [f"--micro-batches {micro_batches}: {needs} a multiple of {pp}"]
    return []


def order_of_work(pp: int, micro_batches: int, schedule: str) -> list[list[tuple]]:
    """What each rank does, in order: (kind, pipeline stage, micro-batch), kind as in UNITS."""
    last = pp * SCHEDULES[schedule] - 1
    rank_0 = range(0, last + 1, pp) if schedule != "ZBVZeroBubble" else [0, last]
    # Before it runs, a schedule of PyTorch asks the stages of one rank for these fields alone.
    stages = [
        types.SimpleNamespace(
            stage_index=i,
            num_stages=last + 1,
            group_size=pp,
            group_rank=0,
            submod=None,
            is_first=i == 0,
            is_last=i == last,
        )
        for i in rank_0
    ]
    held = stages if len(stages) > 1 else stages[0]
    plan = get_schedule_class(schedule)(held, micro_batches, loss_fn=loss_sum).pipeline_order
    orders = [
        [
            (action.computation_type.value, action.stage_index, action.microbatch_index)
            for action in plan[rank]
            if action is not None and action.computation_type.value in UNITS
        ]
        for rank in range(pp)
    ]
    if schedule == "1F1B":
        # PyTorch 2.13 lists the last stage's forward passes as 1 ... m, but runs 0 ... m-1.
        count = itertools.count()
        orders[-1] = [(k, stage, next(count) if k == "F" else i) for k, stage, i in orders[-1]]
    return orders


def requirement(kind: str, stage: int, micro: int, last: int) -> tuple | None:
    """The work that must be done first, in the form of order_of_work. None: nothing."""
    if kind == "F":
        return ("F", stage - 1, micro) if stage > 0 else None
    if kind == "W":
        return ("I", stage, micro)
    return ("B", stage + 1, micro) if stage < last else ("F", stage, micro)


def timetable(
    pp: int, micro_batches: int, schedule: str = "1F1B"
) -> tuple[list[list[tuple]], float]:
    """When each rank does what: (rows, bubble).

    rows: for each rank its work, (start, kind, pipeline stage, micro-batch), kind and time as in
    UNITS. bubble: the idle share of all ranks' time. Raises ValueError with every reason why there
    is no such pipeline."""
    refuse(check_pipeline(pp, micro_batches, schedule), "this pipeline cannot be drawn:")
    last = pp * SCHEDULES[schedule] - 1
    rows = start_times(order_of_work(pp, micro_batches, schedule), last)
    return rows, idle_share(rows)


def start_times(
    orders: list[list[tuple]], last: int, length: Callable = lambda task: UNITS[task[0]]
) -> list[list[tuple]]:
    """When each rank starts its work: for each rank (start, kind, pipeline stage, micro-batch), as
    early as its order allows.

    orders: as order_of_work returns them. last: the number of the last pipeline stage.
    length(task): the units of time that a task takes. Raises ValueError where the ranks wait for
    each other."""
    waiting = [list(order) for order in orders]
    rows, clock = [[] for _ in orders], [0] * len(orders)
    done = {None: 0}  # (kind, pipeline stage, micro-batch) -> the time at which it is done
    while any(waiting):
        before = len(done)
        for rank, work in enumerate(waiting):
            while work and requirement(*work[0], last) in done:
                kind, stage, micro = task = work.pop(0)
                start = max(clock[rank], done[requirement(*task, last)])
                rows[rank].append((start, *task))
                clock[rank] = done[task] = start + length(task)
                if kind == "I":  # the stage before waits for no more than this
                    done["B", stage, micro] = clock[rank]
        if len(done) == before:
            raise ValueError(f"the ranks wait for each other: {[w[0] for w in waiting if w]}")
    return rows


def idle_share(rows: list[list[tuple]], length: Callable = lambda task: UNITS[task[0]]) -> float:
    """The bubble: the idle share of all ranks' time. rows, length: as in start_times."""
    busy = sum(length(tuple(task)) for row in rows for _, *task in row)
    return 1 - busy / (len(rows) * end_of(rows, length))


def end_of(rows: list[list[tuple]], length: Callable = lambda task: UNITS[task[0]]) -> int:
    """The units of time until all work is done. rows, length: as in start_times."""
    return max(start + length(tuple(task)) for row in rows for start, *task in row)


def closed_bubble(pp: int, micro_batches: int, schedule: str) -> tuple[str, float] | None:
    """The formula of the bubble and its value. None for the zero-bubble schedules: they have none.

    >>> closed_bubble(4, 9, "1F1B")
    ('(p-1)/(m+p-1)', 0.25)
    """
    if schedule not in parallel.PIPELINE_SCHEDULES:
        return None
    v = SCHEDULES[schedule]
    formula = "(p-1)/(m+p-1)" if v == 1 else f"(p-1)/({v}m+p-1)"
    return formula, (pp - 1) / (v * micro_batches + pp - 1)


LEGENDS = {  # number of pipeline stages on a rank -> what the letters mean
    1: "F3 forward pass of micro-batch 3, 1 unit of time; B3 its backward pass, 2 units",
    2: "F3:5 forward pass of micro-batch 3 in pipeline stage 5, 1 unit of time; B3:5 its backward\n"
    "pass, 2 units, or I3:5 and W3:5, the gradients of its inputs and of its weights, 1 unit each",
}


def picture(
    rows: list[list[tuple]],
    name: Callable,
    length: Callable = lambda task: UNITS[task[0]],
    gap: str = " ",
) -> list[str]:
    """A line for each rank, a column for each unit of time, with `gap` between columns.

    rows, length: as in start_times. name(kind, stage, micro): the text of a task."""
    end, grid = end_of(rows, length), []
    for row in rows:
        cells = ["."] * end
        for start, *task in row:
            units = length(tuple(task))
            cells[start : start + units] = [name(*task)] + ["-"] * (units - 1)
        grid.append(cells)
    width = max(len(cell) for cells in grid for cell in cells)
    return [gap.join(cell.ljust(width) for cell in cells).rstrip() for cells in grid]


def draw(pp: int, micro_batches: int, schedule: str = "1F1B") -> str:
    """The timetable as text: a row for each rank, a column for each unit of time."""
    rows, bubble = timetable(pp, micro_batches, schedule)
    stages_per_rank, end = SCHEDULES[schedule], end_of(rows)
    if stages_per_rank == 1:
        lines = picture(rows, lambda kind, stage, micro: f"{kind}{micro}")
    else:
        lines = picture(rows, lambda kind, stage, micro: f"{kind}{micro}:{stage}")
    closed = closed_bubble(pp, micro_batches, schedule)
    formula = f"{closed[0]} = {closed[1]:.1%}" if closed else "no closed formula"
    return "\n".join(
        [
            f"pp {pp}, {micro_batches} micro-batches, {schedule}: {end} units of time, "
            f"bubble {bubble:.1%} ({formula})",
            "",
            *(f"pp rank {rank}  {line}" for rank, line in enumerate(lines)),
            "",
            LEGENDS[stages_per_rank],
        ]
    )
