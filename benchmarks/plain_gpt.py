"""The yardstick for training speed: a plain GPT of the same size with learned positions.

python -m benchmarks.plain_gpt [VOCABULARY]

Steps of both models take turns in one run. It prints tokens per second and ratios."""

import argparse
import itertools
import json
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import console
import muP
from flm import FLM, FLMConfig

B, T, C, H, L = 12, 256, 384, 6, 6


class PlainBlock(nn.Module):
    """A pre-LayerNorm GPT block, and nothing else."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.o = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norm1(x)).split(C, 2)  # three times (B, T, C)
        q, k, v = (y.view(B, T, H, C // H).transpose(1, 2) for y in parts)  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainGPT(nn.Module):
    """tokens and targets (B, T) -> the summed loss."""

    def __init__(self, V: int):
        super().__init__()
        self.token, self.position = nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks = nn.Sequential(*(PlainBlock() for _ in range(L)))
        self.norm = nn.LayerNorm(C)
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.blocks(self.token(x) + self.position.weight))
        logits = (x @ self.token.weight.T).flatten(0, 1)  # (B*T, V)
        return F.cross_entropy(logits, y.flatten(), reduction="sum")


def step_seconds(model: nn.Module, optimizer, tokens: torch.Tensor, bf16: bool) -> float:
    """Seconds of one training step."""
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(tokens[:, :-1], tokens[:, 1:]) / (B * T)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def main(argv: list[str] | None = None, rounds: int = 7):
    """Print tokens per second and ratios as JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.plain_gpt")
    parser.add_argument("words", type=int, nargs="?", default=65, help="of the vocabulary")
    V = parser.parse_args(argv).words
    console.refuse([f"{V} words: give at least 2"] if V < 2 else [])
    tokens = torch.randint(V, (B, T + 1))
    ours = muP.init_weights(FLM(FLMConfig(L, C, H, C // H, 4 * C, V, T)), 0)
    models = {"plain": PlainGPT(V), "ours": ours}
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        for name, model in models.items()
    }
    cases = list(itertools.product(("fp32", "bf16"), models))
    times = {case: [] for case in cases}
    for _ in range(rounds):
        for dtype, name in cases:
            seconds = step_seconds(models[name], optimizers[name], tokens, dtype == "bf16")
            times[dtype, name].append(seconds)
    rate = {case: B * T / statistics.median(seconds[1:]) for case, seconds in times.items()}
    ours_bf16, ours_fp32 = rate["bf16", "ours"], rate["fp32", "ours"]
    report = {
        "vocabulary": V,
        "tokens_per_s": {f"{name}, {dtype}": round(r) for (dtype, name), r in rate.items()},
        "ours / plain, fp32": round(ours_fp32 / rate["fp32", "plain"], 3),
        "ours bf16 / ours fp32": round(ours_bf16 / ours_fp32, 3),
        "ours / plain, bf16": round(ours_bf16 / rate["bf16", "plain"], 3),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    console.run(main)
