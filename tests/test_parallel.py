"""Many processes compute what one does. The processes are spawned here, on gloo and the CPU; tests/distributed.py is what they run."""
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distributed  # noqa: E402
import grow  # noqa: E402
import parallel  # noqa: E402
from distributed import CONFIG, GROWTH  # noqa: E402
from flm import load_model  # noqa: E402
from parallel import Layout  # noqa: E402

UNTIED = CONFIG.replace(tie_embeddings=False)
STANDARD = CONFIG.replace(mup=False)
EIGHT = CONFIG.replace(n_layers=8)
#  name            processes, layout, options
CASES = {
    "dp2": (2, Layout(dp=2), dict(teacher=True)),
    "dp2-accum": (2, Layout(dp=2), dict(teacher=True, micro=2, growth=GROWTH)),
    "dp2-shard": (2, Layout(dp=2, shard_optimizer=True), dict(micro=4, teacher=True)),
    "dp2-shard-ckpt": (2, Layout(dp=2, shard_optimizer=True, activation_checkpointing=True), dict(config=UNTIED, growth=GROWTH)),
    "tp2": (2, Layout(tp=2), dict(teacher=True, micro=8)),
    "tp2-untied": (2, Layout(tp=2, activation_checkpointing=True), dict(config=UNTIED, growth=GROWTH)),
    "tp2-seq": (2, Layout(tp=2, sequence_parallel=True), dict(growth=GROWTH, teacher=True)),
    "tp2-seq-ckpt": (2, Layout(tp=2, sequence_parallel=True, activation_checkpointing=True), dict(config=STANDARD, micro=4)),
    "pp2": (2, Layout(pp=2), dict(teacher=True, micro=4)),
    "pp2-gpipe": (2, Layout(pp=2, schedule="GPipe", activation_checkpointing=True), dict(config=UNTIED, micro=2)),
    "pp2-inter": (2, Layout(pp=2, schedule="Interleaved1F1B"), dict(growth=GROWTH, micro=4)),
    "pp2-izb": (2, Layout(pp=2, schedule="InterleavedZeroBubble"), dict(teacher=True, micro=4)),
    "pp2-zbv": (2, Layout(pp=2, schedule="ZBVZeroBubble"), dict(teacher=True, micro=2)),
    "dp2-tp2": (4, Layout(dp=2, tp=2), dict(growth=GROWTH, teacher=True)),
    "dp2-tp2-seq": (4, Layout(dp=2, tp=2, sequence_parallel=True), dict(micro=2)),
    "dp2-pp2": (4, Layout(dp=2, pp=2), dict(micro=2, teacher=True)),
    "dp2-pp2-zbv": (4, Layout(dp=2, pp=2, schedule="ZBVZeroBubble"), dict(config=UNTIED, growth=GROWTH, micro=1)),
    "tp2-pp2": (4, Layout(tp=2, pp=2), dict(micro=4, growth=GROWTH)),
    "tp2-pp2-seq-inter": (4, Layout(tp=2, pp=2, sequence_parallel=True, schedule="Interleaved1F1B"), dict(config=STANDARD, micro=4, teacher=True)),
    "pp4": (4, Layout(pp=4), dict(micro=2)),
    "dp2-tp2-pp2": (8, Layout(dp=2, tp=2, pp=2), dict(micro=2, teacher=True, growth=GROWTH)),
    "dp2-tp2-pp2-all": (8, Layout(dp=2, tp=2, pp=2, sequence_parallel=True, activation_checkpointing=True), dict(config=UNTIED, micro=4)),
    "tp2-pp2-fp32": (4, Layout(tp=2, pp=2, sequence_parallel=True), dict(micro=4, dtype="float32")),
    "dp2-fp32": (2, Layout(dp=2), dict(dtype="float32")),
}


def spawn(folder: Path, size: int, cases: list) -> dict:
    folder.mkdir()
    (folder / "cases.pickle").write_bytes(pickle.dumps(cases))
    ranks = [subprocess.Popen([sys.executable, distributed.__file__, str(folder), str(rank), str(size)], stderr=subprocess.PIPE, text=True)
             for rank in range(size)]
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(error[-3000:] for error in errors)
    return pickle.loads((folder / "results.pickle").read_bytes())


