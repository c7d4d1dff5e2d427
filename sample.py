"""sample.py - a trained model continues a text, one token at a time.

    python sample.py runs/demo --prompt "def main(" --temperature 0.7

Read it from top to bottom:

    1. the cache           keys and values of earlier tokens, so that nothing is computed twice
    2. tokens              choose one, and generate a row of them for each prompt
    3. texts               continue_texts, with the tokenizer of the checkpoint
    4. the command line

Letters as in flm.py: B batch, T sequence, H heads, D head_dim, V vocabulary, S cache slots.
"""

from __future__ import annotations

import argparse
import codecs
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import tiktoken
import torch
from torch import Tensor

import console
from checkpoint import load_model
from flm import FLM, FLMConfig, xpos_tables
from machine import pick_device
from tokenizer import decodable, get_tokenizer

# --------------------------------------------------------------------------------------------------
# 1. The cache


class KVCache:
    """Rotated keys and values of every layer, in `capacity` slots: (B, H, S, D) each.

    pad (B,): how many slots at the left of each row hold padding. Prompts of different lengths
    are aligned at their ends. As scores depend on distances alone, a row's logits are those that
    it would have on its own. Raises ValueError for a capacity past config.xpos_limit()."""

    def __init__(self, model: FLM, capacity: int, pad: Tensor | None = None):
        self.capacity, self.pad = capacity, pad
        self.length = 0  # slots in use
        self.kv = {}  # {layer: (keys, values)}
        xpos = model.xpos
        self.tables = xpos_tables(model.config, capacity, xpos.device, xpos.real.dtype)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, H, T, D) of a layer; return all of its so far (B, H, S, D)."""
        if layer not in self.kv:  # only here is the dtype known, which autocast may choose
            B, H, _, D = k.shape
            slots = (B, H, self.capacity, D)
            self.kv[layer] = k.new_empty(slots), v.new_empty(slots)
        end = self.length + k.shape[2]
        for slots, fresh in zip(self.kv[layer], (k, v)):
            slots[:, :, self.length : end] = fresh
        keys, values = self.kv[layer]
        return keys[:, :, :end], values[:, :, :end]


# --------------------------------------------------------------------------------------------------
# 2. Tokens


def choose(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """One token from logits (V,): the most likely one at temperature 0, else a draw.

    The draw is among the `top_k` most likely (0: all), cut to the smallest set whose probability
    reaches `top_p`."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits.double() - logits.max()) / temperature
    scaled, ids = scaled.sort(descending=True, stable=True)
    if top_k:
        scaled, ids = scaled[:top_k], ids[:top_k]
    p = scaled.softmax(-1)
    p = p * (p.cumsum(-1) - p < top_p)  # what precedes a token has not reached top_p
    return int(ids[torch.multinomial(p, 1, generator=generator)])


def check_generation(
    config: FLMConfig,
    prompts: list[list[int]],
    new: int,
    capacity: int,
    temperature: float,
    top_k: int,
    top_p: float,
    allowed: Tensor | None,
):
    """Raise ValueError with every argument of `generate` that is out of range."""
    V, longest = config.vocab_size, max(map(len, prompts), default=0)
    problems = [] if prompts else ["no prompt given"]
    for i, prompt in enumerate(prompts):
        outside = [token for token in prompt if not 0 <= token < V]
        if not prompt:
            problems.append(f"prompt {i} is empty: give at least one token")
        elif outside:
            wrong = f"prompt {i} holds the token {outside[0]}"
            problems.append(f"{wrong}: the vocabulary ends at {V - 1}")
    needed = longest + max(new, 1) - 1
    room = (
        f"a prompt of {longest} tokens and {new} new ones need {needed} cache slots, there are "
        f"{capacity}: give a shorter prompt, fewer new tokens (--max-new-tokens), or more slots "
        f"(--cache {needed}; the model was trained at {config.max_seq_len}, and past that xPos "
        "carries best with --blockwise)"
    )
    wrong = {
        f"max_new_tokens = {new}: must be at least 1": new < 1,
        room: needed > capacity,
        f"temperature = {temperature}: must be 0 (the likeliest token) or above": (
            not 0 <= temperature < math.inf
        ),
        f"top_k = {top_k}: must be 0 (off) or above": top_k < 0,
        f"top_p = {top_p}: must lie in (0, 1]": not 0 < top_p <= 1,
        f"allowed must mark at least one id, of at most {V}": (
            allowed is not None and not (len(allowed) <= V and allowed.any())
        ),
    }
    problems += [text for text, is_wrong in wrong.items() if is_wrong]
    console.refuse(problems, "cannot generate:")


