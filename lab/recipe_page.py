"""What a recipe (lab/recipe.py) found: its numbers as JSON, and one page.

python -m lab.recipe_page runs/*/report.json     what came out, in a line for each question;
                                                 of several, also a table of all of them

1. the numbers     everything in report.json, from the runs' own files
2. the summary     of one recipe, in lines; of several, in tables
3. the page        the same as tables and pictures
"""

from __future__ import annotations

import html
import json
import platform
import shlex
import sys
import textwrap
from pathlib import Path

import torch

import console
import iqeval
from evaluation import describe
from flm import count_parameters
from lab import pictures, report
from lab.plan import PAPER_SCRATCH_DAYS, cost_plan
from lab.runs import FinishedRun, read_finished
from run_folder import read_log
from schedule import PAPER_STAGES, training_flops

# --------------------------------------------------------------------------------------------------
# 1. The numbers


def cluster_commands() -> list[str]:
    """What to type for the real thing. The job ends at each growth, and the next one begins the
    next stage in its own layout."""
    start = "torchrun --nnodes 24 --nproc-per-node 8"  # the paper's 24 machines with 8 A800 each
    start += " --rdzv-backend c10d --rdzv-id 101 --rdzv-endpoint FIRST_MACHINE:29500 train.py"
    job = "--preset flm-16b --stages paper --data corpora/large --sequence-parallel --micro-batch 1"
    commands = [
        "python -m lab.cluster rehearse --preset flm-101b --tp 4 --pp 4 --dp 12"
        " --sequence-parallel --micro-batch 1",
        "python data.py prepare TEXT --out corpora/large --tokenizer cl100k_base",
    ]
    for stage in PAPER_STAGES:
        layout = " ".join(f"--{axis} {stage[axis]}" for axis in ("tp", "pp", "dp"))
        commands.append(f"{start} {job} {layout} --auto-resume --out runs/flm-101b")
    return commands + ["python iqeval.py run runs/flm-101b"]


def stage_rows(run: FinishedRun) -> list[dict]:
    """What each stage of a run was and cost."""
    rows, before = [], 0
    for number, stage in enumerate(run.stages, 1):
        flop = training_flops(run.stages, stage.end)
        rows.append(
            {
                "stage": number,
                **{name: getattr(stage.config, name) for name in ("n_layers", "d_model")},
                "parameters": count_parameters(stage.config),
                "tokens": (stage.end - stage.start) * stage.config.max_seq_len,
                "tflop": (flop - before) / 1e12,
            }
        )
        before = flop
    return rows


def describe_run(run: FinishedRun) -> dict:
    """A large run: its numbers for the pictures, its stages, its end."""
    last = [line for line in read_log(run.folder) if "val_loss" in line][-1]
    rows = stage_rows(run)
    one_size = training_flops([run.stages[-1]])
    last_samples = run.stages[-1].end - run.stages[-1].start
    return {
        **report.read_numbers(run.folder),
        "stages_cost": rows,
        "tflop": sum(row["tflop"] for row in rows),
        "tokens": sum(row["tokens"] for row in rows),
        # the same tokens at the last size throughout
        "tflop_at_last_size": one_size / last_samples * run.stages[-1].end / 1e12,
        "final": {key: last[key] for key in ("val_loss", "val_bpb")},
        "wall_seconds": run.wall_seconds,
        "cpu_seconds": run.cpu_seconds,
    }


def costs(out: Path) -> dict[str, dict]:
    """{part: what its runs in the recipe's folder took, from their logs}: search, narrow, and each
    large run. Steps that a kill -9 lost are in no log. A thread that waits for another one counts
    as busy, so a run on two threads has more processor seconds than on one."""
    found = {}
    for part in ("search", "narrow", "train"):
        for folder in sorted(file.parent for file in out.glob(f"{part}/*/config.json")):
            run = read_finished(folder)
            if run:
                name = folder.name if part == "train" else part
                row = found.setdefault(name, {"runs": 0, "cpu_seconds": 0.0, "tflop": 0.0})
                last = read_log(folder)[-1]  # a run that diverged ends early
                row["runs"] += 1
                row["cpu_seconds"] += run.cpu_seconds
                row["tflop"] += training_flops(run.stages, last["samples"]) / 1e12
    return found


