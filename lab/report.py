"""lab/report.py - pictures and JSON files of runs."""
from __future__ import annotations

import json
from pathlib import Path


def write_json(path, value):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(value, indent=1) + "\n")
    print(f"numbers: {path}")


def pyplot():
    """matplotlib, which only plots need. Raises ValueError with the command that installs it."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib (without it, the numbers are printed and written as JSON)") from None
    matplotlib.use("agg")
    from matplotlib import pyplot
    return pyplot


def plot(file: str, columns: int, panels: list):
    """panels: (title, x label, y label, {name: (xs, ys)}) each; both axes logarithmic."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot().subplots(rows, columns, figsize=(4 * columns, 3.2 * rows), squeeze=False)
    for axis, (title, x, y, lines) in zip(axes.flat, panels):
        for name, (xs, ys) in lines.items():
            axis.plot(xs, ys, "o-", label=name)
        axis.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=80)
    print(f"plot: {file}")
