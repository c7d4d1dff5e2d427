"""Many ranks compute what one process does. tests/distributed.py is what the ranks run, on gloo and
the CPU. What train.py does under torchrun is in test_torchrun.py."""

import pickle
import shutil
import sys
from pathlib import Path

import distributed
import pytest
import torch
from distributed import CONFIG, DEEP, GROWTH
from hypothesis import given
from hypothesis import strategies as st
from processes import Shared, start, wait

import parallel
from checkpoint import load_model
from flm import FLM
from parallel import PIPELINE_SCHEDULES, Layout
from settings import Settings, check_settings

UNTIED = CONFIG.replace(tie_embeddings=False)
TELE = UNTIED.replace(
    norm="rmsnorm", activation="swiglu", rotary="rope", bias=False
)  # all fields of the variant
STANDARD = CONFIG.replace(mup=False)
SHALLOW = CONFIG.replace(n_layers=2)
INTERLEAVED = "Interleaved1F1B"

# Each table: name -> (number of ranks, layout, options of distributed.steps or .evaluate).
CASES = {
    "dp2": (2, Layout(dp=2), dict(teacher=True)),
    "dp2-accum": (2, Layout(dp=2), dict(teacher=True, micro=2, growth=GROWTH, mask=True)),
    "dp2-shard": (2, Layout(dp=2, shard_optimizer=True), dict(micro=4, teacher=True)),
    "dp2-shard-ckpt": (
        2,
        Layout(dp=2, shard_optimizer=True, activation_checkpointing=True),
        dict(config=TELE, growth=GROWTH),
    ),
    "dp2-reshard": (2, Layout(dp=2, reshard=True), dict(micro=4, teacher=True, growth=GROWTH)),
    "tp2": (2, Layout(tp=2), dict(teacher=True, micro=8)),
    "tp2-untied": (
        2,
        Layout(tp=2, activation_checkpointing=True),
        dict(config=UNTIED, growth=GROWTH),
    ),
    "tp2-tele": (2, Layout(tp=2), dict(config=TELE, growth=GROWTH, micro=8)),
    "tp2-seq": (2, Layout(tp=2, sequence_parallel=True), dict(growth=GROWTH, teacher=True)),
    "tp2-seq-ckpt": (
        2,
        Layout(tp=2, sequence_parallel=True, activation_checkpointing=True),
        dict(config=STANDARD, micro=4, mask=True),
    ),
    "pp2": (2, Layout(pp=2), dict(teacher=True, micro=4)),
    "pp2-gpipe": (
        2,
        Layout(pp=2, schedule="GPipe", activation_checkpointing=True),
        dict(config=UNTIED, micro=2, mask=True),
    ),
    "pp2-inter": (2, Layout(pp=2, schedule=INTERLEAVED), dict(growth=GROWTH, micro=4)),
    "pp2-inter-teacher": (2, Layout(pp=2, schedule=INTERLEAVED), dict(teacher=True, micro=2)),
    "dp2-tp2": (4, Layout(dp=2, tp=2), dict(growth=GROWTH, teacher=True)),
    "dp2-tp2-seq": (4, Layout(dp=2, tp=2, sequence_parallel=True), dict(micro=2)),
    "dp2-tp2-reshard": (4, Layout(dp=2, tp=2, reshard=True), dict(config=UNTIED, micro=4)),
    "dp2-pp2": (4, Layout(dp=2, pp=2), dict(micro=2, teacher=True)),
    "dp2-pp2-inter": (
        4,
        Layout(dp=2, pp=2, schedule=INTERLEAVED),
        dict(config=TELE, growth=GROWTH, micro=1),
    ),
    "tp2-pp2": (4, Layout(tp=2, pp=2), dict(micro=4, growth=GROWTH)),
    "tp2-pp2-deep": (4, Layout(tp=2, pp=2), dict(config=DEEP, micro=4, growth=GROWTH)),
    "tp2-pp2-seq-inter": (
        4,
        Layout(tp=2, pp=2, sequence_parallel=True, schedule=INTERLEAVED),
        dict(config=STANDARD, micro=4, teacher=True, mask=True),
    ),
    "pp4": (4, Layout(pp=4), dict(micro=2)),
    "dp2-tp2-pp2": (8, Layout(dp=2, tp=2, pp=2), dict(micro=2, teacher=True, growth=GROWTH)),
    "dp2-tp2-pp2-all": (
        8,
        Layout(dp=2, tp=2, pp=2, sequence_parallel=True, activation_checkpointing=True),
        dict(config=TELE, micro=4),
    ),
    "tp2-pp2-fp32": (
        4,
        Layout(tp=2, pp=2, sequence_parallel=True),
        dict(micro=4, dtype="float32"),
    ),
    "dp2-fp32": (2, Layout(dp=2), dict(dtype="float32")),
    "tp2-compiled": (
        2,
        Layout(tp=2, sequence_parallel=True),
        dict(config=SHALLOW, dtype="float32", compiled=True, mask=True),
    ),
}
EVALUATIONS = {
    "evaluate dp2": (2, Layout(dp=2), dict(micro=2)),
    "evaluate dp2 sharded": (2, Layout(dp=2, shard_optimizer=True), dict(micro=5)),
    "evaluate tp2": (2, Layout(tp=2, sequence_parallel=True), dict(micro=3)),
    "evaluate pp2": (2, Layout(pp=2), dict(micro=1)),
    "evaluate pp2 interleaved": (2, Layout(pp=2, schedule=INTERLEAVED), dict(micro=2)),
    "evaluate dp2 pp2": (4, Layout(dp=2, pp=2, schedule=INTERLEAVED), dict(micro=2)),
    "evaluate tp2 pp2": (4, Layout(tp=2, pp=2), dict(micro=4)),
}
# A checkpoint of eight ranks, saved in mid-ramp: the layouts that load it and go on.
LOADS = {
    "8 to tp2": (2, Layout(tp=2, sequence_parallel=True), dict()),
    "8 to pp2": (2, Layout(pp=2), dict(micro=4)),
    "8 to dp2": (2, Layout(dp=2), dict()),
    "8 to dp2 sharded": (2, Layout(dp=2, shard_optimizer=True), dict()),
    "8 to dp4 sharded": (4, Layout(dp=4, shard_optimizer=True), dict()),
    "8 to tp4": (4, Layout(tp=4), dict()),
    "8 to tp2 pp2": (4, Layout(tp=2, pp=2, schedule=INTERLEAVED), dict(micro=4)),
}


