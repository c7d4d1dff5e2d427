"""Tests of `grow.py bench`, and the answers to the exercises of tutorials/03-growth.md."""
import contextlib
import io
import json
import math
import sys

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn import functional as F

import data
import grow
import muP
import train
from flm import FLM, FLMConfig, LayerNorm, forward_flops, preset
from grow import PAPER_STAGES, SCHEDULES, bench_run, shares, speed_up

TINY = ["--model", "n_layers=2", "d_model=16", "n_heads=1", "head_dim=16", "d_ff=32", "max_seq_len=16", "--batch-size", "4", "--warmup", "4",
        "--eval-rows", "4", "--dtype", "float32", "--device", "cpu"]
DOUBLE = [{"config": {"n_layers": 1}}, {"config": {"n_layers": 2}, "start": 0.5, "ramp": 0.25, "warmup": 0.1}]


# ---- grow.py bench ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small corpus and a schedule; train.py's options for it."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "text.txt").write_text("".join(f"line {i} of {i * i % 97} lines\n" for i in range(4000)))
    data.prepare({"text": [folder / "text.txt"]}, folder / "corpus", data.get_tokenizer("bytes"))
    (folder / "double.json").write_text(json.dumps(DOUBLE))
    return folder


@pytest.fixture
def in_process(monkeypatch):
    """train.py without the seconds that starting a process takes; the list of the runs that were asked for."""
    asked = []

    def call(command, stdin, stdout, stderr):
        asked.append(command)
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stdout):
            return train.main(command[2:])
    monkeypatch.setattr(grow.subprocess, "call", call)
    monkeypatch.setattr(train, "matmul_rate", lambda *_: 1e12)       # measuring the machine takes longer than these runs
    return asked


def bench(place, *words, out="runs") -> tuple[str, dict]:
    """The bench's table and its bench.json."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert grow.main(["bench", "--out", str(place / out), *words, "--", *TINY, "--data", str(place / "corpus")]) == 0
    return text.getvalue(), json.loads((place / out / "bench.json").read_text())


def test_bench(place, in_process):
    """Each row is what its run's own log and configuration say; a schedule's run costs what its budget of scratch steps costs, to half a
    step; done runs are not run again, and an interrupted one is; a folder of another bench is refused."""
    words = ["--steps", "8", "16", "--at", "8", "--stages", str(place / "double.json"), "--seeds", "0", "1"]
    table, result = bench(place, *words)
    assert len(in_process) == 6
    rows = {(row["name"], row["budget"]): row for row in result["rows"]}
    assert set(rows) == {("scratch", 8), ("scratch", 16), ("double", 8)}

    small, final = (preset("demo").replace(n_layers=n, d_model=16, n_heads=1, head_dim=16, d_ff=32, max_seq_len=16) for n in (1, 2))
    step = {config: 3 * forward_flops(config, 16) * 16 * 4 / 1e12 for config in (small, final)}
    for (name, budget), row in rows.items():
        assert abs(row["tflop"] - budget * step[final]) <= (step[final] if name == "double" else 1e-9)
        for seed in (0, 1):
            folder = place / "runs" / f"{name}-{budget}-seed{seed}"
            log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            assert row["loss"][str(seed)] == [line["val_loss"] for line in log if line["step"] == row["steps"] and "val_loss" in line][0]
            assert sum("grown" in line for line in log) == (name == "double")
            assert train.read_run(folder)[0].seed == seed
        assert row["mean"]["loss"] == sum(row["loss"].values()) / 2 and f"{row['mean']['loss']:.4f}" in table
    grown = rows["double", 8]
    half = round(grown["steps"] * 4 * 0.5)
    assert grown["tflop"] == pytest.approx((half + -half % 4) / 4 * step[small] + (grown["steps"] - (half + -half % 4) / 4) * step[final])
    assert grown["stages"].startswith("1x16 -> 2x16 at ") and all(abs(a - b) < 1e-5 for (a, b), in grown["growths"].values())
    line = {rows["scratch", n]["tflop"]: rows["scratch", n]["mean"]["loss"] for n in (8, 16)}
    assert grown["speed_up"] == speed_up(line, grown["tflop"], grown["mean"]["loss"])[0] and rows["scratch", 8]["speed_up"] == pytest.approx(1)

    (place / "runs" / "double-8-seed1" / "cost.json").unlink()       # as if killed before its end
    again = bench(place, *words)[1]
    assert len(in_process) == 7 and [row["loss"] for row in again["rows"]] == [row["loss"] for row in result["rows"]]
    with pytest.raises(ValueError, match="scratch-8-seed0 is a run of another bench .*lr.*choose another --out"):
        grow.main(["bench", "--out", str(place / "runs"), "--steps", "8", "16", "--", *TINY, "--data", str(place / "corpus"), "--lr", "0.1"])


def test_a_process_each(place):
    """Without the stand-in, the same code starts train.py; what it says when it refuses comes through, and no cost.json says it is done."""
    folder = place / "refused" / "scratch-1-seed0"
    folder.parent.mkdir()
    with pytest.raises(ValueError, match="(?s)train.py ended with code 2, its last words.*--steps 0: must be at least 1"):
        bench_run({"folder": folder, "options": ["--steps", "0", "--out", str(folder)]})
    assert not folder.exists()


@given(st.floats(1, 4), st.floats(0.05, 1), st.lists(st.floats(0.1, 1000), min_size=2, max_size=4, unique_by=lambda f: round(math.log(f), 1)),
       st.floats(0.1, 1000), st.floats(0.2, 5))
def test_speed_up_reads_a_line_exactly(a, b, budgets, flop, times):
    """Where scratch losses lie on a - b log F, a run with the loss of `times` its FLOPs has a speed-up of `times`, wherever the points are;
    and it is extrapolated exactly where that loss lies outside the scratch runs'."""
    def loss(f):
        return a - b * math.log(f)
    found, extrapolated = speed_up({f: loss(f) for f in budgets}, flop, loss(times * flop))
    assert found == pytest.approx(times, rel=1e-6)
    if abs(math.log(times * flop / min(budgets))) > 1e-6 and abs(math.log(times * flop / max(budgets))) > 1e-6:
        assert extrapolated == (not min(budgets) < times * flop < max(budgets))


