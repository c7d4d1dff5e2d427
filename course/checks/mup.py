"""Checks of chapter 4: muP's table, and the loss law."""

from __future__ import annotations

import json
import math

import numpy as np
from hypothesis import strategies as st

from course import oracles
from course.checking import Wrong, check, expect, expect_close
from course.student import ROOT, Raised

# --------------------------------------------------------------------------------------------------
# mup: initial_std(kind, config) -> std; adamw_group(kind, config, lr, decay) -> (lr, decay)

KINDS = ("embedding", "head", "norm", "bias", "qkv", "o", "up", "down")
MATRICES = ("qkv", "o", "up", "down")
configs = st.fixed_dictionaries(
    {
        "n_layers": st.integers(1, 80),
        "d_model": st.integers(1, 40).map(lambda n: 8 * n),
        "n_heads": st.integers(1, 8),
        "head_dim": st.sampled_from([8, 16, 128]),
        "d_ff": st.integers(1, 80).map(lambda n: 8 * n),
        "base_width": st.sampled_from([8, 32, 256]),
        "init_std": st.sampled_from([0.016, 0.02, 1.0]),
    }
)


@check("mup", kind=st.sampled_from([*MATRICES, "embedding", "head"]), config=configs, examples=60)
def every_row_has_its_std(f, kind, config):
    """Each kind of parameter starts with the standard deviation of its row in the table."""
    exact = oracles.mup_row(kind, config)[1]
    expect_close("the std / its right value", f.initial_std(kind, config) / exact, 1.0, 1e-12)


@check("mup", kind=st.sampled_from(KINDS), config=configs, lr=st.sampled_from([1e-3, 0.5]))
def every_row_has_its_learning_rate(f, kind, config, lr):
    """AdamW's learning rate is lr / m for a matrix of a block, and lr for all else."""
    exact = lr / oracles.mup_row(kind, config)[0]
    found, _ = f.adamw_group(kind, config, lr, 0.1)
    expect_close("the learning rate / its right value", found / exact, 1.0, 1e-12)


@check("mup", kind=st.sampled_from(KINDS), config=configs, decay=st.sampled_from([0.0, 0.1]))
def a_step_takes_off_the_same_share(f, kind, config, decay):
    """Learning rate times decay, what AdamW takes off a weight in a step, does not depend on the
    width; biases and norms do not decay."""
    lr, found = f.adamw_group(kind, config, 0.25, decay)
    exact = 0.0 if kind in ("norm", "bias") else 0.25 * decay
    expect_close("learning rate * decay", lr * found, exact, 1e-12)


@check("mup", kind=st.sampled_from(KINDS), n_layers=st.integers(1, 9))
def nothing_changes_at_the_base_width(f, kind, n_layers):
    """At the proxy's own width every learning rate and decay is the one that was searched there."""
    sizes = {"d_model": 64, "n_heads": 4, "head_dim": 16, "d_ff": 256}
    config = {"n_layers": n_layers, **sizes, "base_width": 64, "init_std": 0.1}
    decay = 0.0 if kind in ("norm", "bias") else 0.1
    lr, found = f.adamw_group(kind, config, 0.01, 0.1)
    expect_close("the learning rate", lr, 0.01, 1e-14)
    expect_close("the decay", found, decay, 1e-14)


@check("mup")
def the_papers_model(f):
    """By hand for the 101B model, 40 times as wide as the proxy: q, k, v and up start at
    0.016 / sqrt(40) = 0.00253, o and down at 0.00253 / sqrt(160) = 0.0002."""
    sizes = {"n_layers": 80, "d_model": 10240, "n_heads": 80, "head_dim": 128, "d_ff": 40960}
    config = {**sizes, "base_width": 256, "init_std": 0.016}
    for kind, exact in {"qkv": 2.5298e-3, "up": 2.5298e-3, "o": 2e-4, "down": 2e-4}.items():
        expect_close(f"1000 * std of {kind}", 1e3 * f.initial_std(kind, config), 1e3 * exact, 1e-4)


