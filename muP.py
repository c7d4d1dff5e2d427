"""muP.py - the maximal update parametrization of FLM-101B (section 3 of the paper; TP-V, arXiv 2203.03466).

A narrow proxy (width 256) is cheap enough for a search over learning rate, init std and output multiplier. muP says how
each must change with width so that what the search found holds for the wide model. With m the ratio of a width to the
proxy's (FLMConfig.m_width, .m_attn, .m_ff), s = init_std and n = the learning rate:

    parameter                      init std           AdamW lr   weight decay   forward              standard (every m = 1)
    embedding (tied or not)        s                  n          wd             x input_mult         the same
    q, k, v, up                    s / sqrt(m)        n / m      wd * m         1                    s, n, wd
    o, down                        s / sqrt(2L m)     n / m      wd * m         1                    s / sqrt(2L), n, wd
    LayerNorm gain; bias; biases   1; 0; 0            n          0              1                    the same
    logits (untied head)           s                  n          wd             x output_mult / m    x output_mult

    where the rows are told apart  kind; the m of each: width_mult, which reads FLMConfig.m_width, m_attn and m_ff
    where the columns are          init_std and        param_groups             FLM.forward, with
                                   initial_value                                FLMConfig.logit_mult

`mup=False` in the config sets every m to 1 and changes nothing else, so at the base width both are the same model, bit
for bit.

Every value is a plain number in the config or in a parameter group, never an attribute of a tensor: it survives
torch.compile, DTensor, fully_shard, checkpoints and growth.

The paper's search found n = 4e-4, s = 1.6e-2 and output_mult = 2.0 at width 256 with 2 heads.

Read it from top to bottom:

    1. the parametrization     the table above
    2. the coordinate check    python muP.py coord-check    are all widths alike, layer by layer, in the first steps?
    3. runs                    what train.py's logs say
    4. the sweep               python muP.py sweep          does the narrow model's best setting hold for the wide one?
    5. the prediction          python muP.py predict        the wide model's loss, before it is trained
    6. the command line

Letters as in flm.py: B batch, T sequence, C d_model, H heads, D head_dim, V vocabulary, N parameters, m a width ratio.
"""
from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import sys
from pathlib import Path

import torch

import console
import data
from flm import FLM, FLMConfig, loss_sum, parse_fields, preset


# ---------------------------------------------------------------------------------------------------------------------
# 1. The parametrization

def kind(name: str) -> str:
    """The table's row for a parameter of that name: 'vector', 'embedding', 'head', 'qkv', 'o', 'up' or 'down'."""
    *_, module, leaf = name.split(".")
    if leaf == "bias" or module.endswith("norm"):
        return "vector"
    return module


def width_mult(config: FLMConfig, name: str) -> float:
    """m for a parameter: how much wider its fan-in is than the proxy's; 1 for what is not a matrix of the blocks."""
    ratios = {"qkv": config.m_width, "up": config.m_width, "o": config.m_attn, "down": config.m_ff}
    return ratios.get(kind(name), 1.0)


def init_std(config: FLMConfig, name: str) -> float:
    """Standard deviation of a matrix's or an embedding's initial values."""
    std = config.init_std / width_mult(config, name) ** 0.5
    if kind(name) in ("o", "down"):              # 2L branches add up in the residual stream
        std /= (2 * config.n_layers) ** 0.5
    return std


