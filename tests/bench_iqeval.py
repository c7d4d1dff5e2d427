"""What batches and the cache are worth to the evaluation: python tests/bench_iqeval.py [CHECKPOINT]

Items answered per second: batched with the cache, as `iqeval.py run` does it; one by one with the cache; one by one recomputing
everything. In turn in one run, on a model of the preset iq-demo's shape (untrained, if no checkpoint is given)."""
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import muP
from flm import FLM, PRESETS
from iqeval import OurModel, TASKS


@torch.inference_mode()
def recompute(model, prompt, new):
    """Greedy, without a cache."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(model(torch.tensor([ids]), last_only=True)[0, -1].argmax()))
    return ids[len(prompt):]


def main(checkpoint=None, n=64, new=24):
    if checkpoint:
        ours = OurModel(checkpoint)
    else:
        ours = OurModel.__new__(OurModel)
        ours.model, ours.tokenizer = muP.init_weights(FLM(PRESETS["iq-demo"]), 0), data.get_tokenizer("bytes")
        ours.allowed = torch.ones(256, dtype=torch.bool)
    ours.stop = frozenset()                      # every row takes `new` steps, so that all three do the same work
    prompts = [ours.encode(item.prompt) for item in TASKS["replace-word"].generate(n, 0)]
    seconds = SimpleNamespace(batched=0.0, single=0.0, recomputed=0.0)
    ours.complete(prompts[:2], 2)
    few = n // 8
    for _ in range(3):
        start = time.perf_counter()
        ours.complete(prompts, new)
        seconds.batched += (time.perf_counter() - start) / n
        start = time.perf_counter()
        for prompt in prompts[:few]:
            ours.complete([prompt], new)
        seconds.single += (time.perf_counter() - start) / few
        start = time.perf_counter()
        for prompt in prompts[:few // 4]:
            recompute(ours.model, prompt, new)
        seconds.recomputed += (time.perf_counter() - start) / (few // 4)
    rate = {name: 3 / total for name, total in vars(seconds).items()}
    print(json.dumps({"batch": n, "prompt tokens": sum(map(len, prompts)) // n, "new tokens": new,
                      **{f"{name}, items/s": round(r, 2) for name, r in rate.items()},
                      "batched, cached / one by one, cached": round(rate["batched"] / rate["single"], 1),
                      "batched, cached / one by one, recomputed": round(rate["batched"] / rate["recomputed"], 1),
                      "threads": torch.get_num_threads(), "torch": torch.__version__}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:2])
