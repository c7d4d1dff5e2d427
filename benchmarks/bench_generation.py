"""What the KV cache is worth: python -m benchmarks.bench_generation

Tokens per second at a context of 1,000 tokens, in fp32: with the cache, and computing everything
again for each token. The two take turns in one run."""

import json
import statistics
import time

import torch

import muP
from flm import FLM, FLMConfig
from sample import KVCache


@torch.inference_mode()
def main(context: int = 1000, tokens: int = 5, rounds: int = 3):
    """Print the two speeds and their ratio as JSON."""
    model = muP.init_weights(FLM(FLMConfig(6, 384, 6, 64, 1536, 288, 2048)), 0)
    text = torch.randint(256, (1, context + tokens))
    cache = KVCache(model, context + tokens * rounds)
    model(text[:, :context], cache=cache)
    times = {"cached": [], "recomputed": []}
    for _ in range(rounds):
        for i in range(tokens):
            start = time.perf_counter()
            model(text[:, i : i + 1], cache=cache)
            middle = time.perf_counter()
            model(text[:, : context + i], last_only=True)
            times["cached"].append(middle - start)
            times["recomputed"].append(time.perf_counter() - middle)
    rate = {name: 1 / statistics.median(seconds) for name, seconds in times.items()}
    report = {
        "context": context,
        **{f"{name}, tokens/s": round(value, 1) for name, value in rate.items()},
        "cached / recomputed": round(rate["cached"] / rate["recomputed"], 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
