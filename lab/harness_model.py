"""lab/harness_model.py - a checkpoint as a model of lm-evaluation-harness.

The harness asks three things of a model: how likely a text is after another one, how likely a whole
text is, and how it goes on. Where the harness has a rule of its own (where a context is cut, where
two texts meet, where an answer stops), its rule counts here, by its own functions where it has
them. So a checkpoint gets the scores that its weights get in transformers.

This module needs the package lm_eval; lab/harness.py imports it when it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import console
from iqeval import CheckpointModel, option_scores
from sample import generate

NEW_TOKENS = 256  # where a task names no number, as the harness's model for transformers has it
TRIES = 8
SHOWN = 5  # texts that cannot be scored are shown, at most
SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}

Row = tuple[tuple[int, ...], list[tuple[int, list[int]]]]  # a context, [(place, continuation)]


def rows_of(pairs: list[tuple[list[int], list[int]]]) -> list[Row]:
    """Contexts with the continuations that are tried after each; `place` counts the pairs.

    Equal contexts are one row, so that they are computed once, where that is most of the work: a
    context no longer than its continuation stays alone. A row has at most TRIES continuations, as
    the rows of a batch do as many tries as the fullest one. The longest contexts come first.

    >>> rows_of([([5], [1, 2]), ([7, 8, 9], [1]), ([7, 8, 9], [2])])
    [((7, 8, 9), [(1, [1]), (2, [2])]), ((5,), [(0, [1, 2])])]
    """
    groups, rows = {}, []
    for place, (context, continuation) in enumerate(pairs):
        alone = place if len(context) <= len(continuation) else None
        groups.setdefault((tuple(context), alone), []).append((place, continuation))
    for (context, _), tried in groups.items():
        rows += [(context, tried[i : i + TRIES]) for i in range(0, len(tried), TRIES)]
    size = lambda row: (len(row[0]), max(len(continuation) for _, continuation in row[1]))
    return sorted(rows, key=size, reverse=True)


def batches(rows: list, size: int) -> Iterator[list]:
    """The rows, `size` at a time, and how many are done."""
    with console.progress(total=len(rows), desc="scoring", unit="rows") as bar:
        for begin in range(0, len(rows), size):
            yield rows[begin : begin + size]
            bar.update(len(rows[begin : begin + size]))


class HarnessModel(TemplateLM):
    """A CHECKPOINT (checkpoint.find_checkpoint) as a model of the harness.

    batch_size: rows that are computed at once. The result does not depend on it, but for rounding
    and for the draws of a task that samples.
    cut: {"contexts": how many were cut at their left to fit, "longest": tokens of the longest}.

    Raises ValueError as checkpoint.load_model and tokenizer.get_tokenizer do. The three methods
    raise ValueError for what this model cannot be asked: a text to be scored that has no token, or
    more tokens than the context, and unknown settings of generation."""

    def __init__(
        self,
        checkpoint: str | Path,
        device="cpu",
        tokenizer_file: str | Path | None = None,
        batch_size: int = 32,
    ):
        super().__init__()
        self.scored = CheckpointModel(checkpoint, device, tokenizer_file)
        self.max_length, self.batch_size = self.scored.context, batch_size
        self.cut = {"contexts": 0, "longest": 0}

    @property
    def eot_token_id(self) -> int:
        """The end of a text, which also stands in front of a text without context."""
        return self.scored.tokenizer.eot_token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs):
        """The tokens of a text. No special token is ever added, as in training."""
        return self.scored.encode(string)

    def shorten(self, context: list[int], room: int) -> list[int]:
        """The last `room` tokens of a context, as the harness cuts it; never none at all."""
        if len(context) > room:
            self.cut["contexts"] += 1
            self.cut["longest"] = max(self.cut["longest"], len(context))
        return context[-room:] or [self.prefix_token_id]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-probability of each continuation after its context, whether greedy decoding would
        give it), in nats."""
        empty = [request for request in requests if not request.args[1]]
        console.refuse(
            f"{request.task_name}, document {request.doc_id}: a text to be scored is empty, so it "
            "has no likelihood: correct the task's choices"
            for request in empty[:SHOWN]
        )
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list, **kwargs) -> list[tuple[float, bool]]:
        """The same for [((context, continuation), their tokens, and theirs)]."""
        most = self.max_length
        outside = [request for request in requests if not 1 <= len(request[2]) <= most]
        console.refuse(
            f"{after[:40]!r} after {before[-40:]!r}: the text to be scored has {len(ids)} tokens; "
            f"with 1 to {most} this model can score it: correct the task's choices"
            for (before, after), _, ids in outside[:SHOWN]
        )
        pairs = [(self.shorten(ids, most + 1 - len(more)), more) for _, ids, more in requests]
        results = [None] * len(pairs)
        for batch in batches(rows_of(pairs), self.batch_size):
            K = max(len(tried) for _, tried in batch)
            options = [[ids for _, ids in tried] for _, tried in batch]
            options = [row + row[:1] * (K - len(row)) for row in options]
            prompts = [list(context) for context, _ in batch]
            log_p, greedy = option_scores(self.scored.model, prompts, options)  # (B, K) each
            for (_, tried), *scores in zip(batch, log_p.tolist(), greedy.tolist()):
                for (place, _), *score in zip(tried, *scores):
                    results[place] = tuple(score)
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each whole text, in nats. A text longer than the context is cut into
        windows by the harness's own rule: each token is scored once."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((request.args[:1] * 2, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (log_p, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[number] += log_p
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model says after each context, up to the first of the texts that end it.

        Raises ValueError where a task asks for more new tokens than the context has places."""
        groups = {}  # {settings: [(tokens of the context, place)]}
        for place, request in enumerate(requests):
            text, settings = request.args[:2]
            key = json.dumps(settings, sort_keys=True)
            groups.setdefault(key, []).append((self.tok_encode(text), place))
        read = {key: self.settings(json.loads(key)) for key in groups}
        texts = {}
        for key, rows in groups.items():
            room = self.max_length - read[key]["new"]
            rows = [(self.shorten(ids, room), place) for ids, place in rows]
            rows.sort(key=lambda row: len(row[0]), reverse=True)
            for batch in batches(rows, self.batch_size):
                said = self.say([ids for ids, _ in batch], seed=batch[0][1], **read[key])
                texts |= {place: text for (_, place), text in zip(batch, said)}
        return [texts[place] for place in range(len(requests))]

    def settings(self, given: dict) -> dict:
        """A task's settings of generation as the arguments of `say`."""
        kwargs = normalize_gen_kwargs(given, NEW_TOKENS)
        new = kwargs["max_gen_toks"]
        problems = [
            f"a task sets {name} = {value!r} for generation: this model knows {sorted(SETTINGS)}"
            for name, value in kwargs.items()
            if name not in SETTINGS
        ]
        if not 1 <= new < self.max_length:
            problems.append(
                f"a task asks for {new} new tokens: the model's context of {self.max_length} has "
                f"room for 1 to {self.max_length - 1}"
            )
        console.refuse(problems)
        end = self.scored.tokenizer.decode([self.eot_token_id])
        return {
            "new": new,
            "until": [text for text in handle_stop_sequences(kwargs["until"], end) if text],
            "temperature": kwargs.get("temperature", 0.0) if kwargs["do_sample"] else 0.0,
            "top_k": kwargs.get("top_k", 0),
            "top_p": kwargs.get("top_p", 1.0),
        }

    def say(self, prompts: list[list[int]], new: int, until: list[str], **choice) -> list[str]:
        """Continue each prompt by at most `new` tokens, up to the first text of `until`.

        A row ends as soon as such a text stands in it, whatever tokens it is made of."""
        tokenizer, stops = self.scored.tokenizer, [text.encode() for text in until]
        written = [bytearray() for _ in prompts]

        def ends(row: int, token: int) -> bool:
            written[row] += tokenizer.decode_single_token_bytes(token)
            return any(stop in written[row] for stop in stops)

        generate(
            self.scored.model,
            prompts,
            new,
            stop=(self.eot_token_id,),
            allowed=self.scored.allowed,
            capacity=max(map(len, prompts)) + new,
            on_token=ends,
            **choice,
        )
        texts = [bytes(row).decode(errors="replace") for row in written]
        return [postprocess_generated_text(text, until, None) for text in texts]
