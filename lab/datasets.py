"""lab/datasets.py - the IQ evaluation on the original datasets (FLM-101B, section 5).

    python -m lab.datasets show boolq=BoolQ/val.jsonl                    print a few items
    python -m lab.datasets run runs/iq-demo boolq=BoolQ/val.jsonl        score a checkpoint
    python -m lab.datasets export --out items boolq=BoolQ/val.jsonl      for lm-evaluation-harness

Each TASK=FILE names a task and the file of its dataset:

    boolq wic rte wsc               SuperGLUE, val.jsonl
    afqmc csl ocnli cluewsc2020     CLUE, dev.json
    single-fact two-facts           bAbI, qa1_..._test.txt and qa2_..._test.txt

A SuperGLUE or CLUE task comes twice: with random strings for its labels (symbolic mapping, section
5.1) and with their words. The instructions in front are OURS. The counts of items follow from the
granularity of the published scores.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import console
import iqeval
from iqeval import Item, Story, Task
from lab import harness
from textfiles import diagnose

# --------------------------------------------------------------------------------------------------
# 1. The datasets


class Dataset(NamedTuple):
    """What a row of a file means, and what was published."""

    language: str
    count: int  # items by default: the paper's number
    paper: tuple  # published accuracy in percent by iqeval.MODELS (tables 7 and 8)
    instruction: str
    fields: dict[str, str]  # {name that is shown: field of the row}
    words: dict[str, str]  # {label in the file, as JSON or as text: the word for it}


YES_NO = {"true": "true", "false": "false"}
PAIR = {"句子一": "sentence1", "句子二": "sentence2"}
SPANS = ("target.span1_text", "target.span2_text")
# fmt: off
DATASETS = {
    "boolq": Dataset("en", 299, (50.84, 40.13, 49.50), "Does the passage say yes to the question?",
                     {"Passage": "passage", "Question": "question"}, YES_NO),
    "wic": Dataset("en", 300, (53.33, 48.67, 50.33),
                   "Does the word have the same sense in both sentences?",
                   {"Word": "word", "First": "sentence1", "Second": "sentence2"}, YES_NO),
    "rte": Dataset("en", 277, (48.38, 47.65, 48.38), "Does the hypothesis follow from the premise?",
                   {"Premise": "premise", "Hypothesis": "hypothesis"},
                   {"entailment": "entailment", "not_entailment": "not entailment"}),
    "wsc": Dataset("en", 103, (37.86, 56.31, 38.83), "Does the pronoun refer to the noun?",
                   {"Text": "text", "Noun": SPANS[0], "Pronoun": SPANS[1]}, YES_NO),
    "afqmc": Dataset("zh", 300, (None, 33.33, 38.33), "两个句子的意思是否相同?", PAIR,
                     {"0": "不同", "1": "相同"}),
    "csl": Dataset("zh", 208, (None, 53.85, 55.29), "这些关键词是否都出自摘要?",
                   {"摘要": "abst", "关键词": "keyword"}, {"0": "否", "1": "是"}),
    "ocnli": Dataset("zh", 300, (None, 34.00, 27.33), "句子二与句子一是什么关系?", PAIR,
                     {"entailment": "蕴含", "neutral": "中立", "contradiction": "矛盾"}),
    "cluewsc2020": Dataset("zh", 300, (None, 38.67, 47.33), "代词是否指该名词?",
                           {"文本": "text", "名词": SPANS[0], "代词": SPANS[1]},
                           {"true": "对", "false": "错"}),
}
# fmt: on
BABI = {"single-fact": 1, "two-facts": 2}  # task: supporting sentences of each answer


TASKS = {
    name: Task(
        name,
        "symbolic",
        make=None,
        shots="2 per label",
        count=dataset.count,
        metric="likelihood",
        chance=1 / len(dataset.words),
        paper=dataset.paper,
    )
    for name, dataset in DATASETS.items()
}
TASKS |= {name: replace(iqeval.TASKS[name], lazy=("", None)) for name in BABI}


# --------------------------------------------------------------------------------------------------
# 2. From a file to rows


def read_lines(path: Path, parse: Callable[[str], Any]) -> list:
    """parse(line) of every line that is not blank, without the lines for which it is None.

    Raises ValueError for a file that is not UTF-8 text, and with the first ten lines for which
    `parse` raised one; OSError for a file that cannot be read."""
    rows, problems = [], []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {diagnose(path, error.start)}") from None
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut JSON strings
        try:
            row = parse(line) if line.strip() else None
        except ValueError as error:
            problems.append(f"{path}, line {number}: {error}")
        else:
            rows += [] if row is None else [row]
    more = [f"... and {len(problems) - 10} more"] * (len(problems) > 10)
    console.refuse(problems[:10] + more)
    return rows


def field_text(row: Any, place: str) -> str:
    """The text at a place such as target.span1_text, in one line; "" where there is none."""
    for key in place.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    if place == "keyword" and isinstance(row, list) and all(isinstance(word, str) for word in row):
        row = "、".join(row)
    if not isinstance(row, str) or re.search("[\ud800-\udfff]", row):
        return ""
    return " ".join(row.split())


def parse_row(dataset: Dataset, line: str) -> tuple[iqeval.Fields, str] | None:
    """(fields, class) of a line of JSON; None for a row on which OCNLI's annotators disagreed.

    OCNLI marks such a row with the label "-"; its authors advise to leave it out."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object; this file has one object a line")
    fields, problems = [], []
    for shown, place in dataset.fields.items():
        fields.append((shown, field_text(row, place)))
        if not fields[-1][1]:
            form = "a list of words" if place == "keyword" else "text"
            problems.append(f"the field {place!r} must be {form}")
    label = row.get("label", "missing (a test set has none: take the validation set)")
    label = label if isinstance(label, str) else json.dumps(label)  # some copies quote true
    if label == "-" and "neutral" in dataset.words:
        return None
    if label not in dataset.words:
        known = ", ".join(dataset.words)
        problems.append(f"the field 'label' must be one of {known}, but is {label[:60]}")
    if problems:
        raise ValueError("; ".join(problems))
    return fields, label


