"""prepare.py - documents become a folder of tokens, in as many processes as there are cores.

    one process reads files, a PIECE at a time          textfiles.py
    workers turn pieces into tokens                     tokenize
    the first process appends them to the shards        append_piece

1. The folder         meta.json, which says what is there, and the shards, which hold the tokens
2. A piece            its tokens; which of its documents are held out
3. All pieces         the workers; a signal's shards; how a killed preparation goes on
4. prepare            the whole, from a request to meta.json; more text for a folder
5. Where it is made   the lock; what a kill or a full disk leaves

How the text is divided into pieces depends on the files alone. So the same bytes are written with
any number of workers, and however often the work is stopped.
"""

import contextlib
import copy
import hashlib
import json
import math
import multiprocessing
import os
import shlex
import shutil
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import accumulate, chain, groupby, islice
from pathlib import Path
from signal import SIG_IGN, SIGINT
from signal import signal as handle_signal
from typing import NamedTuple

import numpy as np
from tiktoken import Encoding

import console
from console import refuse, replace_file
from textfiles import (
    MISSING,
    PIECE,
    SHOWN,
    TAKEN,
    Part,
    Skipped,
    check_packages,
    documents,
    find_files,
    has_fields,
    is_json_lines,
    is_text,
    read_parts,
    why_refused,
)
from tokenizer import encode, token_type

# --------------------------------------------------------------------------------------------------
# 1. The folder

# A shard is a header of 16 bytes (magic, version, bytes per token; little endian) and the tokens of
# a source and a split. The end-of-text token ends every document. meta.json counts the tokens; what
# stands behind them in the shard is not valid: somebody is appending, or was killed while he did.
VERSION = 2
HEADER, MAGIC = struct.Struct("<8sII"), b"FLMtoken"
SPLITS = ("train", "val")
BASE, MODULUS = 0x9E3779B97F4A7C15F39CC0605CEDC835, (1 << 127) - 1  # of digests
NOTHING = {"tokens": 0, "documents": 0, "bytes": 0, "digest": "0"}
UNFINISHED = "unfinished"  # the folder of what a preparation needs until it is done
MERGING = "merge.json"  # in it: what lab/merge.py makes, and no preparation goes on with


def joined(first: dict, second: dict) -> dict:
    """The counts of documents that stand one after the other, from those of two parts of them.

    The digest of documents with the hashes h1 .. hn is h1 b^(n-1) + ... + hn, modulo a prime. So
    it can be joined, too: it does not depend on how the documents were divided."""
    counts = {name: first[name] + second[name] for name in ("tokens", "documents", "bytes")}
    shift = pow(BASE, second["documents"], MODULUS)
    digest = int(first["digest"], 16) * shift + int(second["digest"], 16)
    return counts | {"digest": f"{digest % MODULUS:x}"}


def open_shard(path: Path, n_tokens: int, dtype: np.dtype) -> np.ndarray:
    """The tokens (n_tokens,) of a shard, memory-mapped. ValueError if the file is another one."""
    if not n_tokens:
        return np.empty(0, dtype)  # there may be no file
    size = HEADER.size + n_tokens * dtype.itemsize
    try:
        with open(path, "rb") as file:
            header, found = file.read(HEADER.size), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; prepare the folder again") from error
    if header != HEADER.pack(MAGIC, VERSION, dtype.itemsize) or found < size:
        raise ValueError(
            f"{path} is cut off, or no shard of this folder: it has {found:,} bytes, a header "
            f"included, where {size:,} are right; prepare the folder again"
        )
    return np.memmap(path, dtype, "r", HEADER.size, (n_tokens,))


