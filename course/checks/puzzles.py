"""The puzzles: a target of steps, memory and traffic, and what a student's plan makes of it.

Each puzzle has one check, and a picture of the student's plan beside its target."""

from __future__ import annotations

from course import symbolic
from course.checking import check, expect, shown
from course.checks.parallel import expect_each_pass_once, peaks_of, timed
from lab.timetable import UNITS, end_of, idle_share, picture

RANKS, MICRO = 4, 8

# --------------------------------------------------------------------------------------------------
# puzzle_block and puzzle_sequence: plan() -> ({weight: cut}, [(result, operation, ...), ...])

BLOCK = "(x + o(attention(qkv(norm(x)))))"
BLOCK = f"({BLOCK} + down(gelu(up(norm({BLOCK})))))"
ONE_ALL_REDUCE = int(1.5 * symbolic.TOKENS * symbolic.WIDTHS["C"])  # what a rank of 4 sends


def block_plan(f, layout: str) -> tuple:
    """A student's plan carried out: (cuts, tensors, lines). layout: that of x."""
    answer = f.plan()
    form = isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], dict)
    expect(
        form, f"plan() must return ({{weight: cut}}, [step, ...]), it returns {shown(answer)[:200]}"
    )
    cuts, steps = answer
    for step in steps:
        words = isinstance(step, (tuple, list)) and len(step) > 2
        expect(words, f"a step is (result, operation, argument, ...), not {step!r}")
    for name, cut in cuts.items():
        known = name in symbolic.WEIGHTS and cut in ("rows", "columns", "whole")
        text = (
            f"the cut {name!r}: {cut!r} is unknown: qkv, o, up and down are cut by rows or columns"
        )
        expect(known, text)
    return cuts, *symbolic.run(cuts, steps, symbolic.Symbol("x", layout))


def expect_block(cuts: dict, tensors: dict, lines: list, layout: str):
    """Raise Wrong unless the plan computes the block, with every weight cut, in the layout."""
    expect("y" in tensors, "no step makes y")
    expect(tensors["y"].formula == BLOCK, f"y is {tensors['y'].formula}, expected {BLOCK}")
    found = tensors["y"].layout
    expect(found == layout, f"y has the layout {found}, expected {layout}")
    whole = [name for name in symbolic.WEIGHTS if cuts.get(name, "whole") == "whole"]
    expect(not whole, f"every rank holds all of {', '.join(whole)}: cut each weight over the ranks")
    sent, limit = sum(line.sent for line in lines), 2 * ONE_ALL_REDUCE
    expect(sent <= limit, f"a rank sends {sent:,} numbers, the target is {limit:,}")


def run_or_wrong(f, layout: str) -> tuple:
    """block_plan; Wrong for a step that cannot be carried out."""
    try:
        return block_plan(f, layout)
    except ValueError as error:
        expect(False, str(error))


@check("puzzle_block")
def a_block_in_two_all_reduces(f):
    """The plan computes the block on four ranks, each with a quarter of every weight, and sends no
    more than two all-reduces do."""
    expect_block(*run_or_wrong(f, "whole"), "whole")


@check("puzzle_sequence")
def no_rank_holds_the_whole_stream(f):
    """The same with x and y cut by tokens, for the same traffic: nothing of width C that is kept
    between the two halves of the block, or is added or normalised, is whole on a rank."""
    cuts, tensors, lines = run_or_wrong(f, "tokens")
    expect_block(cuts, tensors, lines, "tokens")
    for line in lines:
        local = line.step.partition(" = ")[2].startswith(("add", "norm"))
        expect(not local or line.layout == "tokens", f"{line.step}: its layout is {line.layout}")


def show_block(f, layout: str) -> str:
    """The steps as a table: what each rank holds and sends."""
    _, _, lines = run_or_wrong(f, layout)
    head = f"{'step':34}{'layout':10}{'a rank holds':>14}{'a rank sends':>14}"
    rows = [f"{x.step:34}{x.layout:10}{x.numbers:>14,}{x.sent:>14,}" for x in lines]
    sent, limit = sum(x.sent for x in lines), 2 * ONE_ALL_REDUCE
    return "\n".join([head, *rows, f"sent in all {sent:,}, target at most {limit:,}"])


# --------------------------------------------------------------------------------------------------
# Pipelines. puzzle_1f1b, puzzle_interleaved and puzzle_memory: orders() -> four lists of work


