"""data.py - a folder of tokens in, batches out; the commands that make and show such folders.

1. the *sampler* says which row is sample number s. It is a pure function: to resume a run, one
   integer is enough;
2. *rows* of T + 1 tokens, for FreeLM's two signals;
3. `Corpus` opens a prepared folder and makes *batches*: tokens (B, T), and targets (B, T);
4. the command line: `python data.py prepare` and `show`.

How text becomes such a folder is in three files above this one: tokenizer.py, textfiles.py,
prepare.py.

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
import hashlib
import json
import math
import re
import shlex
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, product
from pathlib import Path

import numpy as np
import torch
from tiktoken import Encoding

import console
from console import refuse
from prepare import (
    SPLITS,
    describe_skipped,
    open_shard,
    prepare,
    read_meta,
)
from textfiles import (
    BLOCK,
    TAKEN,
    describe_left_out,
    stdlib_files,
    unpacked,
)
from tokenizer import get_tokenizer, label_tokens, token_type

IGNORE = -100  # the target of a position that is not supervised

# --------------------------------------------------------------------------------------------------
# 1. The sampler: sample number -> row, without state

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


def counts_of(samples: int, shares: list[int]) -> list[int]:
    """How many of the first samples belong to each part; shares: as for `pick`.

    >>> counts_of(8, chain_of_shares([2, 1, 1]))
    [4, 2, 2]
    """
    counts = []
    for share in shares:
        counts.append(samples * share // ONE)
        samples -= counts[-1]
    return counts


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
# 2. Rows

Row = tuple[np.ndarray, np.ndarray]  # tokens (T,), targets (T,), both int64


class LanguageRows:
    """The rows of a source: row i is tokens i * T .. i * T + T of `stream` (n,).

    So neighbours share one token. A row may hold parts of several documents: Corpus.documents."""

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
        places = range(0, len(stream), BLOCK)  # some at a time: a shard may be large
        found = [np.flatnonzero(stream[i : i + BLOCK] == self.end_of_text) + i for i in places]
        ends = np.concatenate([[], *found]).astype(np.int64) + 1
        lengths = np.diff(ends, prepend=0)
        fits = lengths <= seq_len + 1
        self.left_out = int(len(ends) - fits.sum())
        starts, ends, total = (ends - lengths)[fits], ends[fits], lengths[fits].cumsum()
        first, n_before = [0], 0  # the first item of each row; tokens before the row
        while first[-1] < len(ends):
            first.append(int(np.searchsorted(total, n_before + seq_len + 1, "right")))
            n_before = total[first[-1] - 1]
        self.starts, self.ends = starts[first[:-1]], ends[np.array(first[1:], int) - 1]  # of rows

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Row:
        items = self.stream[self.starts[index] : self.ends[index]]
        if len(items) > self.seq_len + 1:  # one that is left out lies between them
            items = np.split(items, np.flatnonzero(items == self.end_of_text) + 1)
            items = np.concatenate([item for item in items if len(item) <= self.seq_len + 1])
        row = np.full(self.seq_len + 1, self.end_of_text, np.int64)
        row[: len(items)] = items
        ends = np.flatnonzero(items == self.end_of_text)
        labels = ends[:, None] - np.arange(1, self.n_label + 1)  # (items, n_label) places
        targets = np.full_like(row, IGNORE)
        targets[labels] = row[labels]
        return row[:-1], targets[1:]


# --------------------------------------------------------------------------------------------------
# 3. Batches


class Corpus:
    """A prepared folder, read as rows of T + 1 tokens: T of input, and the T that follow each.

    path            the folder that `prepare` made
    seq_len         T, at least 1
    tokenizer_file  where cl100k_base is read from, if not from tiktoken's cache or download
    document_mask   whether attention is cut where a document ends: see `documents`

    Attributes: path, seq_len, tokenizer, meta (the contents of meta.json); digest, a text that is
    the same for the same documents, tokenizer, names and weights, and for no others; names, of the
    sources; parts, {(split, signal): [the rows of each source]}; teacher_left_out, {split: items
    that are longer than a row}. ValueError if the folder is absent, damaged or of another version,
    or too short for T. Opening takes no memory for plain text, however much there is."""

    def __init__(
        self,
        path: str | Path,
        seq_len: int,
        tokenizer_file: str | Path | None = None,
        document_mask: bool = False,
    ):
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}, but must be at least 1")
        self.path, self.seq_len, self.meta = Path(path), seq_len, read_meta(Path(path))
        self.tokenizer = get_tokenizer(self.meta["tokenizer"]["name"], tokenizer_file)
        self.document_mask, self._thread, self._next = document_mask, None, (None, None)
        text = {name: self.meta[name] for name in ("tokenizer", "sources", "teacher")}
        self.digest = hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()
        sources, teacher = self.meta["sources"], self.meta["teacher"]
        self.names = [source["name"] for source in sources]
        self._trained = [k for k, source in enumerate(sources) if source["weight"]]
        self._shares = chain_of_shares([sources[k]["weight"] for k in self._trained])
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
        dtype = token_type(self.tokenizer.n_vocab)
        return open_shard(self.path / entry["shard"], entry["tokens"], dtype)

    def _check_lengths(self):
        sources, T = self.meta["sources"], self.seq_len
        trained = [sources[k] for k in self._trained]
        lengths = {f"source {one['name']!r}": one["train"]["tokens"] for one in trained}
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

    def rows_by_source(self, split: str, signal: str) -> dict[str, int]:
        """{source: the number of its rows}, in the order of `rows`."""
        names = self.names if signal == "language" else ["teacher"]
        return dict(zip(names, map(len, self.parts[split, signal]), strict=True))

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
        source = self._trained[part - 1]
        name, rows = self.names[source], self.parts["train", "language"][source]
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

    def batch_ahead(
        self, seed: int, seen: int, batch_size: int, **options
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`batch` of the same arguments. A thread makes the batch that follows it meanwhile; the
        next call gets that one, if it asks for it."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1)
        wanted, (known, future) = (seed, seen, batch_size, options), self._next
        made = future.result() if known == wanted else self.batch(*wanted[:3], **options)
        following = seed, seen + batch_size, batch_size
        self._next = (*following, options), self._thread.submit(self.batch, *following, **options)
        return made

    def documents(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """The number of the document that each token (B, T) belongs to, counted in its row;
        None without `document_mask`.

        An end-of-text token is the beginning of what follows it, as in a text that sample.py
        begins. FLM-101B's paper does not say whether its attention was cut; here it is an option.
        """
        return (tokens == self.tokenizer.eot_token).cumsum(1) if self.document_mask else None

    def epochs(self, samples: int, teacher_fraction: float = 0.0) -> dict[str, float]:
        """{source, or "the teacher signal": how often the first samples of a run read it}."""
        counts = counts_of(samples, [round(ONE * teacher_fraction), *self._shares])
        teacher = self.parts["train", "teacher"][0]
        rows = {self.names[k]: self.parts["train", "language"][k] for k in self._trained}
        parts = {"the teacher signal": teacher} | rows
        return {name: n / max(1, len(parts[name])) for name, n in zip(parts, counts, strict=True)}


def stack(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """n rows -> tokens, targets: two int64 tensors (n, T)"""
    tokens, targets = zip(*rows)
    return torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(targets))


# --------------------------------------------------------------------------------------------------
# 4. The command line


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
        if split == "train" and source.get("weight") == 0:
            continue  # a validation set
        share = f"{source['weight']:.1%}" if split == "train" and "weight" in source else ""
        documents, tokens, n_bytes = (
            source[split][key] for key in ("documents", "tokens", "bytes")
        )
        lines.append(
            f"{source['name']:<16}{split:<6}{share:>7}{documents:>13,}{tokens:>17,}{n_bytes:>17,}"
            f"{n_bytes / max(tokens, 1):>13.3f}"
        )
    lines.append("tokenizer: {name}, {n_vocab:,} ids".format(**meta["tokenizer"]))
    return "\n".join([*lines, *describe_skipped(meta["skipped"]).splitlines()])


def show(args: argparse.Namespace):
    """`python data.py show`: the summary, then the first training rows of a seed."""
    corpus = Corpus(args.folder, args.seq_len, args.tokenizer_file)
    before, after = console.markers()
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
    return name or unpacked(Path(path).absolute()).stem, path


def parse_weight(given: str) -> tuple[str, float]:
    """NAME=NUMBER -> (name, number)"""
    name, _, weight = given.rpartition("=")
    try:
        return name, float(weight)
    except ValueError:
        example = "for example --weight zh=0.465"
        raise ValueError(f"--weight {given}: must be NAME=NUMBER, {example}") from None


def parse_inputs(given: list[str], field: str) -> dict[str, list[str | Path]]:
    """The words of a command line -> {source: [path]}; says what of a folder is not read.
    field: the name of the text in an object."""
    sources = {}
    for name, path in map(parse_input, given):
        sources.setdefault(name, []).extend(stdlib_files() if path == "stdlib" else [path])
        if Path(path).is_dir() and (left_out := describe_left_out(Path(path), field)):
            print(left_out)
    return sources


def run_prepare(args: argparse.Namespace):
    """`python data.py prepare`."""
    sources, val = (parse_inputs(given, args.field) for given in (args.inputs, args.val))
    name = args.tokenizer
    if name is None:
        name = read_meta(Path(args.out))["tokenizer"]["name"] if args.append else "bytes"
    tokenizer = get_tokenizer(name, args.tokenizer_file)
    options = {name: getattr(args, name) for name in ("teacher", "val_fraction", "field")}
    options |= {"append": args.append, "workers": args.workers}
    weights = dict(map(parse_weight, args.weight))
    tell(args.out, prepare(sources, args.out, tokenizer, val=val, weights=weights, **options))


def tell(out: str, meta: dict):
    """What is in a folder that is ready, and what to type next."""
    print(summary(meta))
    print(f"\n{out} is ready. Next, look at some rows:")
    print(f"    python data.py show {shlex.quote(out)}")


PREPARE_HELP = f"""\
An INPUT is one of these:
    a text file (UTF-8), which is cut at line ends into documents of 16 KiB or a little more
    a .jsonl, .ndjson or .json file, whose lines are objects with the field "text" (or --field)
    either of them as .gz, or as .zst (needs pip install zstandard)
    a .parquet file with a column "text" (or --field; needs pip install pyarrow)
    a folder: its files {TAKEN}.
    Hidden files are not taken, links are followed
    the word stdlib: the source of Python's standard library on this machine
