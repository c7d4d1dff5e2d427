"""What batches and the cache are worth to the evaluation.

    python -m benchmarks.bench_iqeval [CHECKPOINT]

Items answered per second, for a long prompt with a short answer (replace-word) and a short prompt
with a long answer (counting-en): batched with the cache, as `iqeval.py run` does it; one by one
with the cache; one by one, with everything computed again for each token. The three take turns in
one run, on an untrained model of the preset iq-demo if no checkpoint is given.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

import console
import muP
from checkpoint import write_checkpoint
from flm import FLM, PRESETS
from iqeval import BATCH, TASKS, CheckpointModel

ROUNDS = 3
ITEMS = 2 * BATCH


def untrained(folder: str) -> Path:
    """A checkpoint of the preset iq-demo as it is before training."""
    model = muP.init_weights(FLM(PRESETS["iq-demo"]), 0)
    info = {"config": model.config.to_dict(), "dtype": "float32", "tokenizer": "bytes"}
    info |= {"samples": 0, "growth": None, "step": 0}
    tensors = {"model": dict(model.named_parameters())}
    return write_checkpoint(Path(folder) / "step-00000000", tensors, info)


@torch.inference_mode()
def recompute(model: FLM, prompt: list[int], new: int):
    """Greedy generation without a cache."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(model(torch.tensor([ids]), last_only=True)[0, -1].argmax()))


def seconds_per_item(model: CheckpointModel, prompts: list, new: int) -> dict[str, float]:
    """The mean time of an item in each of the three ways."""
    ways = {
        "batched, cached": (prompts, BATCH, model.complete),
        "one by one, cached": (prompts[::8], 1, model.complete),
        "one by one, recomputed": (
            prompts[::16],
            1,
            lambda rows, n: recompute(model.model, *rows, n),
        ),
    }
    seconds = dict.fromkeys(ways, 0.0)
    model.complete(prompts[:2], 2)
    for _ in range(ROUNDS):
        for name, (rows, size, complete) in ways.items():
            start = time.perf_counter()
            for begin in range(0, len(rows), size):
                complete(rows[begin : begin + size], new)
            seconds[name] += (time.perf_counter() - start) / len(rows) / ROUNDS
    return seconds


def main():
    with tempfile.TemporaryDirectory() as folder:
        model = CheckpointModel(sys.argv[1] if sys.argv[1:] else untrained(folder))
    model.stop = ()  # every row takes `new` steps, so that all three ways do the same work
    report = {"batch": BATCH, "threads": torch.get_num_threads(), "torch": torch.__version__}
    for task in ("replace-word", "counting-en"):
        items = TASKS[task].generate(ITEMS, 0)
        prompts = sorted((model.encode(item.prompt) for item in items), key=len)
        new = max(len(item.answer) for item in items) + 2
        seconds = seconds_per_item(model, prompts, new)
        report[task] = {"prompt tokens": sum(map(len, prompts)) // ITEMS, "new tokens": new}
        for name, value in seconds.items():
            ratio = value / seconds["batched, cached"]
            report[task][name] = f"{1 / value:.2f} items/s, {ratio:.1f} times as long as batched"
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    console.run(main)
