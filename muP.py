"""muP.py - the maximal update parametrization of FLM-101B (section 3; arXiv 2203.03466).

A narrow model of the same depth, the proxy (width 256), is cheap enough for a search over learning
rate, init std (the standard deviation of the initial values) and output multiplier. muP says how
each must change with the width, so that what the search found holds for the wide model. m is the
ratio of a matrix's fan-in to the proxy's (FLMConfig.m_width, .m_attn, .m_ff), L the number of
layers, s = init_std, n = the learning rate, wd = the weight decay:

    parameter                     init std         AdamW lr   weight decay   forward
    embedding (tied or not)       s                n          wd             x input_mult
    q, k, v, up, gate             s / sqrt(m)      n / m      wd * m         1
    o, down                       s / sqrt(2L m)   n / m      wd * m         1
    LayerNorm gain, bias; biases  1, 0; 0          n          0              1
    logits (untied head)          s                n          wd             x output_mult / m

    rows in code                  kind; the m of each: width_mult
    columns in code               init_std and     param_groups              FLM.forward, with
                                  initial_value                              FLMConfig.logit_mult

The standard parametrization is this table with every m = 1. `mup=False` in the config sets that
and changes nothing else. At the base width both are the same model, bit for bit.

The table asks for a proxy as deep as the large model. CompleteP (arXiv 2505.01618), which FLM-101B
does not have, asks for more, so that the depth L may change too. d = L / base_layers is the ratio
of depths, a = depth_alpha (1 in the paper's advice):

    in the blocks                 init std         AdamW lr   weight decay   AdamW eps  forward
    q, k, v, up, gate             s / sqrt(m)      n d^(a-1)/m  wd m d^(1-a) eps d^-a   1
    o, down                       s / sqrt(2L'm)   the same   the same       eps d^-a   x d^-a
    LayerNorm gain, bias; biases  1, 0; 0          n d^(a-1)  0              eps d^-a   1

L' = base_layers: the initial values do not depend on the depth any more, so a layer that is copied
into a deeper model (grow.py) starts as a layer of that model would. Ours: the weight decay for a
below 1, so that what a step takes off does not depend on the depth; and 2L' in place of the paper's
1, so that at L = base_layers nothing changes. a = 0 turns all of it off: the table above.

Every value is a plain number in the config or in one of the optimizer's parameter groups, never an
attribute of a tensor: it survives torch.compile, a model cut over processes (parallel.py),
checkpoints and growth (grow.py).

The paper's search found n = 4e-4, s = 1.6e-2 and output_mult = 2.0 at width 256 with 2 heads.

"TP-V" below is that paper, Tensor Programs V. Read from top to bottom:

    1. the parametrization     the table above
    2. the coordinate check    are the layers' outputs as large in a wide model as in a narrow one?
    3. the command line        python muP.py coord-check

Letters as in flm.py: B batch, T sequence, C d_model, H heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

import console
from flm import FLM, FLMConfig, forward_flops, loss_sum, parse_fields, preset

# --------------------------------------------------------------------------------------------------
# 1. The parametrization


def kind(name: str) -> str:
    """The row of a parameter in the table above: vector, embedding, head, qkv, o, up, gate or down.

    "vector" is a bias, or the gain or bias of a LayerNorm; qkv is q, k and v in one matrix.

    >>> kind("layers.3.attn.qkv.weight"), kind("layers.3.attn.qkv.bias"), kind("norm.weight")
    ('qkv', 'vector', 'vector')
    """
    *_, module, leaf = name.split(".")
    return "vector" if leaf == "bias" or module.endswith("norm") else module


def width_mult(config: FLMConfig, name: str) -> float:
    """m of a parameter: how much wider its fan-in is than the proxy's; 1 outside the matrices.

    >>> width_mult(preset("flm-101b"), "layers.0.ff.down.weight")
    40.0
    """
    m = config.m_width
    ratios = {"qkv": m, "up": m, "gate": m, "o": config.m_attn, "down": config.m_ff}
    return ratios.get(kind(name), 1.0)


def init_std(config: FLMConfig, name: str) -> float:
    """Standard deviation of the initial values of a matrix or an embedding (section 3)."""
    std = config.init_std / width_mult(config, name) ** 0.5
    if kind(name) in ("o", "down"):  # 2L branches add up in the residual stream
        std /= (2 * (config.base_layers if config.depth_alpha else config.n_layers)) ** 0.5
    return std


def lr_divisor(config: FLMConfig, name: str) -> float:
    """What the learning rate of a parameter is divided by: m, and in blocks CompleteP's factor.

    >>> deep = preset("demo").replace(n_layers=24, depth_alpha=0.5)
    >>> lr_divisor(deep, "layers.9.ff.up.weight"), lr_divisor(deep, "norm.weight")
    (2.0, 1.0)
    """
    m = width_mult(config, name)
    if config.depth_alpha == 0 or not name.startswith("layers."):
        return m
    return m * (config.n_layers / config.base_layers) ** (1 - config.depth_alpha)


def initial_value(
    config: FLMConfig, name: str, shape: Sequence[int], seed: int, growths: int = 0
) -> Tensor:
    """The whole initial tensor of the parameter `name`: fp32, on the CPU.

    The numbers depend on (seed, name, growths) alone, and the configuration scales them. growths:
    how often the model has grown (grow.py draws for its new weights too). A process that holds a
    slice of a parameter draws the whole and cuts it, so the weights are the same however the model
    is cut. A tied head is the embedding, also where the two lie on different processes. (Our
    choice; the paper does not say how it draws.)
    """
    if kind(name) == "vector":
        return torch.ones(shape) if name.endswith("norm.weight") else torch.zeros(shape)
    if config.tie_embeddings and name == "head.weight":
        name = "embedding.weight"
    key = hashlib.sha256(f"{seed}/{name}/{growths}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
    return torch.empty(shape).normal_(0.0, init_std(config, name), generator=generator)


@torch.no_grad()
def init_weights(model: FLM, seed: int) -> FLM:
    """Fill every parameter of the model; returns it."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(model.config, name, parameter.shape, seed))
    return model


