"""lab/pictures.py - the pictures that lab/report.py shows, as data, and how they are drawn.

    1. what a picture is     Line, Panel, Picture: plain numbers and words
    2. of studies            what coord-check, lab.transfer, lab.growth and the IQ evaluation wrote
    3. computed              xPos, the growth masks of a block, timetables, the grid of ranks
    4. drawing               with matplotlib, which nothing else in this repository needs

Every picture is a pure function of its numbers, so drawing it again gives the same file.
"""

from __future__ import annotations

import html
import io
import itertools
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import torch

import iqeval
from flm import PRESETS, xpos_tables
from lab.publish import pairs_from_halves
from lab.timetable import UNITS, timetable
from parallel import Layout

# --------------------------------------------------------------------------------------------------
# 1. What a picture is

GREY = -1  # a color: of what is there for comparison


@dataclass(frozen=True)
class Line:
    """Points of one kind. look: matplotlib's word for markers and line, such as "o-" or ":"."""

    points: list[tuple[float, float]]
    look: str = "o-"
    color: int | None = None  # a place in COLORS; None: the place of the line in its panel
    width: float = 1.2  # of the line, in points


@dataclass(frozen=True)
class Box:
    """A rectangle with a text in it; `x` and `y` are its corner at the lower left."""

    x: float
    y: float
    width: float
    height: float
    text: str
    fill: str
    name: str = ""  # in the table of the numbers, where it is not the text


@dataclass(frozen=True)
class Panel:
    """One pair of axes. Without labels of x and y, a diagram without axes."""

    title: str  # what to see
    x: str = ""  # labels, with units
    y: str = ""
    lines: dict[str, Line] = field(default_factory=dict)
    log: str = ""  # the logarithmic axes: "", "x", "y" or "xy"
    marks: list[tuple[float, str]] = field(default_factory=list)  # vertical lines with a word
    boxes: list[Box] = field(default_factory=list)
    arrows: list[tuple] = field(default_factory=list)  # ((x, y) of the tail, (x, y) of the head)
    words: list[tuple[float, float, str]] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)  # names along y, the first one on top
    equal: bool = False  # one unit is as long on x as on y
    font: float = 8  # size of the letters in boxes, in points


@dataclass(frozen=True)
class Picture:
    """Panels under one title, which says what to see. height: of a row of panels, in inches."""

    title: str
    panels: list[Panel]
    columns: int = 2
    height: float = 3.3


def table(panel: Panel) -> tuple[list[str], list[list]]:
    """The numbers of a panel: (names of the columns, rows). A column for each line; None
    where a line has no point at that x. Of a diagram: a row for each box.

    >>> table(Panel("t", "x", "y", {"a": Line([(1, 2), (3, 4)]), "b": Line([(3, 5)])}))
    (['x', 'a', 'b'], [[1, 2, None], [3, 4, 5]])
    """
    if panel.boxes:
        named = panel.rows[::-1] or {}
        places = [named[int(box.y)] if named else box.y for box in panel.boxes]
        rows = [[p, b.x, b.x + b.width, b.name or b.text] for p, b in zip(places, panel.boxes)]
        return ["row", "from", "to", "what"], rows
    cells: dict[tuple, dict] = {}  # {(x, how many points of the line at x came before): a row}
    for name, line in panel.lines.items():
        seen = Counter()
        for x, y in line.points:
            cells.setdefault((x, seen[x]), {})[name] = y
            seen[x] += 1
    rows = [[x, *(cells[x, n].get(name) for name in panel.lines)] for x, n in sorted(cells)]
    return [panel.x, *panel.lines], rows


def digest(picture: Picture) -> str:
    """Eight letters of all numbers and words of a picture: an SVG has them, so that it can be seen
    whether it is still the picture of its numbers. Four digits of a number count."""

    def rounded(value):
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [rounded(item) for item in value]
        return f"{value:.4g}" if isinstance(value, float) else value

    return f"{zlib.crc32(repr(rounded(asdict(picture))).encode()):08x}"


# --------------------------------------------------------------------------------------------------
# 2. Of studies

SHOWN_LAYERS = ("q", "k", "v", "attn.o", "ff.up", "ff.down", "block", "logits")
LIMIT = 1 / 3  # of muP.py's verdict: sizes may grow as width^p with |p| up to this


def or_gap(loss: float | None) -> float:
    """A loss as a point of a line. What diverged has none, and leaves a gap."""
    return math.nan if loss is None else loss


