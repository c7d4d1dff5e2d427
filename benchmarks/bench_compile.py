"""What torch.compile of each block brings on this machine: python -m benchmarks.bench_compile

A training step, plain and compiled (train.py --compile), of two models, in fp32 and bf16. The two
take turns in one run, after three steps that do not count: the first one compiles."""

import json
import statistics
import time

import torch

import muP
from flm import FLM, FLMConfig
from parallel import Layout, wrap_blocks

SIZES = {
    "6 x 384, 4 x 256 tokens": (FLMConfig(6, 384, 6, 64, 1536, 288, 256), 4),
    "16 x 32, 16 x 64 tokens": (FLMConfig(16, 32, 1, 32, 128, 288, 64), 16),
}


def time_step(model: FLM, rows: torch.Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    start = time.perf_counter()
    model(rows[:, :-1], rows[:, 1:]).backward()
    return time.perf_counter() - start


def main(rounds: int = 10):
    """Print the milliseconds and their ratios as JSON."""
    report = {}
    for size, (config, B) in SIZES.items():
        rows = torch.randint(config.vocab_size, (B, config.max_seq_len + 1))
        for dtype in (torch.float32, torch.bfloat16):
            models = {}
            for name, compiled in (("plain", False), ("compiled", True)):
                models[name] = muP.init_weights(FLM(config), 0)
                wrap_blocks(models[name], Layout(), compiled)
            seconds = {"plain": [], "compiled": []}
            for _ in range(3 + rounds):
                for name, model in models.items():
                    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                        seconds[name].append(time_step(model, rows))
            ms = {k: round(1e3 * statistics.median(v[3:]), 1) for k, v in seconds.items()}
            first = round(seconds["compiled"][0], 1)
            ratio = round(ms["plain"] / ms["compiled"], 2)
            key = f"{size}, {str(dtype).removeprefix('torch.')}"
            report[key] = {"ms": ms, "plain / compiled": ratio, "first step, seconds": first}
    report |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
