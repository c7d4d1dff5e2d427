"""Tests of lab/plan.py: what a run costs."""

import json
import re

import pytest
from helpers import configs, error
from hypothesis import given
from hypothesis import strategies as st

from flm import count_parameters, forward_flops, preset
from lab import plan
from lab.plan import cost_plan, describe_cost_plan, narayanan_flops

pytestmark = pytest.mark.quick
DEMO = preset("demo")


def test_the_papers_schedule():
    """Days and tokens add up to the paper's 21.54 and 311.55 B; from the last stage's rate 101B
    throughout takes 76.77 days beside the paper's 76.74, so 72% and 3.56 times; 99.3 thousand
    GPU-hours cost $100K at $1.0075 each."""
    p = cost_plan()
    total, scratch = p["total"], p["scratch"]
    assert round(total["days"], 2) == 21.54 and round(total["tokens"] / 1e9, 2) == 311.55
    assert round(scratch["days"], 2) == 76.77 and plan.PAPER_SCRATCH_DAYS == 76.74
    assert round(p["times"]["days"], 2) == 3.56 and round(1 - 1 / p["times"]["days"], 2) == 0.72
    assert round(total["gpu_hours"], -2) == 99_300
    assert total["dollars"] == pytest.approx(100_000) and round(p["price"], 4) == 1.0075
    assert [row["gpus"] for row in p["stages"]] == [192, 192, 192]
    largest = 80 * (12 * 10240**2 + 13 * 10240) + 2 * 10240 + 100352 * 10240
    assert p["stages"][2]["parameters"] == largest == count_parameters(preset("flm-101b"))


def test_the_successors_growth(capsys):
    """Its stages grow into each other; printed are 2.3e12 tokens, and two months for the first; the
    two stages of which the reports print little are marked."""
    p = cost_plan(plan.TELE_STAGES)
    assert p["total"]["tokens"] == pytest.approx(2.3e12) and p["stages"][0]["days"] == 60
    assert p["stages"][1]["tflops"] == pytest.approx(p["stages"][0]["tflops"], rel=0.01)
    assert plan.main(["--stages", "tele-flm"]) == 0
    out = capsys.readouterr().out
    assert "102B*" in out and "1T*" in out and "marked *" in out


@pytest.mark.parametrize(
    "L, C, V, T, tokens, factor, zetta, half",
    [
        (96, 12288, 50257, 2048, 300e9, 84, 376.41, 53.77),
        (40, 5120, 32000, 4096, 2e12, 84, 201.37, 28.77),
        (70, 12288, 150528, 2048, 400e9, 96, 421.6, None),
    ],
    ids=["GPT-3", "Llama-2-13B", "GLM-130B"],
)
def test_the_formula_gives_the_papers_flops(L, C, V, T, tokens, factor, zetta, half):
    """Section 4's numbers: the middle between no recomputation (72) and all (96), with half of the
    difference as its error; GLM-130B with 96."""
    found = narayanan_flops(L, C, V, T, tokens, factor) / 1e21
    assert found == pytest.approx(zetta, abs=0.06 if half is None else 0.005)
    if half:
        found = narayanan_flops(L, C, V, T, tokens, 12) / 1e21
        assert found == pytest.approx(half, abs=0.005)


@given(configs(), st.integers(1, 50))
def test_the_formula_and_the_count_differ_by_the_head(config, k):
    """Where d_ff = 4C and H*D = C, three forward passes are the 72-form and 1.5 VC a token: the
    part of the head that the form leaves out."""
    c = config.replace(d_model=4 * k, n_heads=k, head_dim=4, d_ff=16 * k, activation="gelu")
    T = c.max_seq_len
    form = narayanan_flops(c.n_layers, c.d_model, c.vocab_size, T, 1)
    expected = form + 1.5 * c.vocab_size * c.d_model
    assert 3 * forward_flops(c, T) == pytest.approx(expected, rel=1e-12)


OWN = [
    {"preset": "demo", "gpus": 2, "tflops": 0.5},
    {"config": {"n_layers": 8}, "start": 1000, "tokens": 10 * 256, "gpus": 2, "days": 0.25},
]


def test_a_schedule_of_ones_own(tmp_path, capsys):
    """From a file: starts in place of tokens, tflops in place of days, a price. `python
    -m lab.plan` prints it as a table, as JSON with --json, and says nothing of the paper."""
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(OWN))
    code = plan.main(["--stages", str(file), "--price", "2", "--json"])
    p = json.loads(capsys.readouterr().out)
    (small, large), scratch = p["stages"], p["scratch"]
    assert code == 0 and p == cost_plan(OWN, 2.0)
    assert small["tokens"] == 256_000 and large["n_layers"] == 8
    flop = 3 * forward_flops(DEMO, 256) * 256_000
    assert small["days"] == pytest.approx(flop / 1e12 / 86400)
    assert small["dollars"] == pytest.approx(small["days"] * 96)
    assert p["total"]["days"] == pytest.approx(small["days"] + 0.25)
    assert scratch["days"] == pytest.approx(0.25 * 258_560 / 2560)
    assert plan.main(["--stages", str(file)]) == 0
    out = capsys.readouterr().out
    assert "stage 2 throughout*" in out and "aper" not in out


def test_the_table_of_the_papers_plan(capsys):
    """Columns end under one another, and the paper's own numbers are beside ours."""
    p = cost_plan()
    table = describe_cost_plan(p).splitlines()[:6]
    ends = [[m.end() for m in re.finditer(r"\S+( \S+)*", line)] for line in table[:4]]
    assert all(row[1:] == ends[0][1:] for row in ends)
    assert "zettaFLOP*" in table[0] and "76.77" in table[5] and "101B throughout" in table[5]
    assert plan.main([]) == 0
    out = capsys.readouterr().out
    assert describe_cost_plan(p) in out
    assert "76.74 days" in out and "52.76 zettaFLOP" in out and "ours: 53.48" in out


def test_a_plan_without_its_numbers_is_refused(tmp_path):
    """Costs need tokens, GPUs and a rate; a price is above 0; a file must be JSON."""
    message = error(cost_plan, [{"preset": "demo", "tokens": 5.0}])
    assert "demo: needs tokens, gpus" in message
    assert "price" in error(cost_plan, price=0.0)
    (tmp_path / "s.json").write_text("[")
    assert "is not JSON" in error(plan.main, ["--stages", str(tmp_path / "s.json")])