def param_groups(model: FLM, lr: float, weight_decay: float, eps: float = 1e-8) -> list[dict]:
    """AdamW's parameter groups, one for each row of learning rate, decay and eps in the tables
    (TP-V, CompleteP).

    lr: the proxy's learning rate. Each group has `lr_scale` beside its own "lr": who changes the
    learning rate sets group["lr"] to the new one times group["lr_scale"]; `eps_scale` likewise.
    AdamW multiplies decay by the learning rate, so decay is divided by lr_scale: what a step takes
    off a weight does not depend on width or depth. Biases and LayerNorms do not decay.
    """
    rows: dict[tuple, list] = {}
    for name, parameter in model.named_parameters():
        decay = 0.0 if kind(name) == "vector" else weight_decay
        eps_scale = model.config.branch_mult if name.startswith("layers.") else 1.0
        key = lr_divisor(model.config, name), decay, eps_scale
        rows.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr / divisor,
            "lr_scale": 1 / divisor,
            "weight_decay": decay * divisor,
            "eps": eps * eps_scale,
            "eps_scale": eps_scale,
        }
        for (divisor, decay, eps_scale), parameters in rows.items()
    ]


# --------------------------------------------------------------------------------------------------
# 2. The coordinate check (TP-V; microsoft/mup has one as a test)
#
# Models of several widths take a few steps of AdamW. Under muP the outputs of every layer stay as
# large in the wide models as in the narrow ones; under the standard parametrization they do not.
# The same over depths: with CompleteP they stay, without it the residual stream grows.

SMALL = {"n_layers": 2, "head_dim": 16, "max_seq_len": 128}  # the preset "demo", but faster
# {what varies: {name: the fields of a parametrization}}, the one that is tested first
PARAMETRIZATIONS = {
    "width": {"muP": {"mup": True}, "standard": {"mup": False}},
    "depth": {"alpha 1": {"depth_alpha": 1.0}, "alpha 0": {"depth_alpha": 0.0}},
}
LAYERS = ("embedding", "attn_norm", "q", "k", "v", "attn.o")
LAYERS += ("ff_norm", "ff.up", "ff.down", "block", "norm", "logits")
# A layer's mean |activation|, its "size", grows as width^p. In a "flat" layer p = 0. The weakest
# sign of a fault, initial values that do not shrink with the width, has p = 1/2. The limit lies
# between the two.
LIMIT = 1 / 3
ENOUGH_SEEDS = 4  # with fewer, the spread between seeds is not known well enough
DECIDED = {  # {what varies: the fields that the check sets}
    "width": "d_model n_heads d_ff mup mup_base_width".split(),
    "depth": "d_model n_heads d_ff mup_base_width n_layers depth_alpha base_layers".split(),
}