def coord_check(report: dict) -> Picture:
    """Sizes of activations over the width or the depth, at the last step, relative to the smallest
    model."""
    axis, panels = report["axis"], []
    for name, by_width in report["sizes"].items():
        widths = sorted(by_width, key=int)
        narrow, last = by_width[widths[0]][-1], len(by_width[widths[0]]) - 1
        lines, largest = {}, 0
        for layer in SHOWN_LAYERS:
            points = [(int(w), by_width[w][-1][layer] / narrow[layer]) for w in widths]
            lines[layer] = Line(points)
            largest = max(largest, points[-1][1])
        for sign, label in ((1, "limit, growing"), (-1, "limit, shrinking")):
            bound = [(int(w), (int(w) / int(widths[0])) ** (sign * LIMIT)) for w in widths]
            lines[label] = Line(bound, ":", GREY)
        title = f"{name}, step {last}: at most {largest:.3g} times as large"
        panels.append(Panel(title, axis, f"mean |activation| / {axis} {widths[0]}", lines, "xy"))
    question = f"Do activations grow with the {axis}?"
    return Picture(f"{question} {report['tested']} is {report['verdict']}", panels)


def sweep(report: dict) -> Picture:
    """Held-out loss over the hyper-parameter: a panel for each parametrization, a line for each
    width, a star at the best value of each."""
    axis, panels = report["axis"], []
    for name, by_width in report["landscape"].items():
        lines, stars = {}, []
        for width, row in sorted(by_width.items(), key=lambda item: int(item[0])):
            points = [(float(value), or_gap(loss)) for value, loss in row.items()]
            lines[f"width {width}"] = Line(points)
            alive = [point for point in points if not math.isnan(point[1])]
            stars += [min(alive, key=lambda point: point[1])] if alive else []
        best = [x for x, _ in stars]
        title = f"{name}: everything diverged"
        if best:
            title = f"{name}: the best {axis} is {min(best):g} to {max(best):g}"
            lines["best of its width"] = Line(stars, "*", GREY)
        x = {"lr": "learning rate"}.get(axis, axis)
        panels.append(Panel(title, x, "held-out loss, nats per token", lines, "x"))
    return Picture(f"Does the narrow model's best {axis} hold for the wide ones?", panels)


MOST_LINES = 8  # of a panel: with more, nobody could tell them apart


def growth(report: dict) -> Picture:
    """Two panels. Held-out loss over FLOPs, a line for each schedule, left out where there are too
    many. (lab.growth reads speed-ups from a curve a little below the straight lines from scratch.)
    And the speed-ups over the time of the last growth, where there are three times or
    more."""
    rows = report["rows"]
    losses: dict[str, Line] = {}
    for row in rows:
        line = losses.setdefault(row["name"], Line([]))
        line.points.append((row["tflop"], or_gap(row["mean"]["loss"])))
    best = max(rows, key=lambda row: row["any_size"] or 0)
    panels = []
    if len(losses) <= MOST_LINES:
        losses.update(same_loss(rows, best))
        panels.append(Panel("Loss by TFLOP", "TFLOP", "held-out loss, nats", losses, "x"))
    grown = [row for row in rows if row["last_growth"] and row["speed_up"]]
    if len({row["last_growth"] for row in grown}) > 2 or not panels:
        panels.append(growth_times(grown))
    numbers = f"{best['speed_up'] or 0:.2f}, and {best['any_size'] or 0:.2f} against any size"
    return Picture(f'"{best["name"]}" has a speed-up of {numbers}', panels)


def growth_times(rows: list[dict]) -> Panel:
    """The speed-ups of schedules over the time of the last growth, a line for each size that they
    begin with and each number of growths. With what they would be if every token taught as much as
    one from scratch."""
    lines: dict[str, Line] = {}
    for row in sorted(rows, key=lambda row: row["last_growth"]):
        start, *grown = row["stages"].split(" -> ")
        name = f"{start}, {len(grown)} growth{'s' * (len(grown) > 1)}"
        line = lines.setdefault(name, Line([], "o-" if len(grown) == 1 else "o"))
        line.points.append((row["last_growth"], row["speed_up"]))
    most = [(row["last_growth"], row["steps"] / row["budget"]) for row in rows]
    lines["by arithmetic"] = Line(sorted(most), "_", GREY)
    x = "last growth, in shares of the run"
    return Panel("A late growth is cheap and teaches less", x, "speed-up", lines)