ALL = Layout(dp=2, tp=2, pp=2)
BIGGER = CONFIG.replace(n_layers=6, d_model=36, n_heads=6, d_ff=64)
# A checkpoint of eight processes, saved in mid-ramp: who loads it and goes on.
LOADS = {
    "8 to tp2": (2, Layout(tp=2, sequence_parallel=True), dict()),
    "8 to pp2": (2, Layout(pp=2, schedule="ZBVZeroBubble"), dict(micro=4)),
    "8 to dp2": (2, Layout(dp=2), dict()),
    "8 to dp2 sharded": (2, Layout(dp=2, shard_optimizer=True), dict()),
    "8 to dp4 sharded": (4, Layout(dp=4, shard_optimizer=True), dict()),
    "8 to tp4": (4, Layout(tp=4), dict()),
    "8 to tp2 pp2": (4, Layout(tp=2, pp=2, schedule="Interleaved1F1B"), dict(micro=4)),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every case of the tables, run by three groups of processes, the eight first: their checkpoints are the others' food."""
    folder = tmp_path_factory.mktemp("groups")
    saved, plain, grown = folder / "saved", folder / "plain", folder / "grown"
    of = lambda size, table: [(name, layout, options) for name, (n, layout, options) in table.items() if n == size]
    keep = [("save", ALL, dict(micro=2, growth=GROWTH, save=str(saved))), ("save plain", ALL, dict(micro=2, save=str(plain)))]
    found = {"folder": folder} | spawn(folder / "8", 8, of(8, CASES) + keep)
    grow.apply(plain, BIGGER, grown, seed=1)
    load = {name: (n, layout, options | dict(load=str(saved), growth=GROWTH, first=3)) for name, (n, layout, options) in LOADS.items()}
    after = {"grown": (4, Layout(tp=2, pp=2), dict(config=BIGGER, load=str(grown), growth="of the checkpoint", first=3, micro=2))}
    for size in (2, 4):
        found |= spawn(folder / str(size), size, of(size, CASES) + of(size, load) + of(size, after))
    return found


@pytest.fixture(scope="module")
def alone():
    """The same steps in one process, without a process group; once for each distinct job."""
    seen = {}

    def run(**options):
        key = repr(sorted((k, str(v)) for k, v in options.items() if k != "micro"))
        if key not in seen:
            seen[key] = distributed.steps(parallel.World(), **{k: v for k, v in options.items() if k != "micro"})
        return seen[key]
    return run


@pytest.mark.parametrize("name", CASES)
def test_a_layout_computes_what_one_process_does(results, alone, name):
    """Three AdamW steps, clipped, from the same start: loss, gradient norm, every gradient of the last step, the weights after it and the
    held-out loss are those of one process on the whole batch. Float64, relative 1e-10: sums in another order; in fp32 1e-5 for the
    loss, 1e-4 for the norm."""
    size, layout, options = CASES[name]
    log, held_out, grads, weights = results[name]
    ref_log, ref_held_out, ref_grads, ref_weights = alone(**options)
    exact = options.get("dtype") != "float32"
    for (loss, norm), (ref_loss, ref_norm) in zip(log, ref_log, strict=True):
        assert loss == pytest.approx(ref_loss, rel=1e-10 if exact else 1e-5)
        assert norm == pytest.approx(ref_norm, rel=1e-10 if exact else 1e-4)
    assert any(norm > distributed.CLIP for _, norm in log), "clipping was not put to the test"
    assert held_out == pytest.approx(ref_held_out, rel=1e-10 if exact else 1e-5)             # before the steps and after
    assert set(grads) == set(ref_grads) == set(weights)
    for found, expected in ((grads, ref_grads), (weights, ref_weights)) if exact else ():
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-10 * max(1.0, value.abs().max().item()), msg=lambda m: f"{key}: {m}")


@pytest.mark.parametrize("name", LOADS)
def test_a_checkpoint_of_eight_processes_goes_on_in_any_layout(results, alone, name):
    """Saved by dp 2 x tp 2 x pp 2 after three steps, in mid-ramp, loaded by another layout, moments and all: the next three steps are
    those of one process that never stopped. Relative 1e-10."""
    log, held_out, _, weights = results[name]
    one = {k: v for k, v in alone(growth=GROWTH, count=6)[3].items()}
    expected = alone(growth=GROWTH, count=6)[0][3:]
    for found, reference in zip(log, expected, strict=True):
        assert found == pytest.approx(reference, rel=1e-10)
    for key, value in one.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-8, atol=1e-10, msg=lambda m: f"{key}: {m}")


def test_a_checkpoint_of_eight_processes_goes_on_in_one(results, alone):
    """The same in one process that has no process group, through the functions that every other command reads checkpoints with."""
    log, (before, _), _, weights = distributed.steps(parallel.World(), load=results["folder"] / "saved", growth=GROWTH, first=3)
    reference = alone(growth=GROWTH, count=6)
    for found, expected in zip(log, reference[0][3:], strict=True):
        assert found == pytest.approx(expected, rel=1e-10)
    for key, value in reference[3].items():
        torch.testing.assert_close(weights[key], value, rtol=1e-8, atol=1e-10)
    model, info = load_model(results["folder"] / "saved")
    x, y = distributed.batch(99, False)
    assert distributed.masked_loss(model, x, y) == pytest.approx(before, rel=1e-10)
    assert len(info["files"]) == 9               # a file of each process, and the table of contents


def test_grown_from_eight_processes_to_four(results):
    """Saved at dp 2 x tp 2 x pp 2, grown in all four dimensions on the disk, loaded at tp 2 x pp 2: the loss is that of before. 1e-10: the
    growth itself is exact to 1e-12."""
    before, after = results["save plain"][1][1], results["grown"][1][0]
    assert after == pytest.approx(before, rel=1e-10)
    model, _ = load_model(results["folder"] / "grown")
    assert distributed.masked_loss(model, *distributed.batch(99, False)) == pytest.approx(before, rel=1e-10)
