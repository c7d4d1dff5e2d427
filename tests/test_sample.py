"""Tests of sample.py: a trained model continues a text."""

import io
from pathlib import Path

import pytest
import torch
from helpers import few, run_command, save_model, seeds, tiny, wild
from hypothesis import given
from hypothesis import strategies as st

import sample
from checkpoint import load_model
from flm import FLM
from sample import generate
from tokenizer import decodable, get_tokenizer


def byte_model(folder: Path, **changes) -> Path:
    """A checkpoint of a small model over bytes, whose vocabulary is padded."""
    model = wild(FLM(tiny(**{"vocab_size": 288, "max_seq_len": 64, **changes})))
    return save_model(folder / "step-00000001", model)


def test_a_damaged_checkpoint_ends_with_one_screen(tmp_path):
    """A checkpoint that is cut off: exit code 2, one short screen on stderr, no traceback."""
    folder = byte_model(tmp_path)
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    code, out, err = run_command("sample", folder, "--prompt", "a")
    assert code == 2 and out == ""
    assert "cut off or damaged" in err and "Traceback" not in err
    assert len(err.splitlines()) < 10


@pytest.mark.quick
@pytest.mark.parametrize(
    "options, text",
    [
        ("--device tpu", "unknown device 'tpu'|'tpu' is not supported"),
        ("--device cuda:99", "--device cpu"),
        ("--max-new-tokens 100", "cache slots, there are 64"),
        ("--cache 40", "there are 40"),
        ("--top-p 2", "top_p = 2.0"),
        ("--tokenizer-file nowhere.tiktoken", "nowhere.tiktoken"),
    ],
)
def test_bad_options_are_refused(tmp_path, capsys, options, text):
    """A bad option is a ValueError (exit code 2) that names it, before anything is printed."""
    words = [str(byte_model(tmp_path)), "--prompt", "def", "--max-new-tokens", "50"]
    with pytest.raises(ValueError, match=text):
        sample.main(words + options.split())
    assert capsys.readouterr().out == ""


@pytest.mark.quick
@pytest.mark.parametrize("prompt", ["def ", "", "naïve 😡"])
def test_a_prompt_is_continued(tmp_path, capsys, prompt):
    """It prints the prompt and what `generate` returns, decoded. An empty one starts a document."""
    folder, tokenizer = byte_model(tmp_path), get_tokenizer("bytes")
    options = "--max-new-tokens 40 --temperature 0.9 --top-k 50 --top-p 0.9 --seed 3 --device cpu"
    assert sample.main([str(folder), "--prompt", prompt, *options.split()]) == 0
    allowed = torch.tensor(list(decodable(tokenizer)))
    allowed[256] = True  # the end of the text may be drawn: it ends the row
    how = dict(temperature=0.9, top_k=50, top_p=0.9, seed=3, stop=(256,), allowed=allowed)
    ids = list(prompt.encode()) or [256]
    (new,) = generate(load_model(folder)[0], [ids], 40, **how)
    assert capsys.readouterr().out == prompt + bytes(new).decode(errors="replace") + "\n"


@pytest.mark.quick
def test_several_prompts_are_continued(tmp_path, capsys):
    """Several prompts are continued as one batch, each under its number."""
    folder = byte_model(tmp_path)
    words = ["--prompt", "one", "--prompt", "three", "--max-new-tokens", "5"]
    assert sample.main([str(folder), *words]) == 0
    out = capsys.readouterr().out
    assert "--- 1 ---\none" in out and "--- 2 ---\nthree" in out


@pytest.mark.quick
@few
@given(st.text(max_size=5), seeds)
def test_streamed_text_is_the_returned_text(prompt, seed):
    """What is written token by token, some of which end inside a character, is what returns."""
    model = wild(FLM(tiny(vocab_size=288, max_seq_len=64)), 1)
    stream, info = io.StringIO(), {"tokenizer": "bytes"}
    options = dict(max_new_tokens=30, seed=seed, stream=stream)
    (text,) = sample.continue_texts(model, info, [prompt], **options)
    assert text.startswith(prompt) and stream.getvalue() == text + "\n"


@pytest.mark.quick
def test_a_trained_length_of_one(tmp_path, capsys):
    """A model that was trained on single tokens is sampled too: one token, or as many as asked."""
    folder = byte_model(tmp_path, max_seq_len=1)
    assert sample.main([str(folder)]) == 0
    assert sample.main([str(folder), "--prompt", "abc", "--cache", "20", "--blockwise"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("abc")


def test_a_diverged_checkpoint_ends_with_one_screen(tmp_path):
    """Weights that are NaN: exit code 2 and a few lines, not a traceback of the drawing."""
    model = wild(FLM(tiny(vocab_size=288)))
    with torch.no_grad():
        model.norm.bias[0] = torch.nan
    code, out, err = run_command("sample", save_model(tmp_path / "step-00000001", model))
    assert code == 2 and "not finite" in err and "diverged" in err
    assert "Traceback" not in err and len(err.splitlines()) < 10
