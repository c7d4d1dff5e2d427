"""The tokenizer files that lab/publish.py writes: transformers' AutoTokenizer gives our ids."""

import json
import random

import published  # noqa: F401  # skips this file where transformers is missing
from helpers import build, save_model, tiny
from transformers import AutoTokenizer

from data import get_tokenizer
from lab import publish

ALPHABETS = [
    "ab",
    "a b \n\t",
    "aAsSdDtT' ",
    "123 ",
    "=-_ \n",
    "語です。",
    "é\u0301üß ",
    "\x1c\x85 \n",
]
SPECIAL = ["<|endoftext|>", "<|fim_prefix|>x", "  <|endofprompt|>", "'\u017f", "1\u0664\u0665", ""]


def random_text(rng: random.Random) -> str:
    alphabets = [*ALPHABETS, "".join(map(chr, range(0x20, 0x3000))), "😡😈🇩🇪"]
    return "".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randrange(60)))


def check(folder, tokenizer):
    """The ids of random texts, of texts of one letter, and of the names of special tokens."""
    theirs, rng = AutoTokenizer.from_pretrained(folder), random.Random(0)
    assert theirs.eos_token_id == tokenizer.eot_token
    texts = [random_text(rng) for _ in range(1500)] + SPECIAL
    texts += [letter * length for letter in "a =\n.0é語" for length in range(1, 40)]
    for text in texts:
        found = theirs(text, add_special_tokens=False)["input_ids"]
        assert found == tokenizer.encode_ordinary(text), repr(text)


def test_bytes(tmp_path):
    """In a folder that `save` wrote, whole: `load` finds the tokenizer's name in it."""
    path = save_model(tmp_path / "ours", build(tiny(vocab_size=288, d_model=18)))
    publish.save(path, tmp_path / "theirs", "flm")
    check(tmp_path / "theirs", get_tokenizer("bytes"))
    assert publish.load(tmp_path / "theirs", tmp_path / "again")["tokenizer"] == "bytes"
    said = json.loads((tmp_path / "theirs" / "generation_config.json").read_text())
    assert said["eos_token_id"] == 256


def test_cl100k_base(tmp_path, cl100k):
    """With its own end-of-text id, 100257; the published config's 100256 names no token."""
    values = publish.tokenizer_json(cl100k)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    more = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    more |= {"split_special_tokens": True, "clean_up_tokenization_spaces": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(more))
    check(tmp_path, cl100k)
    assert max(values["model"]["vocab"].values()) == 100_276
