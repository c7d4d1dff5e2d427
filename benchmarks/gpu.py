"""What a GPU does with this code, as one JSON object: python -m benchmarks.gpu [--out FILE]

    python -m benchmarks.gpu --device cpu --tiny    the same on a CPU, on models that are small

It asks, in this order:

    parity          does the GPU compute what the CPU computes, in float64, fp32 and bf16?
    deterministic   does --deterministic give the same bits twice?
    training        tokens per second, utilisation and peak memory of models of several sizes,
                    beside the memory that lab.cluster rehearses
    --compile       the same of the model of 1 billion parameters, compiled
    profile         the ten costliest operations of its step
    generation      tokens per second at batch 1 and 32, beside transformers' (pip install
                    transformers), which is optional
    verdicts        is the memory within 5% of the rehearsed one, is the utilisation 60%?

It is made for one GPU and ten minutes. --out is written after each part, so a machine that is taken
away keeps what was found. Training runs in processes of its own, which see no other part's memory
and have a time limit. A part that fails has its error in the JSON, and the others go on. The exit
code is 1 where a part fails, or a memory is not the rehearsed one; a utilisation below the goal is
said. No GPU has run it yet.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import console
import muP
import parallel
import train
import watch
from checkpoint import find_checkpoint, read_tensors, stored_tensors
from flm import FLM, FLMConfig, count_parameters
from lab import cluster
from machine import name_of, now, pick_device, set_up
from sample import generate
from settings import Settings, resolve

V = 50_304
LIMIT = 150  # seconds that a command may take
WITHIN = 0.05  # of the rehearsed memory
GOAL = 0.6  # of the GPU's peak, at 1 billion parameters; the best public trainers reach 0.5 to 0.6


def flm(L: int, C: int, T: int = 2048, vocabulary: int = V) -> FLMConfig:
    """A model of FLM-101B's kind with heads of at most 128."""
    D = min(C, 128)
    return FLMConfig(L, C, C // D, D, 4 * C, vocabulary, T)


# name -> (model, rows of a batch at first)
SIZES = {
    "0.1B": (flm(12, 768), 32),
    "0.4B": (flm(24, 1024), 16),
    "1B": (flm(20, 2048), 16),
    "3B": (flm(28, 3072), 8),
}
TINY = {"tiny": (flm(2, 64, 64, 512), 4), "small": (flm(3, 128, 64, 512), 4)}


# --------------------------------------------------------------------------------------------------
# Parity, and the same bits twice


def loss_and_gradient(device: torch.device, weights: torch.dtype, arithmetic: torch.dtype):
    """(loss, whole gradient in float64 on the CPU) of a small model on one batch."""
    config = flm(2, 256, 128, 1024)
    model = muP.init_weights(FLM(config).to(weights), 0).to(device)
    worker = parallel.Worker([model], parallel.World(), arithmetic)
    rows = torch.randint(1024, (8, 129), generator=torch.Generator().manual_seed(0))
    nats, count = worker.gradients(rows[:, :-1], rows[:, 1:], 4)
    return nats / count, torch.cat([p.grad.double().cpu().flatten() for p in model.parameters()])


def parity(device: torch.device) -> dict:
    """How far loss and gradient are from those of the CPU in float64, relative to these, beside how
    far the CPU's own are. The limit of float64 and fp32 leaves room for sums in another order. That
    of bf16 is twice the CPU's own distance: its rounding decides."""
    cpu, kinds = torch.device("cpu"), {}
    loss, gradient = loss_and_gradient(cpu, torch.float64, torch.float64)
    limits = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.0}
    for kind, limit in limits.items():
        weights, found = torch.promote_types(kind, torch.float32), {}
        for name, place in ("cpu", cpu), ("device", device):
            nats, g = loss_and_gradient(place, weights, kind)
            found[name] = {
                "loss": abs(nats - loss) / loss,
                "gradient": ((g - gradient).norm() / gradient.norm()).item(),
            }
        allowed = {k: max(limit, 2 * own) for k, own in found["cpu"].items()}
        if kind == torch.bfloat16:  # a loss can be right by chance
            allowed["loss"] = max(allowed["loss"], 2**-8)
        found["limit"] = allowed
        found["passed"] = all(found["device"][k] <= allowed[k] for k in allowed)
        kinds[name_of(kind)] = found
    return kinds


def command(*words) -> str:
    """What a command of this repository prints. Raises RuntimeError with its last lines, or where
    it takes longer than LIMIT; then, and where this process ends, it is killed."""
    line = [sys.executable, *map(str, words)]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(line[1:])}: not done in {LIMIT} seconds") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(line[1:])}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def changed_fields(config: FLMConfig) -> list[str]:
    """What --model needs to make this model of the default one."""
    usual = FLMConfig.__dataclass_fields__
    return [f"{k}={v}" for k, v in config.to_dict().items() if v != usual[k].default]


