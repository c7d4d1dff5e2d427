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
import contextlib
import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import console
from flm import count_parameters
from lab import runs
from lab.runs import FinishedRun, mean
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
    narrow = model_config([INIT_STD, *args.model]).replace(mup_base_width=base)
    models = at_widths(narrow, args.widths)
    fixed = {**TRAINING, "steps": args.steps, "eval_every": args.steps}
    common = runs.common_settings(args.train, {"model", "mup", args.axis}, **fixed)
    cells = []
    grid = itertools.product(args.mup, models, args.values or AXES[args.axis], args.seeds)
    for mup, width, value, seed in grid:
        name = f"{'mup' if mup == 'on' else 'standard'}-w{width:04}-{args.axis}{value:g}-seed{seed}"
        cell = {"mup": mup, "seed": seed, "out": str(Path(args.out) / name)}
        fields = models[width].to_dict() | {"mup": mup == "on"}
        if args.axis == "lr":
            cell["lr"] = value
        else:
            fields[args.axis] = value
        cell["model"] = tuple(f"{k}={v}" for k, v in fields.items())
        cells.append(dataclasses.replace(common, **cell))
    return cells


# {width: {value of the hyper-parameter: held-out loss, the mean over the seeds; None: diverged}}
Table = dict[int, dict[float, float | None]]


def landscape(finished: list[FinishedRun], axis: str) -> dict[str, Table]:
    """{"muP" or "standard": its table}, everything in rising order."""
    cells = {}
    for run in finished:
        cell = "muP" if run.config.mup else "standard", run.config.d_model, run.asked[axis]
        cells.setdefault(cell, []).append(run.loss)
    tables = {}
    for (name, width, value), losses in sorted(cells.items()):
        tables.setdefault(name, {}).setdefault(width, {})[value] = mean(losses)
    return tables


def best_values(table: Table) -> dict[int, float | None]:
    """{width: the value with the lowest loss; None where all diverged}."""
    best = {}
    for width, row in table.items():
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


def judge(table: Table) -> dict:
    """What the table of one parametrization says, for sweep.json. Wider is never worse at the value
    that is best for the narrowest width."""
    best = best_values(table)
    chosen = best[min(best)]
    at_chosen = {} if chosen is None else {width: row[chosen] for width, row in table.items()}
    return {"best": best, "holds": holds(best), "worse_with_width": worse_with_width(at_chosen)}


def print_worse(label: str, lines: list[str]):
    """The verdict of worse_with_width."""
    verdict = "NOT always better" if lines else "never worse"
    print(f"{label}: wider is {verdict} (tolerance {WORSE} nats)", *lines, sep="\n  ")


def print_table(name: str, axis: str, table: Table, found: dict):
    """The table of one parametrization, and what it says. found: see judge."""
    best, values = found["best"], list(table[min(table)])
    print(f"{axis:>12}" + "".join(f"{width:>10}" for width in table))
    for value in values:
        line = f"{value:>12g}"
        for width, row in table.items():
            loss = "diverged" if row[value] is None else f"{row[value]:.4f}"
            line += f"{loss + '* '[best[width] != value]} ".rjust(11)
        print(line)
    shown = ", ".join(f"{w}: {'none' if v is None else format(v, 'g')}" for w, v in best.items())
    print(f"{name}: best {axis} by width: {shown}")
    if len(best) > 1:
        verdict = "holds" if found["holds"] else "does NOT hold"
        print(f"  it {verdict} within a factor of 2 over widths {min(best)} to {max(best)}")
    edge = [str(width) for width, value in best.items() if value in (values[0], values[-1])]
    if edge and len(values) > 1:
        print(f"  at width {', '.join(edge)} it is at the edge of the grid: add --values beyond")
    chosen = best[min(best)]
    if chosen is not None:
        print_worse(f"{name} at {axis} {chosen:g}", found["worse_with_width"])


def sweep(args: argparse.Namespace):
    """`python -m lab.transfer sweep`: run every cell, print the tables, write sweep.json."""
    finished = runs.run_all(sweep_settings(args), args.jobs)
    tables, found = landscape(finished, args.axis), {}
    for name, table in tables.items():
        found[name] = judge(table)
        seeds = f"mean of {len(args.seeds)} seed(s); * the best of its width"
        print(f"\n{name}: held-out loss after {args.steps} steps, nats per token, {seeds}")
        print_table(name, args.axis, table, found[name])
    report = {"axis": args.axis, **found, "landscape": tables, **runs.origin(finished)}
    report["losses"] = {run.folder.name: run.loss for run in finished}
    console.write_numbers(Path(args.out) / "sweep.json", report)


# ----------------------------------------------------------------------------------------------
# 2. The law (muScaling, arXiv 2304.06875)

SCAN = (-4.0, -0.02)  # where b is looked for, unless a range is given


