"""course/checking.py - what a check is, and how hypothesis finds the smallest input that breaks it.

A check is a property: a sentence, a description of inputs, and a function that raises Wrong where
the property does not hold. The checks of all assignments are in course/checks/. The grader holds
them against a student's functions. The tests hold the same checks against this repository's own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import hypothesis
import torch
from hypothesis import strategies as st

from course.student import Wrong

SHRINK = 100  # inputs that are tried to find a smaller one that fails


@dataclass(frozen=True)
class Check:
    """A property of an assignment's functions."""

    says: str
    cases: st.SearchStrategy  # of {name: value}
    holds: Callable  # holds(functions, **case) raises Wrong
    examples: int


CHECKS: dict[str, list[Check]] = {}  # assignment -> its checks


def check(assignment: str, examples: int = 20, **cases: st.SearchStrategy) -> Callable:
    """Decorate a function as a check of an assignment. The first paragraph of its docstring is the
    sentence that a student reads. cases: a strategy for each argument after the first."""

    def register(holds: Callable) -> Callable:
        says = " ".join(inspect.getdoc(holds).partition("\n\n")[0].split())
        given = st.fixed_dictionaries(cases)
        tries = examples if cases else 1
        CHECKS.setdefault(assignment, []).append(Check(says, given, holds, tries))
        return holds

    return register


@dataclass(frozen=True)
class Failure:
    """The smallest input that was found for which a check does not hold, and why."""

    case: dict
    text: str
    call: str = ""  # the last call before it failed, where its arguments are tensors


def first_failure(found: Check, functions, seed: int | None = None) -> Failure | None:
    """Hold a check against functions. None: it holds for every input that was tried.

    seed: chooses the inputs; None: always the same ones."""
    smallest, left = None, SHRINK

    def attempt(case):
        nonlocal smallest, left
        left -= smallest is not None
        if left < 0:
            return  # enough: what was found so far is small
        try:
            found.holds(functions, **case)
        except Wrong as wrong:
            smallest = Failure(case, str(wrong), shown_call(functions))
            raise
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            text = f"the answer does not have the form that the docstring describes ({error})"
            text += shown_answer(functions)
            smallest = Failure(case, text, shown_call(functions))
            raise Wrong(text) from error

    test = hypothesis.given(found.cases)(attempt)
    if seed is not None:
        test = hypothesis.seed(seed)(test)
    profile = hypothesis.settings(
        max_examples=found.examples,
        deadline=None,
        database=None,
        derandomize=seed is None,
        report_multiple_bugs=False,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    try:
        profile(test)()
    except (Wrong, hypothesis.errors.Flaky):
        pass
    return smallest


# --------------------------------------------------------------------------------------------------
# What checks say of answers

floats = st.integers(-3, 3).map(float)


def vectors(length: int) -> st.SearchStrategy:
    """Lists of `length` small whole numbers, as floats: short to read when one fails."""
    return st.lists(floats, min_size=length, max_size=length)


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Random numbers in float64, the same for the same seed and shape."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


seeds = st.integers(0, 2**31 - 1)


def shown_case(case: dict) -> str:
    """The inputs of a check as a reader takes them in.

    >>> shown_case({"D": 2, "q": [1.0, 0.0]})
    'D = 2, q = [1, 0]'
    """
    return ", ".join(f"{name} = {shown(value)}" for name, value in case.items())


def shown_call(functions) -> str:
    """The last call of a student's function, with its arguments; empty where none is a tensor."""
    name, args, _ = functions.last
    tensors = [v for arg in args for v in (arg.values() if isinstance(arg, dict) else [arg])]
    if not any(isinstance(value, torch.Tensor) for value in tensors):
        return ""
    return f"{name}({', '.join(map(shown, args))})"


def shown_answer(functions) -> str:
    """The last answer of a student's function, cut where it is long."""
    name, _, answer = functions.last
    text = shown(answer)
    return f"\n{name} answered {text if len(text) <= 200 else text[:200] + ' ...'}"


def shown(value) -> str:
    """A value as a reader takes it in: numbers with six digits, large tensors by their shape.

    >>> shown(torch.tensor([1.0, 1 / 3])), shown({"dp": 2.0})
    ('[1, 0.333333]', "{'dp': 2}")
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, torch.Tensor):
        return shown(value.tolist()) if value.numel() <= 24 else f"a tensor {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        marks = "[]" if isinstance(value, list) else "()"
        return marks[0] + ", ".join(map(shown, value)) + marks[1]
    return f"{value + 0.0:.6g}" if isinstance(value, float) else repr(value)  # no -0


def expect_close(what: str, found, expected, tolerance: float = 1e-9):
    """Raise Wrong unless `found` is `expected` up to `tolerance` of its largest entry (or of 1).

    what: how the message names it. found: a tensor or a number, in float64 where it was asked
    with float64."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    if not isinstance(found, (torch.Tensor, int, float)):
        kind = type(found).__name__
        raise Wrong(f"{what} is a {kind}, expected a tensor of shape {tuple(expected.shape)}")
    kind = str(found.dtype) if isinstance(found, torch.Tensor) else ""
    found = torch.as_tensor(found, dtype=torch.float64)
    if found.shape != expected.shape:
        shapes = f"{tuple(found.shape)}, expected {tuple(expected.shape)}"
        raise Wrong(f"{what} has the shape {shapes}")
    far = (found - expected).abs()
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    if far.numel() and not (far <= tolerance * scale).all():
        worst = int(far.nan_to_num(nan=math.inf).argmax())
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), found.shape))
        largest = far[place]
        if found.numel() > 8:
            what, found, expected = f"{what}{list(place)}", found[place], expected[place]
        pair = shown(found), shown(expected)
        same = f": they differ by {largest:.1e}" if pair[0] == pair[1] else ""
        exact = "" if kind in ("", "torch.float64") else f" (it is {kind}, not torch.float64)"
        raise Wrong(f"{what} is {pair[0]}, expected {pair[1]}{same}{exact}")


def expect(condition: bool, text: str):
    """Raise Wrong with the text unless the condition holds."""
    if not condition:
        raise Wrong(text)
