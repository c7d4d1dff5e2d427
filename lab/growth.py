"""Is growth worth it? The same size from scratch and by growth, each at its best, at equal FLOPs.

    python -m lab.growth

1. the runs     budgets, learning rates and decays of every schedule
2. choosing     the best cell of each schedule and budget, by one seed; other seeds report it
3. comparing    the speed-up at equal loss, the gap at the same tokens, what to distrust
4. the table
5. the command line

A *cell* is a learning rate and a decay: the share of the run in which wsd's line falls, or the
paper's cosine. A schedule's run takes as many FLOPs as some number of steps from scratch, its
*budget*. Runs of wsd that differ in their end alone share a trunk (lab/runs.py).

What is compared are the best cells. A speed-up is read between two budgets from scratch and never
beyond them. A schedule of one stage trains another size alone, and never grows. Where it is as good
as the final size from scratch, the final size is not worth having, and the table says so. So there
is a second speed-up, against the best of all sizes that were trained alone. Tutorial 3 shows the
result.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Collection
from pathlib import Path

import console
from console import read_json
from flm import FLMConfig
from lab import runs
from lab.runs import FinishedRun, mean
from schedule import Stage, fit_stages, in_samples, training_flops
from settings import Settings, flag, resolve

# fmt: off
MODEL = ("n_layers=8", "d_model=32", "n_heads=1", "head_dim=32", "d_ff=128", "max_seq_len=128",
         "mup_base_width=32", "init_std=0.05")
TRAINING = {"batch_size": 8, "warmup": 400, "eval_rows": 512, "min_lr": 0.0}

# Stages as train.py's, but start, ramp and warmup are shares of the run.
SCHEDULES = {
    # "small" and "middle" never grow: what growth has to beat.
    "small": [{"config": {"n_layers": 2}}],
    "middle": [{"config": {"n_layers": 4}}],
    "early": [{"config": {"n_layers": 2}},
              {"config": {"n_layers": 8}, "start": 0.3, "ramp": 0.1, "warmup": 0.02}],
    "once": [{"config": {"n_layers": 2}},
             {"config": {"n_layers": 8}, "start": 0.5, "ramp": 0.1, "warmup": 0.02}],
}
# fmt: on


# ----------------------------------------------------------------------------------------------
# 1. The runs


def read_schedules(words: list[str], problems: list[str]) -> dict[str, list[dict]]:
    """{name: stages}. A word is a name of SCHEDULES, or a JSON file: a list of stages, or several
    as {name: stages}. What is wrong with them is added to `problems`."""
    schedules = {}
    for word in words:
        try:
            found = SCHEDULES[word] if word in SCHEDULES else read_json("--stages", word)
        except ValueError as error:
            problems.append(f"{error}; give a file or one of {', '.join(SCHEDULES)}")
            continue
        named = found if isinstance(found, dict) else {Path(word).stem: found}
        twice = [name for name in named if name in schedules]
        problems += [f"--stages: two schedules have the name {name!r}" for name in twice]
        schedules |= named
    for name, stages in schedules.items():
        found = schedule_problems(name, stages)
        problems += [f"--stages, schedule {name}: {problem}" for problem in found]
    return schedules


def schedule_problems(name: str, stages: list[dict]) -> list[str]:
    """What keeps this from being a schedule of this bench."""
    problems = ["is the name of the runs without growth"] * (name == "scratch")
    if not re.fullmatch(r"\w[\w.-]*", name):
        problems.append("its name becomes that of a folder: use letters, digits, -, _ and .")
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        return [*problems, f"must be a list of stages, not {stages!r:.60}"]
    for stage in stages:
        for key in stage.keys() & {"start", "ramp", "warmup"}:
            share = stage[key]
            if not (isinstance(share, (int, float)) and 0 <= share < 1):
                problems.append(f"{key} = {share!r}: must be a share of the run, from 0 to 1")
    if problems:
        return problems
    starts = [stage.get("start", 0) for stage in stages]
    if any(starts[:1]):
        problems.append(f"its first stage starts at {starts[0]}, but must start at 0")
    for number, (before, start) in enumerate(itertools.pairwise(starts), 2):
        if start <= before:
            problems.append(f"stage {number} starts at {start}: must be a share above {before}")
    return problems


def steps_by_flops(
    stages: list[dict], settings: Settings, final: FLMConfig
) -> tuple[float, list[str]]:
    """(how many steps of this schedule cost what a step from scratch costs, what is wrong with the
    schedule)."""
    many, B = 100_000, settings.batch_size
    options = {"batch_size": B, "lr": settings.lr, "warmup": settings.warmup}
    flops = []
    try:
        for given in ([{}], in_samples(stages, many * B)):
            planned = fit_stages(given, final, steps=many, **options)
            flops.append(training_flops(planned))
    except ValueError as error:
        return math.nan, [f"as samples of a run of {many * B:,}: {error}"]
    last, wanted = planned[-1].config.to_dict(), final.to_dict()
    differ = [f"{k} = {v} in place of {wanted[k]}" for k, v in last.items() if v != wanted[k]]
    if differ and len(planned) > 1:
        return math.nan, [f"must end as the model from scratch, but ends with {', '.join(differ)}"]
    return flops[0] / flops[1], []


def read_decays(words: list[str], problems: list[str]) -> list[float | None]:
    """--decays: shares of the run, or "cosine", which is None here. Every word that is neither is
    added to `problems`."""
    decays = []
    for word in dict.fromkeys(words):
        try:
            decays.append(None if word == "cosine" else float(word))
            if word != "cosine" and not 0 < decays[-1] <= 1:
                raise ValueError
        except ValueError:
            problems.append(f"--decays {word}: must be cosine, or a share above 0 and up to 1")
    return decays


def decay_words(decay: float | None) -> str:
    return "cosine" if decay is None else f"{decay:g}"


Cell = tuple[float, float | None]  # learning rate and decay


@dataclasses.dataclass
class Bench:
    """What the command asks for. of[name, budget]: settings that lack learning rate, decay and
    seed."""

    out: Path
    cells: list[Cell]
    of: dict[tuple[str, int], Settings]

    def run(self, key: tuple[str, int], cell: Cell, seed: int) -> Settings:
        """The run of a schedule and budget, in one cell, with one seed."""
        (name, budget), (lr, decay) = key, cell
        out = self.out / f"{name}-{budget}-lr{lr:g}-{decay_words(decay)}-seed{seed}"
        more = {} if decay is None else {"lr_schedule": "wsd", "lr_decay": decay}
        return dataclasses.replace(self.of[key], lr=lr, seed=seed, out=str(out), **more)


def number_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the numbers of the command line."""
    problems, whole = [], {"--steps": args.steps, "--at": args.at or [], "--jobs": [args.jobs]}
    for option, values in whole.items():
        problems += [f"{option} {value}: must be at least 1" for value in values if value < 1]
    for option, values in {"--seeds": args.seeds, "--tune": [args.tune]}.items():
        problems += [f"{option} {value}: must be at least 0" for value in values if value < 0]
    wrong = [lr for lr in args.lrs if not 0 < lr < math.inf]
    return problems + [f"--lrs {lr}: must be a number above 0" for lr in wrong]