@dataclass(frozen=True)
class Law:
    """L = a N^b + c: the loss in nats per token of a model of N million parameters."""

    a: float
    b: float
    c: float

    def __call__(self, N: float) -> float:
        return self.a * N**self.b + self.c


def solve(b: np.ndarray, N: np.ndarray, loss: np.ndarray) -> tuple:
    """The least-squares a and c at each b (k,), and the sum of squared residuals, (..., k) each.

    At a given b the law is linear in a and c. N: (n,); loss: (..., n), each row for itself."""
    x = N ** b[:, None]  # (k, n)
    dx = x - x.mean(1, keepdims=True)
    loss = np.asarray(loss)[..., None, :]  # (..., 1, n)
    a = (dx * (loss - loss.mean(-1, keepdims=True))).sum(-1) / (dx * dx).sum(1)
    c = loss.mean(-1) - a * x.mean(1)
    return a, c, ((a[..., None] * x + c[..., None] - loss) ** 2).sum(-1)


def fit_law(
    N: Sequence[float], loss: Sequence[float], b_range: tuple[float, float] | None = None
) -> Law:
    """The law through sizes N (n,) in millions of parameters and losses (n,), by least squares.

    b alone is searched: a scan, then finer ones around the best. So there is no starting point to
    choose and no local minimum to end in. Raises ValueError for fewer than 4 different N, and
    where no such law falls: then there is no number.

    b_range: what is known of b before, as (lowest, highest). Then b may end at an end of it, and a
    law that does not fall is flat, with a = 0: there is always a law, however short the runs.

    >>> law = fit_law([1, 4, 16, 64], [3.0, 2.5, 2.25, 2.125])  # 1 / sqrt(N) + 2
    >>> round(law(256), 6)
    2.0625
    """
    N, loss = np.asarray(N, float), np.asarray(loss, float)
    n = len(np.unique(N))
    if n < 4:
        raise ValueError(f"{n} different model sizes, 3 unknowns a, b and c: give at least 4")
    if not (np.isfinite(N).all() and (N > 0).all() and np.isfinite(loss).all()):
        given = f"N = {N.tolist()}, loss = {loss.tolist()}"
        raise ValueError(f"sizes and losses must be finite and sizes above 0: got {given}")
    center = np.exp(np.log(N).mean())  # powers of N / center are of order 1
    low, high = b_range or SCAN
    grid = np.linspace(low, high, 2001)
    for _ in range(6):
        at = int(solve(grid, N / center, loss)[2].argmin())
        grid = np.linspace(grid[max(0, at - 1)], grid[min(len(grid) - 1, at + 1)], 101)
    a, c, _ = (values[50].item() for values in solve(grid, N / center, loss))
    b = grid[50].item()
    if b_range and a <= 0:
        return Law(0.0, b, loss.mean().item())
    if not b_range and (a <= 0 or not low + 0.01 < b < high - 0.01):
        where = "at an end of that range" if a > 0 else "where a is negative"
        raise ValueError(
            f"no law a N^b + c that falls fits these {len(N)} points. Tried: b from {low} to "
            f"{high}, with a and c solved for at each; the residuals are smallest {where}.\n"
            f"Use longer runs, more seeds, or leave out the narrowest width"
        )
    return Law(float(a / center**b), b, c)


DRAWS = 1000  # of seeds, for an interval


def bootstrap(
    N: Sequence[float],
    losses: Sequence[Sequence[float]],
    targets: Sequence[float],
    b_range: tuple[float, float] | None = None,
) -> tuple[list, int]:
    """How far a prediction moves with the luck of the seeds: the interval [2.5%, 97.5%] of the
    loss at each of `targets` (sizes), and the number of draws through which no law goes. Where no
    draw has a law, there are no intervals: [].

    losses (n, S): S seeds of each size N (n,). A draw takes S seeds with replacement, the same at
    every size (a seed is an order of the data, which the sizes share), and fits their means."""
    losses, rng = np.asarray(losses, float), np.random.default_rng(0)
    S = losses.shape[1]
    draws = Counter(tuple(sorted(rng.integers(0, S, S).tolist())) for _ in range(DRAWS))
    found = []
    for seeds, count in draws.items():  # each draw is fitted once
        with contextlib.suppress(ValueError):
            law = fit_law(N, losses[:, seeds].mean(1), b_range)
            found += [[law(target) for target in targets]] * count
    intervals = np.quantile(found, [0.025, 0.975], axis=0).T.tolist() if found else []
    return intervals, DRAWS - len(found)


def at_first_seed(losses: np.ndarray) -> np.ndarray:
    """Losses (..., n, S) of n sizes and S seeds, as if all had the first seed: each less the mean
    of its seed over the sizes, plus that of the first one."""
    seeds = losses.mean(-2, keepdims=True)
    return losses - seeds + seeds[..., :1]