def same_loss(rows: list[dict], best: dict) -> dict[str, Line]:
    """The best schedule's speed-up as a distance: from its own FLOPs to those that training from
    scratch takes for the same loss. Nothing where no two runs from scratch have that between them.
    """
    most = max((row["tflop"] for row in rows if row["name"] == "scratch"), default=0)
    flops, loss = best["tflop"], best["mean"]["loss"]
    faster = best["speed_up"] or math.inf
    if best["name"] == "scratch" or not flops < flops * faster <= most:
        return {}
    ends = [(flops, loss), (flops * faster, loss)]
    return {f"the loss of {best['name']}: {faster:.2f} times the FLOPs": Line(ends, "|--", GREY)}


def prediction(report: dict) -> Picture:
    """The narrow models, the law through them, and what it says of the wide ones."""
    fitted, predicted = report["fitted"], report["predicted"]
    sizes = [row["N"] for row in fitted + predicted]
    ends = math.log(min(sizes)), math.log(max(sizes))
    at = [math.exp(ends[0] + (ends[1] - ends[0]) * i / 60) for i in range(61)]
    lines = {"law": Line([(N, report["a"] * N ** report["b"] + report["c"]) for N in at], "-", 0)}
    seeds = [
        (row["N"], loss)
        for row in fitted + predicted
        for loss in report.get("losses", {}).get(str(row["width"]), {}).values()
    ]
    if report.get("seeds", 1) > 1:
        lines["one seed"] = Line(seeds, ".", GREY)
    lines["fitted"] = Line([(row["N"], row["loss"]) for row in fitted], "o", 0)
    for row in predicted:
        if row.get("interval"):
            span = [(row["N"], loss) for loss in row["interval"]]
            lines[f"95% over the seeds, {row['N']:.3g} million"] = Line(span, "_-", 1)
    lines["predicted"] = Line([(row["N"], row["predicted"]) for row in predicted], "D", 1)
    measured = [row for row in predicted if "loss" in row]
    lines["measured"] = Line([(row["N"], row["loss"]) for row in measured], "*", 2)
    title = f"{report.get('seeds', 1)} seed(s), {len(fitted)} sizes fitted"
    if measured:
        title += f": the prediction is off by {measured[-1]['relative']:+.2%}"
    x, y = "million parameters", "held-out loss, nats per token"
    return Picture(
        "Is the loss of a wide model known before it is trained?", [Panel(title, x, y, lines, "x")]
    )


IQ_GROUPS = {  # the panels of the curve -> which tasks are in them
    "Strings: a blind guess gets nothing": r"counting|replace|head|full|key",
    "Stories: where is it?": r"single-fact|two-facts",
    "Claims: does it hold?": r"claim-",
    "Two labels, written as random symbols": r"(entailment|comparison|sense)-..$",
}


def iq_curve(report: dict) -> Picture:
    """Right answers in percent over the steps of training: a panel for each kind of task."""
    key = next(key for key in report if key.startswith("curve"))
    asked = re.search(r"of (\d+)", key)
    n = int(asked[1]) if asked else 100
    curve, panels = {int(step): row for step, row in sorted(report[key].items())}, []
    first, last = min(curve), max(curve)
    for group, pattern in IQ_GROUPS.items():
        lines = {}
        for task in (task for task in curve[last] if re.match(pattern, task)):
            at = [(step, percent(row[task], n)) for step, row in curve.items() if task in row]
            lines[task.removeprefix("claim-")] = Line(at)
            chance = 100 * iqeval.TASKS[task].chance
        if lines and chance > 1:
            lines["chance"] = Line([(first, chance), (last, chance)], ":", GREY)
        panels += [Panel(group, "step", "right answers, %", lines)] if lines else []
    learned = sum(percent(value, n) >= 90 for value in curve[last].values())
    title = (
        f"What does it learn, and when? {learned} of {len(curve[last])} tasks end at 90% or more"
    )
    return Picture(title, panels)


def percent(value: int | dict, n: int) -> float:
    """A score in percent: right answers of n, or {"right": ..., "n": ...}."""
    right, n = (value["right"], value["n"]) if isinstance(value, dict) else (value, n)
    return 100 * right / n


