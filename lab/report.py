"""lab/report.py - what runs and studies measured: a page of pictures and numbers, or one picture.

    python -m lab.report runs/demo --out report.html
    python -m lab.report runs/demo runs/demo-2 --out report.html     both in each picture
    python -m lab.report runs/sweep/sweep.json --out sweep.svg
    python -m lab.report timetable --pp 4 --micro-batches 8 --out timetable.svg

The page is one file and opens without a network. A picture needs matplotlib, and nothing else in
this repository does. What the pictures are is in lab/pictures.py.

    1. what a run says     its log and settings, thinned; a text that its model writes
    2. pictures of runs    loss, learning rate, mask, gradient norm, throughput, size
    3. the page            beside each picture its numbers, as a table and as JSON
    4. the command line
"""

from __future__ import annotations

import argparse
import html
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import console
from checkpoint import find_checkpoint, load_model, read_info
from flm import count_parameters, growth_mask
from lab import pictures
from lab.pictures import GREY, Line, Panel, Picture
from parallel import Layout
from run_folder import has_checkpoint, read_log, read_run
from sample import continue_texts
from schedule import Stage, training_flops


# --------------------------------------------------------------------------------------------------
# 1. What a run says

COLUMNS = ("step", "samples", "loss", "grad_norm", "lr", "tokens_per_s", "utilisation")
ASKED = ("steps", "lr", "lr_schedule", "clip", "seed", "dtype")  # of the settings
POINTS = 240  # of a line: a longer log is cut into so many parts, and each part has its mean
LARGEST = 10**9  # parameters of a model that writes a text for the page


def thin(rows: list[list[float]], most: int = POINTS) -> list[list[float]]:
    """At most so many rows: the means of equally long parts, in order. The first two columns, step
    and samples, stay whole numbers.

    >>> thin([[1, 8, 4.0], [2, 16, 3.0], [3, 24, 1.0]], most=2)
    [[2, 12, 3.5], [3, 24, 1.0]]
    """
    size = math.ceil(len(rows) / most) if rows else 1
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    means = [[statistics.fmean(column) for column in zip(*part)] for part in parts]
    return [[*map(round, row[:2]), *(float(f"{x:.6g}") for x in row[2:])] for row in means]


def read_numbers(folder: Path) -> dict:
    """What the run in `folder` says, as plain JSON. Raises ValueError where there is no run, or no
    step yet."""
    settings, stages = read_run(folder)
    config = json.loads((folder / "config.json").read_text())
    log = read_log(folder)
    for entry in log:
        missing = {"samples", *(COLUMNS if "loss" in entry else ())} - entry.keys()
        if missing:
            words = ", ".join(sorted(missing))
            raise ValueError(f"{folder}/metrics.jsonl, step {entry['step']}: {words} is missing")
    steps = [[entry[name] for name in COLUMNS] for entry in log if "loss" in entry]
    if not steps:
        raise ValueError(f"{folder} has no step yet: there is nothing to draw")
    masks = [{"start": stage.start, "ramp": stage.ramp} for stage in stages[1:]]
    if has_checkpoint(folder):
        grown = read_info(find_checkpoint(folder))["growth"]  # before the run: from --init-from
        known = grown is None or grown["start"] in [mask["start"] for mask in masks]
        masks += [] if known else [{key: grown[key] for key in ("start", "ramp")}]
    return {
        "run": str(folder),
        **{key: config.get(key) for key in ("machine", "torch", "python", "corpus")},
        "asked": {key: getattr(settings, key) for key in ASKED},
        "stages": [stage.to_dict() for stage in stages],
        "masks": sorted(masks, key=lambda mask: mask["start"]),
        "done": steps[-1][0],
        "samples": steps[-1][1],
        "steps": thin(steps),
        "evaluations": [entry for entry in log if "val_loss" in entry],
        "growths": [entry for entry in log if "grown" in entry],
    }


