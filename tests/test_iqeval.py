"""What the generators of iqeval.py promise: right answers, and splits that never meet."""

import doctest
import json
import math
import random
import re
import string

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from iq_oracles import CLAIMS, SOLVERS, STORIES, SYMBOLIC, interpret, pairs

import iqeval
from flm import PRESETS
from iqeval import TASKS

seeds = st.integers(0, 2**32)


def test_the_examples_in_docstrings():
    """Each prints what it says."""
    failed, tried = doctest.testmod(iqeval)
    assert failed == 0 and tried >= 5


def test_every_task_has_a_solver():
    """A new task needs a solver in tests/iq_oracles.py, which reads its printed prompt."""
    missing = sorted(set(TASKS) - set(SOLVERS))
    assert not missing, f"write a solver for {', '.join(missing)} in tests/iq_oracles.py"
    assert set(TASKS) == set(SOLVERS)


@pytest.mark.parametrize("name", [name for name in TASKS if name in SOLVERS])
def test_answers_are_those_of_an_independent_solver(name):
    """Each answer follows from the printed prompt alone; a choice is one of two different
    labels."""
    for split in iqeval.SPLITS:
        for item in TASKS[name].generate(60, 7, split):
            assert SOLVERS[name](item.prompt) == item.answer
            assert not item.labels or item.answer in item.labels and len(set(item.labels)) == 2


DIFFICULTIES = [
    ("counting-en", {"digits": 2, "numbers": 9}),
    ("replace-word", {"words": 3}),
    ("replace-lowercase", {"length": 20}),
    ("head-tail", {"length": 12, "ends": 6}),
    ("full-repeating", {"length": 3}),
    ("head-slicing", {"length": 4}),
    ("key-retrieval", {"keys": 8, "length": 900}),
    ("single-fact", {"sentences": 2}),
    ("two-facts", {"sentences": 12}),
    ("claim-full-repeating", {"length": 20, "easy": 60}),
    ("claim-head-slicing", {"length": 20, "easy": 60}),
    ("claim-replace-lowercase", {"length": 20, "easy": 60}),
    ("claim-single-fact", {"sentences": 9}),
    ("entailment-en", {"chain": 3, "shots": 1}),
    ("comparison-zh", {"people": 7, "shots": 4}),
    ("sense-en", {"shots": 1}),
]


@pytest.mark.parametrize("name, knobs", DIFFICULTIES)
def test_answers_hold_at_other_difficulties(name, knobs):
    """The knobs change how hard an item is, not whether its answer is right."""
    for item in TASKS[name].generate(25, 3, **knobs):
        assert SOLVERS[name](item.prompt) == item.answer


@pytest.mark.parametrize("name", TASKS)
def test_the_smallest_and_the_largest_difficulty_make_items(name):
    """What `settings` allows can be made; 100,000 stands for "as long as you like"."""
    for knob, value in TASKS[name].knobs.items():
        for end in (value.least, value.most):
            if isinstance(value.default, int) and end < 100_000:
                assert len(TASKS[name].generate(2, 0, **{knob: end})) == 2


@settings(max_examples=25)
@given(st.sampled_from(list(TASKS)), seeds, seeds)
def test_no_evaluation_query_is_in_the_training_split(name, one, other):
    """Whatever the seeds: no query, and none of the examples in the training prompts, is in the
    other split's queries."""
    train = TASKS[name].generate(12, one, "train")
    queries = {item.facts["query"] for item in TASKS[name].generate(12, other, "eval")}
    assert not {item.facts["query"] for item in train} & queries
    if TASKS[name].kind == "patterns" or name == "replace-lowercase":
        assert not {x for item in train for x, _ in pairs(item.prompt)[0]} & queries
    if name in STORIES:
        blocks = [block for item in train for block in item.prompt.split("\n\n")[:-1]]
        assert not {block.rsplit(" ", 1)[0] for block in blocks} & queries


@settings(max_examples=20)
@given(st.sampled_from(list(TASKS)), seeds, st.integers(1, 6), st.integers(1, 6))
def test_generation_is_a_pure_function(name, seed, n, more):
    """The same arguments give the same items; more items begin with the fewer; the facts are JSON
    values; queries differ."""
    items = TASKS[name].generate(n + more, seed)
    assert TASKS[name].generate(n, seed) == items[:n]
    assert all(json.loads(json.dumps(item.facts)) == item.facts for item in items)
    assert len({item.facts["query"] for item in items}) == n + more