def collect(
    out: Path, search: dict, prediction: dict, finished: list[FinishedRun], results: dict
) -> dict:
    """The numbers of the report, plain JSON. The outcome of the prediction is the held-out loss
    right before the first growth."""
    grown, *scratch = finished
    (row,) = prediction["predicted"]
    loss = grown.growths[0][0]
    low, high = row["interval"]
    row |= {"loss": loss, "error": row["predicted"] - loss}
    row |= {"relative": row["predicted"] / loss - 1, "inside": low <= loss <= high}
    large = {run.folder.name: describe_run(run) for run in finished}
    growths = [{"before": a, "after": b} for a, b in grown.growths]
    numbers = {"search": search, "prediction": prediction, "runs": large, "growths": growths}
    numbers |= {"evaluation": results, "plan": cost_plan(), "cluster": cluster_commands()}
    if scratch:
        lead = scratch[0].loss - grown.loss
        numbers["control"] = {"grown": grown.loss, "scratch": scratch[0].loss, "lead": lead}
    numbers |= {"asked": json.loads((out / "recipe.json").read_text()), "costs": costs(out)}
    about = {"out": str(out), "torch": torch.__version__, "python": platform.python_version()}
    return about | numbers


# --------------------------------------------------------------------------------------------------
# 2. The summary


def summary(numbers: dict) -> list[str]:
    """What came out, in a line for each question."""
    search, (row,) = numbers["search"], numbers["prediction"]["predicted"]
    best = ", ".join(f"{name} {value:g}" for name, value in search["best"].items())
    clear = "more" if search["clear"] else "no more"
    edge = f". At the edge of the grid: {', '.join(search['edge'])}" if search["edge"] else ""
    lines = [
        f"search: {best}. It leads by {search['lead']:.4f} nats, {clear} than luck explains (twice "
        f"the standard error is {2 * search['error']:.4f}){edge}",
        f"prediction: {row['predicted']:.4f}, 95% from {row['interval'][0]:.4f} to "
        f"{row['interval'][1]:.4f} ({row['half_width']:.2%} to a side); it came to "
        f"{row['loss']:.4f}, {'inside' if row['inside'] else 'OUTSIDE'}, {row['relative']:+.2%}",
    ]
    for number, growth in enumerate(numbers["growths"], 1):
        change = growth["after"] - growth["before"]
        lines.append(
            f"growth {number}: held-out loss {growth['before']:.4f} before, {growth['after']:.4f} "
            f"after, {change:+.4f}"
        )
    for name, result in numbers["evaluation"].items():
        lines.append(f"{name}: {describe(result['held_out'])}")
    if "control" in numbers:
        control = numbers["control"]
        words = "better" if control["lead"] > 0 else "NOT better"
        lines.append(
            f"at equal FLOPs: grown {control['grown']:.4f}, from scratch {control['scratch']:.4f}. "
            f"The grown run is {words}: {control['lead']:+.4f} nats"
        )
    else:
        lines.append("no control: --control trains the same FLOPs from scratch")
    return lines


def print_summary(numbers: dict):
    """The summary, in lines of at most 100 columns."""
    for line in summary(numbers):
        print(textwrap.fill(line, 100, subsequent_indent="  "))


def minutes(numbers: dict) -> dict[str, float]:
    """{part: minutes of processor time of its runs}."""
    return {name: row["cpu_seconds"] / 60 for name, row in numbers["costs"].items()}


def table_of_recipes(reports: list[dict]) -> list[str]:
    """A line of Markdown for each recipe: its prediction and what came, what growth brought, what
    it took."""
    head = ["seed", "predicted", "to a side", "came", "error", "inside", "control"]
    rows = []
    for numbers in reports:
        (row,) = numbers["prediction"]["predicted"]
        text = [numbers["asked"]["seed"], f"{row['predicted']:.4f}", f"{row['half_width']:.2%}"]
        text += [f"{row['loss']:.4f}", f"{row['relative']:+.2%}", "yes" if row["inside"] else "NO"]
        text += [f"{numbers['control']['lead']:+.4f}" if "control" in numbers else "-"]
        rows.append([*text, f"{sum(minutes(numbers).values()):.0f}"])
    return markdown([*head, "processor minutes"], rows)


