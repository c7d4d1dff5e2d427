"""benchmarks/gpu.py, on a CPU and small models; the words of benchmarks/bench_data.py."""

import contextlib
import io
import json
import tempfile
from unittest import mock

import pytest
import torch
from helpers import ROOT

import data
import train
from benchmarks import bench_data, gpu
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
    # A busy machine has times that make no sense, and the benchmark refuses them.
    monkeypatch.setattr(bench, "time_steps", lambda *_: (0.1, 0.3, 0.1))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)  # for good
    out = tmp_path / "found.json"
    assert gpu.main(["--device", "cpu", "--tiny", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    kinds = found["parity"]
    assert all(kinds[name]["passed"] for name in ("float64", "float32", "bfloat16"))
    assert kinds["float32"]["device"]["gradient"] < kinds["bfloat16"]["device"]["gradient"]
    assert found["deterministic"]["passed"] and found["deterministic"]["tensors"] > 50
    for name in ("training tiny", "training small", "training tiny, --compile"):
        assert found[name]["tokens_per_s"] > 0
    assert found["training small"]["rehearsed_memory_gib"] == 0.5
    table = found["profile tiny"]["costliest"]
    assert table[0] == "profile of 3 steps, cpu time" and len(table) == 12
    assert any("addmm" in line or "aten::mm" in line for line in table)
    for batch in (1, 32):
        assert found["generation"][f"batch {batch}, tokens/s"]["ours"] > 0
    assert found["verdicts"]["tiny, utilisation"]["goal"] == gpu.GOAL


def test_a_part_that_fails_costs_only_itself(monkeypatch, capsys):
    """Its error is in the JSON, and the exit code says that there is one."""
    fails = mock.Mock(side_effect=RuntimeError("no such kernel"))
    for name in ("parity", "deterministic", "training"):
        monkeypatch.setattr(gpu, name, fails)
    monkeypatch.setattr(gpu, "generation", lambda *_: {"found": 1})
    assert gpu.main(["--device", "cpu", "--tiny"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["training tiny"]["error"] == "RuntimeError: no such kernel"
    assert found["generation"]["found"] == 1


def test_a_machine_that_is_taken_away_keeps_what_was_found(tmp_path, monkeypatch):
    """SIGTERM raises SystemExit: the parts that are done are in the file, and nothing is left in
    the folder for temporary files."""
    monkeypatch.setattr(gpu, "parity", lambda *_: {"found": 1})
    monkeypatch.setattr(gpu, "deterministic", mock.Mock(side_effect=SystemExit(143)))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["parity"]["found"] == 1 and "deterministic" not in found
    assert not list((tmp_path / "temporary").iterdir())


def test_a_command_that_hangs_is_killed(monkeypatch):
    """After its time it is an error with its name."""
    monkeypatch.setattr(gpu, "LIMIT", 0.1)
    with pytest.raises(RuntimeError, match="^-c import time; .*: not done in 0.1 seconds$"):
        gpu.command("-c", "import time; time.sleep(600)")


def test_what_does_not_keep_a_promise():
    """A memory more than 5% from the rehearsed one fails; a utilisation below the goal is said, and
    the better one of plain and compiled counts."""
    found = {
        "device": "some GPU",
        "training 0.1B": {"memory / rehearsed": 1.04, "utilisation": 0.3},
        "training 1B": {"memory / rehearsed": 0.96, "utilisation": 0.5},
        "training 1B, --compile": {"utilisation": 0.61},
        "training 3B": {"error": "RuntimeError: no"},
    }
    said = gpu.verdicts(found, "1B")
    assert said["1B, utilisation"] == {"found": 0.61, "goal": 0.6, "reached": True}
    assert not gpu.has_failed(said) and len(said) == 3
    del found["training 1B, --compile"]
    assert not gpu.verdicts(found, "1B")["1B, utilisation"]["reached"]
    assert not gpu.has_failed(gpu.verdicts(found, "1B"))
    found["training 1B"]["memory / rehearsed"] = 1.06
    assert gpu.has_failed(gpu.verdicts(found, "1B"))


@pytest.mark.parametrize("words", [["0"], ["nan"], ["1", "no-such-file"]])
def test_what_bench_data_cannot_do(words):
    """Its mistakes are told before any text is made."""
    with pytest.raises(ValueError, match="gigabytes: give a number|no-such-file"):
        bench_data.main(words)


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
