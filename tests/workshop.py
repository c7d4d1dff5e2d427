"""What the tests of train.py share: small corpora, settings of small runs, and ways to compare two
runs.

The model is as small as it can be and runs on one thread. "Equal" means bit for bit, as it is on a
CPU. The matrix product that utilisation is measured against is replaced by a constant: it takes a
second, and no promise depends on it.

A file of tests begins with

from workshop import corpus, job, workshop # fixtures are used by their names"""

import dataclasses
import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import data
import muP
import parallel
import train
from checkpoint import find_checkpoint, read_info
from flm import FLM, IGNORE, FLMConfig, preset
from train import Settings

ROOT = Path(train.__file__).parent
T, V = 32, 288
CONFIG = FLMConfig(
    n_layers=2, d_model=32, n_heads=2, head_dim=16, d_ff=64, max_seq_len=T, vocab_size=V
)
SIZE = tuple(
    f"{name}={value}"
    for name, value in CONFIG.to_dict().items()
    if value != getattr(preset("demo"), name)
)
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # sums depend on it
FLOAT64 = train.Machine(torch.device("cpu"), torch.float64, 1e9, "")

numbers = itertools.count()


def few(n: int):
    """So many examples of a property that trains models."""
    return settings(deadline=None, max_examples=n, suppress_health_check=list(HealthCheck))


# --------------------------------------------------------------------------------------------------
# Corpora


def make_corpus(folder: Path, seed: int, teacher: bool) -> str:
    """A prepared folder of some thousands of bytes of random words. With `teacher`, it has a
    teacher signal whose items differ in length, so that rows differ in their number of labels."""
    rng = random.Random(seed)
    words = "the cat sat on a mat while def return naïve 雪 and so it goes".split()
    texts = [{"text": f"{i}: " + " ".join(rng.choices(words, k=40))} for i in range(60)]
    items = [
        {"text": "x" * rng.randint(1, 14), "proposition": f"{i}?", "label": rng.randint(0, 1)}
        for i in range(80)
    ]
    for name, rows in ("text", texts), ("teacher", items):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data.prepare(
        {"words": [folder / "text.jsonl"]},
        folder / "tokens",
        data.get_tokenizer("bytes"),
        val_fraction=0.2,
        teacher=[folder / "teacher.jsonl"] if teacher else (),
        workers=1,
        progress=False,
    )
    return str(folder / "tokens")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), 1, teacher=True)


@pytest.fixture(scope="session")
def other_corpus(tmp_path_factory):
    """Other text, and no teacher signal."""
    return make_corpus(tmp_path_factory.mktemp("other"), 2, teacher=False)


@pytest.fixture(autouse=True)
def workshop(tmp_path, monkeypatch):
    """Every test works in an empty folder of its own, on one thread of a processor without bf16
    instructions, with a given rate of matrix products."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("machine.matmul_rate", lambda device, dtype, n=0: 1e12)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)


# --------------------------------------------------------------------------------------------------
# Runs


def job(corpus: str, **changes) -> Settings:
    """Settings of a run of six steps, in a new folder, where evaluations and checkpoints fall on
    different steps."""
    given = dict(
        model=SIZE,
        data=corpus,
        steps=6,
        batch_size=4,
        warmup=8,
        lr=3e-3,
        eval_every=3,
        eval_rows=6,
        save_every=2,
        device="cpu",
        dtype="float32",
        out=f"run-{next(numbers)}",
    )
    return Settings(**given | changes)


def flags(s: Settings) -> list[str]:
    """The command line that means these settings."""
    line = []
    for field in dataclasses.fields(Settings):
        value = getattr(s, field.name)
        if value != field.default:
            words = [] if value is True else value if isinstance(value, tuple) else [str(value)]
            line += ["--" + field.name.replace("_", "-"), *words]
    return line


def go_on(folder, stop_at: int | None = None, **changes) -> dict:
    return train.train(train.resumed(folder, changes), resume=True, stop_at=stop_at)


def write_stages(start: int, **more):
    """stages.json: a model half as large in every dimension grows to the usual one."""
    small = {"config": {"n_layers": 1, "d_model": 16, "n_heads": 1, "d_ff": 32}}
    large = {"config": {"n_layers": 2, "d_model": 32, "n_heads": 2, "d_ff": 64}, "start": start}
    Path("stages.json").write_text(json.dumps([small, large | more]))


def run_python(script: str, *words: str, env=ONE_THREAD) -> subprocess.CompletedProcess:
    """Run a script in a process of its own; sys.argv[1] is the repository."""
    command = [sys.executable, "-c", script, str(ROOT), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def run_train(*words: str, env=ONE_THREAD, **options) -> subprocess.CompletedProcess:
    """Run `python train.py WORDS` in a process of its own."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, **options)


# --------------------------------------------------------------------------------------------------
# What a run left


def contents(folder) -> dict:
    """{path: tensor} of everything in a run's newest checkpoint, read by PyTorch's converter, which
    knows no names."""
    step = find_checkpoint(folder)
    dcp_to_torch_save(step, "contents.pt")
    blob = torch.load("contents.pt", weights_only=True)
    tensors = {f"{part}/{name}": x for part in blob for name, x in blob[part].items()}
    return {"step": read_info(step)["step"]} | tensors


def log(folder) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    clock = ("tokens_per_s", "utilisation")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def equal(a: dict, b: dict) -> bool:
    def same(x, y):
        return x.dtype == y.dtype and torch.equal(x, y) if torch.is_tensor(x) else x == y

    return a.keys() == b.keys() and all(same(x, b[name]) for name, x in a.items())


def assert_same_run(one, two):
    assert log(one) == log(two)
    assert equal(contents(one), contents(two))


def steps_of(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).glob("step-*"))


def relabel(run, **changes):
    """Change what the newest checkpoint of a run says about itself."""
    path = find_checkpoint(run) / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --------------------------------------------------------------------------------------------------
# Models


def alone(model: FLM, dtype: torch.dtype = torch.float64) -> parallel.Worker:
    """A worker in one process."""
    return parallel.Worker([model], parallel.World(), dtype)


def float64_model(seed: int = 0, config: FLMConfig = CONFIG, std: float | None = None) -> FLM:
    """A model in float64. `std` draws its embedding wider, so that its predictions differ from row
    to row."""
    model = muP.init_weights(FLM(config), seed).double()
    if std:
        generator = torch.Generator().manual_seed(seed)
        torch.nn.init.normal_(model.embedding.weight, std=std, generator=generator)
    return model


def token_nats(model: FLM, x: torch.Tensor, y: torch.Tensor) -> list[tuple[int, int, float]]:
    """[(row, position, nats)] of the supervised targets, one token at a time, by the definition of
    cross-entropy."""
    with torch.no_grad():
        logits = model(x).double().numpy()
    found = []
    for b, t in zip(*np.nonzero((y != IGNORE).numpy())):
        z = logits[b, t]
        total = math.log(math.fsum(np.exp(z - z.max()))) + z.max()
        found.append((b, t, total - z[y[b, t]]))
    return found