def table_of_iq(reports: list[dict]) -> list[str]:
    """The last stage of each recipe in percent, beside chance: a line of Markdown for each task
    that fits, and one for the teacher's labels."""
    last = [numbers["evaluation"]["stage-3"] for numbers in reports]
    head = ["in percent", "chance", "lazy", *map(seed_name, reports)]
    rows = []
    for name, first in last[0]["tasks"].items():
        scores = [result["tasks"][name]["accuracy"] for result in last]
        if None not in scores:
            row = [100 * first["chance"], first["lazy"][1], *(100 * score for score in scores)]
            rows.append([name, *(f"{percent:.1f}" for percent in row)])
    labels = [result["held_out"]["teacher_accuracy"] for result in last]
    rows.append(["teacher's labels", "50.0", "-", *(f"{100 * share:.1f}" for share in labels)])
    return markdown(head, rows)


def table_of_costs(reports: list[dict]) -> list[str]:
    """What the recipes took, in minutes: a line of Markdown for the processor time of each part's
    runs, and one for the time that passed in each part."""
    busy, passed = ([n[name] for n in reports] for name in ("costs", "seconds"))
    rows = []
    for name in dict.fromkeys(name for costs in busy for name in costs):
        tflop = next(costs[name]["tflop"] for costs in busy if name in costs)
        found = [numbers.get(name) for numbers in map(minutes, reports)]
        rows.append([f"processor: {name}", f"{tflop:.1f}", *map(one_decimal, found)])
    rows.append(["processor: all", "", *(f"{sum(minutes(n).values()):.1f}" for n in reports)])
    for name in passed[0]:
        rows.append([f"passed: {name}", "", *(f"{n[name] / 60:.1f}" for n in passed)])
    rows.append(["passed: all", "", *(f"{sum(n.values()) / 60:.1f}" for n in passed)])
    return markdown(["minutes", "TFLOP", *map(seed_name, reports)], rows)


def one_decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def seed_name(numbers: dict) -> str:
    return f"seed {numbers['asked']['seed']}"


def tables(reports: list[dict]) -> list[list[str]]:
    """The three tables of some recipes."""
    return [table_of_recipes(reports), table_of_iq(reports), table_of_costs(reports)]


