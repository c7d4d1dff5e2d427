"""Tests of checkpoint.py: a model on disk is whole or not there, and what is damaged is named."""

import contextlib
import json
import resource
import shutil
from unittest import mock

import pytest
import torch
from helpers import build, save_model, some_tokens, tiny, wild

import checkpoint
from checkpoint import find_checkpoint, load_model, read_info
from flm import FLM, FLMConfig, growth_mask

OLD = {"n_layers": 1, "d_model": 7, "n_heads": 2, "d_ff": 11}
GROWTH = {"old": OLD, "layer_map": [0, None], "start": 0, "ramp": 10}


def masks(model) -> list:
    """The growth masks that are in place."""
    return [b for name, b in model.named_buffers(remove_duplicate=False) if name.endswith("mask")]


def info_of(config: FLMConfig, dtype="float64", growth=None, samples=0) -> dict:
    """What checkpoint.json must say."""
    return {
        "config": config.to_dict(),
        "dtype": dtype,
        "tokenizer": "bytes",
        "samples": samples,
        "growth": growth,
    }


def same(a: FLM, b: FLM) -> bool:
    """Equal in name, dtype and every bit."""
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint_round_trip(tmp_path, dtype, tied):
    """A model written and loaded is the same bit for bit, through the run folder and through the step folder, and its info
    comes back; no .tmp folder is left. Tied weights stay tied."""
    config = tiny(tie_embeddings=tied)
    model = wild(FLM(config)).to(getattr(torch, dtype))
    folder = save_model(tmp_path / "run" / "step-00000012", model, dtype=dtype, samples=77)
    assert [p.name for p in folder.parent.iterdir()] == ["step-00000012"]
    for path in (folder, folder.parent, str(folder)):
        loaded, info = load_model(path)
        assert same(loaded, model) and loaded.config == config
        assert (loaded.head.weight is loaded.embedding.weight) == tied
        assert torch.equal(loaded(some_tokens(config, 1, 5)), model(some_tokens(config, 1, 5)))
    assert read_info(folder).items() >= info_of(
        config, dtype, samples=77
    ).items() and info == read_info(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_one_file_weights_round_trip(tmp_path, tied):
    """A file of {"info", "model"}, as exported, loads to the same model."""
    model = build(tiny(tie_embeddings=tied))
    torch.save(
        {"info": info_of(model.config), "model": dict(model.named_parameters())},
        tmp_path / "weights.pt",
    )
    assert same(load_model(tmp_path / "weights.pt")[0], model)


@pytest.mark.parametrize("samples, left", [(100, 10), (105, 10), (110, 0)])
def test_loading_honours_the_growth_record(tmp_path, samples, left):
    """A checkpoint in mid-ramp loads with its masks in place, so that its logits are those it was saved with."""
    model, tokens = build(tiny()), some_tokens(tiny(), 1, 6)
    growth = {**GROWTH, "start": 100, "ramp": 10}
    model.set_masks(growth, growth_mask(growth, samples))
    loaded, _ = load_model(save_model(tmp_path / "step-1", model, growth=growth, samples=samples))
    assert len(masks(loaded)) == left and torch.equal(loaded(tokens), model(tokens))


def test_find_checkpoint_takes_the_newest_whole_one(tmp_path):
    """Of a run folder the newest step is taken; .tmp folders and folders without checkpoint.json are not checkpoints."""
    model = build(tiny())
    for step in (2, 10, 9):
        save_model(tmp_path / f"step-{step:08d}", model)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000011.tmp")
    (tmp_path / "step-00000012").mkdir()
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000010"


def test_find_checkpoint_says_what_is_missing(tmp_path):
    """No such path, and a folder without any checkpoint, are two ValueErrors that name the path and what was expected."""
    with pytest.raises(ValueError, match="nowhere: there is no such file or folder"):
        find_checkpoint(tmp_path / "nowhere")
    (tmp_path / "step-00000001.tmp").mkdir()
    with pytest.raises(ValueError, match="expected a run folder with step-"):
        load_model(tmp_path)


def truncate(folder):
    path = next(folder.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-1])


def scribble(pattern):
    def damage(folder):
        path = next(folder.glob(pattern))
        path.write_bytes(b"x" * path.stat().st_size)

    return damage


def write_info(**changes):
    def damage(folder):
        info = json.loads((folder / "checkpoint.json").read_text()) | changes
        (folder / "checkpoint.json").write_text(
            json.dumps({k: v for k, v in info.items() if v != "absent"})
        )

    return damage


