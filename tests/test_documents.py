"""The Python of the documents can be pasted into a terminal, block after block, and their links
lead somewhere.

`.ci/run_documents.py` pastes the blocks of each document into `python -i`, which reads them line by
line, as it does in a terminal. Here it is checked that it accepts all lines, and one chapter is
pasted into a real terminal. A terminal has no rules for lines of its own, and to paste a chapter
takes as long as to run it; so the others are not."""

import codeop
import os
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

from course.assignments import ASSIGNMENTS

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


def cells(path: Path) -> list[str]:
    """The code cells of a chapter that was opened as a notebook."""
    jupytext = pytest.importorskip("jupytext", reason="pip install jupytext")
    notebook = jupytext.reads(path.read_text(encoding="utf-8"), fmt="md")
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", sorted(ROOT.glob("tutorials/0*.md")), ids=lambda path: path.name)
def test_a_chapter_is_a_notebook(path):
    """Its code cells are the chapter's blocks in their order: Python as it stands, commands after
    %%sh, and no cell of anything else."""
    text = re.sub(r"^```sh\n", "```python\n%%sh\n", path.read_text(encoding="utf-8"), flags=re.M)
    assert cells(path) == [block.strip("\n") for block in BLOCK.findall(text)]


def test_the_plans_of_the_course_name_every_assignment():
    """Each assignment has its row and its chapter, the week and the term name each of them, and the
    minutes of a plan are the sum of its assignments'."""
    text = (ROOT / "course/README.md").read_text(encoding="utf-8")
    table, _, plans = text.partition("## Plans")
    rows = re.findall(r"^\| `(\w+)` \| (\d) \|.*\| (\d+) \|$", table, flags=re.M)
    assert {name: int(chapter) for name, chapter, _ in rows} == {
        name: assignment.chapter for name, assignment in ASSIGNMENTS.items()
    }
    minutes = {name: int(number) for name, _, number in rows}
    week, term = plans.split("**One week.**")[1].split("**A term")
    for plan in week, term.partition("**To prepare")[0]:
        assert {*re.findall(r"`(\w+)`", plan)} == {*minutes}
        for named, total in re.findall(r"\| (`[^|]*`) \| (\d+) \|", plan):
            assert sum(minutes[name] for name in re.findall(r"\w+", named)) == int(total)
    two_hours = plans.partition("**One week.**")[0]
    assert sum(map(int, re.findall(r"^\| (\d+) \|", two_hours, flags=re.M))) == 120


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


# --------------------------------------------------------------------------------------------------
# The script for Slurm, with programs in place of Slurm's

SLURM = {
    "scontrol": """[ "$1" = requeue ] && echo "back into the queue: $2" || echo host1""",
    "scancel": """kill -TERM "$(cat srun.pid)" """,
    "srun": """echo $$ >srun.pid
[ -z "${CODE-}" ] || exit "$CODE"
trap 'echo saved; exit 1' TERM
kill -USR1 $PPID
for i in {1..600}; do sleep 0.1; done""",
}


@pytest.mark.parametrize(
    "environment, code, printed",
    [
        ({}, 1, ["saved", "back into the queue: 7"]),  # the time of the job is nearly over
        ({"CODE": "1"}, 1, ["back into the queue: 7"]),  # a host is lost
        ({"CODE": "0"}, 0, []),
        ({"CODE": "1", "SLURM_RESTART_COUNT": "20"}, 1, []),
    ],
)
def test_the_slurm_script_saves_and_goes_back_into_the_queue(tmp_path, environment, code, printed):
    """After Slurm's signal it waits until the ranks have saved, and asks for a new start; so it does
    after an accident, but neither at the end of the run nor after 20 starts."""
    text = (ROOT / "tutorials" / "05b-cluster.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```sh\n(#!/bin/bash\n#SBATCH.*?)^```", text, re.M | re.S)
    for name, body in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "host[1-2]"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.splitlines()) == (code, printed), done.stderr