def read_babi(name: str, path: Path) -> list[Story]:
    """The questions of bAbI's task 1 (single-fact) or 2 (two-facts), each with its story.

    A line is "N sentence", or "N question<tab>answer<tab>numbers of the supporting lines". N begins
    again at 1 with each story."""
    sentences = {}

    def parse(line: str) -> Story | None:
        number, _, text = line.partition(" ")
        if not number.isdecimal() or not text.strip():
            raise ValueError(f"must begin with its number in the story and a space: {line[:40]!r}")
        if number == "1":
            sentences.clear()
        question, *rest = (part.strip() for part in text.split("\t"))
        if not rest:
            sentences[number] = question
            return None
        if len(rest) != 2 or not all(rest):
            raise ValueError(
                "a question needs three fields with tabs between: question, answer, lines"
            )
        answer, supports = rest[0], rest[1].split()
        if len(supports) != BABI[name]:
            problem = f"{len(supports)} supporting lines, {name} has {BABI[name]}"
            raise ValueError(f"{problem}: this is another of bAbI's tasks")
        if not set(supports) <= set(sentences):
            raise ValueError(f"the supporting lines {rest[1]} are not all in the story")
        return Story(list(sentences.values()), question, answer)

    return read_lines(path, parse)


# --------------------------------------------------------------------------------------------------
# 3. From rows to items


SHOTS = 2  # examples of each class


