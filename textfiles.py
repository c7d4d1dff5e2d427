"""textfiles.py - files of every kind, read as documents.

1. Finding files          in folders; what is told about those that are not read
2. Parts of a file        a few MiB of unpacked text at a time, whatever the size of the file
3. Documents of a part    and what cannot be one, with the reason
4. Another encoding       how to make UTF-8 of a file that is none

A text file (.txt, .md, .py, ...) is one long text, which is cut into documents of 16 Ki characters
or a little more. A .jsonl file has an object a line, and a parquet file a row, for each document.
Text and .jsonl files may be packed: .gz, or .zst with the package zstandard. Parquet needs the
package pyarrow. Both packages are optional.
"""

import importlib
import io
import json
import re
import shlex
import sysconfig
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import filterfalse, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tokenizer import EMOJI

PIECE = 1 << 22  # bytes of text that are read at a time, and that a worker of prepare.py takes
LONGEST = 1 << 24  # bytes: a line of .jsonl, or a row, that is this long is no document
BLOCK = 1 << 18  # bytes
SHOWN = 10  # examples of a kind that are shown

# --------------------------------------------------------------------------------------------------
# 1. Finding files

JSON_LINES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py", *JSON_LINES)
PACKED = {".gz": "gzip -dc", ".zst": "zstd -dc"}  # may stand behind each of the above
PARQUET = ".parquet"
TAKEN = f"{' '.join(SUFFIXES)}, each also with {' or '.join(PACKED)}, and {PARQUET}"  # in a folder
PACKAGES = {".zst": "zstandard", PARQUET: "pyarrow.parquet"}  # what reads them; both are optional
TAR = re.compile(r"\.(tar|tar\.\w*z\w*|tgz)$", re.IGNORECASE)


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


def unpacked(path: Path) -> Path:
    """The name of a file without .gz or .zst."""
    return path.with_suffix("") if path.suffix.lower() in PACKED else path


def is_json_lines(path: Path) -> bool:
    """Whether a file is read as JSON, an object a line."""
    return unpacked(path).suffix.lower() in JSON_LINES


def has_fields(path: Path) -> bool:
    """Whether the documents of a file are fields of objects or rows."""
    return is_json_lines(path) or path.suffix.lower() == PARQUET


def is_read(path: Path, field: str) -> bool:
    """Whether a file that is found in a folder is read.

    field: the name of the text in an object."""
    is_named = unpacked(path).suffix.lower() in SUFFIXES or has_fields(path)
    if not is_named or path.name[0] == "." or not path.is_file():
        return False
    return not why_refused(path) and not is_lone_object(path, field)


def first_lines(path: Path) -> list[bytes]:
    """The first two lines of a file, packed or not, that are not empty. Fewer where there are no
    more, and none where the file cannot be read: that is told later."""
    try:
        with open(path, "rb") as packed:
            file = unpack(path, packed)
            lines = iter(partial(file.readline, LONGEST), b"")
            return list(islice(filterfalse(bytes.isspace, lines), 2))
    except (ImportError, OSError):
        return []


def is_lone_object(path: Path, field: str) -> bool:
    """Whether a .json file is one object in one line, without the field: settings, say, and no
    documents."""
    if unpacked(path).suffix.lower() != ".json":
        return False
    lines = first_lines(path)
    row = parse_line(lines[0], field)[0] if len(lines) == 1 else {}
    return bool(row) and field not in row


def why_refused(path: Path) -> str:
    """Why a file is not even tried, and what to type; nothing for any other file."""
    old = shlex.quote(str(path))
    if TAR.search(path.name):
        return f"{path} is an archive: unpack it with tar xf {old}, and give the files as INPUT"
    if unpacked(path).suffix.lower() != ".json":
        return ""
    lines = first_lines(path)
    if not lines or parse_line(lines[0], "")[0]:
        return ""
    new = shlex.quote(str(path.with_name(f"{unpacked(path).stem}.jsonl")))
    program = PACKED.get(path.suffix.lower(), "cat")
    return (
        f"{path}: a .json file must have an object a line, but its first line is none. Make such a "
        f"file: {program} {old} | jq -c 'if type == \"array\" then .[] else . end' > {new}"
    )