def write_texts(folder: Path, prompts: list[str]) -> dict[str, str]:
    """What the newest checkpoint of a run makes of each prompt, or why it writes nothing."""
    if not has_checkpoint(folder):
        return {"": "no checkpoint of this run is left, so no text is written"}
    settings, stages = read_run(folder)
    if count_parameters(stages[-1].config) > LARGEST:
        return {"": f"more than {LARGEST:,} parameters: let it write with python sample.py"}
    try:
        model, info = load_model(folder)
        options = {"temperature": 0.8, "tokenizer_file": settings.tokenizer_file}
        texts = continue_texts(model, info, prompts, **options)
        return dict(zip(prompts, texts))
    except (ValueError, OSError) as error:
        return {"": f"no text: {error}"}


# --------------------------------------------------------------------------------------------------
# 2. Pictures of runs


def stages_of(run: dict) -> list[Stage]:
    """The stages of a run, from what read_numbers returns."""
    return [Stage.from_dict(stage) for stage in run["stages"]]


def column(run: dict, name: str) -> list[tuple[float, float]]:
    """(samples, value) of each row of the run's steps."""
    place = COLUMNS.index(name)
    return [(row[1], row[place]) for row in run["steps"]]


def held_out(run: dict) -> list[tuple[float, float]]:
    """(samples, held-out loss) of each evaluation."""
    return [(entry["samples"], entry["val_loss"]) for entry in run["evaluations"]]


def growth_marks(runs: list[dict]) -> list[tuple[float, str]]:
    """(samples, the model from there on) of each growth; a growth that several runs share once."""
    marks = {}
    for run in runs:
        for entry in run["growths"]:
            grown = entry["grown"]
            marks[entry["samples"]] = f"{grown['n_layers']} layers x {grown['d_model']}"
    return sorted(marks.items())


def jump(run: dict) -> float | None:
    """The largest change of the held-out loss at a growth, without its sign; None: none grew."""
    return max((abs(e["loss_after"] - e["loss_before"]) for e in run["growths"]), default=None)


SMOOTH = 0.00005  # nats: a smaller jump is 0 in four digits


def largest_jump(runs: list[dict]) -> float | None:
    """The largest jump of some runs; None: none of them grew."""
    return max((jump(run) for run in runs if run["growths"]), default=None)


def by_run(runs: list[dict], points: Callable[[dict], list], word: str = "") -> dict:
    """{label: a line of each run, in the color of the run}; a thin one for "training"."""
    lines, look, width = {}, ".-" if word == "held out" else "-", 0.5 if word == "training" else 1.2
    for i, run in enumerate(runs):
        name = word if word and len(runs) == 1 else f"{run['run']} {word}".strip()
        lines[name] = Line(points(run), look, i, width)
    return lines


SAMPLES, LOSS = "samples (rows of text)", "loss, nats per token"


def loss_panel(runs: list[dict]) -> Panel:
    """Training and held-out loss over samples."""
    lines = by_run(runs, lambda run: column(run, "loss"), "training")
    lines |= by_run(runs, held_out, "held out")
    largest, title = largest_jump(runs), "Loss by samples"
    if largest is not None:
        most = f"less than {SMOOTH:.5f}" if largest < SMOOTH else f"at most {largest:.4f}"
        title += f": a growth moves it by {most} nats"
    return Panel(title, SAMPLES, LOSS, lines, "y", growth_marks(runs))


UNITS = {
    1e21: "ZFLOP",
    1e18: "EFLOP",
    1e15: "PFLOP",
    1e12: "TFLOP",
    1e9: "GFLOP",
    1e6: "MFLOP",
    1: "FLOP",
}


def flops_panel(runs: list[dict]) -> Panel:
    """The loss panel with FLOPs in the place of samples."""
    total = max(training_flops(stages_of(run), run["samples"]) for run in runs)
    size, unit = next((size, unit) for size, unit in UNITS.items() if total >= size)

    def cost(run: dict, points: list) -> list:
        stages = stages_of(run)
        return [(training_flops(stages, samples) / size, value) for samples, value in points]

    lines = by_run(runs, lambda run: cost(run, column(run, "loss")), "training")
    lines |= by_run(runs, lambda run: cost(run, held_out(run)), "held out")
    marks = [mark for run in runs for mark in cost(run, growth_marks([run]))]
    title = "Loss by FLOPs" + (": samples of the small model are cheap" if marks else "")
    return Panel(title, f"{unit} of training", LOSS, lines, "y", sorted(set(marks)))


