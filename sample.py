"""sample.py - let a trained model continue a text."""
from __future__ import annotations

import argparse
import codecs
import sys

import torch

import console
from checkpoint import load_model, pick_device
from data import decodable, get_tokenizer
from flm import FLM, generate


def continue_texts(model: FLM, info: dict, prompts: list[str], *, max_new_tokens: int | None = None, tokenizer_file=None, stream=None,
           **options) -> list[str]:
    """Continue texts with the checkpoint's own tokenizer; an empty text starts a new document. `stream`: a text file that
    one prompt and its continuation are written to as they come. Other options are those of `generate`."""
    tokenizer = get_tokenizer(info["tokenizer"], tokenizer_file)
    allowed = torch.from_numpy(decodable(tokenizer))
    allowed[tokenizer.eot_token] = True
    ids = [tokenizer.encode_ordinary(text) or [tokenizer.eot_token] for text in prompts]
    if max_new_tokens is None:                   # 200, or what fits
        room = (options.get("capacity") or model.config.max_seq_len) - max(map(len, ids))
        max_new_tokens = max(1, min(200, room))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")       # a token may end inside a character

    said = prompts[0]        # waits for the first token: when `generate` refuses an argument, the screen is still empty

    def show(row, token):
        nonlocal said
        stream.write(said + decoder.decode(tokenizer.decode_single_token_bytes(token)))
        stream.flush()
        said = ""

    new = generate(model, ids, max_new_tokens, stop=(tokenizer.eot_token,), allowed=allowed[:model.config.vocab_size],
                   on_token=show if stream is not None else None, **options)
    if stream is not None:
        stream.write(said + decoder.decode(b"", final=True) + "\n")
    return [text + tokenizer.decode(tokens, errors="replace") for text, tokens in zip(prompts, new)]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="sample.py", description="The model of FLM-101B. Train one with train.py first.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("sample", help="let a trained model continue a text",
                            description="Let a trained model continue a text, token by token.",
                            epilog='example: python flm.py sample runs/demo --prompt "def main(" --temperature 0.7')
    p.add_argument("checkpoint", help="a run folder (its newest checkpoint), a step folder, or a file from train.py --export")
    p.add_argument("--prompt", action="append", metavar="TEXT", help="the text to continue; repeat it for a batch "
                   "(default: start a new document)")
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens to add at most (default: 200, or what fits)")
    p.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default %(default)s)")
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest tokens only")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest tokens that make up P")
    p.add_argument("--seed", type=int, default=0, help="the same seed draws the same text (default %(default)s)")
    p.add_argument("--cache", type=int, metavar="N", help="cache slots: prompt and new tokens together (default: the trained length)")
    p.add_argument("--blockwise", action="store_true", help="blockwise causal attention, for texts past the trained length")
    p.add_argument("--tokenizer-file", metavar="PATH", help="cl100k_base.tiktoken, where it cannot be downloaded")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda (default %(default)s)")
    args = parser.parse_args(argv)
    model, info = load_model(args.checkpoint, pick_device(args.device))
    prompts = args.prompt or [""]
    texts = continue_texts(model, info, prompts, max_new_tokens=args.max_new_tokens, tokenizer_file=args.tokenizer_file,
                   stream=sys.stdout if len(prompts) == 1 else None, temperature=args.temperature, top_k=args.top_k,
                   top_p=args.top_p, seed=args.seed, capacity=args.cache, blockwise=args.blockwise)
    if len(prompts) > 1:
        print("\n".join(f"--- {i + 1} ---\n{text}" for i, text in enumerate(texts)))
    return 0




if __name__ == "__main__":
    console.run(main)
