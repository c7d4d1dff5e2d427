"""Tests of lab/bench.py: the times of a training step."""

# ruff: noqa: F401, F811 (pytest finds fixtures by their names)

import itertools
import json
import sys

import pytest
from workshop import CONFIG, SIZE, T, V, workshop

from flm import FLM
from lab import bench

WORDS = ["--model", *SIZE, "d_ff=128", "--batch-size", "8", "--device", "cpu"]


def give_clock(monkeypatch, *seconds):
    """A clock of its own for the benchmark: its three actions (forward, forward and backward,
    update) take so many seconds, whatever the machine does besides."""
    times = itertools.accumulate(itertools.chain([0.0], itertools.cycle([*seconds])))
    marks = itertools.chain.from_iterable(itertools.pairwise(times))  # start, end, start, end ...
    monkeypatch.setattr(bench, "now", lambda device: next(marks))


def test_benchmark_prints_one_json_object(monkeypatch, capsys, tmp_path):
    """It prints one JSON object and leaves nothing behind. Its numbers agree with the
    clock, and its FLOPs with the formula of Narayanan et al. for d_ff = 4C: 72 B T L C^2 (1 + T/6C)
    + 6 B T V C. 2%: printed numbers are rounded."""
    give_clock(monkeypatch, 0.010, 0.035, 0.005)
    assert bench.main([*WORDS, "--micro-batch", "4", "--dtype", "float32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == set(
        "parameters batch_size seq_len layout vocab_size dtype compile tokens_per_s forward_ms "
        "backward_ms optimizer_ms peak_memory_gib achieved_gflops peak_gflops utilisation machine "
        "torch".split()
    )
    B, C, L = 8, 32, 2
    times = found["forward_ms"], found["backward_ms"], found["optimizer_ms"]
    assert times == pytest.approx((10, 25, 5))
    flops = 72 * B * T * L * C**2 * (1 + T / (6 * C)) + 6 * B * T * V * C
    assert found["tokens_per_s"] == pytest.approx(B * T / 0.04, rel=0.02)
    assert found["achieved_gflops"] == pytest.approx(flops / 0.04 / 1e9, rel=0.02, abs=0.1)
    used = flops / 0.04 / 1e12  # of one TFLOP/s, see workshop
    assert found["utilisation"] == pytest.approx(used, rel=0.02, abs=1e-4)
    shape = (found["batch_size"], found["seq_len"], found["vocab_size"], found["dtype"])
    assert shape == (B, T, V, "float32")
    assert found["parameters"] == sum(p.numel() for p in FLM(CONFIG.replace(d_ff=128)).parameters())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("peak, clock", [(1e12, (0.03, 0.02, 0.01)), (1e9, (1e-4, 2e-4, 1e-4))])
def test_benchmark_refuses_to_print_nonsense(monkeypatch, capsys, peak, clock):
    """A backward pass of less than no time, or a utilisation above 100%, can only come from a
    machine that was busy: no number is printed."""
    give_clock(monkeypatch, *clock)
    monkeypatch.setattr("machine.matmul_rate", lambda device, dtype, n=0: peak)
    with pytest.raises(ValueError, match="make no sense.*run the benchmark again"):
        bench.main([*WORDS, "--dtype", "float32"])
    assert "{" not in capsys.readouterr().out


def test_benchmark_where_memory_is_not_known(monkeypatch, capsys):
    """Without the module `resource` (Windows) all is printed, and the memory is null."""
    monkeypatch.setitem(sys.modules, "resource", None)
    give_clock(monkeypatch, 0.010, 0.035, 0.005)
    assert bench.main([*WORDS, "--dtype", "float32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peak_memory_gib"] is None and found["tokens_per_s"] > 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["--preset", "dem"], "unknown preset 'dem': did you mean demo"),
        (["--batch-size", "0", "--micro-batch", "0"], "--micro-batch 0: must be at least 1"),
        (["--batch-size", "0", "--micro-batch", "0"], "--batch-size 0: must be at least 1"),
    ],
)
def test_mistakes_are_those_of_train(words, message):
    """What train.py refuses is refused here, with the same words."""
    with pytest.raises(ValueError, match=message):
        bench.main(words)


def test_options_that_change_no_time_are_unknown(capsys):
    """--steps or --lr change nothing that is measured: argparse does not know them. All that it
    knows are options of train.py."""
    assert set(bench.USED) <= {field.name for field in bench.FIELDS}
    with pytest.raises(SystemExit) as caught:
        bench.main(["--steps", "7", "--lr", "1"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --steps 7 --lr 1" in capsys.readouterr().err
