"""How long a checkpoint holds training: python -m benchmarks.bench_save

The same model and optimizer are saved at once and in the background, in turns. While the thread
writes, steps of training go on; they take turns with steps of a quiet machine."""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

import checkpoint
import muP
from flm import FLM, FLMConfig


def main(rounds: int = 5):
    """Print the seconds and their ratios as JSON."""
    config = FLMConfig(8, 512, 8, 64, 2048, 32768, 128)
    model = muP.init_weights(FLM(config), 0)
    optimizer = torch.optim.AdamW(muP.param_groups(model, 1e-3, 0.1), betas=(0.9, 0.95))
    rows = torch.randint(config.vocab_size, (2, 129))
    info = {"config": config.to_dict(), "dtype": "float32", "tokenizer": "bytes"}
    info |= {"samples": 0, "growth": None}

    def step() -> float:
        start = time.perf_counter()
        model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    step()
    seconds = {"save at once": [], "held": [], "written": [], "step": [], "step beside": []}
    for number in range(rounds):
        tensors = checkpoint.training_tensors(list(model.named_parameters()), optimizer)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            path = checkpoint.write_checkpoint(Path(folder) / "step-00000001", tensors, info)
            seconds["save at once"].append(time.perf_counter() - start)
            size = sum(file.stat().st_size for file in path.iterdir())
            seconds["step"].append(step())
            start = time.perf_counter()
            path = Path(folder) / "step-00000002"
            done, wait = checkpoint.write_in_background(path, tensors, info)
            seconds["held"].append(time.perf_counter() - start)
            while not done():
                seconds["step beside"].append(step())
            wait()
            seconds["written"].append(time.perf_counter() - start)
    median = {name: round(statistics.median(values), 3) for name, values in seconds.items()}
    report = {
        "checkpoint, MB": round(size / 1e6),
        "median seconds": median,
        "held / save at once": round(median["held"] / median["save at once"], 2),
        "step beside / step": round(median["step beside"] / median["step"], 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
