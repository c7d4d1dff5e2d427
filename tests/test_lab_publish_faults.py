"""What lab/publish.py refuses: one screen that says what is wrong and what to type; nothing half
written. And that what it makes is a checkpoint like any other."""

import json
import os
import pickle
import shlex

import pytest
import torch
from data_helpers import make
from helpers import build, error, run_command, save_model, tiny
from published import flm_model, write_bins
from safetensors.torch import save_file

from checkpoint import load_model, stored_tensors
from grow import grow_checkpoint, growth_record
from lab import publish
from sample import continue_texts
from train import main as train_main


@pytest.fixture
def theirs(tmp_path):
    """A published folder of two shards, and a folder to write into."""
    values, weights = flm_model(0, torch.float32)
    (tmp_path / "out").mkdir()
    return write_bins(tmp_path / "theirs", values, weights), tmp_path / "out" / "ours"


@pytest.fixture
def corpus(tmp_path):
    """A prepared folder of a few documents, in bytes."""
    (tmp_path / "text").mkdir()
    texts = [f"the {number} of the {number * 7}\n" * 20 for number in range(40)]
    return make(tmp_path / "text", {"text": texts})[0]


def train(*words):
    """A short command of train.py, in this process."""
    short = [] if "--eval-only" in words else ["--warmup", 0, "--device", "cpu"]
    assert train_main([*map(str, words), *map(str, short), "--eval-rows", "2"]) == 0


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder, out, *options):
    """What the command says, run in this process. It must leave nothing behind."""
    said = error(publish.main, ["load", str(folder), "--out", str(out), *options])
    assert not list(out.parent.iterdir()) and len(said.splitlines()) < 25
    return said


# --------------------------------------------------------------------------------------------------
# In


def test_a_shard_is_missing_or_cut_off(theirs):
    """Each such shard is named, all at once."""
    folder, out = theirs
    first, second = sorted(folder.glob("*.bin"))
    second.write_bytes(second.read_bytes()[:-500])
    first.unlink()
    said = refused(folder, out)
    assert f"{first.name} is missing" in said and f"{second.name} is cut off" in said


@pytest.mark.parametrize("keep", [3, 30, 400, -1], ids=lambda keep: f"[:{keep}]")
def test_a_safetensors_shard_is_cut_off(theirs, keep):
    """In its length, in its header, in its tensors, at its last byte."""
    folder, out = theirs
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    file = folder / "model.safetensors"
    save_file(flm_model(0, torch.float32)[1], file)
    whole = file.read_bytes()
    publish.load(folder, out.parent.parent / "whole")
    file.write_bytes(whole[:keep])
    assert "model.safetensors is cut off" in refused(folder, out)


def test_a_shard_that_would_run_code(theirs):
    """A pickle is a program: one that holds more than tensors is never opened."""
    folder, out = theirs

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(out.parent / "made"),)

    file = sorted(folder.glob("*.bin"))[0]
    torch.save({"x": Evil()}, file)
    assert "holds more than tensors" in refused(folder, out)
    file.write_bytes(pickle.dumps(Evil()))
    assert file.name in refused(folder, out)


def test_no_weights_and_no_config(tmp_path):
    """A folder that is no published model says what one holds."""
    (tmp_path / "out").mkdir()
    folder, out = tmp_path / "theirs", tmp_path / "out" / "ours"
    assert "is no folder" in refused(folder, out)
    folder.mkdir()
    assert "config.json" in refused(folder, out)
    (folder / "config.json").write_text("{")
    assert "config.json" in refused(folder, out)
    (folder / "config.json").write_text(json.dumps({"d_model": 8}))
    assert "neither n_embd" in refused(folder, out)
    (folder / "config.json").write_text(json.dumps(flm_model(0)[0]))
    assert "expected model.safetensors" in refused(folder, out)


def test_every_switch_that_is_not_known(theirs):
    """All unknown switches of config.json, then all values that this model does not compute."""
    folder, out = theirs
    change_config(folder, sliding_window=128, rope_scaling={"type": "ntk"}, n_head="two")
    said = refused(folder, out)
    assert "sliding_window = 128" in said and "rope_scaling" in said and "n_head = 'two'" in said
    change_config(folder, sliding_window=None, rope_scaling=None, n_head=5)
    change_config(folder, relative_encoding=None, activation_function="relu", mup_scale_factor=5.0)
    said = refused(folder, out)
    for word in ("relative_encoding", "relu", "n_embd % n_head", "mup_scale_factor = 5.0"):
        assert word in said


