"""course/grade.py - holds a student's functions against the checks, and prints a table.

    python -m course.grade                           all starter files, as they stand
    python -m course.grade xpos                      one assignment, in course/starters/xpos.py
    python -m course.grade xpos --file mine.py       one assignment, in another file
    python -m course.grade --file submissions/*      every submission: files, or folders of files

A file may hold the functions of several assignments; a folder has a file NAME.py for each. The
student's code runs in processes of its own (course/worker.py); the checks and the result are here.
"""

from __future__ import annotations

import argparse
import ast
import glob
import hashlib
import importlib.machinery
import json
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import console
from course.assignments import ASSIGNMENTS, Assignment, find_assignment
from course.checking import CHECKS, first_failure, shown_case
from course.checks.puzzles import PICTURES
from course.student import (
    ROOT,
    NotWritten,
    Refused,
    Stopped,
    Student,
    Wrong,
    forbidden_imports,
)

STARTERS = ROOT / "course/starters"
NO_FILE = "there is no such file"
NOT_REACHED = "not reached"
LONGEST = 10_000  # characters of a text that a student's file can make long

# --------------------------------------------------------------------------------------------------
# 1. One assignment of one submission


@dataclass
class Verdict:
    """What became of one check, or of a file that could not be checked at all."""

    says: str
    result: str  # "passed", "failed" or "not written"
    text: str = ""  # why not
    counterexample: str = ""
    call: str = ""  # the last call before it failed, where its arguments are tensors


@dataclass
class Grade:
    """What became of an assignment."""

    assignment: Assignment
    file: str
    verdicts: list[Verdict] = field(default_factory=list)
    picture: str = ""
    seconds: float = 0.0

    @property
    def result(self) -> str:
        """ "passed" or "not written" if every check is; "unfinished" if some are; else "failed"."""
        results = {verdict.result for verdict in self.verdicts}
        if "failed" in results:
            return "failed"
        return results.pop() if len(results) == 1 else "unfinished"

    @property
    def passed(self) -> int:
        """The number of checks that passed."""
        return sum(verdict.result == "passed" for verdict in self.verdicts)

    def to_dict(self) -> dict:
        """Plain JSON values."""
        return {
            "assignment": self.assignment.name,
            "chapter": self.assignment.chapter,
            "file": self.file,
            "result": self.result,
            "passed": self.passed,
            "checks": [vars(verdict) for verdict in self.verdicts],
            "picture": self.picture,
            "seconds": round(self.seconds, 2),
        }


def grade(student: Student, assignment: Assignment, file: Path, seed: int) -> Grade:
    """Hold the functions in `file` against the assignment's checks. seed: chooses the inputs."""
    result, checks = Grade(assignment, str(file)), CHECKS[assignment.name]
    if not file.is_file():
        result.verdicts = [Verdict(c.says, "not written", NO_FILE) for c in checks]
        return result
    try:
        source = read_source(file, assignment)
        student.open(
            file.resolve(), source, assignment.seconds, assignment.ranks, assignment.measure
        )
        for check in checks:
            result.verdicts.append(judge(student, check, seed))
        if assignment.name in PICTURES:
            result.picture = cut(draw(student, assignment))
    except Refused as refused:
        result.verdicts = [Verdict("the file keeps to the rules", "failed", str(refused))]
    except (Stopped, NotWritten, Wrong) as ended:
        result.verdicts.append(Verdict("the file answers", "failed", str(ended)))
    left = checks[len(result.verdicts) :]
    result.verdicts += [Verdict(c.says, "failed", NOT_REACHED) for c in left]
    for verdict in result.verdicts:
        verdict.text = cut(verdict.text)
    result.seconds = student.spent
    return result


def cut(text: str) -> str:
    """The text, and of a very long one the beginning."""
    more = len(text) - LONGEST
    return text if more <= 0 else f"{text[:LONGEST]} ... {more:,} more characters"


def read_source(file: Path, assignment: Assignment) -> str:
    """The text of a student's file. Raises Wrong where it is no Python, and Refused where it
    imports what it must not."""
    try:
        source = console.read_text(file)
        found = forbidden_imports(source, assignment.not_allowed)
    except SyntaxError as error:
        raise Wrong(no_python(file, error)) from None
    except ValueError as error:
        raise Wrong(f"{file.name} cannot be read: {error}") from None
    if found:
        reason = "write it yourself: no module of this repository"
        also = ", ".join(assignment.not_allowed)
        raise Refused(f"{'; '.join(found)}; {reason}{also and f', and not {also}'}")
    return source


def no_python(file: Path, error: SyntaxError) -> str:
    """What is said of a file with a syntax error: its line, as it stands there."""
    place = f"{file.name} is no Python: line {error.lineno}"
    return f"{place}: {error.msg}\n{(error.text or '').rstrip()}"