DAMAGE = {
    "cut off": (
        truncate,
        "cut off or damaged.*distcp: .* bytes expected, .* found.*remove this one: rm -r",
    ),
    "a file missing": (
        lambda f: next(f.glob("*.distcp")).unlink(),
        "cut off or damaged.*distcp: .* missing",
    ),
    "metadata missing": (
        lambda f: (f / ".metadata").unlink(),
        "cut off or damaged.*metadata: .* missing",
    ),
    "metadata overwritten": (scribble(".metadata"), "step-1"),
    "tensors overwritten": (scribble("*.distcp"), "step-1"),
    "another format": (write_info(format=0), "format 0, this code reads 1"),
    "no format": (write_info(format="absent"), "format None, this code reads 1"),
    "JSON cut off": (
        lambda f: (f / "checkpoint.json").write_text('{"format": 1, "con'),
        "checkpoint.json.*not readable JSON",
    ),
    "JSON empty": (
        lambda f: (f / "checkpoint.json").write_text(""),
        "checkpoint.json.*not readable JSON",
    ),
    "JSON of another kind": (
        lambda f: (f / "checkpoint.json").write_text("[1, 2]"),
        "checkpoint.json",
    ),
    "JSON not text": (
        lambda f: (f / "checkpoint.json").write_bytes(b"\xff\xfe\x00"),
        "checkpoint.json",
    ),
    "no list of files": (write_info(files="absent"), "files"),
    "no config": (write_info(config="absent"), "config"),
    "no growth": (write_info(growth="absent"), "growth"),
    "no dtype": (write_info(dtype="absent"), "dtype"),
    "unknown dtype": (write_info(dtype="float17"), "float17"),
    "config of another shape": (
        write_info(config=tiny(d_model=14).to_dict()),
        r"\[23, 12\].*\[23, 14\]",
    ),
    "config with more layers": (write_info(config=tiny(n_layers=3).to_dict()), r"layers\.2"),
    "config of an untied model": (
        write_info(config=tiny(tie_embeddings=False).to_dict()),
        r"head\.weight",
    ),
    "config broken": (write_info(config={**tiny().to_dict(), "n_heads": 0}), "n_heads = 0"),
}


@pytest.mark.parametrize("damage, text", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named(tmp_path, damage, text):
    """Whatever is wrong with a step folder, loading it is a ValueError whose text says what and where."""
    folder = save_model(tmp_path / "step-1", build(tiny()))
    damage(folder)
    with pytest.raises(ValueError, match=f"(?s){text}"):
        load_model(folder)


def exported(config: FLMConfig) -> dict:
    """What a file of weights holds."""
    return {"info": info_of(config), "model": dict(build(config).named_parameters())}


def test_a_file_that_holds_no_weights_is_refused(tmp_path):
    """Garbage, an empty file, a file cut off and a pickle of something else are ValueErrors that say what was expected."""
    torch.save(exported(tiny()), tmp_path / "whole")
    torch.save([1, 2], tmp_path / "list")
    (tmp_path / "garbage").write_bytes(b"hello world")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-200])
    for name in ("list", "garbage", "empty", "cut"):
        with pytest.raises(
            ValueError, match=f"{name} is not a file of weights written by train.py --export"
        ):
            load_model(tmp_path / name)


def drop_a_weight(blob):
    del blob["model"]["layers.1.ff.up.bias"]


def shrink_a_weight(blob):
    blob["model"]["norm.bias"] = torch.zeros(1)  # would broadcast


def widen_the_config(blob):
    blob["info"]["config"] = tiny(d_model=14).to_dict()


def drop_the_config(blob):
    del blob["info"]["config"]


@pytest.mark.parametrize(
    "damage, text",
    [
        (drop_a_weight, r"layers\.1\.ff\.up\.bias"),
        (shrink_a_weight, r"norm\.bias"),
        (widen_the_config, r"embedding\.weight"),
        (drop_the_config, "config"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, damage, text):
    """A file of weights in which a tensor is missing or has another shape, or that has no config, is a ValueError that names it."""
    blob = exported(tiny())
    damage(blob)
    torch.save(blob, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=text):
        load_model(tmp_path / "weights.pt")


@contextlib.contextmanager
def no_file_past(size):
    """The operating system refuses to let any file grow past `size` bytes: as near to a full disk as a test can get."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FAILURES = {
    "a full disk": lambda: no_file_past(4096),
    "no space": lambda: mock.patch.object(
        checkpoint.dcp, "save", side_effect=OSError(28, "No space left on device")
    ),
    "silent": lambda: mock.patch.object(checkpoint.dcp, "save", side_effect=OSError()),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_failing_write_loses_nothing(tmp_path, failure):
    """When a checkpoint cannot be written, OSError names it, no half folder is left, and the previous one, and one of the
    same name, are whole."""
    old, new = build(tiny(), 1), build(tiny(), 2)
    first = save_model(tmp_path / "step-00000001", old)
    for name in ("step-00000001", "step-00000002"):
        with failure(), pytest.raises(OSError, match=f"could not write the checkpoint.*{name}"):
            save_model(tmp_path / name, new)
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert find_checkpoint(tmp_path) == first and same(load_model(tmp_path)[0], old)


def test_a_killed_write_loses_nothing(tmp_path):
    """A write that is killed between its tensors and its checkpoint.json leaves the previous checkpoint in use, and the
    next write of the same step succeeds."""
    old, new = build(tiny(), 1), build(tiny(), 2)
    save_model(tmp_path / "step-00000001", old)
    with (
        mock.patch.object(json, "dump", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        save_model(tmp_path / "step-00000002", new)
    assert same(load_model(tmp_path)[0], old)
    save_model(tmp_path / "step-00000002", new)
    assert same(load_model(tmp_path)[0], new)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_checkpoint_is_replaced_whole(tmp_path):
    """Writing a step again replaces it."""
    save_model(tmp_path / "step-1", build(tiny(n_layers=3), 1))
    new = build(tiny(), 2)
    save_model(tmp_path / "step-1", new)
    assert same(load_model(tmp_path / "step-1")[0], new)
