"""Is growth worth it? The same size from scratch and by growth, at equal FLOPs.

    python -m lab.growth

Every run is a run of train.py with a full cosine of its own. A schedule's run takes as many FLOPs
as some number of steps from scratch, its *budget*. Its speed-up is the FLOPs that training from
scratch needs for the same loss, over the FLOPs that it took. Tutorial 3 shows the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import console
from flm import FLMConfig
from lab import runs
from lab.runs import FinishedRun, mean
from schedule import Stage, fit_stages, in_samples, read_json, training_flops
from settings import Settings, flag, resolve

# fmt: off
MODEL = ("n_layers=8", "d_model=32", "n_heads=1", "head_dim=32", "d_ff=128", "max_seq_len=128",
         "mup_base_width=32", "init_std=0.05")
TRAINING = {"lr": 0.016, "batch_size": 8, "warmup": 400, "eval_rows": 512}

# Stages as train.py's, but start, ramp and warmup are shares of the run.
SCHEDULES = {
    "small": [{"config": {"n_layers": 2}}],  # never grown: what the final size has to beat
    "early": [{"config": {"n_layers": 2}},
              {"config": {"n_layers": 8}, "start": 0.3, "ramp": 0.1, "warmup": 0.02}],
    "once": [{"config": {"n_layers": 2}},
             {"config": {"n_layers": 8}, "start": 0.5, "ramp": 0.1, "warmup": 0.02}],
}
# fmt: on


# ----------------------------------------------------------------------------------------------
# 1. The runs


def read_schedules(words: list[str]) -> dict[str, list[dict]]:
    """{name: stages}. A word is a name of SCHEDULES, or a JSON file: a list of stages, or several
    as {name: stages}. Raises ValueError where a word is neither."""
    schedules = {}
    for word in words:
        try:
            found = SCHEDULES[word] if word in SCHEDULES else read_json("--stages", word)
        except ValueError as error:
            raise ValueError(f"{error}; give a file or one of {', '.join(SCHEDULES)}") from error
        schedules |= found if isinstance(found, dict) else {Path(word).stem: found}
    for name, stages in schedules.items():
        console.refuse(schedule_problems(name, stages), f"--stages, schedule {name}:")
    return schedules


def schedule_problems(name: str, stages: list[dict]) -> list[str]:
    """What keeps this from being a schedule of this bench."""
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        return [f"must be a list of stages, not {stages!r:.60}"]
    problems = ["is the name of the runs without growth"] * (name == "scratch")
    for stage in stages:
        for key in stage.keys() & {"start", "ramp", "warmup"}:
            share = stage[key]
            if not (isinstance(share, (int, float)) and 0 <= share < 1):
                problems.append(f"{key} = {share!r}: must be a share of the run, from 0 to 1")
    return problems


def equal_steps(stages: list[dict], budget: int, settings: Settings, final: FLMConfig) -> int:
    """The number of steps of this schedule that costs what `budget` steps from scratch cost."""
    many, B = 100_000, settings.batch_size
    options = {"batch_size": B, "lr": settings.lr, "warmup": settings.warmup}
    flops = []
    for given in ([{}], in_samples(stages, many * B)):
        planned = fit_stages(given, final, steps=many, **options)
        flops.append(training_flops(planned, planned[-1].end))
    return max(2 * len(stages) - 1, round(budget * flops[0] / flops[1]))


def bench_settings(args: argparse.Namespace) -> dict[tuple[str, int], list[Settings]]:
    """{(name, budget): a run for each seed}. Writes the stages of each into a file beside its runs.
    Raises ValueError for what train.py would refuse."""
    common = runs.common_settings(args.train, set(), model=MODEL, **TRAINING)
    budgets = args.at or [min(args.steps)]
    shortest = dataclasses.replace(common, steps=min(args.steps + budgets))
    final = resolve(shortest)[1][-1].config
    schedules = {"scratch": [{}], **read_schedules(args.stages)}
    console.make_folder(args.out)
    groups = {}
    for name, stages in schedules.items():
        for budget in args.steps if name == "scratch" else budgets:
            steps = equal_steps(stages, budget, common, final)
            place = Path(args.out) / f"{name}-{budget}"
            file = Path(f"{place}.json")
            file.write_text(json.dumps(in_samples(stages, steps * common.batch_size)))
            run = dataclasses.replace(common, steps=steps, eval_every=steps, stages=str(file))
            groups[name, budget] = [
                dataclasses.replace(run, seed=seed, out=f"{place}-seed{seed}")
                for seed in args.seeds
            ]
    return groups


# ----------------------------------------------------------------------------------------------
# 2. The table


def speed_up(
    scratch: dict[float, float | None], flop: float, loss: float | None
) -> tuple[float | None, bool]:
    """(The FLOPs that training from scratch needs for `loss`, over `flop`; whether that is
    extrapolated.) scratch: {FLOPs: loss} of two runs or more.

    Between two of them the loss is a straight line in log FLOPs; beyond the ends the nearest line
    goes on. None where there is no line, or one on which more training is worse.

    >>> speed_up({1.0: 3.0, 4.0: 2.0}, flop=1.0, loss=2.5)
    (2.0, False)
    """
    points = sorted((f, value) for f, value in scratch.items() if value is not None)
    falls = all(b < a for (_, a), (_, b) in zip(points, points[1:]))
    if loss is None or len(points) < 2 or not falls:
        return None, True
    inner = (i for i, (_, b) in enumerate(points[1:-1]) if loss >= b)
    i = next(inner, len(points) - 2)
    (f, a), (g, b) = points[i : i + 2]
    needed = f * (g / f) ** ((a - loss) / (a - b))
    return needed / flop, not points[-1][1] <= loss <= points[0][1]


def describe(stages: list[Stage]) -> str:
    """Layers x width of each stage, with its start and ramp in shares of the run."""
    end, words = stages[-1].end, []
    for stage in stages:
        size = f"{stage.config.n_layers}x{stage.config.d_model}"
        grown = f" at {stage.start / end:.0%}, ramp {stage.ramp / end:.0%}"
        words.append(size + (grown if stage.start else ""))
    return " -> ".join(words)


MEASURED = ("loss", "cpu_seconds", "wall_seconds")  # of FinishedRun


def make_row(name: str, budget: int, seeds: list[FinishedRun]) -> dict:
    """A row of the table, without its speed-up: the runs of one schedule and budget."""
    first = seeds[0]
    tflop = training_flops(first.stages, first.stages[-1].end) / 1e12
    row = {"name": name, "budget": budget, "steps": first.asked["steps"], "tflop": tflop}
    row["stages"] = describe(first.stages)
    for key in (*MEASURED, "growths"):
        row[key] = {run.asked["seed"]: getattr(run, key) for run in seeds}
    row["mean"] = {key: mean(row[key].values()) for key in MEASURED}
    return row


def add_speed_ups(rows: list[dict]):
    """Compare every row with the rows from scratch: of the means, and seed by seed."""
    scratch = [row for row in rows if row["name"] == "scratch"]
    for row in rows:
        line = {r["tflop"]: r["mean"]["loss"] for r in scratch}
        row["speed_up"], row["extrapolated"] = speed_up(line, row["tflop"], row["mean"]["loss"])
        row["by_seed"] = {}
        for seed, loss in row["loss"].items():
            line = {r["tflop"]: r["loss"][seed] for r in scratch}
            row["by_seed"][seed] = speed_up(line, row["tflop"], loss)[0]


def place_in_table(row: dict) -> tuple:
    """Runs from scratch first, then by budget; the best schedule of each budget first."""
    return row["name"] != "scratch", row["budget"], row["mean"]["loss"] or math.inf


def shown(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def print_table(rows: list[dict]):
    """The table, and how to read it."""
    seeds = len(rows[0]["loss"])
    by_seed = f"{'by seed':>14}" if seeds > 1 else ""
    print(f"\n{'run':22}{'steps':>6}{'TFLOP':>8}{'CPU s':>7}{'wall s':>7}{'loss':>8}", end="")
    print(f"{'speed-up':>10}{by_seed}   stages")
    for row in sorted(rows, key=place_in_table):
        cost, star = row["mean"], "*" if row["extrapolated"] else " "
        run = f"{row['name']} {row['budget']}"
        seconds = f"{cost['cpu_seconds']:7.0f}{cost['wall_seconds']:7.0f}"
        if seeds > 1:
            known = sorted(row["by_seed"].values(), key=lambda value: value or 0)
            by_seed = f"{shown(known[0]) + ' to ' + shown(known[-1]):>14}"
        print(f"{run:22}{row['steps']:6}{row['tflop']:8.2f}{seconds}", end="")
        print(f"{shown(cost['loss'], 4):>8}{shown(row['speed_up']):>9}{star}{by_seed}", end="")
        print(f"   {row['stages']}")
    print(f"""loss: held out, nats per token, mean of {seeds} seed(s); - where a run diverged.
