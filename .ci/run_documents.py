"""Run what the documents show: python .ci/run_documents.py README.md tutorials/*.md

Works in a scratch copy of the repository, on one file after the other. The lines of a ```sh block
are commands (a block with a here-document is one command). All ```python blocks of a file are
pasted into one interactive Python (`python -i`), with an empty line after each block: a traceback
is a failure, and so is a line that only a file may hold. A comment on the line above a block says
what runs in its place:

    <!-- ci: python train.py --steps 20 -->      a shorter form (several commands: joined by &&)
    <!-- ci: skip, needs a GPU -->               nothing, and why

Stops with exit code 1 at the first failure, and names the block."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"(?:<!-- ci: (?P<instead>.*?) -->\n)?^```(?P<kind>sh|python)\n(?P<body>.*?)^```", re.M | re.S
)
LEFT_OUT = shutil.ignore_patterns(
    ".git", "runs", "corpora", ".venv", "__pycache__", ".pytest_cache", ".hypothesis"
)


ERROR = re.compile(r"^Traceback \(most recent call last\):|^\w*(Syntax|Indentation)Error:", re.M)


def run(command: str | list[str], place: str, folder: Path, pasted: str | None = None):
    """Run one command in `folder` and print a line; after a failure print its output and exit.

    pasted: what an interactive Python reads. Its exit code is 0 after an error, too."""
    start = time.time()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PATH": path},
        input=pasted or "",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        shell=isinstance(command, str),
    )
    failed = done.returncode or (pasted and ERROR.search(done.stdout))
    verdict = "FAILED" if failed else "ok"
    shown = command.splitlines()[0] if isinstance(command, str) else "its python blocks"
    print(f"{verdict} {time.time() - start:6.1f} s  {place}: {shown}", flush=True)
    if failed:
        print(done.stdout[-5000:])
        sys.exit(1)


def commands(text: str) -> list[str]:
    """The commands of a ```sh block: its lines, or all of it where it holds a here-document."""
    text = text.replace("\\\n", " ")
    if "<<" in text:
        return [text]
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def run_file(file: str, folder: Path) -> int:
    """Run what one document shows; returns the number of commands that ran."""
    text, program, ran = Path(file).read_text(), [], 0
    for block in BLOCK.finditer(text):
        place = f"{file}:{text[: block.start('kind')].count(chr(10)) + 1}"
        instead = block["instead"]
        if instead and instead.startswith("skip"):
            print(f"--           {place}: {instead}")
        elif block["kind"] == "python":
            program.append(instead or block["body"])
        else:
            for command in commands(instead or block["body"]):
                run(command, place, folder)
                ran += 1
    if program:
        run([sys.executable, "-i", "-q"], file, folder, pasted="\n".join(program) + "\n")
        ran += 1
    return ran


def main(files: list[str]):
    with tempfile.TemporaryDirectory() as work:
        shutil.copytree(ROOT, work, dirs_exist_ok=True, ignore=LEFT_OUT)
        ran = sum(run_file(file, Path(work)) for file in files)
    print(f"{ran} passed, 0 failed")


if __name__ == "__main__":
    main(sys.argv[1:])