def append_to_shard(path: Path, entry: dict, tokens: np.ndarray, counts: dict):
    """Write tokens behind those of a shard that its entry counts, and count them, too. Whatever
    else stands there, from a process that was killed, goes."""
    size = HEADER.size + entry["tokens"] * tokens.itemsize
    with open(path, "r+b" if path.exists() else "w+b") as file:
        if entry["tokens"] and os.fstat(file.fileno()).st_size < size:
            raise OSError(f"{path} is cut off: {size:,} bytes or more are right")
        file.write(HEADER.pack(MAGIC, VERSION, tokens.itemsize))
        file.truncate(size)
        file.seek(size)
        for start in range(0, len(tokens), PIECE):
            file.write(tokens[start : start + PIECE].data)
    entry |= joined(entry, counts)


def read_meta(folder: Path) -> dict:
    """The contents of meta.json. ValueError if it is absent, damaged, or of another version."""
    file = folder / "meta.json"
    command = f"type python data.py prepare INPUT... --out {shlex.quote(str(folder))}"
    if (folder / UNFINISHED).is_dir() and not file.is_file():
        raise ValueError(f"{folder} is not finished: repeat the command that prepares it")
    if not file.is_file():
        is_there = "exists, but holds no meta.json, so is no prepared folder"
        what = is_there if folder.is_dir() else "does not exist"
        raise ValueError(f"{folder} {what}. To make one, {command}")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        version = meta["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged: {error!r}. Remove {folder}, then {command}"
        ) from error
    if version != VERSION:
        raise ValueError(
            f"{folder} is of version {version}, and this program reads version {VERSION}: remove "
            f"it with rm -r {shlex.quote(str(folder))}, and prepare it again"
        )
    return meta


def as_json(value) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


# --------------------------------------------------------------------------------------------------
# 2. A piece


class Job(NamedTuple):
    """What all pieces of a signal have in common."""

    out: Path  # the prepared folder
    field: str  # the name of the text in .jsonl and parquet files
    tokenizer: Encoding
    workers: int
    progress: bool
    about: str  # another text where an unfinished preparation must not go on
    signal: str = "language"  # or teacher
    limit: int = 0  # a document whose hash is below it is held out

    @property
    def dtype(self) -> np.dtype:
        """The type of the tokens on the disk."""
        return token_type(self.tokenizer.n_vocab)

    @property
    def state_file(self) -> Path:
        """Where the state of the signal is kept: what its shards hold, and where to go on."""
        return self.out / UNFINISHED / f"{self.signal}.json"


class Piece(NamedTuple):
    """A few MiB of a source's text: what a worker does at a time."""

    number: int
    source: str
    held_out: bool  # whatever the hashes
    parts: list[Part]
    next: tuple  # (number of a file, where in it): where the next piece begins
    files: str  # the fingerprint of all files up to its end
    on_disk: int  # bytes of all files on the disk up to its end

    def file(self, job: Job, suffix: str) -> Path:
        """Where its tokens are (.tokens), and what is known of them, by which both are whole
        (.json)."""
        return job.out / UNFINISHED / f"{self.files}-{job.limit:x}-{self.number}{suffix}"


def hash64(text: bytes) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def add_skipped(skipped: dict, more: dict):
    """Add up {why something was left out: {"count", "examples": [(path, details)]}}; keep ten
    examples of a kind, at most three of a file."""
    for reason, new in more.items():
        known = skipped.setdefault(reason, {"count": 0, "examples": []})
        known["count"] += new["count"]
        for path, detail in new["examples"]:
            same_file = sum(path == other for other, _ in known["examples"])
            if same_file < 3 and len(known["examples"]) < SHOWN:
                known["examples"].append((path, detail))


