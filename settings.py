"""settings.py - what a run is asked for: every option of train.py, checked and filled in.

1. Settings       every option, its default, its range, and what else reads it
2. a file         the same options as JSON: --settings
3. a run          the recipe's values filled in, the stages, the layout
4. the parser     the same options as a command line
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import parallel
import schedule
from checkpoint import find_checkpoint, read_info
from console import did_you_mean, read_json, refuse
from flm import PRESETS, FLMConfig, parse_fields, preset
from grow import DIMENSIONS
from parallel import Layout, World
from schedule import RECIPES, Stage

# --------------------------------------------------------------------------------------------------
# 1. Settings


# (lowest, highest, in words): the values that an option may have
COUNT = (1, math.inf, "at least 1")
POSITIVE = (sys.float_info.min, sys.float_info.max, "a number above 0")
NOT_NEGATIVE = (0, sys.float_info.max, "0 or above")
SHARE = (0, 1, "between 0 and 1")
SEED = (0, 2**63 - 1, "between 0 and 2^63 - 1")

MODES = ("resume", "auto_resume", "eval_only")  # of the command line


def option(default, help: str, **more):
    """A field of Settings, with all that the rest of the program wants to know of it.

    resume: whether --resume may change it. evaluate: whether --eval-only reads it.
    valid: the values that it may have. group: in --help, the heading of it and the next ones.
    metavar, choices: argparse's."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


def layout_option(default, help: str, **more):
    """An option that says how a model lies on processes. It changes no result."""
    return option(default, help, resume=True, evaluate=True, **more)


