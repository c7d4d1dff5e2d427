"""What the tests of data.py share: small prepared folders, and shards read by hand."""

import json
import random
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings

from prepare import VERSION, prepare
from tokenizer import byte_lengths, get_tokenizer

BYTES = get_tokenizer("bytes")
# Fixtures are read, never changed, by the examples that share them.
unhurried = settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def write_rows(path, rows):
    """A .jsonl file of these objects; returns its path."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(folder, texts, tokenizer=BYTES, **options):
    """A prepared folder from {source: [text of a document]}, by way of .jsonl files."""
    folder = Path(folder)
    sources = {}
    for name, documents in texts.items():
        path = folder / f"{len(list(folder.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        sources[name] = [path]
    if "teacher" in options:
        items = folder / "teacher-items.jsonl"
        items.write_text("".join(json.dumps(item) + "\n" for item in options["teacher"]))
        options["teacher"] = [items]
    out = folder / "out"
    return out, prepare(sources, out, tokenizer, progress=False, **options)


def shard_tokens(folder, entry):
    """The tokens of a shard, read by hand."""
    path = Path(folder) / entry["shard"]
    if not path.exists():
        assert entry["tokens"] == 0
        return np.zeros(0, np.int64)
    raw = path.read_bytes()
    assert raw[:8] == b"FLMtoken"
    version, itemsize = np.frombuffer(raw[8:16], "<u4")
    assert version == VERSION
    tokens = np.frombuffer(raw[16:], {2: "<u2", 4: "<u4"}[itemsize]).astype(np.int64)
    assert len(tokens) == entry["tokens"]
    return tokens


def documents_in(folder, meta, split, tokenizer=BYTES):
    """{source: [text]} of a split, read by hand and cut at the end-of-text tokens."""
    found = {}
    for source in meta["sources"]:
        tokens = shard_tokens(folder, source[split])
        ends = np.flatnonzero(tokens == tokenizer.eot_token)
        found[source["name"]] = [
            tokenizer.decode(part[part != tokenizer.eot_token].tolist())
            for part in np.split(tokens, ends + 1)[:-1]
        ]
    return found


def words(n, seed=0):
    """n different short documents."""
    pick = random.Random(seed)
    return [
        f"{i} " + " ".join(pick.choice(["sun", "moon", "star", "sky"]) for _ in range(20))
        for i in range(n)
    ]


def lengths_of(tokenizer, known={}):
    if tokenizer.name not in known:
        known[tokenizer.name] = byte_lengths(tokenizer)
    return known[tokenizer.name]