def make_bench(args: argparse.Namespace) -> Bench:
    """Writes the stages of each schedule and budget into a file beside the runs. Sizes that never
    grow are trained at the budgets of --steps, schedules that grow at those of --at. Raises
    ValueError with what is wrong with the options, and for what train.py would refuse."""
    problems = number_problems(args)
    decays = read_decays(args.decays, problems)
    schedules = {"scratch": [{}], **read_schedules(args.stages, problems)}
    console.refuse(problems)
    cells = list(itertools.product(dict.fromkeys(args.lrs), decays))
    decided = {"lr", "lr_schedule", "lr_decay"}
    common = runs.common_settings(args.train, decided, model=MODEL, lr=args.lrs[0], **TRAINING)
    budgets = sorted(set(args.steps))
    at = sorted(set(args.at or budgets))
    shortest = dataclasses.replace(common, steps=min(budgets + at))
    final = resolve(shortest)[1][-1].config
    files, of = {}, {}
    for name, stages in schedules.items():
        ratio, found = steps_by_flops(stages, common, final)
        fewest = 2 * len(stages) - 1
        for budget in () if found else budgets if len(stages) == 1 else at:
            steps = round(budget * ratio)
            if steps < fewest:
                least = math.ceil(fewest / ratio)
                found.append(
                    f"a budget of {budget} gives {steps} step(s): take {least} or more (--at)"
                )
                continue
            file = Path(args.out) / f"{name}-{budget}.json"
            files[file] = json.dumps(in_samples(stages, steps * common.batch_size))
            more = {"steps": steps, "eval_every": steps, "stages": str(file)}
            of[name, budget] = dataclasses.replace(common, **more)
        problems += [f"--stages, schedule {name}: {problem}" for problem in found]
    console.refuse(problems)
    write_stages(files)
    for (name, budget), settings in of.items():
        try:
            resolve(settings)
        except ValueError as error:
            steps = settings.steps
            problems.append(f"schedule {name}, budget {budget}, a run of {steps} steps: {error}")
    console.refuse(problems)
    return Bench(Path(args.out), cells, of)


