import hashlib
import random
import re


def side(word):
    return ("train", "eval")[hashlib.md5(word.encode()).digest()[0] % 2]


def make_item(seed, split):
    rng = random.Random(f"{split}/{seed}")
    keep, words = rng.choice((2, 3, 4)), []
    while len(words) < 4:
        word = "".join(rng.choice("abcd") for _ in range(rng.randint(5, 9)))
        if side(word) == split and word not in words:
            words.append(word)
        if len(words) == 3 and len({len(word) for word in words}) == 1:
            words = []
    lines = [f"Input: {word}\nOutput: {word[-keep:]}\n" for word in words[:3]]
    return "".join(lines) + f"Input: {words[3]}\nOutput:", words[3][-keep:]


def solve(prompt):
    outputs = re.findall(r"Output: (\w+)", prompt)
    query = re.findall(r"Input: (\w+)", prompt)[-1]
    return query[-len(outputs[0]) :]
