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


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every case of the table, run by three groups of processes."""
    found = {}
    for size in (2, 4, 8):
        found |= spawn(tmp_path_factory.mktemp("group") / str(size), size, [(name, layout, options) for name, (n, layout, options) in CASES.items() if n == size])
    return found


@pytest.fixture(scope="module")
def alone():
    """The same steps in one process, without a process group; once for each distinct job."""
    seen = {}

    def run(**options):
        key = repr(sorted((k, v) for k, v in options.items() if k != "micro"))
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
    assert held_out == pytest.approx(ref_held_out, rel=1e-10 if exact else 1e-5)
    assert set(grads) == set(ref_grads) == set(weights)
    for found, expected in ((grads, ref_grads), (weights, ref_weights)) if exact else ():
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-10 * max(1.0, value.abs().max().item()), msg=lambda m: f"{key}: {m}")