def interval_of_one_run(
    N: Sequence[float],
    losses: Sequence[Sequence[float]],
    target: float,
    b_range: tuple[float, float],
) -> list[float]:
    """Where the loss of one run of size `target` will lie: [2.5%, 97.5%].

    losses (n, S): S seeds, at least 2, of each size N (n,). The run to come has the first seed. A
    seed is an order of the data, which all sizes share: see `at_first_seed`. The luck of a run is
    its loss less the means of its size and of its seed. A draw gives each of the n S runs, and the
    run to come, the luck of a random one of them, and fits a law with b in b_range. Two things
    widen it. n S runs vary less around fitted means than around the true ones: sqrt(n S / f), with
    f = (n-1) (S-1) degrees of freedom. And few runs do not know how large luck is: it is scaled by
    the root of f / chi-square of f, anew in each draw."""
    losses, rng = np.asarray(losses, float), np.random.default_rng(0)
    n, S = losses.shape
    f = (n - 1) * (S - 1)
    fitted = losses.mean(1, keepdims=True) + losses.mean(0) - losses.mean()
    luck = (losses - fitted).ravel() * math.sqrt(n * S / f)
    scale = np.sqrt(f / rng.chisquare(f, DRAWS))
    drawn = fitted + scale[:, None, None] * rng.choice(luck, (DRAWS, n, S))
    drawn = at_first_seed(drawn).mean(2)  # (DRAWS, n)
    grid, center = np.linspace(*b_range, 101), np.exp(np.log(N).mean())
    a, c, square = solve(grid, np.asarray(N) / center, drawn)  # (DRAWS, 101)
    at = square.argmin(1)
    a, c = (values[np.arange(DRAWS), at] for values in (a, c))
    c = np.where(a > 0, c, drawn.mean(1))  # a law that does not fall is flat, as in fit_law
    found = a.clip(0) * (target / center) ** grid[at] + c + scale * rng.choice(luck, DRAWS)
    return np.quantile(found, [0.025, 0.975]).tolist()


# ----------------------------------------------------------------------------------------------
# 3. Predictions

Points = dict[int, dict]  # {width: {"N": millions of parameters, "losses": {seed: loss}}}


def find_runs(paths: list[str]) -> list[FinishedRun]:
    """The finished runs in these folders, narrowest first; a folder of runs stands for all of them.
    Raises ValueError for runs that have not finished, or diverged."""
    folders = []
    for path in map(Path, paths):
        folders += sorted(file.parent for file in path.glob("*/config.json")) or [path]
    found = {folder: runs.read_finished(folder) for folder in folders}
    bad = [folder for folder, run in found.items() if run is None or run.loss is None]
    console.refuse(f"{folder}: no finished run, or one that diverged" for folder in bad)
    return sorted(found.values(), key=lambda run: (run.config.d_model, run.asked["seed"]))


VARIES = {"d_model", "n_heads", "d_ff", "seed"}  # between the runs of one fit


def collect(finished: list[FinishedRun]) -> Points:
    """Runs as points of one fit, narrowest first. Raises ValueError where the runs differ in more
    than width and seed, or a width lacks a seed of another."""
    problems, points = [], {}
    for key in sorted(set(finished[0].asked) - VARIES):
        values = Counter(json.dumps(run.asked[key]) for run in finished)
        counts = ", ".join(f"{value} ({count} runs)" for value, count in values.items())
        problems += [f"the runs differ in {key}: {counts}"] * (len(values) > 1)
    for run in finished:
        width, seed = run.config.d_model, run.asked["seed"]
        losses = points.setdefault(width, {"N": run.N / 1e6, "losses": {}})["losses"]
        if seed in losses:
            problems.append(f"{run.folder} is a second run of width {width} and seed {seed}")
        losses[seed] = run.loss
    seeds = {width: list(point["losses"]) for width, point in points.items()}
    if any(given != seeds[min(seeds)] for given in seeds.values()):
        each = "; ".join(f"{width} has {given}" for width, given in seeds.items())
        problems.append(f"the widths have different seeds: {each}")
    console.refuse(problems, "these runs do not belong to one fit:")
    return points


def read_points(path: Path) -> Points:
    """Points of a JSON file: {"points": [{"width", "N" in millions, "loss"}, ...]}."""
    text = console.read_text(path)
    try:
        given = json.loads(text)["points"]
        return {p["width"]: {"N": float(p["N"]), "losses": {0: float(p["loss"])}} for p in given}
    except (KeyError, TypeError, ValueError) as error:
        wanted = '{"points": [{"width": ..., "N": millions, "loss": ...}, ...]}'
        problem = f"{type(error).__name__}, {error}"
        raise ValueError(f"{path} must hold {wanted}: {problem}") from error