def few_shot_items(name: str, path: Path, n: int, labels: str, rng: random.Random) -> list[Item]:
    """At most n items of a SuperGLUE or CLUE file, with other rows of that file as examples."""
    dataset = DATASETS[name]
    rows = read_lines(path, lambda line: parse_row(dataset, line))
    by_class = {k: [fields for fields, label in rows if label == k] for k in dataset.words}
    different = {k: len(set(map(tuple, found))) for k, found in by_class.items()}
    need = f"{SHOTS} examples and a query need {SHOTS + 1}"
    console.refuse(
        f"{path} has {count} different rows with the label {k}: {need}"
        for k, count in different.items()
        if count <= SHOTS
    )
    items, shape = [], (dataset.language, dataset.instruction, dataset.words)
    for query in rng.sample(rows, min(n, len(rows))):
        cases = []
        for k, found in by_class.items():
            others = [fields for fields in found if fields != query[0]]
            cases += [(fields, k) for fields in rng.sample(others, SHOTS)]
        rng.shuffle(cases)
        items.append(iqeval.labelled_item(rng, *shape, [*cases, query], labels))
    return items


def story_items(name: str, path: Path, n: int, rng: random.Random) -> list[Item]:
    """At most n items of a bAbI file, each with three other questions as examples."""
    stories, items = read_babi(name, path), []
    if len(stories) < 4:
        raise ValueError(f"{path} has {len(stories)} questions: 3 examples and a query need 4")
    for i in rng.sample(range(len(stories)), min(n, len(stories))):
        others = rng.sample([j for j in range(len(stories)) if j != i], 3)
        items.append(iqeval.story_item([stories[j] for j in [*others, i]]))
    return items


def read_items(
    name: str, path: Path, n: int | None, seed: int, labels: str = "symbols"
) -> list[Item]:
    """At most n items of a file (None: the paper's number), in an order that the seed decides.

    Raises ValueError for a name without dataset or a file with bad lines or too few rows, OSError
    for a file that cannot be read."""
    if name not in TASKS:
        raise ValueError(f"{name} has no dataset: files are read for {', '.join(TASKS)}")
    n, rng = TASKS[name].count if n is None else n, random.Random(f"{name} file {seed}")
    if n < 1:
        raise ValueError(f"{n} items of {name}: ask for at least 1")
    if name in BABI:
        items = story_items(name, path, n, rng)
    else:
        items = few_shot_items(name, path, n, labels, rng)
    return [item._replace(task=TASKS[name]) for item in items]


def read_suite(args: argparse.Namespace, problems: list[str]) -> dict[str, list[Item]]:
    """The items of all TASK=FILE. ValueError: `problems`, and everything wrong with the files."""
    suite = {}
    for name, file in iqeval.parse_pairs(args.files, "TASK=FILE", problems).items():
        given = name, Path(file), args.items, args.seed
        try:
            suite[name] = read_items(*given)
            if name in DATASETS:
                suite[f"{name}-words"] = read_items(*given, "words")
        except (ValueError, OSError) as error:
            problems.append(str(error))
    console.refuse(problems)
    return suite


# --------------------------------------------------------------------------------------------------
# 4. The command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="lab.datasets", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="print items with their answers")
    run = commands.add_parser("run", help="score a checkpoint")
    export = commands.add_parser("export", help="write the items for lm-evaluation-harness")
    iqeval.run_options(run)
    export.add_argument("--out", required=True, metavar="DIR", help="the folder to write to")
    for p in (show, run, export):
        p.add_argument("files", nargs="+", metavar="TASK=FILE", help=f"TASK: {', '.join(TASKS)}")
        p.add_argument("--items", type=int, default=3 if p is show else None, metavar="N")
        p.add_argument("--seed", type=int, default=0, help="of the items (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    """The command line: show, run and export."""
    args = parse_args(argv)
    suite = read_suite(args, iqeval.run_problems(args) if args.command == "run" else [])
    if args.command == "run":
        iqeval.score_checkpoint(args, suite)
    elif args.command == "export":
        harness.export(suite, args.out)
    else:
        for items in suite.values():
            iqeval.show(items)


if __name__ == "__main__":
    console.run(main)