NAME=INPUT names a source; without NAME it is called like the file, less its suffixes. Inputs of one
name are one source. What cannot be read is left out, counted, and told at the end: text that is not
UTF-8, broken JSON, a line of 16 MiB or more, the rest of a packed file that is damaged.

If the command is stopped or killed, or the disk is full, the same command goes on where it was.
Several jobs can each prepare a part, with the same --val-fraction; python -m lab.merge makes one
folder of them.

examples:
    python data.py prepare stdlib --out stdlib-tokens
    python data.py prepare notes.txt --teacher propositions.jsonl --out notes-tokens
    python data.py prepare en=wikipedia zh=books.jsonl.gz --weight zh=0.465 \\
        --tokenizer cl100k_base --out mixed-tokens
    python data.py prepare en=news-2026 --append --out mixed-tokens
    python data.py prepare text --val exam=exam.jsonl --val-fraction 0 --out text-tokens"""

TOKENIZER_FILE_HELP = "a copy of cl100k_base.tiktoken, where there is no network"
WEIGHT_HELP = (
    "a source's share of the language rows; sources without one divide the rest by their size"
)
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
    help = "tokenize text into a folder, to train on"
    add = add_command(commands, "prepare", run_prepare, help, PREPARE_HELP)
    add("inputs", nargs="*", metavar="INPUT", help="a file, a folder, or stdlib (see below)")
    add("--out", required=True, metavar="DIR", help="the folder to make; must not be there")
    add("--append", action="store_true", help="add to the folder, which is there")
    about = (
        "bytes (default; one token per byte, no download) or cl100k_base (GPT-4's and FLM-101B's)"
    )
    add("--tokenizer", metavar="NAME", help=about)
    add("--tokenizer-file", metavar="PATH", help=TOKENIZER_FILE_HELP)
    about = "the name of the text in .jsonl and parquet files (default: %(default)s)"
    add("--field", default="text", metavar="NAME", help=about)
    add("--weight", action="append", default=[], metavar="NAME=W", help=WEIGHT_HELP)
    about = 'FreeLM\'s teacher signal: lines {"text": "", "proposition": "", "label": 0 or 1}'
    add("--teacher", action="append", default=[], metavar="FILE.jsonl", help=about)
    about = "an INPUT of which every document is held out: a validation set"
    add("--val", action="append", default=[], metavar="INPUT", help=about)
    about = "the share of all other documents that is held out, by a hash of each (default: 0.05)"
    add("--val-fraction", type=float, metavar="F", help=about)
    add("--workers", type=int, metavar="N", help="processes (default: one per core)")


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
    console.run(main, "stopped; what is done is kept, and the same command goes on with it")
