"""course/symbolic.py - a transformer block on several ranks, in symbols: who holds what.

A tensor is a formula and a layout. The layouts over the ranks of a tensor-parallel group are

    whole       each rank holds all of it
    channels    each rank holds a piece of the last dimension: some heads, some hidden units
    tokens      each rank holds some of the positions
    terms       each rank holds one term: the tensor is their sum

An operation takes layouts for which each rank can compute its share from what it holds; for others
it raises ValueError and says why. A collective changes a layout, and costs traffic.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

RANKS = 4
TOKENS = 2048
WIDTHS = {"C": 1024, "3C": 3072, "F": 4096}
WEIGHTS = {"qkv": ("3C", "C"), "o": ("C", "C"), "up": ("F", "C"), "down": ("C", "F")}
# Collective -> (the layouts it takes, the layout it makes, its traffic: what a rank sends, as a
# share of the whole tensor, in a ring).
COLLECTIVES = {
    "all_reduce": (("terms",), "whole", Fraction(2 * (RANKS - 1), RANKS)),
    "reduce_scatter": (("terms",), "tokens", Fraction(RANKS - 1, RANKS)),
    "all_gather": (("tokens", "channels"), "whole", Fraction(RANKS - 1, RANKS)),
}


@dataclass(frozen=True)
class Symbol:
    """A tensor: the formula that it stands for, its layout, and its last dimension (WIDTHS)."""

    formula: str
    layout: str
    width: str = "C"

    @property
    def numbers(self) -> int:
        """How many numbers each rank holds of it."""
        whole = TOKENS * WIDTHS[self.width]
        return whole // RANKS if self.layout in ("channels", "tokens") else whole


def linear(x: Symbol, name: str, cut: str) -> Symbol:
    """x @ weight.T with the weight `name`, whole on each rank or cut by "rows" (each rank computes
    some outputs) or by "columns" (each rank reads some inputs)."""
    if name not in WEIGHTS:
        raise ValueError(f"there is no weight {name!r}; there are {', '.join(WEIGHTS)}")
    outside, inside = WEIGHTS[name]
    if x.width != inside:
        raise ValueError(f"{name} reads {inside} channels, x has {x.width}")
    layouts = {
        ("whole", "whole"): "whole",
        ("whole", "tokens"): "tokens",
        ("rows", "whole"): "channels",
        ("columns", "channels"): "terms",
    }
    if (cut, x.layout) not in layouts:
        takes = " or ".join(layout for known, layout in layouts if known == cut)
        problem = f"{name}, cut: {cut}, cannot multiply an x whose layout is {x.layout}"
        raise ValueError(f"{problem}: it takes {takes}")
    return Symbol(f"{name}({x.formula})", layouts[cut, x.layout], outside)


def gelu(x: Symbol) -> Symbol:
    """GELU of each number. Of a sum it is not the sum of the terms' GELUs."""
    if x.layout == "terms":
        raise ValueError("gelu of terms: GELU(a + b) is not GELU(a) + GELU(b); sum them first")
    return Symbol(f"gelu({x.formula})", x.layout, x.width)


def attention(x: Symbol) -> Symbol:
    """Attention of each head to all positions: x is q, k and v, whole heads of them."""
    if x.width != "3C":
        raise ValueError("attention reads what qkv gives")
    if x.layout not in ("whole", "channels"):
        raise ValueError(f"attention: a head needs all positions, x has the layout {x.layout}")
    return Symbol(f"attention({x.formula})", x.layout, "C")


def norm(x: Symbol) -> Symbol:
    """LayerNorm of each position, over all its channels."""
    if x.layout not in ("whole", "tokens"):
        raise ValueError(f"norm: it needs all channels of a position, x has the layout {x.layout}")
    return Symbol(f"norm({x.formula})", x.layout, x.width)


def add(a: Symbol, b: Symbol) -> Symbol:
    """The sum of two tensors of one layout."""
    if (a.layout, a.width) != (b.layout, b.width):
        shapes = f"{a.layout} of {a.width} and {b.layout} of {b.width}"
        raise ValueError(f"add: the two have different layouts, {shapes}")
    first, second = sorted((a.formula, b.formula), key=len)  # a + b is b + a
    return Symbol(f"({first} + {second})", a.layout, a.width)


def collective(name: str, x: Symbol) -> Symbol:
    """all_reduce, reduce_scatter or all_gather."""
    takes, makes, _ = COLLECTIVES[name]
    if x.layout not in takes:
        raise ValueError(f"{name} takes {' or '.join(takes)}, x has the layout {x.layout}")
    return Symbol(x.formula, makes, x.width)


# The operations without a weight, and how many tensors each reads.
OPERATIONS = {"gelu": (gelu, 1), "attention": (attention, 1), "norm": (norm, 1), "add": (add, 2)}


@dataclass(frozen=True)
class Line:
    """One step as the grader shows it."""

    step: str
    layout: str
    numbers: int  # that each rank holds of the result
    sent: int  # numbers that each rank sends


def run(cuts: dict, steps: list, start: Symbol) -> tuple[dict[str, Symbol], list[Line]]:
    """Carry out the steps: the tensors by name, and a line for each step.

    cuts: {weight: "rows", "columns" or "whole"}. steps: (result, operation, argument, ...).
    start: the tensor "x". Raises ValueError that names the step."""
    tensors, lines = {"x": start}, []
    for number, (result, operation, *names) in enumerate(steps, 1):
        step = f"{result} = {operation}({', '.join(names)})"
        try:
            tensors[result] = carry_out(cuts, operation, names, tensors)
        except ValueError as error:
            raise ValueError(f"step {number}, {step}: {error}") from None
        made, share = tensors[result], COLLECTIVES.get(operation, (None, None, 0))[2]
        sent = int(share * TOKENS * WIDTHS[made.width])
        lines.append(Line(step, made.layout, made.numbers, sent))
    return tensors, lines


def carry_out(cuts: dict, operation: str, names: list[str], tensors: dict) -> Symbol:
    """The result of one step."""
    takes_weight = operation == "linear"
    reads = names[:1] if takes_weight else names
    missing = [name for name in reads if name not in tensors]
    if missing:
        raise ValueError(f"there is no tensor {missing[0]!r} yet; there are {', '.join(tensors)}")
    values = [tensors[name] for name in reads]
    if takes_weight and len(names) == 2:
        return linear(values[0], names[1], cuts.get(names[1], "whole"))
    if operation in COLLECTIVES and len(values) == 1:
        return collective(operation, values[0])
    if operation in OPERATIONS and len(values) == OPERATIONS[operation][1]:
        return OPERATIONS[operation][0](*values)
    known = ["linear(x, weight)", *(f"{name}(x)" for name in ("gelu", "attention", "norm"))]
    known += ["add(a, b)", *(f"{name}(x)" for name in COLLECTIVES)]
    raise ValueError(f"the operations are {', '.join(known)}")
