"""Tests of checkpoint.py: a model on disk is whole or not there, and what is damaged is named."""

import contextlib
import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import build, error, save_model, some_tokens, tiny, wild
from torch.distributed.checkpoint.filesystem import FileSystemWriter

import checkpoint
import muP
from checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_model,
    read_info,
    read_training,
    remove_old_checkpoints,
    sound_checkpoint,
    training_tensors,
    write_checkpoint,
)
from flm import FLM, FLMConfig, growth_mask

pytestmark = pytest.mark.quick

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
    equal = [a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a if k in b]
    return a.keys() == b.keys() and all(equal)


def run_of(folder: Path, *steps: int) -> list[Path]:
    """A run with a checkpoint at each of these steps."""
    return [save_model(folder / f"step-{n:08d}", build(tiny(), n), step=n) for n in steps]


# --------------------------------------------------------------------------------------------------
# Writing and reading


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint_round_trip(tmp_path, dtype, tied):
    """A model written and loaded is the same bit for bit, through the run folder and through the
    step folder, and its info comes back; no .tmp folder is left. Tied weights stay tied."""
    config = tiny(tie_embeddings=tied)
    model = wild(FLM(config)).to(getattr(torch, dtype))
    folder = save_model(tmp_path / "run" / "step-00000012", model, dtype=dtype, samples=77)
    assert [p.name for p in folder.parent.iterdir()] == ["step-00000012"]
    for path in (folder, folder.parent, str(folder)):
        loaded, info = load_model(path)
        assert same(loaded, model) and loaded.config == config
        assert (loaded.head.weight is loaded.embedding.weight) == tied
        assert torch.equal(loaded(some_tokens(config, 1, 5)), model(some_tokens(config, 1, 5)))
    assert read_info(folder).items() >= info_of(config, dtype, samples=77).items()
    assert info == read_info(folder)


@pytest.mark.parametrize("samples, left", [(100, 10), (105, 10), (110, 0)])
def test_loading_honours_the_growth_record(tmp_path, samples, left):
    """A checkpoint in mid-ramp loads with its masks in place, so that its logits are those it was
    saved with."""
    model, tokens = build(tiny()), some_tokens(tiny(), 1, 6)
    growth = {**GROWTH, "start": 100, "ramp": 10}
    model.set_masks(growth, growth_mask(growth, samples))
    loaded, _ = load_model(save_model(tmp_path / "step-1", model, growth=growth, samples=samples))
    assert len(masks(loaded)) == left and torch.equal(loaded(tokens), model(tokens))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_moments_come_back(tmp_path, tied):
    """After a step of AdamW, weights and moments go to disk and into another model and optimizer:
    all are equal bit for bit, and the next step is the same. Before a step there are no moments,
    and reading makes them."""
    config, tokens = tiny(tie_embeddings=tied), some_tokens(tiny(), 2, 9)

    def trainer(seed):
        model = build(config, seed)
        return model, torch.optim.AdamW(muP.param_groups(model, 1e-2, 0.1))

    def train_step(model, optimizer):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    (model, optimizer), (other, its_optimizer) = trainer(1), trainer(2)
    train_step(model, optimizer)
    named, its_named = [*model.named_parameters()], [*other.named_parameters()]
    tensors = training_tensors(named, optimizer)
    folder = write_checkpoint(tmp_path / "step-00000001", tensors, info_of(config))
    read_training(its_named, its_optimizer, folder)
    for _ in range(2):
        ours, theirs = tensors, training_tensors(its_named, its_optimizer)
        assert ours["optimizer"].keys() == {
            f"{name}.{key}" for name, _ in named for key in ("step", "exp_avg", "exp_avg_sq")
        }
        for kind in ours:
            assert ours[kind].keys() == theirs[kind].keys()
            assert all(torch.equal(ours[kind][name], theirs[kind][name]) for name in ours[kind])
        train_step(model, optimizer)
        train_step(other, its_optimizer)