def find_files(path: str | Path, field: str = "text") -> list[Path]:
    """The files that one path means: the file itself, or those of the folder that are read, sorted.
    field: the name of the text in an object."""
    path = Path(path)
    if path.is_dir():
        return sorted(found for found in walk(path, set()) if is_read(found, field))
    return [path] if path.is_file() else []


def describe_left_out(folder: Path, field: str) -> str:
    """Lines about the files of a folder that are not read: of each kind how many, ten by name.
    field: the name of the text in an object."""
    kinds = {}
    for path in sorted(found for found in walk(folder, set()) if not is_read(found, field)):
        kind = path.suffix.lower() or "without suffix" if path.is_file() else "no regular files"
        if path.is_file() and is_lone_object(path, field):
            kind += f" of one line, without the field {field!r}"
        kinds.setdefault("hidden" if path.name.startswith(".") else kind, []).append(path)
    lines = [f"{folder}: not read are the files below. One that you give as an INPUT is read as"]
    lines += ["text, or you are told what to do with it."]
    for kind, paths in sorted(kinds.items()):
        shown = ", ".join(map(str, paths[:SHOWN]))
        lines.append(f"  {len(paths):,} {kind}: {shown}")
        lines += [f"  and {len(paths) - SHOWN:,} more"] * (len(paths) > SHOWN)
    return "\n".join(lines) if kinds else ""


def check_packages(files: Iterable[Path]) -> list[str]:
    """Problems: the optional packages that these files need and that cannot be imported."""
    problems, suffixes = [], [path.suffix.lower() for path in files]
    for suffix in filter(suffixes.count, PACKAGES):
        try:
            importlib.import_module(PACKAGES[suffix])
        except Exception as error:  # whatever is wrong with the package
            needed = f"{suffixes.count(suffix):,} {suffix} files need a package: pip install"
            problems.append(f"{needed} {PACKAGES[suffix].split('.')[0]} ({error})")
    return problems


# --------------------------------------------------------------------------------------------------
# 2. Parts of a file


class Part(NamedTuple):
    """Whole documents of a file that stand one after the other; or, of kind "damage", why the rest
    of a file cannot be read."""

    path: Path
    kind: str  # "text", "json", "rows" or "damage"
    contents: bytes | list | tuple  # of "rows" the values, of "damage" (reason, details)
    before: int  # bytes, lines or rows before it
    end: tuple[int, int]  # unpacked bytes or rows up to its end; the next part's `before`
    on_disk: int  # bytes of the file on the disk that have been read

    @property
    def size(self) -> int:
        """Bytes of its text (in rows: characters)."""
        texts = self.contents if self.kind == "rows" else [self.contents]
        return sum(len(text) for text in texts if isinstance(text, (bytes, str)))


def read_parts(path: Path, field: str, at: tuple[int, int] = (0, 0)) -> Iterator[Part]:
    """The parts of a file from `at` on, which is the `end` of an earlier part, or its beginning.

    field: the column of a parquet file that has the text. A file that cannot be read to its end is
    no error: its last part tells it."""
    end, on_disk = at, 0
    try:
        is_table = path.suffix.lower() == PARQUET
        for part in read_rows(path, field, at) if is_table else read_bytes(path, at):
            yield part
            end, on_disk = part.end, part.on_disk
        problem = None if end[0] else ("an empty file", "")
    except OSError as error:
        why = error.strerror or str(error)
        problem = "a file that cannot be read to its end", f"after {end[0]:,} bytes or rows: {why}"
    if problem:
        yield Part(path, "damage", problem, end[1], end, on_disk)


def read_bytes(path: Path, at: tuple[int, int]) -> Iterator[Part]:
    """The parts of a text file or a .jsonl file; lines are counted in the latter."""
    offset, before = at
    with open(path, "rb") as packed:
        file = unpack(path, packed)
        if file is packed:
            file.seek(offset)
        else:
            pass_over(file, offset)
        json_lines = is_json_lines(path)
        for contents, length in whole_lines(file) if json_lines else whole_documents(file):
            offset += length
            end = offset, before + contents.count(b"\n") if json_lines else offset
            kind = "json" if json_lines else "text"
            yield Part(path, kind, contents, before, end, packed.tell())
            before = end[1]
        if file is not packed and file.raw.error:
            raise OSError(str(file.raw.error))


