"""The command line of iqeval.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_iqeval_scoring import tiny_checkpoint

import iqeval
from iqeval import TASKS

ROOT = Path(__file__).resolve().parent.parent


def refusal(function, *args, **kwargs) -> str:
    """The message of the ValueError that a call raises."""
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


BAD_REQUESTS = [
    ("head-slicing", {"length": 1}, "length = 1 must be a whole number from 3 to 100,000"),
    ("entailment-en", {"people": 1}, "has no knob 'people': it has labels, shots, chain"),
    ("entailment-en", {"labels": "emoji"}, "labels = 'emoji' must be symbols or words"),
    ("head-tail", {"n": 0}, "0 items of head-tail"),
    ("head-tail", {"split": "test"}, "from train or eval"),
    ("full-repeating", {"n": 5000, "length": 2}, "different eval queries, not 5000"),
    ("full-repeating", {"length": 10, "people": 3}, "no knob 'people'"),
]


@pytest.mark.parametrize("name, request_, part", BAD_REQUESTS)
def test_a_task_says_what_it_cannot_make(name, request_, part):
    """The value, and what is allowed."""
    assert part in refusal(TASKS[name].generate, **{"n": 1, "seed": 0, **request_})


def test_a_name_that_is_no_task_gets_the_nearest():
    """And the names of all; a dataset's name is answered with the command that reads it."""
    assert "did you mean head-tail" in refusal(iqeval.find_task, "headtail")
    assert "python -m lab.datasets" in refusal(iqeval.find_task, "boolq")


def test_run_tells_everything_that_is_wrong_at_once(tmp_path):
    """One screen for all mistakes, before any model is loaded."""
    words = ["run", "somewhere", "--batch-size", "0", "--out", str(tmp_path)]
    words += ["--tasks", "headtail", "single-fact", "--items", "0"]
    text = refusal(iqeval.main, [*words, "--set", "sentences=x", "sentences=3"])
    for part in (
        "--batch-size 0",
        f"--out {tmp_path}",
        "did you mean head-tail",
        "sentences=...: given twice",
        "--items 0: ask for 1 to 100,000",
    ):
        assert part in text
    text = refusal(iqeval.main, ["run", "somewhere", "--set", "colour=3", "length"])
    assert "length: not in the form --set KNOB=VALUE" in text
    text = refusal(iqeval.main, [*words, "--set", "colour=3", "sentences=1"])
    assert "--set colour=3: none of these tasks has that knob" in text
    assert "sentences = 1 must be a whole number from 2 to" in text


def test_run_writes_a_table_and_json(tmp_path, capsys):
    """Every item's answer is in the file, the table agrees with it, symbolic tasks come with their
    words."""
    folder, out = tiny_checkpoint(tmp_path / "run").parent, tmp_path / "result.json"
    words = ["run", str(folder), "--tasks", "head-slicing", "sense-en", "--items", "4"]
    iqeval.main([*words, "--set", "length=3", "--out", str(out), "--device", "cpu"])
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert list(result["tasks"]) == ["head-slicing", "sense-en", "sense-en-words"]
    assert all(part in printed for part in ("chance", "FLM-101B", "63.00", "12 items"))
    for name, r in result["tasks"].items():
        assert r["n"] == 4 == len(r["items"])
        assert r["right"] == sum(item["right"] for item in r["items"])
        assert r["accuracy"] == r["right"] / 4
        assert any(f" {name} " in row and f"{100 * r['accuracy']:.1f}" in row
                   for row in printed.splitlines())  # fmt: skip


def test_show_prints_tasks_or_items(capsys):
    """Without a task every task's name; with one its prompts, their answers marked."""
    iqeval.main(["show"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in TASKS)
    iqeval.main(["show", "head-tail", "--items", "2", "--seed", "5"])
    shown, items = capsys.readouterr().out, TASKS["head-tail"].generate(2, 5)
    assert all(f"{item.prompt} \u27e6{item.answer}\u27e7" in shown for item in items)


def test_mistakes_from_outside(tmp_path):
    """One screen and exit code 2, no traceback; a reader that goes away is no error."""
    words = [sys.executable, "iqeval.py", "run", str(tmp_path / "none"), "--tasks", "singlefact"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "did you mean single-fact" in done.stderr and len(done.stderr.splitlines()) < 20
    command = f"{sys.executable} iqeval.py show two-facts --items 60 | head -1"
    piped = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, shell=True)
    assert piped.stderr == "" and piped.stdout.startswith("---")
