"""Which files are read, which are not, and what the user is told about the others."""

import bz2
import gzip
import json
import lzma
import shlex
import sysconfig
import tempfile
from pathlib import Path

import pytest
from data_helpers import BYTES, documents_in, write_rows
from hypothesis import given
from hypothesis import strategies as st

import data
import textfiles
from prepare import prepare, read_meta
from textfiles import Skipped, documents, find_files, read_parts


def read(path, field="text"):
    """The documents of a file and what is none, part after part."""
    return [found for part in read_parts(path, field) for found in documents(part, field)]


@pytest.mark.parametrize("piece", [1000, 1 << 16])
def test_a_file_of_several_parts(tmp_path, monkeypatch, piece):
    """A file of several parts whose characters straddle the borders comes out whole, without its
    byte order mark. One bad byte far inside costs the document around it, and is reported with its
    offset."""
    monkeypatch.setattr(textfiles, "PIECE", piece)
    text = "x" + "语言\n" * 40_000  # 7 bytes a line
    path = tmp_path / "long.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert "".join(document.text for document in read(path)) == text
    for place in (0, 5, piece - 1, piece, piece + 1, 199_000):
        raw = bytearray(b"y" * 200_000)
        raw[place] = 0xFF
        path.write_bytes(raw)
        found = read(path)
        (bad,) = [one for one in found if isinstance(one, Skipped)]
        assert f"the byte at offset {place} fits no UTF-8 character" in bad.detail
        assert sum(len(one.text) for one in found if one is not bad) >= 200_000 - (1 << 16) - 3
    path.write_bytes(b"abc\xe8\xaf")  # a character cut off by the end of the file
    assert "offset 3 " in read(path)[0].detail


def test_stdlib_files():
    """The embedded corpus: sorted Python files, several megabytes, without tests and installed
    packages."""
    files = textfiles.stdlib_files()
    assert files == sorted(files) and all(path.suffix == ".py" for path in files)
    assert sum(path.stat().st_size for path in files) > 5_000_000
    assert {"argparse.py", "typing.py"} <= {path.name for path in files}
    root = Path(sysconfig.get_paths()["stdlib"])
    parts = {part for path in files for part in path.relative_to(root).parts}
    assert parts.isdisjoint({"test", "tests", "site-packages"})


def test_folders_are_walked(tmp_path):
    """A folder gives its text files of the stated suffixes, sorted; hidden ones and others stay
    out. A file given by itself may have any suffix."""
    names = "b.txt a/z.MD a/deep/code.py rows.jsonl picture.png .git/x.txt .hidden.txt".split()
    names += "c.TXT.gz d.jsonl.zst e.parquet f.gz g.png.gz".split()
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    found = [path.relative_to(tmp_path).as_posix() for path in find_files(tmp_path)]
    assert found == "a/deep/code.py a/z.MD b.txt c.TXT.gz d.jsonl.zst e.parquet rows.jsonl".split()
    assert find_files(tmp_path / "picture.png") == [tmp_path / "picture.png"]


