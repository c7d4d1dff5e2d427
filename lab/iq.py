"""lab/iq.py - the tasks of iqeval.py as a corpus to learn them from, and as a game.

    python -m lab.iq make --out corpora/iq    write and prepare a corpus
    python -m lab.iq play head-tail           answer the items of a task yourself

1. A corpus    the training split as FreeLM's two signals
2. A game
3. The command line
"""

import argparse
import json
import random
import shlex
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

import console
from iqeval import LABELS, TASKS, Item, bars, interval, item_options, make_suite, said
from prepare import prepare
from tokenizer import EMOJI, get_tokenizer

# --------------------------------------------------------------------------------------------------
# 1. A corpus
#
# Prompts with their answers are the language signal, propositions the teacher signal (section 2.2).
# Only a proposition's emoji is supervised, so propositions are short: more of them fit in a row.

# Weights in documents. Tasks of copying have most: everything else needs copying.
MIX = {
    "head-tail": 12,
    "full-repeating": 11,
    "head-slicing": 10,
    "replace-lowercase": 10,
    "single-fact": 3,
    "two-facts": 0.5,
    "counting-en": 2,
    "counting-zh": 2,
    "replace-word": 1.5,
    "key-retrieval": 1.5,
    **{name: 0.2 for name, task in TASKS.items() if task.kind == "symbolic"},
}
CLAIMS = {
    "claim-full-repeating": 2,
    "claim-head-slicing": 2,
    "claim-replace-lowercase": 2,
    "claim-single-fact": 1,
}


def corpus(documents: int, seed: int) -> tuple[list[dict], list[dict]]:
    """(rows {"text"} of the language signal, rows {"text", "proposition", "label"} of the teacher
    signal), about `documents` of each, from the training split."""
    language, teacher = [], []
    for name, weight in tqdm(MIX.items(), unit="tasks", dynamic_ncols=True, disable=None):
        # A symbolic task comes in two halves: with symbols and, from another seed, with words.
        variants = [{"labels": kind} for kind in LABELS] if TASKS[name].kind == "symbolic" else [{}]
        n = max(2, round(documents * weight / len(variants) / sum(MIX.values())))
        for shift, options in enumerate(variants):
            found = TASKS[name].generate(n, 2 * seed + shift, "train", **options)
            language += [{"text": f"{item.prompt} {item.answer}\n"} for item in found]
    for name, weight in CLAIMS.items():
        n = max(2, round(documents * weight / sum(CLAIMS.values())))
        # Half of the false claims are easy. Without them the model did not learn the others.
        easy = {"easy": 50} if "easy" in TASKS[name].knobs else {}
        for item in TASKS[name].generate(n, 2 * seed, "train", **easy):
            teacher.append({key: item.facts[key] for key in ("text", "proposition", "label")})
    for rows in (language, teacher):
        random.Random(f"corpus {seed}").shuffle(rows)
    return language, teacher


def write_signals(documents: int, seed: int, language: Path, teacher: Path):
    """Write what `corpus` makes as two .jsonl files, each whole or not at all."""
    for file, rows in zip((language, teacher), corpus(documents, seed)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        console.replace_file(file, "".join(lines))


def make_corpus(out: str | Path, documents: int, seed: int) -> dict:
    """Write the corpus as text.jsonl and teacher.jsonl, and prepare it, in the new folder `out`.

    Returns the meta of prepare.prepare. ValueError before any work if `out` is not free."""
    out, problems = Path(out).absolute(), []
    if documents < 100:
        problems.append(f"--documents {documents}: too few to train on, make at least 100")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        problems.append(f"--out {out}: exists and is not an empty folder; choose another name")
    console.refuse(problems)
    console.make_folder(out.parent)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.part-", dir=out.parent) as folder:
        made = Path(folder) / "corpus"
        text, teacher = (Path(folder) / name for name in ("text.jsonl", "teacher.jsonl"))
        write_signals(documents, seed, text, teacher)
        tokenizer = get_tokenizer("bytes")
        meta = prepare({"text": [text]}, made, tokenizer, teacher=[teacher], progress=False)
        for path in (text, teacher):
            path.rename(made / path.name)
        if out.exists():
            out.rmdir()  # it is empty
        made.rename(out)
    return meta


# --------------------------------------------------------------------------------------------------
# 2. A game


def play(items: list[Item]):
    """Ask the user for each answer, until an empty line."""
    right = asked = 0
    task = items[0].task
    meaning = {EMOJI[1]: " it holds", EMOJI[0]: " it does not"}
    print(f"{len(items)} items of {task.name}. Write what comes next, then Enter. ", end="")
    print("An empty line or Ctrl-D ends it.\n")
    for item in items:
        choices = {str(number): label for number, label in enumerate(item.labels, 1)}
        print(item.prompt, end="\n" if choices else " ", flush=True)
        for number, label in choices.items():
            print(f"{number}: {label}{meaning.get(label, '')}  ", end="", flush=True)
        text = sys.stdin.readline().strip()
        if not text:
            break
        answer = choices.get(text, text) if choices else said(task.metric, text)
        asked, right = asked + 1, right + (answer == item.answer)
        print("right\n" if answer == item.answer else f"no, it is: {item.answer}\n")
    if asked:
        low, high = (100 * end for end in interval(right, asked))
        print(
            f"\n{right} of {asked} right: {100 * right / asked:.0f}%, with 95% confidence between "
            f"{low:.0f} and {high:.0f}; {bars(task)}"
        )


# --------------------------------------------------------------------------------------------------
# 3. The command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="lab.iq", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    p = commands.add_parser("play", help="answer the items of a task yourself")
    p.add_argument("task", help="a task's name")
    item_options(p, 10)
    p = commands.add_parser("make", help="write and prepare a corpus to learn the tasks from")
    p.add_argument("--out", required=True, metavar="DIR", help="a folder that does not exist yet")
    p.add_argument("--seed", type=int, default=0, help="of the items (default %(default)s)")
    p.add_argument(
        "--documents",
        type=int,
        default=60_000,
        metavar="N",
        help="texts, and as many propositions (default %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    """The command line: make and play."""
    args = parse_args(argv)
    if args.command == "play":
        args.tasks = [args.task]
        play(next(iter(make_suite(args).values())))  # a symbolic task's items with symbols
        return
    meta = make_corpus(args.out, args.documents, args.seed)
    tokens = meta["sources"][0]["train"]["tokens"]
    labels = meta["teacher"]["train"]["documents"]
    print(
        f"{args.out}: {tokens:,} tokens of text and {labels:,} propositions to train on. Next:\n"
        f"    python train.py --preset iq-demo --data {shlex.quote(args.out)} "
        "--teacher-fraction 0.25 --eval-rows 64"
    )


if __name__ == "__main__":
    console.run(main)