def write_stages(files: dict[Path, str]):
    """Write files of stages: {path: text}. Raises ValueError, and writes none, where runs are there
    that had other stages."""
    taken = []
    for file, text in files.items():
        has_runs = any(file.parent.glob(f"{file.stem}-lr*"))
        if has_runs and file.exists() and file.read_text() != text:
            taken.append(f"{file} has other stages")
    console.refuse(taken, "another study is there, choose another --out:")
    for file, text in files.items():
        console.make_folder(file.parent)
        file.write_text(text)


# ----------------------------------------------------------------------------------------------
# 2. Choosing


def best_cell(losses: dict[Cell, float | None]) -> Cell:
    """The cell with the lowest loss; the first one where all runs diverged."""
    return min(losses, key=lambda cell: math.inf if losses[cell] is None else losses[cell])


def at_the_edge(cell: Cell, cells: list[Cell]) -> list[str]:
    """Which values of the best cell are at an end of what was tried: there the best one of all may
    lie outside. A value that was tried alone is at both ends.

    >>> at_the_edge((0.1, 0.2), [(lr, d) for lr in (0.1, 0.2, 0.4) for d in (0.1, 0.2, 0.4)])
    ['learning rate 0.1']
    """
    words = []
    for value, tried, name in zip(cell, zip(*cells), ("learning rate", "decay")):
        numbers = [number for number in tried if number is not None]
        if value is not None and value in (min(numbers), max(numbers)):
            words.append(f"{name} {value:g}")
    return words


def flops_of(bench: Bench) -> int:
    """The FLOPs of all schedules and budgets, one run of each."""
    planned = [resolve(settings)[1] for settings in bench.of.values()]
    return sum(training_flops(stages) for stages in planned)


def choose(
    bench: Bench, seed: int, jobs: int, later: int
) -> dict[tuple[str, int], dict[Cell, float | None]]:
    """{(schedule, budget): {cell: loss}}, with one seed. Nothing is trained for a single cell.
    later: see runs.run_all."""
    if len(bench.cells) == 1:
        return {key: dict.fromkeys(bench.cells) for key in bench.of}
    pairs = list(itertools.product(bench.of, bench.cells))
    finished = runs.run_all([bench.run(*pair, seed) for pair in pairs], jobs, later)
    losses = {key: {} for key in bench.of}
    for (key, cell), run in zip(pairs, finished):
        losses[key][cell] = run.loss
    return losses


# ----------------------------------------------------------------------------------------------
# 3. Comparing


def falling(line: dict[float, float | None]) -> list[tuple[float, float]]:
    """The points of a line, in order; none where there are fewer than two or where it rises."""
    points = sorted((x, y) for x, y in line.items() if y is not None)
    falls = all(b < a for (_, a), (_, b) in itertools.pairwise(points))
    return points if falls and len(points) > 1 else []


def curve(points: list[tuple[float, float]], i: int) -> tuple[float, float]:
    """(b, a): from point i on, the loss is its own + b t + a t^2, where t is the log of the work
    over that of point i.

    This parabola goes through points i and i + 1 and bends towards the nearest third one, as far
    as it still falls. (A straight line lies above losses that fall more and more slowly: it would
    make every speed-up too high.) With two points it is straight."""
    (x, y), (x1, y1) = ((math.log(work), loss) for work, loss in points[i : i + 2])
    slope, h = (y1 - y) / (x1 - x), x1 - x
    others = points[max(0, i - 1) : i] + points[i + 2 : i + 3]
    if not others:
        return slope, 0.0
    distances = [(abs(math.log(work) - x - h / 2), math.log(work), loss) for work, loss in others]
    _, x2, y2 = min(distances)
    bend = ((y2 - y1) / (x2 - x1) - slope) / (x2 - x)
    bend = max(slope / h, min(-slope / h, bend))  # it falls all the way to point i + 1
    return slope - bend * h, bend