def writable(tokenizer: tiktoken.Encoding, vocab_size: int) -> Tensor:
    """The tokens that may be generated: bool (at most vocab_size,). They are those that a text can
    hold, and the end of a document."""
    allowed = torch.from_numpy(decodable(tokenizer))
    allowed[tokenizer.eot_token] = True
    return allowed[:vocab_size]


def fill_cache(
    model: FLM, prompts: list[list[int]], capacity: int, blockwise: bool = False
) -> tuple[Tensor, KVCache]:
    """Let the model read prompts of any lengths. Returns the logits of what follows each, (B, 1,
    V), and the cache of `capacity` slots for the tokens to come.

    The prompts are aligned at their ends. Any token will do as padding: no other token sees it."""
    device, longest = model.xpos.device, max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    padded = [prompt[:1] * n + prompt for prompt, n in zip(prompts, pads)]
    x = torch.tensor(padded, device=device)  # (B, longest)
    cache = KVCache(model, capacity, torch.tensor(pads, device=device) if any(pads) else None)
    return model(x, cache=cache, blockwise=blockwise, last_only=True), cache


@torch.inference_mode()
def generate(
    model: FLM,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: tuple[int, ...] = (),
    allowed: Tensor | None = None,
    capacity: int | None = None,
    blockwise: bool = False,
    on_token: Callable[[int, int], bool | None] = lambda row, token: None,
) -> list[list[int]]:
    """Continue each prompt by at most `max_new_tokens` tokens; returns the new tokens of each.

    prompts: lists of token ids, of any lengths.
    temperature, top_k, top_p: see `choose`. Row i draws from a generator of its own, (seed, i).
    stop: tokens that end a row; they are not returned.
    allowed: bool (at most V,), the tokens that may be drawn. A padded vocabulary has rows that no
    tokenizer decodes.
    capacity: cache slots, by default the trained length. n prompt tokens and M new ones need
    n + M - 1: nothing reads the last one.
    blockwise: see FLM.forward.
    on_token(row, token): called for each new token. The row ends with it where that returns True.
    Raises ValueError that names every argument out of range, or where logits are NaN or infinite.
    """
    capacity = model.config.max_seq_len if capacity is None else capacity
    choice = temperature, top_k, top_p
    check_generation(model.config, prompts, max_new_tokens, capacity, *choice, allowed)
    logits, cache = fill_cache(model, prompts, capacity, blockwise)
    rows = range(len(prompts))
    seeds = [(seed * 1_000_003 + row) % 2**63 for row in rows]
    generators = [torch.Generator().manual_seed(row_seed) for row_seed in seeds]
    new, live = [[] for _ in rows], set(rows)  # live: the rows that no stop token has ended
    for count in range(1, max_new_tokens + 1):
        logits = logits[:, -1].float().cpu()  # (B, V)
        if not logits.isfinite().all():
            raise ValueError("the model's logits are not finite numbers: the run diverged")
        if allowed is not None:
            logits[:, : len(allowed)].masked_fill_(~allowed, -math.inf)
            logits[:, len(allowed) :] = -math.inf
        picked = [choose(z, *choice, g) for z, g in zip(logits, generators)]
        live -= {row for row in live if picked[row] in stop}
        for row in sorted(live):
            new[row].append(picked[row])
            if on_token(row, picked[row]):
                live.remove(row)
        if not live or count == max_new_tokens:
            break
        x = torch.tensor(picked, device=model.xpos.device)[:, None]  # (B, 1)
        logits = model(x, cache=cache, blockwise=blockwise, last_only=True)  # (B, 1, V)
    return new