def initial_value(config: FLMConfig, name: str, shape, seed: int, growths: int = 0) -> torch.Tensor:
    """The whole initial tensor of the parameter `name`: fp32, on the CPU.

    A function of (seed, name, number of growths so far) alone: whoever needs a slice draws the whole and cuts it, so every
    layout and every rank starts from the same numbers. A tied head is the embedding, wherever it lives.
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


def param_groups(model: FLM, lr: float, weight_decay: float) -> list[dict]:
    """AdamW's parameter groups, one per row of the table that the model has.

    Each carries `lr_scale` = 1/m: a schedule sets group["lr"] = lr(samples) * group["lr_scale"]. AdamW multiplies decay by
    the learning rate, so decay is multiplied by m: what a step takes off a weight does not depend on the width. Biases
    and LayerNorms are not decayed.
    """
    rows: dict[tuple, list] = {}
    for name, parameter in model.named_parameters():
        decay = 0.0 if kind(name) == "vector" else weight_decay
        rows.setdefault((width_mult(model.config, name), decay), []).append(parameter)
    return [{"params": parameters, "lr": lr / m, "lr_scale": 1 / m, "weight_decay": decay * m}
            for (m, decay), parameters in rows.items()]


# ---------------------------------------------------------------------------------------------------------------------
# 2. The coordinate check: is every layer's output as large in a wide model as in a narrow one?

SMALL = {"n_layers": 2, "head_dim": 16, "max_seq_len": 128}      # of the "demo" preset: what a laptop trains dozens of
LAYERS = ("embedding", "attn_norm", "q", "k", "v", "attn.o", "ff_norm", "ff.up", "ff.down", "block", "norm", "logits")
FLAT = 1.5        # the widths may be this factor apart, largest over smallest (microsoft/mup's own test: 1.2 over 4x)


def at_widths(config: FLMConfig, widths) -> dict[int, FLMConfig]:
    """{width: the same model at that width}, narrowest first: more heads of the same head_dim, d_ff four times the width,
    as deep. Raises ValueError with every width that is not a whole number of heads."""
    D = config.head_dim
    problems = [f"width {w} does not fit heads of {D}: choose a multiple of head_dim, such as {max(D, w // D * D)} or {max(D, w // D * D) + D}"
                for w in widths if w < 1 or w % D]
    data.refuse(problems)
    return {w: config.replace(d_model=w, n_heads=w // D, d_ff=4 * w) for w in sorted(set(widths))}


def text_batch(B: int, T: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens and targets (B, T): the first bytes of Python's own source. Raises ValueError where bytes need more ids."""
    if vocab_size < 256:
        raise ValueError(f"vocab_size = {vocab_size}: the check reads bytes and needs at least 256")
    text = b""
    for path in data.stdlib_files():
        text += path.read_bytes()
        if len(text) > B * T:
            break
    text = torch.tensor(list(text[:B * T + 1]))
    return text[:-1].view(B, T), text[1:].view(B, T)


