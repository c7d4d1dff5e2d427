"""Tests of muP's table: the parametrization, the initial values, and AdamW's groups."""

import math

import pytest
import torch
from helpers import configs, few, seeds, tiny
from hypothesis import given
from hypothesis import strategies as st

from flm import FLM, FLMConfig
from muP import init_std, init_weights, initial_value, kind, param_groups, width_mult

pytestmark = pytest.mark.quick
stds = st.sampled_from([0.016, 0.02, 1.0])
bases = st.sampled_from([4, 8, 256])


@st.composite
def parametrized(draw) -> FLMConfig:
    """Random small configurations, of any initial std and base width."""
    return draw(configs()).replace(init_std=draw(stds), mup_base_width=draw(bases))


def table(config: FLMConfig) -> dict[str, tuple[str, float, float]]:
    """{parameter: (kind, m, init std)} for every parameter of the whole model, row by row.

    From the papers (arXiv 2203.03466 and 2309.03852, section 3). A vector's std is 0: it starts
    as a constant. With CompleteP the depth that counts is the proxy's."""
    s, base, branches = config.init_std, config.mup_base_width, 2 * config.n_layers
    if config.depth_alpha:
        branches = 2 * config.base_layers
    m_width = config.d_model / base if config.mup else 1.0
    m_attention = config.n_heads * config.head_dim / base if config.mup else 1.0
    m_hidden = config.d_ff / (config.mup_ff_ratio * base) if config.mup else 1.0
    rows = {"embedding.weight": ("embedding", 1.0, s)}
    norms = ["norm"]
    if not config.tie_embeddings:
        rows["head.weight"] = ("head", 1.0, s)
    for i in range(config.n_layers):
        layer = f"layers.{i}."
        rows[layer + "attn.qkv.weight"] = ("qkv", m_width, s / math.sqrt(m_width))
        rows[layer + "attn.o.weight"] = ("o", m_attention, s / math.sqrt(branches * m_attention))
        rows[layer + "ff.up.weight"] = ("up", m_width, s / math.sqrt(m_width))
        rows[layer + "ff.down.weight"] = ("down", m_hidden, s / math.sqrt(branches * m_hidden))
        if config.activation == "swiglu":
            rows[layer + "ff.gate.weight"] = ("gate", m_width, s / math.sqrt(m_width))
        norms += [layer + "attn_norm", layer + "ff_norm"]
    matrices = [name.removesuffix(".weight") for name in rows if name.startswith("layers.")]
    biased = matrices + (norms if config.norm == "layernorm" else [])
    vectors = [f"{name}.weight" for name in norms]
    vectors += [f"{name}.bias" for name in biased if config.bias]
    return rows | dict.fromkeys(vectors, ("vector", 1.0, 0.0))


