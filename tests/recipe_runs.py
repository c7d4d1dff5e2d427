"""The recipe --quick, undisturbed and killed: python tests/recipe_runs.py FOLDER

To start Python with PyTorch takes longer than to train a model of the recipe. So this program
imports once, and forks for each start of the recipe. FOLDER/quick has a recipe that nothing
disturbs: it trains two models at a time, each in a process of its own, forked as well. In
FOLDER/killed the same command is killed at each of PLACES, stopped with Ctrl-C at another one, and
then started once more; it trains in its own process. FOLDER/killed/done.json has what was finished
when it was killed."""

import gc
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from small_runs import train_here
from tqdm import tqdm

import console
from lab import recipe, runs

WORDS = ["--quick", "--control", "--jobs", "2"]
PLACES = (  # what is in the folder when the recipe is killed
    "search/*/metrics.jsonl",
    "narrow/w0024-seed1/metrics.jsonl",
    "prediction.json",
    "train/grown/step-00000010/checkpoint.json",
    "evaluation-stage-1.json",
)
STOPPED = "evaluation-stage-2.json"  # where Ctrl-C stops it


def in_fork(folder: Path, work: Callable) -> int:
    """Call work() in a forked process, in a folder; what it prints is added to FOLDER/log. Returns
    the exit code: 0 where work() returned."""
    folder.mkdir(exist_ok=True)
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        os.chdir(folder)
        with open("log", "a") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        work()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def undisturbed():
    """The recipe; its models are trained in processes of their own."""
    fork = multiprocessing.get_context("fork")
    with mock.patch.object(multiprocessing, "get_context", lambda kind: fork):
        recipe.main(WORDS)


def in_one_process(place: str | None = None, kind: str = "SIGKILL"):
    """The recipe; its models are trained in this process. It gets that signal, once, as soon as it
    opens a file when `place` is there: no clock decides where."""
    out, left = Path("runs/recipe"), [kind] if place else []

    def kill(event: str, arguments: tuple):
        if event == "open" and left and list(out.glob(place)):
            os.kill(os.getpid(), getattr(signal, left.pop()))

    sys.addaudithook(kill)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    runs.train_jobs = train_here
    console.run(lambda: recipe.main(WORDS), recipe.STOPPED)


def finished(out: Path) -> dict[str, int]:
    """The time stamps of the finished runs that no part goes on with."""
    found = {}
    for config in out.glob("*/*/config.json"):
        if runs.read_finished(config.parent) and config.parent.parent.name != "train":
            found[str(config)] = config.stat().st_mtime_ns
    return found


def main(folder: Path):
    gc.freeze()  # see conftest.py
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread: a fork may not have a second one
    runs.machine.matmul_rate = lambda *arguments: 1e12  # takes longer than these runs
    code = in_fork(folder / "quick", undisturbed)
    if code:
        sys.exit((folder / "quick/log").read_text()[-3000:])
    done = {}
    for place in PLACES:
        code = in_fork(folder / "killed", lambda place=place: in_one_process(place))
        if code != -signal.SIGKILL:
            sys.exit(f"{place}: exit code {code}\n{(folder / 'killed/log').read_text()[-3000:]}")
        done = finished(folder / "killed/runs/recipe") | done
    code = in_fork(folder / "killed", lambda: in_one_process(STOPPED, "SIGINT"))
    words = (folder / "killed/log").read_text()
    if code != 130 or not words.endswith(f"{recipe.STOPPED}\n"):
        sys.exit(f"Ctrl-C: exit code {code}\n{words[-3000:]}")
    done = finished(folder / "killed/runs/recipe") | done
    (folder / "killed/done.json").write_text(json.dumps(done))
    code = in_fork(folder / "killed", in_one_process)
    if code:
        sys.exit((folder / "killed/log").read_text()[-3000:])


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