def markdown(head: list, rows: list[list]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


# --------------------------------------------------------------------------------------------------
# 3. The page


def search_part(search: dict) -> list[str]:
    """What was searched, and what won."""
    names = list(search["best"])
    rows = [
        [*(row["values"][name] for name in names), row["mean"], *row["losses"].values()]
        for row in search["finalists"]
    ]
    seeds = [f"seed {seed}" for seed in search["finalists"][0]["losses"]]
    parts = [f"<p>{search['runs']} models of width {search['width']}, {search['steps']} steps.</p>"]
    parts.append(report.html_table([*names, "mean", *seeds], rows, "wide"))
    means = [
        [name, float(value), loss]
        for name, row in search["means"].items()
        for value, loss in row.items()
    ]
    parts.append("<p>The mean loss at each value, over all values of the others:</p>")
    parts.append(report.html_table(["", "value", "mean loss"], means, "wide"))
    return parts + [report.html_json(search)]


def iq_part(evaluation: dict) -> str:
    """Each IQ task: chance, laziness, our stages with their intervals, the paper's models."""
    rows = []
    for task in next(iter(evaluation.values()))["tasks"]:
        found = [result["tasks"][task] for result in evaluation.values()]
        first, row = found[0], [task, 100 * found[0]["chance"], found[0]["lazy"][1]]
        for one in found:
            text = f"too long: {one['shortest']} tokens and more"
            if one["n"]:
                low, high = (100 * end for end in one["interval"])
                text = f"{100 * one['accuracy']:.1f} ({low:.1f} to {high:.1f})"
            row.append(text)
        rows.append([*row, *first["paper"]])
    head = ["task, in percent", "chance", "lazy", *evaluation, *iqeval.MODELS]
    return report.html_table(head, rows, "wide") + report.html_json(evaluation)


def plan_part(numbers: dict) -> str:
    """The real thing beside this run."""
    plan, grown = numbers["plan"], numbers["runs"]["grown"]
    rows = []
    for theirs, ours in zip(plan["stages"], grown["stages_cost"]):
        row = [theirs["name"], theirs["parameters"], theirs["tokens"], theirs["days"]]
        rows.append([*row, ours["parameters"], ours["tokens"], ours["tflop"]])
    total, scratch = plan["total"], plan["scratch"]
    passed, busy = sum(numbers["seconds"].values()) / 60, sum(minutes(numbers).values())
    rows.append(
        ["all", None, total["tokens"], total["days"], None, grown["tokens"], grown["tflop"]]
    )
    head = ["stage", "parameters", "tokens", "days on 192 GPUs"]
    head += ["here: parameters", "tokens", "TFLOP"]
    saved = [1 - total["flop"] / scratch["flop"], 1 - grown["tflop"] / grown["tflop_at_last_size"]]
    words = (
        f"The paper: {total['days']:.2f} days, and {PAPER_SCRATCH_DAYS} at the last size "
        f"throughout; {saved[0]:.0%} fewer FLOPs for the same tokens. Here: "
        f"{grown['wall_seconds'] / 60:.1f} minutes of training, {passed:.1f} for the whole "
        f"recipe, {busy:.1f} of processor time for all its runs; {saved[1]:.0%} fewer FLOPs for "
        "the same tokens."
    )
    return f"<p>{words}</p>{report.html_table(head, rows, 'wide')}"


def drawn(picture: pictures.Picture) -> str:
    """The picture with its numbers; where matplotlib is missing, what installs it."""
    try:
        return report.html_picture(picture)
    except ValueError as error:
        print(f"{error}; then the same command draws the page's pictures")
        return f"<p>{html.escape(str(error))}</p>"


def write_page(file: Path, numbers: dict):
    """The page: what was searched, predicted, trained and found, with the numbers as JSON."""
    runs = list(numbers["runs"].values())
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in summary(numbers))
    parts = [f"<ul>{lines}</ul>", "<h2>1. What was searched</h2>", *search_part(numbers["search"])]
    written = numbers["prediction"]["written"]
    parts += ["<h2>2. What was predicted, and what came</h2>"]
    parts += [f"<p>Written {written}, before the model was trained.</p>"]
    parts += [drawn(pictures.prediction(numbers["prediction"]))]
    parts += [report.html_json(numbers["prediction"]), "<h2>3. The run and its growths</h2>"]
    parts += [report.final_table(runs)]
    parts += [drawn(report.runs_picture(runs, list(report.PANELS)))]
    parts += ["<h2>4. The IQ tasks, beside the paper's</h2>", iq_part(numbers["evaluation"])]
    for name, texts in numbers["texts"].items():
        for prompt, text in texts.items():
            parts.append(f"<h3>{html.escape(name)} continues {html.escape(repr(prompt))}</h3>")
            parts.append(report.html_text(text))
    parts += ["<h2>5. The plan of the real thing, beside this run</h2>", plan_part(numbers)]
    parts += ["<p>On a cluster:</p>", report.html_text("\n".join(numbers["cluster"]))]
    title = f"The whole paper in one sitting: {shlex.quote(numbers['out'])}"
    file.write_text(report.document(title, parts), encoding="utf-8")


def read_report(file: str) -> dict:
    """The numbers of a recipe. Raises ValueError for another file."""
    try:
        numbers = json.loads(Path(file).read_text())
        summary(numbers)
        tables([numbers])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no report.json of lab.recipe: {error!r}") from error
    return numbers


def main(files: list[str] | None = None):
    """`python -m lab.recipe_page`: the summaries of some reports, and tables of several."""
    files = sys.argv[1:] if files is None else files
    console.refuse([] if files else ["name the report.json of a recipe, or several"])
    reports = [read_report(file) for file in files]
    for file, numbers in zip(files, reports):
        print(f"{file}:")
        print_summary(numbers)
    if len(reports) > 1:
        for lines in tables(reports):
            print("", *lines, sep="\n")


if __name__ == "__main__":
    console.run(main)