def speed_up(
    scratch: dict[float, float | None], flop: float, loss: float | None
) -> tuple[float | None, str]:
    """The FLOPs that training from scratch needs for `loss`, over `flop`. scratch: {FLOPs: loss}.

    Between two runs from scratch the loss is a curve in log FLOPs, see curve(). Beyond them there
    is none: then the number is a bound, and the word beside it is ">" or "<". None where there are
    fewer than two runs, or more training is worse.

    >>> speed_up({1.0: 3.0, 4.0: 2.0}, flop=1.0, loss=2.5)
    (2.0, '')
    >>> speed_up({1.0: 3.0, 4.0: 2.0}, flop=1.0, loss=1.5)
    (4.0, '>')
    """
    points = falling(scratch)
    if loss is None or not points:
        return None, ""
    if loss > points[0][1]:
        return points[0][0] / flop, "<"
    if loss < points[-1][1]:
        return points[-1][0] / flop, ">"
    i = next(i for i in range(len(points) - 1) if loss >= points[i + 1][1])
    b, a = curve(points, i)
    above = points[i][1] - loss
    # The first t at which above + b t + a t^2 is 0, in a form that a = 0 does not break.
    t = 2 * above / (math.sqrt(max(0.0, b * b - 4 * a * above)) - b) if above else 0.0
    return points[i][0] * math.exp(t) / flop, ""


def number_or_bound(
    line: dict[float, float | None], flop: float, loss: float | None
) -> tuple[float | None, list | None]:
    """speed_up for a report: (the number, None), or (None, [">" or "<", the bound])."""
    value, bound = speed_up(line, flop, loss)
    return (None, [bound, value]) if bound else (value, None)


def gap(scratch: dict[float, float | None], samples: float, loss: float | None) -> float | None:
    """How much higher the loss is than from scratch after the same samples: 0 is fully mixed, as
    if the early samples had been seen by the large model. scratch: {samples: loss}, a curve in log
    samples, see curve(). None outside of it.

    >>> gap({1: 3.0, 4: 2.0}, samples=2, loss=2.75)
    0.25
    """
    points = falling(scratch)
    if loss is None or not points or not points[0][0] <= samples <= points[-1][0]:
        return None
    i = next(i for i in range(len(points) - 1) if samples <= points[i + 1][0])
    b, a = curve(points, i)
    t = math.log(samples / points[i][0])
    return loss - (points[i][1] + b * t + a * t * t)


def describe(stages: list[Stage]) -> str:
    """Layers x width of each stage, with its start and ramp in shares of the run."""
    end, words = stages[-1].end, []
    for stage in stages:
        size = f"{stage.config.n_layers}x{stage.config.d_model}"
        grown = f" at {stage.start / end:.0%}, ramp {stage.ramp / end:.0%}"
        words.append(size + (grown if stage.start else ""))
    return " -> ".join(words)


MEASURED = ("loss", "cpu_seconds", "wall_seconds")  # of FinishedRun


def make_row(
    key: tuple[str, int], cell: Cell, losses: dict[Cell, float | None], seeds: list[FinishedRun]
) -> dict:
    """A row of the table, without comparison: the runs of one schedule and budget in their best
    cell. losses: those by which it was chosen."""
    first, (name, budget) = seeds[0], key
    row = {"name": name, "budget": budget, "steps": first.asked["steps"]}
    row["samples"] = first.stages[-1].end
    row["tflop"] = training_flops(first.stages) / 1e12
    row |= {"lr": cell[0], "decay": decay_words(cell[1]), "stages": describe(first.stages)}
    row["alone"] = len(first.stages) == 1 and name != "scratch"  # a small model, never grown
    row["last_growth"] = round(first.stages[-1].start / first.stages[-1].end, 3)  # share of the run
    row["at_the_edge"] = at_the_edge(cell, list(losses))
    row["cells"] = [[lr, decay_words(d), loss] for (lr, d), loss in losses.items()]
    for key in (*MEASURED, "growths"):
        row[key] = {run.asked["seed"]: getattr(run, key) for run in seeds}
    row["mean"] = {key: mean(row[key].values()) for key in MEASURED}
    return row


def best_sizes(rows: list[dict]) -> dict[float, float]:
    """{TFLOP: loss}: at each budget the lowest mean loss of a size that was trained alone."""
    best = {}
    for row in rows:
        loss, before = row["mean"]["loss"], best.get(row["budget"])
        fixed = row["alone"] or row["name"] == "scratch"
        if fixed and loss is not None and (before is None or loss < before[1]):
            best[row["budget"]] = row["tflop"], loss
    return dict(best.values())