GRANITE = dict(
    model_type="granite",
    num_hidden_layers=1,
    hidden_size=8,
    num_attention_heads=2,
    intermediate_size=9,
    vocab_size=7,
    max_position_embeddings=8,
    attention_multiplier=0.5,
)
WRONG = [
    ({"num_key_value_heads": 1}, "num_key_value_heads = 1"),
    ({"residual_multiplier": 0.22}, "residual_multiplier = 0.22"),
    ({"attention_multiplier": 0.1}, "attention_multiplier = 0.1"),
    ({"attention_multiplier": None}, "attention_multiplier = 1.0"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"mlp_bias": True}, "mlp_bias = True"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn'"),
    ({"use_mup": True, "mup_scale_factor": 2.0, "logits_scaling": 3.0}, "logits_scaling = 3.0"),
]


def test_the_multiplier_of_the_branches():
    """Granite's residual multiplier is CompleteP's where it is a whole number of layers over the
    number of layers, or where our fields beside it say how it came about. FLM-101B's own code has
    none, so such a model is not written in its names."""
    deep = GRANITE | {"num_hidden_layers": 8, "residual_multiplier": 0.25}
    found = publish.read_config(deep)
    assert (found.depth_alpha, found.base_layers, found.branch_mult) == (1.0, 2, 0.25)
    ours = deep | {"depth_alpha": 0.5, "base_layers": 4, "residual_multiplier": 0.5**0.5}
    assert publish.read_config(ours).branch_mult == 0.5**0.5
    for wrong in ({"base_layers": 3}, {"depth_alpha": 2}, {"residual_multiplier": 0}):
        message = error(publish.read_config, deep | wrong)
        assert next(iter(wrong)) in message
    assert "multiplies no branch" in error(publish.flm_config, found)


@pytest.mark.parametrize("change, said", WRONG, ids=lambda value: str(value)[:30])
def test_a_granite_that_is_not_ours(change, said):
    """Grouped queries, scaled residuals, other scores: not this repository's model."""
    assert publish.read_config(GRANITE).d_ff == 9
    assert said in error(publish.read_config, GRANITE | change)


def test_shapes_that_disagree(theirs):
    """Missing, unknown and wrong tensors are told together, ten of each kind at most."""
    folder, out = theirs
    change_config(folder, n_inner=24, n_layer=3)
    said = refused(folder, out)
    assert "transformer.h.2.ln_1.weight is missing" in said and "and 2 more" in said
    assert "mlp.c_fc.weight: (12, 20), not (12, 24)" in said
    change_config(folder, n_inner=20, n_layer=1)
    assert "transformer.h.1.attn.c_attn.bias is not a part of this model" in refused(folder, out)


def test_numbers_that_are_not_finite(theirs):
    """Weights of a run that diverged are no checkpoint."""
    folder, out = theirs
    file = sorted(folder.glob("*.bin"))[1]
    weights = torch.load(file)
    name = next(name for name in weights if name.endswith("ln_1.weight"))
    weights[name][0] = float("nan")
    torch.save(weights, file)
    assert "not finite" in refused(folder, out)


def test_a_tokenizer_that_does_not_fit(theirs):
    """A tokenizer may not have more ids than the model has rows, on either way."""
    folder, out = theirs
    assert "the model has 23 rows" in refused(folder, out, "--tokenizer", "bytes")
    path = save_model(out.parent.parent / "small", build(tiny(d_model=18)))
    assert "the model has 23 rows" in error(publish.save, path, out, "flm")


def test_a_target_that_exists(theirs):
    """Nothing is written over, neither a folder nor a link to nowhere."""
    folder, out = theirs
    out.symlink_to("nowhere")
    assert "exists" in error(publish.load, folder, out)
    path = publish.load(folder, out.parent / "a") and out.parent / "a"
    assert "exists" in error(publish.save, path, out, "flm")