def predict(
    points: Points,
    hold_out: int,
    at: dict[int, float],
    b_range: tuple[float, float] | None = None,
) -> dict:
    """Fit all but the `hold_out` widest of `points`; predict those and the widths of `at`, {width:
    N in millions}. Returns JSON values: the law, "fitted" and "predicted" (rows of the tables),
    and where wider was worse. b_range: see fit_law."""
    if not 0 <= hold_out < len(points):
        raise ValueError(f"--hold-out {hold_out}: there are {len(points)} widths")
    rows = [
        {"width": width, "N": point["N"], "loss": mean(point["losses"].values())}
        for width, point in sorted(points.items())
    ]
    worse = worse_with_width({row["width"]: row["loss"] for row in rows})
    fitted, predicted = rows[: len(rows) - hold_out], rows[len(rows) - hold_out :]
    predicted += [{"width": width, "N": N} for width, N in at.items() if width not in points]
    sizes, targets = ([row["N"] for row in part] for part in (fitted, predicted))
    law = fit_law(sizes, [row["loss"] for row in fitted], b_range)
    for row in fitted:
        row["law"] = law(row["N"])
        row["residual"] = row["loss"] - row["law"]
    for row in predicted:
        row["predicted"] = law(row["N"])
        if "loss" in row:
            row["error"] = row["predicted"] - row["loss"]
            row["relative"] = row["predicted"] / row["loss"] - 1
    losses, failed = [list(points[row["width"]]["losses"].values()) for row in fitted], 0
    seeds = len(losses[0])
    if seeds > 1 and predicted:
        intervals, failed = bootstrap(sizes, losses, targets, b_range)
        for row, interval in zip(predicted, intervals):
            row["interval"] = interval
    found = {**dataclasses.asdict(law), "seeds": seeds, "draws_without_law": failed}
    return {**found, "fitted": fitted, "predicted": predicted, "worse_with_width": worse}


def print_prediction(result: dict):
    """What was fitted, the law, and its two tables."""
    widths, seeds = len(result["fitted"]), result["seeds"]
    print(f"{result['source']}, {widths} widths fitted, mean of {seeds} seed(s):")
    law = f"{result['a']:.4g} N^{result['b']:.4g} + {result['c']:.4g}"
    print(f"L = {law}, N in millions of parameters\n")
    print(f"{'fitted':>10}{'N':>11}{'loss':>10}{'law':>10}{'residual':>10}")
    for row in result["fitted"]:
        size = f"{row['width']:>10}{row['N']:>11.3f}"
        print(f"{size}{row['loss']:>10.4f}{row['law']:>10.4f}{row['residual']:>+10.4f}")
    if result["predicted"]:
        interval = "    95% over the seeds" if seeds > 1 else ""
        print(f"\n{'predicted':>10}{'N':>11}{'law':>10}{'measured':>10}{'error':>18}{interval}")
    for row in result["predicted"]:
        measured = f"{'not run':>10}{'':18}"
        if "loss" in row:
            measured = f"{row['loss']:>10.4f}{row['error']:>+10.4f}{row['relative']:>+8.2%}"
        interval = "    {:.4f} to {:.4f}".format(*row["interval"]) if row.get("interval") else ""
        size = f"{row['width']:>10}{row['N']:>11.3f}"
        print(f"{size}{row['predicted']:>10.4f}{measured}{interval}")
    if result["draws_without_law"]:
        failed = f"{result['draws_without_law']} of {DRAWS} random draws of seeds"
        print(f"no law fits {failed}: they are not in the interval")
    print_worse("in these runs", result["worse_with_width"])


def predict_command(args: argparse.Namespace):
    """`python -m lab.transfer predict`: print the tables, write the JSON file."""
    if bool(args.points) == bool(args.runs) or args.points and args.at:
        raise ValueError(
            "give either folders of runs (and --at WIDTH for widths without one) or --points FILE"
        )
    if args.points:
        result = predict(read_points(Path(args.points)), args.hold_out, {})
        result["source"] = args.points
    else:
        finished = find_runs(args.runs)
        points = collect(finished)
        wider = at_widths(finished[0].config, args.at)
        at = {width: count_parameters(config) / 1e6 for width, config in wider.items()}
        result = predict(points, args.hold_out, at) | runs.origin(finished)
        steps = finished[0].asked["steps"]
        result["source"] = f"{len(finished)} runs, held-out loss after {steps} steps"
        result["losses"] = {width: point["losses"] for width, point in points.items()}
    print_prediction(result)
    console.write_numbers(args.json, result)


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
    add("--json", default="runs/predict.json", metavar="FILE", help="default %(default)s")


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
    command = {"sweep": sweep, "predict": predict_command}[args.command]
    command(args)


if __name__ == "__main__":
    console.run(main)