def model_config(words: Iterable[str], axis: str = "width") -> FLMConfig:
    """The model of the check: preset "demo" with SMALL, changed by words FIELD=VALUE.
    Raises ValueError with every bad word."""
    changes, problems = parse_fields(words)
    for name in DECIDED[axis]:
        if name in changes:
            problems.append(f"--model {name}: the check decides it, leave it out")
    console.refuse(problems)
    return preset("demo").replace(**SMALL | changes)


def at_widths(config: FLMConfig, widths: Iterable[int]) -> dict[int, FLMConfig]:
    """{width: the same model at that width}, narrowest first.

    A wider model has more heads of the same head_dim, d_ff in the proxy's ratio to the width,
    and the same depth. Raises ValueError with every width that is not a whole number of heads."""
    D, widths = config.head_dim, sorted(set(widths))
    console.refuse(
        f"width {w} does not fit heads of {D}: choose a multiple of head_dim, such as "
        f"{max(D, w // D * D)} or {max(D, w // D * D) + D}"
        for w in widths
        if w < 1 or w % D
    )
    ratio = config.mup_ff_ratio
    return {w: config.replace(d_model=w, n_heads=w // D, d_ff=round(ratio * w)) for w in widths}


def text_batch(B: int, T: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """tokens and targets (B, T): the first bytes of Python's argparse.py, again and again.

    Raises ValueError where bytes need more ids than there are."""
    if vocab_size < 256:
        raise ValueError(f"vocab_size = {vocab_size}: the check reads bytes, it needs at least 256")
    source = inspect.getsource(argparse).encode()
    text = (source * (B * T // len(source) + 1))[: B * T + 1]
    tokens = torch.tensor(list(text))
    return tokens[:-1].view(B, T), tokens[1:].view(B, T)


def activations(model: FLM, tokens: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The logits (B, T, V) and {kind of layer: mean |activation|}, read by forward hooks.

    The mean is over the batch and the blocks."""
    D, seen, hooks = model.config.head_dim, {name: [] for name in LAYERS}, []

    def watch(module: torch.nn.Module, *names: str):
        def hook(module, x, y):
            # The output of qkv is three layers: (B, T, 3*H*D) -> (B, T, H, D) each.
            parts = y.unflatten(-1, (-1, 3, D)).unbind(-2) if len(names) == 3 else [y]
            for name, part in zip(names, parts):
                seen[name].append(part.detach().abs().mean())

        hooks.append(module.register_forward_hook(hook))

    watch(model.embedding, "embedding")
    for block in model.layers.values():
        watch(block.attn.qkv, "q", "k", "v")
        for name in ("attn_norm", "attn.o", "ff_norm", "ff.up", "ff.down"):
            watch(block.get_submodule(name), name)
        watch(block, "block")
    watch(model.norm, "norm")
    watch(model.head, "logits")
    logits = model(tokens)
    for hook in hooks:
        hook.remove()
    seen["embedding"][0] *= model.config.input_mult  # which the model multiplies in
    return logits, {name: torch.stack(values).mean().item() for name, values in seen.items()}


def early_sizes(
    config: FLMConfig, seed: int, batch: tuple[Tensor, Tensor], lr: float, steps: int
) -> list[list[float]]:
    """Mean |activation| (steps+1, LAYERS) of a new model, before and after each AdamW step."""
    model, (tokens, targets) = init_weights(FLM(config), seed), batch
    optimizer = torch.optim.AdamW(param_groups(model, lr, 0.0), betas=(0.9, 0.95))
    sizes = []
    for _ in range(steps + 1):
        logits, seen = activations(model, tokens)
        sizes.append([seen[layer] for layer in LAYERS])
        optimizer.zero_grad()
        (loss_sum(logits, targets) / targets.numel()).backward()
        optimizer.step()
    return sizes


def coord_check(
    config: FLMConfig,
    values: Iterable[int],
    batch: tuple[Tensor, Tensor],
    lr: float,
    steps: int = 3,
    seeds: Iterable[int] = range(8),
    axis: str = "width",
) -> dict[str, Tensor]:
    """Mean |activation| of models of several widths or depths in their first steps of AdamW.

    axis, values: "width" and several d_model, or "depth" and several n_layers.
    Returns {name: sizes} with the names of PARAMETRIZATIONS[axis]; sizes are (values, seeds,
    steps+1, LAYERS), the smallest value first. The smallest is the base width (m = 1) or the base
    depth, where both parametrizations are one model.
    batch: tokens and targets (B, T). A learning rate larger than in training shows more
    (microsoft/mup's advice).
    """
    if axis == "width":
        configs = at_widths(config, values)
        base = {"mup_base_width": min(configs)}
    else:
        configs = {L: config.replace(n_layers=L) for L in sorted(set(values))}
        base = {"base_layers": min(configs)}
    sizes, seeds = {}, list(seeds)
    costs = [forward_flops(c, c.max_seq_len) for c in configs.values()]
    total = len(PARAMETRIZATIONS[axis]) * len(seeds) * sum(costs)
    with console.progress(total=total, desc="training", unit="FLOP", unit_scale=True) as bar:
        for name, choice in PARAMETRIZATIONS[axis].items():
            runs = []
            for c, cost in zip(configs.values(), costs):
                for seed in seeds:
                    runs.append(early_sizes(c.replace(**base | choice), seed, batch, lr, steps))
                    bar.update(cost)
            sizes[name] = torch.tensor(runs, dtype=torch.float64).unflatten(0, (-1, len(seeds)))
    return sizes


def exponents(sizes: Tensor, values: Iterable[int]) -> tuple[Tensor, Tensor]:
    """p and its noise, (steps+1, LAYERS) each, where sizes grow as value^p.

    sizes: as coord_check returns them; values: widths, or numbers of layers. Each seed gives one p,
    the slope of a straight line through (log value, log size). Their mean is the result, and three
    standard errors of it are the noise: infinite for fewer than ENOUGH_SEEDS. The logits at step 0
    count as flat: those of a random tied head are sums of C independent terms over m, so they
    shrink as 1/sqrt(m)."""
    x = torch.tensor(sorted(set(values)), dtype=torch.float64).log()
    x = x - x.mean()
    p = torch.einsum("w,wstl->stl", x / x.square().sum(), sizes.double().log())
    p[:, 0, LAYERS.index("logits")] = 0
    if len(p) < ENOUGH_SEEDS:
        return p.mean(0), torch.full(p.shape[1:], torch.inf)
    return p.mean(0), 3 * p.std(0) / len(p) ** 0.5


def verdict(p: Tensor, noise: Tensor) -> str:
    """ "flat", "not flat" or "cannot tell", of exponents and their noise.

    >>> verdict(torch.tensor([0.1]), torch.tensor([0.1]))
    'flat'
    >>> verdict(torch.tensor([0.1, 0.7]), torch.tensor([0.1, 0.1]))
    'not flat'
    >>> verdict(torch.tensor([0.1, 0.7]), torch.tensor([0.1, 0.9]))
    'cannot tell'
    """
    if (p.abs() - noise > LIMIT).any() or not p.isfinite().all():
        return "not flat"
    return "flat" if (p.abs() + noise <= LIMIT).all() else "cannot tell"


# --------------------------------------------------------------------------------------------------
# 3. The command line

EXIT_CODES = {"flat": 0, "not flat": 1, "cannot tell": 3}  # 2 is an error, as everywhere


def print_table(sizes: dict[str, Tensor], values: list[int], axis: str):
    """How much larger the outputs of the largest model's layers are, and with which power of its
    width or depth."""
    steps = next(iter(sizes.values())).shape[2]
    heading = "".join(f"  {name:{7 * steps}}   p ± noise" for name in sizes)
    print(
        f"mean |activation| at {axis} {values[-1]} over {axis} {values[0]}, at step 0 to "
        f"{steps - 1};\np: at the last step it grows as {axis}^p\n\n{'':10}{heading}"
    )
    for i, layer in enumerate(LAYERS):
        line = f"{layer:10}"
        for found in sizes.values():
            mean = found[..., i].mean(1)  # (values, steps)
            p, noise = exponents(found, values)
            line += "".join(f"{ratio:7.2f}" for ratio in mean[-1] / mean[0])
            line += f"{p[-1, i]:7.2f} ±{noise[-1, i]:5.2f}"
        print(line)


def named_means(sizes: dict[str, Tensor], values: list[int]) -> dict:
    """sizes for a JSON file: {parametrization: {value: [{layer: mean over seeds}, one a step]}}."""
    means = {name: found.mean(1).tolist() for name, found in sizes.items()}
    return {
        name: {n: [dict(zip(LAYERS, row)) for row in rows] for n, rows in zip(values, mean)}
        for name, mean in means.items()
    }


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="muP.py", description="muP: tune small, train large.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser(
        "coord-check",
        help="is every layer's output as large in a wide model as in a narrow one?",
        description="Train models of several widths for a few steps, under muP and under the "
        "standard parametrization. A layer's mean |activation| grows as width^p; p is 0 in a flat "
        "layer. Exit code 0: muP is flat. 1: it is not. 3: cannot tell, the seeds differ too much. "
        "With --depths: the same for models of several depths, with CompleteP (depth_alpha 1) and "
        "without it.",
    )
    add = p.add_argument
    add("--widths", type=int, nargs="+", default=[32, 64, 128, 256], metavar="C")
    depths = "numbers of layers; then all models have the first of --widths"
    add("--depths", type=int, nargs="+", metavar="L", help=depths)
    add("--seeds", type=int, nargs="+", default=list(range(8)), metavar="N", help="at least 4")
    add("--steps", type=int, default=3, metavar="N", help="steps of AdamW (default 3)")
    add("--lr", type=float, default=0.01, help="learning rate at the least width (default 0.01)")
    add("--model", nargs="+", default=[], metavar="FIELD=VALUE", help="change the small model")
    add("--json", default="runs/coord-check.json", metavar="FILE", help="default %(default)s")
    return parser


def main(argv: list[str] | None = None) -> int:
    """`python muP.py coord-check`; returns the exit code."""
    args = make_parser().parse_args(argv)
    torch.set_num_threads(1)  # models this small are fastest so
    axis = "depth" if args.depths else "width"
    values, seeds = sorted(set(args.depths or args.widths)), sorted(set(args.seeds))
    if len(values) < 2 or values[0] < 1 or args.steps < 1 or not 0 < args.lr < math.inf:
        raise ValueError(
            f"--{axis}s {values} --steps {args.steps} --lr {args.lr}: the check needs at least "
            f"2 {axis}s, 1 step and a learning rate above 0"
        )
    config = model_config(args.model, axis)
    if args.depths:
        (config,) = at_widths(config, args.widths[:1]).values()
        config = config.replace(mup_base_width=config.d_model)
    console.output_file(args.json)
    batch = text_batch(4, config.max_seq_len, config.vocab_size)
    sizes = coord_check(config, values, batch, args.lr, args.steps, seeds, axis)
    print_table(sizes, values, axis)
    tested = next(iter(sizes))
    p, noise = exponents(sizes[tested], values)
    result = verdict(p, noise)
    farthest = int((p.abs() + noise.nan_to_num(posinf=0)).argmax())
    step, layer = divmod(farthest, len(LAYERS))
    print(
        f"{tested} is farthest from flat at {LAYERS[layer]}, step {step}: "
        f"p = {p[step, layer]:.2f} ± {noise[step, layer]:.2f}\n"
        f"verdict: {result} (limit: {LIMIT:.2f}, noise included; the logits at step 0 do not count)"
    )
    if result == "cannot tell":
        more = " ".join(map(str, range(4 * len(seeds))))
        print(f"Four times as many seeds halve the noise: --seeds {more}")
    report = {"lr": args.lr, "seeds": seeds, "model": config.to_dict(), "verdict": result}
    report |= {"axis": axis, "tested": tested, "torch": torch.__version__}
    report["sizes"] = named_means(sizes, values)
    console.write_numbers(args.json, report)
    return EXIT_CODES[result]


if __name__ == "__main__":
    console.run(main)
