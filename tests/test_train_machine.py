"""The machine, the default corpus."""

# ruff: noqa: F401, F811 (pytest finds fixtures by their names)

import itertools
import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from workshop import (
    CONFIG,
    SIZE,
    T,
    V,
    corpus,
    flags,
    job,
    workshop,
)

import data
import run_folder
import sample
import train
from checkpoint import find_checkpoint, load_model
from flm import FLM, PRESETS
from lab import bench
from machine import matmul_rate, pick_machine
from train import main

# --------------------------------------------------------------------------------------------------
# The machine


@pytest.mark.parametrize(
    "instructions, chosen, reason",
    [
        (["amx_bf16", "avx512_bf16"], "bfloat16", "the processor has amx_bf16"),
        (["avx512_bf16"], "bfloat16", "the processor has avx512_bf16"),
        (["avx512_f", "avx2"], "float32", "no bf16 instructions known of this processor"),
    ],
)
@pytest.mark.parametrize("rate", [1e6, 1e15])
def test_the_dtype_is_chosen_by_instructions(monkeypatch, instructions, chosen, reason, rate):
    """On a CPU `auto` takes bf16 where the processor has instructions for it, and one line says
    which. How fast a product was just now, on a busy machine or an idle one, changes nothing."""
    known = dict.fromkeys(instructions, True) | {"amx_fp16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.setattr("machine.matmul_rate", lambda device, dtype, n=0: rate)
    machine = pick_machine("cpu", "auto")
    assert str(machine.dtype) == f"torch.{chosen}" and machine.weights == torch.float32
    assert machine.why.startswith(f"cpu with 1 threads, {chosen} ({reason});")
    assert machine.peak == rate and f"{rate / 1e9:,.0f} GFLOP/s" in machine.why
    assert "\n" not in machine.why and " times " not in machine.why


def test_only_the_chosen_dtype_is_timed(monkeypatch):
    """Where bf16 products are emulated, at a thousandth of the rate, `auto` does not try them."""
    timed = []
    monkeypatch.setattr(
        "machine.matmul_rate", lambda device, dtype, n=0: timed.append(dtype) or 1.0
    )
    pick_machine("cpu", "auto")
    assert timed == [torch.float32]


@pytest.mark.parametrize("major, native, chosen", [(8, True, "bfloat16"), (7, False, "float32")])
def test_the_dtype_of_a_gpu(monkeypatch, major, native, chosen):
    """On a GPU `auto` decides by its compute capability. The longest name in the table that is part
    of the card's own gives the peak."""
    cuda = {
        "device_count": lambda: 1,
        "get_device_name": lambda device: "NVIDIA H100 PCIe",
        "get_device_capability": lambda device: (major, 0),
        "is_bf16_supported": lambda including_emulation: native,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    machine = pick_machine("cuda", "auto")
    assert machine.why.startswith(f"NVIDIA H100 PCIe, {chosen} (compute capability {major}.0);")
    assert machine.peak == (756e12 if native else 1e12)


@pytest.mark.parametrize(
    "dtype, weights", [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_the_dtype_that_is_asked_for(dtype, weights):
    """A dtype that is asked for is taken, without a reason, and fixes that of the weights."""
    machine = pick_machine("auto" if not torch.cuda.is_available() else "cpu", dtype)
    assert str(machine.dtype) == f"torch.{dtype}" and str(machine.weights) == f"torch.{weights}"
    assert f"{dtype}; utilisation" in machine.why and machine.device.type == "cpu"


def test_the_line_about_the_machine_is_printed(corpus, capsys):
    """A run says which machine and dtype it chose, and keeps the line in config.json."""
    s = job(corpus, dtype="auto")
    train.train(s)
    line = json.loads((Path(s.out) / "config.json").read_text())["machine"]
    assert f"machine   {line}\n" in capsys.readouterr().out
    assert "cpu with 1 threads, float32 (no bf16 instructions" in line


def test_the_peak_is_the_best_of_several_measurements(corpus, monkeypatch, capsys):
    """A busy machine only lowers a measurement. So the peak is measured again at each evaluation,
    and the highest counts; a utilisation above 100% is called wrong, once."""
    rates = iter([1.0, 1e15, 1e12, 1e13])
    monkeypatch.setattr("machine.matmul_rate", lambda device, dtype, n=0: next(rates))
    run = train.train(job(corpus, eval_every=2))["folder"]
    lines = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    used = [line["utilisation"] for line in lines if "utilisation" in line]
    assert min(used[:2]) > 1 and 0 < max(used[2:]) < 1e-3
    assert capsys.readouterr().out.count("was measured while the machine was busy") == 1


def test_matmul_rate_measures(monkeypatch):
    """The rate of a product is 2 n^3 over the best time, by whichever clock `now` is: here each
    product takes half a second of it."""
    monkeypatch.undo()
    ticks = itertools.count()
    monkeypatch.setattr("machine.now", lambda device: next(ticks) / 2)
    assert matmul_rate(torch.device("cpu"), torch.float32, 16) == 2 * 16**3 / 0.5


def test_an_emulated_dtype_is_not_kept_waiting(monkeypatch):
    """Where bf16 products are emulated and asked for (2 GFLOP/s has been seen on two cores with
    AVX2), measuring the peak still takes seconds. The clock here is not the machine's: each product
    moves it on by its FLOPs."""
    monkeypatch.undo()
    clock = [0.0]

    class Matrix:
        def __init__(self, n, m, device=None):
            self.n = n

        def to(self, dtype):
            return self

        def __matmul__(self, other):
            clock[0] += 2 * self.n**3 / 1e9

    monkeypatch.setattr(torch, "randn", Matrix)
    monkeypatch.setattr("machine.now", lambda device: clock[0])
    rate = matmul_rate(torch.device("cpu"), torch.bfloat16)
    assert rate == pytest.approx(1e9) and clock[0] < 10


def test_threads_are_those_asked_for(corpus, capsys, monkeypatch):
    """--threads holds wherever something is computed: training, evaluation, benchmark. (The times
    of the benchmark are made up, for on a busy machine it refuses its own.)"""
    monkeypatch.setattr(bench, "time_steps", lambda *_: (0.1, 0.3, 0.1))
    s = job(corpus, threads=2, steps=1)
    main(flags(s))
    assert torch.get_num_threads() == 2
    main(["--eval-only", s.out, "--threads", "3"])
    assert torch.get_num_threads() == 3
    capsys.readouterr()
    words = ["--batch-size", "1", "--threads", "1", "--device", "cpu", "--dtype", "float32"]
    bench.main([*words, "--model", *SIZE])
    assert torch.get_num_threads() == 1
    assert "cpu with 1 threads" in json.loads(capsys.readouterr().out)["machine"]


# --------------------------------------------------------------------------------------------------
# The default corpus


def test_the_default_corpus_is_prepared_once(monkeypatch, tmp_path, capsys):
    """With no --data, Python's own source (here two files) is prepared under corpora/ on first use,
    and found there on the second."""
    library = tmp_path / "library"
    library.mkdir()
    for name in ("one", "two"):
        (library / f"{name}.py").write_text(f"# {name}\n" + "def f(x):\n    return x + 1\n" * 40)
    monkeypatch.setattr(run_folder, "stdlib_files", lambda: sorted(library.iterdir()))
    first = train.open_corpus(None, "bytes", None, PRESETS["demo"])
    assert (
        first.path.parent == Path("corpora")
        and first.tokenizer.name == "bytes"
        and "preparing" in capsys.readouterr().out
    )
    assert first.n_rows("train", "language") > 0 < first.n_rows("val", "language")
    with monkeypatch.context() as patch:
        patch.setattr(data, "prepare", lambda *args, **options: pytest.fail("prepared twice"))
        second = train.open_corpus(None, "bytes", None, PRESETS["demo"])
    assert second.path == first.path and capsys.readouterr().out == ""
    assert torch.equal(first.batch(0, 0, 2)[0], second.batch(0, 0, 2)[0])


def test_the_default_corpus_is_not_prepared_in_vain(monkeypatch, tmp_path):
    """A vocabulary that cannot hold the tokenizer's ids is refused before minutes go into
    preparing."""
    monkeypatch.setattr("prepare.prepare", lambda *args, **options: pytest.fail("prepared in vain"))
    with pytest.raises(ValueError, match="add --model vocab_size=384"):
        train.open_corpus(None, "bytes", None, CONFIG.replace(vocab_size=100))
