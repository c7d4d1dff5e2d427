"""What does a run cost that grows? Tokens, FLOPs, days, GPU-hours and dollars of each stage.

    python -m lab.plan                      what growth saved the paper
    python -m lab.plan --stages tele-flm    what its successor's growth from 52B to 1T costs
    python -m lab.plan --stages mine.json   what stages of your own cost

A *plan* is a list of stages with their costs. Every number is arithmetic on the stages
(schedule.read_stages): nothing is trained.
"""

import argparse
import json
import math

import console
from console import read_json
from flm import count_parameters, forward_flops
from grow import DIMENSIONS
from schedule import PAPER_STAGES, Stage, read_stages

PAPER_BUDGET = 100_000  # dollars: the paper's title
PAPER_SCRATCH_DAYS = 76.74  # the paper's own estimate of 101B throughout (section 2.3)
PAPER_ZETTAFLOP = 52.76  # of the whole run, by the paper's count
# Tele-FLM's growth (arXiv 2407.02783). Printed: three stages of about 2.3e12 tokens in all; of the
# first 2e12 tokens and 896 GPUs for about two months (arXiv 2404.16645). OURS: the shape of 102B,
# how the later tokens are divided, their GPUs, their rate (what the first stage had), and one
# vocabulary and one output multiplier throughout, because a growth keeps them.
TELE_STAGES = [
    {"name": "52B", "preset": "tele-flm-52b", "tokens": 2e12, "days": 60, "gpus": 896},
    {
        **{"name": "102B*", "preset": "tele-flm-102b", "layers": "stack"},
        **{"tokens": 0.28e12, "tflops": 146, "gpus": 896},
    },
    {
        **{"name": "1T*", "preset": "tele-flm-1t", "layers": "stack"},
        **{"tokens": 0.02e12, "tflops": 146, "gpus": 896},
        "config": {"vocab_size": 80384, "output_mult": 0.5},
    },
]


def narayanan_flops(L: int, C: int, V: int, T: int, tokens: float, factor: float = 72) -> float:
    """Floating point operations of training on `tokens`, by the formula that the paper uses
    (section 4; Narayanan et al., arXiv 2104.04473, equation 3). factor: 72 without recomputation of
    activations, 96 with all of it, 84 with an error of 12 where that is not known."""
    return factor * tokens * L * C * C * (1 + T / (6 * C) + V / (16 * L * C))


SUMMED = ("tokens", "days", "gpu_hours", "dollars", "flop", "narayanan_72")


def stage_cost(stage: Stage, price: float) -> dict:
    """A row of the cost plan. price: dollars per GPU-hour."""
    c, gpus = stage.config, stage.gpus
    flop = 3 * forward_flops(c, c.max_seq_len) * stage.tokens
    days = stage.days or flop / (gpus * stage.tflops * 1e12 * 86400)
    formula = narayanan_flops(c.n_layers, c.d_model, c.vocab_size, c.max_seq_len, stage.tokens)
    return {
        "name": stage.name,
        **{key: getattr(c, key) for key in DIMENSIONS},
        "parameters": count_parameters(c),
        "tokens": stage.tokens,
        "days": days,
        "gpus": gpus,
        "gpu_hours": 24 * days * gpus,
        "dollars": 24 * days * gpus * price,
        "flop": flop,
        "tflops": flop / (days * 86400 * gpus) / 1e12,
        "narayanan_72": formula,
    }


def cost_plan(given: list[dict] | None = None, price: float | None = None) -> dict:
    """What a run costs, by stage and in total, and the same tokens at the final size
    throughout ("scratch", at the last stage's rate). Plain JSON.

    given: see read_stages; None: the paper's. Each needs tokens, gpus (or dp, tp, pp), and days or
    tflops (of a GPU). price: dollars per GPU-hour, by default what makes the paper's budget.
    "flop" counts what is multiplied, without recomputation. "tflops" is that over the stage's
    days, so it counts every pause too. Raises ValueError where a number is missing."""
    paper = read_stages(PAPER_STAGES)
    if price is None:
        price = PAPER_BUDGET / sum(24 * stage.days * stage.gpus for stage in paper)
    if not 0 < price < math.inf:
        raise ValueError(f"a price of {price} dollars per GPU-hour: must be above 0")
    stages = paper if given is None else read_stages(given)
    needs = "needs tokens, gpus (or dp, tp and pp), and days or tflops (per GPU)"
    lacking = [s for s in stages if not (s.tokens and s.gpus and (s.days or s.tflops))]
    console.refuse((f"{s.name}: {needs}" for s in lacking), "these stages cannot be costed:")
    rows = [stage_cost(stage, price) for stage in stages]
    total = {key: sum(row[key] for row in rows) for key in SUMMED}
    scratch = {key: rows[-1][key] * total["tokens"] / rows[-1]["tokens"] for key in SUMMED}
    times = {key: scratch[key] / total[key] for key in ("days", "flop")}
    return {"stages": rows, "total": total, "scratch": scratch, "times": times, "price": price}


