"""course/assignments.py - the assignments and puzzles, in the order of the chapters."""

from __future__ import annotations

from dataclasses import dataclass

from console import did_you_mean

# The checks register themselves when these are imported.
from course.checks import data, growth, iq, model, mup, parallel  # noqa: F401
from course.checks import published, puzzles, recipe  # noqa: F401


@dataclass(frozen=True)
class Assignment:
    """What a student writes, and how it is graded."""

    name: str  # of the file course/starters/NAME.py, too
    chapter: int
    title: str
    functions: tuple[str, ...]
    seconds: float = 60  # what all answers may take together
    ranks: int = 1  # processes that run the file at the same time
    measure: bool = False  # whether the size of tensors is watched
    not_allowed: tuple[str, ...] = ()  # modules that would do the work


PIPELINING = ("torch.distributed.pipelining",)
OPTIMIZERS = ("scipy.optimize",)

# fmt: off
ASSIGNMENTS = {assignment.name: assignment for assignment in (
    Assignment("xpos", 1, "rotary positions with a decay", ("rotate",)),
    Assignment("attention", 1, "causal attention with a cache", ("attend",)),
    Assignment("loss", 1, "the loss and its gradients without all logits", ("chunked_loss",),
               measure=True),
    Assignment("sampler", 2, "the sampler without state", ("pick", "shuffled"), ranks=2),
    Assignment("masked_norm", 3, "LayerNorm with a growth mask", ("masked_norm",)),
    Assignment("grow_tensor", 3, "growing one tensor", ("grow_parameter",)),
    Assignment("grow_moments", 3, "growing AdamW's moments", ("grow_moments",)),
    Assignment("mup", 4, "muP's initial values and groups", ("initial_std", "adamw_group")),
    Assignment("loss_law", 4, "fitting the loss law", ("fit_law",), not_allowed=OPTIMIZERS),
    Assignment("one_f_one_b", 5, "the order of 1F1B", ("order",), not_allowed=PIPELINING),
    Assignment("tensor_parallel", 5, "linear layers on two ranks", ("column_linear", "row_linear"),
               ranks=2, not_allowed=("torch.distributed.tensor",)),
    Assignment("grad_norm", 5, "the norm of a gradient that is cut", ("square_share", "clipped")),
    Assignment("iq_task", 6, "a task with its solver", ("make_item", "solve")),
    Assignment("published_qkv", 7, "a published model's q, k and v", ("read_qkv", "write_qkv")),
    Assignment("speed_up", 8, "the speed-up at equal loss", ("speed_up",)),
    Assignment("puzzle_block", 5, "a block in two all-reduces", ("plan",)),
    Assignment("puzzle_sequence", 5, "the same, cut by tokens", ("plan",)),
    Assignment("puzzle_1f1b", 5, "one forward, one backward", ("orders",), not_allowed=PIPELINING),
    Assignment("puzzle_interleaved", 5, "two pipeline stages on a rank", ("orders",),
               not_allowed=PIPELINING),
    Assignment("puzzle_memory", 5, "less memory, computed again", ("orders",),
               not_allowed=PIPELINING),
    Assignment("puzzle_mesh", 5, "which rank stands where", ("place",)),
)}
# fmt: on


def find_assignment(name: str) -> Assignment:
    """The assignment of that name. Raises ValueError with the nearest names."""
    if name in ASSIGNMENTS:
        return ASSIGNMENTS[name]
    hint = did_you_mean(name.lower(), ASSIGNMENTS)
    raise ValueError(f"unknown assignment {name!r}: {hint}there are {', '.join(ASSIGNMENTS)}")
