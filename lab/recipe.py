"""The whole paper in one sitting: search, predict, train and grow, evaluate, report.

    python -m lab.recipe                 at most 45 minutes on two cores
    python -m lab.recipe --minutes 20    all of it shorter
    python -m lab.recipe --control       the same FLOPs from scratch beside it
    python -m lab.recipe --quick         does it work? In a minute; its numbers mean nothing

Every model is trained by train.py, through lab/runs.py. Stop it at any time: the same command goes
on, and trains nothing twice. Chapter 8 walks through a recipe that was run.

    1. how large        sizes and steps; what --minutes, --quick and --device make of them
    2. the folder       which recipe it holds; the text; the progress of the whole
    3. search           the grid over three hyper-parameters at the narrowest width
    4. predict          narrow models, the law, the interval, on the disk before the model
    5. train and grow   three stages, and the same FLOPs from scratch
    6. evaluate         the checkpoint at the end of each stage
    7. the recipe       part after part; the command line. The page is in lab/recipe_page.py
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import signal
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import console
import iqeval
from checkpoint import step_name
from console import replace_file
from evaluation import eval_only
from flm import FLMConfig, count_parameters, forward_flops, preset
from lab import runs, transfer
from lab.iq import write_signals
from lab.recipe_page import collect, print_summary, write_page
from lab.report import write_texts
from lab.runs import FinishedRun, mean
from machine import pick_device
from muP import at_widths
from prepare import prepare
from run_folder import lock_folder
from schedule import Stage, cosine, fit_stages, in_samples, total_steps, training_flops
from settings import Settings, resolve
from textfiles import stdlib_files
from tokenizer import get_tokenizer

# --------------------------------------------------------------------------------------------------
# 1. How large


@dataclass(frozen=True)
class Size:
    """How large a recipe is. Every number is OURS; the paper's own are in lab/plan.py."""

    context: int  # tokens of a row
    layers: tuple[int, ...]  # of the three stages
    widths: tuple[int, ...]  # of the three stages
    head_dim: int
    shares: tuple[float, ...]  # where stages 2 and 3 start, in shares of the run's samples
    batch_size: int
    steps: int  # of the run that grows
    narrow: tuple[int, ...]  # widths from which the first stage's loss is predicted
    seeds: int  # of each narrow width
    search_steps: int
    axes: dict[str, tuple[float, ...]]  # what is searched, at the first of the narrow widths
    finalists: int  # of the grid, which are run with more seeds
    search_seeds: int  # of each finalist
    documents: int  # of the IQ corpus, and as many propositions
    files: int | None  # of Python's standard library; None: all
    items: int  # of each IQ task
    eval_rows: int = 256
    dtype: str = "float32"
    minutes: float = 45  # in which it ends, on two cores without fast bf16


AXES = {
    "lr": (0.01, 0.02, 0.04),
    "init_std": (0.05, 0.1, 0.2),
    "output_mult": (1.0, 2.0, 4.0),
}
# The parameters of the stages are as 1 : 3.0 : 6.3. The paper's 16B, 51B, 101B are as 1 : 3.2 : 6.3
LAPTOP = Size(
    context=256, layers=(2, 4, 6), widths=(128, 160, 192), head_dim=16, shares=(0.5, 0.8),
    batch_size=16, steps=1700, narrow=(32, 48, 64, 96), seeds=3, search_steps=200, axes=AXES,
    finalists=3, search_seeds=3, documents=20_000, files=None, items=100,
)  # fmt: skip
QUICK = Size(
    context=64, layers=(1, 2, 3), widths=(40, 48, 56), head_dim=8, shares=(0.5, 0.8),
    batch_size=4, steps=20, narrow=(8, 16, 24, 32), seeds=2, search_steps=8,
    axes={"lr": (0.01, 0.02), "init_std": (0.05,), "output_mult": (2.0,)},
    finalists=2, search_seeds=2, documents=200, files=20, items=4, eval_rows=16, minutes=3,
)  # fmt: skip
# A GPU has room for all tasks' prompts. Not measured: nobody of us had one.
GPU = dataclasses.replace(
    LAPTOP, context=768, layers=(6, 12, 18), widths=(512, 640, 768), head_dim=64, batch_size=32,
    steps=6000, narrow=(128, 192, 256, 384), search_steps=500, documents=200_000, items=300,
    dtype="bfloat16",
)  # fmt: skip
SCALED = ("steps", "search_steps", "documents", "items")  # by --minutes
FEWEST_MINUTES = 3
LARGEST_SEED = 2**40
WARMUP = 0.06  # share of a run's samples, at most 2,000 samples
RAMP = 0.05  # of the run's samples: a growth mask's way to 1
TEACHER_FRACTION = 0.25
IQ_SHARE = 0.5  # of the language rows


