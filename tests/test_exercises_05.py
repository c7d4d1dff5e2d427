"""The answers to the exercises of tutorials/05-parallel.md. A docstring states the answer; the code
checks it."""

import pytest
import torch

from flm import FLM, PRESETS
from lab.timetable import timetable

pytestmark = pytest.mark.quick


def test_05_exercise_1_micro_batches_against_the_bubble():
    """The bubble of 1F1B is (p - 1) / (m + p - 1): 3 / (m + 3) falls below 5% at m = 58, and is
    1.6% at 180. The drawn timetable agrees."""

    def bubble(m):
        return timetable(4, m)[1]

    assert bubble(57) == pytest.approx(0.05) and bubble(58) < 0.05
    assert bubble(180) == pytest.approx(3 / 183) == pytest.approx(0.0164, abs=1e-4)


def test_05_exercise_2_one_sum_divided_once():
    """(256 * 2.0 + 8 * 5.0) / 264 = 2.091 nats; the mean of the means is 3.5. The engines average
    over dp = 2 ranks, so each rank's sum is multiplied by dp / count = 2 / 264: the mean of
    (2 / 264) * 512 and (2 / 264) * 40 is 552 / 264."""
    sums, count = (256 * 2.0, 8 * 5.0), 264
    assert sum(sums) / count == pytest.approx(2.091, abs=5e-4)
    assert sum(2 / count * nats for nats in sums) / 2 == pytest.approx(sum(sums) / count)
    assert (2.0 + 5.0) / 2 == 3.5


def test_05_exercise_3_what_two_ranks_hold_whole():
    """The LayerNorms (gain and bias, two in a block and one at the end) and the biases of o and
    down, which are added once, after the sum: 6 C in each block, 2 C at the end. In flm-101b
    4,935,680 of 101,701,570,560: 0.005%."""
    config = PRESETS["flm-101b"]
    with torch.device("meta"):
        model = FLM(config)
    whole = sum(
        p.numel()
        for name, p in model.named_parameters()
        if "norm" in name or name.endswith(("o.bias", "down.bias"))
    )
    assert whole == 6 * 10240 * 80 + 2 * 10240 == 4_935_680
    share = whole / sum(p.numel() for p in model.parameters())
    assert share == pytest.approx(4.85e-5, rel=0.01)


def test_05_exercise_4_bytes_on_a_gpu():
    """The first pipeline stage has 20 blocks and the embedding, 26.2 billion parameters; tp 4
    leaves 6.55 billion to a GPU, 16 bytes each: 105 GB without the distributed optimizer, more than
    the card has, and 8.7 GB with it."""
    config = PRESETS["flm-101b"]
    with torch.device("meta"):
        part = FLM(config, range(20), True, False)
    size = sum(p.numel() for p in part.parameters())
    assert size / 4 == pytest.approx(6.55e9, rel=0.001)
    assert 16 * size / 4 / 1e9 == pytest.approx(104.8, abs=0.1)
    assert 16 * size / 4 / 12 / 1e9 == pytest.approx(8.73, abs=0.01)
