"""evaluation.py - the held-out loss: nats per token and bits per byte on documents that the model
has never seen, and how often the teacher signal's labels are right.

1. a model        its score on held-out rows
2. a checkpoint   the same for a model on the disk: train.py --eval-only
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import torch

import checkpoint
import console
import data
import parallel
from checkpoint import find_checkpoint, read_info
from console import refuse
from flm import IGNORE, FLMConfig, growth_mask
from machine import Machine, name_of, set_up
from parallel import Worker, World
from run_folder import check_tokenizer, find_text, is_ours, open_corpus, read_run
from schedule import Stage
from settings import FIELDS, LAYOUT, Settings, check_same_settings, check_settings
from tokenizer import EMOJI, byte_lengths

# --------------------------------------------------------------------------------------------------
# 1. A model


def pick_rows(corpus: data.Corpus, signal_name: str, rows: int) -> dict[str, list[int]]:
    """{source: the numbers of some of its held-out rows}: `rows` of all, spread from the first to
    the last, and one at least of each source that has any."""
    by_source = corpus.rows_by_source("val", signal_name)
    n_rows = sum(by_source.values())
    n, picked, first = min(rows, n_rows), {}, 0
    spread = [j * n_rows // n for j in range(n)]
    for name, length in by_source.items():
        end = first + length
        if length:
            picked[name] = [number for number in spread if first <= number < end] or [first]
        first = end
    return picked


def held_out_rows(
    corpus: data.Corpus, signal_name: str, numbers: list[int], micro: int, world: World
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """This dp rank's share of the held-out rows with these numbers: tokens and targets (b, T), and
    how many of them go through the model at once. Rows without targets fill up what a pipeline
    needs."""
    share = -(-len(numbers) // world.layout.dp)  # the last rank may have fewer
    size, begin = min(micro, share), world.at("dp") * share
    picked = numbers[begin : begin + share]
    mine = [corpus.rows("val", signal_name, number, 1) for number in picked]
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


def score_rows(
    worker: Worker, corpus: data.Corpus, signal_name: str, numbers: list[int], micro: int
) -> list[float]:
    """[nats, tokens that are predicted, their bytes, labels that are right, labels] of held-out
    rows, summed over all ranks."""
    world, tokenizer = worker.world, corpus.tokenizer
    lengths = torch.from_numpy(byte_lengths(tokenizer))  # (V,)
    angry, devil = (tokenizer.encode_ordinary(EMOJI[label])[-1] for label in (1, 0))
    score = functools.partial(score_labels, angry=angry, devil=devil)
    score = score if signal_name == "teacher" else None
    tokens, targets, size = held_out_rows(corpus, signal_name, numbers, micro, world)
    cut = corpus.documents(tokens)
    with (
        console.progress(
            total=len(tokens), desc="evaluating", unit="rows", leave=False, disable=world.rank > 0
        ) as bar,
        # What a hook returns, unless it is None, replaces the output.
        worker.parts[0].register_forward_hook(lambda *_: bar.update(size) and None),
    ):
        found = worker.forward(tokens, targets, size, score, documents=cut).flatten().tolist()
    # Several ranks have the same rows. The one with the last pipeline stage counts the loss and the
    # right labels, which need the logits; the one with the first pipeline stage counts the rest.
    nats, right = [*found, 0.0][:2] if world.last and world.at("tp") == 0 else (0.0, 0.0)
    first = world.at("tp") == world.at("pp") == 0
    known = targets[targets != IGNORE] if first else targets[:0]
    labels = ((known == angry) | (known == devil)).sum()
    counts = [int(value) for value in (known.numel(), lengths[known].sum())]
    return world.sum(nats, *counts, right, int(labels))


def evaluate(worker: Worker, corpus: data.Corpus, rows: int, micro: int) -> dict:
    """Held-out loss: {"val_loss": nats per token, "val_bpb": bits per byte of text, "val_tokens"}.

    Where several sources have held-out rows, also {"val_by_source": {source: the same three of its
    own rows}}. Where the corpus has a teacher signal, also {"teacher_loss": nats per label token,
    "teacher_accuracy": share of labels that are right, "teacher_labels"}; see score_labels. Bits
    per byte divide by the bytes that the predicted tokens stand for, so tokenizers can be compared.
    rows: rows of each signal. micro: rows at once. All ranks of the worker's world take part."""

    def loss(nats: float, count: float, length: float, *_) -> dict:
        bits = nats / math.log(2) / length
        return {"val_loss": nats / count, "val_bpb": bits, "val_tokens": int(count)}

    picked = pick_rows(corpus, "language", rows)
    found = {name: score_rows(worker, corpus, "language", picked[name], micro) for name in picked}
    result = loss(*map(sum, zip(*found.values())))
    if len(found) > 1:
        result["val_by_source"] = {name: loss(*sums) for name, sums in found.items()}
    for numbers in pick_rows(corpus, "teacher", rows).values():
        nats, count, _, right, labels = score_rows(worker, corpus, "teacher", numbers, micro)
        result |= {"teacher_loss": nats / count, "teacher_accuracy": right / labels}
        result["teacher_labels"] = int(labels)
    return result