# fmt: off
@dataclass(frozen=True)
class Settings:
    """Every option of a run, as plain JSON values. None: the preset's recipe decides (RECIPES)."""

    preset: str = option(
        "demo", f"the model: {', '.join(PRESETS)}",
        group="what to train")
    model: tuple[str, ...] = option(
        (), "change fields of the model: --model d_model=384 n_heads=6",
        metavar="FIELD=VALUE")
    mup: str = option(
        "on", "on: maximal update parametrization; off: the standard one",
        choices=("on", "off"))
    stages: str | None = option(
        None, "growth in the run: a JSON file of stages, paper, or none (not given: those of the "
        "preset's recipe)", metavar="FILE")
    init_from: str | None = option(
        None, "begin a new run with the model, the moments and the place in the data of a "
        "checkpoint", metavar="CHECKPOINT")
    seed: int = option(
        0, "of the initial weights and of the order of the data", valid=SEED)

    data: str | None = option(
        None, "a folder from data.py prepare (not given: Python's standard library)",
        group="on what", metavar="DIR", resume=True, evaluate=True)
    data_changed: bool = option(
        False, "with --resume: go on though the text is another one than before", resume=True)
    tokenizer: str = option(
        "bytes", "tokenizer of the standard library; a prepared folder has its own",
        choices=("bytes", "cl100k_base"), evaluate=True)
    tokenizer_file: str | None = option(
        None, "cl100k_base.tiktoken, where it cannot be downloaded",
        metavar="PATH", resume=True, evaluate=True)
    document_mask: bool = option(
        False, "cut attention where a document ends (a row holds parts of several documents)",
        evaluate=True)
    teacher_fraction: float = option(
        0.0, "share of rows with FreeLM's teacher signal", valid=SHARE)

    steps: int | None = option(
        None, "optimizer steps; the learning rate ends with the last one",
        group="how", valid=COUNT, resume=True)
    batch_size: int | None = option(None, "rows per step", valid=COUNT)
    micro_batch: int | None = option(
        None, "rows per forward pass; gradients add up (not given: all rows; with --pp: 1)",
        valid=COUNT, resume=True)
    lr: float | None = option(
        None, "peak learning rate at the proxy's width; muP scales it for each group of parameters",
        valid=POSITIVE, resume=True)
    min_lr: float = option(
        0.015, "end of the learning rate, as a share of the peak (the paper: 6e-6 of 4e-4)",
        valid=SHARE, resume=True)
    lr_schedule: str = option(
        "cosine", "cosine (the paper), or wsd: warm-up, constant, at the end a straight line down",
        choices=("cosine", "wsd"))
    lr_decay: float | None = option(
        None, "share of the run that wsd's line takes (not given: 0.2); 0: no line, a run to "
        "branch from", valid=SHARE, resume=True)
    warmup: int | None = option(
        None, "warm-up of the learning rate, in samples", metavar="SAMPLES", valid=NOT_NEGATIVE)
    weight_decay: float = option(0.1, "decay of matrices", valid=NOT_NEGATIVE)
    clip: float = option(1.0, "largest norm of the whole gradient", valid=POSITIVE, resume=True)

    out: str | None = option(
        None, "the run's folder (not given: the first free one of runs/PRESET, runs/PRESET-2, ...)",
        group="watching and keeping", metavar="DIR")
    eval_every: int = option(100, "steps between evaluations", valid=COUNT, resume=True)
    eval_rows: int = option(
        256, "held-out rows of an evaluation, spread over the held-out documents",
        valid=COUNT, resume=True, evaluate=True)
    eval_batch: int | None = option(
        None, "rows per forward pass of an evaluation (not given: as in training)",
        valid=COUNT, resume=True, evaluate=True)
    save_every: int = option(200, "steps between checkpoints", valid=COUNT, resume=True)
    save_minutes: float = option(
        30.0, "minutes after which a checkpoint is written in any case", valid=POSITIVE,
        resume=True)
    keep: int = option(
        2, "newest checkpoints that are kept (and one more until a step has shown that the newest "
        "is sound)", valid=COUNT, resume=True)

    log_every: int = option(
        10, "steps between two lines where there is no terminal, and so no bar",
        valid=COUNT, resume=True)
    log_to: str | None = option(
        None, "a second log beside metrics.jsonl: tensorboard, in the run's folder (pip install "
        "tensorboard)", choices=("tensorboard",), resume=True)
    profile: int | None = option(
        None, "once warm, profile so many steps: a trace in the run's folder, and the ten "
        "costliest operations", metavar="STEPS", valid=COUNT, resume=True)

    device: str = option(
        "auto", "auto, cpu, cuda or mps", group="on which machine", resume=True, evaluate=True)
    threads: int | None = option(
        None, "CPU threads (not given: PyTorch decides, one per core)",
        valid=COUNT, resume=True, evaluate=True)
    dtype: str = option(
        "auto", "arithmetic: auto, bfloat16 (over fp32 weights), float32, float64",
        choices=("auto", "bfloat16", "float32", "float64"), evaluate=True)
    compile: bool = option(
        False, "torch.compile each block: a slow start, then faster steps",
        resume=True)
    deterministic: bool = option(False, "the same bits on CUDA too; slower", resume=True)

    dp: int | None = layout_option(
        None, "data parallelism: copies of the model, each with a share of the batch (not given: "
        "all processes that are left)", valid=COUNT,
        group="on how many processes, started with torchrun (parallel.py)")
    tp: int = layout_option(
        1, "tensor parallelism: processes that share every matrix", valid=COUNT)
    pp: int = layout_option(
        1, "pipeline parallelism: processes that share the layers", valid=COUNT)
    schedule: str = layout_option(
        "1F1B", "the pipeline schedule", choices=tuple(parallel.PIPELINE_SCHEDULES))
    sequence_parallel: bool = layout_option(
        False, "cut the sequence, too, over the --tp processes")
    shard_optimizer: bool = layout_option(
        False, "cut weights, gradients and moments over the --dp processes (with --tp or --pp it "
        "is always so)")
    reshard: bool = layout_option(
        False, "gather the weights of a block over the --dp processes for each pass, and sum its "
        "gradients after it: the least memory, the most traffic")
    activation_checkpointing: bool = layout_option(
        False, "compute activations again in the backward pass: less memory, a third more work")
    timeout_minutes: float = option(
        10.0, "how long a rank waits for another one before it says which one is lost, and ends",
        valid=POSITIVE, resume=True, evaluate=True)

    def __post_init__(self):  # JSON and argparse know no tuples
        object.__setattr__(self, "model", tuple(self.model))
# fmt: on


FIELDS = dataclasses.fields(Settings)
LAYOUT = [field.name for field in dataclasses.fields(Layout)]  # each is an option


RECIPE = ("steps", "batch_size", "lr", "warmup")  # the preset's recipe has them


def flag(name: str) -> str:
    """The option of a setting: "--batch-size" of "batch_size"."""
    return "--" + name.replace("_", "-")


def value_problems(field: dataclasses.Field, value) -> list[str]:
    """What is wrong with the value of an option, by itself."""
    lowest, highest, words = field.metadata.get("valid", (None, None, ""))
    choices = field.metadata.get("choices", (value,))
    if value is None:
        return []
    if words and not lowest <= value <= highest:
        return [f"{flag(field.name)} {value}: must be {words}"]
    if value not in choices:
        return [f"{flag(field.name)} {value}: must be one of {', '.join(choices)}"]
    return []


def check_settings(s: Settings) -> list[str]:
    """A line for every option that is out of its range."""
    problems = []
    for field in FIELDS:
        problems += value_problems(field, getattr(s, field.name))
    if s.lr_schedule == "cosine" and s.lr_decay is not None:
        problems.append(f"--lr-decay {s.lr_decay}: is for a run with --lr-schedule wsd")
    return problems


# --------------------------------------------------------------------------------------------------
# 2. A file

