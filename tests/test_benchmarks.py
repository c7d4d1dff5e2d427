"""benchmarks/gpu.py, on a CPU and small models."""

import contextlib
import io
import json
from unittest import mock

import torch
from helpers import ROOT

import data
import train
from benchmarks import gpu
from lab import bench


def in_this_process(program, *words) -> str:
    """gpu.command without a new process, and without --compile, which takes long."""
    main = {"train.py": train.main, "data.py": data.main, "-m": bench.main}[program]
    words = [str(word) for word in words if word not in ("--compile", "lab.bench")]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(words)
    return out.getvalue()


def test_the_benchmark_of_a_gpu_on_a_cpu(tmp_path, monkeypatch):
    """Every part finds what it asks for, and all of it is in the JSON: a CPU agrees with itself,
    two runs are the same, each size has its speed and its memory. (That memory is right is
    test_lab_cluster.py's.)"""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(gpu, "command", in_this_process)
    monkeypatch.setattr(gpu, "rehearsed_memory", lambda config, rows: 0.5)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)  # for good
    out = tmp_path / "found.json"
    assert gpu.main(["--device", "cpu", "--tiny", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    kinds = found["parity"]
    assert all(kinds[name]["passed"] for name in ("float64", "float32", "bfloat16"))
    assert kinds["float32"]["device"]["gradient"] < kinds["bfloat16"]["device"]["gradient"]
    assert found["deterministic"]["passed"] and found["deterministic"]["tensors"] > 50
    for name in ("tiny", "small", "tiny, --compile"):
        assert found["training"][name]["tokens_per_s"] > 0
    assert found["training"]["small"]["rehearsed_memory_gib"] == 0.5
    for batch in (1, 32):
        assert found["generation"][f"batch {batch}, tokens/s"]["ours"] > 0


def test_a_part_that_fails_costs_only_itself(tmp_path, monkeypatch, capsys):
    """Its error is in the JSON, and the exit code says that there is one."""
    fails = mock.Mock(side_effect=RuntimeError("no such kernel"))
    for name in ("parity", "deterministic", "training"):
        monkeypatch.setattr(gpu, name, fails)
    monkeypatch.setattr(gpu, "generation", lambda *_: {"found": 1})
    assert gpu.main(["--device", "cpu", "--tiny"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["training"]["error"] == "RuntimeError: no such kernel"
    assert found["generation"]["found"] == 1


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    """Where the memory is too small, half the rows are tried, down to one."""
    tried = []

    def command(*words):
        rows = int(words[words.index("--batch-size") + 1])
        tried.append(rows)
        if rows > 2:
            raise RuntimeError("train.py: out of memory: try a smaller --micro-batch")
        return json.dumps({"batch_size": rows})

    monkeypatch.setattr(gpu, "command", command)
    config = gpu.TINY["tiny"][0]
    assert gpu.time_training(config, 8, "cpu") == {"batch_size": 2} and tried == [8, 4, 2]