@settings(max_examples=40)
@given(seeds, st.permutations(iqeval.PEOPLE), st.sampled_from((1, 2)))
def test_renaming_people_does_not_change_the_place(seed, names, supports):
    """A story is about persons, not names."""
    rng, found = random.Random(seed), None
    while found is None:
        found = iqeval.story(rng, 8, supports)
    new = dict(zip(iqeval.PEOPLE, names))
    text = " ".join(found.sentences)
    assert interpret(text, found.question) == found.place
    renamed = [re.sub("|".join(new), lambda m: new[m[0]], part) for part in (text, found.question)]
    assert interpret(*renamed) == found.place


@settings(max_examples=200)
@given(seeds, st.integers(1, 6), st.text(max_size=200))
def test_symbols_never_collide(seed, n, text):
    """Label strings have the paper's form, none begins or holds another, none occurs in the
    text."""
    found = iqeval.symbols(random.Random(seed), n, text)
    assert all(re.fullmatch(r"<[A-Za-z0-9%@?!#$&*]{8}>", s) and s not in text for s in found)
    assert len({s[1] for s in found}) == n
    assert not any(a in b for a in found for b in found if a != b)


def test_symbols_are_redrawn_when_they_occur_in_the_text():
    """A text that holds the first draw gets the second."""
    (first,) = iqeval.symbols(random.Random(0), 1, "")
    (second,) = iqeval.symbols(random.Random(0), 1, f"so {first} is taken")
    assert second != first


@pytest.mark.parametrize("name", SYMBOLIC)
def test_words_and_symbols_label_the_same_items(name):
    """The two variants differ in their labels and in nothing else."""
    symbols, words = TASKS[name].generate(20, 1), TASKS[name].generate(20, 1, labels="words")
    for a, b in zip(symbols, words):
        assert a.facts["class"] == b.facts["class"] and a.facts["query"] == b.facts["query"]
        text = a.prompt
        for k in a.facts["mapping"]:
            text = text.replace(a.facts["mapping"][k], b.facts["mapping"][k])
        assert text == b.prompt and a.facts["mapping"][a.facts["class"]] == a.answer


@pytest.mark.parametrize("name", SYMBOLIC)
def test_classes_are_balanced_and_shown_equally(name):
    """Each class has its two examples in the prompt, in no fixed place nor order of the
    instruction, and is the answer about half of the time."""
    items = TASKS[name].generate(200, 5)
    for item in items:  # once in the instruction, and in two examples
        assert all(item.prompt.count(label) == 3 for label in item.labels)
    assert abs(sum(item.facts["class"] == "yes" for item in items) - 100) < 3.3 * math.sqrt(50)
    for part in (0, 1):  # the instruction, the examples
        texts = [item.prompt.split("\n\n", 1)[part] for item in items]
        first = [text.index(i.labels[0]) < text.index(i.labels[1]) for text, i in zip(texts, items)]
        assert 60 < sum(first) < 140


@pytest.mark.parametrize("name", TASKS)
def test_prompts_have_their_stated_lengths(name):
    """Shots as the table states them; the whole item in bytes, its answer and a line end, fits the
    context of iq-demo."""
    count = {
        "rules": lambda prompt: len(re.findall(r"^Output: |-> ", prompt, re.M)),
        "patterns": lambda prompt: len(re.findall(r"^Output: ", prompt, re.M)),
        "interference": lambda prompt: prompt.count("\n\n"),
        "symbolic": lambda prompt: (prompt.count("\n\n") - 1) // 2,
        "claims": lambda prompt: 0,
    }[TASKS[name].kind]
    for item in TASKS[name].generate(60, 2):
        size = len(f"{item.prompt} {item.answer}\n".encode())
        assert size <= PRESETS["iq-demo"].max_seq_len
        assert not item.prompt.endswith(" ") and "\n" not in item.answer
        assert str(count(item.prompt)) == TASKS[name].shots.split()[0]


