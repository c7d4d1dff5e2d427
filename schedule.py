"""schedule.py - a run as pure functions of the samples seen: stages, learning rate, FLOPs, cost."""
from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

import console
import grow
from flm import FLM, FLMConfig, forward_flops, preset


# The paper's three stages. lr (at the stage's start), warmup (samples), days, tokens: its Table 1. batch_size (rows of 2048
# tokens), tp, pp, dp, tflops (per GPU, while training): its Table 2. (Table 1's "4.31M tokens" for the last batch is not 2160 rows,
# which are 4.42M.) The shapes behind the presets flm-16b and flm-51b are OURS, as are layers and ramp: the paper prints none.
PAPER_STAGES = [
    {"name": "16B", "preset": "flm-16b", "lr": 4e-4, "warmup": 4_608_000, "batch_size": 2304, "tokens": 245.37e9, "days": 9.63,
     "tp": 2, "pp": 1, "dp": 96, "tflops": 162},
    {"name": "51B", "preset": "flm-51b", "lr": 3.4e-4, "warmup": 230_400, "batch_size": 2304, "tokens": 39.64e9, "days": 5.37,
     "tp": 4, "pp": 2, "dp": 24, "tflops": 160, "layers": "stack", "ramp": 230_400},
    {"name": "101B", "preset": "flm-101b", "lr": 2e-4, "warmup": 230_400, "batch_size": 2160, "tokens": 26.54e9, "days": 6.54,
     "tp": 4, "pp": 4, "dp": 12, "tflops": 165, "layers": "stack", "ramp": 230_400},
]


PAPER_BUDGET = 100_000                           # dollars: the paper's title


PAPER_SCRATCH_DAYS = 76.74                       # its own estimate of 101B throughout (section 2.3)


STAGE_FIELDS = {"name", "preset", "config", "start", "ramp", "layers", "moments", "lr", "warmup", "batch_size", "steps", "tokens", "days", "tp", "pp", "dp",
                "gpus", "tflops"}


STAGE_NUMBERS = {"lr", "tokens", "days", "tflops"}                                       # above 0; the other numbers are whole


def read_stages(stages: list[dict]) -> list[dict]:
    """Check a schedule; returns it with each stage's "config" as an FLMConfig, and with "start", "ramp" and "layers" filled in.

    A stage: {"preset": name, and/or "config": {fields}} is its model (fields not named are the preset's, or the stage's before),
    "tokens" or the next stage's "start" (in samples) its length; STAGE_FIELDS are all the keys. Training reads lr, warmup,
    batch_size, layers, moments and ramp, the plan days, gpus (or tp, pp, dp) and tflops.
    Raises ValueError naming all that is wrong with the first bad stage (the later ones build on it): unknown keys, impossible
    values, a shrinking target, a start that goes backwards, or that lies in the ramp of the stage before."""
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError('a schedule is a list of stages, such as [{"preset": "flm-16b", "tokens": 245.37e9}, ...]')
    result = []
    for i, given in enumerate(stages):
        before = result[-1] if result else None
        stage = {"name": given.get("preset", f"stage {i + 1}"), "layers": "stack", "moments": "zeros", "ramp": 0, **given}
        problems = [f"unknown key {key!r}; there are {', '.join(sorted(STAGE_FIELDS))}" for key in given if key not in STAGE_FIELDS]
        for key in STAGE_FIELDS & {*stage} - {"name", "preset", "config", "layers", "moments"}:
            value, kind = stage[key], (int, float) if key in STAGE_NUMBERS else int
            if not isinstance(value, kind) or isinstance(value, bool) or not (0 < value < math.inf or value == 0 and key in ("start", "ramp", "warmup")):
                problems.append(f"{key} = {value!r}: must be a {'number' if key in STAGE_NUMBERS else 'whole number'} above 0")
        try:
            base = preset(stage["preset"]).to_dict() if "preset" in stage else before["config"].to_dict() if before else {}
            stage["config"] = FLMConfig.from_dict(base | dict(stage.get("config", {})))
            if before:
                grow.prepare(before["config"], stage["config"], stage["layers"], stage["moments"], 0, 0, 1)
        except (ValueError, TypeError) as error:
            problems.append(str(error))
        if not problems and not before and stage.setdefault("start", 0):
            problems.append(f"starts at sample {stage['start']:,}; the first stage starts at 0")
        if not problems and before:
            if "start" not in stage and "tokens" in before:
                stage["start"] = before["start"] + round(before["tokens"] / before["config"].max_seq_len)
            if "start" not in stage:
                problems.append("needs a start in samples, or the stage before it its tokens")
            elif stage["start"] <= before["start"]:
                problems.append(f"starts at sample {stage['start']:,}, which is not after stage {i}'s start, {before['start']:,}")
            elif stage["start"] < before["start"] + before["ramp"]:
                problems.append(f"starts at sample {stage['start']:,}, before stage {i}'s ramp is over, at {before['start'] + before['ramp']:,}")
            else:
                before.setdefault("tokens", (stage["start"] - before["start"]) * before["config"].max_seq_len)
        if problems:
            raise ValueError(f"this schedule does not work: stage {i + 1} ({stage['name']})\n  " + "\n  ".join(problems))
        result.append(stage)
    return result


