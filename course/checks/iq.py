"""Checks of chapter 6: a task of the IQ evaluation, with its solver."""

from __future__ import annotations

import random
import re

from hypothesis import strategies as st

from course.checking import Wrong, check, expect

# --------------------------------------------------------------------------------------------------
# iq_task: make_item(seed, split) -> (prompt, answer); solve(prompt) -> answer

seeds = st.integers(0, 2**40)
splits = st.sampled_from(["train", "eval"])
LETTERS = "abcd"
LINES = re.compile(r"(?:Input: [a-d]+\nOutput: [a-d]+\n){3}Input: [a-d]+\nOutput:")


def parts(prompt: str) -> tuple[list[tuple[str, str]], str]:
    """The three examples and the query of a prompt."""
    if not isinstance(prompt, str) or not LINES.fullmatch(prompt):
        raise Wrong(f"the prompt does not have the form of the docstring: {prompt!r}")
    words = re.findall(r"(?:Input|Output): ([a-d]+)", prompt)
    return list(zip(words[0:6:2], words[1:6:2])), words[6]


def last_letters(prompt: str) -> str:
    """The answer of an independent solver, which reads the printed prompt."""
    examples, query = parts(prompt)
    (keep,) = {len(answer) for _, answer in examples}
    return query[len(query) - keep :]


def our_prompt(rng: random.Random) -> str:
    """A prompt of the task, by another generator."""
    keep, lengths = rng.randint(2, 4), rng.sample(range(5, 10), 4)
    lines = []
    for length in lengths:
        word = "".join(rng.choices(LETTERS, k=length))
        lines += [f"Input: {word}", f"Output: {word[-keep:]}"]
    lines[-1] = "Output:"
    return "\n".join(lines)


@check("iq_task", seed=seeds, split=splits)
def the_prompt_has_its_form(f, seed, split):
    """A prompt is three examples and a query, of four different words of 5 to 9 letters a to d.
    Each output is the last k letters of its input, k from 2 to 4 and the same in all three."""
    prompt, answer = f.make_item(seed, split)
    examples, query = parts(prompt)
    words = [word for word, _ in examples] + [query]
    expect(len(set(words)) == 4, f"the four inputs are not different: {words}")
    expect(all(5 <= len(word) <= 9 for word in words), f"an input has another length: {words}")
    for word, output in examples:
        expect(word.endswith(output), f"{output} is not the end of {word}")
    keeps = {len(output) for _, output in examples}
    expect(len(keeps) == 1 and keeps <= {2, 3, 4}, f"the outputs have the lengths {sorted(keeps)}")
    exact = last_letters(prompt)
    expect(answer == exact, f"the answer to {query} is {answer!r}, expected {exact!r}")


@check("iq_task", seed=seeds, split=splits)
def only_one_rule_fits(f, seed, split):
    """The number of letters that are cut off differs between the examples: else "cut off so many"
    would fit as well, and the answer would be open."""
    examples, _ = parts(f.make_item(seed, split)[0])
    cut = {len(word) - len(output) for word, output in examples}
    expect(len(cut) > 1, f"every example cuts off {min(cut)} letters: {examples}")


@check("iq_task", seed=seeds, split=splits)
def an_item_is_a_function_of_its_seed(f, seed, split):
    """The same seed and split give the same item, whatever was made before."""
    before = f.make_item(seed, split)
    f.make_item(seed + 1, split)
    expect(f.make_item(seed, split) == before, f"first {before}, then {f.make_item(seed, split)}")


@check("iq_task")
def training_and_evaluation_never_meet(f):
    """No word of a prompt in "train" is a query in "eval", whatever the seeds: here 300 items of
    each are compared."""
    trained = set()
    for seed in range(300):
        examples, query = parts(f.make_item(seed, "train")[0])
        trained |= {query, *(word for word, _ in examples)}
    asked = {parts(f.make_item(seed, "eval")[0])[1] for seed in range(300)}
    text = f"{min(trained & asked, default='')} is trained on and asked for"
    expect(not trained & asked, text)
    expect(len(asked) > 150, f"300 items of eval ask for {len(asked)} different words")


@check("iq_task", split=splits)
def words_of_every_length_are_asked_for(f, split):
    """In both splits there are queries of every length from 5 to 9."""
    lengths = {len(parts(f.make_item(seed, split)[0])[1]) for seed in range(100)}
    expect(lengths == {5, 6, 7, 8, 9}, f"100 queries of {split} have the lengths {lengths}")


@check("iq_task")
def lazy_answers_do_not_score(f):
    """Who always gives the last 2, 3 or 4 letters is right in less than half of 300 items. So is
    who cuts off as many letters as the first example did."""
    right = {2: 0, 3: 0, 4: 0, "cut": 0}
    for seed in range(300):
        prompt, answer = f.make_item(seed, "eval")
        ((word, output), *_), query = parts(prompt)
        for keep in (2, 3, 4):
            right[keep] += query[-keep:] == answer
        right["cut"] += query[len(word) - len(output) :] == answer
    for strategy, count in right.items():
        what = "as many letters off" if strategy == "cut" else f"always {strategy} letters"
        expect(count < 150, f"{what}: right in {count} of 300 items")


@check("iq_task", seed=seeds)
def the_solver_solves_other_prompts(f, seed):
    """solve answers prompts that another generator made, from the printed text alone."""
    prompt = our_prompt(random.Random(seed))
    found, exact = f.solve(prompt), last_letters(prompt)
    expect(found == exact, f"to {prompt!r} it says {found!r}, expected {exact!r}")
