"""lab/lazy.py - what laziness gets: the best of many lazy strategies for each task of iqeval.py.

    python -m lab.lazy                                              print the best of each task
    python -m lab.lazy --out tutorials/measurements/iq-lazy.json    write the scores of all

A lazy strategy answers without doing the task. It looks at one letter, one sentence or one place,
or it counts. It never compares a whole claim with its text letter by letter, and it follows no
chain of facts. A model's score says something only where it lies above the best of these.

Where labels are random strings, a strategy is told what the strings stand for. So it is a little
better than what a model can do that only sees the prompt.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import platform
import re

import console
from iqeval import PLACES, TASKS, Item, Task
from tokenizer import EMOJI

# --------------------------------------------------------------------------------------------------
# 1. Strategies for a task whose answer is written: {strategy: what it answers}


def nth(values: list[str] | str, n: int) -> str:
    """values[n], or an empty string where there are fewer."""
    return values[n] if -len(values) <= n < len(values) else ""


def most_frequent(values: list[str]) -> str:
    """The most frequent value, of several the last."""
    return max(reversed(values), key=values.count, default="")


def rewriting_guesses(item: Item) -> dict[str, str]:
    """Strategies for the tasks that rewrite a text."""
    text = item.prompt.removesuffix("\nOutput:").removesuffix(" ->").split("\n")[-1]
    text = text.removeprefix("Input: ")
    shown = re.findall(r"(?:Output:|->) (.+)$", item.prompt, re.M)
    guesses = {"copy the input": text, "the answer of the last example": nth(shown, -1)}
    for n in range(1, 7):
        guesses[f"the first {n} letters"] = text[:n]
        guesses[f"all but the last {n} letters"] = text[:-n]
    return guesses


def counting_guesses(item: Item) -> dict[str, str]:
    """Count on, but stop anywhere."""
    first = int(re.findall(r"\d+", item.prompt)[-1]) + 1
    guesses = {}
    for n in range(1, 24):
        guesses[f"count {n} numbers on"] = ", ".join(str(first + i) for i in range(n))
    return guesses


def key_guesses(item: Item) -> dict[str, str]:
    """Name a key of the text."""
    keys = re.findall(r"is (\d+)\.", item.prompt)
    middle = keys[len(keys) // 2]
    return {"the first key": keys[0], "the last key": keys[-1], "the middle key": middle}


def places(sentences: list[str]) -> list[str]:
    """The places of a story in their order."""
    return re.findall("|".join(PLACES), " ".join(sentences))


def story_guesses(item: Item) -> dict[str, str]:
    """Name a place of the story."""
    sentences, asked = item.facts["sentences"], item.facts["question"].split()[-1].rstrip("?")
    found = places(sentences)
    named = [i for i, line in enumerate(sentences) if asked in line] or [0]
    person = sentences[named[-1]].split()[0]
    before = places([line for line in sentences[: named[-1]] if line.startswith(person)])
    guesses = {
        "the last place": nth(found, -1),
        "the last place but one": nth(found, -2),
        "the first place": nth(found, 0),
        "the second place": nth(found, 1),
        "the most frequent place": most_frequent(found),
        "the first place from the asked name on": nth(places(sentences[named[0] :]), 0),
    }
    if item.task.name == "two-facts":  # of one fact, these two would be the answer, or its person
        guesses |= {
            "the last place before the asked name": nth(places(sentences[: named[-1]]), -1),
            "the first place of who had the thing last": nth(before, 0),
            "the place where the thing was named last": nth(before, -1),
        }
    return guesses | {f"always the {place}": place for place in PLACES}


# --------------------------------------------------------------------------------------------------
# 2. Strategies for a task with two labels: {strategy: whether it says that the claim holds}


def words(text: str) -> list[str]:
    """The words of a text in lowercase; of a Chinese text its characters."""
    return re.findall(r"[a-z]+|[\u4e00-\u9fff]", text.lower())


def sentence_verdicts(text: str, claim: str) -> dict[str, bool]:
    """Strategies for a claim in words. They know the claim by its first and its last word."""
    sentences = [words(line) for line in re.split("[.。,]", text) if line]
    found, (first, *_, last) = words(text), words(claim)
    where = [[i for i, line in enumerate(sentences) if end in line] for end in (first, last)]
    return {
        "always the same label": True,
        "the claim stands in the text": claim in text,
        "the last word is in the text": last in found,
        "both words are in the text": first in found and last in found,
        "the last word ends the text": last == found[-1],
        "the first word begins the text": first == found[0],
        "the last word is in the first sentence": last in sentences[0],
        "the last word is in the last sentence": last in sentences[-1],
        "the first word is in the last sentence": first in sentences[-1],
        "the last word is there twice": found.count(last) > 1,
        "the first word is there twice": found.count(first) > 1,
        "one sentence has both words": bool(set(where[0]) & set(where[1])),
        "neighbouring sentences have the words": any(
            abs(i - j) == 1 for i in where[0] for j in where[1]
        ),
        "the first word comes first": first in found and found.index(first) < found.index(last),
    }


def string_verdicts(text: str, claim: str) -> dict[str, bool]:
    """Strategies for a claim about a string."""
    text = text.lower()
    half, missing = len(claim) // 2, collections.Counter(claim) - collections.Counter(text * 2)
    verdicts = {
        "always the same label": True,
        "the claim's letters are in the text": set(claim) <= set(text),
        "and at most twice as often": not missing,
        "the claim stands in the text": claim in text and claim != text,
        "the text stands in the claim": text in claim and claim != text,
        "the claim is something twice": claim[:half] == claim[half:],
        "the claim has a letter twice": len(set(claim)) < len(claim),
    }
    for n in range(1, 9):
        verdicts[f"letter {n} is right"] = nth(text, n - 1) == nth(claim, n - 1)
        verdicts[f"letter {n} from the end is right"] = nth(text, -n) == nth(claim, -n)
    for n in (4, 6, 8):
        verdicts[f"the claim is longer than {n}"] = len(claim) > n
    return verdicts


def verdicts_on(item: Item) -> dict[str, bool]:
    """What all strategies for its task, and their opposites, say of an item with two labels."""
    if item.task.kind == "symbolic":
        fields = item.prompt.split("\n\n")[-1].split("\n")[:2]
        text, claim = (re.split(": ?", field, maxsplit=1)[1] for field in fields)
        if item.task.name.startswith("sense"):  # the words before the two uses of the new word
            found = words(claim)
            claim = f"{found[3]} {found[-2]}" if "see" in found else f"{found[1]} {found[-3]}"
        verdicts = sentence_verdicts(text, claim)
    else:
        text, claim = item.prompt.split("\n")
        in_words = item.task.name == "claim-single-fact"
        verdicts = (sentence_verdicts if in_words else string_verdicts)(text, claim.split(": ")[-1])
    return verdicts | {f"not: {name}": not verdict for name, verdict in verdicts.items()}


# --------------------------------------------------------------------------------------------------
# 3. The search

GUESSES = {
    "counting-en": counting_guesses,
    "counting-zh": counting_guesses,
    "key-retrieval": key_guesses,
    "single-fact": story_guesses,
    "two-facts": story_guesses,
}


def scores(task: Task, n: int, seed: int, pairs: bool = False) -> dict[str, float]:
    """The share of n items, in percent, that each strategy gets right.

    pairs: for a task with labels, the share of "it holds where both strategies say so"."""
    right = collections.Counter()
    for item in task.generate(n, seed):
        if task.metric == "likelihood":
            verdicts, holds = verdicts_on(item), item.answer == EMOJI[1]
            if task.kind == "symbolic":
                holds = item.facts["class"] == "yes"
            if pairs:
                both = itertools.combinations(verdicts.items(), 2)
                verdicts = {f"{a} and {b}": x and y for (a, x), (b, y) in both}
            right.update({name: verdict == holds for name, verdict in verdicts.items()})
        else:
            guesses = GUESSES.get(task.name, rewriting_guesses)(item)
            right.update({name: guess == item.answer for name, guess in guesses.items()})
    return {name: round(100 * count / n, 1) for name, count in right.items()}


NOISE = 3  # points by which a strategy must be better than the first, the dullest, to count


def search(task: Task, n: int) -> dict:
    """The best strategy of one list of n items, scored on another, and the scores of all.

    So the luck of the search is not counted. Of a task with labels also the best pair, where it is
    better than the best."""
    report = {"chance": round(100 * task.chance, 1)}
    for pairs in (False, True) if task.metric == "likelihood" else (False,):
        found, scored = (scores(task, n, seed, pairs) for seed in (1, 2))
        first, name = next(iter(found)), max(found, key=found.get)
        name = name if found[name] > found[first] + NOISE else first
        if not pairs:
            report |= {"best": [name, scored[name]], "all": scored}
        elif scored[name] > report["best"][1] + NOISE:
            report["best pair"] = [name, scored[name]]
    return report


def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(prog="lab.lazy", description=__doc__.partition("\n")[0])
    parser.add_argument("--items", type=int, default=3000, metavar="N", help="of each task")
    parser.add_argument("--out", metavar="FILE", help="for the scores of all strategies (JSON)")
    args = parser.parse_args(argv)
    file = args.out and console.output_file(args.out)
    tasks = {}
    for name, task in TASKS.items():
        tasks[name] = found = search(task, args.items)
        print(f"{name:<25}{found['chance']:>6}{found['best'][1]:>7}  {found['best'][0]}")
        if "best pair" in found:
            print(f"{'':<31}{found['best pair'][1]:>7}  {found['best pair'][0]}")
    if file:
        command = f"python -m lab.lazy --items {args.items} --out {args.out}"
        report = {"command": command, "python": platform.python_version(), "tasks": tasks}
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    console.run(main)
