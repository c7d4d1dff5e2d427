"""muP's promises, tested: what a narrow model's search finds holds for a wide one.

    python -m lab.transfer sweep       loss over a hyper-parameter and the width
    python -m lab.transfer predict     the loss of a wide model, from narrow ones

FLM-101B tuned three hyper-parameters on a model 256 wide, and predicted the loss of the full one
(section 3 of arXiv 2309.03852). Tutorial 4 walks through both commands.

    1. the sweep           a run of train.py for each cell of a grid, and its table
    2. the law             L = a N^b + c through a few sizes, with what its seeds leave open
    3. predictions         finished runs in, the law and the loss of a wider model out
    4. command line
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import console
from flm import count_parameters, preset
from lab import runs
from lab.report import write_json
from lab.runs import FinishedRun
from muP import SMALL, at_widths, model_config
from settings import Settings

# ----------------------------------------------------------------------------------------------
# 1. The sweep

# The hyper-parameters that FLM-101B's search was over, with the values that a sweep tries.
AXES = {
    "lr": [0.002, 0.004, 0.008, 0.016, 0.032, 0.064],
    "init_std": [0.0125, 0.025, 0.05, 0.1, 0.2],
    "output_mult": [0.5, 1.0, 2.0, 4.0, 8.0],
}
# Where they are not the axis. (The paper's init_std, 0.016 at width 256, is 0.045 at width 32.)
TRAINING = {"lr": 0.008, "batch_size": 16, "warmup": 800}
INIT_STD = "init_std=0.05"


def sweep_settings(args: argparse.Namespace) -> list[Settings]:
    """A run for each cell: parametrizations x widths x values x seeds."""
    clash = [word for word in args.model if word.startswith(f"{args.axis}=")]
    console.refuse(f"--model {word}: --axis decides it, leave it out" for word in clash)
    base = args.base_width or min(args.widths)
    small = model_config([INIT_STD, *args.model]).replace(mup_base_width=base)
    models = at_widths(small, args.widths)
    fixed = {**TRAINING, "steps": args.steps, "eval_every": args.steps}
    common = runs.common_settings(args.train, {"model", "mup", args.axis}, **fixed)
    demo, cells = preset("demo").to_dict(), []
    grid = itertools.product(args.mup, models, args.values or AXES[args.axis], args.seeds)
    for mup, width, value, seed in grid:
        name = f"{'mup' if mup == 'on' else 'standard'}-w{width:04}-{args.axis}{value:g}-seed{seed}"
        cell, model = {"mup": mup, "seed": seed, "out": str(Path(args.out) / name)}, models[width]
        if args.axis == "lr":
            cell["lr"] = value
        else:
            model = model.replace(**{args.axis: value})
        fields = {k: v for k, v in model.to_dict().items() if v != demo[k]}
        cell["model"] = tuple(f"{k}={v}" for k, v in fields.items())
        cells.append(dataclasses.replace(common, **cell))
    return cells


def mean(values: Iterable[float | None]) -> float | None:
    """None where one is None: a setting that diverged with one seed has no mean."""
    values = list(values)
    return None if None in values else sum(values) / len(values)


def landscape(finished: list[FinishedRun], axis: str) -> dict[str, dict[int, dict]]:
    """{"muP" or "standard": {width: {value: held-out loss, the mean over the seeds}}}, everything
    in rising order."""
    losses, table = {}, {}
    for run in sorted(finished, key=lambda r: (not r.config.mup, r.config.d_model, r.asked[axis])):
        cell = "muP" if run.config.mup else "standard", run.config.d_model, run.asked[axis]
        losses.setdefault(cell, []).append(run.val)
    for (name, width, value), seeds in losses.items():
        table.setdefault(name, {}).setdefault(width, {})[value] = mean(seeds)
    return table


def best_values(by_width: dict[int, dict[float, float | None]]) -> dict[int, float | None]:
    """{width: the value with the lowest loss; None where all diverged}."""
    best = {}
    for width, row in by_width.items():
        alive = {value: loss for value, loss in row.items() if loss is not None}
        best[width] = min(alive, key=alive.get, default=None)
    return best


def holds(best: dict[int, float | None]) -> bool:
    """Whether the best values of all widths lie within a factor of 2 (and a grid's rounding)."""
    return None not in best.values() and max(best.values()) <= 2.001 * min(best.values())


WORSE = 0.01  # nats by which a wider model may be worse: the luck of its seed


def worse_with_width(losses: dict[int, float | None], tolerance: float = WORSE) -> list[str]:
    """Where "wider is never worse" fails (TP-V: at equal steps and data the loss falls with the
    width): a line for each width that diverged, or whose loss exceeds that of a narrower one by
    more than `tolerance` nats.

    >>> worse_with_width({32: 2.0, 64: 1.9, 128: 1.95, 256: None})
    ['width 128 is worse than width 64 by 0.0500 nats', 'width 256 diverged']
    """
    lines, best, best_width = [], math.inf, None
    for width, loss in sorted(losses.items()):
        if loss is None:
            lines.append(f"width {width} diverged")
            continue
        if loss > best + tolerance:
            worse = f"{loss - best:.4f} nats"
            lines.append(f"width {width} is worse than width {best_width} by {worse}")
        best, best_width = min((best, best_width), (loss, width))
    return lines


def print_worse(losses: dict[int, float | None], label: str) -> list[str]:
    """Print the verdict of worse_with_width, and return its lines."""
    lines = worse_with_width(losses)
    verdict = "NOT always better" if lines else "never worse"
    print(f"{label}: wider is {verdict} (tolerance {WORSE} nats)", *lines, sep="\n  ")
    return lines


def print_landscape(name: str, by_width: dict[int, dict], axis: str) -> dict:
    """Print the table of one parametrization and what it says; returns that for sweep.json."""
    best, values = best_values(by_width), list(next(iter(by_width.values())))
    print(f"{axis:>12}" + "".join(f"{width:>10}" for width in by_width))
    for value in values:
        cells = []
        for width, row in by_width.items():
            loss = "diverged" if row[value] is None else f"{row[value]:.4f}"
            cells.append(f"{loss + '* '[best[width] != value]} ".rjust(11))
        print(f"{value:>12g}" + "".join(cells))
    shown = ", ".join(f"{w}: {'none' if v is None else format(v, 'g')}" for w, v in best.items())
    print(f"{name}: best {axis} by width: {shown}")
    if len(best) > 1:
        verdict = "holds" if holds(best) else "does NOT hold"
        print(f"  it {verdict} within a factor of 2 over widths {min(best)} to {max(best)}")
    edge = [str(width) for width, value in best.items() if value in (values[0], values[-1])]
    if edge and len(values) > 1:
        print(f"  at width {', '.join(edge)} it is at the edge of the grid: add --values beyond")
    chosen, worse = best[min(best)], []
    if chosen is not None:
        at_chosen = {width: row[chosen] for width, row in by_width.items()}
        worse = print_worse(at_chosen, f"{name} at {axis} {chosen:g}")
    return {"best": best, "holds": holds(best), "worse_with_width": worse}


def sweep(args: argparse.Namespace):
    """`python -m lab.transfer sweep`: run every cell, print the tables, write sweep.json."""
    finished = runs.run_all(sweep_settings(args), args.jobs, args.keep_checkpoints)
    table, report = landscape(finished, args.axis), {}
    for name, by_width in table.items():
        print(f"\n{name}: held-out loss after {args.steps} steps, nats per token, mean of ", end="")
        print(f"{len(args.seeds)} seed(s); * the best of its width")
        report[name] = print_landscape(name, by_width, args.axis)
    cells = [
        ["on" if r.config.mup else "off", r.config.d_model, r.asked[args.axis], r.asked["seed"]]
        + [r.N, r.val, r.train]
        for r in finished
    ]
    columns = ["mup", "width", args.axis, "seed", "parameters", "val_loss", "train_loss"]
    report |= {"axis": args.axis, "torch": torch.__version__, "landscape": table}
    report |= {"same_in_all": runs.same_in_all(finished), "cell": columns, "cells": cells}
    write_json(Path(args.out) / "sweep.json", report)


# ----------------------------------------------------------------------------------------------
# 2. The law (muScaling, arXiv 2304.06875)

SCAN = (-4.0, -0.02)  # where b is looked for


@dataclass(frozen=True)
class Law:
    """L = a N^b + c: the loss in nats per token of a model of N million parameters."""

    a: float
    b: float
    c: float

    def __call__(self, N: float) -> float:
        return self.a * N**self.b + self.c


def solve(b: np.ndarray, N: np.ndarray, loss: np.ndarray) -> tuple:
    """The least-squares a and c at each b (k,), and the sum of squared residuals, (k,) each.

    At a given b the law is linear in a and c. N, loss: (n,)."""
    x = N ** b[:, None]  # (k, n)
    dx = x - x.mean(1, keepdims=True)
    a = (dx * (loss - loss.mean())).sum(1) / (dx * dx).sum(1)
    c = loss.mean() - a * x.mean(1)
    return a, c, ((a[:, None] * x + c[:, None] - loss) ** 2).sum(1)


def fit_law(N: Sequence[float], loss: Sequence[float]) -> Law:
    """The law through sizes N (n,) in millions of parameters and losses (n,), by least squares.

    b alone is searched: a scan, then finer ones around the best. So there is no starting point to
    choose and no local minimum to end in. Raises ValueError for fewer than 4 different N, and
    where no such law falls: then there is no number.

    >>> law = fit_law([1, 4, 16, 64], [3.0, 2.5, 2.25, 2.125])  # 1 / sqrt(N) + 2
    >>> round(law(256), 6)
    2.0625
    """
    N, loss = np.asarray(N, float), np.asarray(loss, float)
    if len(N) != len(loss) or len(np.unique(N)) < 4:
        n = len(np.unique(N))
        raise ValueError(f"{n} different model sizes, 3 unknowns a, b and c: give at least 4")
    if not (np.isfinite(N).all() and (N > 0).all() and np.isfinite(loss).all()):
        given = f"N = {N.tolist()}, loss = {loss.tolist()}"
        raise ValueError(f"sizes and losses must be finite and sizes above 0: got {given}")
    center = np.exp(np.log(N).mean())  # powers of N / center are of order 1
    grid = np.linspace(*SCAN, 2001)
    for _ in range(6):
        at = int(solve(grid, N / center, loss)[2].argmin())
        grid = np.linspace(grid[max(0, at - 1)], grid[min(len(grid) - 1, at + 1)], 101)
    a, c, _ = (values[50].item() for values in solve(grid, N / center, loss))
    b = grid[50].item()
    if a <= 0 or not SCAN[0] + 0.01 < b < SCAN[1] - 0.01:
        where = "at an end of that range" if a > 0 else "where a is negative"
        raise ValueError(
            f"no law a N^b + c that falls fits these {len(N)} points. Tried: b from {SCAN[0]} to "
            f"{SCAN[1]}, with a and c solved for at each; the residuals are smallest {where}.\n"
            f"Use longer runs, more seeds, or leave out the narrowest width"
        )
    return Law(float(a / center**b), b, c)


def bootstrap(
    N: Sequence[float], losses: Sequence[Sequence[float]], targets: Sequence[float], draws=1000
) -> tuple[list | None, int]:
    """How far a prediction moves with the luck of the seeds: the interval [2.5%, 97.5%] of the
    loss at each of `targets` (sizes), and the number of draws through which no law goes.

    losses (n, S): S seeds of each size N (n,). A draw takes S seeds with replacement, the same at
    every size (a seed is an order of the data, which the sizes share), and fits their means."""
    losses, rng, known = np.asarray(losses, float), np.random.default_rng(0), {}
    S = losses.shape[1]
    drawn = [tuple(sorted(rng.integers(0, S, S).tolist())) for _ in range(draws)]
    for seeds in set(drawn):
        try:
            law = fit_law(N, losses[:, seeds].mean(1))
            known[seeds] = [law(target) for target in targets]
        except ValueError:
            pass
    found = [known[seeds] for seeds in drawn if seeds in known]
    if not found:
        return None, draws
    return np.quantile(found, [0.025, 0.975], axis=0).T.tolist(), draws - len(found)


# ----------------------------------------------------------------------------------------------
# 3. Predictions

Points = dict[int, dict]  # {width: {"N": millions of parameters, "losses": {seed: loss}}}


def find_runs(paths: list[str]) -> list[FinishedRun]:
    """The finished runs in these folders; a folder of runs stands for all of them. Raises
    ValueError for runs that have not finished, or diverged."""
    found = []
    for path in map(Path, paths):
        inside = sorted(file.parent for file in path.glob("*/config.json"))
        alone = (path / "config.json").exists() or not inside
        found += [(folder, runs.read_finished(folder)) for folder in ([path] if alone else inside)]
    bad = [folder for folder, run in found if run is None or run.val is None]
    console.refuse(f"{folder}: no finished run, or one that diverged" for folder in bad)
    return sorted(
        (run for _, run in found), key=lambda run: (run.config.d_model, run.asked["seed"])
    )


VARIES = {"d_model", "n_heads", "d_ff", "seed"}  # between the runs of one fit


def collect(finished: list[FinishedRun]) -> Points:
    """Runs as points of one fit, narrowest first. Raises ValueError where the runs differ in more
    than width and seed, or a width lacks a seed of another."""
    problems, points = [], {}
    for key in sorted(set().union(*(run.asked for run in finished)) - VARIES):
        values = [json.dumps(run.asked.get(key)) for run in finished]
        counts = ", ".join(f"{v} ({values.count(v)} runs)" for v in dict.fromkeys(values))
        problems += [f"the runs differ in {key}: {counts}"] * (len(set(values)) > 1)
    for run in finished:
        width, seed = run.config.d_model, run.asked["seed"]
        losses = points.setdefault(width, {"N": run.N / 1e6, "losses": {}})["losses"]
        if seed in losses:
            problems.append(f"{run.folder} is a second run of width {width} and seed {seed}")
        losses[seed] = run.val
    seeds = {width: list(point["losses"]) for width, point in points.items()}
    if any(given != seeds[min(seeds)] for given in seeds.values()):
        each = "; ".join(f"{width} has {given}" for width, given in seeds.items())
        problems.append(f"the widths have different seeds: {each}")
    console.refuse(problems, "these runs do not belong to one fit:")
    return points


def read_points(path: Path) -> Points:
    """Points of a JSON file: {"points": [{"width", "N" in millions, "loss"}, ...]}."""
    try:
        given = json.loads(path.read_text())["points"]
        return {p["width"]: {"N": float(p["N"]), "losses": {0: float(p["loss"])}} for p in given}
    except (OSError, KeyError, TypeError, ValueError) as error:
        wanted = '{"points": [{"width": ..., "N": millions, "loss": ...}, ...]}'
        problem = f"{type(error).__name__}, {error}"
        raise ValueError(f"{path} must hold {wanted}: {problem}") from error


def predict(points: Points, hold_out: int, at: dict[int, float]) -> dict:
    """Fit all but the `hold_out` widest of `points`; predict those and the widths of `at`, {width:
    N in millions}. Returns JSON values: the law, "fitted" and "predicted" (rows of the tables)."""
    if not 0 <= hold_out < len(points):
        raise ValueError(f"--hold-out {hold_out}: there are {len(points)} widths")
    measured = [
        {"width": width, "N": point["N"], "loss": mean(point["losses"].values())}
        for width, point in sorted(points.items())
    ]
    fitted, held = measured[: len(points) - hold_out], measured[len(points) - hold_out :]
    sizes = [p["N"] for p in fitted]
    law = fit_law(sizes, [p["loss"] for p in fitted])
    for p in fitted:
        p |= {"law": law(p["N"]), "residual": p["loss"] - law(p["N"])}
    for p in held:
        predicted = law(p["N"])
        relative = predicted / p["loss"] - 1
        p |= {"predicted": predicted, "error": predicted - p["loss"], "relative": relative}
    new = {width: N for width, N in at.items() if width not in points}
    held += [{"width": width, "N": N, "predicted": law(N)} for width, N in new.items()]
    seeds, failed = len(points[min(points)]["losses"]), 0
    if seeds > 1 and held:
        losses = [list(points[p["width"]]["losses"].values()) for p in fitted]
        intervals, failed = bootstrap(sizes, losses, [p["N"] for p in held])
        for p, interval in zip(held, intervals or [None] * len(held)):
            p["interval"] = interval
    found = {**dataclasses.asdict(law), "seeds": seeds, "draws_without_law": failed}
    return {**found, "fitted": fitted, "predicted": held}


def print_prediction(result: dict):
    """What was fitted, the law, and its two tables."""
    widths, seeds = len(result["fitted"]), result["seeds"]
    print(f"{result['source']}, {widths} widths fitted, mean of {seeds} seed(s):")
    law = f"{result['a']:.4g} N^{result['b']:.4g} + {result['c']:.4g}"
    print(f"L = {law}, N in millions of parameters\n")
    print(f"{'fitted':>10}{'N':>11}{'loss':>10}{'law':>10}{'residual':>10}")
    for p in result["fitted"]:
        print(f"{p['width']:>10}{p['N']:>11.3f}{p['loss']:>10.4f}", end="")
        print(f"{p['law']:>10.4f}{p['residual']:>+10.4f}")
    if result["predicted"]:
        interval = "    95% over the seeds" if seeds > 1 else ""
        print(f"\n{'predicted':>10}{'N':>11}{'law':>10}{'measured':>10}{'error':>18}{interval}")
    for p in result["predicted"]:
        known = f"{'not run':>10}{'':18}"
        if "loss" in p:
            known = f"{p['loss']:>10.4f}{p['error']:>+10.4f}{p['relative']:>+8.2%}"
        interval = "    {:.4f} to {:.4f}".format(*p["interval"]) if p.get("interval") else ""
        print(f"{p['width']:>10}{p['N']:>11.3f}{p['predicted']:>10.4f}{known}{interval}")
    if failed := result["draws_without_law"]:
        print(f"no law fits {failed} of 1000 random draws of seeds: they are not in the interval")


def predict_command(args: argparse.Namespace):
    """`python -m lab.transfer predict`: print the tables, write the JSON file."""
    if bool(args.points) == bool(args.runs) or args.points and args.at:
        raise ValueError(
            "give either folders of runs (and --at WIDTH for widths without one) or --points FILE"
        )
    if args.points:
        points, at, origin = read_points(Path(args.points)), {}, {"source": args.points}
    else:
        finished = find_runs(args.runs)
        points, wider = collect(finished), at_widths(finished[0].config, args.at)
        at = {width: count_parameters(config) / 1e6 for width, config in wider.items()}
        same = runs.same_in_all(finished)
        source = f"{len(finished)} runs, held-out loss after {same['steps']} steps"
        origin = {"source": source, "same_in_all": same, "torch": torch.__version__}
        origin["losses"] = {width: point["losses"] for width, point in points.items()}
    result = predict(points, args.hold_out, at) | origin
    print_prediction(result)
    means = {width: mean(point["losses"].values()) for width, point in points.items()}
    result["worse_with_width"] = print_worse(means, "in these runs")
    write_json(args.json, result)


# ----------------------------------------------------------------------------------------------
# 4. Command line

SWEEP = """Train a model for every cell of a grid: values of a hyper-parameter x widths x
parametrizations x seeds, each a run of train.py. Stop it at any time: the same command goes on,
and does not run finished cells again. What follows -- goes to train.py, for every cell.

examples:
  python -m lab.transfer sweep --values 0.004 0.008 0.016 -- --data corpora/mine
  python -m lab.transfer sweep --axis output_mult --widths 32 128 -- --lr 0.016
  python -m lab.transfer sweep --mup on --widths 32 48 64 80 --values 0.008 --seeds 0 1
"""
PREDICT = """Fit L = a N^b + c to finished runs of several widths: hold the widest out, predict it,
and compare. N is the number of parameters.

examples:
  python -m lab.transfer predict runs/narrow --hold-out 0 --at 256   before the wide run
  python -m lab.transfer predict runs/narrow runs/wide               after it
"""


def add_sweep(parser: argparse.ArgumentParser):
    """The options of `sweep`."""
    add = parser.add_argument
    grid = "; ".join(f"{axis}: {' '.join(map(str, values))}" for axis, values in AXES.items())
    model = " ".join([*(f"{k}={v}" for k, v in SMALL.items()), INIT_STD])
    widths, both = [32, 64, 128, 256], ["on", "off"]
    add("--axis", choices=AXES, default="lr", help="the hyper-parameter (default lr)")
    add("--values", type=float, nargs="+", metavar="X", help=f"its values (default {grid})")
    add("--widths", type=int, nargs="+", default=widths, metavar="C", help="default 32 64 128 256")
    add("--mup", nargs="+", choices=both, default=both, help="default both: on off")
    add("--base-width", type=int, metavar="C", help="where m is 1 (default: the narrowest)")
    add("--steps", type=int, default=200, help="of every run (default 200)")
    add("--model", nargs="+", default=[], metavar="FIELD=VALUE", help=f"(default {model})")
    runs.add_options(parser, out="runs/sweep")


def add_predict(parser: argparse.ArgumentParser):
    """The options of `predict`."""
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="runs, or folders of runs")
    add("--points", metavar="FILE", help="instead of runs: published points, as JSON")
    add("--hold-out", type=int, default=1, metavar="K", help="predict the K widest (default 1)")
    add("--at", type=int, nargs="+", default=[], metavar="C", help="predict these widths, too")
    add("--json", default="runs/predict.json", metavar="FILE", help="default runs/predict.json")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lab.transfer", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    raw = argparse.RawDescriptionHelpFormatter
    for name, text, add in (("sweep", SWEEP, add_sweep), ("predict", PREDICT, add_predict)):
        help = text.split(":")[0]
        add(commands.add_parser(name, help=help, description=text, formatter_class=raw))
    return parser


def main(argv: list[str] | None = None):
    args = make_parser().parse_args(argv)
    sweep(args) if args.command == "sweep" else predict_command(args)


if __name__ == "__main__":
    console.run(main)
