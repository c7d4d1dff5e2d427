"""Every assignment has a right solution, which the grader accepts, and wrong ones that look right,
each of which it rejects. tests/course_solutions/ has the right ones, written without a look at this
repository's own functions. A wrong one is a right one with a few words changed."""

import pytest
from helpers import ROOT

from course.assignments import ASSIGNMENTS
from course.grade import grade
from course.student import Student

SOLUTIONS = ROOT / "tests/course_solutions"

# Assignment -> {what is wrong: [(words of the right solution, what stands there instead), ...]}
WRONG = {
    "xpos": {
        "the key decays as the query does": [("** (-n / scale_base)", "** (n / scale_base)")],
        "the origin is the middle of the text that is there": [
            (
                "torch.arange(start - origin, start - origin + T, dtype=torch.float64)",
                "torch.arange(start, start + T, dtype=torch.float64) - (start + T) // 2",
            ),
        ],
        "a pair is channel i and channel i + D/2": [
            (", 2 * i + 1]", ", i + D // 2]"),
            (", 2 * i]", ", i]"),
        ],
    },
    "attention": {
        "the mask is aligned at the first key": [("torch.arange(S - T, S)", "torch.arange(T)")],
        "only the newest keys are handed on": [
            ("(k, v)\n", "(k[:, :, -T:], v[:, :, -T:])\n"),
        ],
        "a hidden score is 0": [('float("-inf")', "0.0")],
    },
    "loss": {
        "an unsupervised token keeps its softmax": [("d[row] = 0.0", "pass")],
        "no maximum is taken off": [
            ("        logits = logits - logits.max(dim=1, keepdim=True).values\n", "")
        ],
        "all logits at once": [("    for start in", "    rows = len(hidden)\n    for start in")],
    },
    "sampler": {
        "the remainder in place of another round": [
            ("n < 2000", "n < 2"),
            ("if place < n:\n            return place", "if True:\n            return place % n"),
        ],
        "a hash that differs between processes": [
            ("noise(seed, epoch, row))", "hash(f'{seed} {epoch} {row}'))"),
        ],
        "a float": [("sample * share >> 32,", "int(sample * (share / 2**32)),")],
    },
    "masked_norm": {
        "the variance counts all channels alike": [
            ("centred**2, share", "centred**2, torch.ones_like(share) / len(share)"),
        ],
        "the bias is not masked": [
            ("mask * (gain * scaled + bias)", "mask * gain * scaled + bias")
        ],
        "eps outside the root": [("torch.sqrt(variance + eps)", "(torch.sqrt(variance) + eps)")],
    },
    "grow_tensor": {
        "all queries, then all keys, then all values": [
            (
                "    if old.dim() == 1:",
                "    if 'qkv' in name:\n"
                "        rows = old.shape[0] // 3\n"
                "        for part, mine in zip(new.chunk(3), old.split(rows)):\n"
                "            part[(slice(rows), *map(slice, old.shape[1:]))] = mine\n"
                "    elif old.dim() == 1:",
            ),
        ],
        "every norm is multiplied": [('name.split(".")[0] == "norm"', '"norm" in name')],
        "the gain alone is multiplied": [('name.split(".")[0] == "norm"', 'name == "norm.weight"')],
    },
    "grow_moments": {
        "the square is divided once": [("shrink**2 *", "shrink *")],
        "the steps begin again": [('state["step"].clone()', "torch.tensor(0.0)")],
        "multiplied as the weights are": [("1.0 / r if", "r if")],
    },
    "mup": {
        "the fan-in of o is the width": [
            ('config["n_heads"] * config["head_dim"] / base', 'config["d_model"] / base')
        ],
        "the decay of the proxy": [("decay * m", "decay")],
        "down is not one of the branches": [('in ("o", "down")', 'in ("o",)')],
    },
    "loss_law": {
        "no loss is left at infinity": [
            (
                "slope = np.cov(x, losses, bias=True)[0, 1] / np.var(x)",
                "slope = x @ losses / (x @ x)",
            ),
            ("level = losses.mean() - slope * x.mean()", "level = 0.0"),
        ],
        "the smallest loss is the one at infinity": [
            (
                "slope = np.cov(x, losses, bias=True)[0, 1] / np.var(x)",
                "slope = x @ (losses - losses.min()) / (x @ x)",
            ),
            ("level = losses.mean() - slope * x.mean()", "level = losses.min()"),
        ],
        "a grid and no more": [("range(60)", "range(0)")],
    },
    "one_f_one_b": {
        "all forward passes first": [("first = ranks - 1 - rank", "first = micro_batches")],
        "one forward pass too many": [("first = ranks - 1 - rank", "first = ranks - rank")],
        "backward passes of the newest": [
            (
                '("B", i) for i in range(micro_batches - first, micro_batches)',
                '("B", i) for i in reversed(range(micro_batches - first, micro_batches))',
            )
        ],
    },
    "tensor_parallel": {
        "the bias on both ranks": [
            (
                "y = torch.mm(x, weight.T)\n    dist.all_reduce(y)\n    return y + bias,",
                "y = torch.addmm(bias, x, weight.T)\n    dist.all_reduce(y)\n    return y,",
            ),
        ],
        "the input's gradient is not summed": [("    dist.all_reduce(d_x)\n", "")],
        "the gradient of a half is summed too": [
            (
                "    return y + bias, torch.mm(d_y, weight),",
                "    d_x = torch.mm(d_y, weight)\n    dist.all_reduce(d_x)\n"
                "    return y + bias, d_x,",
            ),
        ],
    },
    "grad_norm": {
        "each copy counts": [(" / copies", "")],
        "norms are added, not squares": [
            ("float((piece * piece).sum())", "float((piece * piece).sum()) ** 0.5")
        ],
        "short gradients become longer": [(" if norm > max_norm else 1.0", "")],
    },
    "iq_task": {
        "only the query is divided": [
            ("side(word) == split", "(len(words) < 3 or side(word) == split)")
        ],
        "it cuts off as many letters as the first example": [
            (
                "query[-len(outputs[0]) :]",
                "query[len(re.findall(r'Input: (\\w+)', prompt)[0]) - len(outputs[0]) :]",
            ),
        ],
        "examples of one length": [
            ("keep, words =", "length = rng.randint(5, 9)\n    keep, words ="),
            ("range(rng.randint(5, 9))", "range(length)"),
            ("            words = []\n", "            pass\n"),
        ],
    },
    "published_qkv": {
        "v is permuted, too": [("if part == 2:", "if part == 3:")],
        "the permutation the other way round": [
            ("i // 2 + i % 2 * (D // 2) for", "2 * i % D + 2 * i // D for")
        ],
        "a bias has no layout": [
            ("    D = len(rows)", "    if rows.dim() == 1:\n        return rows\n    D = len(rows)")
        ],
    },
    "speed_up": {
        "a straight line in FLOPs": [("np.log([", "np.array(["), ("np.exp(needed)", "needed")],
        "the line goes on beyond the runs": [
            (
                "needed = np.interp(-loss, -losses, logs)",
                "i = min(max(np.searchsorted(-losses, -loss), 1), len(runs) - 1)\n"
                "    share = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])\n"
                "    needed, mark = logs[i - 1] + share * (logs[i] - logs[i - 1]), ''",
            ),
        ],
        "the runs as they are given": [("sorted(scratch)", "scratch")],
    },
    "puzzle_block": {
        "added before it is summed": [('("z", "add", "x", "whole")', '("z", "add", "x", "part")')],
        "o is whole on each rank": [
            ('"o": "columns"', '"o": "whole"'),
            (
                '("part", "linear", "mixed", "o"),\n        ("whole", "all_reduce", "part"),',
                '("full", "all_gather", "mixed"),\n        ("whole", "linear", "full", "o"),',
            ),
        ],
        "a sum that is cut and gathered, twice": [
            (
                '("y", "add", "z", "whole"),',
                '("cut", "reduce_scatter", "part"), ("again", "all_gather", "cut"), '
                '("y", "add", "z", "again"),',
            ),
        ],
    },
    "puzzle_sequence": {
        "gathered before the norm": [
            (
                '("a", "norm", "x"),\n        ("all", "all_gather", "a"),',
                '("every", "all_gather", "x"),\n        ("all", "norm", "every"),',
            ),
        ],
        "summed on all ranks": [
            (
                '("mine", "reduce_scatter", "part"),\n        ("z"',
                '("mine", "all_reduce", "part"),\n        ("z"',
            )
        ],
        "not gathered": [
            (
                '("all", "all_gather", "a"),\n        ("heads", "linear", "all", "qkv")',
                '("heads", "linear", "a", "qkv")',
            )
        ],
    },
    "puzzle_1f1b": {
        "all forward passes first": [('"FFFFBFBFBFBFBBBB"', '"FFFFFFFFBBBBBBBB"')],
        "one too many on rank 1": [('"FFFBFBFBFBFBFBBB"', '"FFFFBFBFBFBFBBBB"')],
        "too few on rank 0": [('"FFFFBFBFBFBFBBBB"', '"FFFBFBFBFBFBFBBB"')],
    },
    "puzzle_interleaved": {
        "as long a start as PyTorch's": [
            ("first = 3 - rank + 4", "first = 2 * (3 - rank) + 4"),
        ],
        "as short a start as with one stage": [("first = 3 - rank + 4", "first = 4 - rank")],
        "groups of eight": [
            ("for group in (0, 4):", "for group in (0,):"),
            (
                "for i in range(4)]\n            for stage in (rank + 4, rank)",
                "for i in range(8)]\n            for stage in (rank + 4, rank)",
            ),
            (
                "group + i) for i in range(4)]\n        first",
                "group + i) for i in range(8)]\n        first",
            ),
        ],
    },
    "puzzle_memory": {
        "everything twice": [
            ('["FffFfffF", "FFffFfFf", "FFFFfFFF", "FFFfFFFF"]', '["ffffffff"] * 4')
        ],
        "nothing twice": [('["FffFfffF", "FFffFfFf", "FFFFfFFF", "FFFfFFFF"]', '["FFFFFFFF"] * 4')],
        "two ranks": [
            (
                '["FffFfffF", "FFffFfFf", "FFFFfFFF", "FFFfFFFF"]',
                '["ffffffff", "ffffffff", "FFFFFFFF", "FFFFFFFF"]',
            )
        ],
    },
    "puzzle_mesh": {
        "the pipeline inside a machine": [
            (
                "(pp, dp, tp) for pp in range(4) for dp in range(2) for tp in range(2)",
                "(pp, dp, tp) for dp in range(2) for tp in range(2) for pp in range(4)",
            )
        ],
        "pipeline and shards": [
            (
                "for pp in range(4) for dp in range(2) for tp in range(2)",
                "for half in (0, 2) for dp in range(2) for pp in (half, half + 1) "
                "for tp in range(2)",
            )
        ],
        "a rank twice": [("(pp, dp, tp) for", "(pp, dp, tp // 2) for")],
    },
}
CASES = [(name, what) for name, wrong in WRONG.items() for what in wrong]


