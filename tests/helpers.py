"""What the tests of several modules share: tiny models, random configurations, errors, commands.

from helpers import build, configs, difference, error, few, run_command, seeds, some_tokens, tiny
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st

from checkpoint import step_of, write_checkpoint
from flm import FLM, IGNORE, FLMConfig

ROOT = Path(__file__).resolve().parent.parent  # the repository

few = settings(max_examples=30)  # examples of a property that runs a model
seeds = st.integers(0, 2**31 - 1)


# ----------------------------------------------------------------------------------------------
# Models


def tiny(**changes) -> FLMConfig:
    """A small configuration in which no two sizes agree: H*D != C, F != 4C, and m is not 1."""
    sizes = dict(n_layers=2, d_model=12, n_heads=3, head_dim=6, d_ff=20, vocab_size=23)
    return FLMConfig(**{**sizes, "max_seq_len": 16, "mup_base_width": 8, **changes})


# The model of the coordinate checks, at their base width and depth.
CHECKED = FLMConfig(
    n_layers=2,
    d_model=16,
    n_heads=2,
    head_dim=8,
    d_ff=64,
    vocab_size=256,
    max_seq_len=32,
    mup_base_width=16,
)


@st.composite
def configs(draw, **fixed) -> FLMConfig:
    """Random small configurations. A field in `fixed` has that value in all of them."""
    fields = dict(
        n_layers=st.integers(1, 3),
        d_model=st.integers(4, 14),
        n_heads=st.integers(1, 3),
        head_dim=st.sampled_from([2, 4, 6]),
        d_ff=st.integers(3, 14),
        vocab_size=st.integers(5, 30),
        max_seq_len=st.integers(2, 16),
        tie_embeddings=st.booleans(),
        norm=st.sampled_from(["layernorm", "rmsnorm"]),
        activation=st.sampled_from(["gelu", "gelu_tanh", "swiglu"]),
        rotary=st.sampled_from(["xpos", "rope"]),
        bias=st.booleans(),
        norm_eps=st.sampled_from([1e-5, 0.1]),
        rotary_theta=st.sampled_from([100.0, 10000.0]),
        xpos_scale_base=st.sampled_from([20.0, 512.0]),
        mup=st.booleans(),
        mup_base_width=st.sampled_from([4, 8]),
        mup_ff_ratio=st.sampled_from([4.0, 2.625]),
        input_mult=st.sampled_from([1.0, 1.7]),
        output_mult=st.sampled_from([1.0, 2.0]),
        depth_alpha=st.sampled_from([0.0, 0.0, 0.5, 1.0]),
        base_layers=st.integers(1, 4),
    )
    drawn = {name: draw(values) for name, values in fields.items() if name not in fixed}
    return FLMConfig(**drawn, **fixed)


@torch.no_grad()
def wild(model: FLM, seed: int = 0) -> FLM:
    """Random numbers in every parameter, gains and biases too; returns the model.

    Initial values would hide a bias that is left out."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.5, generator=generator)
    return model


def build(config: FLMConfig, seed: int = 0, dtype: torch.dtype = torch.float64, **parts) -> FLM:
    """A model with wild weights, in float64, where rounding is 1e-16. parts: FLM's arguments."""
    return wild(FLM(config, **parts).to(dtype), seed)


def some_tokens(config: FLMConfig, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random tokens of that shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, shape, generator=generator)


def some_targets(config: FLMConfig, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random targets of that shape; about a third of them are not supervised."""
    targets = some_tokens(config, *shape, seed=seed + 1)
    targets[torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.33] = IGNORE
    return targets


def save_model(folder: Path, model: FLM, **info) -> Path:
    """Write the model as a checkpoint folder; `info` changes what checkpoint.json says."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    step = step_of(Path(folder).name) or 0
    plain = {"step": step, "samples": 0, "stage": 0, "tokenizer": "bytes", "growth": None}
    tensors = {"model": {name: p.detach() for name, p in model.named_parameters()}}
    about = {**plain, "dtype": dtype, "config": model.config.to_dict(), **info}
    return write_checkpoint(Path(folder), tensors, about)


# ----------------------------------------------------------------------------------------------
# What came out


def difference(ours, exact) -> float:
    """The largest difference of two tensors of one shape, relative to the largest number (if all
    are 0, the difference itself)."""
    ours, exact = torch.as_tensor(ours).detach(), torch.as_tensor(exact).detach()
    assert ours.shape == exact.shape
    return (ours - exact).abs().max().item() / (exact.abs().max().item() or 1.0)


def error(action: Callable, *arguments, **options) -> str:
    """The message of the ValueError that action(*arguments, **options) raises.

    >>> error(int, "seven")
    "invalid literal for int() with base 10: 'seven'"
    """
    try:
        action(*arguments, **options)
    except ValueError as problem:
        return str(problem)
    raise AssertionError(f"{action} raised no ValueError")


def run_command(module: str, *arguments, **options) -> tuple[int, str, str]:
    """Run `python MODULE ARGUMENTS` in a process of its own -> (exit code, stdout, stderr).

    module: "train" for train.py, "lab.growth" for `python -m lab.growth`. options: those of
    subprocess.run, such as cwd, input or env. The process uses one thread."""
    name = ["-m", module] if "." in module else [str(ROOT / f"{module}.py")]
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    options["env"] = os.environ | environment | options.get("env", {})
    words = [sys.executable, *name, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, **options)
    return done.returncode, done.stdout, done.stderr