def describe(result: dict) -> str:
    """An evaluation in one line."""
    text = f"held-out loss {result['val_loss']:.4f} nats per token, "
    text += f"{result['val_bpb']:.4f} bits per byte"
    if "val_by_source" in result:
        parts = (f"{name} {part['val_loss']:.4f}" for name, part in result["val_by_source"].items())
        text += f" ({', '.join(parts)} nats)"
    if "teacher_loss" in result:
        text += f"; teacher {result['teacher_loss']:.4f} nats per label token, "
        text += f"{result['teacher_accuracy']:.1%} of {result['teacher_labels']} labels right"
    return text


# --------------------------------------------------------------------------------------------------
# 2. A checkpoint


def empty_worker(
    config: FLMConfig, machine: Machine, world: World, compiled: bool = False
) -> Worker:
    """This rank's share of a model, not filled yet."""
    dtypes = machine.weights, machine.dtype
    parts = parallel.build_parts(config, world, machine.device, *dtypes, compiled)
    return Worker(parts, world, machine.dtype)


def load_worker(path: Path, machine: Machine, world: World) -> tuple[Worker, dict]:
    """The model of a checkpoint for an evaluation, its masks in place, and its info. A step folder
    is read in any layout, an exported file by one process."""
    if path.is_file():
        model, info = checkpoint.load_model(path, machine.device)
        return Worker([model.to(machine.weights)], world, machine.dtype), info
    info = world.raise_on_all_ranks(read_info, path)
    worker = empty_worker(FLMConfig.from_dict(info["config"]), machine, world)
    tensors = {"model": dict(worker.named)}
    world.raise_on_all_ranks(checkpoint.read_tensors, path, tensors)
    worker.set_masks(info["growth"], growth_mask(info["growth"], info["samples"]))
    return worker, info


def eval_only(source: str, given: dict, world: World = World()) -> dict:
    """Print the held-out loss of a checkpoint, and return it. A step folder in its run is evaluated
    like the run, a file with default settings; `given` has the options that differ."""
    path = world.raise_on_all_ranks(find_checkpoint, source)
    if path.is_file() and world.size > 1:
        raise ValueError(f"{path} holds weights for one process: give a run or a step folder")
    run = path.parent if path.is_dir() and is_ours(path.parent) else None
    s = read_run(run)[0] if run else Settings(batch_size=16)
    defaults = {field.name: field.default for field in FIELDS if field.name in LAYOUT}
    s = dataclasses.replace(s, **defaults | given)
    check_same_settings(world, s)
    refuse(check_settings(s))
    print(f"reading {path}")
    stages = []
    if path.is_dir():
        config = FLMConfig.from_dict(world.raise_on_all_ranks(read_info, path)["config"])
        stages = [Stage("evaluation", config)]  # without batch_size: see parallel.check_layout
    machine, world = set_up(s, stages, world)
    worker, info = load_worker(path, machine, world)
    text = world.on_rank_0(find_text, run, s.data)[0] if run else s.data
    tokenizer = s.tokenizer if run or "tokenizer" in given else info["tokenizer"]
    options = worker.config, world, s.document_mask
    corpus = open_corpus(text, tokenizer, s.tokenizer_file, *options)
    check_tokenizer(corpus, info["tokenizer"], path)
    micro = s.eval_batch or (1 if s.pp > 1 else s.micro_batch or s.batch_size)
    result = evaluate(worker, corpus, s.eval_rows, micro)
    print(f"{path}, on {corpus.path}, in {name_of(machine.dtype)}: {describe(result)}")
    return result