class Groups:
    """Results of the tables' cases. Each group of ranks runs once, when a test first needs it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.saved, self.plain, self.grown = folder / "saved", folder / "plain", folder / "grown"
        self.groups = {size: Shared(lambda size=size: self.run(size)) for size in (2, 4, 8)}

    def cases(self, size: int) -> list:
        """(name, layout, options) of all that a group of this size runs, in order."""
        load = dict(load=self.saved, growth=GROWTH, first=3)
        loads = {name: (n, lay, options | load) for name, (n, lay, options) in LOADS.items()}
        all_axes, two_axes = Layout(dp=2, tp=2, pp=2), Layout(tp=2, pp=2)
        grown = dict(config=distributed.BIGGER, load=self.grown, growth="of the checkpoint")
        more = {
            "save": (8, all_axes, dict(micro=2, growth=GROWTH, save=self.saved)),
            "save plain": (8, all_axes, dict(config=DEEP, micro=2, save=self.plain)),
            "grow": (8, all_axes, dict(source=self.plain, out=self.grown)),
            "grown": (4, two_axes, dict(micro=2, first=3, **grown)),
        }
        tables = CASES | EVALUATIONS | loads | more
        return [(name, lay, options) for name, (n, lay, options) in tables.items() if n == size]

    def run(self, size: int) -> Path:
        """Run a group of ranks; returns the folder of its results."""
        if size < 8:
            self.groups[8]()  # the others load its checkpoints
        folder = self.folder / str(size)
        folder.mkdir()
        (folder / "cases.pickle").write_bytes(pickle.dumps(self.cases(size)))
        log = folder / "log"
        code = wait(start([sys.executable, distributed.__file__, folder, size], log), log)
        if code:
            pytest.fail(f"the group of {size} ranks failed\n{log.read_text()}", pytrace=False)
        return folder / "results"

    def __getitem__(self, key: tuple[int, str]):
        """The result of a case, given the number of its ranks and its name."""
        size, name = key
        return pickle.loads((self.groups[size]() / f"{name}.pickle").read_bytes())


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Every case of the tables, run by three groups of ranks."""
    return Groups(tmp_path_factory.mktemp("groups"))