# The bracket of narayanan_flops was made for the factor 96: there it counts the head, which is
# never recomputed, at 96/16 VC = 6 VC a token, as many as are multiplied. With 72 it counts 4.5 VC.
# So "flop", which counts what is multiplied, is larger than "narayanan_72" by 1.5 VC a token.
COLUMNS = "{:{}}{:>13}{:>12}{:>9}{:>7}{:>13}{:>12}{:>13}{:>18}"
HEADS = ("parameters*", "tokens", "days", "GPUs", "GPU-hours*", "dollars*", "zettaFLOP*")
HEADS += ("TFLOP/s per GPU*",)
TELE_NOTES = """
Where the numbers come from. The reports: tokens and GPUs of 52B, about two months, 2.3e12 tokens in
all, the shapes of 52B and 1T. Ours: all that is marked *, so every other number of the last two
stages, and the dollars, by FLM-101B's price of a GPU-hour."""
PAPER_NOTES = """
Where the numbers come from. The paper: days and tokens (Table 1), GPUs (Table 2), the shape of the
101B model. Ours: the shapes of the 16B and 51B models, and all that is marked *: parameters and
FLOPs by the shapes, GPU-hours by days and GPUs, dollars by the price that makes the paper's $100K.

Beside them the paper's own: {} days for 101B throughout (ours, {:.2f}, at the last stage's tokens
per day); {} zettaFLOP in all (ours: {:.2f} by its formula's 72-form, {:.2f} with the head in full);
162, 160 and 165 TFLOP/s per GPU while training (ours: over all the days of a stage)."""


def cost_row(name: str, row: dict, width: int) -> str:
    """A line of the table. Totals have no parameters, no GPUs and no rate."""
    parameters = gpus = rate = ""
    if "parameters" in row:
        parameters, gpus = f"{row['parameters'] / 1e9:.2f} B", row["gpus"]
        rate = f"{row['tflops']:.0f}"
    tokens, days, flop = f"{row['tokens'] / 1e9:.2f} B", f"{row['days']:.2f}", row["flop"] / 1e21
    hours, dollars = f"{row['gpu_hours']:,.0f}", f"{row['dollars']:,.0f}"
    cells = (parameters, tokens, days, gpus, hours, dollars, f"{flop:.2f}", rate)
    return COLUMNS.format(name, width, *cells).rstrip()


def describe_cost_plan(plan: dict) -> str:
    """The plan as a table; what is marked * is ours."""
    last, times = f"{plan['stages'][-1]['name']} throughout*", plan["times"]
    width = max(len(name) for name in (last, *(row["name"] for row in plan["stages"])))
    lines = [COLUMNS.format("stage", width, *HEADS)]
    lines += [cost_row(row["name"], row, width) for row in plan["stages"]]
    lines += [cost_row("grown", plan["total"], width), cost_row(last, plan["scratch"], width), ""]
    share = {key: 1 - 1 / value for key, value in times.items()}
    lines.append(
        f"growth saves {share['days']:.0%} of the days ({times['days']:.2f} times fewer) and "
        f"{share['flop']:.0%} of the FLOPs ({times['flop']:.2f} times fewer)*, at "
        f"${plan['price']:.4f} per GPU-hour"
    )
    return "\n".join(lines)


def describe_paper(plan: dict) -> str:
    """Where the numbers of the paper's plan come from, and the paper's own beside ours."""
    total = plan["total"]
    ours = plan["scratch"]["days"], total["narayanan_72"] / 1e21, total["flop"] / 1e21
    return PAPER_NOTES.format(PAPER_SCRATCH_DAYS, ours[0], PAPER_ZETTAFLOP, *ours[1:])


# --------------------------------------------------------------------------------------------------
# The command line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lab.plan",
        description="Tokens, FLOPs, days, GPU-hours and dollars of each stage of a run that grows, "
        "by default of the paper's.",
        epilog="example: python -m lab.plan --stages mine.json --price 2",
    )
    stages = (
        "tele-flm, or a JSON list of stages (see schedule.read_stages), each with tokens, gpus, "
        "and days or tflops"
    )
    parser.add_argument("--stages", metavar="FILE", help=stages)
    price = "of a GPU-hour (default: what makes the paper's budget of $100K)"
    parser.add_argument("--price", type=float, metavar="DOLLARS", help=price)
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    args = parser.parse_args(argv)
    tele = args.stages == "tele-flm"
    given = TELE_STAGES if tele else args.stages and read_json("--stages", args.stages)
    plan = cost_plan(given, args.price)
    print(json.dumps(plan, indent=1) if args.json else describe_cost_plan(plan))
    if not args.json and tele:
        print(TELE_NOTES)
    if not args.json and not args.stages:
        print(describe_paper(plan))
    return 0


if __name__ == "__main__":
    console.run(main)
