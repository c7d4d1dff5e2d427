"""What the tests of growth share: targets, new weights, a step of training."""

import zlib

import torch
from helpers import tiny
from hypothesis import strategies as st

import muP
from flm import FLM, FLMConfig
from grow import DIMENSIONS


def larger(config: FLMConfig, **more: int) -> FLMConfig:
    """`config` with that much more of each named dimension."""
    return config.replace(**{name: getattr(config, name) + n for name, n in more.items()})


BIGGER = larger(tiny(), n_layers=3, d_model=7, n_heads=1, d_ff=9)  # in every dimension


@st.composite
def growths(draw, old: FLMConfig, dimensions=DIMENSIONS):
    """(target, rule for layers): at least one of `dimensions` is larger; every kind of rule."""
    first = draw(st.sampled_from(dimensions))
    most = {name: 4 if name == "n_layers" else 9 for name in dimensions}
    more = {name: draw(st.integers(name == first, most[name])) for name in dimensions}
    new, row = larger(old, **more), [*range(old.n_layers)]
    for _ in range(new.n_layers - old.n_layers):  # a copy after its original, or a fresh layer
        i = draw(st.integers(0, len(row)))
        before = [layer for layer in row[:i] if layer is not None]
        row.insert(i, draw(st.sampled_from([None, *before])))
    return new, draw(st.sampled_from(["stack", "interleave", "fresh", row]))


def wild_draw(sigma: float):
    """New weights that no initialisation would draw: every parameter normal with this sigma."""

    def draw(config, name, shape, seed, growths):
        key = zlib.crc32(f"{name}/{seed}/{growths}".encode())
        generator = torch.Generator().manual_seed(key)
        return torch.randn(shape, generator=generator, dtype=torch.float64) * sigma

    return draw


def logits(model: FLM, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens)


def adamw(model: FLM, lr: float = 1e-2, weight_decay: float = 0.1) -> torch.optim.AdamW:
    return torch.optim.AdamW(muP.param_groups(model, lr, weight_decay), betas=(0.9, 0.95))


def train_step(model: FLM, optimizer, tokens: torch.Tensor, clip: float | None = 0.5) -> float:
    """One step of training; returns the loss."""
    loss = model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
    loss.backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def tensors_of(model: FLM, optimizer=None) -> dict[str, dict[str, torch.Tensor]]:
    """What a checkpoint holds of a model, and of an optimizer, which need not have stepped."""
    tensors = {"model": {name: p.detach() for name, p in model.named_parameters()}}
    if optimizer is not None:
        tensors["optimizer"] = {
            f"{name}.{key}": value
            for name, p in model.named_parameters()
            for key, value in optimizer.state[p].items()
        }
    return tensors
