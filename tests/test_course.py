"""The grader: what it says of files that are empty, half done, forbidden, endless or hostile."""

import dataclasses
import io
import json
import os
import sys
import tempfile
import textwrap
import types
from pathlib import Path

import pytest
from helpers import ROOT, error, run_command

from course import grade as grader
from course import guard, worker
from course.assignments import ASSIGNMENTS
from course.checking import CHECKS, first_failure
from course.grade import Grade, Verdict, details, grade
from course.student import SHOWN, Local, Process, Student, forbidden_imports, own_modules

SOLUTIONS = ROOT / "tests/course_solutions"
RIGHT = (SOLUTIONS / "xpos.py").read_text()


@pytest.fixture(scope="module")
def student():
    """The processes in which the files run."""
    with Student() as found:
        yield found


@pytest.fixture
def graded(student, tmp_path):
    """graded(source, name): the grade of a file with that text."""

    def run(source: str, name: str = "xpos", **changes):
        file = tmp_path / "mine.py"
        file.write_text(textwrap.dedent(source))
        return grade(student, dataclasses.replace(ASSIGNMENTS[name], **changes), file, seed=0)

    return run


def reasons(found) -> str:
    """What the grade says, in one text."""
    return " ".join(v.text for v in found.verdicts)


# --------------------------------------------------------------------------------------------------
# What it says