def scaled(size: Size, minutes: float) -> Size:
    """The same models with as many steps, documents and items as fit into so many minutes. Raises
    ValueError for too few."""
    if not FEWEST_MINUTES <= minutes < math.inf:
        words = "ask for --quick to see whether it works"
        raise ValueError(f"--minutes {minutes:g}: must be at least {FEWEST_MINUTES}; {words}")
    ratio = minutes / size.minutes
    numbers = {name: max(8, round(getattr(size, name) * ratio)) for name in SCALED}
    numbers["documents"] = max(1000, numbers["documents"])
    numbers["items"] = min(300, max(20, numbers["items"]))
    return dataclasses.replace(size, **numbers, minutes=minutes)


@dataclass(frozen=True)
class Recipe:
    """What is asked for."""

    out: Path
    size: Size
    seed: int
    device: str
    control: bool
    jobs: int  # runs at a time

    def seeds(self, count: int) -> list[int]:
        """The first seeds of this recipe. The large runs have the first one."""
        return [1000 * self.seed + k for k in range(count)]

    def model(self, width: int, layers: int | None = None) -> FLMConfig:
        """A model of this recipe: by default of the first stage's depth, as all narrow ones."""
        size, base = self.size, self.size.narrow[0]
        given = {"n_layers": layers or size.layers[0], "max_seq_len": size.context}
        given |= {"head_dim": size.head_dim, "mup_base_width": base}
        return at_widths(preset("iq-demo").replace(**given), [width])[width]

    def warmup(self, steps: int) -> int:
        """Samples of the warm-up of a run of so many steps."""
        return min(2000, round(WARMUP * steps * self.size.batch_size))

    def settings(self, config: FLMConfig, steps: int, **more) -> Settings:
        """A run of that model. All runs of a recipe share text, signals and arithmetic."""
        size = self.size
        fixed = {
            "model": tuple(f"{k}={v}" for k, v in config.to_dict().items()),
            "data": str(self.out / "corpus"),
            "teacher_fraction": TEACHER_FRACTION,
            "steps": steps,
            "eval_every": steps,
            "batch_size": size.batch_size,
            "warmup": self.warmup(steps),
            "eval_rows": size.eval_rows,
            "stages": "none",
            "threads": 1,
            "keep": 1,
            "dtype": size.dtype,
            "device": self.device,
        }
        return Settings(**fixed | more)


# --------------------------------------------------------------------------------------------------
# 2. The folder


def check_unused(out: Path):
    """Raises ValueError for a folder that holds something else than a recipe."""
    names = {path.name for path in out.iterdir() if path.suffix != ".tmp"} - {"lock"}
    if names and "recipe.json" not in names:
        raise ValueError(f"--out {out}: holds something that is no recipe; name another folder")


def check_folder(recipe: Recipe):
    """Write down which recipe the folder holds. Raises ValueError where it holds another one."""
    asked = {"seed": recipe.seed, "device": recipe.device, **dataclasses.asdict(recipe.size)}
    asked = json.loads(json.dumps(asked))  # tuples become lists
    file = recipe.out / "recipe.json"
    if not file.exists():
        replace_file(file, json.dumps(asked, indent=1) + "\n")
        return
    try:
        found = json.loads(file.read_text())
        differ = {k for k in asked | found if asked.get(k) != found.get(k)}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not what lab.recipe writes: {error}") from None
    console.refuse(
        (f"{k} = {found.get(k)}, asked is {asked.get(k)}" for k in sorted(differ)),
        f"{recipe.out} holds another recipe: choose another --out, or ask for the same again. It "
        "has",
    )


TIME_TO_SAVE = 60  # seconds: a run whose recipe was killed saves its step and ends


def wait_for_runs(recipe: Recipe):
    """Wait until the runs of a recipe that was killed have saved. Raises ValueError where one goes
    on and on."""
    end = time.monotonic() + TIME_TO_SAVE
    for lock in sorted(recipe.out.glob("*/*/lock")):
        while True:
            try:
                with contextlib.ExitStack() as stack:
                    lock_folder(lock.parent, stack)
                break
            except ValueError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)