def test_both_ends_of_a_tied_embedding_are_read(tmp_path):
    """Where both ends of a tied embedding lie on one rank as two tensors (the first and the last
    stage of a pipeline), the checkpoint holds one, and reading fills both and their moments."""
    ends = [torch.nn.Parameter(torch.full((3,), float(i))) for i in range(2)]
    named, optimizer = [("embedding.weight", end) for end in ends], torch.optim.AdamW(ends)
    tensors = training_tensors(named, optimizer)
    assert tensors["model"]["embedding.weight"] is ends[0] and len(tensors["model"]) == 1
    optimizer.state[ends[0]]["exp_avg"].fill_(5.0)
    folder = write_checkpoint(tmp_path / "step-00000001", tensors, info_of(tiny()))
    optimizer.state[ends[0]]["exp_avg"].zero_()
    with torch.no_grad():
        ends[0].fill_(7.0)
    read_training(named, optimizer, folder)
    assert all(torch.equal(end, torch.zeros(3)) for end in ends)
    assert all((optimizer.state[end]["exp_avg"] == 5).all() for end in ends)


# --------------------------------------------------------------------------------------------------
# The folders of a run


def test_find_checkpoint_takes_the_newest(tmp_path):
    """Of a run folder the newest step is taken, by its number; .tmp folders, folders without
    checkpoint.json and other names are not checkpoints."""
    run_of(tmp_path, 2, 10, 100_000_000, 9)
    newest = tmp_path / "step-100000000"
    clutter(tmp_path, newest)
    assert find_checkpoint(tmp_path) == newest
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000002",
        "step-00000009",
        "step-00000010",
        "step-100000000",
    ]


def clutter(run: Path, whole: Path):
    """What users and killed processes leave in a run: copies of a checkpoint under other names and
    under the number of another step, a file and a folder that are none, a link."""
    names = "step-best", "step-00000000-init", "step-99999999x", "step-300000000.tmp"
    for name in (*names, "step-400000000"):
        shutil.copytree(whole, run / name)
    shutil.copytree(whole, run / "step-0000011")  # a digit short
    (run / "step-notes.txt").write_text("do not lose this")
    (run / "step-00000012").mkdir()


def everything_in(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("keep, left", [(0, 1), (1, 1), (2, 2), (9, 3)])
def test_only_old_checkpoints_are_removed(tmp_path, keep, left):
    """The newest `keep` checkpoints stay, at least one, and all that is not named exactly as a
    checkpoint is as it was, byte for byte. What a killed write left goes."""
    run = tmp_path / "run"
    steps = run_of(run, 1, 2, 3)
    clutter(run, steps[0])
    shutil.copytree(steps[0], tmp_path / "linked")
    (run / "step-00000000").symlink_to(tmp_path / "linked")
    before = everything_in(tmp_path)
    remove_old_checkpoints(run, keep)
    names = [path.name for path in steps[:-left]] + ["step-300000000.tmp"]
    gone = {name for name in before if name.split("/")[1] in names}
    kept = {name: text for name, text in before.items() if name not in gone}
    assert everything_in(tmp_path) == kept and not any((run / name).exists() for name in names)


def test_what_is_not_a_checkpoints_own_file_stays(tmp_path):
    """A note that someone put into an old checkpoint stays where it is, and the rest goes: the
    folder is no checkpoint any more. A damaged checkpoint is not counted, and is left alone."""
    old, damaged, *_ = run_of(tmp_path, 1, 2, 3, 4)
    (old / "notes.txt").write_text("the best one so far")
    truncate(damaged)
    before = everything_in(damaged)
    remove_old_checkpoints(tmp_path, 2)
    assert [path.name for path in old.iterdir()] == ["notes.txt"]
    assert everything_in(damaged) == before
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["3", "4"]


def test_a_damaged_newest_checkpoint_is_not_passed_over(tmp_path):
    """find_checkpoint returns the newest step folder although it is damaged, so that reading it
    says so; list_checkpoints, which counts what may be removed, leaves it out."""
    whole, damaged = run_of(tmp_path, 1, 2)
    truncate(damaged)
    assert find_checkpoint(tmp_path) == damaged and list_checkpoints(tmp_path) == [whole]
    assert "cut off or damaged" in error(load_model, tmp_path)


def test_find_checkpoint_says_what_is_missing(tmp_path):
    """No such path, and a folder without any checkpoint, are two ValueErrors that name the path
    and what was expected."""
    message = error(find_checkpoint, tmp_path / "nowhere")
    assert "nowhere: there is no such file or folder" in message
    (tmp_path / "step-00000001.tmp").mkdir()
    assert "expected a run folder with step folders" in error(load_model, tmp_path)


# --------------------------------------------------------------------------------------------------
# Damage


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
        "cut off or damaged.*rm -r .*step-1.*distcp: .* bytes expected, .* found",
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
    """Whatever is wrong with a step folder, loading it is a ValueError whose text says what and
    where."""
    folder = save_model(tmp_path / "step-1", build(tiny()))
    damage(folder)
    with pytest.raises(ValueError, match=f"(?s){text}"):
        load_model(folder)


def exported(config: FLMConfig) -> dict:
    """What a file of weights holds."""
    return {"info": info_of(config), "model": dict(build(config).named_parameters())}


def test_a_file_that_holds_no_weights_is_refused(tmp_path):
    """Garbage, an empty file, a file cut off and a pickle of something else are ValueErrors that
    say what was expected."""
    torch.save(exported(tiny()), tmp_path / "whole")
    torch.save([1, 2], tmp_path / "list")
    (tmp_path / "garbage").write_bytes(b"hello world")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-200])
    for name in ("list", "garbage", "empty", "cut"):
        message = error(load_model, tmp_path / name)
        assert f"{name} is not a file of weights from lab.publish save --as pt" in message


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
    """A file of weights in which a tensor is missing or has another shape, or that has no config,
    is a ValueError that names it."""
    blob = exported(tiny())
    damage(blob)
    torch.save(blob, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=text):
        load_model(tmp_path / "weights.pt")