def narayanan_flops(L: int, C: int, V: int, T: int, tokens: float, factor: float = 72) -> float:
    """Floating point operations of training on `tokens`, by the formula that the paper uses (section 4; Narayanan et al.
    2104.04473, equation 3): 72 without recomputation, 96 with all of it, 84 with an error of 12 where that is not known.

    The bracket was made for 96, where it counts the head, never recomputed, at 96/16 VC = 6 VC a token, as many as are multiplied; with
    72 it counts 4.5 VC, so 3 * flm.forward_flops, which counts what is multiplied, is larger than the 72-form by 1.5 VC a token."""
    return factor * tokens * L * C * C * (1 + T / (6 * C) + V / (16 * L * C))


def cost_plan(stages: list[dict] | None = None, price: float | None = None) -> dict:
    """What a schedule costs, by stage and in total, and the same tokens at the final size throughout. Plain JSON.

    stages: see read_stages; none: the paper's. Each needs tokens, gpus (or tp, pp, dp), and days or tflops. price: dollars per
    GPU-hour, by default what makes the paper's budget. "scratch" takes the last stage's rate; "flop" counts what is
    multiplied, without recomputation; "tflops" is that over the stage's days, so it counts every pause too."""
    ours, paper = stages is None, sum(24 * s["days"] * s["tp"] * s["pp"] * s["dp"] for s in PAPER_STAGES)
    price = PAPER_BUDGET / paper if price is None else price
    if not 0 < price < math.inf:
        raise ValueError(f"a price of {price} dollars per GPU-hour: must be above 0")
    rows, problems = [], []
    for stage in read_stages(PAPER_STAGES if ours else stages):
        config, gpus = stage["config"], stage.get("gpus", stage.get("tp", 0) * stage.get("pp", 0) * stage.get("dp", 0))
        if "tokens" not in stage or not gpus or not ("days" in stage or "tflops" in stage):
            problems.append(f"{stage['name']}: needs tokens, gpus (or tp, pp and dp), and days or tflops (per GPU)")
            continue
        flop = 3 * forward_flops(config, config.max_seq_len) * stage["tokens"]
        days = stage["days"] if "days" in stage else flop / (gpus * stage["tflops"] * 1e12 * 86400)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in FLM(config).parameters())
        rows.append({"name": stage["name"], "n_layers": config.n_layers, "d_model": config.d_model, "n_heads": config.n_heads, "d_ff": config.d_ff,
                     "parameters": parameters, "tokens": stage["tokens"], "days": days, "gpus": gpus, "gpu_hours": 24 * days * gpus,
                     "dollars": 24 * days * gpus * price, "flop": flop, "tflops": flop / (days * 86400 * gpus) / 1e12,
                     "narayanan_72": narayanan_flops(config.n_layers, config.d_model, config.vocab_size, config.max_seq_len, stage["tokens"])})
    if problems:
        raise ValueError("this schedule cannot be costed:\n  " + "\n  ".join(problems))
    last, summed = rows[-1], ("tokens", "days", "gpu_hours", "dollars", "flop", "narayanan_72")
    total = {key: sum(row[key] for row in rows) for key in summed}
    scratch = {key: last[key] * total["tokens"] / last["tokens"] for key in summed}
    return {"stages": rows, "total": total, "scratch": scratch, "price": price,
            "saving": {"days": 1 - total["days"] / scratch["days"], "times": scratch["days"] / total["days"],
                       "flop": 1 - total["flop"] / scratch["flop"], "flop_times": scratch["flop"] / total["flop"]},
            "sources": {"tokens": "the paper, Table 1" if ours else "the schedule",
                        "days": "the paper, Table 1" if ours else "the schedule, or ours from its tflops",
                        "gpus": "the paper, Table 2" if ours else "the schedule",
                        "shapes": "101B: the paper; 16B and 51B: ours" if ours else "the schedule",
                        "parameters, flop, tflops, narayanan_72": "ours, from the shapes",
                        "gpu_hours, scratch, saving": "ours, from days, tokens and GPUs",
                        "dollars": "ours: the price per GPU-hour " + ("that makes the paper's $100K" if price == PAPER_BUDGET / paper else "given")},
            **({"paper_scratch_days": PAPER_SCRATCH_DAYS, "paper_zettaflop": 52.76,
                "paper_tflops": {stage["name"]: stage["tflops"] for stage in PAPER_STAGES}} if ours else {})}


