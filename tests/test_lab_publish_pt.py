"""lab.publish save --as pt: the weights of a checkpoint in one file."""

# ruff: noqa: F401, F811 (pytest finds fixtures by their names)

import os
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import build, error, save_model, tiny
from test_checkpoint import info_of, no_file_past, same
from workshop import T, corpus, job, workshop

import sample
import train
from checkpoint import find_checkpoint, load_model
from lab import publish
from lab.publish import export_weights
from train import main


def export(run, file) -> int:
    return publish.main(["save", str(run), "--to", str(file), "--as", "pt"])


@pytest.mark.parametrize("tied", [True, False])
def test_one_file_weights_round_trip(tmp_path, tied):
    """A file that export_weights wrote loads to the same model, alone and beside another program's
    config.json; tied weights stay tied; it is a dictionary that torch.load reads without code."""
    model = build(tiny(tie_embeddings=tied))
    save_model(tmp_path / "run" / "step-00000003", model, samples=9)
    export_weights(tmp_path / "run", tmp_path / "weights.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "weights.pt"]
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    loaded, info = load_model(tmp_path / "weights.pt")
    assert same(loaded, model) and (loaded.head.weight is loaded.embedding.weight) == tied
    assert info.items() >= info_of(model.config, samples=9).items() and "files" not in info
    blob = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert blob["model"].keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_export_is_the_same_model(corpus, capsys, dtype):
    """A run, its newest step folder and the exported file hold the same model: equal logits. The
    file is read without running code (weights_only), knows its tokenizer, and the printed command
    samples from it."""
    run = train.train(job(corpus, dtype=dtype))["folder"]
    assert export(run, "my weights.pt") == 0
    command = re.search(r"python sample\.py (.*)", capsys.readouterr().out)[1]
    assert set(torch.load("my weights.pt", weights_only=True)) == {"info", "model"}
    models = [load_model(path) for path in (run, find_checkpoint(run), "my weights.pt")]
    x = torch.arange(T)[None]
    with torch.no_grad():
        logits = [model(x) for model, _ in models]
    assert logits[0].dtype == getattr(torch, dtype)
    assert all(torch.equal(z, logits[0]) for z in logits)
    assert {(info["tokenizer"], info["step"]) for _, info in models} == {("bytes", 6)}
    assert sample.main(shlex.split(command) + ["--max-new-tokens", "3"]) == 0


def test_export_that_fails_leaves_nothing(corpus):
    """A place that cannot be written is named; a file cut off afterwards is refused by name."""
    run = train.train(job(corpus), stop_at=1)["folder"]
    Path("file").touch()
    before = sorted(Path().iterdir())
    with pytest.raises(ValueError, match="file is no folder"):
        export(run, "file/weights.pt")
    with pytest.raises(ValueError, match=f"{run} exists: choose another name"):
        export(run, run)
    assert sorted(Path().iterdir()) == before
    export(run, "weights.pt")
    os.truncate("weights.pt", Path("weights.pt").stat().st_size // 2)
    with pytest.raises(
        ValueError, match="weights.pt is not a file of weights .* or it was cut off"
    ):
        main(["--eval-only", "weights.pt", "--data", corpus])


def interrupted(*args):
    raise KeyboardInterrupt


def test_an_export_that_fails_says_why(tmp_path):
    """A full disk is told in the system's words, not in those of a C++ library; Ctrl-C stays
    Ctrl-C. Nothing is left of either. What exists is not replaced, and a file is no folder."""
    run, file = tmp_path / "run", tmp_path / "weights.pt"
    save_model(run / "step-00000001", build(tiny()))
    with no_file_past(4096), pytest.raises(OSError) as caught:
        export_weights(run, file)
    assert str(caught.value) == f"could not write {file}: File too large"
    with mock.patch.object(torch, "save", interrupted), pytest.raises(KeyboardInterrupt):
        export_weights(run, file)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    file.write_text("older")
    for there in (file, tmp_path):
        assert f"{there} exists: choose another name" in error(export_weights, run, there)
    assert f"{file} is no folder" in error(export_weights, run, file / "in" / "weights.pt")
    assert file.read_text() == "older"
