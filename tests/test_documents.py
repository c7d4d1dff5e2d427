"""The Python of the documents can be pasted into a terminal, block after block, and their links
lead somewhere.

`.ci/run_documents.py` runs all of it; here the structure of all blocks is checked, and one chapter
is pasted into a real terminal."""

import codeop
import os
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("tutorials/*.md"), *ROOT.glob("course/*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
ERROR = re.compile(r"^Traceback \(most recent call last\):|^\w*(Syntax|Indentation)Error:", re.M)

pytestmark = pytest.mark.quick


def blocks(path: Path) -> list[str]:
    return BLOCK.findall(path.read_text(encoding="utf-8"))


def first_refused_line(block: str) -> str | None:
    """The line at which an interactive Python refuses a block, or None. It reads line by line; an
    empty line ends what is indented."""
    compiler, lines = codeop.CommandCompiler(), []
    for line in [*block.splitlines(), ""]:
        lines.append(line)
        try:
            if compiler("\n".join(lines), "<stdin>", "single"):
                lines = []
        except SyntaxError:
            return line
    return lines[0] if any(lines) else None


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_an_interactive_python_accepts_every_block(path):
    """No line of a block is one that a file may hold and a terminal refuses."""
    for block in blocks(path):
        refused = first_refused_line(block)
        assert refused is None, f"{path.name}: a terminal refuses the line {refused!r}"


@pytest.mark.parametrize(
    "block",
    ["for i in 1, 2:\n    print(i)\nprint(3)\n", "def f():\n    x = 1\n\n    return x\n", "f(1,\n"],
)
def test_what_only_a_file_may_hold_is_found(block):
    """A line right after a loop, an empty line inside a function, and half a statement."""
    assert first_refused_line(block) is not None
    assert first_refused_line("for i in 1, 2:\n    print(i)\n\nprint(3)\n") is None


def anchors(path: Path) -> set[str]:
    """Where a link into a document may lead, as GitHub names its headings, and its own anchors."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    names = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return {*names, *re.findall(r'<a id="([^"]+)">', text)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    """A link's file is there and has the link's anchor. A link to the glossary that is not named
    after it goes to a word."""
    text = path.read_text(encoding="utf-8")
    for words, target in re.findall(r"\[([^][]+)\]\(([^()\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if file.startswith("http"):
            continue
        where = path.parent / file if file else path
        assert where.exists(), f"{path.name}: there is no {file}"
        assert not anchor or anchor in anchors(where), f"{path.name}: {file} has no #{anchor}"
        named = anchor or where.name != "glossary.md" or words == "glossary"
        assert named, f"{path.name}: [{words}] goes to the top of the glossary, not to a word"


def test_no_two_words_of_the_glossary_share_an_anchor():
    text = (ROOT / "tutorials/glossary.md").read_text(encoding="utf-8")
    own = re.findall(r'<a id="([^"]+)">', text)
    assert len(own) > 40 and len(set(own)) == len(own)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    assert not {heading.lower().replace(" ", "-") for heading in headings} & {*own}


def paste(text: str, folder: Path) -> str:
    """What a terminal shows after `text` was pasted into the Python that runs in it."""
    import pty  # not on Windows

    ours, theirs = pty.openpty()
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHON_BASIC_REPL": "1",
        "OMP_NUM_THREADS": "1",
        "TERM": "dumb",
    }
    python = subprocess.Popen(
        [sys.executable, "-q"], stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder,
        env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)
    rest, shown = (text + "\nexit()\n").encode(), b""
    while True:
        readable, writable, _ = select.select([ours], [ours] if rest else [], [])
        if writable:
            rest = rest[os.write(ours, rest[:256]) :]
        if readable:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # the terminal is closed
                break
    python.wait()
    os.close(ours)
    return shown.decode(errors="replace").replace("\r", "")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_chapter_is_pasted_into_a_terminal(tmp_path):
    """Chapter 1, pasted at once into a real terminal, ends without an error and prints its last
    numbers. A mistake that is pasted in the same way is seen."""
    chapter = "\n".join(blocks(ROOT / "tutorials/01-model.md"))
    shown = paste(chapter, tmp_path)
    assert "101,701,570,560 parameters, 203 GB in bf16" in shown
    assert not ERROR.search(shown), shown[-3000:]
    assert ERROR.search(paste("for i in 1, 2:\n    print(i)\nprint(3)\n", tmp_path))