def judge(student: Student, check, seed: int) -> Verdict:
    """What becomes of one check."""
    try:
        failure = first_failure(check, student, seed)
    except NotWritten as missing:
        return Verdict(check.says, "not written", str(missing))
    if failure is None:
        return Verdict(check.says, "passed")
    return Verdict(check.says, "failed", failure.text, shown_case(failure.case), failure.call)


def draw(student: Student, assignment: Assignment) -> str:
    """The picture of a puzzle's plan; empty where the plan cannot be drawn."""
    try:
        return PICTURES[assignment.name](student)
    except (NotWritten, Wrong, TypeError, ValueError, KeyError, IndexError, AttributeError):
        return ""


# --------------------------------------------------------------------------------------------------
# 2. Submissions: which file is graded as what


def is_submission(path: Path) -> bool:
    """Whether it is a .py file, or a folder with one. A path where nothing is counts as one: it is
    a mistake that `assigned` names."""
    return path.suffix == ".py" or not path.exists() or any(path.glob("*.py"))


def own_files(graded: set[Path]) -> dict[Path, str]:
    """A hash of every file from which a later run of the grader may take its code, without the
    starter files and those that are graded."""
    code = tuple(importlib.machinery.all_suffixes())
    found = [*ROOT.iterdir(), *ROOT.glob("*/__init__.*"), *ROOT.glob("__pycache__/*")]
    found += [*ROOT.glob("lab/**/*"), *ROOT.glob("course/**/*")]
    kept = [p for p in found if p.name.endswith(code) and STARTERS not in p.parents]
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in {*kept} - graded if p.is_file()}


def refuse_changes(before: dict[Path, str], after: dict[Path, str], submission: str):
    """Raise ValueError where files of the grader changed while a submission was graded. (Python may
    write a new .pyc file at any time.)"""
    changed = [p for p in {*before, *after} if before.get(p) != after.get(p)]
    changed = sorted(p for p in changed if p in before or p.suffix != ".pyc")
    if changed:
        names = "\n".join(f"  {path.relative_to(ROOT)}" for path in changed)
        raise ValueError(
            f"files of the grader changed while {submission} was graded:\n{names}\n"
            "If you changed them yourself, grade again. If not, the submission did: read it, bring "
            "the files back (git status; git checkout FILE), and grade without it"
        )


def functions_in(file: Path) -> set[str]:
    """The names of the functions that a file defines. Raises ValueError where it is no text or no
    Python."""
    try:
        tree = ast.parse(console.read_text(file))
    except SyntaxError as error:
        raise ValueError(f"--file {no_python(file, error)}") from None
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def assigned(path: Path, name: str | None) -> list[tuple[Assignment, Path]]:
    """The assignments of a submission, each with its file.

    path: a file, or a folder of files NAME.py. name: only this assignment. Without it a folder
    stands for all assignments, and a file for those whose name it has, or else whose functions it
    defines. Raises ValueError where there are none."""
    if path.is_dir():
        names = [name] if name else list(ASSIGNMENTS)
        return [(find_assignment(n), path / f"{n}.py") for n in names]
    if not path.is_file():
        raise ValueError(f"--file {path}: there is no such file or folder")
    if name or path.stem in ASSIGNMENTS:
        return [(find_assignment(name or path.stem), path)]
    there = functions_in(path)
    chosen = [a for a in ASSIGNMENTS.values() if there.issuperset(a.functions)]
    # Several puzzles have a function of the same name: a file of its own for each.
    unique = [a for a in chosen if not a.name.startswith("puzzle")]
    if chosen and not unique:
        names = " or ".join(a.name for a in chosen)
        raise ValueError(
            f"--file {path}: its function may be that of {names}; name one, as in\n"
            f"  python -m course.grade {chosen[0].name} --file {path}"
        )
    if not unique:
        raise ValueError(
            f"--file {path}: it has the functions of no assignment; name one, as in\n"
            f"  python -m course.grade xpos --file {path}"
        )
    return [(a, path) for a in unique]


# --------------------------------------------------------------------------------------------------
# 3. What is printed


def table(grades: Iterable[Grade]) -> str:
    """A line for each assignment."""
    lines = [f"{'assignment':<20}{'chapter':>7}  {'result':<13}{'checks':>6}{'seconds':>9}"]
    for g in grades:
        shown_result = g.result.upper() if g.result == "failed" else g.result
        checks = f"{g.passed}/{len(g.verdicts)}"
        row = f"{g.assignment.name:<20}{g.assignment.chapter:>7}  {shown_result:<13}"
        lines.append(f"{row}{checks:>6}{g.seconds:>9.1f}")
    return "\n".join(lines)


