"""Numbers as JSON files, and pictures of them.

    python -m lab.report runs/sweep/sweep.json --out sweep.svg

The file is what `python muP.py coord-check`, `python -m lab.transfer sweep` or
`python -m lab.growth` wrote: its keys tell which. A picture needs matplotlib, and nothing else in
this repository does.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import console

# A panel of a picture: title, label of x, label of y, {name of a line: [(x, y), ...]}.
Panel = tuple[str, str, str, dict]


def write_json(path: str | Path, value):
    """Write `value` as JSON, and say where."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(value, indent=1) + "\n")
    print(f"numbers: {path}")


def pyplot():
    """matplotlib.pyplot. Raises ValueError with the command that installs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("a picture needs matplotlib: pip install matplotlib") from None
    matplotlib.use("agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # letters as text: a small file
    from matplotlib import pyplot

    return pyplot


# ----------------------------------------------------------------------------------------------
# What to draw, from each command's JSON


def or_gap(loss: float | None) -> float:
    """A loss as a point of a line. What diverged has none, and leaves a gap."""
    return math.nan if loss is None else loss


def coord_check_panels(report: dict) -> list[Panel]:
    """Mean |activation| over the width: a panel for each layer, a line for each step."""
    panels = []
    for name, sizes in report["sizes"].items():
        steps = range(len(next(iter(sizes.values()))))
        for layer in ("q", "ff.up", "block", "logits"):
            lines = {
                f"step {n}": [(int(w), at[n][layer]) for w, at in sizes.items()] for n in steps
            }
            panels.append((f"{name}: {layer}", "width", "mean |activation|", lines))
    return panels


def sweep_panels(report: dict) -> list[Panel]:
    """Held-out loss over the hyper-parameter: a panel for each parametrization, a line for each
    width."""
    panels = []
    for name, by_width in report["landscape"].items():
        lines = {}
        for width, row in by_width.items():
            lines[f"width {width}"] = [(float(v), or_gap(loss)) for v, loss in row.items()]
        panels.append((name, report["axis"], "held-out loss", lines))
    return panels


def growth_panels(report: dict) -> list[Panel]:
    """Held-out loss over FLOPs and over CPU seconds: a line for each schedule."""
    panels = []
    for x in ("TFLOP", "CPU seconds"):
        lines = {}
        for row in report["rows"]:
            mean = row["mean"]
            cost = row["tflop"] if x == "TFLOP" else mean["cpu_seconds"]
            lines.setdefault(row["name"], []).append((cost, or_gap(mean["loss"])))
        panels.append((f"one size: loss over {x}", x, "held-out loss", lines))
    return panels


# The key that tells a report's kind -> its panels, and which axes are logarithmic.
KINDS = {
    "sizes": (coord_check_panels, {"xscale": "log", "yscale": "log"}),
    "landscape": (sweep_panels, {"xscale": "log"}),
    "rows": (growth_panels, {}),
}


# ----------------------------------------------------------------------------------------------
# Drawing


def plot(file: str | Path, panels: list[Panel], **scales: str):
    """Draw the panels, four in a row, and write `file` (.svg, .png or .pdf).

    scales: xscale="log", yscale="log". Raises ValueError where matplotlib is missing, or does not
    know the format."""
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    size = (3.6 * columns, 3 * rows)
    figure, axes = pyplot().subplots(rows, columns, figsize=size, squeeze=False, sharey=True)
    for axis, (title, x, y, lines) in zip(axes.flat, panels):
        for name, points in lines.items():
            axis.plot(*zip(*sorted(points)), "o-", label=name, markersize=4)
        axis.set(title=title, xlabel=x, ylabel=y, **scales)
        if "xscale" in scales:  # a tick where something was measured, and nowhere else
            ticks = sorted({x for points in lines.values() for x, _ in points})
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
            axis.minorticks_off()
        axis.label_outer()
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80, metadata={"Date": None} if str(file).endswith("svg") else None)
    print(f"picture: {file}")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="lab.report", description="Draw what a command measured.")
    parser.add_argument("file", metavar="FILE.json", help="written by coord-check, sweep or growth")
    parser.add_argument("--out", metavar="PICTURE", required=True, help="a .svg, .png or .pdf file")
    args = parser.parse_args(argv)
    try:
        report = json.loads(Path(args.file).read_text())
        make, scales = next(kind for key, kind in KINDS.items() if key in report)
        panels = make(report)
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(
            f"{args.file} is not what muP.py coord-check, lab.transfer sweep or lab.growth "
            f"writes ({type(error).__name__}: {error})"
        ) from error
    plot(args.out, panels, **scales)


if __name__ == "__main__":
    console.run(main)