def words_of(config: FLMConfig, rows: int, device: torch.device) -> list[str]:
    """The options of train.py for a model and a batch."""
    words = ["--model", *changed_fields(config), "--batch-size", rows]
    return [*map(str, words), "--dtype", "bfloat16", "--device", str(device)]


def deterministic(device: torch.device, config: FLMConfig, folder: Path) -> dict:
    """Two runs with --deterministic: the tensors, moments and all, that differ in a bit."""
    command("data.py", "prepare", "tutorials", "--out", folder / "text")
    words = ["--data", folder / "text", "--steps", 10, "--eval-rows", 2]
    words += [*words_of(config, 4, device), "--deterministic", "--out"]
    runs = []
    for name in "ab":
        command("train.py", *words, folder / name)
        path, tensors = find_checkpoint(folder / name), {}
        for key, (size, dtype) in stored_tensors(path).items():
            tensors[key] = torch.empty(size, dtype=dtype)
        read_tensors(path, tensors)
        runs.append(tensors)
    differ = [key for key, value in runs[0].items() if not torch.equal(value, runs[1][key])]
    return {"tensors": len(runs[0]), "differ": differ, "passed": not differ}


# --------------------------------------------------------------------------------------------------
# Training


def time_training(config: FLMConfig, rows: int, device: torch.device, *more: str) -> dict:
    """`lab.bench`. Where the memory is too small, half as many rows, and again."""
    while True:
        try:
            text = command("-m", "lab.bench", *words_of(config, rows, device), *more)
            return json.loads(text)
        except RuntimeError as error:
            if "out of memory" not in str(error) or rows == 1:
                raise
            rows //= 2


def rehearsed_memory(config: FLMConfig, rows: int) -> float:
    """Peak GiB of that training step, as lab.cluster rehearses it."""
    job = cluster.Job(config, parallel.Layout(), rows, rows)
    cases = cluster.rehearse(job, cluster.Cluster(memory_gb=1e6))["cases"]
    return cases[cluster.WITHOUT][0]["peak"] / cluster.GiB


def training(device: torch.device, config: FLMConfig, rows: int) -> dict:
    """The benchmark of a size, and its memory beside the rehearsed one."""
    result = time_training(config, rows, device)
    expected = rehearsed_memory(config, result["batch_size"])
    result["rehearsed_memory_gib"] = round(expected, 3)
    if device.type == "cuda":  # a CPU's peak has the libraries in it
        result["memory / rehearsed"] = round(result["peak_memory_gib"] / expected, 4)
    return result


def compiled(device: torch.device, config: FLMConfig, plain: dict) -> dict:
    """The benchmark of a size under --compile. plain: what `training` found of it."""
    result = time_training(config, plain["batch_size"], device, "--compile")
    result["speed / without"] = round(result["tokens_per_s"] / plain["tokens_per_s"], 3)
    return result


def profile(device: torch.device, config: FLMConfig, rows: int, steps: int = 3) -> dict:
    """The ten costliest operations of training steps, as train.py --profile shows them, without the
    checkpoints that a run writes."""
    model = tuple(changed_fields(config))
    given = Settings(model=model, batch_size=rows, dtype="bfloat16", device=str(device))
    s, stages = resolve(given)
    machine, world = set_up(s, stages, parallel.World())
    worker = train.allocate(config, machine, world)
    worker.init_weights(0)
    optimizer = train.make_optimizer(worker, s)
    tokens = torch.randint(config.vocab_size, (rows, config.max_seq_len + 1))

    def step():
        found = worker.gradients(tokens[:, :-1], tokens[:, 1:], rows)
        train.update(worker, optimizer, s.clip, s.lr, *found)

    for _ in range(watch.WARM_UP):
        step()
    with torch.profiler.profile() as profiler:
        for _ in range(steps):
            step()
        now(device)
    return {"costliest": watch.costliest(profiler, f"{steps} steps").splitlines()}


def verdicts(found: dict, name: str) -> dict:
    """What the goals say of the trainings that were found: {part: result}. The utilisation is that
    of the size `name`."""
    said = {}
    for part, result in found.items():
        if "memory / rehearsed" in result:
            ratio = result["memory / rehearsed"]
            passed = abs(ratio - 1) <= WITHIN
            said[f"{part}, memory / rehearsed"] = {"found": ratio, "passed": passed}
    parts = (f"training {name}", f"training {name}, --compile")
    used = [found[part]["utilisation"] for part in parts if "utilisation" in found.get(part, {})]
    if used:
        best = max(used)
        said[f"{name}, utilisation"] = {"found": best, "goal": GOAL, "reached": best >= GOAL}
    return said