def unpack(path: Path, file: BinaryIO) -> BinaryIO:
    """A file's unpacked bytes; the file itself where it is not packed."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        new, error = partial(zlib.decompressobj, 16 + zlib.MAX_WBITS), zlib.error
    elif suffix == ".zst":
        import zstandard

        # 2 GiB is the largest window that a frame may ask for (zstd --long=31).
        new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        error = zstandard.ZstdError
    else:
        return file
    return io.BufferedReader(Unpacked(unpacked_blocks(file, new), error), BLOCK)


def unpacked_blocks(packed: BinaryIO, new_unpacker: Callable) -> Iterator[bytes]:
    """The unpacked bytes of a file, whose parts (.gz: members, .zst: frames) are packed each by
    itself; there may be zeros between them. EOFError where it is cut off."""
    unpacker = None
    while rest := packed.read(1 << 11):  # 2 KiB unpack to 64 MiB at most
        while rest := rest if unpacker else rest.lstrip(b"\0"):
            unpacker = unpacker or new_unpacker()
            yield unpacker.decompress(rest)
            rest, unpacker = unpacker.unused_data, None if unpacker.eof else unpacker
    if unpacker:
        raise EOFError("it is cut off")


class Unpacked(io.RawIOBase):
    """Blocks as a file. It ends where they are damaged, and then `error` says why: so what stands
    before the damage can be read."""

    def __init__(self, blocks: Iterator[bytes], error: type[Exception]):
        self.blocks, self.errors = blocks, (OSError, EOFError, error)
        self.ready, self.error = memoryview(b""), None

    def readable(self) -> bool:
        return True

    def readinto(self, room: memoryview) -> int:
        try:
            while not self.ready and (block := next(self.blocks, None)) is not None:
                self.ready = memoryview(block)
        except self.errors as error:
            self.error = error
        n = min(len(room), len(self.ready))
        room[:n], self.ready = self.ready[:n], self.ready[n:]
        return n


def pass_over(file: BinaryIO, n: int):
    """Read n bytes, or to the end of the file, and forget them."""
    while n and (block := file.read(min(n, BLOCK))):
        n -= len(block)


def whole_lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(lines, bytes that were read for them), about PIECE bytes at a time.

    A line that does not end within LONGEST bytes is cut off there, and the rest is passed over."""
    while contents := file.read(PIECE):
        end = file.readline(LONGEST)
        contents, length = contents + end, len(contents) + len(end)
        is_cut = len(end) == LONGEST and not end.endswith(b"\n")
        while end and not end.endswith(b"\n"):
            length += len(end := file.readline(BLOCK))
        yield contents + b"\n" * is_cut, length


