"""lab/growth.py - is growth worth it? The same size from scratch and by growth."""
from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import console
import schedule
import train
from flm import forward_flops
from lab.report import plot, pyplot, write_json
from schedule import read_stages


BENCH = ["--model", "n_layers=8", "d_model=32", "n_heads=1", "head_dim=32", "d_ff=128", "max_seq_len=128", "mup_base_width=32", "init_std=0.05",
         "--lr", "0.016", "--batch-size", "8", "--warmup", "400", "--eval-rows", "512", "--threads", "1", "--dtype", "float32"]


SCHEDULES = {                                    # start, ramp and warm-up in shares of the run, as in train.py's DEMO_STAGES
    "small": [{"config": {"n_layers": 2}}],      # never grown: what the final size has to beat
    "early": [{"config": {"n_layers": 2}}, {"config": {"n_layers": 8}, "start": 0.3, "ramp": 0.1, "warmup": 0.02}],
    "once": [{"config": {"n_layers": 2}}, {"config": {"n_layers": 8}, "start": 0.5, "ramp": 0.1, "warmup": 0.02}],
}


def shares(stages: list[dict], samples: int) -> list[dict]:
    """A schedule in shares of a run as one in samples, for train.py --stages. Raises ValueError for what is no share."""
    wrong = [f"{key} = {stage[key]!r}" for stage in stages for key in ("start", "ramp", "warmup") if key in stage
             and not (isinstance(stage[key], (int, float)) and 0 <= stage[key] < 1)]
    if wrong:
        raise ValueError(f"a schedule of the bench is in shares of its run, from 0 to 1, whatever its length; this one has {', '.join(wrong)}")
    return [{k: round(v * samples) if k in ("start", "ramp", "warmup") else v for k, v in stage.items()} for stage in stages]


def bench_plan(args) -> list[dict]:
    """Every run of the bench: {"name", "budget", "seed", "steps", "folder", "options", "stages", "tflop"}. A schedule's run has the steps
    whose FLOPs are those of `budget` steps from scratch. Raises ValueError for what train.py would refuse, before anything runs."""
    def resolve(options):
        given = vars(train.make_parser().parse_args(options))
        return train.resolve(train.Settings(**given | {"model": tuple(given["model"])}))

    settings, (whole,) = resolve([*BENCH, *args.train, "--steps", str(min(args.steps + (args.at or []))), "--stages", "none"])
    final, cost = whole["config"], lambda config: forward_flops(config, config.max_seq_len)
    schedules, runs, out = {"scratch": None}, [], Path(args.out)
    for word in args.stages:
        try:
            stages = SCHEDULES[word] if word in SCHEDULES else json.loads(Path(word).read_text())
            schedules |= stages if isinstance(stages, dict) else {Path(word).stem: stages}
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"--stages {word}: neither one of {', '.join(SCHEDULES)} nor a readable JSON file ({error})") from error
    out.mkdir(parents=True, exist_ok=True)
    for name, stages in schedules.items():
        for budget in args.steps if name == "scratch" else args.at or [min(args.steps)]:
            steps, file = budget, "none"
            if stages is not None:
                stages = [{**stages[0], "config": final.to_dict() | stages[0].get("config", {})}, *stages[1:]]
                plan = read_stages(shares(stages, 10 ** 6))
                ends = [*(stage["start"] for stage in plan[1:]), 10 ** 6]
                mean = sum(cost(stage["config"]) * (end - stage["start"]) for stage, end in zip(plan, ends)) / 10 ** 6
                steps, file = max(2 * len(plan), round(budget * cost(final) / mean)), str(out / f"{name}-{budget}.json")
                Path(file).write_text(json.dumps(shares(stages, steps * settings.batch_size), indent=1) + "\n")
            for seed in args.seeds:
                folder = out / f"{name}-{budget}-seed{seed}"
                options = [*BENCH, *args.train, "--steps", str(steps), "--seed", str(seed), "--stages", file, "--out", str(folder),
                           "--eval-every", str(steps), "--save-every", str(steps), "--keep", "1"]
                s, planned = resolve(options)
                if (folder / "cost.json").exists():
                    there = train.read_run(folder)
                    changed = [k for k, v in dataclasses.asdict(s).items() if k not in ("out", "threads", "stages") and getattr(there[0], k) != v != "auto"]
                    if changed or there[1] != planned:
                        raise ValueError(f"{folder} is a run of another bench ({', '.join(changed) or 'other stages'}): choose another --out")
                runs.append({"name": name, "budget": budget, "seed": seed, "steps": steps, "folder": folder, "options": options, "stages": planned,
                             "tflop": schedule.training_flops(planned, planned[-1]["end"]) / 1e12})
    train.open_corpus(settings.data, settings.tokenizer, settings.tokenizer_file, final)     # prepared once, before any run
    return runs


def bench_run(run: dict) -> dict:
    """Train where that is not done yet (a run that was interrupted begins again); returns what the run says of itself: its held-out loss, the
    losses around each growth, its seconds. cost.json, written last, says that it is whole. Raises ValueError with train.py's last words."""
    import resource                              # not on Windows, where all the rest works

    folder, log = run["folder"], run["folder"].with_suffix(".log")
    if not (folder / "cost.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        with open(log, "w") as output:
            code = subprocess.call([sys.executable, str(Path(train.__file__)), *run["options"]], stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=subprocess.STDOUT)
        if code:
            last = "\n  ".join(log.read_text(errors="replace").strip().splitlines()[-4:])
            raise ValueError(f"{folder.name}: train.py ended with code {code}, its last words (all of them are in {log}):\n  {last}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        (folder / "cost.json").write_text(json.dumps({"cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
                                                      "wall_seconds": round(time.perf_counter() - start, 1)}))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads((folder / "cost.json").read_text()) | {
        "loss": [line["val_loss"] for line in lines if "val_loss" in line][-1],
        "growths": [[line["loss_before"], line["loss_after"]] for line in lines if "grown" in line]}


