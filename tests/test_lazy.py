"""lab/lazy.py: strategies that do not see the answer, and the scores that iqeval.TASKS states."""

import json
from pathlib import Path

import pytest
from iq_oracles import CLAIMS, SYMBOLIC

from iqeval import TASKS
from lab import lazy

KNOWN = [name for name, task in TASKS.items() if task.lazy[1] is not None]
ROOT = Path(__file__).resolve().parent.parent
MEASURED = "tutorials/measurements/iq-lazy.json"
COMMAND = f"python -m lab.lazy --out {MEASURED}"


def test_every_task_has_a_lazy_score():
    """A new task needs a line in iqeval.LAZY: the best strategy that does not do the task."""
    missing = [name for name in TASKS if name not in KNOWN]
    hint = f"{COMMAND} prints them: put them into iqeval.LAZY"
    assert not missing, f"no lazy score for {', '.join(missing)}: {hint}, and keep the file"


@pytest.mark.parametrize("name", KNOWN)
def test_the_table_states_what_was_measured(name):
    """Each task's lazy strategy and its score are those of the file that lab.lazy wrote."""
    measured = json.loads((ROOT / MEASURED).read_text())["tasks"]
    assert name in measured, f"{COMMAND} measures it: keep the file"
    assert list(TASKS[name].lazy) == measured[name]["best"]


@pytest.mark.parametrize("name", KNOWN)
def test_no_lazy_strategy_is_far_above_the_stated_one(name):
    """On 300 items of other seeds, the stated strategy gets the stated score, and none of the
    others is clearly better: within four standard errors, for there are up to 100 others."""
    task, stated = TASKS[name], TASKS[name].lazy[1]
    scores = lazy.scores(task, 300, 77)
    error = 100 * (max(stated, 5) * (100 - stated) / 1e4 / 300) ** 0.5
    assert scores[task.lazy[0]] == pytest.approx(stated, abs=4 * error)
    assert max(scores.values()) < stated + 4 * error


def test_laziness_is_not_far_above_chance():
    """The goals that the tasks are built for: a task with two labels leaves a single strategy at
    most 72%, a story 50%, a key a third, and a text that is rewritten a quarter."""
    for name in KNOWN:
        task = TASKS[name]
        limit = 25 if task.kind in ("rules", "patterns") else 50
        limit = {
            "key-retrieval": 36,
            **dict.fromkeys(CLAIMS, 72),
            **dict.fromkeys(SYMBOLIC, 54),
        }.get(name, limit)
        assert task.lazy[1] < limit, name


@pytest.mark.parametrize("name", TASKS)
def test_a_strategy_does_not_see_the_answer(name):
    """With another answer in its place the guesses are the same."""
    for item in TASKS[name].generate(5, 0):
        other = item._replace(answer="?")
        if item.labels:
            blind = item.facts | {"label": None, "class": None}
            assert lazy.verdicts_on(other._replace(facts=blind)) == lazy.verdicts_on(item)
        else:
            guess = lazy.GUESSES.get(name, lazy.rewriting_guesses)
            blind = item.facts | {"place": None}
            assert guess(other._replace(facts=blind)) == guess(item)