@pytest.fixture(scope="module")
def student():
    """The processes in which the solutions run: they serve all of them."""
    with Student() as found:
        yield found


def test_every_assignment_has_three_wrong_solutions():
    """Each assignment and puzzle has a starter, a right solution and three wrong ones."""
    for name in ASSIGNMENTS:
        assert (ROOT / f"course/starters/{name}.py").is_file()
        assert (SOLUTIONS / f"{name}.py").is_file() and len(WRONG[name]) == 3
    assert set(WRONG) == set(ASSIGNMENTS)


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_a_right_solution_passes(student, name):
    """A right solution passes every check. (Inputs of one seed: a check that a right solution fails
    for rare inputs would show with others.)"""
    found = grade(student, ASSIGNMENTS[name], SOLUTIONS / f"{name}.py", seed=0)
    assert found.result == "passed", [v for v in found.verdicts if v.result != "passed"]


@pytest.mark.parametrize("name, what", CASES)
def test_a_wrong_solution_fails(student, tmp_path, name, what):
    """A wrong solution fails a check, by a wrong answer: it neither crashes the process nor takes
    all the time; and a counterexample or a reason is told."""
    source = (SOLUTIONS / f"{name}.py").read_text()
    for right, wrong in WRONG[name][what]:
        assert right in source, f"the right solution has no {right!r}"
        source = source.replace(right, wrong)
    file = tmp_path / "mine.py"
    file.write_text(source)
    found = grade(student, ASSIGNMENTS[name], file, seed=0)
    failed = [v for v in found.verdicts if v.result == "failed"]
    assert failed and all(v.text and v.says != "the file answers" for v in failed)