@pytest.mark.parametrize("length", [0, 10, 300, 2000])
def test_the_noise_around_the_keys_has_its_length(length):
    """`length` bounds the noise from above, and it stops within a sentence of it; three different
    keys by default."""
    for item in TASKS["key-retrieval"].generate(40, 1, length=length):
        hidden = r"The key of \w+ is \d+\. Remember \d+\. ?"
        body = re.sub(hidden, "", item.prompt.split("\n")[1] + " ").strip()
        assert length - 2 * max(map(len, iqeval.NOISE)) < len(body) <= length
        keys = item.facts["keys"]
        assert len(set(keys.values())) == len(keys) == 3


def test_the_papers_counts_and_scores():
    """The counts of section 5, and averages of the published scores that the paper prints itself
    (tables 9 to 11)."""
    assert TASKS["counting-en"].count == 148 and TASKS["counting-zh"].count == 300 - 148
    groups = {
        ("counting-en", "replace-lowercase", "replace-word"): (86.03, 71.49, 76.42),
        ("head-tail", "full-repeating", "head-slicing"): (70.00, 53.00, 64.67),
        ("key-retrieval", "single-fact", "two-facts"): (70.11, 53.56, 60.11),
    }
    for names, averages in groups.items():
        count = 100 if names[0] == "head-tail" else 300
        assert {TASKS[name].count for name in names if name != "counting-en"} == {count}
        for model, average in enumerate(averages):
            found = sum(TASKS[name].paper[model] for name in names) / len(names)
            assert found == pytest.approx(average, abs=0.011)


def test_a_pool_keeps_to_its_split():
    """Values that draw() repeats count once, values of the other split not at all, and the caller
    is told when there are too few."""
    rng = random.Random(0)
    pool = iqeval.Pool(rng, "letters", "train")
    mine = {c for c in string.ascii_lowercase if iqeval.split_of("letters", c) == "train"}
    found = pool.different(lambda: rng.choice(string.ascii_lowercase), len(mine))
    assert set(found) == mine and len(found) == len(mine) < 26
    with pytest.raises(ValueError, match="letters has too few different train queries"):
        pool.different(lambda: rng.choice(string.ascii_lowercase), len(mine) + 1)
    pairs = pool.different(
        lambda: (rng.choice("abcdef"), rng.random()), 3, key=lambda pair: pair[0]
    )
    assert len({letter for letter, _ in pairs}) == 3


@pytest.mark.parametrize("name", [name for name in CLAIMS if name != "claim-single-fact"])
def test_a_false_claim_about_a_string_looks_like_a_true_one(name):
    """It has a length of a true claim, and only letters of the text; of a rewritten or repeated
    text it has the very letters, of a beginning it stands in the text too. The string that is
    claimed about has no letter twice, so every exchange of two letters makes it another string."""
    for item in TASKS[name].generate(300, 1):
        text, claim = item.facts["text"], item.facts["proposition"].split()[-1]
        if name == "claim-head-slicing":
            assert claim in text and 3 <= len(claim)
            assert len(set(text)) == len(item.facts["query"]) > len(claim)
        else:
            copies = 2 if name == "claim-full-repeating" else 1
            assert sorted(claim) == sorted(text.lower() * copies)
            assert len(set(text.lower())) == len(text)


def test_a_false_claim_about_a_story_names_one_of_its_places():
    """And the person that it names is in the story, too."""
    for item in TASKS["claim-single-fact"].generate(300, 1):
        who, *_, place = item.facts["proposition"].removesuffix(".").split()
        assert f"{who} " in item.facts["text"] and f" {place}." in item.facts["text"]


@pytest.mark.parametrize("name", ["comparison-en", "comparison-zh"])
def test_no_sentence_compares_whom_the_claim_compares(name):
    """And neither of the two stands at an end of the order: both are named twice."""
    for item in TASKS[name].generate(100, 1):
        text, claim = item.prompt.split("\n\n")[-1].split("\n")[:2]
        form = r"(\w+) is above (\w+)" if name == "comparison-en" else r"(\w)比(\w)"
        ((a, b),) = re.findall(form, claim)
        assert text.count(a) == text.count(b) == 2
        assert not any(a in line and b in line for line in re.split("[.。]", text))