# How the key of a file tells what it is -> its picture, and which command writes such a file.
STUDIES = {
    "sizes": (coord_check, "muP.py coord-check"),
    "landscape": (sweep, "lab.transfer sweep"),
    "predicted": (prediction, "lab.transfer predict"),
    "rows": (growth, "lab.growth"),
    "curve": (iq_curve, "an IQ curve"),
}

# --------------------------------------------------------------------------------------------------
# 3. Computed

PLAIN = "#ececec"
FILLS = ("#a9d3ee", "#f6c5a0", "#b5e0c7", "#e3c2dc")  # light: black letters stand on them
LONGEST = 2048  # the trained length of flm-101b


def rotary() -> Picture:
    """What xPos multiplies a score by, pair by pair, from the model's own tables (flm-101b)."""
    tables = xpos_tables(PRESETS["flm-101b"], 4 * LONGEST, dtype=torch.float64)  # (n, 2, D/2)
    factor = tables[:, 0] * tables[0, 1].conj()  # (distances, D/2): query at n, key at 0
    turns, decay = {}, {}
    for i in (32, 40, 48):
        places = factor[: LONGEST + 1 : 16, i].tolist()
        turns[f"pair {i}"] = Line([(z.real, z.imag) for z in places], ".-")
    turns["distance 0"] = Line([(1.0, 0.0)], "o", GREY)
    distances = sorted({round(2 ** (n / 4)) for n in range(52)})  # 1 to 6889
    for i in (0, 16, 32, 48, 63):
        decay[f"pair {i}"] = Line([(d, factor[d, i].abs().item()) for d in distances], "-")
    turn = f"distance 0 to {LONGEST}, a point every 16 tokens"
    left = Panel(turn, "real part", "imaginary part", turns, equal=True)
    marks = [(LONGEST, "trained length")]
    title = "the faster a pair turns, the sooner it is gone"
    right = Panel(title, "distance in tokens", "size of the factor", decay, "x", marks)
    return Picture(
        "xPos multiplies each pair's share of a score: it turns, and it shrinks", [left, right]
    )


# What grows -> the color of its mask, and what the mask does.
MASKS = {
    "d_model": (
        FILLS[0],
        "in every LayerNorm, the last one too: mean and variance weighted by c, the output times c",
    ),
    "n_heads": (FILLS[1], "the output of new heads times c"),
    "d_ff": (FILLS[2], "new hidden units times c, after GELU"),
    "n_layers": (FILLS[3], "both branches of a new block times c"),
}
BRANCHES = {  # what a branch of a block does, in order: (text, the dimension of its mask)
    "attention": [
        ("LayerNorm", "d_model"),
        ("qkv", ""),
        ("attention\nof each head", ""),
        ("heads", "n_heads"),
        ("o", ""),
        ("branch", "n_layers"),
    ],
    "feed-forward": [
        ("LayerNorm", "d_model"),
        ("up", ""),
        ("GELU", ""),
        ("hidden units", "d_ff"),
        ("down", ""),
        ("branch", "n_layers"),
    ],
}


def branch(name: str, work: list[tuple[str, str]], y: float) -> tuple[list, list, list]:
    """Boxes, arrows and words of one branch, left to right, under the stream at y + 15."""
    boxes, arrows, stream = (
        [],
        [((0, y + 15), (93.5, y + 15)), ((97, y + 15), (103, y + 15))],
        y + 15,
    )
    for i, (text, grows) in enumerate(work):
        x = 5 + 15 * i
        mask = f"{text}\n\u00d7 c" if grows else text
        boxes.append(Box(x, y, 12, 8, mask, MASKS[grows][0] if grows else PLAIN))
        arrows.append(((x - 3, y + 4), (x, y + 4)))
    arrows[2] = ((2, stream), (5, y + 4))
    arrows.append(((92, y + 4), (95.2, stream - 2)))
    boxes.append(Box(93.5, stream - 2, 3.5, 4, "+", PLAIN))
    return boxes, arrows, [(5, stream + 1.5, f"residual stream x   (B, T, C): {name} adds to it")]


def masks() -> Picture:
    """Where the growth masks act in a block (flm.py: Block)."""
    boxes, arrows, words = [], [], []
    for y, (name, work) in zip((52, 26), BRANCHES.items()):
        for all_of_it, part in zip((boxes, arrows, words), branch(name, work, y)):
            all_of_it.extend(part)
    for i, (grows, (fill, does)) in enumerate(MASKS.items()):
        y = 16 - 5 * i
        boxes.append(Box(5, y, 12, 4, grows, fill))
        words.append((19, y + 1, does))
    panel = Panel("", boxes=boxes, arrows=arrows, words=words)
    title = "Growth masks in a block: what is new is multiplied by c, from 0 to 1"
    return Picture(title, [panel], 1, 4.0)