def read_orders(f, stages: int = 1) -> list[list[tuple]]:
    """The order of each rank as tuples (kind, pipeline stage, micro-batch)."""
    orders = f.orders()
    text = f"orders() must be a list of {RANKS} lists, one for each rank"
    expect(isinstance(orders, list) and len(orders) == RANKS, text)
    if stages > 1:
        return [[tuple(work) for work in order] for order in orders]
    return [[(kind, rank, micro) for kind, micro in order] for rank, order in enumerate(orders)]


def expect_target(rows: list, length, peaks: list, steps: int, limit: list):
    """Raise Wrong unless the timetable ends in time and keeps within the memory."""
    end = end_of(rows, length)
    expect(end <= steps, f"it takes {end} units of time, the target is {steps}")
    text = f"the ranks keep {short(peaks)} at most, the limit is {short(limit)}"
    expect(all(a <= b for a, b in zip(peaks, limit)), text)


def short(numbers: list[float]) -> str:
    """Numbers in a row.

    >>> short([2.0, 1.75])
    '2, 1.75'
    """
    return ", ".join(f"{number:g}" for number in numbers)


def cell(kind: str, stage: int, micro: int) -> str:
    """A task in the picture: small letters for the second pipeline stage of a rank."""
    return f"{kind if stage < RANKS else kind.lower()}{micro}"


def show(rows: list, peaks: list, steps: int, limit: list, length) -> str:
    """The timetable with its steps, bubble and peaks beside the target."""
    end, two_stages = end_of(rows, length), any(work[2] >= RANKS for row in rows for work in row)
    gap = "" if end > 50 else " "
    lines = [f"rank {rank}  {line}" for rank, line in enumerate(picture(rows, cell, length, gap))]
    if two_stages:
        lines.append("F and B: the rank's first pipeline stage; f and b: its second")
    found = f"{end_of(rows, length)} units of time, bubble {idle_share(rows, length):.1%}"
    return "\n".join(
        [
            *lines,
            f"{found}, kept at most: {short(peaks)}",
            f"target: at most {steps} units of time, kept at most: {short(limit)}",
        ]
    )


def plain_length(task: tuple) -> int:
    """The units of time of a task."""
    return UNITS[task[0]]


# puzzle_1f1b: four ranks, one pipeline stage each, eight micro-batches

TARGET_1F1B = (33, [4.0, 3.0, 2.0, 1.0])


@check("puzzle_1f1b")
def one_f_one_b_meets_its_target(f):
    """Eight micro-batches on four ranks take 33 units of time, and rank r keeps at most 4 - r."""
    orders = read_orders(f)
    expect_each_pass_once(orders, [[rank] for rank in range(RANKS)], MICRO)
    expect_target(timed(orders, 3), plain_length, peaks_of(orders), *TARGET_1F1B)


def show_1f1b(f) -> str:
    """The timetable beside its target."""
    orders = read_orders(f)
    return show(timed(orders, 3), peaks_of(orders), *TARGET_1F1B, plain_length)


# puzzle_interleaved: four ranks, two pipeline stages each (s is on rank s % 4), eight
# micro-batches. A stage has half as many layers, so it keeps half as much. PyTorch's own order
# takes 57, too, and keeps 5.5, 4.5, 3.5 and 2.5: its longer start hides messages, free here.

TARGET_INTERLEAVED = (57, [4.0, 3.5, 3.0, 2.5])


def half(task: tuple) -> float:
    """What a pipeline stage keeps of a micro-batch."""
    return 0.5


@check("puzzle_interleaved")
def interleaving_meets_its_target(f):
    """Eight pipeline stages on four ranks: 57 units of time (of half a rank's layers), where one
    stage a rank takes 66; and the ranks keep no more than 4, 3.5, 3 and 2.5."""
    orders = read_orders(f, stages=2)
    expect_each_pass_once(orders, [[rank, rank + RANKS] for rank in range(RANKS)], MICRO)
    peaks = peaks_of(orders, half)
    expect_target(timed(orders, 2 * RANKS - 1), plain_length, peaks, *TARGET_INTERLEAVED)


def show_interleaved(f) -> str:
    """The timetable beside its target."""
    orders = read_orders(f, stages=2)
    rows, peaks = timed(orders, 2 * RANKS - 1), peaks_of(orders, half)
    return show(rows, peaks, *TARGET_INTERLEAVED, plain_length)


# puzzle_memory: as puzzle_1f1b, but a rank may keep no more than 2.5 micro-batches. "f" is a
# forward pass that keeps only its input, a quarter. Its backward pass computes the rest again: it
# takes 3 units, and holds all while it runs. 36 units is the best that a search of ours found.