# --------------------------------------------------------------------------------------------------
# Generation


def rate(device: torch.device, tokens: int, run: Callable[[], object]) -> float:
    """Tokens per second of the second call."""
    run()
    start = now(device)
    run()
    return round(tokens / (now(device) - start), 1)


def theirs(config: FLMConfig, device: torch.device) -> torch.nn.Module:
    """A GPT-NeoX of transformers of the same size: LayerNorm, GELU, rotary positions."""
    import transformers

    sizes = transformers.GPTNeoXConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        intermediate_size=config.d_ff,
        max_position_embeddings=config.max_seq_len,
        rotary_pct=1.0,
        use_parallel_residual=False,
        bos_token_id=0,
        eos_token_id=None,
    )
    return transformers.GPTNeoXForCausalLM(sizes).to(device, torch.bfloat16).eval()


@torch.inference_mode()
def generation(device: torch.device, config: FLMConfig, prompt: int, new: int) -> dict:
    """Tokens per second of greedy generation in bf16, from prompts of so many tokens."""
    ours = muP.init_weights(FLM(config), 0).to(device, torch.bfloat16)
    other = theirs(config, device) if importlib.util.find_spec("transformers") else None
    found = {"parameters": count_parameters(config), "prompt": prompt, "new": new}
    for batch in (1, 32):
        ids = torch.randint(config.vocab_size, (batch, prompt))
        options = {"temperature": 0, "capacity": prompt + new}
        run = lambda: generate(ours, ids.tolist(), new, **options)  # noqa: B023, E731
        result = {"ours": rate(device, batch * new, run)}
        if other is not None:
            x = ids.to(device)
            more = {"attention_mask": torch.ones_like(x), "do_sample": False, "pad_token_id": 0}
            run = lambda: other.generate(x, max_new_tokens=new, **more)  # noqa: B023, E731
            result["transformers"] = rate(device, batch * new, run)
            result["ours / transformers"] = round(result["ours"] / result["transformers"], 3)
        found[f"batch {batch}, tokens/s"] = result
    return found


# --------------------------------------------------------------------------------------------------
# The command line


def attempt(name: str, action: Callable[[], dict]) -> dict:
    """What action() found, with its seconds; or its error."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        found = action()
    except Exception as error:  # one part that fails must not cost what the others found
        found = {"error": f"{type(error).__name__}: {error}"}
    seconds = round(time.perf_counter() - start, 1)
    print(f"{name}: {seconds:g} s{', failed' * ('error' in found)}", file=sys.stderr, flush=True)
    return found | {"seconds": seconds}


def parts(device: torch.device, tiny: bool, folder: Path, found: dict) -> Iterator[tuple]:
    """(name, function that finds it) of each part. found: what the parts before have found."""
    sizes, lengths = (TINY, (8, 8)) if tiny else (SIZES, (128, 128))
    configs = [config for config, _ in sizes.values()]
    part = functools.partial
    yield "parity", part(parity, device)
    yield "deterministic", part(deterministic, device, configs[0], folder)
    for name, (config, rows) in sizes.items():
        yield f"training {name}", part(training, device, config, rows)
    name = list(sizes)[-2]
    config, rows = sizes[name]
    plain = found[f"training {name}"]
    if "error" not in plain:
        yield f"training {name}, --compile", part(compiled, device, config, plain)
        yield f"profile {name}", part(profile, device, config, plain["batch_size"])
    yield "generation", part(generation, device, config, *lengths)
    yield "verdicts", part(verdicts, found, name)


def has_failed(result: object) -> bool:
    """Whether a part, at any depth, has an error or did not pass."""
    if not isinstance(result, dict):
        return False
    here = "error" in result or result.get("passed") is False
    return here or any(map(has_failed, result.values()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small models, to try this program")
    parser.add_argument("--out", type=Path, help="a file for the JSON (not given: the screen)")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    out = args.out and console.output_file(args.out)  # before ten minutes of work
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result = {"device": card, "torch": torch.__version__}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        for name, action in parts(device, args.tiny, Path(folder), result):
            result[name] = attempt(name, action)
            text = json.dumps(result, indent=1)
            if out:
                console.replace_file(out, text + "\n")
    if out is None:
        print(text)
    for name, verdict in result["verdicts"].items():
        print(f"{name}: {json.dumps(verdict)}", file=sys.stderr)
    return int(has_failed(result))


if __name__ == "__main__":
    # sys.exit lets temporary folders go
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console.run(main)
