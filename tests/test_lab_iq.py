"""lab/iq.py: the corpus to learn the IQ tasks from, and the game."""

import io
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from iq_oracles import CLAIMS, STORIES, holds
from test_iqeval_commands import refusal

import data
from flm import PRESETS
from iqeval import TASKS
from lab import iq

ROOT = Path(__file__).resolve().parent.parent


def test_the_corpus_of_make_holds_no_evaluation_item():
    """What is trained on, both signals, holds no evaluation prompt of any seed tried, no claim
    about an evaluation query, and no evaluation story with its question, not even at the end of a
    longer one; and half of the propositions hold."""
    language, teacher = iq.corpus(12_000, 0)
    judged = [f"{row['text']}\n{row['proposition']}" for row in teacher]
    text = "\0".join(["", *(row["text"] for row in language), *judged])
    claimed = {(row["proposition"].split()[0], row["text"]) for row in teacher}
    for name, seed in itertools.product(TASKS, range(3)):
        for item in TASKS[name].generate(100, seed):
            assert "\0" + item.prompt not in text
            if name in CLAIMS:
                about = item.facts["proposition"].split()[0], item.facts["text"]
                assert about not in claimed
            if name in STORIES:
                assert item.facts["query"] not in text
    assert abs(sum(row["label"] for row in teacher) / len(teacher) - 0.5) < 0.03


def test_claims_are_scored_as_they_are_trained(tmp_path):
    """What is scored, a prompt with an emoji right behind it, is token by token what the prepared
    corpus holds: a model meets in the evaluation what it met in training."""
    iq.make_corpus(tmp_path / "iq", 300, 0)
    tokenizer, corpus = data.get_tokenizer("bytes"), data.Corpus(tmp_path / "iq", 768)
    rows = corpus.rows("train", "teacher", 0, corpus.n_rows("train", "teacher"))[0].tolist()
    texts = [tokenizer.decode([t if t < 256 else 0 for t in row]) for row in rows]
    stored = {text for row in texts for text in row.split("\0") if text}
    scored = set()
    for name in CLAIMS:
        easy = {"easy": 50} if "easy" in TASKS[name].knobs else {}
        for item in TASKS[name].generate(150, 0, "train", **easy):
            scored.add(f"{item.prompt}{item.task.gap}{item.answer}")
    assert len(stored) > 200 and stored <= scored


def test_propositions_are_labelled_by_an_independent_judge():
    """Each of the teacher signal's labels follows from its text and its claim; both occur for every
    kind of claim."""
    seen = set()
    for row in iq.corpus(1500, 1)[1]:
        claim = row["proposition"]
        assert holds(row["text"], claim) == bool(row["label"]), row
        seen.add((claim.partition(": ")[0] if ":" in claim else "story", row["label"]))
    assert len(seen) == 2 * len(iq.CLAIMS)


def test_play_marks_what_it_is_told(capsys, monkeypatch):
    """It stops at an empty line, and says what chance and laziness get."""
    items = TASKS["head-tail"].generate(2, 5)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{items[0].answer}\nno idea\n\n"))
    iq.main(["play", "head-tail", "--seed", "5"])
    played = capsys.readouterr().out
    assert "right\n" in played and f"no, it is: {items[1].answer}" in played
    assert "1 of 2 right: 50%" in played and "chance is 0.0%; the best lazy strategy" in played


@pytest.mark.parametrize("name", ["claim-head-slicing", "sense-en"])
def test_play_takes_the_number_of_a_choice(name, capsys, monkeypatch):
    """Where there is a choice, of symbols or of emoji, its number will do; what the emoji stand for
    is said."""
    items = TASKS[name].generate(10, 0)
    numbers = [item.labels.index(item.answer) + 1 for item in items]
    lines = [*numbers[:8], 3 - numbers[8], items[9].answer]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    iq.main(["play", name])
    played = capsys.readouterr().out
    assert "9 of 10 right" in played and f"1: {items[0].labels[0]}" in played
    assert ("it does not" in played) == (name != "sense-en")


def test_make_writes_a_corpus_that_train_takes(tmp_path):
    """The folder holds the raw texts and the prepared shards; rows of the preset's length come out
    of it, with both signals; and train.py takes a step on it."""
    out = tmp_path / "iq"
    iq.make_corpus(out, 300, 0)
    corpus = data.Corpus(out, PRESETS["iq-demo"].max_seq_len)
    assert corpus.n_rows("train", "language") > 50 and corpus.n_rows("train", "teacher") > 5
    assert corpus.n_rows("val", "teacher") > 0
    assert corpus.teacher_left_out == {"train": 0, "val": 0}
    assert {p.name for p in out.glob("*.jsonl")} == {"text.jsonl", "teacher.jsonl"}
    assert list(tmp_path.iterdir()) == [out]
    words = [sys.executable, "train.py", "--preset", "iq-demo", "--data", out, "--threads", "1"]
    words += ["--teacher-fraction", "0.25", "--eval-rows", "4", "--batch-size", "2", "--steps", "1"]
    words += ["--dtype", "float32", "--out", tmp_path / "run"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_make_refuses_before_it_works(tmp_path):
    """A folder that is not empty, and too few documents, both at once; nothing is left behind."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("work")
    text = refusal(iq.make_corpus, tmp_path / "mine", 5, 0)
    assert "exists and is not an empty folder" in text and "--documents 5: too few" in text
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