speed-up: the FLOPs that training from scratch needs for that loss, over the FLOPs of this run, by
straight lines in log FLOPs between the runs from scratch; * where a line is extended.
Seconds: of steps, evaluations and growths. Stages: layers x width, in shares of the run.""")


# ----------------------------------------------------------------------------------------------
# 3. Command line


STAGES_HELP = f"""of {", ".join(SCHEDULES)} (default all), or a JSON file of stages as train.py's,
but with start, ramp and warmup in shares of the run; or of several: {{name: stages}}"""
HELP = f"""How much sooner does a grown model reach the same loss? Train one size from scratch with
several budgets, and by growth. Stop it at any time: the same command goes on. What follows -- goes
to train.py, for every run; without it, all runs have:
  {" ".join(MODEL[:6])}
  {" ".join(MODEL[6:])} {" ".join(f"{flag(k)} {v}" for k, v in TRAINING.items())}

examples:
  python -m lab.growth --seeds 0 1 2
  python -m lab.growth --stages mine.json --at 2000 4000 -- --data corpora/mine
"""


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="lab.growth", description=HELP, formatter_class=raw)
    add, names = parser.add_argument, list(SCHEDULES)
    numbers = {"type": int, "nargs": "+", "metavar": "STEPS"}
    add("--steps", **numbers, default=[2000, 4000], help="budgets from scratch (default 2000 4000)")
    add("--at", **numbers, help="budgets of the schedules (default: the smallest of --steps)")
    add("--stages", nargs="+", default=names, metavar="SCHEDULE", help=STAGES_HELP)
    runs.add_options(parser, out="runs/bench")
    return parser


def main(argv: list[str] | None = None):
    args = make_parser().parse_args(argv)
    groups = bench_settings(args)
    finished = runs.run_all([run for group in groups.values() for run in group], args.jobs)
    rest = iter(finished)
    rows = [make_row(*key, [next(rest) for _ in group]) for key, group in groups.items()]
    add_speed_ups(rows)
    print_table(rows)
    console.write_numbers(Path(args.out) / "bench.json", {**runs.origin(finished), "rows": rows})


if __name__ == "__main__":
    console.run(main)
