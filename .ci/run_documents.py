"""Run what the documents show: python .ci/run_documents.py README.md tutorials/*.md

Works in a scratch copy of the repository, in the order given. A ```sh block's lines are commands (a block with a here-document is one); a file's ```python blocks
are one program. A comment on the line above a block says what runs in its place:

    <!-- ci: python train.py --steps 20 -->      a shorter form (several: joined by &&)
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
BLOCK = re.compile(r"(?:<!-- ci: (?P<instead>.*?) -->\n)?^```(?P<kind>sh|python)\n(?P<body>.*?)^```", re.M | re.S)


def run(command, place, work):
    start = time.time()
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=work, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, shell=isinstance(command, str))
    shown = command if isinstance(command, str) else "its python blocks"
    print(f"{'ok' if done.returncode == 0 else 'FAILED'} {time.time() - start:6.1f} s  {place}: {shown.splitlines()[0]}", flush=True)
    if done.returncode:
        print(done.stdout[-5000:])
        sys.exit(1)


def main(files):
    ran = 0
    with tempfile.TemporaryDirectory() as work:
        shutil.copytree(ROOT, work, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git", "runs", "corpora", ".venv", "__pycache__", ".pytest_cache", ".hypothesis"))
        for file in files:
            text = Path(file).read_text()
            program = []
            for block in BLOCK.finditer(text):
                place = f"{file}:{text[:block.start('kind')].count(chr(10)) + 1}"
                instead = block["instead"]
                if instead and instead.startswith("skip"):
                    print(f"--           {place}: {instead}")
                elif block["kind"] == "python":
                    program.append(instead or block["body"])
                else:
                    lines = instead or block["body"].replace("\\\n", " ")
                    for command in [lines] if "<<" in lines else (line.strip() for line in lines.splitlines()):
                        if command and not command.startswith("#"):
                            run(command, place, work)
                            ran += 1
            if program:
                (Path(work) / "_snippets.py").write_text("\n".join(program))
                run([sys.executable, "_snippets.py"], file, work)
                ran += 1
    print(f"{ran} passed, 0 failed")


if __name__ == "__main__":
    main(sys.argv[1:])