def tokenize(job: Job, piece: Piece) -> dict:
    """Write a piece's tokens, first those to train on; what is known of them.

    -> {"train": counts, "val": counts, "hashes": (smallest, largest), "skipped": see add_skipped}.
    The content of a document alone decides whether it is held out: equal documents stay together,
    and no document changes sides when text is added."""
    saved, teacher, skipped = piece.file(job, ".json"), job.signal == "teacher", {}
    if saved.is_file():  # written before a kill
        return json.loads(saved.read_text(encoding="utf-8"))
    end_of_text = np.array([job.tokenizer.eot_token], np.uint32)
    tokens = {split: [end_of_text[:0]] for split in SPLITS}
    counts, hashes = {split: NOTHING | {"digest": 0} for split in SPLITS}, []
    for found in chain.from_iterable(documents(part, job.field, teacher) for part in piece.parts):
        if isinstance(found, Skipped):
            path = os.fsencode(found.path).decode(errors="backslashreplace")
            examples = [] if found.detail is None else [(path, found.detail)]
            add_skipped(skipped, {found.reason: {"count": 1, "examples": examples}})
            continue
        ids = [encode(job.tokenizer, part) for part in (found.text, found.ending) if part]
        ids.append(end_of_text)
        text = (found.text + found.ending).encode()
        hash = hash64(found.key.encode() if teacher else text)
        split = "val" if piece.held_out or hash < job.limit else "train"
        hashes += [] if piece.held_out else [hash]
        count = counts[split]
        count["tokens"] += sum(map(len, ids))
        count["documents"] += 1
        count["bytes"] += len(text)
        count["digest"] = (count["digest"] * BASE + (hash64(text) if teacher else hash)) % MODULUS
        tokens[split] += ids
    part = piece.file(job, f".{os.getpid()}.tmp")
    ids = tokens["train"] + tokens["val"]
    part.write_bytes(np.concatenate(ids, dtype=job.dtype, casting="unsafe").data)
    part.replace(piece.file(job, ".tokens"))
    result = {split: count | {"digest": f"{count['digest']:x}"} for split, count in counts.items()}
    result["hashes"] = min(hashes, default=1 << 64), max(hashes, default=-1)
    result["skipped"] = skipped
    replace_file(saved, as_json(result))
    return result


# --------------------------------------------------------------------------------------------------
# 3. All pieces

MANY = 1 << 25  # bytes of files; for less it does not pay to start worker processes


class Input(NamedTuple):
    """A file of a request."""

    source: str
    path: Path
    held_out: bool  # whole
    size: int  # bytes
    changed: int  # when, in nanoseconds


def fingerprints(job: Job, inputs: list[Input]) -> list[str]:
    """For the first 0, 1, 2, ... files of a signal a text that is another one where they, or what
    is done with them, are not the same."""

    def digest(*texts):
        return hashlib.sha256("".join(texts).encode()).hexdigest()

    places = [json.dumps(one._replace(path=os.path.abspath(one.path))) for one in inputs]
    return [*accumulate(places, digest, initial=digest(job.signal, job.about))]


def cut_pieces(job: Job, inputs: list[Input], state: dict) -> Iterator[Piece]:
    """The pieces of a signal that come after those of `state`. Small files make a piece together;
    a piece has one source."""
    first, *at = state["next"]
    number, parts, size, marks = state["pieces"], [], 0, fingerprints(job, inputs)
    before = [0, *accumulate(one.size for one in inputs)]  # bytes of the files before each
    for index in range(first, len(inputs)):
        source, path, held_out, *_ = inputs[index]
        for part in read_parts(path, job.field, tuple(at)):
            parts.append(part)
            size += part.size
            if size >= PIECE:
                place = (index, *part.end), marks[index + 1], before[index] + part.on_disk
                yield Piece(number, source, held_out, parts, *place)
                number, parts, size = number + 1, [], 0
        at, following = (0, 0), inputs[index + 1 : index + 2]
        if parts and [(one.source, one.held_out) for one in following] != [(source, held_out)]:
            place = (index + 1, 0, 0), marks[index + 1], before[index + 1]
            yield Piece(number, source, held_out, parts, *place)
            number, parts, size = number + 1, [], 0


def start_worker(job: Job, parent: int):
    """In each worker: what all pieces need. The worker ends when its parent has ended, however."""
    global JOB
    JOB = job
    handle_signal(SIGINT, SIG_IGN)  # Ctrl-C is the parent's

    def follow():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def tokenize_in_worker(piece: Piece) -> dict:
    return tokenize(JOB, piece)


