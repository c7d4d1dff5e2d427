"""What a GPU does with this code, as one JSON object: python -m benchmarks.gpu [--out FILE]

    python -m benchmarks.gpu --device cpu --tiny    the same on a CPU, on models that are small

It asks, in this order:

    parity          does the GPU compute what the CPU computes, in float64, fp32 and bf16?
    deterministic   does --deterministic give the same bits twice?
    training        tokens per second, utilisation and peak memory of models of several sizes,
                    beside the memory that lab.cluster rehearses; one of them with --compile as well
    generation      tokens per second at batch 1 and 32, beside transformers' (pip install
                    transformers), which is optional

Each part works in processes of its own, so none sees the memory of another. A part that fails has
its error in the JSON, and the others go on. It is made for one GPU and ten minutes. No GPU has run
it yet.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import console
import muP
import parallel
from checkpoint import find_checkpoint, read_tensors, stored_tensors
from flm import FLM, FLMConfig, count_parameters
from lab import cluster
from machine import name_of, now, pick_device
from sample import generate

V = 50_304


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
    """What a command of this repository prints. Raises RuntimeError with its last lines."""
    line = [sys.executable, *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line[1:])}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def words_of(config: FLMConfig, rows: int, device: torch.device) -> list[str]:
    """The options of train.py for a model and a batch."""
    usual = FLMConfig.__dataclass_fields__
    fields = [f"{k}={v}" for k, v in config.to_dict().items() if v != usual[k].default]
    words = ["--model", *fields, "--batch-size", rows, "--dtype", "bfloat16", "--device", device]
    return list(map(str, words))


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


def training(device: torch.device, sizes: dict) -> dict:
    """{size: the benchmark, and its memory beside the rehearsed one}; the last but one size also
    under --compile."""
    found = {}
    for name, (config, rows) in sizes.items():
        result = time_training(config, rows, device)
        expected = rehearsed_memory(config, result["batch_size"])
        result["rehearsed_memory_gib"] = round(expected, 3)
        if device.type == "cuda":  # a CPU's peak has the libraries in it
            result["memory / rehearsed"] = round(result["peak_memory_gib"] / expected, 4)
        found[name] = result
    name = list(sizes)[-2]
    again = time_training(sizes[name][0], found[name]["batch_size"], device, "--compile")
    again["speed / without"] = round(again["tokens_per_s"] / found[name]["tokens_per_s"], 3)
    return found | {f"{name}, --compile": again}


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


def attempt(name: str, action: Callable, *args) -> dict:
    """What action(*args) found, with its seconds; or its error."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        found = action(*args)
    except Exception as error:  # one part that fails must not cost what the others found
        found = {"error": f"{type(error).__name__}: {error}"}
    seconds = round(time.perf_counter() - start, 1)
    print(f"{name}: {seconds:g} s{', failed' * ('error' in found)}", file=sys.stderr, flush=True)
    return found | {"seconds": seconds}


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
    device, sizes = pick_device(args.device), TINY if args.tiny else SIZES
    out = args.out and console.output_file(args.out)  # before ten minutes of work
    lengths = (8, 8) if args.tiny else (128, 128)
    configs = [config for config, _ in sizes.values()]
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        result = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "parity": attempt("parity", parity, device),
            "deterministic": attempt("deterministic", deterministic, device, configs[0], folder),
            "training": attempt("training", training, device, sizes),
            "generation": attempt("generation", generation, device, configs[-2], *lengths),
        }
    finally:
        shutil.rmtree(folder)
    text = json.dumps(result, indent=1)
    if out:
        out.write_text(text + "\n")
    else:
        print(text)
    return int(has_failed(result))


if __name__ == "__main__":
    console.run(main)