def make_corpus(recipe: Recipe):
    """Both signals of text and of the IQ tasks, prepared in out/corpus, if it is not there yet."""
    folder, size = recipe.out / "corpus", recipe.size
    if (folder / "meta.json").exists():
        return
    iq, teacher = recipe.out / "iq.jsonl", recipe.out / "teacher.jsonl"
    write_signals(size.documents, recipe.seed, iq, teacher)
    sources = {"text": stdlib_files()[: size.files], "iq": [iq]}
    weights = {"text": 1 - IQ_SHARE, "iq": IQ_SHARE}
    tokenizer = get_tokenizer("bytes")
    prepare(sources, folder, tokenizer, teacher=[teacher], weights=weights)


def flops_of(settings: Settings) -> int:
    """Floating point operations of a whole run."""
    _, stages = resolve(settings)
    return training_flops(stages)


def train_all(
    recipe: Recipe, settings: list[Settings], bar: tqdm, jobs: int, keep: bool = False
) -> list[FinishedRun]:
    """runs.run_all, with one bar for all parts of the recipe. What was done before counts as done,
    and not as fast."""
    for run in settings:
        job = runs.unfinished(*resolve(run), keep)
        done = job.done if job else flops_of(run)
        bar.initial += done
        bar.update(done)
    return runs.run_all(settings, jobs, bar=bar, keep=keep)