def details(g: Grade) -> str:
    """What failed, with the smallest input that was found, and a puzzle's picture."""
    lines = []
    for verdict in g.verdicts:
        if verdict.result == "failed" and verdict.text != NOT_REACHED:
            lines += [f"\n{g.assignment.name} FAILED: {verdict.says}"]
            if verdict.counterexample:
                lines.append(f"  smallest input: {verdict.counterexample}")
            if verdict.call:
                lines.append(f"  last call: {verdict.call}")
            lines += [f"  {line}" for line in verdict.text.splitlines()]
    left = sum(verdict.text == NOT_REACHED for verdict in g.verdicts)
    lines += [f"  checks that were not reached, and count as failed: {left}"] * (left > 0)
    missing = {v.text: 1 for v in g.verdicts if v.result == "not written" and v.text != NO_FILE}
    lines += [f"\n{g.assignment.name} not written: {text}" for text in missing if text]
    if g.picture:
        lines += [f"\n{g.assignment.name}: {g.assignment.title}", g.picture]
    return "\n".join(lines)


def summary(submissions: dict[str, list[Grade]]) -> str:
    """A line for each submission: how many assignments passed, and which did not."""
    width = max(len(name) for name in submissions) + 2
    lines = ["", f"{'submission':<{width}}passed  not passed"]
    for name, grades in submissions.items():
        open_ones = [g.assignment.name for g in grades if g.result != "passed"]
        passed = f"{len(grades) - len(open_ones)}/{len(grades)}"
        lines.append(f"{name:<{width}}{passed:>6}  {' '.join(open_ones)}".rstrip())
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# 4. The command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m course.grade",
        description="Hold your functions against the properties that this repository's own must "
        "have. Exit code 0: all pass. 1: something does not, or is not written. 2: a mistake in "
        "the command.",
        epilog=f"assignments: {', '.join(ASSIGNMENTS)}",
    )
    add = parser.add_argument
    add("name", nargs="*", metavar="NAME", help="one assignment (default: all)")
    files = "your file, or a folder with a file NAME.py for each assignment; several for a class"
    add("--file", nargs="+", metavar="PATH", help=f"{files} (default: course/starters)")
    seed = "of the random inputs: the same seed gives the same inputs (default: a new one)"
    add("--seed", type=int, metavar="N", help=seed)
    add("--json", action="store_true", help="print JSON in place of the table")
    return parser.parse_args(argv)


def one_name(names: list[str]) -> str | None:
    """The assignment that the command names, if it names one. Raises ValueError for what is none,
    and for several."""
    for name in names:
        if Path(name).suffix == ".py":
            raise ValueError(f"{name}: a file goes after --file, as in --file {name}")
        find_assignment(name)
    if len(names) > 1:
        raise ValueError(f"{' '.join(names)}: give one name, or none for all assignments")
    return names[0] if names else None


def work_of(words: list[str], name: str | None) -> dict[str, list[tuple[Assignment, Path]]]:
    """The submissions that --file names, each with its assignments. Raises ValueError with all
    mistakes. Says on stderr what is no submission."""
    # PowerShell hands submissions/* on as it is.
    paths = [Path(path) for word in words for path in sorted(glob.glob(word)) or [word]]
    work, problems = {}, []
    no_submissions = [str(path) for path in paths if not is_submission(path)]
    for path in filter(is_submission, paths):
        try:
            work[str(path)] = assigned(path, name)
        except ValueError as error:
            problems.append(str(error))
    text = f"neither a .py file nor a folder with one: {', '.join(no_submissions)}"
    if no_submissions and not work:
        problems.append(f"--file: {text}")
    console.refuse(problems)
    if no_submissions:
        print(f"left out, {text}", file=sys.stderr)
    return work


def main(argv: list[str] | None = None) -> int:
    """`python -m course.grade`; returns the exit code."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    seed = random.randrange(10**6) if args.seed is None else args.seed
    name = one_name(args.name)
    work, submissions = work_of(args.file or [str(STARTERS)], name), {}
    graded = {file.resolve() for pairs in work.values() for _, file in pairs}
    before = own_files(graded)
    for path, pairs in work.items():
        if len(work) > 1:
            print(f"grading {path}", file=sys.stderr)
        with Student() as student:  # processes of its own: no submission reaches another
            submissions[path] = [grade(student, *pair, seed) for pair in pairs]
        refuse_changes(before, own_files(graded), path)
    passed = all(g.result == "passed" for grades in submissions.values() for g in grades)
    if args.json:
        found = [
            {"submission": path, "assignments": [g.to_dict() for g in grades]}
            for path, grades in submissions.items()
        ]
        print(json.dumps({"seed": seed, "passed": passed, "submissions": found}, indent=1))
    else:
        report(submissions, seed)
    return 0 if passed else 1


def report(submissions: dict[str, list[Grade]], seed: int):
    """Print what people read."""
    for path, grades in submissions.items():
        if len(submissions) > 1:
            print(f"\n== {path}")
        print(table(grades))
        for text in filter(None, map(details, grades)):
            print(text)
    if len(submissions) > 1:
        print(summary(submissions))
    print(f"\ninputs of seed {seed}: --seed {seed} gives the same ones again")


if __name__ == "__main__":
    console.run(main)
