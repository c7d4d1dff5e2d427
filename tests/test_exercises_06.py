"""The exercises of tutorials/06-iq.md: a docstring states the answer, the code checks it."""

import itertools
import math
import random
import re
import string

import pytest
import torch
from iq_oracles import Answers, accuracy

import iqeval
from iqeval import TASKS


def test_06_exercise_1_any_key():
    """One of three keys: 1/3. With `keys=8` it is 1/8. With one to three keys, equally likely, it
    would be (1 + 1/2 + 1/3) / 3 = 11/18 = 61%: "at most 3 keys" does not say how often there are
    fewer."""
    for keys in (3, 8):
        items = TASKS["key-retrieval"].generate(1500, 1, keys=keys, length=0)
        rng = random.Random(0)
        any_key = lambda item: rng.choice(re.findall(r"is (\d+)\.", item.prompt))  # noqa: E731
        assert accuracy(items, any_key) == pytest.approx(1 / keys, abs=0.04)
    assert round(11 / 18, 2) == 0.61


def test_06_exercise_2_three_items():
    """55.29 against 53.85 of 208 items: 115 against 112, three items. To tell two such accuracies
    apart it takes 2 * 1.96^2 p (1 - p) / d^2 = about 9,160 items each."""
    a, b = round(0.5529 * 208), round(0.5385 * 208)
    assert (a, b) == (115, 112)
    assert (round(100 * a / 208, 2), round(100 * b / 208, 2)) == (55.29, 53.85)
    p, d = (a + b) / 416, (a - b) / 208
    assert round(2 * 1.96**2 * p * (1 - p) / d**2, -1) == 9_160


def test_06_exercise_3_the_last_place(monkeypatch):
    """It is right in about 36% of the default items, for 40% of the stories whose answer it is are
    thrown away. With none thrown away, in stories of 80 sentences, the asked person is the last
    mover one time in four, and else there by accident one time in six: 1/4 + 3/4 * 1/6 = 37.5%; in
    the short stories of the default it is 46%, for not all four people are in them."""
    last = lambda item: re.search(r"(\w+)\.$", item.facts["sentences"][-1])[1]  # noqa: E731
    task = TASKS["single-fact"]
    assert accuracy(task.generate(800, 2), last) == pytest.approx(0.36, abs=0.055)
    monkeypatch.setitem(iqeval.KEEP, 1, 1.0)
    assert accuracy(task.generate(800, 2), last) == pytest.approx(0.46, abs=0.055)
    long = task.generate(800, 2, sentences=80)
    assert accuracy(long, last) == pytest.approx(0.375, abs=0.055)


def test_06_exercise_4_the_shorter_label():
    """To a model that finds all bytes equally likely, "entailment" (10 letters) is likelier than
    "not entailment" (14), whatever the text: it says so always, and is right half of the time
    because the classes are balanced. Symbols are of one length: no label wins."""

    class Uniform(Answers):
        def likelihoods(self, prompts, options):
            return torch.tensor([[-len(o) * math.log(256) for o in row] for row in options])

    items = TASKS["entailment-en"].generate(100, 0, labels="words")
    assert set(iqeval.answer_all(Uniform({}, None), items)[0]) == {"entailment"}
    symbols = TASKS["entailment-en"].generate(100, 0)
    assert all(len({len(label) for label in item.labels}) == 1 for item in symbols)


def test_06_exercise_5_too_few():
    """There are 26^2 strings of two letters, and the hash gives the evaluation split about a fifth
    of them: 130 or so, not 200."""
    strings = ["".join(pair) for pair in itertools.product(string.ascii_lowercase, repeat=2)]
    mine = [text for text in strings if iqeval.split_of("full-repeating", text) == "eval"]
    assert 100 < len(mine) < 170
    assert len(TASKS["full-repeating"].generate(90, 0, length=2)) == 90
    with pytest.raises(ValueError, match="different eval queries, not 200"):
        TASKS["full-repeating"].generate(200, 0, length=2)


LAZY_JUDGES = [
    ("claim-full-repeating", 0.695),
    ("claim-head-slicing", 0.64),
    ("claim-replace-lowercase", 0.62),
    ("claim-single-fact", 0.50),
]


@pytest.mark.parametrize("name, expected", LAZY_JUDGES)
def test_06_exercise_6_the_first_letter(name, expected):
    """Of a false claim about a lowercased string of n letters, 7 to 10, two letters are exchanged.
    The first is one of them with probability 2/n, on average 0.24: right in 0.5 + 0.5 * 0.24 = 62%.
    Of a false beginning of k letters, one is wrong: 1/k is 0.28 on average, so 64%. Of the false
    claims about a doubled string, a fifth is turned, so that the first letter is another one; three
    fifths begin with an exchange, and 2/n is 0.32 there: 0.5 + 0.5 * (0.2 + 0.6 * 0.32) = 69.5%. A
    false place is always in the story, too: 50%."""
    right, items = 0, TASKS[name].generate(1000, 0)
    for item in items:
        text, claim = item.facts["text"], item.facts["proposition"].removesuffix(".").split()[-1]
        lazy = claim in text if name == "claim-single-fact" else claim[0] == text[0].lower()
        right += lazy == bool(item.facts["label"])
    assert right / 1000 == pytest.approx(expected, abs=0.035)
