"""lab/transfer.py - does what a narrow model's search found hold for the wide one?"""
from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import console
import data
import train
from flm import FLM, FLMConfig, parse_fields, preset
from lab.report import plot, pyplot, write_json
from muP import SMALL, at_widths


DIVERGED = "diverged.txt"        # in a run's folder: train.py stopped at a number that is not finite


NEUTRAL = {"out", "preset", "model", "device", "threads", "keep", "save_every", "eval_every", "eval_batch", "compile", "deterministic"}


WORSE = 0.01                     # nats by which a wider model may be worse: the luck of its seed


@dataclass(frozen=True)
class Run:
    """A finished run: what it was asked and how it ended."""
    folder: Path
    asked: dict               # settings and model configuration together
    config: FLMConfig
    N: int                    # every parameter, a tied head once; muScaling's counts have the embedding in them too
    val: float | None         # nats per held-out token after the last step; None where it diverged
    train: float | None       # nats per training token, mean over the last tenth of the steps


def asked(saved: dict) -> dict:
    """What two runs must share to give the same numbers, from a run's config.json: its settings and its model's
    configuration, less what cannot change the result."""
    source = saved["settings"]["data"] or f"the library of Python {saved['python']}"
    everything = {**saved["settings"], **saved["stages"][-1]["config"], "data": source, "stages": len(saved["stages"])}
    return {k: v for k, v in everything.items() if k not in NEUTRAL}


def count(config: FLMConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in FLM(config).parameters())