def test_speed_up_without_a_line():
    """One scratch run, or one whose loss rises with work, gives no number, not a wrong one."""
    assert all(speed_up(scratch, 1.0, 2.0) == (None, True) for scratch in ({1.0: 2.0}, {1.0: 2.0, 2.0: 2.1}, {1.0: 2.0, 2.0: 2.0}))


@pytest.mark.parametrize("words, message", [
    (["--stages", "nothere"], "neither one of small.* nor a readable JSON file"),
    (["--stages", "SAMPLES"], "in shares of its run, from 0 to 1.*start = 400"),
    (["--stages", "SHRINKS"], "does not work: stage 2.*n_layers: 2 -> 1 would shrink"),
    (["--steps", "0"], "--steps 0: must be at least 1"),
    (["--at", "-3"], "--steps -3: must be at least 1"),
])
def test_bad_input(place, words, message):
    """What cannot run is refused before anything runs."""
    for name, stages in (("SAMPLES", [DOUBLE[0], DOUBLE[1] | {"start": 400}]), ("SHRINKS", [{}, {"config": {"n_layers": 1}, "start": 0.5}])):
        (place / f"{name}.json").write_text(json.dumps(stages))
        words = [str(place / f"{name}.json") if word == name else word for word in words]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        bench(place, *words, out="bad")
    assert not list((place / "bad").glob("*seed*"))


def test_other_commands_take_no_options_for_training():
    """-- belongs to bench alone."""
    with pytest.raises(ValueError, match="only bench hands options on"):
        grow.main(["plan", "--", "--lr", "1"])


