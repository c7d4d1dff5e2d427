"""The yardstick for training speed: a plain GPT of the same size with learned positions, and nothing else.

    python tests/plain_gpt.py [VOCABULARY]      steps of both in turn in one run; prints tokens/s and ratios
"""
import json, statistics, sys, time
from contextlib import nullcontext
from pathlib import Path

import torch, torch.nn as nn, torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import muP
from flm import FLM, FLMConfig

B, T, C, H, L = 12, 256, 384, 6, 6


class PlainBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.o, self.up, self.down = nn.Linear(C, 3 * C), nn.Linear(C, C), nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        q, k, v = (y.view(B, T, H, C // H).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(C, 2))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainGPT(nn.Module):
    def __init__(self, V):
        super().__init__()
        self.token, self.position = nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks, self.norm = nn.Sequential(*(PlainBlock() for _ in range(L))), nn.LayerNorm(C)
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, x, y):
        x = self.norm(self.blocks(self.token(x) + self.position.weight))
        return F.cross_entropy((x @ self.token.weight.T).flatten(0, 1), y.flatten(), reduction="sum")


def main(V=65, rounds=7):
    tokens = torch.randint(V, (B, T + 1))
    ours, plain = muP.init_weights(FLM(FLMConfig(L, C, H, C // H, 4 * C, V, T)), 0), PlainGPT(V)
    optimizers = {m: torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True) for m in (ours, plain)}
    times = {}
    for i in range(rounds):
        for name, model, bf16 in (("plain, fp32", plain, 0), ("ours, fp32", ours, 0), ("plain, bf16", plain, 1), ("ours, bf16", ours, 1)):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                loss = model(tokens[:, :-1], tokens[:, 1:]) / (B * T)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[model].step(), optimizers[model].zero_grad()
            times.setdefault(name, []).append(time.perf_counter() - start)
    rate = {name: B * T / statistics.median(t[1:]) for name, t in times.items()}
    print(json.dumps({"vocabulary": V, "tokens_per_s": {k: round(r) for k, r in rate.items()}, "ours / plain, fp32": round(rate["ours, fp32"] / rate["plain, fp32"], 3),
                      "ours bf16 / ours fp32": round(rate["ours, bf16"] / rate["ours, fp32"], 3), "ours / plain, bf16": round(rate["ours, bf16"] / rate["plain, bf16"], 3)}, indent=1))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