def tokenize_all(job: Job, pieces: Iterable[Piece], workers: int) -> Iterator[tuple[Piece, dict]]:
    """The pieces and what `tokenize` says of them, in order; a few more are under way."""
    if workers == 1:
        yield from ((piece, tokenize(job, piece)) for piece in pieces)
        return
    # A forked worker has the tokenizer already. Elsewhere than on Linux forking is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, start_worker, (job, os.getpid()))
    running = deque()
    try:
        for piece in pieces:
            running.append((piece._replace(parts=[]), pool.submit(tokenize_in_worker, piece)))
            if len(running) > 2 * workers:
                done, future = running.popleft()
                yield done, future.result()
        for done, future in running:
            yield done, future.result()
    except BrokenProcessPool as error:
        why = "a worker process was killed, perhaps because the memory was full (--workers N)"
        raise OSError(why) from error
    finally:
        pool.shutdown(cancel_futures=True)


def tokenize_signal(job: Job, inputs: list[Input], entries: dict) -> dict:
    """Tokenize the inputs of a signal behind what its shards hold, and once more where the limit
    has moved. The state at the end; its limit is None where there are no two different documents.

    entries: {source: {split: {"shard": name of the file} and counts}}. Goes on where a killed
    process stopped: the state says how many pieces the shards have, and later pieces that are
    whole are found by `tokenize`."""
    new = {"limit": job.limit, "next": (0, 0, 0), "pieces": 0, "on_disk": 0, "skipped": {}}
    new |= {"hashes": (1 << 64, -1), "entries": entries}
    state, is_given = copy.deepcopy(new), any(one.held_out for one in inputs)
    if job.state_file.is_file():
        state = json.loads(job.state_file.read_text(encoding="utf-8"))
        known, fresh = state["entries"], copy.deepcopy(entries)
        state["entries"] = {name: known.get(name, entry) for name, entry in fresh.items()}
    total = sum(one.size for one in inputs)
    options = {"unit": "B", "unit_scale": True, "disable": not job.progress, "total": total}
    options |= {"initial": state["on_disk"], "desc": f"tokenizing ({job.signal})"}
    with console.progress(delay=0, **options) as bar:
        while True:
            job = job._replace(limit=state["limit"])
            for on_disk in write_signal(job, inputs, state, min(job.workers, 1 + total // MANY)):
                bar.update(on_disk - bar.n)
            limit = settle_limit(state, is_given)
            if limit in (None, state["limit"]):
                bar.update(total - bar.n)
                return state | {"limit": limit}
            job.state_file.unlink(missing_ok=True)
            state = copy.deepcopy(new) | {"limit": limit}


def write_signal(job: Job, inputs: list[Input], state: dict, workers: int) -> Iterator[int]:
    """Tokenize what comes after the state; yields the bytes of files up to the end of each piece.

    The state is saved when the source of the piece has what it needs. So a source that turns out
    to be empty may change, and the work goes on where it begins. ValueError at its end."""
    pieces = tokenize_all(job, cut_pieces(job, inputs, state), workers)
    for source, group in groupby(pieces, lambda pair: pair[0].source):
        entry = state["entries"][source]
        for piece, result in group:
            append_piece(job, piece, result, state)
            if entry[SPLITS[piece.held_out]]["documents"]:
                replace_file(job.state_file, as_json(state))
            for suffix in (".json", ".tokens"):
                piece.file(job, suffix).unlink()
            yield piece.on_disk
        if not any(entry[split]["documents"] for split in SPLITS):
            problem = f"source {source!r} has no document: give it text"
            refuse([problem, describe_skipped(state["skipped"])])


def append_piece(job: Job, piece: Piece, result: dict, state: dict):
    """Append a piece's tokens to the shards of its source, and count them in the state."""
    tokens = np.fromfile(piece.file(job, ".tokens"), job.dtype)
    halves = np.split(tokens, [result["train"]["tokens"]])
    for split, half in zip(SPLITS, halves, strict=True):
        entry = state["entries"][piece.source][split]
        append_to_shard(job.out / entry["shard"], entry, half, result[split])
    (smallest, largest), hashes = state["hashes"], result["hashes"]
    state["hashes"] = min(smallest, hashes[0]), max(largest, hashes[1])
    add_skipped(state["skipped"], result["skipped"])
    state |= {"next": piece.next, "pieces": piece.number + 1, "on_disk": piece.on_disk}
    state["files"] = piece.files


def settle_limit(state: dict, is_given: bool) -> int | None:
    """The limit below which a hash is held out, after a first try with state["limit"].

    A small corpus is an exception. Where all documents lie on one side, the limit moves until the
    other side has one too. is_given: documents of another input are held out in any case. None
    where there are no two different documents."""
    entries, limit = state["entries"].values(), state["limit"]
    counts = [sum(entry[split]["documents"] for entry in entries) for split in SPLITS]
    smallest, largest = state["hashes"]
    if all(counts) or is_given and largest < 0:
        return limit
    return min(max(limit, smallest + 1), largest) if smallest < largest or is_given else None


# --------------------------------------------------------------------------------------------------
# 4. prepare

Sources = dict[str, list[str | Path]]  # {name: [path of a file, or of a folder]}


def prepare(
    sources: Sources,
    out: str | Path,
    tokenizer: Encoding,
    *,
    val: Sources | None = None,
    teacher: Sequence[str | Path] = (),
    weights: dict[str, float] | None = None,
    val_fraction: float | None = None,
    field: str = "text",
    append: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> dict:
    """Tokenize files into the folder `out`; returns its meta, the contents of meta.json.

    sources       {name: [path of a file, or of a folder of files]}: see textfiles.py
    val           the same, of which every document is held out. A name may also be in `sources`
    teacher       [path of a .jsonl file with the fields "text", "proposition", "label" (0 or 1)]
    weights       {name: share of the language rows}. Sources without a weight divide what is left
                  to 1 by their size. Where every source has one, only the ratios count. FLM-101B:
                  53.5 English, 46.5 Chinese.
    val_fraction  about this share of the documents is held out (0.05): see tokenize
    field         the name of the text in .jsonl and parquet files
    append        add to a folder that is there, with its val_fraction, and its weights
    workers       processes; by default one per core. What is written does not depend on it.
    progress      whether to show a bar

    What cannot be read is left out and counted: meta["skipped"], see add_skipped. ValueError names
    everything wrong with the request; then `out` is as it was before. It is not whole without its
    meta.json. After a kill, Ctrl-C, or an OSError such as a full disk, the same call goes on where
    the work stopped."""
    out = Path(out).resolve()
    old = read_meta(out) if append else None
    if val_fraction is None:
        val_fraction = old["val_fraction"] if old else 0.05
    weights = (old["weights"] if old else {}) | (weights or {})
    val, workers = val or {}, cores() if workers is None else workers
    problems = check_request(sources, val, teacher, val_fraction, workers, old, tokenizer.name)
    problems += check_weights(weights, [*trained(old), *sources])
    inputs = {"language": find_inputs(sources, val, field, problems)}
    inputs["teacher"] = find_inputs({"teacher": teacher}, {}, field, problems)
    missing = check_packages(one.path for one in chain(*inputs.values()))
    for signal, files in inputs.items():
        problems += missing or check_fields(files, field, signal == "teacher")
    refuse(problems + check_place(out, old))
    about = json.dumps([VERSION, tokenizer.name, field, val_fraction, old])
    job = Job(out, field, tokenizer, workers, progress, about)
    many = sum(one.size for one in chain(*inputs.values())) >= MANY
    with building(out, old, partial(same_files, job, inputs), keep=many):
        tokenized, problems = tokenize_request(job, inputs, old, val_fraction)
        problems += check_sources(tokenized["entries"]["language"], sources, val)
        if problems:
            refuse([*problems, describe_skipped(tokenized["skipped"])])
        about = {"name": tokenizer.name, "n_vocab": tokenizer.n_vocab}
        return write_meta(out, about, val_fraction, weights, **tokenized)


def tokenize_request(
    job: Job, inputs: dict[str, list[Input]], old: dict | None, val_fraction: float
) -> tuple[dict, list[str]]:
    """Tokenize all signals of a request -> {"entries", "limits", "skipped"}, as write_meta takes
    them, and what is wrong with the text."""
    entries, skipped, problems = entries_of(old), {}, []
    limits = dict(old["limits"]) if old else {}
    add_skipped(skipped, old["skipped"] if old else {})
    for signal in filter(inputs.get, inputs):
        for name in dict.fromkeys(one.source for one in inputs[signal]):
            entries[signal].setdefault(name, new_entry(signal, len(entries[signal])))
        limit = limits.get(signal, int(val_fraction * 2**64))
        of_signal = job._replace(signal=signal, limit=limit)
        state = tokenize_signal(of_signal, inputs[signal], entries[signal])
        entries[signal], limits[signal] = state["entries"], state["limit"]
        add_skipped(skipped, state["skipped"])
        if state["limit"] is None:
            n = sum(one[split]["documents"] for one in entries[signal].values() for split in SPLITS)
            texts = "documents (a file of up to 16 KiB is one)"
            what = {"language": texts, "teacher": "texts with propositions"}[signal]
            problems.append(
                f"the {signal} signal needs at least two different {what}, one to train on and one "
                f"to hold out, but got {n}{' equal ones' * (n > 1)}: give more text"
            )
    return {"entries": entries, "limits": limits, "skipped": skipped}, problems


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def find_inputs(sources: Sources, val: Sources, field: str, problems: list[str]) -> list[Input]:
    """The files of a request, source by source; those of `val` come behind the others. What is
    wrong with them is added to `problems`. field: the name of the text in an object."""
    inputs = []
    for name in dict.fromkeys([*sources, *val]):
        if not is_text(name):
            problems.append(f"the source name {name!r} is not UTF-8: choose one, NAME=INPUT")
        for held_out, paths in enumerate((sources.get(name, ()), val.get(name, ()))):
            for path in paths:
                files = find_files(path, field)
                kinds = f"which must be a file, or a folder with files {TAKEN}"
                problems += filter(None, map(why_refused, files))
                if not files:
                    problems.append(f"source {name!r}: nothing to read at {str(path)!r}, {kinds}")
                for file in files:
                    found = file.stat()
                    about = bool(held_out), found.st_size, found.st_mtime_ns
                    inputs.append(Input(name, file, *about))
    return inputs


def new_entry(signal: str, number: int) -> dict:
    """What meta.json says of the number-th source of a signal, before it has documents."""
    return {split: {"shard": f"{signal}-{number}-{split}.tokens"} | NOTHING for split in SPLITS}


def entries_of(meta: dict | None) -> dict:
    """{signal: {source: its entry}} of a prepared folder, or of none."""
    sources = meta["sources"] if meta else []
    language = {one["name"]: {split: one[split] for split in SPLITS} for one in sources}
    teacher = {"teacher": meta["teacher"]} if meta and meta["teacher"] else {}
    return {"language": language, "teacher": teacher}


def trained(meta: dict | None) -> list[str]:
    """The sources of a prepared folder, or of none, that have text to train on."""
    return [one["name"] for one in meta["sources"] if one["weight"]] if meta else []


def check_request(
    sources: Sources,
    val: Sources,
    teacher: Sequence[str | Path],
    val_fraction: float,
    workers: int,
    old: dict | None,
    tokenizer: str,
) -> list[str]:
    """What is wrong with a request for `prepare`. old: the meta of a folder that is added to."""
    problems = []
    if old and val_fraction != old["val_fraction"]:
        share = old["val_fraction"]
        problems.append(
            f"--val-fraction {val_fraction}: the folder holds out {share}; leave it out"
        )
    if old and tokenizer != old["tokenizer"]["name"]:
        name = old["tokenizer"]["name"]
        problems.append(f"the folder has {name} tokens, not those of {tokenizer}")
    if not (sources or old):
        problems.append("no source is given: name a text file, a folder, or stdlib")
    for path in map(Path, teacher):
        if path.is_dir() or not is_json_lines(path):
            problems.append(f"teacher: {str(path)!r} is not a .jsonl file")
    if not (0 < val_fraction < 1 or (val or old) and val_fraction == 0):
        also = ", or be 0 with a validation set (--val)"
        problems.append(f"val_fraction is {val_fraction}, but must lie between 0 and 1{also}")
    if workers < 1:
        problems.append(f"workers is {workers}, but must be at least 1")
    return problems


def check_fields(inputs: list[Input], field: str, teacher: bool) -> list[str]:
    """Problems: the sources that have no document at the beginning of their first ten files of
    objects or rows, but objects or rows without the field."""
    problems = []
    for source, files in groupby(inputs, lambda one: one.source):
        paths = islice((one.path for one in files if has_fields(one.path)), SHOWN)
        parts = (next(read_parts(path, field)) for path in paths)
        found = (islice(documents(part, field, teacher), SHOWN) for part in parts)
        why = [
            f"{one.path}: {one.reason}: {one.detail}" if isinstance(one, Skipped) else ""
            for one in chain.from_iterable(found)
        ]
        missing = [line for line in why if MISSING in line]
        if missing and all(why):
            problems.append(f"source {source!r}: {missing[0]}")
    if problems and not teacher:
        problems.append(
            "To read a field of another name, type --field NAME. (It holds for all files of a "
            "command: add those where the name is another one by a second command, with --append)"
        )
    return problems


def check_weights(weights: dict[str, float], names: Iterable[str]) -> list[str]:
    """What is wrong with the weights of these sources."""
    problems = []
    for name, weight in weights.items():
        if name not in names:
            problems.append(f"{name!r} has a weight, but the sources are: {', '.join(names)}")
        if not 0 < weight < math.inf:
            problems.append(f"the weight of {name!r} is {weight}, but must be above 0")
    rest = ", ".join(dict.fromkeys(name for name in names if name not in weights))
    if rest and sum(weights.values()) >= 1:
        problems.append(f"the weights leave nothing for {rest}: they must sum to less than 1")
    return problems


def check_sources(
    entries: dict[str, dict], sources: Iterable[str], val: Iterable[str]
) -> list[str]:
    """Problems: the sources that have no document to train on, or none of their validation set."""
    empty = (name for name in val if not entries[name]["val"]["documents"])
    problems = [f"the validation set {name!r} has no document: give it text" for name in empty]
    for source in sources:
        n = entries[source]["val"]["documents"]
        if not entries[source]["train"]["documents"]:
            problems.append(
                f"source {source!r} has no document to train on: all its {n} are held out, for so "
                "their hashes say. Give the source more text, or make one source of several "
                "inputs: all=INPUT all=INPUT"
            )
    return problems


def shares_of_rows(weights: dict[str, float], entries: dict[str, dict]) -> dict[str, float]:
    """{source: share of the language rows}. They sum to 1; a validation set has 0.

    Sources without a weight divide what `weights` leave, by their tokens to train on."""
    left = 1 - sum(weights.values())
    free = {name: entries[name]["train"]["tokens"] for name in entries if name not in weights}
    weights = weights | {name: left * n / max(1, sum(free.values())) for name, n in free.items()}
    return {name: weights[name] / sum(weights.values()) for name in entries}


def write_meta(
    out: Path,
    tokenizer: dict,
    val_fraction: float,
    weights: dict[str, float],
    *,
    limits: dict[str, int],
    entries: dict,
    skipped: dict,
) -> dict:
    """Write meta.json, by which a folder is whole; its contents."""
    language, shares = entries["language"], shares_of_rows(weights, entries["language"])
    for shard in out.glob("*.tokens"):
        with open(shard, "r+b") as file:
            os.fsync(file.fileno())
    meta = {
        "version": VERSION,
        "tokenizer": tokenizer,
        "val_fraction": val_fraction,
        "limits": limits,
        "weights": weights,
        "teacher": entries["teacher"].get("teacher"),
        "sources": [{"name": name, "weight": shares[name]} | language[name] for name in language],
        "skipped": skipped,
    }
    replace_file(out / "meta.json", as_json(meta))
    return meta


def describe_skipped(skipped: dict) -> str:
    """Lines that say what was left out: of each kind how many, and examples."""
    lines = ["left out:"] if skipped else []
    for reason, found in skipped.items():
        lines.append(f"  {found['count']:,} x {reason}")
        lines += [
            f"      {path}{': ' * bool(detail)}{detail}" for path, detail in found["examples"]
        ]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# 5. Where a folder is made


def check_place(out: Path, old: dict | None) -> list[str]:
    """Why a folder cannot be made there, or added to, where it had the meta `old`. What an
    unfinished preparation has left is no reason."""
    if old:
        return [] if read_meta(out) == old else [f"{out} has just changed: repeat the command"]
    if not out.exists():
        return []
    if (out / "meta.json").is_file():
        remove = f"rm -r {shlex.quote(str(out))}"
        return [f"{out} is there already: choose another name, add to it (--append), or {remove}"]
    is_ours = out.is_dir() and ((out / UNFINISHED).is_dir() or not {*os.listdir(out)} - {"lock"})
    return [] if is_ours else [f"{out} exists and is not an empty folder: choose another name"]


def same_files(job: Job, inputs: dict[str, list[Input]]) -> bool:
    """Whether what a preparation has left unfinished is of these files."""
    if (job.out / UNFINISHED / MERGING).exists():
        return False
    for signal, files in inputs.items():
        this = job._replace(signal=signal)
        state = json.loads(this.state_file.read_text()) if this.state_file.is_file() else {}
        if state and state.get("files") not in fingerprints(this, files):
            return False
    return True


@contextlib.contextmanager
def building(out: Path, old: dict | None, is_same: Callable[[], bool], keep: bool) -> Iterator:
    """Hold the folder for this process while its shards are written. ValueError where it holds the
    unfinished work of another command, which is_same() tells. After an error what is done stays,
    for the same command to go on with; but without `keep` nothing stays after a ValueError."""
    unfinished, what = out / UNFINISHED, out / UNFINISHED if old else out
    with locked(out):
        refuse(check_place(out, old))  # again: another process may have held it until now
        if not is_same():
            raise ValueError(
                f"{out} holds the unfinished work of another command, or files have changed since: "
                f"repeat that command, or remove it with rm -r {shlex.quote(str(what))}"
            )
        try:
            unfinished.mkdir(exist_ok=True)
            yield
            shutil.rmtree(unfinished)
        except OSError as error:
            raise OSError(
                f"{out} is not finished: {error}. What is done is kept, and the same command goes "
                f"on with it. To give up: rm -r {shlex.quote(str(what))}"
            ) from error
        except ValueError as error:
            if keep:
                kept = "What is done before it is kept: mend this, and repeat the command"
                raise ValueError(f"{error}\n{kept}") from error
            remove_made(out, old)
            raise


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the lock of a folder; it is made where it is missing. A second process waits. Windows
    has no such lock."""
    console.make_folder(out)
    with open(out / "lock", "a") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except BlockingIOError:
            print(f"another process prepares {out}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_made(out: Path, old: dict | None):
    """Remove what cannot be completed: the folder, or what was to be added to it."""
    shutil.rmtree(out / UNFINISHED)
    if not old:
        for path in (*out.glob("*.tokens"), out / "lock"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a mount point
            out.rmdir()


def prepare_once(sources: Sources, out: str | Path, tokenizer: Encoding):
    """`prepare`, if `out` is no prepared folder yet.

    Several processes may do this at once: one makes the folder, the others wait and use it."""
    made = Path(out) / "meta.json"
    try:
        if not made.is_file():
            prepare(sources, out, tokenizer)
    except (OSError, ValueError):
        if not made.is_file():
            raise