def show_plan(p: dict) -> str:
    """The plan as a table; what is marked * is ours."""
    heads = ("stage", "parameters*", "tokens", "days", "GPUs", "GPU-hours*", "dollars*", "zettaFLOP*", "TFLOP/s per GPU*")

    def row(name, r, parameters="", gpus="", rate=""):
        return (name, parameters, f"{r['tokens'] / 1e9:.2f} B", f"{r['days']:.2f}", gpus, f"{r['gpu_hours']:,.0f}", f"{r['dollars']:,.0f}",
                f"{r['flop'] / 1e21:.2f}", rate)

    table = [heads, *(row(r["name"], r, f"{r['parameters'] / 1e9:.2f} B", str(r["gpus"]), f"{r['tflops']:.0f}") for r in p["stages"]),
             row("grown", p["total"]), row(f"{p['stages'][-1]['name']} throughout*", p["scratch"])]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join([line[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(line[1:], widths[1:]))]).rstrip() for line in table]
    s = p["saving"]
    lines += ["", f"growth saves {s['days']:.0%} of the days ({s['times']:.2f} times fewer) and {s['flop']:.0%} of the FLOPs ({s['flop_times']:.2f} times fewer)*, "
              f"at ${p['price']:.4f} per GPU-hour", "", "where the numbers come from:"]
    lines += [f"  {what}: {where}" for what, where in p["sources"].items()]
    if "paper_scratch_days" in p:
        lines += [f"beside the paper's own: {p['paper_scratch_days']} days for 101B throughout (ours: {p['scratch']['days']:.2f}, from the last stage's tokens per day); "
                  f"{p['paper_zettaflop']} zettaFLOP",
                  f"in all (ours: {p['total']['narayanan_72'] / 1e21:.2f} by its formula's 72-form, {p['total']['flop'] / 1e21:.2f} with the head in full); "
                  + ", ".join(f"{v} ({k})" for k, v in p["paper_tflops"].items()) + " TFLOP/s per GPU while",
                  "training, where ours divides by all the days of a stage."]
    return "\n".join(lines)


DEMO_STAGES = [                                  # the paper's recipe in miniature; starts in shares of the run
    {"config": {"n_layers": 2}},
    {"config": {"n_layers": 4}, "start": 0.55, "ramp": 0.08, "layers": "stack", "warmup": 0.02},
    {"config": {"n_layers": 6}, "start": 0.78, "ramp": 0.08, "layers": "stack", "warmup": 0.02},
]


# "flm-...": the paper's Table 1 (steps inferred: tokens / batch). The others: ours, found by trying.
RECIPES = {
    "demo": {"steps": 600, "batch_size": 16, "lr": 3e-3, "warmup": 800, "stages": DEMO_STAGES},
    "iq-demo": {"steps": 4000, "batch_size": 8, "lr": 2e-3, "warmup": 1000},
    **{stage["preset"]: {"steps": round(stage["tokens"] / stage["batch_size"] / 2048),
                         **{k: stage[k] for k in ("batch_size", "lr", "warmup")}} for stage in PAPER_STAGES},
}


