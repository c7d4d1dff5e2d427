"""sample.py - let a trained model continue a text.

python sample.py runs/demo --prompt "def main(" --temperature 0.7
"""

from __future__ import annotations

import argparse
import codecs
import sys
from pathlib import Path
from typing import TextIO

import torch

import console
from checkpoint import load_model, pick_device
from data import decodable, get_tokenizer
from flm import FLM, generate


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
    allowed = torch.from_numpy(decodable(tokenizer))
    allowed[tokenizer.eot_token] = True
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

    options["on_token"] = None if stream is None else show
    options["allowed"] = allowed[: model.config.vocab_size]
    new = generate(model, ids, max_new_tokens, stop=(tokenizer.eot_token,), **options)
    if stream is not None:
        stream.write(waiting + decoder.decode(b"", final=True) + "\n")
    return [text + tokenizer.decode(tokens) for text, tokens in zip(prompts, new)]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description="Let a trained model continue a text, token by token.",
        epilog='example: python sample.py runs/demo --prompt "def main(" --temperature 0.7',
    )
    add = parser.add_argument
    add("checkpoint", help="a run folder (its newest checkpoint), a step folder, exported weights")
    add(
        "--prompt", action="append", metavar="TEXT", help="default: a new document; may be repeated"
    )
    add("--max-new-tokens", type=int, metavar="N", help="at most N (default: 200, or what fits)")
    add("--temperature", type=float, default=0.8, help="0: the likeliest token (default 0.8)")
    add("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest tokens only")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw among the likeliest that reach P",
    )
    add("--seed", type=int, default=0, help="the same seed draws the same text (default 0)")
    cache = "slots for prompt and new tokens together (default: the trained length)"
    add("--cache", type=int, dest="capacity", metavar="N", help=cache)
    blockwise = "blockwise causal attention, for texts past the trained length"
    add("--blockwise", action="store_true", help=blockwise)
    add("--tokenizer-file", metavar="FILE", help="cl100k_base.tiktoken, if no download is possible")
    add("--device", default="auto", help="auto, cpu or cuda (default auto)")
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