# --------------------------------------------------------------------------------------------------
# loss_law: fit_law(N, loss) -> (a, b, c)

POINTS = ROOT / "tutorials/measurements/muscaling-points.json"
# Sizes that span a factor of 4 or more: closer ones do not tell laws apart in float64.
ladders = st.lists(st.integers(1, 6), min_size=3, max_size=7).map(
    lambda steps: [2.0 ** (sum(steps[:i]) / 3 - 6) for i in range(len(steps) + 1)]
)
sizes = ladders.filter(lambda N: N[-1] / N[0] > 4)


@check("loss_law", N=sizes, a=st.floats(0.1, 5), b=st.floats(-1.5, -0.1), c=st.floats(0, 4))
def a_law_that_is_there_is_found(f, N, a, b, c):
    """Points exactly on a law: the fit has its b, and predicts its loss at 10 times the largest
    size."""
    found = f.fit_law(N, [a * n**b + c for n in N])
    exact, far = a * (10 * N[-1]) ** b + c, 1e-5 * a * N[0] ** b
    predicted = found[0] * (10 * N[-1]) ** found[1] + found[2]
    expect(abs(found[1] - b) < 1e-4, f"b is {found[1]:.6g}, expected {b:.6g}")
    text = f"at N = {10 * N[-1]:.4g} the fit predicts {predicted:.6f}, the law {exact:.6f}"
    expect(abs(predicted - exact) < far, text)


@check("loss_law", N=sizes, b=st.floats(-1.5, -0.1), seed=st.integers(0, 1000))
def the_fit_is_least_squares(f, N, b, seed):
    """With noise: none of 400 values of b, each with its best a and c, has smaller residuals."""
    N, noise = np.array(N), np.random.default_rng(seed).normal(size=len(N))
    loss = N**b + 2 + 0.01 * noise * (N[0] ** b - N[-1] ** b)
    best = {}
    for trial in np.linspace(-3.9, -0.04, 400):
        columns = np.stack([N**trial, np.ones_like(N)], 1)
        a_c = np.linalg.lstsq(columns, loss, rcond=None)[0]
        best[((columns @ a_c - loss) ** 2).sum()] = trial
    if not -3.8 < best[min(best)] < -0.05:
        return  # the noise bent the points: no law falls through them
    a, found_b, c = f.fit_law(N.tolist(), loss.tolist())
    squares = ((a * N**found_b + c - loss) ** 2).sum()
    text = f"b = {found_b:.4g} has the squares {squares:.6g}; b = {best[min(best)]:.4g} has "
    expect(squares <= min(best) * (1 + 1e-6) + 1e-18, text + f"{min(best):.6g}")


@check("loss_law")
def the_published_points(f):
    """muScaling's own points, without the three widest, give a = 2.469, b = -0.423, c = 2.923."""
    points = json.loads(POINTS.read_text())["points"]
    narrow = sorted(points, key=lambda point: point["width"])[:-3]
    N = [point["N"] for point in narrow]
    found = f.fit_law(N, [point["loss"] for point in narrow])
    for name, value, exact in zip("abc", found, (2.469, -0.423, 2.923)):
        expect_close(name, value, exact, 1e-3)


@check("loss_law", sizes=st.sampled_from([[1.0, 2.0, 4.0], [1.0, 2.0, 2.0, 2.0]]))
def too_few_sizes_are_refused(f, sizes):
    """Three unknowns need more than three different sizes: with fewer, ValueError."""
    try:
        found = f.fit_law(sizes, [3 / math.sqrt(n) for n in sizes])
    except Raised as error:
        expect(error.kind == "ValueError", f"{error}; expected ValueError")
    except ValueError:  # a function of this process
        return
    else:
        raise Wrong(f"it returned {found}; expected ValueError")