def permutation(D: int = 8) -> Picture:
    """Where each channel of a head is in published layouts, and here (lab/publish.py)."""
    boxes, arrows = [], []
    order = pairs_from_halves(torch.arange(3 * D), D)[:D].tolist()
    for place, old in enumerate(order):
        fill = FILLS[old % (D // 2) % len(FILLS)]
        boxes += [
            Box(old, 1.6, 0.94, 0.5, f"{old}", fill),
            Box(place, 0, 0.94, 0.5, f"{old}", fill),
        ]
        arrows.append(((old + 0.47, 1.6), (place + 0.47, 0.5)))
    words = [
        (0, 2.2, "theirs: a pair is i and i + D/2"),
        (0, -0.35, "here: a pair is 2i and 2i + 1"),
    ]
    panel = Panel("", boxes=boxes, arrows=arrows, words=words)
    title = f"The channels of a head of {D}: what turns together has one color"
    return Picture(title, [panel], 1, 2.4)


def ranks(layout: Layout) -> Picture:
    """The mesh of a layout: which rank has which place along pp, dp and tp."""
    boxes, words = [], []
    places = itertools.product(range(layout.pp), range(layout.dp), range(layout.tp))
    for rank, (pp, dp, tp) in enumerate(places):
        x, y = dp * (layout.tp + 0.3) + tp, layout.pp - 1 - pp
        text = f"rank {rank}" if layout.dp * layout.tp <= 8 else f"{rank}"
        boxes.append(Box(x, y + 0.06, 0.94, 0.88, text, FILLS[pp % len(FILLS)]))
        if pp == 0:
            words.append((x + 0.02, layout.pp + 0.1, f"tp {tp}"))
        if pp == tp == 0:
            words.append((x + 0.02, layout.pp + 0.4, f"dp {dp}: its own rows of the batch"))
    names = [f"pp {pp}" for pp in range(layout.pp)]
    if layout.pp > 1:
        names = ["pp 0: embedding,\nfirst layers", *names[1:-1], f"{names[-1]}: last\nlayers, head"]
    title = f"{layout.size} ranks: along tp they share matrices, along dp rows, along pp layers"
    panel = Panel("", boxes=boxes, words=words, rows=names)
    return Picture(title, [panel], 1, 0.8 + 0.6 * layout.pp)


SHADES = {  # kind of work -> its color in the first and in the second pipeline stage of a rank
    "F": ("#a9d3ee", "#5fa8d8"),
    "B": ("#f6c5a0", "#e5935a"),
    "I": ("#f6c5a0", "#e5935a"),
    "W": ("#b5e0c7", "#72c296"),
}


def timetables(pp: int, micro_batches: int, schedules: Iterable[str]) -> Picture:
    """Which rank of a pipeline computes what, and when: a panel for each pipeline schedule.

    Time is in forward passes of one micro-batch through all layers of a rank, so that schedules
    with one and with two pipeline stages on a rank can be compared."""
    panels = []
    for schedule in schedules:
        rows, bubble = timetable(pp, micro_batches, schedule)
        held = len({stage for _, _, stage, _ in rows[0]})  # pipeline stages on one rank
        boxes = [
            Box(
                start / held,
                pp - 1 - rank + 0.05,
                UNITS[kind] / held,
                0.9,
                str(micro),
                SHADES[kind][stage >= pp],
                f"{kind}{micro}, pipeline stage {stage}",
            )
            for rank, row in enumerate(rows)
            for start, kind, stage, micro in row
        ]
        end = max(box.x + box.width for box in boxes)
        title = f"{schedule}: {end:g} units of time, {bubble:.1%} of it idle"
        if held > 1:
            title += "; darker: a rank's second pipeline stage"
        if any(kind == "W" for row in rows for _, kind, _, _ in row):
            title += "; green: gradients of weights"
        names = [f"pp {rank}" for rank in range(pp)]
        x = "time, in forward passes of one micro-batch through the layers of a rank"
        panels.append(Panel(title, x, boxes=boxes, rows=names, font=6.5))
    title = "Blue forward, orange backward, numbers are micro-batches; white is the bubble"
    return Picture(title, panels, 1, 0.75 + 0.3 * pp)


# --------------------------------------------------------------------------------------------------
# 4. Drawing

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#a6761d", "#000000", "#7b61c4")
MARKERS = "osD^vP*X"
FINE = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7)  # ticks of a logarithmic axis below a factor of 10
FINEST = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)  # below a factor of 3
STYLE = {
    "svg.fonttype": "none",  # letters stay letters: a small file, sharp at any size
    "svg.hashsalt": "flm",  # the same picture is the same file
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 8.5,
    "figure.titlesize": 10,
    "legend.fontsize": 7,
    "figure.facecolor": "white",  # a ground of its own: on a dark page the picture is a card
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a $ in a name is a $
}