@pytest.fixture(scope="module")
def alone():
    """The same steps in one process, without a process group; once for each distinct job."""
    seen = {}

    def run(**options):
        options = {k: v for k, v in options.items() if k not in ("micro", "compiled")}
        key = repr(sorted((k, str(v)) for k, v in options.items()))
        if key not in seen:
            seen[key] = distributed.steps(parallel.World(), **options)
        return seen[key]

    return run


def assert_tensors_equal(found: dict, expected: dict):
    """Equal but for the order of sums: relative 1e-8, and 1e-10 of the largest number."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        atol = 1e-10 * max(1.0, value.abs().max().item())
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=atol, msg=message)


@pytest.mark.parametrize("name", CASES)
def test_a_layout_computes_what_one_process_does(groups, alone, name):
    """Three AdamW steps, clipped, from the same start: loss, gradient norm, every gradient of the
    last step, the weights after it and the held-out loss are those of one process on the whole
    batch. Float64, relative 1e-10: sums in another order; in fp32 1e-5 for the loss, 1e-4 for the
    norm."""
    size, _, options = CASES[name]
    log, held_out, grads, weights = groups[size, name]
    expected_log, expected_held_out, expected_grads, expected_weights = alone(**options)
    exact = options.get("dtype") != "float32"
    for (loss, norm), (expected_loss, expected_norm) in zip(log, expected_log, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-10 if exact else 1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-10 if exact else 1e-4)
    assert any(norm > distributed.CLIP for _, norm in log), "clipping was not put to the test"
    # Before the steps and after them.
    assert held_out == pytest.approx(expected_held_out, rel=1e-10 if exact else 1e-5)
    assert set(grads) == set(expected_grads) == set(weights)
    if exact:
        assert_tensors_equal(grads, expected_grads)
        assert_tensors_equal(weights, expected_weights)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_all_ranks_evaluate(groups, name):
    """train.evaluate on rows that no layout divides: losses, those of each source, bits per byte,
    counts and the share of right labels are those of one process. Relative 1e-10; right labels are
    counted, so they are equal."""
    found, expected = groups[EVALUATIONS[name][0], name], distributed.evaluate(parallel.World(), 4)
    assert expected["val_tokens"] == 13 * 16 and expected["teacher_labels"] == 18
    assert 0 < expected["teacher_accuracy"] < 1
    for source, part in expected.pop("val_by_source").items():
        assert found["val_by_source"][source] == pytest.approx(part, rel=1e-10)
    del found["val_by_source"]
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", LOADS)
def test_a_checkpoint_of_eight_ranks_goes_on_in_any_layout(groups, alone, name):
    """Saved by dp 2 x tp 2 x pp 2 after three steps, in mid-ramp, loaded by another layout, moments
    and all: the next three steps are those of one process that never stopped. Relative 1e-10."""
    log, _, _, weights = groups[LOADS[name][0], name]
    expected_log, _, _, expected_weights = alone(growth=GROWTH, count=6)
    for found, expected in zip(log, expected_log[3:], strict=True):
        assert found == pytest.approx(expected, rel=1e-10)
    assert_tensors_equal(weights, expected_weights)


def test_a_checkpoint_of_eight_ranks_goes_on_in_one(groups, alone):
    """The same in one process without a process group, and through load_model, with which every
    other command reads a checkpoint."""
    groups[8, "save"]
    log, (before, _), _, weights = distributed.steps(
        parallel.World(), load=groups.saved, growth=GROWTH, first=3
    )
    expected_log, _, _, expected_weights = alone(growth=GROWTH, count=6)
    for found, expected in zip(log, expected_log[3:], strict=True):
        assert found == pytest.approx(expected, rel=1e-10)
    assert_tensors_equal(weights, expected_weights)
    model, info = load_model(groups.saved)
    assert loss(model) == pytest.approx(before, rel=1e-10)
    assert len(info["files"]) == 9  # a file of each rank, and the table of contents


def loss(model: FLM) -> float:
    """The held-out loss of distributed.steps, in nats, summed."""
    with torch.no_grad():
        return model(*distributed.batch(99, False)).item()


def test_a_checkpoint_that_lacks_a_rank_is_refused(groups, tmp_path):
    """Without the file of one of the eight ranks, or with half of it, no command reads the
    checkpoint; the message names the files."""
    groups[8, "save"]
    broken = shutil.copytree(groups.saved, tmp_path / "broken")
    (broken / "__3_0.distcp").unlink()
    (broken / "__5_0.distcp").write_bytes(b"half")
    with pytest.raises(ValueError) as error:
        load_model(broken)
    lines = str(error.value).splitlines()
    (missing,) = [line for line in lines if "__3_0.distcp" in line]
    (cut_off,) = [line for line in lines if "__5_0.distcp" in line]
    assert missing.endswith("bytes expected, missing")
    assert cut_off.endswith("bytes expected, 4 found")


def test_grown_from_eight_ranks_to_four(groups):
    """Saved at dp 2 x tp 2 x pp 2, grown in all four dimensions on the disk, loaded at tp 2 x pp 2:
    the loss is that of before, although CompleteP's multiplier is another one. 1e-10: the growth
    itself is exact to 1e-12."""
    before, after = groups[8, "save plain"][1][1], groups[4, "grown"][1][0]
    assert after == pytest.approx(before, rel=1e-10)
    model, _ = load_model(groups.grown)
    assert loss(model) == pytest.approx(before, rel=1e-10)


# --------------------------------------------------------------------------------------------------
# Which layouts fit

schedules = st.sampled_from(sorted(PIPELINE_SCHEDULES))
axis = st.integers(1, 6)


@pytest.mark.quick
@given(axis, axis, axis, st.integers(1, 64), st.integers(1, 8), schedules, st.booleans())
def test_a_layout_is_refused_exactly_when_something_does_not_divide(
    dp, tp, pp, batch, micro, schedule, sequence
):
    """check_layout finds nothing if and only if tp divides heads, d_ff and vocabulary (and the
    sequence), the pipeline stages divide the layers, dp and micro-batches divide the rows, and the
    micro-batches are enough for the pipeline schedule."""
    layout = Layout(dp, tp, pp, sequence_parallel=sequence, schedule=schedule)
    problems = parallel.check_layout(layout, CONFIG, batch, micro)
    stages = pp * (2 if schedule == INTERLEAVED else 1) if pp > 1 else 1
    fits = CONFIG.n_heads % tp == CONFIG.d_ff % tp == CONFIG.vocab_size % tp == 0
    fits = fits and CONFIG.n_layers % stages == batch % dp == 0 and batch // dp % micro == 0
    fits = fits and not (sequence and (tp == 1 or CONFIG.max_seq_len % tp))
    if pp > 1 and fits:
        n = batch // dp // micro
        fits = n >= stages and (stages == pp or n % pp == 0)
    assert (problems == []) == bool(fits)


@pytest.mark.quick
@given(axis, st.integers(1, 50), st.integers(1, 9), schedules)
def test_a_pipeline_gets_whole_micro_batches(pp, rows, micro, schedule):
    """rows_needed is the smallest number of rows, at least `rows`, that the validator accepts as
    the batch of one dp rank."""
    layout = Layout(pp=pp, schedule=schedule)
    deep = CONFIG.replace(n_layers=layout.pipeline_stages)
    n = parallel.rows_needed(layout, rows, micro)
    if pp == 1:
        assert n == rows
        return
    assert n >= rows and not parallel.check_layout(layout, deep, n, micro)
    assert all(parallel.check_layout(layout, deep, k, micro) for k in range(rows, n))


@pytest.mark.quick
@pytest.mark.parametrize("axes", [dict(dp=1), dict(dp=2, pp=2)])
def test_resharding_without_a_use_is_refused(axes):
    """One dp rank has nothing to gather, and a pipeline gathers once for all micro-batches."""
    (problem,) = parallel.check_layout(Layout(**axes, reshard=True), CONFIG, 8)
    assert problem.startswith("--reshard: ") and "add --no-reshard" in problem


@pytest.mark.quick
def test_a_layout_names_every_axis_below_one_and_an_unknown_schedule():
    """No axis may be 0 or negative; a pipeline schedule that no run may use is refused, with those
    that a run may use. (check_layout is only asked of layouts that pass this.)"""
    found = check_settings(Settings(dp=0, tp=-1, schedule="ZBVZeroBubble"))
    assert found == [
        "--dp 0: must be at least 1",
        "--tp -1: must be at least 1",
        "--schedule ZBVZeroBubble: must be one of 1F1B, GPipe, Interleaved1F1B",
    ]