def compare(rows: list[dict]):
    """Compare every row with the rows from scratch, of the means and seed by seed, and with the
    best size at each budget, of the means."""
    scratch, best = [row for row in rows if row["name"] == "scratch"], best_sizes(rows)
    for row in rows:
        loss, own = row["mean"]["loss"], {r["tflop"]: r["mean"]["loss"] for r in scratch}
        row["speed_up"], row["bound"] = number_or_bound(own, row["tflop"], loss)
        row["any_size"], row["any_size_bound"] = number_or_bound(best, row["tflop"], loss)
        row["gap"] = gap({r["samples"]: r["mean"]["loss"] for r in scratch}, row["samples"], loss)
        row["by_seed"] = {}
        for seed, loss in row["loss"].items():
            line = {r["tflop"]: r["loss"][seed] for r in scratch}
            value, bound = speed_up(line, row["tflop"], loss)
            row["by_seed"][seed] = None if bound else value


def warnings(rows: list[dict], tune: int) -> list[str]:
    """What keeps the table from meaning what it seems to say. tune: the seed that has chosen."""
    lines, scratch = [], {r["budget"]: r for r in rows if r["name"] == "scratch"}
    if len(scratch) < 3:
        lines.append(f"only {len(scratch)} budgets from scratch: take 3 or more (--steps)")
    losses = {budget: row["mean"]["loss"] for budget, row in scratch.items()}
    if len(losses) > 1 and not falling(losses):
        words = ", ".join(f"{shown(loss, 4)} at {budget}" for budget, loss in losses.items())
        lines.append(f"from scratch the loss does not fall, so there is no speed-up: {words}")
    seeds, chosen = rows[0]["loss"], any(len(row["cells"]) > 1 for row in rows)
    if len(seeds) == 1:
        lines.append("one seed: a difference as small as that of two seeds means nothing (--seeds)")
    if chosen and tune in seeds:
        lines.append(f"seed {tune} has chosen, and reports: give --seeds without it")
    if not any(row["alone"] for row in rows):
        lines.append("no small model alone: add a schedule of one stage, such as --stages small")
    small = [
        f"{row['name']} {row['budget']} ({shown(row['mean']['loss'], 4)}, not {shown(loss, 4)})"
        for row in rows
        if row["alone"] and (loss := losses.get(row["budget"])) is not None
        if row["mean"]["loss"] is not None and row["mean"]["loss"] <= loss
    ]
    if small:
        lines.append(
            f"no worse than from scratch, and never grown: {', '.join(small)}: at these budgets "
            "the final size is not worth having, and only `any size` says something"
        )
    edges = [row for row in rows if row["at_the_edge"]]
    if not chosen:
        lines.append("one learning rate and one decay: nothing was chosen (--lrs, --decays)")
    elif edges:
        words = (f"{r['name']} {r['budget']} ({' and '.join(r['at_the_edge'])})" for r in edges)
        lines.append(f"best at an end of the grid, a better one may lie past: {', '.join(words)}")
    return lines


# ----------------------------------------------------------------------------------------------
# 4. The table


def place_in_table(row: dict) -> tuple:
    """Runs from scratch first, then by budget; the best schedule of each budget first."""
    return row["name"] != "scratch", row["budget"], row["mean"]["loss"] or math.inf


