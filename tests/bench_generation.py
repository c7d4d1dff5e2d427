"""What the KV cache is worth: python tests/bench_generation.py

Tokens per second at a context of 1,000 tokens, with the cache and recomputing everything, in turn in one run, in fp32."""
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import muP
from flm import FLM, FLMConfig, KVCache


@torch.inference_mode()
def main(context=1000, tokens=5, rounds=3):
    model = muP.init_weights(FLM(FLMConfig(6, 384, 6, 64, 1536, 288, 2048)), 0)
    text = torch.randint(256, (1, context + tokens))
    cache = KVCache(model, context + tokens * rounds)
    model(text[:, :context], cache=cache)
    times = {"cached": [], "recomputed": []}
    for _ in range(rounds):
        for i in range(tokens):
            start = time.perf_counter()
            model(text[:, i:i + 1], cache=cache)
            middle = time.perf_counter()
            model(text[:, :context + i], last_only=True)
            times["cached"].append(middle - start)
            times["recomputed"].append(time.perf_counter() - middle)
    rate = {name: 1 / statistics.median(t) for name, t in times.items()}
    print(json.dumps({"context": context, **{f"{k}, tokens/s": round(r, 1) for k, r in rate.items()},
                      "cached / recomputed": round(rate["cached"] / rate["recomputed"], 1), "threads": torch.get_num_threads(),
                      "torch": torch.__version__}, indent=1))


if __name__ == "__main__":
    main()