def test_weights_that_are_not_finite_are_named(tmp_path):
    """After a run diverged, loading names the checkpoint, what is wrong and the newest sound
    checkpoint of the run; where none is sound, or for a file, what to change."""
    save_model(tmp_path / "step-00000001", build(tiny()))
    for step, bad in ((2, float("inf")), (3, float("nan"))):
        model = build(tiny())
        with torch.no_grad():
            model.layers["1"].ff.up.weight[3, 4] = bad
        save_model(tmp_path / f"step-{step:08d}", model)
        message = error(load_model, tmp_path)
        assert f"step-{step:08d} holds weights that are not finite" in message
        assert message.endswith("use " + str(tmp_path / "step-00000001"))
    assert sound_checkpoint(tmp_path) == tmp_path / "step-00000001"
    shutil.rmtree(tmp_path / "step-00000001")
    assert sound_checkpoint(tmp_path) is None and "smaller --lr" in error(load_model, tmp_path)


# --------------------------------------------------------------------------------------------------
# Writes that fail


@contextlib.contextmanager
def no_file_past(size):
    """The operating system refuses to let any file grow past `size` bytes: as near to a full disk
    as a test can get."""
    resource = pytest.importorskip("resource", reason="Windows limits no file")
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
    """When a checkpoint cannot be written, OSError names it, no half folder is left, and the
    previous one, and one of the same name, are whole."""
    old, new = build(tiny(), 1), build(tiny(), 2)
    first = save_model(tmp_path / "step-00000001", old)
    for name in ("step-00000001", "step-00000002"):
        with failure(), pytest.raises(OSError, match=f"could not write the checkpoint.*{name}"):
            save_model(tmp_path / name, new)
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert find_checkpoint(tmp_path) == first and same(load_model(tmp_path)[0], old)


def test_a_killed_write_loses_nothing(tmp_path):
    """A write that is killed between its tensors and its checkpoint.json leaves the previous
    checkpoint in use, and the next write of the same step succeeds."""
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


def test_a_folder_of_the_users_is_not_written_into(tmp_path):
    """Where FOLDER.tmp holds something that is no checkpoint, the write fails, names that folder
    and leaves it as it was."""
    (tmp_path / "grown.tmp").mkdir()
    (tmp_path / "grown.tmp" / "thesis.txt").write_text("work")
    with pytest.raises(OSError, match=r"could not write the checkpoint .*grown: .*grown\.tmp"):
        save_model(tmp_path / "grown", build(tiny()))
    assert everything_in(tmp_path) == {"grown.tmp/thesis.txt": b"work"}


def test_ctrl_c_in_a_save_is_ctrl_c(tmp_path):
    """DCP turns a KeyboardInterrupt into an error of its own. It comes out as KeyboardInterrupt,
    and leaves nothing."""
    with (
        mock.patch.object(FileSystemWriter, "write_data", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        save_model(tmp_path / "step-00000001", build(tiny()))
    assert not any(tmp_path.iterdir())