def shown(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def shown_speed_up(value: float | None, bound: list | None) -> str:
    return "{}{:.2f}".format(*bound) if bound else shown(value)


def spread(values: Collection[float | None]) -> str:
    """The lowest and the highest value over the seeds, or for how many there is one at all; "-" for
    a single seed.

    >>> spread([1.5, 1.25]), spread([1.5, None])
    ('1.25 to 1.50', '1 of 2 known')
    """
    known = sorted(value for value in values if value is not None)
    if len(values) == 1:
        return "-"
    if len(known) < len(values):
        return f"{len(known)} of {len(values)} known"
    return f"{shown(known[0])} to {shown(known[-1])}"


def print_table(rows: list[dict], warned: list[str]):
    """The table, how to read it, and what to distrust."""
    seeds = len(rows[0]["loss"])
    print(f"\n{'run':18}{'steps':>6}{'TFLOP':>8}{'lr':>7}{'decay':>7}{'loss':>8}{'±':>7}", end="")
    print(f"{'speed-up':>9}{'by seed':>14}{'any size':>9}{'gap':>8}   stages")
    for row in sorted(rows, key=place_in_table):
        losses = [loss for loss in row["loss"].values() if loss is not None]
        wide = (max(losses) - min(losses)) / 2 if len(losses) > 1 else None
        faster = shown_speed_up(row["speed_up"], row["bound"])
        any_size = shown_speed_up(row["any_size"], row["any_size_bound"])
        run = f"{row['name']} {row['budget']}"
        print(f"{run:18}{row['steps']:6}{row['tflop']:8.2f}{row['lr']:7g}", end="")
        print(f"{row['decay']:>7}{shown(row['mean']['loss'], 4):>8}{shown(wide, 4):>7}", end="")
        print(f"{faster:>9}{spread(row['by_seed'].values()):>14}{any_size:>9}", end="")
        print(f"{shown(row['gap'], 3):>8}   {row['stages']}")
    print(f"""loss: held out, nats per token, mean of {seeds} seed(s), ± half their spread; - where
a run diverged. Learning rate and decay: the best of the grid, by the seed of --tune.
speed-up: the FLOPs that the best training from scratch needs for that loss, over those of this run;
> and < are bounds, where no run from scratch has that loss. any size: the same against the best
size at each budget, of all that never grow. gap: how much higher the loss is than from scratch
after the same samples; 0 is fully mixed.
Stages: layers x width, in shares of the run.""")
    for line in warned:
        print(f"warning: {line}")


# ----------------------------------------------------------------------------------------------
# 5. The command line


STAGES_HELP = f"""of {", ".join(SCHEDULES)} (default all), or a JSON file of stages as train.py's,
but with start, ramp and warmup in shares of the run; or of several: {{name: stages}}"""
HELP = f"""How much sooner does a grown model reach the same loss? Train one size from scratch with
several budgets, and by growth, each with the best learning rate and decay of a grid. Stop it at any
time: the same command goes on. What follows -- goes to train.py, for every run; without it, all
runs have:
  {" ".join(MODEL[:6])}
  {" ".join(MODEL[6:])} {" ".join(f"{flag(k)} {v}" for k, v in TRAINING.items())}

examples:
  python -m lab.growth --jobs 2
  python -m lab.growth --stages small mine.json --at 2000 4000 -- --data corpora/mine
"""


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="lab.growth", description=HELP, formatter_class=raw)
    add, names = parser.add_argument, list(SCHEDULES)
    numbers = {"type": int, "nargs": "+", "metavar": "STEPS"}
    budgets = "budgets without growth (default 1000 2000 4000)"
    add("--steps", **numbers, default=[1000, 2000, 4000], help=budgets)
    add("--at", **numbers, help="budgets of schedules that grow (default: those of --steps)")
    add("--stages", nargs="+", default=names, metavar="SCHEDULE", help=STAGES_HELP)
    lrs = [0.004, 0.008, 0.016, 0.032]
    words = f"learning rates to choose from (default {' '.join(map(str, lrs))})"
    add("--lrs", type=float, nargs="+", default=lrs, metavar="LR", help=words)
    decays = ["0.2", "0.4", "0.6", "cosine"]
    words = f"shares of the run that the decay takes, or cosine (default {' '.join(decays)})"
    add("--decays", nargs="+", default=decays, metavar="SHARE", help=words)
    tune = "the seed that chooses learning rate and decay (default 0)"
    add("--tune", type=int, default=0, metavar="N", help=tune)
    runs.add_options(parser, out="runs/growth")
    parser.set_defaults(seeds=[1, 2, 3])
    return parser


def main(argv: list[str] | None = None):
    args = make_parser().parse_args(argv)
    bench = make_bench(args)
    seeds = sorted(set(args.seeds))
    losses = choose(bench, args.tune, args.jobs, len(seeds) * flops_of(bench))
    best = {key: best_cell(found) for key, found in losses.items()}
    asked = [bench.run(key, best[key], seed) for key in best for seed in seeds]
    finished = runs.run_all(asked, args.jobs)
    rest = iter(finished)
    rows = [make_row(key, best[key], losses[key], [next(rest) for _ in seeds]) for key in best]
    compare(rows)
    warned = warnings(rows, args.tune)
    print_table(rows, warned)
    report = {**runs.origin(finished), "tune": args.tune, "warnings": warned, "rows": rows}
    console.write_numbers(bench.out / "bench.json", report)


if __name__ == "__main__":
    console.run(main)