def test_an_untouched_checkout_is_not_written(capsys):
    """Without arguments the starter files are graded: nothing is written, and the exit code is 1.
    The JSON holds every check of every assignment."""
    assert grader.main(["--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    (submission,) = found["submissions"]
    assert not found["passed"] and submission["submission"].endswith("starters")
    assert [a["assignment"] for a in submission["assignments"]] == list(ASSIGNMENTS)
    for a in submission["assignments"]:
        assert a["result"] == "not written" and len(a["checks"]) == len(CHECKS[a["assignment"]])


def test_the_command(tmp_path, monkeypatch):
    """In a process of its own: exit code 0 when all passes, and what the student prints is not in
    the JSON."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    file = tmp_path / "mine.py"
    file.write_text("print('hello')\n" + RIGHT)
    code, out, err = run_command("course.grade", "xpos", "--file", file, "--json", cwd=ROOT)
    assert code == 0 and json.loads(out)["passed"] and "hello" in err


def test_a_class_has_a_line_for_each_submission(tmp_path, capsys):
    """Several files or folders: a table for each, and a summary. A file is graded by its name, or
    as what it defines."""
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "grow_tensor.py").write_text((SOLUTIONS / "grow_tensor.py").read_text())
    both = [(SOLUTIONS / f"{name}.py").read_text() for name in ("masked_norm", "grow_moments")]
    (tmp_path / "bob.py").write_text("\n".join(both))
    words = ["--file", str(tmp_path / "ann"), str(tmp_path / "bob.py"), "--seed", "7"]
    assert grader.main(words) == 1
    *_, ann, bob, _, seed = capsys.readouterr().out.splitlines()
    assert ann.split()[1] == f"1/{len(ASSIGNMENTS)}" and bob.split()[1:] == ["2/2"]
    assert "--seed 7" in seed


def test_mistakes_of_use(tmp_path):
    """An unknown name, a file that is not there, or has the functions of no assignment, is named:
    ValueError, for which console.run exits with 2."""
    assert "unknown assignment 'xpoz': did you mean xpos?" in error(grader.main, ["xpoz"])
    assert "did you mean xpos? " in error(grader.main, ["XPOS"])
    assert "give one name, or none" in error(grader.main, ["xpos", "attention"])
    assert "no such file or folder" in error(grader.main, ["--file", str(tmp_path / "none")])
    (tmp_path / "mine.py").write_text("def something(): pass\n")
    message = error(grader.main, ["--file", str(tmp_path / "mine.py")])
    assert "functions of no assignment" in message and "course.grade xpos --file" in message
    (tmp_path / "mine.py").write_text("def plan(): pass\n")
    message = error(grader.main, ["--file", str(tmp_path / "mine.py")])
    assert "puzzle_block or puzzle_sequence" in message
    (tmp_path / "mine.py").write_text("def plan(: pass\n")
    assert "line 1" in error(grader.main, ["--file", str(tmp_path / "mine.py")])
    assert "--file mine.py" in error(grader.main, ["mine.py"])


def test_what_is_no_submission_is_left_out(tmp_path, capsys):
    """Of submissions/* a photo and a folder without a .py file are named, and not graded. Alone
    they are a mistake."""
    (tmp_path / "photo.pdf").write_bytes(b"\x00")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "anna").mkdir()
    for name in ("anna/xpos.py", "bob.py"):
        (tmp_path / name).touch()
    assert {*grader.work_of([f"{tmp_path}/*"], "xpos")} == {
        f"{tmp_path}/{n}" for n in ("anna", "bob.py")
    }
    said = capsys.readouterr().err
    assert "photo.pdf" in said and "__pycache__" in said and "anna" not in said
    assert "neither a .py file" in error(grader.work_of, [f"{tmp_path}/photo.pdf"], "xpos")


def wrong_norm(change):
    """What the grader says of a masked_norm whose answer is change(right answer)."""
    space = {}
    exec((SOLUTIONS / "masked_norm.py").read_text(), space)
    local = Local(masked_norm=lambda *args: change(space["masked_norm"](*args)))
    return first_failure(CHECKS["masked_norm"][0], local, seed=0)


def test_the_call_that_failed_is_told():
    """A check whose input is a seed shows the numbers that the function was given."""
    found = wrong_norm(lambda y: y + 1)
    assert found.call.startswith("masked_norm([[[") and found.call.endswith(", 1e-05)")


def test_an_answer_that_is_nearly_right():
    """Where six digits are the same, the message says by how much the numbers differ, and that they
    are float32."""
    text = wrong_norm(lambda y: y.float()).text
    assert "they differ by" in text and "torch.float32" in text


def test_a_missing_function_is_told():
    """A file without the function is "not written", and the reason is printed."""
    checks = CHECKS["masked_norm"]
    verdicts = [Verdict(c.says, "not written", "there is no function masked_norm") for c in checks]
    text = details(Grade(ASSIGNMENTS["masked_norm"], "mine.py", verdicts))
    assert text.strip() == "masked_norm not written: there is no function masked_norm"


@pytest.mark.parametrize("change", [("z", "add", "mine", "x"), ("z", "add", "x", "mine")])
def test_the_order_of_a_sum_is_free(change):
    """A puzzle's plan may add the branch to the stream or the stream to the branch."""
    space = {}
    exec((SOLUTIONS / "puzzle_sequence.py").read_text(), space)
    cuts, steps = space["plan"]()
    assert sum(step[0] == "z" for step in steps) == 1
    steps = [change if step[0] == "z" else step for step in steps]
    local = Local(plan=lambda: (cuts, steps))
    assert first_failure(CHECKS["puzzle_sequence"][0], local, seed=0) is None


@pytest.mark.parametrize(
    "answer, said",
    [
        ([("y", "norm", "x")], "must return"),
        (({"qkv": "column"}, []), "unknown"),
        (({}, [("y", "x")]), "a step is"),
    ],
)
def test_a_plan_of_another_form(answer, said):
    """What is wrong with the form of a plan is told in words."""
    local = Local(plan=lambda: answer)
    assert said in first_failure(CHECKS["puzzle_block"][0], local, seed=0).text


def test_a_half_done_assignment_is_unfinished(graded):
    """Of two functions one is written: its checks pass, the others are not written."""
    source = (SOLUTIONS / "sampler.py").read_text().partition("def noise")[0]
    found = graded(
        source + "def shuffled(sample, n, seed):\n    raise NotImplementedError\n", "sampler"
    )
    assert found.result == "unfinished" and found.passed == 1


def test_the_smallest_counterexample_is_told(graded):
    """A rotation that forgets the origin is wrong from position 1 on, and the smallest input that
    shows it is a single pair near the start."""
    found = graded(RIGHT.replace("zeta ** (-n / scale_base)", "zeta ** (n / scale_base)"))
    (worst, *_) = [v for v in found.verdicts if v.result == "failed"]
    assert "q_and_k = ([" in worst.counterexample and "the paper's formula gives" in worst.text
    numbers = worst.counterexample.partition("q_and_k = (")[2].partition("])")[0]
    assert numbers.count(",") <= 3, "a pair of two channels is enough"


@pytest.mark.parametrize(
    "answer, said",
    [
        ("None", "does not have the form"),
        ("object()", "holds a object"),
        ("(q, k[:, :1])", "shape"),
        ("(q + float('nan'), k)", "nan"),
        ("1 / 0", "ZeroDivisionError (line 2)"),
        ("missing", "NameError (line 2)"),
        ("input()", "EOFError (line 2)"),
        ("{}['x' * 10**5]", "more characters"),
        ("__import__('helper')", "Your file stands alone"),
        ("rotate(q, k, start, origin, theta, scale_base)", "RecursionError"),
    ],
)
def test_an_answer_of_another_kind_is_wrong(graded, answer, said):
    """No answer, an object, a shape, NaN, an error with its line: each fails and is told."""
    source = f"def rotate(q, k, start, origin, theta, scale_base):\n    return {answer}\n"
    found = graded(source)
    assert found.result == "failed" and said in reasons(found)


def test_a_file_that_ends_early_has_all_its_checks(graded):
    """The checks after the one in which the process ended, or did not answer, count as failed."""
    source = (SOLUTIONS / "mup.py").read_text()
    found = graded(source + "\ndef adamw_group(*given):\n    __import__('os')._exit(0)\n", "mup")
    assert (found.passed, len(found.verdicts)) == (1, len(CHECKS["mup"]))
    text = details(found)
    assert text.count("FAILED") == 1 and "not reached, and count as failed: 3" in text


def test_much_that_is_printed_is_cut(capsys):
    """The first 64 KB of each file are shown, and then how many more bytes there were."""
    process = Process.__new__(Process)
    process.printed = 0
    for _ in range(2):
        printed = io.BufferedReader(io.BytesIO(b"x" * (SHOWN + 100_000)))
        process.child = types.SimpleNamespace(stderr=printed)
        process.show()
        process.end_of_file()
        assert capsys.readouterr().err == "x" * SHOWN + "\n... 100,000 more bytes\n"


def test_a_file_that_is_no_python(graded):
    """A syntax error is told with its line."""
    found = graded("def rotate(q, k:\n    pass\n")
    assert found.result == "failed" and "line 1" in reasons(found)


# --------------------------------------------------------------------------------------------------
# What is not allowed


@pytest.mark.parametrize(
    "line",
    ["import flm", "from flm import rotate", "import lab.timetable as t", "import numpy, muP"],
)
def test_our_modules_are_seen_in_the_text(graded, line):
    """An import of this repository's modules is refused before anything runs, with its line."""
    found = graded(f"{line}\n{RIGHT}")
    assert found.result == "failed" and "line 1 imports" in reasons(found)
    assert "no module of this repository" in reasons(found)


def test_other_modules_are_allowed():
    """Libraries are allowed, but for those that would do an assignment's work."""
    source = "import torch.nn\nimport numpy as np\nfrom torch.distributed import pipelining\n"
    assert forbidden_imports(source) == []
    found = forbidden_imports(source, ("torch.distributed.pipelining",))
    assert found == ["line 3 imports torch.distributed.pipelining"]


TRICKS = {
    "importlib": "import importlib; sys.path.insert(0, ROOT); importlib.import_module('flm')",
    "a text that is run": "sys.path.insert(0, ROOT); exec('import ' + 'flm')",
    "our source": "exec(Path(ROOT, 'flm.py').read_text())",
    "a name that is bytes": "open(os.fsencode(ROOT) + b'/flm.py')",
    "a solution": "open(ROOT + '/tests/course_solutions/xpos.py').read()",
    "a link to our source": "os.symlink(ROOT + '/flm.py', 'x.py')",
    "a link through the system": "open('/proc/self/root' + ROOT + '/flm.py')",
    "a check that is replaced": "os.replace('x.py', ROOT + '/course/checks/iq.py')",
    "a check that is removed": "os.remove(ROOT + '/course/checks/none.py')",
    "a check that is cut": "os.truncate(ROOT + '/course/checks/none.py', 0)",
    "the rights of a folder": "os.chmod(ROOT, 0o755)",
    "a new folder": "os.mkdir(ROOT + '/course')",
    "a folder that is removed": "os.rmdir(ROOT + '/course')",
    "a file of PyTorch": "open(os.path.dirname(os.__file__) + '/none/x.py', 'w')",
    "a folder that is opened": "os.open(os.path.dirname(ROOT), os.O_RDONLY)",
    "another current folder": "os.chdir('/')",
    "the hook's object": "sys.meta_path[0].allowed = None; import flm",
    "all objects": "import gc; gc.get_objects()",
    "other builtins": "import builtins; builtins.issubclass = lambda *a: 0; open(ROOT + '/flm.py')",
    "another realpath": "os.path._joinrealpath = lambda *a: ('/', 1); open(ROOT + '/flm.py')",
    "another lstat": "os.lstat = os.readlink = None; open('/proc/self/root' + ROOT + '/flm.py')",
    "the main module": "vars(sys.modules['__main__']).update(READS=()); open(ROOT + '/flm.py')",
    "a text of another class": "open(type('S', (str,), {'startswith': any})(ROOT + '/flm.py'))",
    "an object that is a path": "import io; io.FileIO(Path(ROOT, 'flm.py'))",
    "the frames above": "f = sys._getframe(1); f.f_globals.update(READS=(), CHANGES=());"
    "f.f_builtins.update(issubclass=None, str=None); open(ROOT + '/flm.py')",
    "a report of its own": "sys.audit('open', ROOT, None, type('', (), {'__and__': print})())",
    "a name of its own": "__import__(type('S', (str,), {'__format__': print})('flm'))",
    "an error of the hook": "sys.audit('open', 5)",
    "C": "import ctypes; ctypes.CDLL(None).getpid()",
    "another interpreter": "import _xxsubinterpreters as x; x.create()",
    "another program": "import subprocess; subprocess.run(['true'])",
    "multiprocessing": "import multiprocessing.util as m; m.spawnv_passfds(b'true', [b'true'], [])",
    "a shell": "os.system('true')",
    "the grader": "os.kill(os.getppid(), 0)",
}
ALLOWED = {
    "a file of its own": "Path('x.txt').write_text('1'); os.rename('x.txt', 'y'); os.remove('y')",
    "a temporary file": "import tempfile as t; t.TemporaryFile(); t.NamedTemporaryFile().close()",
    "nowhere": "open(os.devnull, 'w').write('1')",
    "a library": "import importlib; importlib.import_module('colorsys')",
    "another folder": "os.listdir('/'); open(os.__file__).read()",
    "PyTorch's files": "import torch; torch.save(torch.ones(2), 'x.pt'); torch.load('x.pt')",
}


def refused(line: str, folder) -> str:
    """What the hook says of a line of Python that catches every error; empty if it allows it. The
    process of the line is a copy of this one."""
    ours, theirs = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.chdir(folder)
            tempfile.tempdir = str(folder)
            sys.path[:] = [path for path in sys.path if not path.startswith(str(ROOT))]
            modules = own_modules()
            for name in [name for name in sys.modules if name.partition(".")[0] in modules]:
                del sys.modules[name]
            worker.watch(str(ROOT), ",".join(modules), theirs)
            exec(line, {"ROOT": str(ROOT), "Path": Path, "os": os, "sys": sys})
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as stream:
        message = worker.read(stream) or b""
    os.waitpid(process, 0)
    return message.removeprefix(guard.REFUSED).decode()


@pytest.mark.parametrize("trick", TRICKS)
def test_our_files_are_refused_at_run_time(trick, tmp_path):
    """To read, import or change our files by another way, to start a program, or to look for the
    hook, is refused and told."""
    assert refused(TRICKS[trick], tmp_path).startswith("it ")


@pytest.mark.parametrize("line", ALLOWED)
def test_other_files_are_allowed(line, tmp_path):
    """A file may write in its own folder, and read what is installed."""
    assert not refused(ALLOWED[line], tmp_path)


@pytest.mark.parametrize("inside", [False, True], ids=["at the start", "in a call"])
def test_what_is_refused_fails(graded, inside):
    """Also where the file catches the error, hides what it sends and goes on with a right
    answer."""
    lines = ["import torch", "    torch.save = None", "    try:"]
    lines += [f"        open({str(ROOT / 'flm.py')!r})", "    except BaseException:"]
    body = "\n".join([f"    {lines[0]}", *lines[1:], "        pass"])
    if inside:
        source = RIGHT.replace("    T, D = q.shape\n", f"{body}\n    T, D = q.shape\n")
    else:
        source = f"def look():\n{body}\n\n\nlook()\n{RIGHT}"
    found = graded(source)
    assert found.result == "failed" and not found.passed
    assert len(found.verdicts) == len(CHECKS["xpos"])
    assert "it reads flm.py of the repository" in reasons(found)


def test_a_change_of_the_grader_stops_it(tmp_path, monkeypatch):
    """If a file changes what a later run of the grader would load, by a way that the hook does not
    see, the grader names the submission and the files."""
    checks = tmp_path / "course/checks"
    checks.mkdir(parents=True)
    submission = tmp_path / "anna.py"
    for file in (submission, checks / "iq.py", checks / "iq.pyc"):
        file.write_text("1")
    monkeypatch.setattr(grader, "ROOT", tmp_path)

    def after(*changed: str) -> str:
        def graded(student, assignment, file, seed):
            for name in changed:
                (tmp_path / name).write_text(str(changed))
            return Grade(assignment, str(file), [Verdict("", "passed")])

        monkeypatch.setattr(grader, "grade", graded)
        words = ["xpos", "--file", str(submission)]
        return error(grader.main, words) if changed[0] in CODE else str(grader.main(words))

    for name in CODE:
        assert f"while {submission} was graded:\n  {name}\n" in after(name)
    assert after("anna.py", "course/checks/new.pyc", "marks.json") == "0"


CODE = ("course/checks/iq.py", "course/checks/iq.pyc", "course/checks/new.py", "torch.py")


def test_a_loop_without_end_is_stopped(graded):
    """At the start of a file or in a function: the process is ended after the assignment's seconds,
    and the next file is graded by a new one."""
    for source in (
        "while True:\n    pass\n",
        RIGHT.replace("    T, D", "    while True: pass\n    T, D"),
    ):
        found = graded(source, seconds=1.5)
        assert found.result == "failed" and "loop without end" in reasons(found)
    assert graded(RIGHT).result == "passed"


def test_a_file_does_not_take_all_memory(graded):
    """8 GB in a call are a MemoryError of the student's code, not the end of the machine's memory.
    (On Linux, where the system can limit a process.)"""
    found = graded(RIGHT.replace("    T, D", "    bytearray(2**33)\n    T, D"))
    assert found.result == "failed" and "MemoryError" in reasons(found)


HOSTILE = {
    "os._exit": "import os\nos._exit(0)\n",
    "sys.exit": "import sys\nsys.exit(0)\n",
    "SystemExit in a call": "def rotate(*arguments):\n    raise SystemExit(0)\n",
    "os._exit in a call": "import os\n\ndef rotate(*arguments):\n    os._exit(0)\n",
    "a comparison that is always true": """
        import hypothesis, torch
        torch.allclose = torch.equal = lambda *a, **k: True
        torch.Tensor.__le__ = torch.Tensor.__eq__ = lambda *a: torch.tensor(True)
        hypothesis.given = lambda *a, **k: lambda f: lambda: None
        def rotate(q, k, *rest):
            return q, k
        """,
    "a tensor that equals all": """
        import torch
        class Equal(torch.Tensor):
            def __eq__(self, other): return True
        def rotate(q, k, *rest):
            return q.as_subclass(Equal), k.as_subclass(Equal)
        """,
    "an answer without a value": """
        import torch
        save = torch.save
        torch.save = lambda value, buffer: save({}, buffer)
        """,
    "bytes into every pipe": """
        import os
        def rotate(q, k, *rest):
            for number in range(3, 64):
                try:
                    os.write(number, b"passed" * 100)
                except OSError:
                    pass
            return q, k
        """,
    "an answer that is run when it is read": """
        class Run:
            def __reduce__(self):
                return print, ("run in the grader",)
        def rotate(q, k, *rest):
            return Run(), k
        """,
    "a save of its own": """
        import torch
        class Run:
            def __reduce__(self):
                return print, ("run in the grader",)
        save = torch.save
        torch.save = lambda value, buffer: save(Run(), buffer)
        def rotate(q, k, *rest):
            return q, k
        """,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_the_process_of_a_file_does_not_reach_the_result(graded, capsys, what):
    """Whatever a file does to its own process, to PyTorch or to hypothesis there: it does not pass,
    and nothing of it runs in the grader."""
    found = graded(HOSTILE[what])
    assert found.result in ("failed", "not written")
    assert "run in the grader" not in capsys.readouterr().out


def test_answers_learned_by_heart_fail():
    """A file that knows the answers to one seed's inputs has wrong ones for another's: the inputs
    follow from the seed, which is new each time."""
    check = CHECKS["mup"][0]
    right, known = {}, {}

    def learn(kind, config):
        known[kind, str(config)] = right["std"](kind, config)
        return known[kind, str(config)]

    space = {}
    exec((SOLUTIONS / "mup.py").read_text(), space)
    right["std"] = space["initial_std"]
    assert first_failure(check, Local(initial_std=learn), seed=1) is None
    by_heart = Local(initial_std=lambda kind, config: known.get((kind, str(config)), 0.016))
    assert first_failure(check, by_heart, seed=1) is None
    assert first_failure(check, by_heart, seed=2) is not None
