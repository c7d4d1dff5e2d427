"""evaluation.py - the held-out loss: nats per token and bits per byte on documents that the model
has never seen, and how often the teacher signal's labels are right."""

from __future__ import annotations

import functools
import math

import torch

import data
import parallel
from flm import IGNORE
from parallel import Worker, World


def held_out_rows(
    corpus: data.Corpus, signal_name: str, rows: int, micro: int, world: World
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """This dp rank's share of `rows` held-out rows, spread from the first to the last: tokens and
    targets (b, T), and how many of them go through the model at once. Rows without targets fill up
    what a pipeline needs."""
    n_rows = corpus.n_rows("val", signal_name)
    n = min(rows, n_rows)
    share = -(-n // world.layout.dp)  # the last rank may have fewer
    size, begin = min(micro, share), world.at("dp") * share
    picked = range(begin, min(begin + share, n))
    mine = [corpus.rows("val", signal_name, j * n_rows // n, 1) for j in picked]
    blank = torch.zeros(1, corpus.seq_len, dtype=torch.long)
    missing = parallel.rows_needed(world.layout, share, size) - len(mine)
    mine += [(blank, blank + IGNORE)] * missing
    tokens, targets = (torch.cat(part) for part in zip(*mine))
    return tokens, targets, size


def score_labels(
    logits: torch.Tensor, targets: torch.Tensor, angry: int, devil: int
) -> torch.Tensor:
    """[loss in nats, labels that are right] of logits (b, T, V), each summed. A label is right when
    its emoji has the lower loss of the two, at the last token; a tie counts one half, since bf16
    logits that differ little are often equal."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    logits, targets = logits.flatten(0, 1), targets.flatten()
    swapped = torch.where(targets == devil, angry, targets)
    swapped = torch.where(targets == angry, devil, swapped)
    cross_entropy = functools.partial(
        torch.nn.functional.cross_entropy, logits, ignore_index=IGNORE, reduction="none"
    )
    loss, other = (parallel.local(cross_entropy(y)) for y in (targets, swapped))
    right = (loss < other) + 0.5 * (loss == other)
    is_label = (targets == angry) | (targets == devil)
    return torch.stack([loss.sum(), (right * is_label).sum()])


def evaluate(worker: Worker, corpus: data.Corpus, rows: int, micro: int) -> dict:
    """Held-out loss: {"val_loss": nats per token, "val_bpb": bits per byte of text, "val_tokens"}.

    Where the corpus has a teacher signal also {"teacher_loss": nats per label token,
    "teacher_accuracy": share of labels that are right, "teacher_labels"}; see score_labels. Bits
    per byte divide by the bytes that the predicted tokens stand for, so tokenizers can be compared.
    rows: rows of each signal. micro: rows at once. All ranks of the worker's world take part."""
    world, tokenizer, result = worker.world, corpus.tokenizer, {}
    lengths = torch.from_numpy(data.byte_lengths(tokenizer))  # (V,)
    angry, devil = (tokenizer.encode_ordinary(data.EMOJI[label])[-1] for label in (1, 0))
    scores = {
        "language": None,
        "teacher": functools.partial(score_labels, angry=angry, devil=devil),
    }
    for name, score in scores.items():
        if corpus.n_rows("val", name) == 0:
            continue
        tokens, targets, size = held_out_rows(corpus, name, rows, micro, world)
        found = worker.forward(tokens, targets, size, score=score).flatten().tolist()
        nats, right = [*found, 0.0][:2] if world.last and world.at("tp") == 0 else (0.0, 0.0)
        known = targets[targets != IGNORE] if world.at("tp") == world.at("pp") == 0 else targets[:0]
        labels = ((known == angry) | (known == devil)).sum()
        counts = [int(value) for value in (known.numel(), lengths[known].sum(), labels)]
        nats, right, count, length, labels = world.sum(nats, right, *counts)
        if name == "language":
            bits = nats / math.log(2) / length
            result |= {"val_loss": nats / count, "val_bpb": bits, "val_tokens": int(count)}
        else:
            result |= {"teacher_loss": nats / count, "teacher_accuracy": right / labels}
            result |= {"teacher_labels": int(labels)}
    return result


def describe(result: dict) -> str:
    """An evaluation in one line."""
    text = f"held-out loss {result['val_loss']:.4f} nats per token, "
    text += f"{result['val_bpb']:.4f} bits per byte"
    if "teacher_loss" in result:
        text += f"; teacher {result['teacher_loss']:.4f} nats per label token, "
        text += f"{result['teacher_accuracy']:.1%} of {result['teacher_labels']} labels right"
    return text