def weights(model: FLM) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def optimizer_of(model: FLM, lr: float, weight_decay: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(param_groups(model, lr, weight_decay), betas=(0.9, 0.95))


def train(model: FLM, optimizer: torch.optim.Optimizer, steps: int):
    """Some steps on random tokens."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        tokens = torch.randint(model.config.vocab_size, (4, 9), generator=generator)
        (model(tokens[:, :-1], tokens[:, 1:]) / 32).backward()
        optimizer.step()
        optimizer.zero_grad()


# ----------------------------------------------------------------------------------------------
# The table


@few
@given(parametrized())
def test_every_parameter_has_its_row(config):
    """For each parameter, and no others: kind, m and initial std are those of the table."""
    rows = table(config)
    assert set(rows) == {name for name, _ in FLM(config).named_parameters()}
    for name, (row, m, std) in rows.items():
        assert kind(name) == row and width_mult(config, name) == pytest.approx(m, rel=1e-15), name
        if row != "vector":
            assert init_std(config, name) == pytest.approx(std, rel=1e-14), name


def test_the_papers_model():
    """Numbers worked out by hand for flm-101b, 40 times as wide as the proxy: m = 40 everywhere.

    Matrices start at 0.016 / sqrt(40) = 0.00253, those back into the residual stream at
    0.00253 / sqrt(160) = 0.0002."""
    config = FLMConfig(80, 10240, 80, 128, 40960, 100352, 2048)
    stds = {"attn.qkv": 2.5298e-3, "ff.up": 2.5298e-3, "attn.o": 2e-4, "ff.down": 2e-4}
    for name, std in stds.items():
        assert width_mult(config, f"layers.79.{name}.weight") == 40
        assert init_std(config, f"layers.79.{name}.weight") == pytest.approx(std, rel=1e-4)
    assert init_std(config, "embedding.weight") == 0.016 and config.logit_mult == 2.0 / 40


# ----------------------------------------------------------------------------------------------
# Initial values


@pytest.mark.parametrize("tied", [True, False])
def test_initial_values_have_the_nominal_std(tied):
    """Gains start at 1 and biases at 0, exactly. All else is normal with its row's mean and std."""
    sizes = dict(d_model=64, n_heads=6, head_dim=16, d_ff=160, vocab_size=200, mup_base_width=16)
    config = tiny(tie_embeddings=tied, **sizes)
    model = init_weights(FLM(config), seed=1)
    for name, value in weights(model).items():
        row, _, std = table(config)[name]
        if row == "vector":
            assert (value == (1 if name.endswith("norm.weight") else 0)).all(), name
            continue
        # Of n draws the mean scatters by std / sqrt(n), their std by std / sqrt(2n), and the share
        # that lies within one std (0.6827) by sqrt(0.6827 * 0.3173 / n). Five of each: one failure
        # in a million, if the seed were not fixed.
        n = value.numel()
        assert abs(value.mean().item()) < 5 * std / math.sqrt(n), name
        assert abs(value.std().item() / std - 1) < 5 / math.sqrt(2 * n), name
        assert abs((value.abs() < std).double().mean().item() - 0.6827) < 5 * math.sqrt(
            0.2166 / n
        ), name


@few
@given(seeds, st.integers(0, 3))
def test_initial_values_depend_on_seed_name_and_growths_alone(seed, growths):
    """The same three give the same numbers, whatever PyTorch's own generator did before.

    Another seed, name or number of growths gives other numbers. The configuration sets their
    scale only."""
    config, name, shape = tiny(), "layers.0.ff.up.weight", (20, 12)
    value = initial_value(config, name, shape, seed, growths)
    torch.manual_seed(seed + 1)
    torch.randn(7)
    assert torch.equal(value, initial_value(config, name, shape, seed, growths))
    other_name = "layers.1.ff.up.weight"
    for other in (
        (name, seed + 1, growths),
        (name, seed, growths + 1),
        (other_name, seed, growths),
    ):
        assert not torch.equal(value, initial_value(config, other[0], shape, *other[1:]))
    wider = config.replace(d_model=48)  # m grows fourfold: every number halves
    halves = initial_value(wider, name, shape, seed, growths)
    assert torch.allclose(halves, value / 2, rtol=1e-6, atol=0)  # fp32's rounding


def test_drawing_leaves_pytorchs_generator_alone():
    """init_weights takes nothing from PyTorch's global generator."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = FLM(tiny())
    torch.manual_seed(5)
    init_weights(model, 0)
    assert torch.equal(torch.rand(3), expected)


@few
@given(parametrized(), st.integers(0, 4), seeds)
def test_a_stage_starts_with_the_wholes_numbers(config, cut, seed):
    """Pipeline stages, filled one by one, the last first, start from the whole model's numbers.

    With a tied embedding the last stage's head, which has no embedding beside it, starts as the
    first stage's embedding."""
    cut = min(cut, config.n_layers)
    whole = weights(init_weights(FLM(config), seed))
    last = weights(init_weights(FLM(config, layers=range(cut, config.n_layers), embed=False), seed))
    first = weights(init_weights(FLM(config, layers=range(cut), head=False), seed))
    whole.setdefault("head.weight", whole["embedding.weight"])
    assert set(first) | set(last) == set(whole) and not set(first) & set(last)
    for name, value in (first | last).items():
        assert torch.equal(value, whole[name])


def test_an_untied_head_differs_from_the_embedding():
    """Untied, the head has numbers of its own."""
    model = weights(init_weights(FLM(tiny(tie_embeddings=False)), 0))
    assert not torch.equal(model["head.weight"], model["embedding.weight"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_initial_values_are_those_of_fp32_in_any_dtype(dtype):
    """A model of another dtype starts from the same numbers, converted."""
    plain, other = init_weights(FLM(tiny()), 3), init_weights(FLM(tiny()).to(dtype), 3)
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.to(dtype), b)


# ----------------------------------------------------------------------------------------------
# AdamW's groups


@few
@given(parametrized(), st.floats(1e-5, 1e-1), st.floats(0, 1))
def test_groups_are_the_table(config, lr, weight_decay):
    """Every parameter is in exactly one group, with learning rate lr/m and lr_scale 1/m.

    With CompleteP (arXiv 2505.01618) both are multiplied by d^(a-1) in the blocks, gains and biases
    too, and AdamW's eps there by d^-a: d = L / base_layers, a = depth_alpha.
    lr * weight_decay, what a step takes off a matrix, does not depend on m or d. Biases and
    LayerNorms are not decayed."""
    model = FLM(config)
    groups, rows = param_groups(model, lr, weight_decay), table(config)
    group_of = {parameter: group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(group_of) == len(rows)
    for name, parameter in model.named_parameters():
        (row, m, _), group, eps = rows[name], group_of[parameter], 1e-8
        if config.depth_alpha and name.startswith("layers."):
            d = config.n_layers / config.base_layers
            m /= d ** (config.depth_alpha - 1)
            eps /= d**config.depth_alpha
        assert group["eps"] == pytest.approx(eps, rel=1e-14), name
        assert group["lr"] == pytest.approx(lr / m, rel=1e-14), name
        assert group["lr_scale"] == pytest.approx(1 / m, rel=1e-14), name
        decay = 0 if row == "vector" else lr * weight_decay
        assert group["lr"] * group["weight_decay"] == pytest.approx(decay, rel=1e-14), name


@few
@given(parametrized())
def test_groups_hold_plain_numbers(config):
    """A group holds plain floats beside its parameters, and no tensor carries an attribute.

    So nothing is lost by torch.compile, a checkpoint or another layout."""
    model = init_weights(FLM(config), 0)
    for group in param_groups(model, 1e-3, 0.1):
        assert all(type(value) is float for key, value in group.items() if key != "params")
    assert not any(vars(parameter) for parameter in model.parameters())


def test_the_decay_of_a_step():
    """Where every gradient is zero, a step of AdamW takes lr * weight_decay of every matrix and
    embedding, at any width, and nothing of biases and LayerNorms."""
    for width in (8, 32):
        model = FLM(tiny(d_model=width, d_ff=8 * width)).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
                parameter.grad = torch.zeros_like(parameter)
        before = {name: value.clone() for name, value in weights(model).items()}
        optimizer_of(model, lr=0.01, weight_decay=0.1).step()
        for name, value in weights(model).items():
            left = 1 if kind(name) == "vector" else 1 - 0.01 * 0.1
            assert torch.allclose(value, left * before[name], rtol=1e-14, atol=0), name


def test_stages_have_the_wholes_groups():
    """Each parameter of a pipeline stage learns at the rate and decay it has in the whole model."""

    def settings_of(model):
        groups = param_groups(model, 1e-3, 0.1)
        names = {parameter: name for name, parameter in model.named_parameters()}
        return {
            names[p]: (group["lr"], group["weight_decay"])
            for group in groups
            for p in group["params"]
        }

    config = tiny(tie_embeddings=False)
    stages = settings_of(FLM(config, layers=[0], head=False)) | settings_of(
        FLM(config, layers=[1], embed=False)
    )
    assert stages == settings_of(FLM(config))


# ----------------------------------------------------------------------------------------------
# What the table is for


def test_mup_is_nothing_at_the_base_width():
    """At the base width muP and the standard parametrization are the same model: the same bits
    at the start and after five steps of AdamW."""
    config = tiny(d_model=16, n_heads=2, head_dim=8, d_ff=64, mup_base_width=16)
    models = [init_weights(FLM(config.replace(mup=mup)), 0) for mup in (True, False)]
    start = {name: value.clone() for name, value in weights(models[0]).items()}
    for model in models:
        train(model, optimizer_of(model, lr=1e-2, weight_decay=0.1), steps=5)
    on, off = map(weights, models)
    assert all(torch.equal(on[name], off[name]) for name in on)
    assert all(not torch.equal(on[name], start[name]) for name in on)  # and they did learn


def logit_change(width: int, mup: bool) -> float:
    """How far three steps of AdamW move the logits, root mean square, in a model of that width."""
    config = FLMConfig(
        n_layers=2,
        d_model=width,
        n_heads=width // 16,
        head_dim=16,
        d_ff=4 * width,
        vocab_size=32,
        max_seq_len=8,
        mup=mup,
        mup_base_width=32,
        init_std=0.1,
    )
    model, tokens = init_weights(FLM(config), 0), torch.arange(32).view(4, 8)
    with torch.no_grad():
        before = model(tokens)
    train(model, optimizer_of(model, lr=0.003, weight_decay=0.0), steps=3)
    with torch.no_grad():
        return (model(tokens) - before).square().mean().sqrt().item()


def test_updates_do_not_grow_with_the_width():
    """The coordinate check in small: with one learning rate, a model 16 times as wide moves its
    logits about as far under muP, and much further under the standard parametrization."""
    on, off = (logit_change(512, mup) / logit_change(32, mup) for mup in (True, False))
    assert 1 / 3 < on < 3  # seen: 0.56
    assert off > 6  # seen: 16, the ratio of the widths
