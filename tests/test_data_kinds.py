"""Every kind of file gives the same documents, damage costs no more than it must, and memory does
not depend on the size of a file or a line."""

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import BYTES, documents_in, shard_tokens, words, write_rows

import prepare as preparing
import textfiles
from prepare import prepare
from textfiles import Document, Skipped, documents, read_parts

ROOT = Path(preparing.__file__).parent
TEXTS = ["one\nline", "語\r\n", "<|endoftext|>", *words(400)]


def pack_zst(raw):
    zstandard = pytest.importorskip("zstandard", reason="pip install zstandard")
    return zstandard.ZstdCompressor().compress(raw)


def write_parquet(path, columns, **options):
    """A parquet file of these columns."""
    pyarrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


PACK = {".gz": gzip.compress, ".zst": pack_zst}


@pytest.fixture(params=[900, 1 << 22])
def piece(request, monkeypatch):
    """Files of many parts, and of one."""
    for module in (preparing, textfiles):
        monkeypatch.setattr(module, "PIECE", request.param)


def shards(out):
    return {path.name: path.read_bytes() for path in out.glob("*.tokens")}


@pytest.mark.parametrize("kind", [".gz", ".zst", ".parquet", ".gz twice", ".zst twice"])
def test_every_kind_gives_the_same_documents(tmp_path, piece, kind):
    """The rows of a .jsonl file, packed or as a parquet file of several row groups, have the same
    tokens in the same order; also when the packed file is two that were put together."""
    plain = write_rows(tmp_path / "plain.jsonl", [{"content": text, "n": 1} for text in TEXTS])
    raw, (suffix, *twice) = plain.read_bytes(), kind.split()
    if suffix == ".parquet":
        columns = {"n": [1] * len(TEXTS), "content": TEXTS}
        other = write_parquet(tmp_path / "other.parquet", columns, row_group_size=150)
    else:
        other = tmp_path / f"other.ndjson{suffix}"
        half = len(raw) // 2 if twice else len(raw)
        other.write_bytes(PACK[suffix](raw[:half]) + (PACK[suffix](raw[half:]) if twice else b""))
    made = []
    for path in (plain, other):
        out = tmp_path / path.stem
        meta = prepare({"s": [path]}, out, BYTES, field="content", progress=False)
        assert not meta["skipped"]
        made.append((shards(out), meta["sources"]))
    assert made[0] == made[1]
    found = [documents_in(out, meta, split)["s"] for split in ("train", "val")]
    assert sorted(found[0] + found[1]) == sorted(TEXTS)


@pytest.mark.parametrize("suffix", PACK)
def test_a_packed_text_file(tmp_path, piece, suffix):
    """A text file has the same documents when it is packed."""
    text = "".join(f"Line {i} of a text.\n" * 9 for i in range(900))
    (tmp_path / "plain.txt").write_text(text)
    (tmp_path / f"packed.txt{suffix}").write_bytes(PACK[suffix](text.encode()))
    metas = [
        prepare({"s": [tmp_path / name]}, tmp_path / f"out-{name}", BYTES, progress=False)
        for name in ("plain.txt", f"packed.txt{suffix}")
    ]
    assert metas[0] == metas[1]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("damage", ["cut off", "a wrong byte", "no such format"])