def read_run(folder: Path) -> Run | None:
    """The run in `folder` by its own config.json and metrics.jsonl; None where it has not ended, or not begun. Raises
    ValueError where the folder holds something else."""
    if not (folder / "config.json").exists() or not (folder / "metrics.jsonl").exists():
        return None
    try:
        saved = json.loads((folder / "config.json").read_text())
        log = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        lines = [json.loads(line) for line in log if line.endswith("\n")]        # a killed run may have cut its last one
        question, config, steps = asked(saved), FLMConfig.from_dict(saved["stages"][-1]["config"]), saved["settings"]["steps"]
        val = [line["val_loss"] for line in lines if "val_loss" in line and line["step"] == steps]
        train = [line["loss"] for line in lines if "loss" in line and line["step"] > steps - max(1, steps // 10)]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} is not a run of train.py, or was edited ({type(error).__name__}: {error})") from error
    if (folder / DIVERGED).exists():
        return Run(folder, question, config, count(config), None, None)
    return Run(folder, question, config, count(config), val[-1], sum(train) / len(train)) if val and train else None


def worse_with_width(losses: dict[int, float | None], tolerance: float = WORSE) -> list[str]:
    """Where "wider is never worse" fails (TP-V: at equal steps and data the loss falls with width): a line for each width
    that diverged, or whose loss exceeds that of a narrower one by more than `tolerance` nats."""
    lines, best = [], (math.inf, None)
    for width, loss in sorted(losses.items()):
        if loss is None:
            lines.append(f"width {width} diverged")
        elif loss > best[0] + tolerance:
            lines.append(f"width {width} is worse than width {best[1]} by {loss - best[0]:.4f} nats")
        best = min(best, (math.inf if loss is None else loss, width))
    return lines


def report_worse(losses: dict, label: str) -> list[str]:
    lines = worse_with_width(losses)
    print(f"{label}: wider is {'never worse' if not lines else 'NOT always better: ' + '; '.join(lines)} (tolerance {WORSE} nats)")
    return lines


def mean(values) -> float | None:
    """None where one is None: a setting that diverged with one seed has no mean."""
    values = list(values)
    return None if None in values else sum(values) / len(values)


AXES = {"lr": [0.002, 0.004, 0.008, 0.016, 0.032, 0.064], "init_std": [0.0125, 0.025, 0.05, 0.1, 0.2], "output_mult": [0.5, 1.0, 2.0, 4.0, 8.0]}


@dataclass(frozen=True)
class Cell:
    folder: Path
    mup: str                  # on, off
    width: int
    value: float              # on the axis
    seed: int
    options: list             # for train.py
    steps: int


def plan(args) -> list[Cell]:
    """Every cell of the sweep, widest first: long ones at the end would leave cores idle. Raises ValueError for what
    train.py would refuse and for folders that hold cells of another sweep, before anything runs."""
    problems = [f"--{name} {' '.join(map(str, given))}: names one twice" for name in ("widths", "values", "seeds", "mup")
                if len(set(given := getattr(args, name))) < len(given)]
    data.refuse(problems + [f"--jobs {args.jobs}: must be at least 1"] * (args.jobs < 1))
    fixed = {"lr": args.lr, "init_std": args.init_std, "output_mult": args.output_mult}
    configs = at_widths(model_config(args.model).replace(mup_base_width=args.base_width or min(args.widths)), sorted(args.widths))
    demo, cells = preset("demo"), []
    for width, mup, value, seed in itertools.product(reversed(configs), args.mup, args.values, args.seeds):
        hyper = fixed | {args.axis: value}
        lr, fields = hyper.pop("lr"), {k: v for k, v in configs[width].to_dict().items() if k != "mup"} | hyper
        folder = Path(args.out) / f"{'mup' if mup == 'on' else 'standard'}-w{width:04}-{args.axis}{value:g}-seed{seed}"
        # One thread a run. The arithmetic is not left to each run's choice: cells must differ in nothing but their cell.
        ours = {"--stages": "none", "--steps": args.steps, "--batch-size": args.batch_size, "--out": folder, "--mup": mup, "--seed": seed, "--lr": lr}
        options = [*"--threads 1 --dtype float32 --keep 1 --warmup 800 --eval-every".split(), str(args.steps), *args.train, *(str(x) for pair in ours.items() for x in pair),
                   "--model", *(f"{k}={v}" for k, v in fields.items() if v != getattr(demo, k))]
        given = vars(train.make_parser().parse_args(options))
        if modes := {"resume", "eval_only", "export", "benchmark"} & set(given):
            raise ValueError(f"{' '.join(modes)} after --: a sweep's cells are new runs")
        s, (stage,) = train.resolve(train.Settings(**given | {"model": tuple(given["model"])}))
        if (folder / "config.json").exists():
            wanted = asked({"settings": dataclasses.asdict(s), "stages": [{"config": stage["config"].to_dict()}], "python": platform.python_version()})
            there = asked(json.loads((folder / "config.json").read_text()))
            problems += [f"{folder} has {k} = {there.get(k)!r}, this sweep {v!r}" for k, v in wanted.items() if there.get(k) != v != "auto"]
        cells.append(Cell(folder, mup, width, value, seed, options, args.steps))
    if problems:
        raise ValueError("cells of another sweep are in the way, choose another --out:\n  " + "\n  ".join(problems[:10]))
    train.open_corpus(s.data, s.tokenizer, s.tokenizer_file, stage["config"])        # prepared once, before many would
    return cells


def run_cells(cells: list[Cell], jobs: int) -> list[Run]:
    """Run train.py for every cell that is not finished, `jobs` at a time; a half-finished one goes on where it stopped. A
    finished cell keeps its logs, not its checkpoints. Raises ValueError with train.py's last words where it fails."""
    live, stop = set(), threading.Event()

    def finish(cell: Cell) -> Run | None:
        run, log = read_run(cell.folder), cell.folder.with_name(cell.folder.name + ".log")
        if run or stop.is_set():
            return run
        steps = [json.loads(path.read_text())["step"] for path in cell.folder.glob("step-*/checkpoint.json")]
        half_done = steps and max(steps) < cell.steps
        if not half_done:                        # killed before its first checkpoint: train.py wants the folder empty
            shutil.rmtree(cell.folder, ignore_errors=True)
        command = [sys.executable, str(Path(train.__file__)), *(["--resume", str(cell.folder)] if half_done else cell.options)]
        with open(log, "w") as output:           # in a session of its own: Ctrl-C comes to us, and we ask it to save and stop
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            live.add(process)
            if stop.is_set():                    # in the moment between the look above and now
                process.terminate()
            code = process.wait()
            live.discard(process)
        if stop.is_set():
            return None
        last = "\n  ".join(log.read_text(errors="replace").strip().splitlines()[-4:])
        if code == 1 and "stopped before the optimizer" in last:
            (cell.folder / DIVERGED).write_text(last + "\n")
            (cell.folder / "metrics.jsonl").touch()
        elif code:
            raise ValueError(f"{cell.folder.name}: train.py ended with code {code}, its last words (all of them are in {log}):\n  {last}")
        for path in cell.folder.glob("step-*"):
            shutil.rmtree(path)
        log.unlink()
        return read_run(cell.folder)

    cells[0].folder.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(cells), unit="cell", dynamic_ncols=True) as bar:
        futures = [pool.submit(finish, cell) for cell in cells]
        try:
            for future in as_completed(futures):
                run = future.result()
                bar.update()
                bar.set_postfix_str(f"{run.folder.name}: " + ("diverged" if run.val is None else f"{run.val:.3f}"))
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(live):
                process.terminate()
            raise
    return [future.result() for future in futures]


def landscape(cells: list[Cell], runs: list[Run]) -> dict[str, dict[int, dict[float, float | None]]]:
    """{"muP" or "standard": {width: {value: held-out loss, the mean over the seeds}}}, everything in rising order."""
    table: dict[str, dict] = {}
    for cell, run in sorted(zip(cells, runs), key=lambda pair: (pair[0].mup == "off", pair[0].width, pair[0].value)):
        table.setdefault("muP" if cell.mup == "on" else "standard", {}).setdefault(cell.width, {}).setdefault(cell.value, []).append(run.val)
    return {name: {width: {value: mean(losses) for value, losses in row.items()} for width, row in by.items()} for name, by in table.items()}


def best_values(by_width: dict[int, dict[float, float | None]]) -> dict[int, float | None]:
    """{width: the value with the lowest loss, None where all diverged}."""
    alive = {width: {v: loss for v, loss in row.items() if loss is not None} for width, row in by_width.items()}
    return {width: min(row, key=row.get) if row else None for width, row in alive.items()}


def holds(best: dict[int, float | None]) -> bool:
    """Whether what is best at one width is so at all of them, within one factor of 2 (and a grid's rounding)."""
    return None not in best.values() and max(best.values()) <= 2.001 * min(best.values())


def run_sweep(args):
    """`python muP.py sweep`."""
    args.values = sorted(args.values or AXES[args.axis])
    cells = plan(args)
    runs = run_cells(cells, args.jobs)
    table, report = landscape(cells, runs), {}
    for name, by_width in table.items():
        best = best_values(by_width)
        print(f"\n{name}: held-out loss after {args.steps} steps, nats per token, mean of {len(args.seeds)} seed(s); * the best of its width\n"
              f"{args.axis:>12}" + "".join(f"{width:>10}" for width in by_width))
        for value in args.values:
            print(f"{value:>12g}" + "".join(("diverged  " if row[value] is None else f"{row[value]:.4f}{'*' if best[width] == value else ' '} ").rjust(11)
                                            for width, row in by_width.items()))
        print(f"{name}: best {args.axis} by width: " + ", ".join(f"{w}: {'none' if v is None else format(v, 'g')}" for w, v in best.items())
              + f". It {'holds' if holds(best) else 'does NOT hold'} within a factor of 2 over widths {min(best)} to {max(best)}." * (len(best) > 1))
        edge = [str(w) for w, v in best.items() if v in (args.values[0], args.values[-1])]
        if edge and len(args.values) > 1:
            print(f"  at width {', '.join(edge)} the best is at the edge of the grid: --values beyond it would say more")
        chosen = best[min(best)]
        worse = [] if chosen is None else report_worse({w: row[chosen] for w, row in by_width.items()}, f"{name} at {args.axis} {chosen:g}")
        report[name] = {"best": best, "holds": holds(best), "worse_with_width": worse}
    write_json(Path(args.out) / "sweep.json", {
        "axis": args.axis, "torch": torch.__version__, "jobs": args.jobs, **report, "landscape": table,
        "same_in_all": {k: v for k, v in runs[0].asked.items() if all(run.asked.get(k) == v for run in runs)},
        "cells": [[c.mup, c.width, c.value, c.seed, r.N, r.val, r.train] for c, r in zip(cells, runs)],
        "cell": ["mup", "width", args.axis, "seed", "parameters", "val_loss", "train_loss"]})
    if args.plot:
        plot(args.plot, 2, [(name, args.axis, "held-out loss", {f"width {width}": (list(row), [math.nan if v is None else v for v in row.values()])
                             for width, row in by_width.items()}) for name, by_width in table.items()])
    return 0


SCAN = (-4.0, -0.02)             # where b is looked for


@dataclass(frozen=True)
class Law:
    a: float
    b: float
    c: float

    def __call__(self, N):
        """Loss at N million parameters."""
        return self.a * N ** self.b + self.c


def fit_law(N, loss) -> Law:
    """L = a N^b + c by least squares; N (n,) in millions of parameters, loss (n,) in nats per token.

    At a given b the law is linear in a and c, so those are solved for and b alone is searched: a scan, then finer ones
    around the best. There is no starting point to choose and no local minimum to end in. Raises ValueError for fewer than
    4 different N, and where there is no such law: then it says what was tried and gives no number."""
    N, loss = np.asarray(N, float), np.asarray(loss, float)
    if len(N) != len(loss) or len(np.unique(N)) < 4:
        raise ValueError(f"{len(np.unique(N))} different model sizes for the 3 unknowns a, b and c: give at least 4")
    if not (np.isfinite(N).all() and (N > 0).all() and np.isfinite(loss).all()):
        raise ValueError(f"sizes and losses must be finite and sizes above 0: got N = {N.tolist()}, loss = {loss.tolist()}")
    center = np.exp(np.log(N).mean())            # powers of N / center are of order 1

    def solve(b):                                # b (k,) -> a, c and the sum of squared residuals, (k,) each
        x = (N / center) ** b[:, None]                                                   # (k, n)
        dx = x - x.mean(1, keepdims=True)
        a = (dx * (loss - loss.mean())).sum(1) / (dx * dx).sum(1)
        c = loss.mean() - a * x.mean(1)
        return a, c, ((a[:, None] * x + c[:, None] - loss) ** 2).sum(1)

    grid = np.linspace(*SCAN, 2001)
    for _ in range(6):
        at = int(solve(grid)[2].argmin())
        grid = np.linspace(grid[max(0, at - 1)], grid[min(len(grid) - 1, at + 1)], 101)
    a, c, _ = (values[50].item() for values in solve(grid))
    b = grid[50].item()
    if a <= 0 or not SCAN[0] + 0.01 < b < SCAN[1] - 0.01:
        raise ValueError(f"no law a N^b + c that falls fits these {len(N)} points. Tried: b from {SCAN[0]} to {SCAN[1]}, with a and c solved for at "
                         f"each; the residuals are smallest {'at an end of that range' if a > 0 else 'where a is negative'}.\n"
                         f"Use longer runs, more seeds, or leave out the narrowest width")
    return Law(a / center ** b, b, c)


def bootstrap(N, losses, targets, draws: int = 1000) -> tuple[list | None, int]:
    """losses (n, S): fit the means of S seeds drawn with replacement, the same at every width (a seed is an order of the
    data, which the widths share). -> [2.5%, 97.5%] of the loss at each target N, and the number of draws without a law."""
    losses, rng, known = np.asarray(losses, float), np.random.default_rng(0), {}
    drawn = [tuple(sorted(rng.integers(0, losses.shape[1], losses.shape[1]).tolist())) for _ in range(draws)]
    for seeds in set(drawn):
        try:
            law = fit_law(N, losses[:, seeds].mean(1))
            known[seeds] = [law(target) for target in targets]
        except ValueError:
            pass
    found = [known[seeds] for seeds in drawn if seeds in known]
    return np.quantile(found, [0.025, 0.975], axis=0).T.tolist() if found else None, draws - len(found)


def collect(folders: list, which: str) -> tuple[dict[int, dict], list[Run]]:
    """Finished runs -> {width: {"N": millions, "losses": {seed: loss}}}, narrowest first. A folder of runs stands for all
    of them. Raises ValueError where runs have not finished, differ in more than width and seed, or lack each other's seeds."""
    paths = []
    for folder in map(Path, folders):
        paths += [folder] if (folder / "config.json").exists() else sorted(path.parent for path in folder.glob("*/config.json")) or [folder]
    runs = {path: read_run(path) for path in paths}
    problems = [f"{path}: no finished run (its metrics.jsonl has no evaluation after the last step)" for path, run in runs.items() if run is None]
    problems += [f"{run.folder} diverged" for run in runs.values() if run and run.val is None]
    runs = sorted((run for run in runs.values() if run), key=lambda run: (run.config.d_model, run.asked["seed"]))
    for key in sorted(set().union(*(run.asked for run in runs)) - {"d_model", "n_heads", "d_ff", "seed"}):
        found = [json.dumps(run.asked.get(key)) for run in runs]
        if len(set(found)) > 1:
            problems.append(f"the runs differ in {key}: " + ", ".join(f"{v} ({found.count(v)} runs)" for v in dict.fromkeys(found)))
    points: dict[int, dict] = {}
    for run in runs:
        width, seed = run.config.d_model, run.asked["seed"]
        point = points.setdefault(width, {"N": run.N / 1e6, "losses": {}})
        if seed in point["losses"] or point["N"] != run.N / 1e6:
            problems.append(f"{run.folder} is a second run of width {width} and seed {seed}")
        point["losses"][seed] = getattr(run, which)
    if len({tuple(point["losses"]) for point in points.values()}) > 1:
        problems.append("the widths have different seeds: " + "; ".join(f"{width} has {list(point['losses'])}" for width, point in points.items()))
    if problems:
        raise ValueError("these runs do not belong to one fit:\n  " + "\n  ".join(problems)
                         + "\nName finished runs of one setting, by a pattern for example: runs/sweep/mup-*-lr0.008-*")
    return points, runs


def predict(points: dict[int, dict], hold_out: int, at: dict[int, float]) -> dict:
    """Fit all but the `hold_out` widest of `points` (see collect); predict those and the widths of `at`, {width: N in
    millions}. Returns JSON values."""
    if not 0 <= hold_out < len(points):
        raise ValueError(f"--hold-out {hold_out}: there are {len(points)} widths")
    measured = [{"width": width, "N": points[width]["N"], "loss": mean(points[width]["losses"].values())} for width in sorted(points)]
    fitted, held = measured[:len(points) - hold_out], measured[len(points) - hold_out:]
    law = fit_law([p["N"] for p in fitted], [p["loss"] for p in fitted])
    for p in fitted:
        p |= {"law": law(p["N"]), "residual": p["loss"] - law(p["N"])}
    for p in held:
        p |= {"predicted": law(p["N"]), "error": law(p["N"]) - p["loss"], "relative": law(p["N"]) / p["loss"] - 1}
    held += [{"width": width, "N": N, "predicted": law(N)} for width, N in at.items() if width not in points]
    seeds, failed = len(points[min(points)]["losses"]), 0
    if seeds > 1 and held:
        intervals, failed = bootstrap([p["N"] for p in fitted], [list(points[p["width"]]["losses"].values()) for p in fitted], [p["N"] for p in held])
        held = [p | {"interval": interval} for p, interval in zip(held, intervals or [None] * len(held))]
    return {**dataclasses.asdict(law), "seeds": seeds, "draws_without_law": failed, "fitted": fitted, "predicted": held}


def run_predict(args):
    """`python muP.py predict`."""
    if bool(args.points) == bool(args.runs) or args.points and args.at:
        raise ValueError("give either folders of runs (and --at WIDTH for widths without one) or --points FILE")
    if args.points:
        points, at, source = read_points(Path(args.points)), {}, args.points
    else:
        points, runs = collect(args.runs, args.loss)
        at = {width: count(config) / 1e6 for width, config in at_widths(runs[0].config, args.at).items()}
        source = f"{len(runs)} runs, {'held-out' if args.loss == 'val' else 'training'} loss after {runs[0].asked['steps']} steps"
    result = predict(points, args.hold_out, at)
    print(f"{source}, {len(result['fitted'])} widths fitted, mean of {result['seeds']} seed(s):\n"
          f"L = {result['a']:.4g} N^{result['b']:.4g} + {result['c']:.4g}, N in millions of parameters\n\n"
          f"{'fitted':>10}{'N':>11}{'loss':>10}{'law':>10}{'residual':>10}")
    for p in result["fitted"]:
        print(f"{p['width']:>10}{p['N']:>11.3f}{p['loss']:>10.4f}{p['law']:>10.4f}{p['residual']:>+10.4f}")
    if result["predicted"]:
        print(f"\n{'predicted':>10}{'N':>11}{'law':>10}{'measured':>10}{'error':>18}" + "    95% over the seeds" * (result["seeds"] > 1))
    for p in result["predicted"]:
        known = f"{p['loss']:>10.4f}{p['error']:>+10.4f}{p['relative']:>+8.2%}" if "loss" in p else f"{'not run':>10}{'':18}"
        print(f"{p['width']:>10}{p['N']:>11.3f}{p['predicted']:>10.4f}{known}" + ("    {:.4f} to {:.4f}".format(*p["interval"]) if p.get("interval") else ""))
    if result["draws_without_law"]:
        print(f"{result['draws_without_law']} of 1000 resampled sets of seeds had no law: the interval is that of the others")
    result |= {"source": source, "worse_with_width": report_worse({w: mean(point["losses"].values()) for w, point in points.items()}, "in these runs")}
    write_json(args.json, result if args.points else result | {"losses": {w: point["losses"] for w, point in points.items()}, "same_in_all": {
        k: v for k, v in runs[0].asked.items() if k not in ("d_model", "n_heads", "d_ff", "seed")}, "torch": torch.__version__})
    return 0


def read_points(path: Path) -> dict[int, dict]:
    """{"points": [{"width", "N" in millions, "loss"}, ...]} in a JSON file -> what `collect` gives."""
    try:
        return {p["width"]: {"N": float(p["N"]), "losses": {0: float(p["loss"])}} for p in json.loads(path.read_text())["points"]}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path} must hold {{"points": [{{"width": ..., "N": millions, "loss": ...}}, ...]}}: {type(error).__name__}, {error}') from error