def speed_up(scratch: dict[float, float], flop: float, loss: float) -> tuple[float | None, bool]:
    """(the FLOPs that training from scratch needs for `loss`, over `flop`; whether that is extrapolated). scratch: {FLOPs: loss} of two runs
    or more. Between two of them loss is a straight line in log FLOPs; beyond the ends the nearest line goes on. None where there is no line,
    or one on which more training is worse."""
    points = sorted(scratch.items())
    if len(points) < 2 or not all(b < a for (_, a), (_, b) in zip(points, points[1:])):
        return None, True
    i = next((i for i, (_, b) in enumerate(points[1:-1]) if loss >= b), len(points) - 2)
    (f, a), (g, b) = points[i:i + 2]
    return f * (g / f) ** ((a - loss) / (a - b)) / flop, not points[-1][1] <= loss <= points[0][1]


def bench(args) -> dict[tuple, dict]:
    """Run all, print the table, write bench.json and the plot."""
    def times(value):
        return "-" if value is None else f"{value:.2f}"

    def describe(stages):
        return " -> ".join(f"{stage['config'].n_layers}x{stage['config'].d_model}" + (
            f" at {stage['start'] / stages[-1]['end']:.0%}, ramp {stage['ramp'] / stages[-1]['end']:.0%}" if stage["start"] else "") for stage in stages)

    rows: dict[tuple, dict] = {}
    for run in tqdm(bench_plan(args), unit="run", dynamic_ncols=True):
        row = rows.setdefault((run["name"], run["budget"]), {k: run[k] for k in ("name", "budget", "steps", "tflop")} | {"stages": describe(run["stages"])})
        for key, value in bench_run(run).items():
            row.setdefault(key, {})[run["seed"]] = value
    scratch = [row for row in rows.values() if row["name"] == "scratch"]
    for row in rows.values():
        row |= {"mean": {key: statistics.mean(row[key].values()) for key in ("loss", "cpu_seconds", "wall_seconds")}}
    for row in rows.values():
        row["speed_up"], row["extrapolated"] = speed_up({r["tflop"]: r["mean"]["loss"] for r in scratch}, row["tflop"], row["mean"]["loss"])
        row["by_seed"] = {seed: speed_up({r["tflop"]: r["loss"][seed] for r in scratch}, row["tflop"], loss)[0] for seed, loss in row["loss"].items()}

    print(f"\n{'run':22}{'steps':>6}{'TFLOP':>8}{'CPU s':>7}{'wall s':>7}{'loss':>8}{'speed-up':>10}{'by seed' if len(args.seeds) > 1 else '':>14}   stages")
    for row in sorted(rows.values(), key=lambda row: (row["name"] != "scratch", row["budget"], row["mean"]["loss"])):
        seeds = " to ".join(times(value) for value in sorted(row["by_seed"].values(), key=lambda v: v or 0)[::len(args.seeds) - 1]) if len(args.seeds) > 1 else ""
        print(f"{row['name'] + ' ' + str(row['budget']):22}{row['steps']:6}{row['tflop']:8.2f}{row['mean']['cpu_seconds']:7.0f}{row['mean']['wall_seconds']:7.0f}"
              f"{row['mean']['loss']:8.4f}{times(row['speed_up']):>9}{'*' if row['extrapolated'] else ' '}{seeds:>14}   {row['stages']}")
    print(f"loss: held out, nats per token, mean of {len(args.seeds)} seed(s). speed-up: the FLOPs that scratch training needs for that loss, over those spent,\n"
          "by straight lines in log FLOPs between the scratch runs; * where a line is extended. Seconds: the whole process. Stages: layers x width, in shares of the run.")
    write_json(Path(args.out) / "bench.json", {"options": [*BENCH, *args.train], "torch": torch.__version__, "rows": list(rows.values())})
    if args.plot:
        plot(args.plot, 2, [("one size, several ways", label, "held-out loss", {
            name: zip(*sorted((row["mean"].get(key, row["tflop"]), row["mean"]["loss"]) for row in rows.values() if row["name"] == name))
            for name in dict.fromkeys(row["name"] for row in rows.values())}) for label, key in (("TFLOP", "tflop"), ("CPU seconds", "cpu_seconds"))])
    return rows


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    p = argparse.ArgumentParser(prog="lab.growth", description="How much sooner does a grown model get to the same loss?")
    p.add_argument("--out", default="runs/bench", metavar="DIR")
    p.add_argument("--steps", type=int, nargs="+", default=[2000, 4000])
    p.add_argument("--at", type=int, nargs="+", metavar="STEPS")
    p.add_argument("--stages", nargs="+", default=list(SCHEDULES), metavar="SCHEDULE")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--plot", metavar="FILE")
    args = p.parse_args(argv[:end])
    args.train = argv[end + 1:]
    if args.plot:
        pyplot()
    bench(args)
    return 0




if __name__ == "__main__":
    console.run(main)
