"""The answers to the exercises of tutorials/03-growth.md. A docstring states the answer; the code
checks it."""

import pytest
import torch
from torch.nn import functional as F

import grow
import muP
from flm import FLM, FLMConfig, Norm, forward_flops, preset
from lab.plan import PAPER_SCRATCH_DAYS
from schedule import PAPER_STAGES

pytestmark = pytest.mark.quick


def test_03_exercise_1_zeros_are_not_enough():
    """A LayerNorm divides by the deviation over ALL its channels. With zeros in the new ones, and
    numbers of mean zero in the old, the variance is C / C' of what it was: the old channels come
    out sqrt(C' / C) times too large, 1.58 from 16 to 40. The masked LayerNorm is exact."""
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(-1, keepdim=True)
    wide, expected = F.pad(x, (0, 24)), F.layer_norm(x, (16,), eps=0)
    ratio = F.layer_norm(wide, (40,), eps=0)[:, :16] / expected
    assert torch.allclose(ratio, torch.full_like(ratio, (40 / 16) ** 0.5), rtol=1e-12)
    assert round((40 / 16) ** 0.5, 2) == 1.58

    norm = Norm(40, 0.0).double()
    norm.mask = torch.tensor([1.0] * 16 + [0.0] * 24)
    wide[:, 16:] = 100.0  # anything at all
    assert torch.allclose(norm(wide)[:, :16], expected, rtol=1e-12)
    assert (norm(wide)[:, 16:] == 0).all()


def test_03_exercise_2_first_steps():
    """A zero-moment entry whose `step` is that of an old tensor moves 0.45 of the learning rate
    first, and after k equal gradients (1 - 0.9^k) / sqrt(1 - 0.95^k) of it: 1.10 at most, after 20.
    With `step` at 0, as in a fresh layer, it is 1.00 at every k."""
    exact = [(1 - 0.9**k) / (1 - 0.95**k) ** 0.5 for k in range(1, 101)]
    assert round(exact[0], 2) == 0.45
    assert round(max(exact), 2) == 1.10 and exact.index(max(exact)) + 1 == 20
    for step, expected in ((10_000.0, exact), (0.0, [1.0] * 100)):
        p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        adamw = torch.optim.AdamW([p], lr=1.0, betas=(0.9, 0.95), eps=1e-12, weight_decay=0)
        zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        adamw.state[p] = {"step": torch.tensor(step), **zeros}
        moved = []
        for _ in range(100):
            before, p.grad = p.item(), torch.full_like(p, 0.3)
            adamw.step()
            moved.append(before - p.item())
        assert moved == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_03_exercise_3_what_muP_would_do(tied):
    """From a width of 8 to one of 16, m doubles, so without the rule every logit is half of what it
    was; with the final LayerNorm's gain and bias times r = 2 nothing moves. Untied it is the same:
    the multiplier is the head's."""
    sizes = dict(n_layers=1, d_model=8, n_heads=2, head_dim=4, d_ff=16, vocab_size=32)
    old = FLMConfig(**sizes, max_seq_len=8, mup_base_width=8, tie_embeddings=tied)
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
    """A model that grows linearly from nothing costs half, as the paper's figure 1(b) has it. Its
    own schedule by size and tokens alone,
    (245.37 x 16 + 39.64 x 51 + 26.54 x 101) / (311.55 x 101), costs 27%: a saving of 73%, beside
    the 72% of the days in section 2.3."""
    n = 1000
    assert abs(sum((i + 0.5) / n for i in range(n)) / n - 0.5) < 1e-12
    tokens = [stage["tokens"] / 1e9 for stage in PAPER_STAGES]
    share = sum(t * size for t, size in zip(tokens, (16, 51, 101))) / (sum(tokens) * 101)
    days = sum(stage["days"] for stage in PAPER_STAGES)
    assert round(share, 2) == 0.27 and round(1 - days / PAPER_SCRATCH_DAYS, 2) == 0.72


def test_03_exercise_5_how_late_for_2_2():
    """If a token taught a small model as much as a large one, the speed-up would be the ratio of
    the costs. With 2 of the bench's 8 layers (and the whole head) a token costs 29%, so the growth
    would have to wait for 77% of the samples to give 2.2; at 50% it gives 1.55."""
    sizes = dict(n_layers=8, d_model=32, n_heads=1, head_dim=32, d_ff=128, max_seq_len=128)
    final = preset("demo").replace(**sizes)
    ratio = forward_flops(final.replace(n_layers=2), 128) / forward_flops(final, 128)

    def most(start):
        return 1 / (start * ratio + 1 - start)

    start = (1 - 1 / 2.2) / (1 - ratio)
    assert (round(ratio, 2), round(start, 2), round(most(0.5), 2)) == (0.29, 0.77, 1.55)
    assert most(start) == pytest.approx(2.2)