TYPES = {  # {type of a field: (that of its JSON value, in words)}
    "str": (str, "a text"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "tuple[str, ...]": (list, "a list of texts"),
}
OUTCOMES = ("stages", "corpus", "corpus_digest", "machine", "torch", "python")  # see write_run


def json_problems(field: dataclasses.Field, value) -> list[str]:
    """What is wrong with the JSON value of an option: its type, or value_problems."""
    kind, words = TYPES[field.type.removesuffix(" | None")]
    fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    if kind is list and fits:
        fits = all(isinstance(word, str) for word in value)
    if not fits:
        return [f"{field.name} = {json.dumps(value)}: must be {words}"]
    if field.name == "preset" and value not in PRESETS:
        return [f"--preset {value}: must be one of {', '.join(PRESETS)}"]
    return value_problems(field, value)


def read_settings(file: str) -> dict:
    """What --settings FILE gives: {option: value}.

    FILE is {"settings": {option: value}}, or the config.json of a run: what came of its settings
    (OUTCOMES) is not read, nor the name of its folder, for a run that is like it takes another one.
    null means not given.
    Raises ValueError with every key that is unknown and every value that is wrong."""
    content, fields = read_json("--settings", file), {field.name: field for field in FIELDS}
    if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
        raise ValueError(f'--settings {file}: must hold {{"settings": {{option: value, ...}}}}')
    others = [key for key in content if key not in ("settings", *OUTCOMES)]
    problems = [f'unknown key {key!r}: options stand under "settings"' for key in others]
    given = {key: value for key, value in content["settings"].items() if value is not None}
    for key, value in given.items():
        if key in fields:
            problems += json_problems(fields[key], value)
        else:
            hint = did_you_mean(key, fields) or "train.py --help has all options"
            problems.append(f"unknown key {key!r}: {hint.rstrip()}")
    refuse(problems, f"--settings {file}: these do not fit:")
    if "out" in given and Path(given["out"], "config.json").absolute() == Path(file).absolute():
        del given["out"]
    return given


def with_file(given: dict) -> dict:
    """The options of a command line, over those of the file that its --settings names. Raises
    ValueError where a value of another preset's recipe would count for the command line's."""
    file = given.pop("settings", None)
    if file is None:
        return given
    found, name = read_settings(file), given.get("preset")
    if name in PRESETS and found.get("preset", name) != name:
        kept = [key for key in RECIPE if key in found and key not in given]
        refuse(
            (f"{flag(key)} {RECIPES[name][key]}" for key in kept),
            f"--preset {name}: {file} is for {found['preset']}, whose values would count here too. "
            f"Say beside --preset what you want; the recipe of {name} has:",
        )
    return {**found, **given}


# --------------------------------------------------------------------------------------------------
# 3. A run


def resolve(settings: Settings) -> tuple[Settings, list[Stage]]:
    """The settings with the recipe's values filled in, and the stages of the run; the last stage
    has the final model. Raises ValueError with every violated constraint."""
    config, seen, recipe = preset(settings.preset), 0, RECIPES[settings.preset]
    missing = [k for k in RECIPE if getattr(settings, k) is None]
    s = dataclasses.replace(settings, **{k: recipe[k] for k in missing})
    if "warmup" in missing:  # the recipe's warm-up is for the recipe's number of steps
        s = dataclasses.replace(s, warmup=min(s.warmup, max(0, s.steps * s.batch_size // 12)))
    if s.lr_schedule == "wsd" and s.lr_decay is None:
        s = dataclasses.replace(s, lr_decay=0.2)  # ours
    changes, problems = parse_fields(s.model)
    problems = [f"--model {problem}" for problem in problems] + check_settings(s)
    if s.data_changed:
        problems.append("--data-changed: a new run has no text before; leave it out")
    try:
        config = config.replace(**{"mup": s.mup == "on", **changes})
        if s.init_from:
            config, seen = read_start(s)
    except ValueError as error:
        problems.append(str(error))
    refuse(problems, "these settings do not fit together:")

    # The recipe's stages are made for the preset's own model.
    word = "none" if s.stages is None and (s.model or s.init_from) else s.stages
    given = schedule.given_stages(word, s.preset, s.steps, s.batch_size)
    steps = None if s.stages == "paper" and settings.steps is None else s.steps
    numbers = dict(steps=steps, batch_size=s.batch_size, lr=s.lr, warmup=s.warmup, seen=seen)
    stages = schedule.fit_stages(given, config, **numbers)
    s = dataclasses.replace(s, steps=schedule.total_steps(stages))
    source, asked = "--model", {k: v for k, v in changes.items() if k not in DIMENSIONS}
    if s.init_from:
        source, asked = f"--init-from {s.init_from}:", config.to_dict()
    # The sizes that --model names may be those of the last stage.
    first, file = stages[0].config.to_dict(), f"--stages {s.stages}"
    differ = [f"{source} {k}={v}, {file} {first[k]}" for k, v in asked.items() if v != first[k]]
    refuse(differ, "the model and its first stage differ; leave one of the two out:")
    return s, stages


def read_start(s: Settings) -> tuple[FLMConfig, int]:
    """(model, samples seen) of the checkpoint that --init-from names."""
    source, problems = find_checkpoint(s.init_from), []
    if source.is_file():
        problems.append(f"--init-from {source} is a file of weights: give a run or a step folder")
    if s.model:
        problems.append(f"--model {' '.join(s.model)}: --init-from brings its own model")
    refuse(problems)
    info = read_info(source)
    return FLMConfig.from_dict(info["config"]), info["samples"]


def layout_of(s: Settings, stages: list[Stage], processes: int) -> Layout:
    """The layout of these settings on so many processes. Raises ValueError with every reason why
    a stage does not fit it."""
    dp = s.dp or max(1, processes // (s.tp * s.pp))
    layout = Layout(**{name: getattr(s, name) for name in LAYOUT} | {"dp": dp})
    problems = []
    if layout.size != processes:
        start = f"torchrun --standalone --nproc-per-node {layout.size} train.py ..."
        found = f"torchrun started {processes}"
        if processes == 1:
            found = f"this is one: start them with {start}, or take one: --dp 1 --tp 1 --pp 1"
        problems.append(f"dp {dp} x tp {s.tp} x pp {s.pp} = {layout.size} processes, but {found}")
    by_stage = [
        parallel.check_layout(layout, stage.config, stage.batch_size, s.micro_batch)
        for stage in stages
    ]
    for i, found in enumerate(by_stage, 1):
        for text in found:
            everywhere = all(text in other for other in by_stage)
            problems.append(text if everywhere else f"stage {i}: {text}")
    refuse(problems, "this layout does not fit:")
    return layout


def check_same_settings(world: World, s: Settings, resume: bool = False):
    """Raises ValueError, on every rank, where the ranks were started with different options."""
    given = dataclasses.asdict(s) | {"resume": resume}
    mine = {name: repr(value) for name, value in given.items()}  # NaN is not equal to itself
    first = world.broadcast_from_rank_0(mine)
    differ = [f"{flag(k)} {v}, not {first[k]}" for k, v in mine.items() if v != first[k]]
    world.raise_on_all_ranks(refuse, differ, "started with different arguments than rank 0:")


# --------------------------------------------------------------------------------------------------
# 4. The parser


def add_option(group, field: dataclasses.Field):
    """The command line's word for one field of Settings."""
    text = field.metadata["help"]
    extra = {k: v for k, v in field.metadata.items() if k in ("metavar", "choices")}
    if field.type == "bool":
        extra["action"] = argparse.BooleanOptionalAction
    elif field.type.startswith("tuple"):
        extra["nargs"] = "+"
    else:
        kind = {"int": int, "float": float, "str": str}[field.type.split(" ")[0]]
        extra["type"] = kind
        if kind is not str:
            extra.setdefault("metavar", "N" if kind is int else "X")
        if field.default is not None:
            text += f" (default {field.default})"
        elif field.name in RECIPES["demo"] and field.name != "stages":
            text += f" (demo: {RECIPES['demo'][field.name]})"
    group.add_argument(flag(field.name), help=text, **extra)


EXAMPLES = """examples:
    python train.py                          a small model on Python's own source, in minutes
    python train.py --data corpora/mine      on text that data.py prepared
    python train.py --resume runs/demo       go on exactly where a run stopped
    python train.py --eval-only runs/demo    held-out loss of a checkpoint"""


def make_parser() -> argparse.ArgumentParser:
    """The options of train.py: every field of Settings, and the other modes."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="%(prog)s [options]",
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
        description="Train FLM-101B's model. With no arguments: a small one, on Python's own "
        "source, in a few minutes.",
    )
    parser.add_argument(
        "--settings",
        metavar="FILE",
        help="options from a JSON file, such as a run's config.json; those given here count more",
    )
    for field in FIELDS:
        if "group" in field.metadata:
            group = parser.add_argument_group(field.metadata["group"])
        add_option(group, field)
    modes = parser.add_argument_group("something else").add_mutually_exclusive_group()
    modes.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    modes.add_argument(
        "--auto-resume",
        action="store_true",
        help="go on with the run in --out if there is one, else begin it: for torchrun "
        "--max-restarts and job queues",
    )
    modes.add_argument(
        "--eval-only",
        metavar="CHECKPOINT",
        help="print the held-out loss of a checkpoint (on --data, or on the text of its run)",
    )
    return parser