def test_a_damaged_packed_file(tmp_path, monkeypatch, suffix, damage):
    """Of a packed file that is cut off or has a wrong byte, what comes before is read, and the rest
    is told. Other files are read. (In zeros zlib finds a few letters before it finds damage.)"""
    for module in (preparing, textfiles):
        monkeypatch.setattr(module, "PIECE", 900)
    lines = [json.dumps({"text": f"{os.urandom(200).hex()} {i}"}) + "\n" for i in range(2000)]
    packed = bytearray(PACK[suffix]("".join(lines).encode()))
    if damage == "cut off":
        packed = packed[: len(packed) * 3 // 4]
    elif damage == "a wrong byte":
        packed[len(packed) * 3 // 4 :] = bytes(len(packed) - len(packed) * 3 // 4)
    else:
        packed[:40] = bytes(40)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed)
    write_rows(tmp_path / "b.jsonl", [{"text": text} for text in words(30)])
    meta = prepare({"s": [tmp_path]}, tmp_path / "out", BYTES, progress=False)
    ((path, detail),) = meta["skipped"]["a file that cannot be read to its end"]["examples"]
    assert path.endswith(f"a.jsonl{suffix}") and detail.startswith("after ")
    found = [documents_in(tmp_path / "out", meta, split)["s"] for split in ("train", "val")]
    known = {json.loads(line)["text"] for line in lines}
    read = [text for text in found[0] + found[1] if text not in words(30)]
    assert len(set(read) - known) <= (damage == "a wrong byte" and suffix == ".gz")
    assert len(found[0] + found[1]) == len(read) + 30
    assert len(read) > 500 if damage != "no such format" else not read


def test_parquet_columns_that_are_no_text(tmp_path):
    """A column that is missing, or numbers, or empty cells: counted, with the row."""
    texts = ["a", None, "", "b", *words(20)]
    write_parquet(tmp_path / "a.parquet", {"text": texts})
    write_parquet(tmp_path / "b.parquet", {"text": [1, 2]})
    write_parquet(tmp_path / "c.parquet", {"title": ["x"], "body": ["y"]})
    (tmp_path / "d.parquet").write_bytes(b"PAR1 but no more")
    meta = prepare({"s": [tmp_path]}, tmp_path / "out", BYTES, progress=False)
    skipped = {reason: found["examples"] for reason, found in meta["skipped"].items()}
    details = [detail for _, detail in skipped["the field 'text' must be text"]]
    assert details == ["row 2: it is NoneType", "row 1: it is int", "row 2: it is int"]
    assert [detail for _, detail in skipped["an empty text"]] == ["row 3"]
    details = [detail for _, detail in skipped["a file that cannot be read to its end"]]
    assert "the column 'text' is missing; there are title, body" in details[0] and len(details) == 2


def test_packages_that_cannot_be_imported(tmp_path, monkeypatch):
    """Where an optional package is missing, or is there and broken, the error names the files'
    number, what installs the package and what the import says, before the work."""
    for name in ("a.jsonl.zst", "b.jsonl.zst", "c.parquet", "d.txt"):
        (tmp_path / name).write_text("x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    monkeypatch.delitem(sys.modules, "pyarrow", raising=False)
    stub = tmp_path / "stub" / "pyarrow.py"
    stub.parent.mkdir()
    stub.write_text("raise ImportError('libarrow.so is of another version')")
    monkeypatch.syspath_prepend(stub.parent)
    with pytest.raises(ValueError) as error:
        prepare({"s": [tmp_path]}, tmp_path / "out", BYTES, progress=False)
    assert "2 .zst files need a package: pip install zstandard" in str(error.value)
    assert (
        "1 .parquet files need a package: pip install pyarrow "
        "(libarrow.so is of another version)" in str(error.value)
    )
    assert not (tmp_path / "out").exists()


def test_thousands_of_files(tmp_path):
    """Two thousand small files, three of them empty, in folders of folders with a loop of links,
    are the documents of the files in their order; what is empty is told."""
    texts = {}
    for i in range(2000):
        path = tmp_path / "in" / f"{i % 7}" / f"{i:04}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if i % 700 == 5 else f"document {i}")
        if i % 700 != 5:
            texts[path] = f"document {i}"
    (tmp_path / "in" / "3" / "up").symlink_to("..")
    (tmp_path / "in" / "loop").symlink_to("loop")
    meta = prepare({"s": [tmp_path / "in"]}, tmp_path / "out", BYTES, progress=False)
    assert meta["skipped"]["an empty file"]["count"] == 3
    expected = [texts[path] for path in sorted(texts)]
    found = {split: documents_in(tmp_path / "out", meta, split)["s"] for split in ("train", "val")}
    assert sorted(found["train"] + found["val"]) == sorted(expected)
    for part in found.values():
        assert part == [text for text in expected if text in set(part)]


def test_a_file_that_vanishes(tmp_path, monkeypatch):
    """A file that goes away, or may not be read, while others are read, is told, not an error."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    whole = textfiles.read_bytes

    def read_bytes(path, at):
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied")
        return whole(path, at)

    monkeypatch.setattr(textfiles, "read_bytes", read_bytes)
    meta = prepare({"s": [tmp_path]}, tmp_path / "out", BYTES, progress=False)
    ((path, detail),) = meta["skipped"]["a file that cannot be read to its end"]["examples"]
    assert path.endswith("b.txt") and "Permission denied" in detail


@pytest.mark.parametrize("length", [8_999, 9_000, 30_000, 200_000])
@pytest.mark.parametrize("at_end", [False, True])
def test_a_long_line(tmp_path, monkeypatch, length, at_end):
    """A line of LONGEST bytes or more is left out; the lines before and after it keep their
    numbers, whatever the size of a part."""
    for piece in (100, 5_000):
        monkeypatch.setattr(textfiles, "PIECE", piece)
        monkeypatch.setattr(textfiles, "LONGEST", 9_000)
        monkeypatch.setattr(textfiles, "BLOCK", 1_000)
        rows = [json.dumps({"text": f"text {i}"}) for i in range(20)]
        long = json.dumps({"text": "x" * (length - len(json.dumps({"text": ""})))})
        assert len(long) == length
        lines = [*rows, long] if at_end else [*rows[:9], long, *rows[9:], "broken"]
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(lines))
        parts = list(read_parts(path, "text"))
        found = [one for part in parts for one in documents(part, "text")]
        texts = [one.text for one in found if isinstance(one, Document)]
        assert [text for text in texts if len(text) < 10] == [f"text {i}" for i in range(20)]
        bad = [one.detail for one in found if isinstance(one, Skipped)]
        line = "line 21" if at_end else "line 10"
        assert (line in bad) == (length >= 9_000) and (len(texts) == 21) == (length < 9_000)
        assert at_end or any(detail.startswith("line 22: Expecting") for detail in bad)
        assert parts[-1].end[0] == path.stat().st_size


def peak_of_reading(path):
    """(unpacked bytes or rows, MiB at the peak beyond those of Python at its start)."""
    program = """if True:
        import pathlib, sys, textfiles
        # ru_maxrss would begin at what the process that starts this one has
        status = pathlib.Path("/proc/self/status")
        peak = lambda: int(status.read_text().split("VmHWM:")[1].split()[0]) >> 10
        before, size = peak(), 0
        for part in textfiles.read_parts(pathlib.Path(sys.argv[1]), "text"):
            size += part.end[0] - size
            for found in textfiles.documents(part, "text"):
                pass
        print(size, peak() - before)"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", program, str(path)]
    return map(int, subprocess.check_output(command, env=environment).split())


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".jsonl.gz", ".txt.zst"])
def test_memory_does_not_depend_on_the_line(tmp_path, suffix):
    """A file with one line of 200 MB is read in less than 100 MB more than Python has at its
    start."""
    path = tmp_path / f"long{suffix}"
    block, n = b"ab " * 333_333, 200
    if suffix.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard", reason="pip install zstandard")
        with open(path, "wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as file:
            for _ in range(n):
                file.write(block)
    else:
        with gzip.open(path, "wb", 1) if suffix.endswith(".gz") else open(path, "wb") as file:
            file.writelines(block for _ in range(n))
    size, peak = peak_of_reading(path)
    assert size == n * len(block) and peak < 100


def test_memory_does_not_depend_on_the_rows(tmp_path):
    """A parquet file with 12 rows of 10 MB, each in a page of its own, is read in less memory than
    all of them take at once, twice (as pyarrow's, and as Python's)."""
    rows = [chr(97 + i) * 10_000_000 for i in range(12)]
    options = {"use_dictionary": False, "write_batch_size": 1}
    path = write_parquet(tmp_path / "large.parquet", {"text": rows}, **options)
    size, peak = peak_of_reading(path)
    assert size == 12 and peak < 200


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("behind", ["garbage", "one that is cut off"])
def test_what_comes_before_the_damage_is_kept(tmp_path, suffix, behind):
    """Of a whole packed file with something else behind it, all documents are read, though they are
    less than a part; of the rest the damage is told. Zeros behind it are no damage."""
    raw = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    other = PACK[suffix](os.urandom(10_000))[:5_000] if behind != "garbage" else b"garbage"
    path = tmp_path / f"a.jsonl{suffix}"
    for rest, is_damage in ((other, True), (bytes(600), False)):
        path.write_bytes(PACK[suffix](raw) + rest)
        found = [one for part in read_parts(path, "text") for one in documents(part, "text")]
        assert [one.text for one in found if isinstance(one, Document)] == TEXTS
        told = [one.detail for one in found if isinstance(one, Skipped)]
        assert any("after " in detail for detail in told) == is_damage


def test_a_text_that_is_cut_off_is_read_up_to_there(tmp_path):
    """Of a .gz that is cut off nearly all of its text is read, not only whole parts of it."""
    text = "".join(f"{os.urandom(20).hex()}\n" for _ in range(20_000))
    packed = gzip.compress(text.encode())
    (tmp_path / "a.txt.gz").write_bytes(packed[: len(packed) * 9 // 10])
    parts = list(read_parts(tmp_path / "a.txt.gz", "text"))
    assert [part.kind for part in parts] == ["text", "damage"]
    assert 0.85 * len(text) < parts[0].size < 0.95 * len(text)
    assert text.encode().startswith(parts[0].contents)


def test_a_resumed_file_begins_where_it_was(tmp_path):
    """The parts of every kind of file that come after any of its parts are read from there on: so a
    preparation goes on."""
    rows = [{"text": text} for text in TEXTS]
    paths = [write_rows(tmp_path / "rows.jsonl", rows)]
    raw = paths[0].read_bytes()
    for suffix, pack in PACK.items():
        paths.append(tmp_path / f"rows.jsonl{suffix}")
        paths[-1].write_bytes(pack(raw))
    paths.append(tmp_path / "text.txt")
    paths[-1].write_text("\n".join(TEXTS * 20))
    columns = {"text": TEXTS}
    paths.append(write_parquet(tmp_path / "rows.parquet", columns, row_group_size=90))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfiles, "PIECE", 3000)
        patch.setattr(textfiles, "CUT_AT_LAST", 300)
        for path in paths:
            parts = list(read_parts(path, "text"))
            assert len(parts) > 5
            for k, part in enumerate(parts):
                assert list(read_parts(path, "text", part.end)) == parts[k + 1 :]


def test_unpacking_zstd_is_bounded_and_whole():
    """However small the packed file, what is unpacked at a time is bounded; what comes out is what
    went in."""
    raw = bytes(30_000_000)
    packed = pack_zst(raw)
    file = textfiles.unpack(Path("a.zst"), io.BytesIO(packed))
    assert len(packed) < 4_000 and file.read() == raw


def test_shards_by_hand(tmp_path):
    """A shard is 16 bytes of header and the tokens: other programs may rely on it."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in words(50)])
    meta = prepare({"s": [rows]}, tmp_path / "out", BYTES, progress=False)
    entry = meta["sources"][0]["train"]
    raw = (tmp_path / "out" / entry["shard"]).read_bytes()
    assert raw[:16] == b"FLMtoken" + (2).to_bytes(4, "little") + (2).to_bytes(4, "little")
    assert (
        len(raw) == 16 + 2 * entry["tokens"] == 16 + 2 * len(shard_tokens(tmp_path / "out", entry))
    )