def model_config(given: list) -> FLMConfig:
    """The small model, changed by FIELD=VALUE. Raises ValueError for what is no field or no value, for fields that do not fit
    together, and for those that other options decide."""
    changes, problems = parse_fields(given)
    problems += [f"--model {name}: --widths, --base-width and --mup decide it, leave it out"
                 for name in ("d_model", "n_heads", "d_ff", "mup", "mup_base_width") if name in changes]
    data.refuse(problems)
    return preset("demo").replace(**SMALL | changes)


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="lab.transfer", description="muP: tune a narrow model, train a wide one.")
    commands = parser.add_subparsers(dest="command", required=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    def command(name, run, help, description, epilog, default_json=None):
        p = commands.add_parser(name, help=help, description=description, epilog=epilog, formatter_class=raw)
        p.set_defaults(run=run)
        if default_json:
            p.add_argument("--json", default=default_json, metavar="FILE", help="where the numbers go (default %(default)s)")
        if name != "predict":
            p.add_argument("--plot", metavar="FILE", help="draw it, as .png, .pdf or .svg (needs matplotlib)")
            p.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256], metavar="C", help="d_model (default 32 64 128 256)")
            p.add_argument("--model", nargs="+", default=[], metavar="FIELD=VALUE",
                           help="change other fields of the model (default " + " ".join(f"{k}={v}" for k, v in SMALL.items()) + ")")
        return p

    p = command("sweep", run_sweep, "loss over a hyper-parameter and the width",
                "Train a model for every cell of a grid, values of a hyper-parameter x widths x parametrizations x seeds, each a run\n"
                "of train.py. Stop it at any time: the same command goes on, and does not run finished cells again. Their logs stay\n"
                "in --out, their checkpoints do not. What follows -- goes to train.py, for every cell.",
                "examples:\n  python muP.py sweep --values 0.004 0.008 0.016 -- --data corpora/mine --warmup 400\n"
                "  python muP.py sweep --axis output_mult --widths 32 128 --out runs/sweep-output\n"
                "  python muP.py sweep --mup on --widths 32 48 64 80 --values 0.008 --seeds 0 1 2 --out runs/narrow")
    p.add_argument("--axis", choices=AXES, default="lr", help="the hyper-parameter (default %(default)s)")
    p.add_argument("--values", type=float, nargs="+", help="its values (default: " + "; ".join(f"{k} {' '.join(map(str, v))}" for k, v in AXES.items()) + ")")
    p.add_argument("--mup", nargs="+", choices=("on", "off"), default=["on", "off"], help="parametrizations (default both)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and data; their mean is shown (default 0)")
    p.add_argument("--base-width", type=int, metavar="C", help="where m = 1 (default: the narrowest)")
    p.add_argument("--lr", type=float, default=0.008, help="where it is not the axis (default %(default)s)")
    p.add_argument("--init-std", type=float, default=0.05, help="likewise (default %(default)s: the paper's 0.016 at width 256 is 0.045 at 32)")
    p.add_argument("--output-mult", type=float, default=2.0, help="likewise (default %(default)s, the paper's)")
    p.add_argument("--steps", type=int, default=200, help="(default %(default)s)")
    p.add_argument("--batch-size", type=int, default=16, help="rows per step (default %(default)s)")
    p.add_argument("--out", default="runs/sweep", metavar="DIR", help="a folder for the cells and sweep.json (default %(default)s)")
    p.add_argument("--jobs", type=int, default=cores, help="runs at a time, one thread each (default: one per core, %(default)s)")

    p = command("predict", run_predict, "the loss of a wide model, from narrow ones",
                "Fit L = a N^b + c to finished runs of several widths (their own logs), hold the widest out, and compare.",
                "examples:\n  python muP.py predict runs/narrow --hold-out 0 --at 256     before the wide run\n"
                "  python muP.py predict runs/narrow runs/wide                 after it\n"
                "  python muP.py predict --points tutorials/measurements/muscaling-points.json --hold-out 3", "runs/predict.json")
    p.add_argument("runs", nargs="*", metavar="RUN", help="runs, or folders of runs, alike in all but width and seed")
    p.add_argument("--points", metavar="FILE", help="instead of runs: published points, as JSON")
    p.add_argument("--hold-out", type=int, default=1, metavar="K", help="how many of the widest are predicted, not fitted (default %(default)s)")
    p.add_argument("--at", type=int, nargs="+", default=[], metavar="C", help="widths without a run to predict")
    p.add_argument("--loss", choices=("val", "train"), default="val", help="held-out loss, or the training loss of the last tenth (default %(default)s)")
    return parser


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    args = make_parser().parse_args(argv[:end])
    args.train = argv[end + 1:]
    if args.train and args.command != "sweep":
        raise ValueError(f"-- {' '.join(args.train)}: only sweep hands options on to train.py")
    if getattr(args, "plot", None):
        pyplot()                                 # a missing matplotlib shows now, not after an hour
    return args.run(args)




if __name__ == "__main__":
    console.run(main)