SHAPES = {"cosine": "a warm-up, then a cosine", "wsd": "wsd (warm-up, stable, decay)"}


def rate_panel(runs: list[dict]) -> Panel:
    """The learning rate over samples."""
    names = {run["asked"].get("lr_schedule", "cosine") for run in runs}
    title = f"Learning rate: {' or '.join(SHAPES[name] for name in sorted(names))}"
    if growth_marks(runs):
        title += "; each growth warms up again"
    lines = by_run(runs, lambda run: column(run, "lr"))
    return Panel(title, SAMPLES, "learning rate", lines, marks=growth_marks(runs))


def mask_panel(runs: list[dict]) -> Panel:
    """The growth mask c, computed from the growths' starts and ramps as the run computes it."""

    def mask(run: dict) -> list[tuple[float, float]]:
        places = {row[1] for row in run["steps"]}
        ends = [(m["start"], m["start"] + m["ramp"]) for m in run["masks"]]
        last = max(places)
        places |= {x for pair in ends for x in (pair[0] - 1, *pair) if 0 <= x <= last}
        points = []
        for samples in sorted(places):
            begun = [m for m in run["masks"] if m["start"] <= samples]
            points.append((samples, growth_mask(begun[-1] if begun else None, samples)))
        return points

    grew = any(run["masks"] for run in runs)
    title = "Growth mask: what is new comes in" if grew else "Growth mask: 1, for nothing grew"
    return Panel(title, SAMPLES, "mask c", by_run(runs, mask), marks=growth_marks(runs))


def norm_panel(runs: list[dict]) -> Panel:
    """The norm of the gradient before clipping, and where it is clipped."""
    clip = runs[0]["asked"]["clip"]
    lines = by_run(runs, lambda run: column(run, "grad_norm"))
    ends = [runs[0]["steps"][i][1] for i in (0, -1)]
    lines["clip"] = Line([(x, clip) for x in ends], ":", GREY)
    title = f"Gradient norm: what is above {clip:g} is scaled down to it"
    return Panel(title, SAMPLES, "norm before clipping", lines, "y", growth_marks(runs))


def speed_panel(runs: list[dict]) -> Panel:
    """Tokens per second over samples."""
    lines = by_run(runs, lambda run: column(run, "tokens_per_s"))
    medians = [statistics.median(y for _, y in line.points) for line in lines.values()]
    title = f"Throughput: median {', '.join(f'{m:,.0f}' for m in medians)} tokens per second"
    return Panel(title, SAMPLES, "tokens per second", lines, marks=growth_marks(runs))


def size_panel(runs: list[dict]) -> Panel:
    """Parameters over samples: a step at each growth."""

    def sizes(run: dict) -> list[tuple[float, float]]:
        corners = []
        for stage in stages_of(run):
            N = count_parameters(stage.config) / 1e6
            corners += [(stage.start, N), (stage.end - 1, N)]
        return corners

    lines = by_run(runs, sizes)
    most = max(len(run["stages"]) for run in runs)
    title = f"Size: {most} stage{'s' * (most > 1)}"
    return Panel(title, SAMPLES, "million parameters", lines, marks=growth_marks(runs))


PANELS = {
    "loss": loss_panel,
    "flops": flops_panel,
    "lr": rate_panel,
    "mask": mask_panel,
    "norm": norm_panel,
    "speed": speed_panel,
    "size": size_panel,
}