def test_a_plot_needs_matplotlib(place, monkeypatch):
    """A plot without matplotlib is refused before the first run, with the command that installs it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        bench(place, "--plot", "x.png", out="plot")
    assert not (place / "plot").exists()


def test_the_schedules_are_schedules(tmp_path):
    """Every built-in schedule is one that train.py accepts, and all but the one that never grows end as the bench's own model. A file may hold
    several of them."""
    (tmp_path / "all.json").write_text(json.dumps(SCHEDULES))
    final = preset("demo").replace(n_layers=8, d_model=32, n_heads=1, head_dim=32, d_ff=128, max_seq_len=128, mup_base_width=32, init_std=0.05)
    for name, stages in SCHEDULES.items():
        planned = grow.read_stages(shares([{**stages[0], "config": final.to_dict() | stages[0]["config"]}, *stages[1:]], 8000))
        assert (planned[-1]["config"] == final) == (name != "small"), name


# ---- 03-growth.md: the exercises --------------------------------------------------------------------------------------

def test_03_exercise_1_zeros_are_not_enough():
    """A LayerNorm divides by the deviation over ALL its channels. With zeros in the new ones, and numbers of mean zero in the old, the variance is
    C / C' of what it was: the old channels come out sqrt(C' / C) times too large, 1.58 from 16 to 40. The masked LayerNorm is exact."""
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(-1, keepdim=True)
    wide, expected = F.pad(x, (0, 24)), F.layer_norm(x, (16,), eps=0)
    ratio = F.layer_norm(wide, (40,), eps=0)[:, :16] / expected
    assert torch.allclose(ratio, torch.full_like(ratio, (40 / 16) ** 0.5), rtol=1e-12) and round((40 / 16) ** 0.5, 2) == 1.58

    norm = LayerNorm(40, 0.0).double()
    norm.mask = torch.tensor([1.0] * 16 + [0.0] * 24)
    wide[:, 16:] = 100.0                                             # anything at all
    assert torch.allclose(norm(wide)[:, :16], expected, rtol=1e-12) and (norm(wide)[:, 16:] == 0).all()


def test_03_exercise_2_first_steps():
    """A zero-moment entry whose `step` is that of an old tensor moves 0.45 of the learning rate first, and after k alike gradients
    (1 - 0.9^k) / sqrt(1 - 0.95^k) of it: 1.10 at most, after 20. With `step` at 0, as in a fresh layer, it is 1.00 at every k."""
    exact = [(1 - 0.9 ** k) / (1 - 0.95 ** k) ** 0.5 for k in range(1, 101)]
    assert round(exact[0], 2) == 0.45 and round(max(exact), 2) == 1.10 and exact.index(max(exact)) + 1 == 20
    for step, expected in ((10_000, exact), (0, [1.0] * 100)):
        p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.AdamW([p], lr=1.0, betas=(0.9, 0.95), eps=1e-12, weight_decay=0)
        optimizer.state[p] = {"step": torch.tensor(float(step)), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        moved = []
        for _ in range(100):
            before, p.grad = p.item(), torch.full_like(p, 0.3)
            optimizer.step()
            moved.append(before - p.item())
        assert moved == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_03_exercise_3_what_muP_would_do(tied):
    """From a width of 8 to one of 16, m doubles, so without the rule every logit is half of what it was; with the final LayerNorm's gain and bias
    times r = 2 nothing moves. Untied it is the same: the multiplier is the head's."""
    old = FLMConfig(n_layers=1, d_model=8, n_heads=2, head_dim=4, d_ff=16, vocab_size=32, max_seq_len=8, mup_base_width=8, tie_embeddings=tied)
    model = muP.init_weights(FLM(old), 0).double()
    grown, _, _ = grow.grow(model, old.replace(d_model=16), seed=0)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        before = model(tokens)
        assert torch.allclose(grown(tokens), before, rtol=1e-12, atol=1e-14)
        grown.norm.weight[:8] /= 2
        grown.norm.bias[:8] /= 2
        assert torch.allclose(grown(tokens), before / 2, rtol=1e-12, atol=1e-14)


def test_03_exercise_4_the_area_under_the_curve():
    """A model that grows linearly from nothing costs half, as the paper's figure 1(b) has it. Its own schedule by size and tokens alone,
    (245.37 x 16 + 39.64 x 51 + 26.54 x 101) / (311.55 x 101), costs 27%: a saving of 73%, beside the 72% of the days in section 2.3."""
    n = 1000
    assert abs(sum((i + 0.5) / n for i in range(n)) / n - 0.5) < 1e-12
    tokens = [stage["tokens"] / 1e9 for stage in PAPER_STAGES]
    share = sum(t * size for t, size in zip(tokens, (16, 51, 101))) / (sum(tokens) * 101)
    assert round(share, 2) == 0.27 and round(1 - sum(s["days"] for s in PAPER_STAGES) / grow.PAPER_SCRATCH_DAYS, 2) == 0.72


def test_03_exercise_5_how_late_for_2_2():
    """If a token taught a small model as much as a large one, the speed-up would be the ratio of the costs. With 2 of the bench's 8 layers (and the
    whole head) a token costs 29%, so the growth would have to wait for 77% of the samples to give 2.2; at 50% it gives 1.55."""
    final = preset("demo").replace(n_layers=8, d_model=32, n_heads=1, head_dim=32, d_ff=128, max_seq_len=128)
    ratio = forward_flops(final.replace(n_layers=2), 128) / forward_flops(final, 128)

    def most(start):
        return 1 / (start * ratio + 1 - start)
    start = (1 - 1 / 2.2) / (1 - ratio)
    assert (round(ratio, 2), round(start, 2), round(most(0.5), 2)) == (0.29, 0.77, 1.55) and most(start) == pytest.approx(2.2)