@pytest.mark.parametrize("way", ["load", "save"])
def test_a_full_disk(theirs, way):
    """The system refuses to let a file grow past 4 KiB. The error is the system's, and neither a
    half nor a temporary folder stays."""
    resource = pytest.importorskip("resource", reason="Windows limits no file")
    folder, out = theirs
    source = out.parent.parent / "source"
    publish.load(folder, source)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            publish.load(folder, out) if way == "load" else publish.save(source, out, "flm")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(out.parent.iterdir())


# --------------------------------------------------------------------------------------------------
# Out


def test_a_growth_in_mid_ramp(tmp_path, corpus):
    """It is refused, and the command that is printed trains to the end of the ramp."""
    config = tiny(n_layers=1, vocab_size=288, d_model=18)
    record = growth_record(config, config.replace(n_layers=2), start=0, ramp=40)
    model = build(config.replace(n_layers=2, init_std=0.1), dtype=torch.float32)
    path = save_model(tmp_path / "grown", model, growth=record, samples=10)
    said = error(publish.save, path, tmp_path / "out", "flm")
    assert "c = 0.250" in said and not (tmp_path / "out").exists()
    words = shlex.split(said.splitlines()[-1])
    assert words[:2] == ["python", "train.py"] and words[-1] == "2"  # 30 samples, 16 at a time
    train(*words[2:], "--data", corpus, "--out", tmp_path / "run")
    publish.save(tmp_path / "run", tmp_path / "out", "flm")


def test_what_a_layout_cannot_say(tmp_path):
    """xPos is in no library architecture; FLM-101B's code divides the width by the heads. A file of
    weights is no checkpoint to publish."""
    path = save_model(tmp_path / "ours", build(tiny(vocab_size=288)))
    said = error(publish.save, path, tmp_path / "out", "granite")
    assert "rotary = 'xpos'" in said and "use --as flm" in said and "norm = 'layernorm'" in said
    assert "3 heads of 6: their code divides d_model = 12" in error(
        publish.save, path, tmp_path / "out", "flm"
    )
    (tmp_path / "file.pt").write_bytes(b"")
    assert "file of weights" in error(publish.save, tmp_path / "file.pt", tmp_path / "out", "flm")
    assert not (tmp_path / "out").exists()


def test_the_command_line(tmp_path):
    """Refusals are one screen without a traceback, exit code 2. --help explains itself."""
    code, out, err = run_command("lab.publish", "load", tmp_path / "no", "--out", tmp_path / "x")
    assert code == 2 and "lab.publish:" in err and "Traceback" not in err
    said = error(publish.main, ["save", "x", "--to", "y", "--as", "flm", "--shard-size", "0"])
    assert "--shard-size 0" in said


# --------------------------------------------------------------------------------------------------
# A checkpoint like any other


def test_what_is_loaded_trains_grows_speaks_and_is_measured(tmp_path, corpus, capsys):
    """train.py --init-from, grow.py apply, sample.py and train.py --eval-only take what `load`
    writes. It has no moments: they begin at zero, and the grown one has none either."""
    values, weights = flm_model(0, torch.float32, vocab_size=288, n_positions=16, output_mult=0.1)
    folder, path = write_bins(tmp_path / "theirs", values, weights), tmp_path / "ours"
    publish.load(folder, path, "bytes")
    assert not any(key.startswith("optimizer") for key in stored_tensors(path))
    train("--init-from", path, "--data", corpus, "--out", tmp_path / "run", "--steps", 2)
    stored = stored_tensors(tmp_path / "run" / "step-00000002")
    assert "optimizer.norm.weight.exp_avg" in stored
    before, after = load_model(path)[0], load_model(tmp_path / "run")[0]
    assert not before.norm.weight.equal(after.norm.weight)
    grown = tmp_path / "grown"
    grow_checkpoint(path, before.config.replace(n_layers=3), grown, ramp=4)
    assert not any(key.startswith("optimizer") for key in stored_tensors(grown))
    train("--init-from", grown, "--data", corpus, "--out", tmp_path / "larger", "--steps", 2)
    capsys.readouterr()
    train("--eval-only", path, "--data", corpus)
    assert "held-out loss" in capsys.readouterr().out
    model, info = load_model(path)
    assert continue_texts(model, info, ["a"], max_new_tokens=4)[0].startswith("a")