def pyplot():
    """matplotlib.pyplot. Raises ValueError with the command that installs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("a picture needs matplotlib: pip install matplotlib") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def draw(picture: Picture, file, kind: str = "svg", only: int | None = None):
    """Draw a picture into `file`, a path or an open file. kind: "svg", "png" or "pdf". only: the
    number of one panel, which is drawn alone. Raises ValueError where matplotlib is missing."""
    plt = pyplot()
    panels = picture.panels if only is None else [picture.panels[only]]
    columns = min(picture.columns, len(panels))
    rows = -(-len(panels) // columns)
    size = (8.0, rows * picture.height + 0.35)
    if only is not None:
        size = (4.8 if panels[0].lines else 8.0, picture.height)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=size, squeeze=False, layout="constrained"
        )
        if only is None:
            figure.suptitle(picture.title, fontweight="bold")
        shown = []  # the lines of the panels before: one legend is enough for the same lines
        for axis, panel in zip(axes.flat, panels):
            paint(axis, panel)
            axis.set(**common_limits(picture))
            place_ticks(axis, panel)
            if panel.lines and list(panel.lines) != shown:
                add_legend(axis, panel, size[0] / columns)
            shown = list(panel.lines)
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type")) if kind == "svg" else None
        figure.savefig(file, format=kind, dpi=96, metadata=metadata)
        plt.close(figure)


def common_limits(picture: Picture) -> dict:
    """Limits that all panels of a picture share, so that they can be compared: of y where all have
    one label of y, of x in timetables."""
    panels = picture.panels
    ends = [box.x + box.width for panel in panels for box in panel.boxes]
    if ends:
        timed = all(panel.boxes and panel.x for panel in panels)
        return {"xlim": (0, max(ends))} if timed else {}
    points = [y for p in panels for line in p.lines.values() for _, y in line.points]
    finite = [y for y in points if math.isfinite(y)]
    if len(panels) < 2 or len({panel.y for panel in panels}) > 1 or not finite:
        return {}
    low, high = min(finite), max(finite)
    if "y" in panels[0].log:
        return {"ylim": (low / 1.2, high * 1.2)}
    margin = 0.05 * (high - low) or 1.0
    return {"ylim": (low - margin, high + margin)}


def paint(axis, panel: Panel):
    """One panel on its axes."""
    axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    for i, (name, line) in enumerate(panel.lines.items()):
        paint_line(axis, name, line, i)
    for name in panel.log:
        axis.set(**{f"{name}scale": "log"})
    if panel.equal:
        axis.set_aspect("equal", adjustable="datalim")
    for x, word in panel.marks:
        axis.axvline(x, color="#777777", linestyle=":", linewidth=1, zorder=1)
        options = {"va": "center", "ha": "right", "rotation": 90, "fontsize": 7}
        axis.text(x, 0.77, word, transform=axis.get_xaxis_transform(), **options)
    if panel.boxes:
        paint_boxes(axis, panel)


def add_legend(axis, panel: Panel, inches: float):
    """The legend, below axes that are so wide: there it covers no line."""
    letters = max(map(len, panel.lines)) + 6  # of an entry, with its mark
    columns = max(1, min(6, len(panel.lines), int(16 * inches) // letters))
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncols": columns}
    axis.legend(**place, frameon=False, columnspacing=1.2, labelspacing=0.3)


def paint_line(axis, name: str, line: Line, place: int):
    """One line, in the color and with the marker of its place in the panel."""
    number = place if line.color is None else line.color
    color = "#777777" if number == GREY else COLORS[number % len(COLORS)]
    look = line.look.replace("o", MARKERS[place % len(MARKERS)]) if number != GREY else line.look
    size = {".": 3, "*": 9}.get(line.look[0], 4)
    if line.points:
        options = {"color": color, "markersize": size, "lw": line.width, "label": name}
        every = -(-len(line.points) // 12) or 1 if line.look == "o-" else 1
        axis.plot(*zip(*sorted_by_x(line)), look, markevery=every, **options)


def sorted_by_x(line: Line) -> list[tuple[float, float]]:
    """The points from left to right; those of a curve in a plane (".-") stay in their order."""
    return line.points if line.look == ".-" else sorted(line.points)


def place_ticks(axis, panel: Panel):
    """Ticks of logarithmic axes with plain numbers. On x one where something was measured, if that
    is not too often or too close together."""
    from matplotlib.ticker import LogLocator

    places = sorted({float(f"{x:.3g}") for line in panel.lines.values() for x, _ in line.points})
    for name, side in (("x", axis.xaxis), ("y", axis.yaxis)):
        if name in panel.log:
            low, high = side.get_view_interval()
            limits = {3: FINEST, 10: FINE, 200: (1, 2, 5), math.inf: (1,)}
            fine = next(ticks for factor, ticks in limits.items() if high < factor * low)
            side.set_major_locator(LogLocator(subs=fine))
            side.set_major_formatter(lambda value, place: f"{value:g}")
            axis.minorticks_off()
    if "x" in panel.log and len(places) <= 8:
        low, high = axis.get_xlim()
        apart = (high / low) ** 0.08  # of two ticks: as far as their numbers are wide
        if all(b > apart * a for a, b in itertools.pairwise(places)):
            axis.set_xticks(places, [f"{place:.3g}" for place in places])


def paint_boxes(axis, panel: Panel):
    """Boxes of one color are one path, which keeps an SVG small; then arrows and words."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    for fill in dict.fromkeys(box.fill for box in panel.boxes):
        corners = [
            Path(
                [
                    (b.x, b.y),
                    (b.x + b.width, b.y),
                    (b.x + b.width, b.y + b.height),
                    (b.x, b.y + b.height),
                    (b.x, b.y),
                ],
                closed=True,
            )
            for b in panel.boxes
            if b.fill == fill
        ]
        axis.add_patch(PathPatch(Path.make_compound_path(*corners), fc=fill, ec="#555555", lw=0.6))
    for b in panel.boxes:
        middle = b.x + b.width / 2, b.y + b.height / 2
        axis.text(*middle, b.text, ha="center", va="center", fontsize=panel.font)
    for tail, head in panel.arrows:
        axis.annotate("", head, tail, arrowprops={"arrowstyle": "->", "color": "#555555"})
    for x, y, word in panel.words:
        axis.text(x, y, word)
    names = panel.rows
    axis.grid(False)
    axis.set_yticks([len(names) - 0.5 - i for i in range(len(names))], names)
    axis.autoscale_view()
    if not panel.x:
        axis.tick_params(length=0, labelbottom=False)
        axis.spines[:].set_visible(False)
    axis.tick_params(axis="y", length=0)


def svg(picture: Picture, only: int | None = None) -> str:
    """A picture as the text of an SVG, a third of what matplotlib writes, with its title for
    readers who do not see it."""
    file = io.StringIO()
    draw(picture, file, only=only)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-z0-9A-Z.]*_\d+"', "", text)  # nothing refers to these
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', two_digits, text)
    text = name_styles(re.sub(r"\n\s*", "\n", text))
    title = html.escape(picture.title if only is None else picture.panels[only].title)
    about = f'role="img" aria-label="{title}" data-numbers="{digest(picture)}"'
    return text.replace("<svg ", f"<svg {about} ", 1)


def two_digits(match: re.Match) -> str:
    """The numbers in an attribute, with two digits after the point."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", match[0])


def name_styles(text: str) -> str:
    """Styles that stand there more than twice as classes. A name is made of the style, so several
    pictures on one page do not disturb each other."""
    counts = Counter(re.findall(r' style="([^"]*)"', text))
    rules = ""
    for style, count in counts.items():
        if count > 2:
            name = f"s{zlib.crc32(style.encode()):x}"
            rules += f".{name}{{{style}}}\n"
            text = text.replace(f' style="{style}"', f' class="{name}"')
    return text.replace("</style>", f"\n{rules}</style>", 1)