def test_links_to_folders_are_followed(tmp_path):
    """A link to a folder gives that folder's files; a link to a folder above ends; two links to one
    folder, or to each other, give its files once."""
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("d/a.txt", "d/sub/b.txt", "other/c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "d" / "more").symlink_to("../other")
    (tmp_path / "d" / "again").symlink_to("../other")
    (tmp_path / "d" / "sub" / "up").symlink_to("..")
    (tmp_path / "other" / "back").symlink_to("../d/sub")
    (tmp_path / "d" / "loop").symlink_to("loop")
    found = find_files(tmp_path / "d")
    assert found == sorted(found) and len(found) == 3
    assert {path.read_text() for path in found} == {"d/a.txt", "d/sub/b.txt", "other/c.txt"}


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    """A folder without permission is an error, not a folder without files."""
    (tmp_path / "d" / "closed").mkdir(parents=True)
    listed = Path.iterdir

    def iterdir(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(PermissionError, match="closed"):
        find_files(tmp_path / "d")


def test_ndjson_is_read_as_json_lines(tmp_path):
    """A .ndjson file is a .jsonl file, in a folder and by itself."""
    rows = [{"text": f"text {i}"} for i in range(3)]
    path = write_rows(tmp_path / "rows.ndjson", rows)
    for number, given_path in enumerate((tmp_path, path)):
        out = tmp_path / str(number)
        meta = prepare({"s": [given_path]}, out, BYTES, progress=False)
        found = [documents_in(out, meta, split)["s"] for split in ("train", "val")]
        assert sorted(found[0] + found[1]) == ["text 0", "text 1", "text 2"]
        (out / "meta.json").unlink()


def test_json_files_with_an_object_a_line(tmp_path, capsys, monkeypatch):
    """A .json file is a .jsonl file, also packed, if its first line is a whole object. Another one
    is left out of a folder, and refused as an INPUT, with the command that makes .jsonl of it."""
    monkeypatch.chdir(tmp_path)
    Path("c4").mkdir()
    rows = [json.dumps({"text": f"text {i}"}) + "\n" for i in range(40)]
    Path("c4", "a.json").write_text("\n" + "".join(rows[:20]))
    Path("c4", "b.json.gz").write_bytes(gzip.compress("".join(rows[20:]).encode()))
    others = {"it's.json": json.dumps(["x"]), "d.json.gz": '{\n "text": "x"\n}'}
    Path("c4", "it's.json").write_text(others["it's.json"])
    Path("c4", "d.json.gz").write_bytes(gzip.compress(others["d.json.gz"].encode()))
    for words in (["c4"], ["c4=c4/a.json", "c4=c4/b.json.gz"]):
        data.main(["prepare", *words, "--out", f"o{len(words)}"])
        sources = read_meta(Path(f"o{len(words)}"))["sources"]
        assert sum(sources[0][split]["documents"] for split in ("train", "val")) == 40
    printed = capsys.readouterr().out
    assert "1 .json: c4/it's.json\n" in printed and "1 .gz: c4/d.json.gz\n" in printed
    with pytest.raises(ValueError) as error:
        data.main(["prepare", *(f"c4/{name}" for name in others), "--out", "o3"])
    commands = [shlex.split(line.split("file: ")[1]) for line in str(error.value).splitlines()]
    assert [words[0] for words in commands] == ["cat", "gzip"]
    assert [words[-1] for words in commands] == ["c4/it's.jsonl", "c4/d.jsonl"]
    assert all("then .[] else . end" in " ".join(words) for words in commands)


def test_one_object_without_the_field_is_no_text_of_a_folder(tmp_path, capsys, monkeypatch):
    """Settings that stand in one line do not stop a folder of texts: they are left out, and told.
    Given by itself, such a file is refused, and so are more lines without the field."""
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    Path("d", "a.txt").write_text("one text")
    Path("d", "b.json").write_text('{"text": "another text"}')
    Path("d", "settings.json").write_text('{"steps": 3}\n\n')
    Path("d", "packed.json.gz").write_bytes(gzip.compress(b'{"steps": 4}'))
    data.main(["prepare", "d", "--out", "texts"])
    meta = read_meta(Path("texts"))
    assert sum(meta["sources"][0][split]["documents"] for split in ("train", "val")) == 2
    assert not meta["skipped"]
    printed = capsys.readouterr().out
    assert "1 .json of one line, without the field 'text': d/settings.json\n" in printed
    assert "1 .gz of one line, without the field 'text': d/packed.json.gz\n" in printed
    Path("rows").mkdir()
    Path("rows", "c.json").write_text('{"steps": 3}\n{"steps": 4}\n')
    for given in ("d/settings.json", "rows"):
        with pytest.raises(ValueError, match="'text' must be text.*there are steps\nTo read a f"):
            data.main(["prepare", given, "--out", "refused"])


@pytest.mark.parametrize("name", ["a.tar", "b.tar.gz", "c.TGZ", "d.tar.zst"])
def test_archives_are_refused(tmp_path, name):
    """An archive is refused before the work, with the command that unpacks it; a folder's archives
    are left out."""
    path = tmp_path / name
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match=f"tar xf {path}"):
        prepare({"s": [path]}, tmp_path / "out", BYTES, progress=False)
    assert not find_files(tmp_path)
    with pytest.raises(
        ValueError, match=r"\.ndjson \.json, each also with \.gz or \.zst, and \.parquet"
    ):
        prepare({"s": [tmp_path]}, tmp_path / "out", BYTES, progress=False)


TEXTS = {
    "UTF-16": "All human beings are born free.\n",
    "UTF-16LE": "All human beings are born free.\n",
    "UTF-32": "All human beings are born free.\n",
    "UTF-16BE": "自然语言处理是人工智能的一个方向。\n",
}


@pytest.mark.parametrize("encoding", TEXTS)
@pytest.mark.parametrize("repeat", [1, 100, 20_000])
def test_the_advice_fits_the_encoding(tmp_path, encoding, repeat):
    """The printed command names the file, quoted, and the encoding in which it says what it said;
    also where the first character outside of ASCII comes late. UTF-16 without a mark is not taken
    for text, though its bytes may be UTF-8."""
    ascii_first = "" if repeat == 1 else "plain\n" * repeat
    text = ascii_first + TEXTS[encoding] * 20
    path = tmp_path / "it's here.txt"
    path.write_bytes(text.encode(encoding))
    advice = [found.detail for found in read(path) if isinstance(found, Skipped)][0]
    command = shlex.split(advice.split(": ")[-1])
    assert command[:2] == ["iconv", "-f"] and command[3:5] == ["-t", "UTF-8"]
    assert command[5:] == [str(path), ">", str(tmp_path / "it's here-utf8.txt")]
    assert path.read_bytes().decode(command[2]) == text


OTHERS = {
    "gbk cp932 euc-jp big5": "自然言語\n",
    "euc-kr": "모든 인간은 태어날 때부터 자유로우며\n",
    "latin1 cp1252": "Tous les êtres humains naissent égaux en dignité.\n",
    "koi8-r cp1251 cp866 iso8859-5": "Все люди рождаются свободными и равными\n",
    "iso8859-7": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι\n",
}
OTHERS = [(name, text) for names, text in OTHERS.items() for name in names.split()]


@pytest.mark.parametrize("encoding, text", OTHERS)
def test_no_encoding_is_better_than_a_wrong_one(encoding, text):
    """Any other encoding the user has to name. A wrong one would write nonsense and report
    success."""
    assert textfiles.iconv_options(text.encode(encoding) * 20) == "-f ENCODING"


@given(st.integers(0, 2000), st.sampled_from([b"\xff", b"\xe8", b"\x80\x80"]))
def test_damaged_utf8_is_no_other_encoding(place, damage):
    """Where most of what is not ASCII is UTF-8, the advice is to leave the damage out."""
    raw = "Füße, 语言, été, は\n".encode() * 100
    assert textfiles.iconv_options(raw[:place] + damage + raw[place:]) == "-c -f UTF-8"


def test_files_that_are_no_text_are_told(tmp_path):
    """Documents that are no text are counted, some named, each with what fits it: a compressed file
    is told to be unpacked, binary data to be left out. What is text is read."""
    text = "hello\n" * 100
    contents = {
        "a.txt": gzip.compress(text.encode()),
        "b.md": bz2.compress(text.encode()),
        "c.jsonl": lzma.compress(text.encode()),
        "e.py": bytes(range(256)) * 10,
        "f.txt": text.encode()[:50] + b"\xff" + text.encode(),
        **{f"g{i}.txt": "é à\n".encode("latin-1") for i in range(10, 20)},
        "good.txt": text.encode(),
        "other.txt": text.encode()[1:],
    }
    for name, raw in contents.items():
        (tmp_path / name).write_bytes(raw)
    meta = prepare({"all": [tmp_path]}, tmp_path / "out", BYTES, progress=False)
    found = meta["skipped"]["not UTF-8 text"]
    assert found["count"] == 15 and len(found["examples"]) == 10
    lines = [": ".join(one).replace(f"{tmp_path}/", "") for one in found["examples"]]
    assert "a.txt: compressed data: gzip -dc a.txt > a-utf8.txt" in lines
    assert "b.md: compressed data: bzip2 -dc b.md > b-utf8.md" in lines
    assert any(line.startswith("c.jsonl: line 1: its byte") for line in lines)
    assert any("e.py: binary data: leave it out" in line for line in lines)
    assert any("f.txt: the byte at offset 50 fits no UTF-8" in line for line in lines)
    texts = [documents_in(tmp_path / "out", meta, split)["all"] for split in ("train", "val")]
    assert sorted(texts[0] + texts[1]) == sorted([text, text[1:]])


@given(st.text(max_size=200))
def test_text_is_text(text):
    """No UTF-8 text is refused for its characters; a few NULs do not matter."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "t.txt")
        path.write_text("some words before" + text + "\0", encoding="utf-8", newline="")
        if text.count("\0") < 5:
            assert not any(isinstance(found, Skipped) for found in read(path))


def test_files_that_are_left_out_are_told(tmp_path, capsys, monkeypatch):
    """What a folder holds and `prepare` does not read is counted by kind and named, ten of each,
    before the work; where nothing is left out, nothing is said."""
    monkeypatch.chdir(tmp_path)
    Path("d/.git").mkdir(parents=True)
    names = ["a.txt", "b.txt", ".hidden.txt", "c.xz", "README", *(f"{i:02}.PNG" for i in range(12))]
    for name in names:
        Path("d", name).write_text(name)
    Path("d", "broken.txt").symlink_to("nowhere")
    data.main(["prepare", "d", "--out", "o"])
    printed = capsys.readouterr().out.split("source  ")[0]
    assert "1 .xz: d/c.xz\n" in printed and "2 hidden: d/.git, d/.hidden.txt\n" in printed
    assert "1 without suffix: d/README\n" in printed
    assert "1 no regular files: d/broken.txt\n" in printed
    assert "12 .png: d/00.PNG, " in printed and "d/09.PNG\n  and 2 more\n" in printed
    assert "10.PNG" not in printed and "a.txt" not in printed
    data.main("prepare s=d/a.txt s=d/b.txt --out p".split())
    assert capsys.readouterr().out.startswith("source  ")