def activations(model: FLM, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """The logits (B, T, V) and {kind of layer: mean |activation| over the batch and the blocks}, read by forward hooks."""
    seen, hooks = {name: [] for name in LAYERS}, []

    def watch(name, module, view=lambda y: y):
        hooks.append(module.register_forward_hook(lambda module, x, y: seen[name].append(view(y).detach().abs().mean())))

    watch("embedding", model.embedding, lambda y: y * model.config.input_mult)
    for block in model.layers.values():
        for i, name in enumerate("qkv"):
            watch(name, block.attn.qkv, lambda y, i=i: y.unflatten(-1, (-1, 3, model.config.head_dim))[..., i, :])      # (B, T, H, D)
        for name, module in (("attn_norm", block.attn_norm), ("attn.o", block.attn.o), ("ff_norm", block.ff_norm),
                             ("ff.up", block.ff.up), ("ff.down", block.ff.down), ("block", block)):
            watch(name, module)
    watch("norm", model.norm)
    watch("logits", model.head)
    try:
        logits = model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, {name: torch.stack(values).mean().item() for name, values in seen.items()}


def coord_check(config: FLMConfig, widths, batch, lr: float, steps: int = 4, seeds=(0, 1, 2)) -> dict[str, dict[int, list[dict]]]:
    """{"muP" or "standard": {width: [{kind of layer: mean |activation|} at step 0, 1, ...]}}, the mean over the seeds.

    Both parametrizations, from the narrowest width as the base, take AdamW steps on one batch (tokens, targets). The
    learning rate should be larger than in training, which shows more (microsoft/mup's advice)."""
    configs, (tokens, targets), sizes = at_widths(config, widths), batch, {"muP": {}, "standard": {}}
    for name, width in itertools.product(sizes, configs):
        total = [dict.fromkeys(LAYERS, 0.0) for _ in range(steps + 1)]
        for seed in seeds:
            model = init_weights(FLM(configs[width].replace(mup=name == "muP", mup_base_width=min(configs))), seed)
            optimizer = torch.optim.AdamW(param_groups(model, lr, 0.0), betas=(0.9, 0.95))
            for at_step in total:
                logits, seen = activations(model, tokens)
                for layer in LAYERS:
                    at_step[layer] += seen[layer] / len(seeds)
                optimizer.zero_grad()
                (loss_sum(logits, targets) / targets.numel()).backward()
                optimizer.step()
        sizes[name][width] = total
    return sizes


def growth(sizes: dict[int, list[dict]], layer: str, step: int) -> float:
    """Widest over narrowest."""
    return sizes[max(sizes)][step][layer] / sizes[min(sizes)][step][layer]


def spread(sizes: dict[int, list[dict]]) -> tuple[float, str, int]:
    """(factor, layer, step) where the widths, all of them, are farthest apart: largest over smallest. The logits at step 0
    are exempt: a random head's are a sum of C independent terms over m, so they shrink as 1/sqrt(m)."""
    found = []
    for layer, step in itertools.product(LAYERS, range(len(sizes[min(sizes)]))):
        values = [sizes[width][step][layer] for width in sizes]
        if (layer, step) != ("logits", 0):
            found.append((max(values) / min(values), layer, step))
    return max(found)


def run_coord_check(args):
    """`python muP.py coord-check`. The exit code is 1 where muP is not flat."""
    if len(set(args.widths)) < 2 or args.steps < 1 or args.batch_size < 1 or args.threads < 1:
        raise ValueError(f"--widths {args.widths}, --steps {args.steps}, --batch-size {args.batch_size}, --threads {args.threads}: "
                         f"the check needs at least 2 widths, 1 step, 1 row and 1 thread")
    torch.set_num_threads(args.threads)
    config, (low, *_, high) = preset("demo").replace(**SMALL | parse_fields(args.model)[0]), sorted(set(args.widths))
    sizes = coord_check(config, args.widths, text_batch(args.batch_size, config.max_seq_len, config.vocab_size), args.lr, args.steps, args.seeds)
    print(f"mean |activation| at width {high} over width {low}, at step 0 to {args.steps}; AdamW at {args.lr:g}, mean of {len(args.seeds)} seeds.\n"
          f"Last column: the standard one's growth per doubling of the width, at the last step.\n\n"
          f"{'':12}{'muP':{8 * args.steps + 10}}standard{'':{8 * args.steps + 2}}per doubling")
    for layer in LAYERS:
        rows = [[growth(sizes[name], layer, step) for step in range(args.steps + 1)] for name in sizes]
        print(f"{layer:10}" + "  ".join("".join(f"{r:8.2f}" for r in row) for row in rows) + f"{rows[1][-1] ** (1 / math.log2(high / low)):12.2f}")
    worst = {name: spread(sizes[name]) for name in sizes}
    for name, (factor, layer, step) in worst.items():
        print(f"{name}: two widths differ by a factor of {factor:.2f} at most ({layer}, step {step})")
    flat = worst["muP"][0] <= FLAT
    print(f"muP is {'flat' if flat else 'NOT flat'}: the tolerance is a factor of {FLAT} (logits at step 0 exempt: they shrink as 1/sqrt(m))")
    Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    Path(args.json).write_text(json.dumps({"lr": args.lr, "seeds": args.seeds, "model": config.to_dict(), "torch": torch.__version__,
                                           "sizes": sizes, "worst": worst, "flat": flat}, indent=1) + "\n")
    print(f"numbers: {args.json}")
    return 0 if flat else 1


# ---------------------------------------------------------------------------------------------------------------------
# 3. Runs of train.py, and what their own logs say


# ---------------------------------------------------------------------------------------------------------------------
# 4. The sweep: loss over a hyper-parameter and the width. FLM-101B's search was over these three (section 3).


# ---------------------------------------------------------------------------------------------------------------------
# 5. The prediction: L = a N^b + c (muScaling, arXiv 2304.06875): all widths after the same steps, on the same data


# ---------------------------------------------------------------------------------------------------------------------
# 6. The command line


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="muP.py", description="muP: tune a narrow model, train a wide one.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("coord-check", help="is every layer's output as large in a wide model as in a narrow one?")
    p.add_argument("--json", default="runs/coord-check.json", metavar="FILE")
    p.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256], metavar="C")
    p.add_argument("--model", nargs="+", default=[], metavar="FIELD=VALUE")
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--lr", type=float, default=0.01)
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--threads", type=int, default=1)
    return run_coord_check(p.parse_args(argv[1:] if argv else sys.argv[2:]))


if __name__ == "__main__":
    console.run(main)
