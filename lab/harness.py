"""lab/harness.py - lm-evaluation-harness: its tasks for our models, our items for its models.

    python -m lab.harness run runs/demo --tasks arc_easy hellaswag    its tasks on a checkpoint
    python -m lab.harness run runs/flm --tasks table4                 the paper's table 4
    python -m lab.harness export --out iq-items                       our items as its tasks
    python -m lab.harness run runs/iq-demo --include-path iq-items --tasks iq

The harness (github.com/EleutherAI/lm-evaluation-harness) has thousands of tasks. Most are
downloaded when they are first asked for. `run` needs the package: pip install lm_eval==0.4.13

The exported items have the same prompts, stop at the same place and are compared in the same way as
in iqeval.py. So a model gets the same score there.

    1. export    items as tasks of the harness
    2. table 4   which tasks it is made of
    3. run       find the tasks, load their data, score a checkpoint
    4. the command line
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import re
import shlex
import sys
from pathlib import Path

import console
import iqeval
from checkpoint import find_checkpoint
from iqeval import Item
from machine import pick_device

# --------------------------------------------------------------------------------------------------
# 1. Export

VERSION = 1.0  # of the tasks: to be raised where a prompt or a comparison changes

# Python for the harness, next to the task files. `custom_dataset` and `sampler` name its parts.
UTILS = '''"""What the task files in this folder share."""

import json
from pathlib import Path

from datasets import Dataset
from lm_eval.api.samplers import ContextSampler


def items(file, **metadata):
    """The rows of a file in this folder, wherever this folder is."""
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


class OwnShots(ContextSampler):
    """An item's examples are its own: they show a rule, or labels, that no other item has."""

    def sample(self, n, eval_doc=None, df=None, **kwargs):
        shots = eval_doc["shots"]
        if n > len(shots):
            raise ValueError(f"an item has {len(shots)} examples, not {n}: give a smaller number")
        return shots[:n]