TARGET_MEMORY = (36, [2.5] * RANKS)


def with_recomputation(orders: list[list[tuple]]) -> tuple:
    """For orders that hold F, f and B: the rows of the timetable, the orders with F in place of f,
    the peaks, and the function length(task) of start_times."""
    lean = {task[1:] for order in orders for task in order if task[0] == "f"}
    plain = [[("F" if kind == "f" else kind, *rest) for kind, *rest in order] for order in orders]

    def length(task: tuple) -> int:
        return UNITS[task[0]] + (task[0] == "B" and tuple(task[1:]) in lean)

    peaks = []
    for order in plain:
        held, most = {}, 0.0
        for kind, *rest in order:
            held[tuple(rest)] = 1.0 if kind == "B" or tuple(rest) not in lean else 0.25
            most = max(most, sum(held.values()))
            if kind == "B":
                held.pop(tuple(rest))
        peaks.append(most)
    return timed(plain, RANKS - 1, length), plain, peaks, length


@check("puzzle_memory")
def recomputation_meets_its_target(f):
    """No rank keeps more than 2.5 micro-batches at a time, and all is done in 36 units of time."""
    rows, plain, peaks, length = with_recomputation(read_orders(f))
    expect_each_pass_once(plain, [[rank] for rank in range(RANKS)], MICRO)
    expect_target(rows, length, peaks, *TARGET_MEMORY)


def show_memory(f) -> str:
    """The timetable beside its target."""
    rows, _, peaks, length = with_recomputation(read_orders(f))
    return show(rows, peaks, *TARGET_MEMORY, length)


# --------------------------------------------------------------------------------------------------
# puzzle_mesh: place() -> [(pp, dp, tp), ...] of ranks 0 to 15, on machines of four GPUs

MESH = {"pp": 4, "dp": 2, "tp": 2}
# GB that two neighbours along an axis exchange in a step: tp and dp between the two ranks of a
# pair, pp between two ranks with neighbouring pipeline stages.
GIGABYTES = {"tp": 8.0, "dp": 2.0, "pp": 0.5}
TARGET_MESH = 6.0


def traffic(places: list[tuple]) -> dict[str, float]:
    """{axis: GB of a step between machines}."""
    machine = {tuple(place): rank // 4 for rank, place in enumerate(places)}
    found = dict.fromkeys(MESH, 0.0)
    for place, here in machine.items():
        for axis, name in enumerate(MESH):
            neighbour = (*place[:axis], place[axis] + 1, *place[axis + 1 :])
            if machine.get(neighbour, here) != here:
                found[name] += GIGABYTES[name]
    return found


@check("puzzle_mesh")
def the_mesh_meets_its_target(f):
    """Each rank has coordinates of its own, and machines exchange no more than 6 GB in a step."""
    places = [tuple(place) for place in f.place()]
    every = {(p, d, t) for p in range(4) for d in range(2) for t in range(2)}
    expect(len(places) == 16, f"there are {len(places)} places, expected 16")
    for rank, place in enumerate(places):
        text = f"rank {rank} has the coordinates {place}: (pp, dp, tp) from (0, 0, 0) to (3, 1, 1)"
        expect(place in every, text)
    missing = every - set(places)
    expect(not missing, f"no rank has the coordinates (pp, dp, tp) = {min(missing, default='')}")
    found = sum(traffic(places).values())
    text = f"machines exchange {found:g} GB in a step, the target is {TARGET_MESH:g}"
    expect(found <= TARGET_MESH, text)


def show_mesh(f) -> str:
    """The machines, their ranks, and what crosses between them."""
    places = [tuple(place) for place in f.place()]
    lines = []
    for machine in range(4):
        ranks = places[4 * machine : 4 * machine + 4]
        lines.append(f"machine {machine}  " + "  ".join(f"pp{p} dp{d} tp{t}" for p, d, t in ranks))
    found = traffic(places)
    crossing = ", ".join(f"{axis} {value:g} GB" for axis, value in found.items())
    total = f"{sum(found.values()):g} GB, target at most {TARGET_MESH:g}"
    return "\n".join([*lines, f"between machines: {crossing}; in all {total}"])


PICTURES = {
    "puzzle_block": lambda f: show_block(f, "whole"),
    "puzzle_sequence": lambda f: show_block(f, "tokens"),
    "puzzle_1f1b": show_1f1b,
    "puzzle_interleaved": show_interleaved,
    "puzzle_memory": show_memory,
    "puzzle_mesh": show_mesh,
}