# --------------------------------------------------------------------------------------------------
# 3. Texts


def continue_texts(
    model: FLM,
    info: dict,
    prompts: list[str],
    *,
    max_new_tokens: int | None = None,
    tokenizer_file: str | Path | None = None,
    stream: TextIO | None = None,
    **options,
) -> list[str]:
    """Continue texts with the checkpoint's own tokenizer; returns each with its continuation.

    info: as from checkpoint.load_model; info["tokenizer"] is read.
    prompts: an empty text starts a new document.
    max_new_tokens: at most so many for each; by default 200, or what fits.
    stream: a text file, to which one prompt and its continuation are written as they come.
    options: those of `generate`. Raises ValueError, as `generate` and `get_tokenizer` do."""
    tokenizer = get_tokenizer(info["tokenizer"], tokenizer_file)
    ids = [tokenizer.encode_ordinary(text) or [tokenizer.eot_token] for text in prompts]
    if max_new_tokens is None:
        slots = options.get("capacity") or model.config.max_seq_len
        max_new_tokens = min(200, max(1, slots + 1 - max(map(len, ids))))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
    waiting = prompts[0]  # for the first token: an argument may be refused, then nothing is shown

    def show(row: int, token: int):
        nonlocal waiting
        stream.write(waiting + decoder.decode(tokenizer.decode_single_token_bytes(token)))
        stream.flush()
        waiting = ""

    options["allowed"] = writable(tokenizer, model.config.vocab_size)
    if stream is not None:
        options["on_token"] = show
    new = generate(model, ids, max_new_tokens, stop=(tokenizer.eot_token,), **options)
    if stream is not None:
        stream.write(waiting + decoder.decode(b"", final=True) + "\n")
    return [text + tokenizer.decode(tokens) for text, tokens in zip(prompts, new)]


# --------------------------------------------------------------------------------------------------
# 4. The command line


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description="Let a trained model continue a text, token by token.",
        epilog='example: python sample.py runs/demo --prompt "def main(" --temperature 0.7',
    )
    add = parser.add_argument
    add("checkpoint", help="a run folder (its newest checkpoint), a step folder, exported weights")
    prompt = "default: a new document; may be repeated"
    add("--prompt", action="append", metavar="TEXT", help=prompt)
    add("--max-new-tokens", type=int, metavar="N", help="at most N (default: 200, or what fits)")
    add("--temperature", type=float, default=0.8, help="0: the likeliest token (default 0.8)")
    add("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest tokens only")
    top_p = "draw among the likeliest that reach P"
    add("--top-p", type=float, default=1.0, metavar="P", help=top_p)
    add("--seed", type=int, default=0, help="the same seed draws the same text (default 0)")
    cache = "slots for prompt and new tokens together (default: the trained length)"
    add("--cache", type=int, dest="capacity", metavar="N", help=cache)
    blockwise = "blockwise causal attention, for texts past the trained length"
    add("--blockwise", action="store_true", help=blockwise)
    add("--tokenizer-file", metavar="FILE", help="cl100k_base.tiktoken, if no download is possible")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """`python sample.py`; returns the exit code."""
    options = vars(make_parser().parse_args(argv))
    model, info = load_model(options.pop("checkpoint"), pick_device(options.pop("device")))
    prompts = options.pop("prompt") or [""]
    stream = sys.stdout if len(prompts) == 1 else None
    texts = continue_texts(model, info, prompts, stream=stream, **options)
    if len(prompts) > 1:
        print("\n".join(f"--- {i} ---\n{text}" for i, text in enumerate(texts, 1)))
    return 0


if __name__ == "__main__":
    console.run(main)