def whole_documents(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(text, its bytes) of a text file, cut about every PIECE bytes where a document can end."""
    rest = b""
    while contents := rest + file.read(PIECE + CUT_AT_LAST - len(rest)):
        end = len(contents)
        if end == PIECE + CUT_AT_LAST:
            end = PIECE + place_to_cut(contents[PIECE:])
        yield contents[:end], end
        rest = contents[end:]


def place_to_cut(contents: bytes) -> int:
    """Where the first document that begins in these bytes of a text can begin: after a line end and
    before a letter, else after a line end, else at a character."""
    text = contents.decode("utf-8", "surrogateescape")
    found = LINE_END_THEN_LETTER.search(text)
    end = found.end() if found else text.find("\n") + 1
    if end:
        return len(text[:end].encode("utf-8", "surrogateescape"))
    return len(contents) - len(contents.lstrip(bytes(range(0x80, 0xC0))))  # inside of a character


def read_rows(path: Path, field: str, at: tuple[int, int]) -> Iterator[Part]:
    """The parts of a parquet file: 64 rows of the column `field` at a time, or fewer large ones."""
    from pyarrow import ArrowException, parquet

    size, before, first = path.stat().st_size, at[0], 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK) as file:
            names, total = file.schema_arrow.names, file.metadata.num_rows
            if field not in names:
                raise OSError(f"the column {field!r} is {MISSING} {', '.join(names)}")
            for group in range(file.num_row_groups):
                about = file.metadata.row_group(group)
                last, n_bytes = first + about.num_rows, about.total_byte_size
                rows = max(1, min(64, PIECE * about.num_rows // max(1, n_bytes)))
                options = {"row_groups": [group], "columns": [field], "use_threads": False}
                for batch in file.iter_batches(rows, **options) if last > before else ():
                    values = batch.column(0).to_pylist()
                    first += len(values)
                    if first > before:
                        end, new = (first, first), values[before - first :]
                        yield Part(path, "rows", new, before, end, size * first // total)
                        before = first
                first = last
    except ArrowException as error:
        raise OSError(str(error)) from error


# --------------------------------------------------------------------------------------------------
# 3. Documents of a part

CUT, CUT_AT_LAST = 16 * 1024, 64 * 1024  # characters
LINE_END_THEN_LETTER = re.compile(r"\n(?=[^\W\d_])")
MISSING = "missing; there are"  # of a field
NOT_TEXT, EMPTY = "not UTF-8 text", "an empty text"
TOO_LONG = f"{LONGEST:,} bytes or more in one line"


class Document(NamedTuple):
    text: str
    key: str  # the text that decides whether the document is held out
    ending: str = ""  # the emoji of a teacher item


class Skipped(NamedTuple):
    """What is no document, and why."""

    reason: str
    path: Path
    detail: str | None  # None: another one of the same file was told already


def documents(part: Part, field: str, teacher: bool = False) -> Iterator[Document | Skipped]:
    """The documents of a part, in order, and what is none.

    field: the name of the text in an object of .jsonl. teacher: an object has the fields "text",
    "proposition" and "label" (0 or 1)."""
    if part.kind == "damage":
        reason, detail = part.contents
        yield Skipped(reason, part.path, detail)
    elif part.kind == "text":
        yield from documents_of_text(part)
    elif part.kind == "json":
        yield from documents_of_lines(part, field, teacher)
    else:
        yield from documents_of_rows(part, field)


def is_text(value: object) -> bool:
    """Whether a value is text that UTF-8 can write: no half of a character."""
    try:
        return type(value) is str and value.encode() is not None
    except UnicodeEncodeError:
        return False


def documents_of_text(part: Part) -> Iterator[Document | Skipped]:
    """The documents of a part of a text file. A document with a byte that is not UTF-8 is left out,
    and so is one with many NUL bytes: UTF-16 looks like that, and is UTF-8 by accident. The first
    one comes with advice."""
    text, end, told = part.contents.decode("utf-8", "surrogateescape"), 0, False
    text = text.removeprefix("\ufeff") if part.before == 0 else text
    for document in cut_text(text):
        if is_text(document) and document.count("\0") * 4 <= len(document):
            yield Document(document, document)
        else:
            offset = None if told else part.before + bad_byte(text[:end], document)
            yield Skipped(NOT_TEXT, part.path, None if told else diagnose(part.path, offset))
            told = True
        end += len(document)


def cut_text(text: str) -> Iterator[str]:
    r"""The documents of a text.

    A document ends at the first line end after 16 Ki characters that a letter follows. This cut
    changes no token: in cl100k_base no token spans a line end and a letter. Where 64 Ki characters
    hold no such place, the document ends at the first line end after 16 Ki, and where there is no
    line end, after 64 Ki.

    >>> [len(document) for document in cut_text("def f():\n    pass\n" * 1000 + "f()")]
    [16398, 1605]
    """
    start = 0
    while start < len(text):
        first, last = start + CUT, start + CUT_AT_LAST
        if found := LINE_END_THEN_LETTER.search(text, first, last):
            end = found.end()
        elif len(text) > last:
            end = text.find("\n", first, last) + 1 or last
        else:
            end = len(text)
        yield text[start:end]
        start = end


def documents_of_lines(part: Part, field: str, teacher: bool) -> Iterator[Document | Skipped]:
    """The documents of lines of JSON. Propositions about one text have the same key, so that they
    stay together, in training or held out: one would give the other away."""
    for number, line in enumerate(part.contents.split(b"\n"), part.before + 1):
        if not line.strip():
            continue
        row, reason, detail = parse_line(line, field, teacher)
        if reason:
            yield Skipped(reason, part.path, f"line {number:,}{detail}")
        elif teacher:
            text, proposition = row["text"], row["proposition"]
            ending = EMOJI[row["label"]]
            yield Document(f"{text}\n{proposition}", text or proposition, ending)
        else:
            yield Document(row[field], row[field])


def parse_line(line: bytes, field: str, teacher: bool = False) -> tuple[dict, str, str]:
    """A line of a .jsonl file -> its object, why it is no document (nothing: ""), and details."""
    if len(line) >= LONGEST:
        return {}, TOO_LONG, ""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return {}, NOT_TEXT, f": its byte {error.start:,} fits no character"
    except (ValueError, RecursionError) as error:
        return {}, "broken JSON", f": {str(error).replace('line 1 ', '')}"
    if not isinstance(row, dict):
        return {}, "a line that is no JSON object", f": {line[:60].decode(errors='replace')}"
    wrong = []
    for name in ("text", "proposition", "label") if teacher else (field,):
        value, allowed = row.get(name), "0 or 1" if teacher and name == "label" else "text"
        good = type(value) is int and value in EMOJI if allowed == "0 or 1" else is_text(value)
        if not good:
            there = ", ".join(row).encode(errors="backslashreplace").decode()
            found = json.dumps(value)[:60] if name in row else f"{MISSING} {there[:200]}"
            wrong.append((f"the field {name!r} must be {allowed}", f"it is {found}"))
    if wrong:
        reasons, details = zip(*wrong)
        return row, "; ".join(reasons), f": {', '.join(details)}"
    return row, "" if teacher or row[field] else EMPTY, ""


def documents_of_rows(part: Part, field: str) -> Iterator[Document | Skipped]:
    """The documents of rows of a parquet file."""
    for number, value in enumerate(part.contents, part.before + 1):
        if not is_text(value):
            detail = f"row {number:,}: it is {type(value).__name__}"
            yield Skipped(f"the field {field!r} must be text", part.path, detail)
        elif not value or len(value) >= LONGEST:
            yield Skipped(TOO_LONG if value else EMPTY, part.path, f"row {number:,}")
        else:
            yield Document(value, value)


# --------------------------------------------------------------------------------------------------
# 4. Another encoding

PROGRAMS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}


def bad_byte(before: str, document: str) -> int:
    """The offset of the first byte that is no UTF-8 text, in a document that stands behind other
    text; of the first NUL where every byte is."""
    try:
        document.encode()
        end = document.index("\0")
    except UnicodeEncodeError as error:
        end = error.start
    return len((before + document[:end]).encode("utf-8", "surrogateescape"))


def diagnose(path: Path, offset: int) -> str:
    """What a file is whose byte at `offset` is no UTF-8 text, and how to make text of it."""
    what = f"the byte at offset {offset} fits no UTF-8 character"
    if path.suffix.lower() in PACKED:
        return f"{what}, where it is unpacked"
    inner = path if path.suffix.lower() in SUFFIXES else path.with_suffix("")
    new = shlex.quote(str(inner.with_name(f"{inner.stem}-utf8{inner.suffix}")))
    old = shlex.quote(str(path))
    with open(path, "rb") as file:
        start = file.read(8)
        file.seek(max(0, offset - BLOCK // 2) // 2 * 2)
        sample = file.read(BLOCK)
    for magic, program in PROGRAMS.items():
        if start.startswith(magic):
            return f"compressed data: {program} -dc {old} > {new}"
    if options := iconv_options(sample):
        return f"{what}: iconv {options} -t UTF-8 {old} > {new}"
    return "binary data: leave it out, or take the text out with the program that made it"


def iconv_options(sample: bytes) -> str:
    r"""How iconv is told the encoding of text that is not UTF-8; nothing for binary data. Only
    UTF-16 and UTF-32 can be told for sure: a wrong guess would write nonsense and report success.

    >>> iconv_options("naïve été\n".encode("latin-1"))
    '-f ENCODING'
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
    text = sample.decode("utf-8", "ignore")
    is_damaged = sum(letter > "\x7f" for letter in text) > len(sample) - len(text.encode())
    return "-c -f UTF-8" if is_damaged else "-f ENCODING"  # -c leaves the damage out
