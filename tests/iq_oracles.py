"""Independent solvers of the IQ evaluation's items, and a model that answers by a function.

The solvers read the printed prompt, as a person would, and share no code with the generators.
"""

import re
import string

import torch

from iqeval import TASKS
from tokenizer import EMOJI

SYMBOLIC = [name for name, task in TASKS.items() if task.kind == "symbolic"]
CLAIMS = [name for name, task in TASKS.items() if task.kind == "claims"]
STORIES = ("single-fact", "two-facts")


def pairs(prompt):
    """The lines after "Input:" and "Output:" -> (examples [(x, y)], the last x)."""
    xs = re.findall(r"^Input: (.*)$", prompt, re.M)
    ys = re.findall(r"^Output: (.*)$", prompt, re.M)
    assert len(xs) == len(ys) + 1 and prompt.endswith("Output:")
    return list(zip(xs, ys)), xs[-1]


def solve_counting(prompt):
    first, last, shown = re.search(r"(\d+)\D+(\d+): ([\d, ]+),$", prompt).groups()
    n, said = int(shown.split(",")[-1]), []
    while n < int(last):
        n += 1
        said.append(str(n))
    assert shown.startswith(first)
    return ", ".join(said)


def solve_word(prompt):
    block = r"word to replace: \*\*(\w+)\*\* target word: \*\*(\w+)\*\*\n([A-Z ]+?) ->"
    old, new, sentence = re.findall(block, prompt)[-1]
    return re.sub(rf"\b{old}\b", new, sentence)


def solve_lowercase(prompt):
    lower = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
    return pairs(prompt)[1].translate(lower)


def solve_head_tail(prompt):
    shown, x = pairs(prompt)
    (a, y), *_ = shown
    for i in range(len(y)):
        head, tail = y[:i], y[i + len(a) :]
        if all(y == head + a + tail for a, y in shown):
            return head + x + tail
    raise AssertionError(prompt)


def solve_slicing(prompt):
    shown, x = pairs(prompt)
    (keep,) = {len(y) for _, y in shown}
    assert all(a.startswith(y) for a, y in shown)
    cut = {len(a) - len(y) for a, y in shown}
    assert len(cut) > 1, "it is not the number of letters cut off that is always the same"
    return x[:keep]


def solve_repeating(prompt):
    shown, x = pairs(prompt)
    assert all(y == a * 2 for a, y in shown)
    return x * 2


def solve_keys(prompt):
    name = re.search(r"The key of (\w+) is$", prompt)[1]
    hidden = re.findall(r"The key of (\w+) is (\d+)\. Remember \2\.", prompt)
    (value,) = {value for holder, value in hidden if holder == name}
    return value


STATEMENT = re.compile(
    r"(\w+) (went to|moved to|ran to|took|got|grabbed|dropped|left|put down) the (\w+)\."
)


def interpret(text, question):
    """A little interpreter of bAbI 1 and 2: who is where, who has what, where things were put."""
    where, owner, spot = {}, {}, {}
    for sentence in re.findall(r"[^.]+\.", text.replace(". ", ".")):
        person, verb, thing = STATEMENT.fullmatch(sentence).groups()
        if verb.endswith("to"):
            where[person] = thing
        elif verb in ("took", "got", "grabbed"):
            assert person in where and thing not in owner, "nobody takes what another holds"
            assert spot.get(thing, where[person]) == where[person], "nobody takes what is elsewhere"
            owner[thing] = person
        else:
            assert owner.pop(thing) == person, "nobody drops what another holds"
            spot[thing] = where[person]
    asked = re.fullmatch(r"Where is (?:the )?(\w+)\?", question)[1]
    return where.get(asked) or where.get(owner.get(asked)) or spot[asked]


def solve_story(prompt):
    return interpret(*prompt.split("\n\n")[-1].split("\n"))


def solve_entailment(text, claim):
    rules = dict(
        re.findall(r"Every (\w+) is a (\w+)\.", text) or re.findall(r"(\w\w)都是(\w\w)。", text)
    )
    start, goal = (re.search(r"(?:is a |小.是)(\w+)[.。]$", part)[1] for part in (text, claim))
    while start != goal and start in rules:
        start = rules[start]
    return start == goal


def solve_comparison(text, claim):
    form = r"(\w+) is above (\w+)\." if "above" in text else r"(.)比(.)高。"
    above = set(re.findall(form, text))
    for _ in range(10):
        above |= {(a, d) for a, b in above for c, d in above if b == c}
    ((a, b),) = re.findall(form, claim)
    assert ((a, b) in above) != ((b, a) in above)
    return (a, b) in above


def solve_sense(rule, text):
    english, chinese = r"(\w+) \w+: (\w+)", r"(\w)\w\w:(动物|工具)"
    senses = dict(re.findall(english, rule) or re.findall(chinese, rule))
    first, second = re.findall(r" a (\w+) \w+\.", text) or re.findall(r"[先后](\w)\w\w", text)
    assert len(senses) == 4 and first != second
    return senses[first] == senses[second]


def solve_symbolic(prompt):
    """Solve the examples too: what their labels stand for is all there is to know of a symbol."""
    blocks = [
        [re.split(r": ?|:", line, maxsplit=1)[1] for line in block.split("\n")]
        for block in prompt.split("\n\n")[1:]
    ]
    solver = solve_sense
    if "Every" in prompt or "都是" in prompt:
        solver = solve_entailment
    elif "above" in prompt or "高" in prompt:
        solver = solve_comparison
    meaning = {}
    for *fields, label in blocks[:-1]:
        assert meaning.setdefault(solver(*fields), label) == label
    return meaning[solver(*blocks[-1][:-1])]


def holds(text, claim):
    """Whether a proposition is true, by the solvers above."""
    kind, _, rest = claim.partition(": ")
    if kind == "Repeated":
        return rest == text * 2
    if kind == "Begins":
        return text.startswith(rest)
    if kind == "In lowercase":
        return rest == text.lower()
    who, place = re.fullmatch(r"(\w+) is in the (\w+)\.", claim).groups()
    return interpret(text, f"Where is {who}?") == place


def solve_claim(prompt):
    return EMOJI[holds(*prompt.split("\n"))]


SOLVERS = {
    "counting-en": solve_counting,
    "counting-zh": solve_counting,
    "replace-word": solve_word,
    "replace-lowercase": solve_lowercase,
    "head-tail": solve_head_tail,
    "full-repeating": solve_repeating,
    "head-slicing": solve_slicing,
    "key-retrieval": solve_keys,
    **dict.fromkeys(STORIES, solve_story),
    **dict.fromkeys(SYMBOLIC, solve_symbolic),
    **dict.fromkeys(CLAIMS, solve_claim),
}


class Answers:
    """A model that answers with a function of the item: an oracle, a guesser."""

    context = 100_000

    def __init__(self, suite, answer):
        self.by_prompt = {item.prompt: item for items in suite.values() for item in items}
        self.answer = answer

    def encode(self, text):
        return list(text.encode())

    def complete(self, prompts, new):
        return [" " + self.answer(self.by_prompt[bytes(prompt).decode()]) for prompt in prompts]

    def likelihoods(self, prompts, options):
        scores = []
        for prompt, row in zip(prompts, options):
            answer = self.answer(self.by_prompt[bytes(prompt).decode()])
            scores.append([float(bytes(option).decode().strip() == answer) for option in row])
        return torch.tensor(scores)


def accuracy(items, answer):
    """The share of items that `answer(item)` gets right."""
    return sum(answer(item) == item.answer for item in items) / len(items)