def runs_picture(runs: list[dict], names: list[str]) -> Picture:
    """The named panels of some runs, in one picture."""
    ends = {run["run"]: run["evaluations"][-1]["val_loss"] for run in runs if run["evaluations"]}
    title, largest = "No evaluation yet", largest_jump(runs)
    if len(runs) == len(ends) == 1 and largest is not None and largest < SMOOTH:
        loss = ends[runs[0]["run"]]
        title = f"At each growth the loss goes on without a jump, to {loss:.4f} nats per token"
    elif ends:
        best = min(ends, key=ends.get)
        title = f"{best} ends at a held-out loss of {ends[best]:.4f} nats per token"
        title = f"The lowest: {title}" if len(runs) > 1 else title
    return Picture(title, [PANELS[name](runs) for name in names])


# --------------------------------------------------------------------------------------------------
# 3. The page

CSS = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 70rem; margin: 1rem auto; padding: 0 1rem; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.5rem 0; align-items: flex-start; }
.pair > figure { flex: 1 1 26rem; max-width: 36rem; min-width: 0; margin: 0; }
.pair > figure.diagram { flex-basis: 100%; max-width: 48rem; }
.pair > div { flex: 1 1 18rem; min-width: 0; }
svg { width: 100%; height: auto; border: 1px solid #888; border-radius: 6px; }
.scroll { max-height: 19rem; overflow: auto; border: 1px solid #888; border-radius: 6px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; text-align: right; white-space: nowrap; }
th { border-bottom: 1px solid #888; }
.wide td { max-width: 24rem; white-space: normal; }
td:first-child, th:first-child { text-align: left; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; margin: .5rem; }
"""


def shown(value) -> str:
    """A value of a table as text."""
    if isinstance(value, float):
        return f"{value:,.6g}" if math.isfinite(value) else "-"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def html_table(head: list[str], rows: list[list], box: str = "scroll") -> str:
    """A table that scrolls in a box of its own, or is there in full (box="wide")."""
    lines = [f"<tr>{''.join(f'<th>{html.escape(name)}</th>' for name in head)}</tr>"]
    for row in rows:
        lines.append(f"<tr>{''.join(f'<td>{html.escape(shown(x))}</td>' for x in row)}</tr>")
    return f'<div class="{box}" tabindex="0"><table>{"".join(lines)}</table></div>'


def html_json(value) -> str:
    """JSON that opens where it is clicked."""
    text = html.escape(json.dumps(value))
    return f'<details><summary>JSON</summary><div class="scroll"><pre>{text}</pre></div></details>'


def html_picture(picture: Picture) -> str:
    """Each panel with its numbers beside it."""
    parts = []
    for i, panel in enumerate(picture.panels):
        drawn = pictures.svg(picture, only=i)
        wide = "" if panel.lines else ' class="diagram"'
        numbers = {"title": panel.title, "x": panel.x, "y": panel.y, "marks": panel.marks}
        numbers["lines"] = {
            name: [[x, None if math.isnan(y) else y] for x, y in line.points]
            for name, line in panel.lines.items()
        }
        numbers["boxes"] = pictures.table(panel)[1] if panel.boxes else []
        numbers = {key: value for key, value in numbers.items() if value}
        beside = html_table(*pictures.table(panel)) + html_json(numbers)
        parts.append(f'<div class="pair"><figure{wide}>{drawn}</figure><div>{beside}</div></div>')
    return "\n".join(parts)


def final_table(runs: list[dict]) -> str:
    """What each run is and where it stands, with its last evaluation."""
    rows = []
    for run in runs:
        stages = stages_of(run)
        rate, used = (statistics.median(row[i] for row in run["steps"]) for i in (-2, -1))
        row = {
            "run": run["run"],
            "parameters": count_parameters(stages[-1].config),
            "steps": f"{run['done']:,} of {run['asked']['steps']:,}",
            "samples": run["samples"],
            "TFLOP": training_flops(stages, run["samples"]) / 1e12,
            **{k: v for k, v in (run["evaluations"] or [{}])[-1].items() if k not in COLUMNS},
            "largest jump at a growth": jump(run),
            "tokens/s (median)": rate,
            "utilisation (median)": used,
            **{key: run[key] for key in ("machine", "torch", "python", "corpus")},
        }
        rows.append(row)
    head = list(dict.fromkeys(key for row in rows for key in row))
    names = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "run"]
    head = ["", *(row["run"] for row in rows)]
    lines = [[name, *(row.get(name) for row in rows)] for name in names]
    return html_table(head, lines, "wide") + html_json(rows)


STAGE_COLUMNS = ("n_layers", "d_model", "n_heads", "d_ff")


def stages_table(run: dict) -> str:
    """The stages of one run: the model, the samples, and what a growth brings along."""
    rows = []
    for stage in stages_of(run):
        sizes = [getattr(stage.config, name) for name in STAGE_COLUMNS]
        rows.append([stage.name, *sizes, count_parameters(stage.config), stage.start, stage.end])
        rows[-1] += [stage.batch_size, stage.ramp, stage.warmup, stage.lr]
    head = ["stage", *STAGE_COLUMNS, "parameters", "from sample", "to", "batch", "ramp", "warm-up"]
    return html_table([*head, "lr"], rows, "wide") + html_json(run["stages"])


def html_text(text: str) -> str:
    """A text in a box; what cannot be printed is shown as such."""
    written = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    return f'<div class="scroll"><pre>{html.escape(written)}</pre></div>'


def page(runs: list[dict], texts: dict[str, dict[str, str]], studies: list[Picture]) -> str:
    """The whole page. texts: {run: {prompt: text}}."""
    parts = []
    if runs:
        parts += ["<h2>Where the runs stand</h2>", final_table(runs)]
        parts += ["<h2>On the way</h2>", html_picture(runs_picture(runs, list(PANELS)))]
        for run in runs:
            name = html.escape(run["run"])
            parts += [f"<h2>Stages of {name}</h2>", stages_table(run)]
            for prompt, text in texts.get(run["run"], {}).items():
                begin = f" after {prompt!r}" if prompt else ""
                parts.append(f"<h3>{name} writes{html.escape(begin)}</h3>")
                parts.append(html_text(text))
    for study in studies:
        parts += [f"<h2>{html.escape(study.title)}</h2>", html_picture(study)]
    return document(", ".join(run["run"] for run in runs) or "Studies", parts)


def document(title: str, parts: list[str]) -> str:
    """A page of these parts, which are HTML, under a title, which is text."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{CSS}</style></head><body>
<h1>{html.escape(title)}</h1>
{chr(10).join(parts)}
</body></html>
"""


# --------------------------------------------------------------------------------------------------
# 4. The command line

COMPUTED = ("rotary", "masks", "permutation", "ranks", "timetable")


def read_file(file: Path) -> tuple[dict | None, Picture | None]:
    """(The numbers of a run, None) or (None, the picture of a study) from a JSON file. Raises
    ValueError for any other file."""
    text = console.read_text(file)
    try:
        report = json.loads(text)
        if "steps" in report:
            runs_picture([report], list(PANELS))
            return report, None
        make = next(
            make
            for key, (make, _) in pictures.STUDIES.items()
            if any(name.split(":")[0] == key for name in report)
        )
        return None, make(report)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, StopIteration) as error:
        writers = ", ".join(writer for _, writer in pictures.STUDIES.values())
        raise ValueError(
            f"{file} is not what {writers} or lab.report writes ({type(error).__name__}: {error})"
        ) from error


def computed(word: str, args: argparse.Namespace) -> Picture:
    """A picture that needs no measurement."""
    if word == "timetable":
        return pictures.timetables(args.pp or 4, args.micro_batches or 8, args.schedule or ["1F1B"])
    if word == "ranks":
        return pictures.ranks(Layout(dp=args.dp or 2, tp=args.tp or 2, pp=args.pp or 2))
    return getattr(pictures, word)()


def join(found: list[Picture]) -> Picture:
    """Several pictures as one, under the title of the first."""
    panels = [panel for picture in found for panel in picture.panels]
    return Picture(found[0].title, panels, found[0].columns, found[0].height)


EXAMPLES = "examples:\n" + __doc__.split("\n\n")[1]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    text = "Show what runs and studies measured."
    parser = argparse.ArgumentParser(
        prog="lab.report", description=text, epilog=EXAMPLES, formatter_class=raw
    )
    add, names = parser.add_argument, ", ".join(COMPUTED)
    what = f"a run's folder, a JSON file that a study wrote, or one of {names}"
    add("what", nargs="+", metavar="WHAT", help=what)
    out = "a page (.html), a picture (.svg, .png, .pdf), or the numbers of one run (.json)"
    add("--out", metavar="FILE", required=True, help=out)
    panels = f"of runs, in a picture: {' '.join(PANELS)} (default loss flops)"
    add("--panels", nargs="+", choices=PANELS, metavar="P", help=panels)
    prompt = "a run's model continues it on the page (default: a new document); may be repeated"
    add("--prompt", action="append", metavar="TEXT", help=prompt)
    layout = parser.add_argument_group("of ranks and timetable")
    for axis, default in (("dp", 2), ("tp", 2), ("pp", "2 and 4")):
        layout.add_argument(f"--{axis}", type=int, metavar="N", help=f"default {default}")
    layout.add_argument("--micro-batches", type=int, metavar="N", help="default 8")
    schedules = "pipeline schedules, one below the other (default 1F1B)"
    layout.add_argument("--schedule", nargs="+", metavar="NAME", help=schedules)
    return parser


def check_words(args: argparse.Namespace) -> list[str]:
    """Everything that is wrong with the words of the command line."""
    problems, kind = [], Path(args.out).suffix
    for word in args.what:
        if word not in COMPUTED and not Path(word).exists():
            problems.append(f"{word}: no folder, no file, and none of {', '.join(COMPUTED)}")
    if kind not in (".html", ".svg", ".png", ".pdf", ".json"):
        problems.append(f"--out {args.out}: must end in .html, .svg, .png, .pdf or .json")
    if kind == ".json" and (len(args.what) > 1 or not Path(args.what[0]).is_dir()):
        problems.append(f"--out {args.out}: numbers are kept of one run, so give one run's folder")
    if args.prompt and kind != ".html":
        problems.append("--prompt: only a page (.html) has texts, leave it out")
    if args.panels and kind in (".html", ".json"):
        problems.append("--panels: a page has all of them, leave it out")
    used = {"ranks", "timetable"} & {*args.what}
    for name in ("dp", "tp", "pp", "micro_batches", "schedule"):
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if value is not None and not used:
            problems.append(f"{flag}: only ranks and timetable make use of it, leave it out")
        elif isinstance(value, int) and value < 1:
            problems.append(f"{flag} {value}: must be at least 1")
    return problems


def main(argv: list[str] | None = None):
    """`python -m lab.report`."""
    args = make_parser().parse_args(argv)
    console.refuse(check_words(args))
    out, runs, studies, texts = Path(args.out), [], [], {}
    for word in args.what:
        run = study = None
        if word in COMPUTED:
            study = computed(word, args)
        elif Path(word).is_dir():
            run = read_numbers(Path(word))
            if out.suffix == ".html":
                texts[run["run"]] = write_texts(Path(word), args.prompt or [""])
        else:
            run, study = read_file(Path(word))
        runs += [run] if run else []
        studies += [study] if study else []
    if out.suffix == ".json":
        console.write_numbers(out, runs[0])
        return
    console.output_file(out)
    if out.suffix == ".html":
        out.write_text(page(runs, texts, studies), encoding="utf-8")
        print(f"page: {out}")
        return
    picture = join(
        [*([runs_picture(runs, args.panels or ["loss", "flops"])] if runs else []), *studies]
    )
    if out.suffix == ".svg":
        out.write_text(pictures.svg(picture), encoding="utf-8")
    else:
        pictures.draw(picture, out, out.suffix[1:])
    print(f"picture: {out}")


if __name__ == "__main__":
    console.run(main)