'''
LIKELIHOOD = """output_type: multiple_choice
doc_to_choice: labels
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
# iqeval.said as a regular expression
FOUND = {"number": r"\\d+", "exact": r"^[^\\S\\n]*([^\\n]*)"}
GENERATED = """output_type: generate_until
doc_to_target: answer
generation_kwargs:
  until: ["\\n"]
  do_sample: false
  max_gen_toks: {tokens}
filter_list:
  - name: first
    filter:
      - function: regex
        regex_pattern: "{pattern}"
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
SHOTS = """fewshot_delimiter: {end}
fewshot_config:
  split: test
  sampler: !function utils.OwnShots
  doc_to_target: answer
  doc_to_choice: null
"""


def row_of(item: Item) -> dict:
    """An item as a row of a task's data. Instruction, shots and prompt make up its whole prompt."""
    shots = item.shots or iqeval.Shots("", [], "")
    row = {"instruction": shots.instruction, "prompt": item.prompt.removeprefix(shots.text())}
    row["shots"] = [{"prompt": text, "answer": answer} for text, answer in shots.examples]
    row |= {"answer": item.answer, "labels": item.labels}
    return row | {"gold": item.labels.index(item.answer) if item.labels else -1}


def task_file(name: str, items: list[Item]) -> str:
    """The harness's description (YAML) of a task whose rows are in NAME.jsonl beside it."""
    task, shots = items[0].task, items[0].shots
    count = len(shots.examples) if shots else 0
    language = "chinese" if re.search(r"[\u4e00-\u9fff]", items[0].prompt) else "english"
    parts = [
        f"""task: {name}
tag: iq_{language}
custom_dataset: !function utils.items
dataset_kwargs:
  file: {name}.jsonl
test_split: test
description: instruction
doc_to_text: prompt
target_delimiter: "{task.gap}"
num_fewshot: {count}
""",
        SHOTS.format(end=json.dumps(shots.end)) if shots else "",
        LIKELIHOOD
        if items[0].labels
        else GENERATED.format(tokens=iqeval.budget(items), pattern=FOUND[task.metric]),
        metadata(count),
    ]
    return "".join(parts)


def metadata(shots: int | None = None) -> str:
    """What every task and group says of itself."""
    return f"metadata:\n  version: {VERSION}\n" + (
        "" if shots is None else f"  num_fewshot: {shots}\n"
    )


def group_files(names: dict[str, list[Item]]) -> dict[str, str]:
    """{group: its YAML}: a group for each kind of task, with the mean of its tasks, as the paper's
    tables have it (symbols and words apart), and `iq`, which holds them all."""
    kinds = {}
    for name, items in names.items():
        words = "_words" if name.endswith("_words") else ""
        kinds.setdefault(f"iq_{items[0].task.kind}{words}", []).append(name)
    files = {"iq": f"group: iq\ntask: [{', '.join(kinds)}]\n{metadata()}"}
    for group, members in kinds.items():
        metric = "acc" if names[members[0]][0].labels else "exact_match"
        files[group] = f"""group: {group}
task: [{", ".join(members)}]
aggregate_metric_list:
  - metric: {metric}
    aggregation: mean
    weight_by_size: false
{metadata()}"""
    return files


def export(suite: dict[str, list[Item]], out: str | Path):
    """Write the items as tasks of the harness, and print the commands to use them.

    NAME.jsonl and NAME.yaml for every list of items, a file for every group, and utils.py. The
    folder may be moved: no file names a place. ValueError where `out` is not a folder."""
    out = Path(out)
    console.make_folder(out)
    names = {f"iq_{name.replace('-', '_')}": items for name, items in suite.items()}
    files = {f"_{group}.yaml": text for group, text in group_files(names).items()}
    files["utils.py"] = UTILS
    for name, items in names.items():
        rows = [json.dumps(row_of(item), ensure_ascii=False) + "\n" for item in items]
        files |= {f"{name}.jsonl": "".join(rows), f"{name}.yaml": task_file(name, items)}
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    total, folder = sum(map(len, suite.values())), shlex.quote(str(out))
    print(f"{total:,} items of {len(suite)} tasks in {out}. With {PACKAGE} installed:")
    print(f"    python -m lab.harness run CHECKPOINT --include-path {folder} --tasks iq")
    print("    lm_eval run --model hf --model_args pretrained=MODEL ", end="")
    print(f"--include_path {folder} --tasks iq")


# --------------------------------------------------------------------------------------------------
# 2. Table 4
#
# lab/table4.yaml says which tasks and shots these are. Which metric of a task counts is not in the
# paper: OURS.

TABLE_4 = {  # {the harness's task: (metric, FLM-101B's published score in percent)}
    "arc_challenge": ("acc_norm", 39.76),
    "hellaswag": ("acc_norm", 66.23),
    "mmlu": ("acc", 28.30),
    "truthfulqa_mc2": ("acc", 41.47),
}


def table_4(results: dict[str, dict]) -> str:
    """The scores in percent beside those of FLM-101B, and their means."""
    lines = [f"{'table 4 (section 4.1), in percent':<36}{'ours':>8}{'FLM-101B':>10}"]
    columns = [], []
    for task, (metric, published) in TABLE_4.items():
        pair = 100 * results[task][f"{metric},none"], published
        lines.append(f"  {f'{task}, {metric}':<34}{pair[0]:>8.2f}{pair[1]:>10.2f}")
        for column, score in zip(columns, pair):
            column.append(score)
    ours, paper = (sum(column) / len(column) for column in columns)
    return "\n".join([*lines, f"  {'mean':<34}{ours:>8.2f}{paper:>10.2f}"])


# --------------------------------------------------------------------------------------------------
# 3. Run

PACKAGE = "lm_eval==0.4.13"
OWN = Path(__file__).parent  # has table4.yaml
OUT = "harness-CHECKPOINT-TASKS.json"


def free_name(checkpoint: Path, tasks: list[str]) -> str:
    """OUT for this checkpoint and these tasks, with a number where a file has that name."""
    words = [checkpoint.absolute().parent.name] * checkpoint.is_dir() + [checkpoint.stem]
    words += tasks[:3] + [f"and-{len(tasks) - 3}-more"] * (len(tasks) > 3)
    stem = re.sub(r"[^\w.]+", "-", "-".join(["harness", *words]))
    names = (f"{stem}{f'-{n}' if n > 1 else ''}.json" for n in itertools.count(1))
    return next(name for name in names if not Path(name).exists())


def find_tasks(names: list[str], include: str | None):
    """(the harness's TaskManager, the names that are asked for, patterns such as mmlu_* resolved).

    The harness reads some 14,000 files to list its own tasks, so they are left out where the
    folder `include` has all that is asked for. ValueError names what is unknown, with the nearest
    names."""
    from lm_eval.tasks import TaskManager

    folders = [OWN, include] if include else [OWN]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not all(is_whole(manager, name) for name in names):
        print("reading the list of the harness's tasks ...", file=sys.stderr)
        manager = TaskManager(include_path=folders)
    found, problems = [], []
    for name in names:
        matching = manager.match_tasks([name])
        found += matching
        if not matching:
            hint = console.did_you_mean(name, manager.all_tasks)
            hint = "put blanks, not commas, between names. " if "," in name else hint
            problems.append(f"no task is called {name!r}: {hint}lm_eval ls tasks lists them")
            problems += unreadable(include)
    console.refuse(problems)
    return manager, list(dict.fromkeys(found))


def is_whole(manager, name: str) -> bool:
    """Whether a task, and every task of a group, is one that the manager knows."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    members = (entry.cfg or {}).get("task") if "group" in (entry.cfg or {}) else []
    return all(isinstance(member, str) and is_whole(manager, member) for member in members)


def unreadable(include: str | None) -> list[str]:
    """The task files of a folder that the harness passes over, and why."""
    from lm_eval.tasks._yaml_loader import load_yaml

    problems = []
    for file in sorted(Path(include).rglob("*.yaml")) if include else []:
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:  # whatever is wrong with it
            reason = " ".join(str(error).split())
            problems.append(f"{file} cannot be read: {reason}")
    return problems


def load_tasks(manager, names: list[str]) -> list:
    """The tasks and groups with their data, which the harness downloads where it has to.

    ValueError where that is not possible, or a task is wrong, with the reason in one line."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tries five times, and says so
    logging.getLogger("lm_eval.api.task").addFilter(lambda log: "Custom kwargs" not in str(log.msg))
    found = []
    for name in names:
        print(f"loading the data of {name} ...", file=sys.stderr)
        try:
            loaded = manager.load([name])
        except Exception as error:  # a task is code and data of other people
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            advice = f"the task {name} cannot be loaded: {type(error).__name__}: {reason}"
            if isinstance(error, ConnectionError):
                advice += (
                    "\nIts data is not on this machine, and there is no network. Load it once "
                    "where there is one, or run tasks of your own (--include-path)"
                )
            raise ValueError(advice) from error
        groups = loaded["groups"]
        found += [groups[name]] if name in groups else loaded["tasks"].values()
    return found


def said_of(samples: dict[str, list]) -> dict[str, list]:
    """What the model said to each document of each task, without the prompts."""
    kept = ("doc_id", "target", "filter", "filtered_resps")
    return {
        task: [{key: row[key] for key in (*kept, *row["metrics"])} for row in rows]
        for task, rows in samples.items()
    }


def run_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the options of `run`."""
    problems = iqeval.run_problems(args)
    limit = args.limit
    if limit is not None and not (0 < limit < 1 or limit >= 1 and limit.is_integer()):
        problems.append(f"--limit {limit:g}: give a whole number from 1 on, or a share below 1")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        problems.append(f"--num-fewshot {args.num_fewshot}: must be at least 0")
    if args.include_path and not Path(args.include_path).is_dir():
        problems.append(f"--include-path {args.include_path}: there is no such folder")
    return problems


def run(args: argparse.Namespace):
    """Score a checkpoint on tasks of the harness; print a table and write everything to --out."""
    console.refuse(run_problems(args))
    try:
        from lm_eval import simple_evaluate
        from lm_eval.utils import handle_non_serializable, make_table

        from lab.harness_model import HarnessModel
    except ImportError as error:
        raise ValueError(f"this needs lm-evaluation-harness ({error}): pip install {PACKAGE}")
    checkpoint, device = find_checkpoint(args.checkpoint), pick_device(args.device)
    args.out = free_name(checkpoint, args.tasks) if args.out == OUT else args.out
    manager, names = find_tasks(args.tasks, args.include_path)
    model = HarnessModel(checkpoint, device, args.tokenizer_file, args.batch_size)
    try:
        results = simple_evaluate(
            model,
            tasks=load_tasks(manager, names),
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            batch_size=args.batch_size,
            device=str(device),
            task_manager=manager,
        )
    except OverflowError as error:
        raise ValueError(
            f"a perplexity is too large to be computed ({error}): to this model a word, which ends "
            "at a blank, is all but impossible. Ask for bits_per_byte alone, or train longer"
        ) from error
    del results["pretty_env_info"]
    results["samples"] = said_of(results["samples"])
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
    if "table4" in names:
        print(table_4(results["results"]))
    report = {"options": vars(args), "context": model.max_length, "cut": model.cut, **results}
    text = json.dumps(report, ensure_ascii=False, indent=1, default=handle_non_serializable)
    Path(args.out).write_text(text + "\n", encoding="utf-8")
    print(notes(model, args))


def notes(model, args: argparse.Namespace) -> str:
    """What a reader of the scores has to know."""
    lines = [f"every answer is in {args.out}"]
    if model.cut["contexts"]:
        lines.append(
            f"{model.cut['contexts']:,} contexts were longer than this model's {model.max_length} "
            f"tokens allow (up to {model.cut['longest']:,}): their beginnings were cut off"
        )
    if args.limit:
        lines.append("--limit: a part of each task only, so these are no scores to report")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# 4. The command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="lab.harness", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    p = commands.add_parser("run", help="score a checkpoint on tasks of the harness")
    iqeval.run_options(p)
    p.set_defaults(out=OUT)
    add = p.add_argument
    tasks = "names of tasks, groups or tags, patterns such as mmlu_*, or table4"
    add("--tasks", nargs="+", required=True, metavar="TASK", help=tasks)
    add("--limit", type=float, metavar="N", help="documents of each task, or a share below 1")
    shots = "examples in front of each document (default: the task's own number)"
    add("--num-fewshot", type=int, metavar="N", help=shots)
    add("--include-path", metavar="DIR", help="a folder with task files of your own")
    p = commands.add_parser("export", help="write our items as tasks of the harness")
    p.add_argument("--out", required=True, metavar="DIR", help="the folder to write to")
    p.add_argument("--tasks", nargs="+", metavar="TASK", help="only these (default: all)")
    iqeval.item_options(p)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    """The command line: run and export."""
    args = parse_args(argv)
    if args.command == "run":
        run(args)
    else:
        export(iqeval.make_suite(args), args.out)


if __name__ == "__main__":
    console.run(main)