def plan_stages(s, config: FLMConfig, seen: int = 0) -> list[dict]:
    """The run's stages from small to large; one where nothing grows. read_stages has the fields; what it leaves open is
    filled in: "lr" (at the stage's start; None: the cosine just goes on), "warmup", "batch_size", and "end". A stage begins
    with the first whole step at or after its "start". seen: samples that a checkpoint brings along, from which all counts.
    Raises ValueError with all violations."""
    total = s.steps * s.batch_size
    if s.stages == "paper":
        given = PAPER_STAGES
    elif s.stages not in (None, "none"):
        try:
            given = json.loads(Path(s.stages).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{s.stages} is not JSON: {error}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--stages {s.stages}: cannot be read ({error}); give a JSON file of stages, paper or none") from error
    elif s.stages is None and "stages" in RECIPES[s.preset] and not s.model and not s.init_from:
        given = [{k: round(v * total) if k in ("start", "ramp", "warmup") else v for k, v in stage.items()}
                 for stage in RECIPES[s.preset]["stages"]]
    else:
        given = [{}]
    if isinstance(given, list) and given and isinstance(given[0], dict) and "preset" not in given[0] \
            and isinstance(given[0].get("config", {}), dict):
        given = [{**given[0], "config": config.to_dict() | given[0].get("config", {})}, *given[1:]]
    stages = read_stages(given)
    for i, stage in enumerate(stages):
        stage.setdefault("lr", None if i else s.lr)
        stage.setdefault("warmup", 0 if i else s.warmup)
        stage.setdefault("batch_size", s.batch_size)
        if i:
            before = stages[i - 1]
            steps = -(-(stage["start"] - before["start"]) // before["batch_size"])
            before["end"] = stage["start"] = before["start"] + steps * before["batch_size"]
    last = stages[-1]
    last["end"] = last["start"] + round(last["tokens"] / last["config"].max_seq_len) if s.stages == "paper" else total
    if last["end"] <= last["start"]:
        raise ValueError(f"the last stage starts at sample {last['start']:,}, but {s.steps} steps of {s.batch_size} end at "
                         f"sample {total:,}: ask for more --steps")
    return [{**stage, "start": stage["start"] + seen, "end": stage["end"] + seen} for stage in stages]


def learning_rate(s, stages: list[dict], samples: int) -> float:
    """At the end of the step that brings the run to `samples`: a straight warm-up, then half a cosine that ends with the last
    sample at min_lr of the peak.

    The paper's stages "approximately inherit the previous learning rate and adhere to the same schedule" (section 2.4): a
    stage without an "lr" leaves the cosine alone, one with a lower "lr" makes it slower or faster, so that it comes by there at
    the stage's start, and one with the same or a higher "lr" sets it back to there. Each stage may warm up again."""
    named = [stage for stage in stages if stage["lr"] is not None]
    peak, floor = max(stage["lr"] for stage in named), s.min_lr

    def phase(lr):                               # where on the cosine, from 0 to 1, that learning rate is
        share = (lr / peak - floor) / (1 - floor) if floor < 1 else 1.0
        return math.acos(max(-1.0, min(1.0, 2 * share - 1))) / math.pi

    i = max(i for i, stage in enumerate(named) if i == 0 or stage["start"] < samples)
    begin, a, end, b = named[i]["start"] + (0 if i else named[0]["warmup"]), phase(named[i]["lr"]), stages[-1]["end"], 1.0
    if i + 1 < len(named) and phase(named[i + 1]["lr"]) > a:
        end, b = named[i + 1]["start"], phase(named[i + 1]["lr"])
    done = min(1.0, max(0.0, (samples - begin) / max(1, end - begin)))
    lr = peak * (floor + (1 - floor) * (1 + math.cos(math.pi * (a + (b - a) * done))) / 2)
    stage = [stage for stage in stages if stage["start"] < samples][-1]
    return lr * min(1.0, (samples - stage["start"]) / max(1, stage["warmup"]))


def training_flops(stages: list[dict], samples: int) -> int:
    """Floating point operations of the model on the way to `samples`: three forward passes' worth."""
    return sum(3 * forward_flops(st["config"], st["config"].max_seq_len) * st["config"].max_seq_len
               * (min(samples, st["end"]) - st["start"]) for st in stages if st["start"] < samples)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="schedule.py", description="Tokens, FLOPs, days, GPU-hours and dollars of each stage.")
    parser.add_argument("--schedule", metavar="FILE.json")
    parser.add_argument("--price", type=float, metavar="DOLLARS")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    args = parser.parse_args(argv)
    stages = None
    if args.schedule:
        try:
            stages = json.loads(Path(args.schedule).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{args.schedule} is not JSON: {error}") from error
    result = cost_plan(stages, args.price)
    print(json.dumps(result, indent=1) if args.json else show_plan(result))
    return 0




if __name__ == "__main__":
    console.run(main)
