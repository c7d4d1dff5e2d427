"""lab/harness.py - our items for lm-evaluation-harness, which runs many other models.

    python -m lab.harness export --out items

The harness (github.com/EleutherAI/lm-evaluation-harness) reads the same prompts, stops at the same
place and compares in the same way. So a model gets the same score there as from iqeval.py.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import console
import iqeval
from iqeval import Item

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
doc_to_target: "{{{{answer}}}}"
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


def task_file(name: str, data: Path, items: list[Item]) -> str:
    """The harness's description (YAML) of a task whose rows are in the file `data`."""
    task = items[0].task
    head = f"""task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {json.dumps(str(data.absolute()))}
test_split: test
doc_to_text: "{{{{prompt}}}}"
target_delimiter: "{task.gap}"
num_fewshot: 0
"""
    if task.metric == "likelihood":
        return head + LIKELIHOOD
    return head + GENERATED.format(tokens=iqeval.budget(items), pattern=FOUND[task.metric])


def export(suite: dict[str, list[Item]], out: str | Path):
    """Write NAME.jsonl and NAME.yaml for every list of items, and print the command to use them."""
    out = Path(out)
    console.make_folder(out)
    names = {f"iq_{name.replace('-', '_')}": items for name, items in suite.items()}
    for name, items in names.items():
        rows = []
        for item in items:
            gold = item.labels.index(item.answer) if item.labels else -1
            row = {
                "prompt": item.prompt,
                "answer": item.answer,
                "labels": item.labels,
                "gold": gold,
            }
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
        data = out / f"{name}.jsonl"
        data.write_text("".join(rows), encoding="utf-8")
        data.with_suffix(".yaml").write_text(task_file(name, data, items), encoding="utf-8")
    total, folder = sum(map(len, suite.values())), shlex.quote(str(out))
    print(f"{total:,} items of {len(suite)} tasks in {out}. With lm-evaluation-harness installed:")
    print(
        "    lm_eval --model hf --model_args pretrained=MODEL "
        f"--include_path {folder} --tasks {next(iter(names))}"
    )


def main(argv: list[str] | None = None):
    """The command line: export."""
    parser = argparse.ArgumentParser(prog="lab.harness", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    p = commands.add_parser("export", help="write items and task files for lm-evaluation-harness")
    p.add_argument("--out", required=True, metavar="DIR", help="the folder to write to")
    p.add_argument("--tasks", nargs="+", metavar="TASK", help="only these (default: all)")
    iqeval.item_options(p)
    args = parser.parse_args(argv)
    export(iqeval.make_suite(args), args.out)


if __name__ == "__main__":
    console.run(main)