def write(recipe: Recipe, name: str, value: dict) -> dict:
    """Write out/NAME.json, whole or not at all. Returns what a reader of the file gets."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    replace_file(recipe.out / f"{name}.json", text)
    return json.loads(text)


def read(recipe: Recipe, name: str) -> dict | None:
    """What out/NAME.json holds; None: it is not there yet."""
    file = recipe.out / f"{name}.json"
    try:
        return json.loads(file.read_text()) if file.exists() else None
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}): remove it, it is written again") from None


# --------------------------------------------------------------------------------------------------
# 3. Search


def cell_settings(recipe: Recipe, values: tuple[float, ...], seed: int) -> Settings:
    """The run of one cell of the grid, at the narrowest width."""
    cell = dict(zip(recipe.size.axes, values))
    name = "-".join(f"{key}{value:g}" for key, value in cell.items())
    lr = cell.pop("lr")
    config = recipe.model(recipe.size.narrow[0]).replace(**cell)
    out = str(recipe.out / "search" / f"{name}-seed{seed}")
    return recipe.settings(config, recipe.size.search_steps, lr=lr, seed=seed, out=out)


def more_seeds(recipe: Recipe, cells: list[tuple], bar: tqdm) -> list[dict]:
    """The finalists with all their seeds, the best first. One that diverged is left out."""
    seeds, rows = recipe.seeds(recipe.size.search_seeds), []
    wanted = [cell_settings(recipe, values, seed) for values in cells for seed in seeds]
    train_all(recipe, [s for s in wanted if s.seed != seeds[0]], bar, recipe.jobs)
    finished = iter(wanted)
    for values in cells:
        losses = {seed: runs.read_finished(Path(next(finished).out)).loss for seed in seeds}
        row = {"values": dict(zip(recipe.size.axes, values)), "losses": losses}
        rows.append(row | {"mean": mean(losses.values())})
    return sorted((row for row in rows if row["mean"]), key=lambda row: row["mean"])


def search(recipe: Recipe, bar: tqdm) -> dict:
    """The whole grid with one seed, then the best cells with more. The winner has the lowest mean.

    "luck" is how far one seed lies from its cell's mean: the standard deviation within the
    finalists. The winner's lead is "clear" where it is more than twice its standard error, which is
    that of a difference of two means. "edge": the hyper-parameters whose best value is the first or
    the last of the grid, so that a better one may lie outside. Raises ValueError where all cells
    diverged."""
    size, width = recipe.size, recipe.size.narrow[0]
    grid = list(itertools.product(*size.axes.values()))
    cells = [cell_settings(recipe, values, *recipe.seeds(1)) for values in grid]
    finished = train_all(recipe, cells, bar, recipe.jobs)
    alive = [(run.loss, values) for run, values in zip(finished, grid) if run.loss is not None]
    rows = more_seeds(recipe, [values for _, values in sorted(alive)[: size.finalists]], bar)
    if len(rows) < 2:
        raise ValueError(f"too many runs of the search diverged: see {recipe.out / 'search'}")
    luck = math.sqrt(mean(statistics.variance(row["losses"].values()) for row in rows))
    lead, error = rows[1]["mean"] - rows[0]["mean"], luck * math.sqrt(2 / size.search_seeds)
    means = {axis: transfer.landscape(finished, axis)["muP"][width] for axis in size.axes}
    found = {"width": width, "steps": size.search_steps, "runs": len(grid), "alive": len(alive)}
    found |= {"means": means, "finalists": rows, "best": rows[0]["values"]}
    found |= {"luck": luck, "lead": lead, "error": error, "clear": lead > 2 * error}
    ends = {axis: (values[0], values[-1]) for axis, values in size.axes.items() if len(values) > 1}
    found["edge"] = [axis for axis, pair in ends.items() if found["best"][axis] in pair]
    return write(recipe, "search", found)


# --------------------------------------------------------------------------------------------------
# 4. Predict

# Where b of the law is looked for. Published: -0.34 (Chinchilla, arXiv 2203.15556, for parameters),
# -0.42 (our fit of muScaling's points); chapter 4's six seeds have -0.35. Chapter 8 says what a
# free b costs.
B_RANGE = (-0.5, -0.25)


def grown_shares(recipe: Recipe, best: dict) -> list[dict]:
    """The stages of the run that grows, in shares of its samples."""
    size, shapes = recipe.size, zip(recipe.size.widths, recipe.size.layers)
    first, *later = (with_best(recipe.model(*shape), best).to_dict() for shape in shapes)
    stages = [{"config": first}]
    for config, share in zip(later, size.shares):
        grown = {name: config[name] for name in ("n_layers", "d_model", "n_heads", "d_ff")}
        stages.append({"config": grown, "start": share, "ramp": RAMP, "warmup": 0.02})
    return stages


def stage_files(recipe: Recipe, best: dict) -> dict[str, list[dict]]:
    """{name: the stages that a file in the recipe's folder has for --stages}: of the run that
    grows, and of each narrow width.

    The first stage ends in the middle of a cosine. So the narrow runs grow, too, by a layer, in
    their last step: a growth logs the loss before it, and from the learning rate there the cosine
    of a shorter run is the same one."""
    size = recipe.size
    shares = grown_shares(recipe, best)
    given = in_samples(shares, size.steps * size.batch_size)
    stages = fit(recipe, given, size.steps, best)
    end = stages[0].end
    lr = cosine(stages, end, recipe.settings(stages[-1].config, size.steps).min_lr)
    files = {"stages.json": given}
    for width in size.narrow:
        config = with_best(recipe.model(width), best)
        last = {"config": {"n_layers": config.n_layers + 1}, "start": end, "lr": lr}
        files[f"stages-{width}.json"] = [{"config": config.to_dict()}, last]
    return files


def write_stages(recipe: Recipe, best: dict):
    """Write these files."""
    for name, given in stage_files(recipe, best).items():
        replace_file(recipe.out / name, json.dumps(given, indent=1) + "\n")


def fit(recipe: Recipe, given: list[dict], steps: int, best: dict) -> list[Stage]:
    """The stages of the run that grows or of a narrow one, as its settings give them, but without
    its file."""
    size = recipe.size
    config = FLMConfig.from_dict(given[0]["config"])
    numbers = {"lr": best["lr"], "warmup": recipe.warmup(size.steps)}
    return fit_stages(given, config, steps=steps, batch_size=size.batch_size, **numbers)


def grown_settings(recipe: Recipe, best: dict) -> Settings:
    """The run that grows, with the values of the search."""
    size = recipe.size
    config = recipe.model(size.widths[-1], size.layers[-1])
    watch = {"eval_every": max(1, size.steps // 16), "save_every": max(1, size.steps // 8)}
    watch |= {"keep": 100, "out": str(recipe.out / "train" / "grown"), "seed": recipe.seeds(1)[0]}
    watch |= {"stages": str(recipe.out / "stages.json"), "lr": best["lr"]}
    return recipe.settings(with_best(config, best), size.steps, **watch)


def with_best(config: FLMConfig, best: dict) -> FLMConfig:
    """The model with what the search found, the learning rate aside."""
    return config.replace(**{name: value for name, value in best.items() if name != "lr"})


def narrow_steps(recipe: Recipe, files: dict[str, list[dict]]) -> int:
    """Steps of a narrow run: those of the first stage, and the one that it grows for."""
    return files[f"stages-{recipe.size.narrow[0]}.json"][-1]["start"] // recipe.size.batch_size + 1


def narrow_settings(recipe: Recipe, best: dict) -> list[Settings]:
    """The runs of the narrow models: text, steps, learning rate and seed of the first stage, and
    more seeds."""
    size, wanted = recipe.size, []
    steps = narrow_steps(recipe, stage_files(recipe, best))
    for width in size.narrow:
        config = with_best(recipe.model(width), best)
        more = {"stages": str(recipe.out / f"stages-{width}.json"), "lr": best["lr"]}
        more |= {"warmup": recipe.warmup(size.steps)}
        for seed in recipe.seeds(size.seeds):
            out = str(recipe.out / "narrow" / f"w{width:04}-seed{seed}")
            wanted.append(recipe.settings(config, steps, **more, seed=seed, out=out))
    return wanted


def predict(recipe: Recipe, bar: tqdm, best: dict) -> dict:
    """The law through the narrow models, and the interval of the first stage's loss, in
    prediction.json. It is written once, before the model is trained."""
    size = recipe.size
    finished = train_all(recipe, narrow_settings(recipe, best), bar, recipe.jobs)
    known = read(recipe, "prediction")
    if known:
        return known
    if (recipe.out / "train" / "grown").exists():
        raise ValueError(
            f"{recipe.out}/train/grown is there and prediction.json is not: a prediction has to "
            "come first. Choose another --out"
        )
    points = {}
    for run in finished:
        point = points.setdefault(run.stages[0].config.d_model, {"losses": {}})
        point["N"] = count_parameters(run.stages[0].config) / 1e6
        if run.growths:
            point["losses"][run.asked["seed"]] = run.growths[0][0]
    console.refuse(
        f"width {width}: a run diverged" for width, p in points.items()
        if len(p["losses"]) < size.seeds
    )  # fmt: skip
    target = size.widths[0]
    N = count_parameters(recipe.model(target)) / 1e6
    sizes, losses = zip(*((p["N"], list(p["losses"].values())) for p in points.values()))
    found = {"losses": {width: point["losses"] for width, point in points.items()}}
    for point, values in zip(points.values(), transfer.at_first_seed(np.array(losses))):
        point["losses"] = dict(zip(point["losses"], values.tolist()))
    found |= transfer.predict(points, 0, {target: N}, B_RANGE)
    row = found["predicted"][0]
    row["interval"] = transfer.interval_of_one_run(sizes, losses, N, B_RANGE)
    row["half_width"] = (row["interval"][1] - row["interval"][0]) / 2 / row["predicted"]
    found |= {"b_range": B_RANGE, "written": time.strftime("%Y-%m-%d %H:%M:%S")}
    return write(recipe, "prediction", found)


# --------------------------------------------------------------------------------------------------
# 5. Train and grow


def scratch_settings(recipe: Recipe, best: dict) -> Settings:
    """The last stage's model from its first step on, for as many FLOPs as the run that grows."""
    grown, size = grown_settings(recipe, best), recipe.size
    one = flops_of(dataclasses.replace(grown, stages="none", steps=1, warmup=0))
    given = stage_files(recipe, best)["stages.json"]
    steps = round(training_flops(fit(recipe, given, size.steps, best)) / one)
    config = with_best(recipe.model(size.widths[-1], size.layers[-1]), best)
    more = {name: getattr(grown, name) for name in ("lr", "seed", "keep")}
    more |= {"eval_every": max(1, steps // 16), "save_every": max(1, steps // 8)}
    return recipe.settings(config, steps, **more, out=str(recipe.out / "train" / "scratch"))


def big_settings(recipe: Recipe, best: dict) -> list[Settings]:
    """The run that grows and, with --control, the one from scratch. They share the threads."""
    wanted = [grown_settings(recipe, best)]
    wanted += [scratch_settings(recipe, best)] if recipe.control else []
    threads = max(1, recipe.jobs // len(wanted))
    return [dataclasses.replace(settings, threads=threads) for settings in wanted]


def train(recipe: Recipe, bar: tqdm, best: dict) -> list[FinishedRun]:
    """The run that grows, and the control. Raises ValueError where one diverged."""
    finished = train_all(recipe, big_settings(recipe, best), bar, recipe.jobs, keep=True)
    bad = [run.folder for run in finished if run.loss is None]
    console.refuse(f"{folder} diverged: see {folder}/{runs.DIVERGED}" for folder in bad)
    return finished


# --------------------------------------------------------------------------------------------------
# 6. Evaluate


def stage_checkpoints(finished: list[FinishedRun]) -> dict[str, Path]:
    """{name: the checkpoint at the end of each stage, and of the run from scratch}."""
    found = {}
    for run in finished:
        for number in range(1, len(run.stages) + 1):
            steps = total_steps(run.stages[:number])
            name = f"stage-{number}" if len(run.stages) > 1 else "scratch"
            found[name] = run.folder / step_name(steps)
    return found


def iq_suite(recipe: Recipe) -> dict:
    """The items of every IQ task, none of which the corpus holds."""
    asked = {"tasks": None, "items": recipe.size.items, "seed": recipe.seed, "set": []}
    return iqeval.make_suite(argparse.Namespace(**asked))


def evaluate(recipe: Recipe, finished: list[FinishedRun], bar: tqdm) -> dict[str, dict]:
    """{name: held-out loss, bits per byte, the teacher's labels, each IQ task} of the checkpoints
    at the end of the stages, each in a file of its own."""
    results, suite = {}, iq_suite(recipe)
    flops = evaluation_flops(recipe)
    for name, path in stage_checkpoints(finished).items():
        file = f"evaluation-{name}"
        results[name] = read(recipe, file)
        if results[name] is not None:
            bar.initial += flops
            bar.update(flops)
            continue
        start = time.perf_counter()
        model = iqeval.CheckpointModel(path, pick_device(recipe.device))
        share, rest = divmod(flops, len(suite))
        tasks = iqeval.evaluate(model, suite, after=lambda: bar.update(share))
        for task in tasks.values():
            del task["items"]
        found = {"held_out": eval_only(str(path), {"threads": recipe.jobs}), "tasks": tasks}
        bar.update(rest)
        found["seconds"] = time.perf_counter() - start
        results[name] = write(recipe, file, found)
    return results


def evaluation_flops(recipe: Recipe) -> int:
    """About what one checkpoint's evaluation takes: a dozen tasks fit, an item fills a row."""
    size, config = recipe.size, recipe.model(recipe.size.widths[-1], recipe.size.layers[-1])
    return 12 * size.items * size.context * forward_flops(config, size.context)


# --------------------------------------------------------------------------------------------------
# 7. The recipe

PROMPTS = ("def ", "Input: abc\nOutput: abcabc\nInput: wxyz\nOutput:")
PARTS = ("search", "predict", "train and grow", "evaluate", "report")


def all_flops(recipe: Recipe) -> int:
    """What all parts of the recipe take. No value of the search changes it."""
    size = recipe.size
    best = {name: values[0] for name, values in size.axes.items()}
    cells = math.prod(map(len, size.axes.values())) + size.finalists * (size.search_seeds - 1)
    total = cells * flops_of(cell_settings(recipe, tuple(best.values()), 0))
    files = stage_files(recipe, best)
    grown = files.pop("stages.json")
    total += training_flops(fit(recipe, grown, size.steps, best))
    for given in files.values():
        total += size.seeds * training_flops(fit(recipe, given, narrow_steps(recipe, files), best))
    if recipe.control:
        total += flops_of(scratch_settings(recipe, best))
    return total + (len(size.layers) + recipe.control) * evaluation_flops(recipe)


@contextlib.contextmanager
def part(recipe: Recipe, number: int, bar: tqdm) -> Iterator[None]:
    """A part of the recipe, counted from 1: says so, and adds up its seconds over all starts."""
    name, start = PARTS[number - 1], time.perf_counter()
    bar.set_description_str(f"{number} of {len(PARTS)}, {name}")
    bar.refresh()
    try:
        yield
    finally:
        seconds = read(recipe, "seconds") or {}
        seconds[name] = seconds.get(name, 0) + time.perf_counter() - start
        write(recipe, "seconds", seconds)


def run_parts(recipe: Recipe, bar: tqdm) -> dict:
    """All parts, one after another. What a part finds in its files it does not do again."""
    with part(recipe, 1, bar):
        found = search(recipe, bar)
    write_stages(recipe, found["best"])
    with part(recipe, 2, bar):
        prediction = predict(recipe, bar, found["best"])
    with part(recipe, 3, bar):
        finished = train(recipe, bar, found["best"])
    with part(recipe, 4, bar):
        results = evaluate(recipe, finished, bar)
    with part(recipe, 5, bar):
        numbers = collect(recipe.out, found, prediction, finished, results)
        texts = {run.folder.name: write_texts(run.folder, PROMPTS) for run in finished}
    # The page has the seconds of all parts. So only its drawing is not among them.
    numbers |= {"texts": texts, "seconds": read(recipe, "seconds")}
    write(recipe, "report", numbers)
    write_page(recipe.out / "report.html", numbers)
    return numbers


def run(recipe: Recipe) -> dict:
    """The whole recipe, or what is left of it. Returns the numbers of the report."""
    pick_device(recipe.device)
    console.make_folder(recipe.out)
    check_unused(recipe.out)
    before = signal.signal(signal.SIGTERM, runs.stop)
    try:
        with contextlib.ExitStack() as stack:
            lock_folder(recipe.out, stack)
            check_folder(recipe)
            wait_for_runs(recipe)
            make_corpus(recipe)
            options = {"total": all_flops(recipe), "unit": "FLOP", "unit_scale": True}
            bar = stack.enter_context(console.progress(**options, delay=0))
            return run_parts(recipe, bar)
    finally:
        signal.signal(signal.SIGTERM, before)


HELP = """The whole paper in one sitting: search a narrow model's hyper-parameters, predict the loss
of the first stage, train a model that grows twice, evaluate each stage, and write one page. Stop it
at any time: the same command goes on, and trains nothing twice.

examples:
  python -m lab.recipe --quick --out runs/quick
  python -m lab.recipe --control --seed 1 --out runs/recipe-seed1
"""


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="lab.recipe", description=HELP, formatter_class=raw)
    add = parser.add_argument
    minutes = f"about how long it may take (default {LAPTOP.minutes:g}, on two cores)"
    add("--minutes", type=float, metavar="N", help=minutes)
    add("--quick", action="store_true", help="all of it in a minute; its numbers mean nothing")
    add("--control", action="store_true", help="the same FLOPs from scratch, beside it")
    add("--seed", type=int, default=0, metavar="N", help="of everything (default 0)")
    add("--device", default="cpu", metavar="D", help="cpu (default) or cuda: larger models")
    jobs = f"runs at a time (default {torch.get_num_threads()}, with --device cuda 1)"
    add("--jobs", type=int, metavar="N", help=jobs)
    add("--out", default="runs/recipe", metavar="DIR", help="default %(default)s")
    return parser


def read_recipe(args: argparse.Namespace) -> Recipe:
    """What the command line asks for. Raises ValueError with everything that is wrong with it."""
    problems = []
    if args.quick and args.minutes is not None:
        problems.append("--quick and --minutes: one of them says how long, leave the other out")
    if not 0 <= args.seed <= LARGEST_SEED:
        problems.append(f"--seed {args.seed}: must be from 0 to {LARGEST_SEED}")
    gpu = args.device.startswith("cuda")
    jobs = (1 if gpu else torch.get_num_threads()) if args.jobs is None else args.jobs
    if jobs < 1:
        problems.append(f"--jobs {jobs}: must be at least 1")
    if Path(args.out).is_file():
        problems.append(f"--out {args.out}: is a file; name a folder")
    console.refuse(problems)
    size = QUICK if args.quick else GPU if gpu else LAPTOP
    if args.minutes is not None:
        size = scaled(size, args.minutes)
    return Recipe(Path(args.out), size, args.seed, args.device, args.control, jobs)


STOPPED = "stopped; the same command goes on"


def main(argv: list[str] | None = None):
    """`python -m lab.recipe`."""
    recipe = read_recipe(make_parser().parse_args(argv))
    numbers = run(recipe)
    print_summary(numbers)
    print("on a cluster, the real thing:", *numbers["cluster"], sep="\n  ")
    print(f"page: {recipe.out}/report.html\nnumbers: {recipe.out}/report.json")


if __name__ == "__main__":
    console.run(main, STOPPED)
