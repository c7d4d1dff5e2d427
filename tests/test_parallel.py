"""Many processes compute what one does. The processes are spawned here, on gloo and the CPU; tests/distributed.py is what they run."""
import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import distributed  # noqa: E402
import grow  # noqa: E402
import parallel  # noqa: E402
import train  # noqa: E402
from distributed import CONFIG, GROWTH  # noqa: E402
from flm import FLM, PRESETS, find_checkpoint, load_model, read_info  # noqa: E402
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
    "tp2-compiled": (2, Layout(tp=2, sequence_parallel=True), dict(config=CONFIG.replace(n_layers=2), dtype="float32", compiled=True)),
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


EVALUATIONS = {
    "evaluate dp2": (2, Layout(dp=2), dict(micro=2)),
    "evaluate dp2 sharded": (2, Layout(dp=2, shard_optimizer=True), dict(micro=5)),
    "evaluate tp2": (2, Layout(tp=2, sequence_parallel=True), dict(micro=3)),
    "evaluate pp2": (2, Layout(pp=2), dict(micro=1)),
    "evaluate zbv": (2, Layout(pp=2, schedule="ZBVZeroBubble"), dict(micro=2)),
    "evaluate dp2 pp2": (4, Layout(dp=2, pp=2, schedule="Interleaved1F1B"), dict(micro=2)),
    "evaluate tp2 pp2": (4, Layout(tp=2, pp=2), dict(micro=4)),
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
        found |= spawn(folder / str(size), size, of(size, CASES) + of(size, load) + of(size, after) + of(size, EVALUATIONS))
    return found


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


@pytest.mark.parametrize("name", EVALUATIONS)
def test_all_ranks_evaluate(results, name):
    """train.evaluate on rows that no layout divides: losses, bits per byte, counts and the share of right labels are those of one
    process. Relative 1e-10; right labels are counted, so they are equal."""
    expected, found = distributed.evaluate(parallel.World(), 4), results[name]
    assert expected["val_tokens"] == 13 * 16 and expected["teacher_labels"] == 18 and 0 < expected["teacher_accuracy"] < 1
    assert found == pytest.approx(expected, rel=1e-10)


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


def test_a_checkpoint_that_lacks_a_process_is_refused(results, tmp_path):
    """Without the file of one of the eight processes, or with half of it, no command reads the checkpoint; the message names the file."""
    broken = shutil.copytree(results["folder"] / "saved", tmp_path / "broken")
    (broken / "__3_0.distcp").unlink()
    (broken / "__5_0.distcp").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"__3_0.distcp: [\d,]+ bytes expected, missing\n  __5_0.distcp: [\d,]+ bytes expected, 4 found"):
        load_model(broken)


def test_grown_from_eight_processes_to_four(results):
    """Saved at dp 2 x tp 2 x pp 2, grown in all four dimensions on the disk, loaded at tp 2 x pp 2: the loss is that of before. 1e-10: the
    growth itself is exact to 1e-12."""
    before, after = results["save plain"][1][1], results["grown"][1][0]
    assert after == pytest.approx(before, rel=1e-10)
    model, _ = load_model(results["folder"] / "grown")
    assert distributed.masked_loss(model, *distributed.batch(99, False)) == pytest.approx(before, rel=1e-10)


# ---- train.py under torchrun ----------------------------------------------------------------------------------------

# train.py with an accident: WHAT, done by RANK at step 3 of the first start. A restarted worker finds the mark of the first one.
ACCIDENT = """
import math, os, runpy, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch.distributed.checkpoint as dcp
import parallel
what, rank, mark, calls = sys.argv[2], sys.argv[3], Path(sys.argv[4]), [0, 0]
sys.argv = ["train.py", *sys.argv[5:]]
step, save = parallel.Worker.gradients, dcp.save
mine = os.environ["RANK"] == rank and not mark.exists()

def gradients(worker, *args):
    nats = step(worker, *args)
    calls[0] += 1
    if mine and calls[0] == 3 and what == "kill":
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if mine and calls[0] == 3 and what == "poison":
        parallel.local(worker.named[2][1].grad).view(-1)[0] = math.inf
    return nats

def saving(tensors, **options):
    calls[1] += 1
    if mine and calls[1] == 3 and what == "kill in a save":      # of step 4
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return save(tensors, **options)

parallel.Worker.gradients, dcp.save = gradients, saving
if mine and what == "another argument":
    sys.argv += ["--lr", "0.5"]
runpy.run_path(parallel.__file__.replace("parallel.py", "train.py"), run_name="__main__")
"""
SIZE = ["--model", "n_layers=2", "d_model=16", "n_heads=2", "head_dim=8", "d_ff=32", "max_seq_len=32", "mup_base_width=16"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A small corpus and the script of accidents."""
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "text").mkdir()
    for i in range(20):
        (folder / "text" / f"{i}.txt").write_text(f"document {i}: " + "the cat sat on the mat. " * 20)
    (folder / "teacher.jsonl").write_text("".join(json.dumps({"text": f"t{i}", "proposition": f"{i}", "label": i % 2}) + "\n" for i in range(400)))
    data.prepare({"text": sorted((folder / "text").iterdir())}, folder / "tokens", data.get_tokenizer("bytes"), teacher=[folder / "teacher.jsonl"])
    (folder / "accident.py").write_text(ACCIDENT)
    return folder


def torchrun(workshop, size, script, *words, launcher=(), out=None, dtype="float64", **environment):
    """Returns (exit code, output) of train.py on so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), *launcher, str(script), *map(str, words),
               "--data", str(workshop / "tokens"), "--device", "cpu", "--dtype", dtype, "--steps", "6", "--batch-size", "8", "--save-every", "2",
               "--eval-rows", "4", "--keep", "9", *SIZE, *(["--out", str(out)] if out else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, cwd=workshop,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    return done.returncode, done.stdout


def last_weights(run) -> dict:
    return dict(load_model(run)[0].named_parameters())


@pytest.mark.parametrize("what", ["kill", "kill in a save"])
def test_a_killed_rank_is_restarted(workshop, what, tmp_path):
    """kill -9 of rank 1 of a tp 2 x dp 2 run, in the middle of a step and of a save: torchrun starts all processes again, which go on from
    the last whole checkpoint; the run ends with the very weights of an undisturbed one, and a log without gaps."""
    options, undisturbed = ["--tp", "2"], workshop / "undisturbed"
    if not undisturbed.exists():
        code, output = torchrun(workshop, 4, Path(parallel.__file__).with_name("train.py"), *options, out=undisturbed)
        assert code == 0, output
    code, output = torchrun(workshop, 4, workshop / "accident.py", Path(parallel.__file__).parent, what, 1, tmp_path / "mark", "--auto-resume", *options,
                            launcher=["--max-restarts", "1"], out=tmp_path / "run", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert code == 0 and (tmp_path / "mark").exists(), output
    assert "going on with" in output             # the second start
    for (name, p), q in zip(last_weights(tmp_path / "run").items(), last_weights(undisturbed).values(), strict=True):
        assert torch.equal(p, q), name
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 7)) and steps == sorted(steps)


def test_a_run_grows_moves_and_is_evaluated(workshop, tmp_path):
    """A run with a teacher signal grows under tp 2 x pp 2 in bf16, with the same held-out loss in full precision before and after; its checkpoint
    is evaluated by two processes and by one, the same but for rounding, and the run goes on in one process."""
    stages = [{"config": {"n_layers": 2, "d_model": 16}}, {"config": {"n_layers": 4, "d_model": 32}, "start": 16, "ramp": 16}]
    (tmp_path / "stages.json").write_text(json.dumps(stages))
    run = tmp_path / "run"
    code, output = torchrun(workshop, 4, Path(parallel.__file__).with_name("train.py"), "--tp", 2, "--pp", 2, "--sequence-parallel", "--stages",
                            tmp_path / "stages.json", "--teacher-fraction", 0.25, "--eval-every", 3, out=run, dtype="bfloat16")
    assert code == 0, output
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    grown, = (line for line in log if "grown" in line)
    assert grown["loss_after"] == pytest.approx(grown["loss_before"], rel=1e-6) and "teacher_accuracy" in log[-1]
    alone = train.eval_only(str(run), {"device": "cpu", "dtype": "float32"})
    both = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(Path(parallel.__file__).with_name("train.py")),
                           "--eval-only", str(run), "--tp", "2", "--device", "cpu", "--dtype", "float32"], capture_output=True, text=True, timeout=240)
    assert train.describe(alone) in both.stdout, both.stdout + both.stderr
    s = train.resumed(str(run), dict(steps=8, tp=1, pp=1, dp=1, sequence_parallel=False))
    assert train.train(s, resume=True)["step"] == 8


def test_a_number_that_is_not_finite_stops_everyone(workshop, tmp_path):
    """An infinite gradient on one of four ranks: all stop before the optimizer, rank 0 says so once, and the checkpoint holds the weights of
    before. No rank is left waiting: the command ends by itself."""
    code, output = torchrun(workshop, 4, workshop / "accident.py", Path(parallel.__file__).parent, "poison", 3, tmp_path / "mark", "--tp", "2", "--pp",
                            "2", "--micro-batch", "2", out=tmp_path / "run")
    assert code == 1
    assert output.count("stopped before the optimizer") == 1 and "step 3 stopped before the optimizer: loss " in output
    assert read_info(find_checkpoint(tmp_path / "run"))["step"] == 2


def test_ranks_that_differ_are_named(workshop, tmp_path):
    """A rank that was started with another learning rate: one screen that names the option and the rank; no run begins."""
    code, output = torchrun(workshop, 2, workshop / "accident.py", Path(parallel.__file__).parent, "another argument", 1, tmp_path / "mark",
                            out=tmp_path / "run")
    assert code == 1 and "started with different arguments:\n  --lr: None on 1 (rank 0), 0.5 on 1 (rank 1)" in output      # 1: torchrun's own
    assert output.count("different arguments") == 1 and not (tmp_path / "run").exists()


def test_every_reason_at_once(workshop, tmp_path):
    """Too few processes, heads, d_ff, vocabulary and sequence that tp does not divide, layers that pp does not divide, a batch that does
    not split: one screen, from rank 0, with every number; no run begins."""
    code, output = torchrun(workshop, 2, Path(parallel.__file__).with_name("train.py"), "--tp", 3, "--pp", 5, "--dp", 3, "--sequence-parallel", out=tmp_path / "run")
    for line in ("dp 3 x tp 3 x pp 5 = 45 processes, torchrun started 2", "n_heads 2: must be a multiple of --tp 3", "d_ff 32: must be a multiple of --tp 3",
                 "max_seq_len 32: must be a multiple of --tp 3", "n_layers 2: must be a multiple of the 5 stages", "--batch-size 8: must be a multiple of --dp 3"):
        assert output.count(line) == 1, output
    assert "Traceback" not in output.split("train.py: this layout does not fit")[0] and not (tmp_path / "run").exists()


def test_restarts_that_cannot_work_are_refused(monkeypatch):
    """Processes that torchrun restarts meet in the store of their first start, unless it is told not to share it: said before the first."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --max-restarts"):
        parallel.connect()


def test_without_torchrun_the_command_is_named(capsys):
    """--tp 2 in one process: the message names the command that starts two."""
    with pytest.raises(ValueError, match="dp 1 x tp 2 x pp 1 = 2 processes, this is one: start them with torchrun --standalone --nproc-per-node 2"):
        train.main(["--tp", "2", *SIZE])


def test_two_runs_do_not_share_a_folder(workshop, tmp_path, monkeypatch):
    """While one run writes a folder, a second one is refused, and says by whom it is written; afterwards the folder is free."""
    monkeypatch.chdir(tmp_path)
    s = train.Settings(model=tuple(SIZE[1:]), data=str(workshop / "tokens"), steps=2, batch_size=4, eval_rows=2, device="cpu", dtype="float64", out="run")
    train.train(s, stop_at=1)
    with train.sole_writer(Path("run")):
        with pytest.raises(ValueError, match=f"run is being written by another run .process {os.getpid()} on "):
            train.train(train.resumed("run", {}), resume=True)
    assert train.train(train.resumed("run", {}), resume=True)["step"] == 2


def test_activation_checkpointing_in_one_process(workshop, tmp_path, monkeypatch):
    """--activation-checkpointing counts without torchrun too, before a growth in the run and after it: every block is computed again in every
    step, and the weights are bit for bit those of a run without it."""
    monkeypatch.chdir(tmp_path)
    stages = [{"config": {"n_layers": 2, "d_model": 16}}, {"config": {"n_layers": 3}, "start": 4, "ramp": 4}]
    Path("stages.json").write_text(json.dumps(stages))
    s = train.Settings(model=tuple(SIZE[1:]), data=str(workshop / "tokens"), steps=2, batch_size=4, eval_rows=2, eval_every=9, device="cpu", dtype="float64",
                       stages="stages.json", out="plain")
    train.train(s)
    calls, real = [], parallel.checkpoint
    monkeypatch.setattr(parallel, "checkpoint", lambda *args, **options: calls.append(torch.is_grad_enabled()) or real(*args, **options))
    train.train(dataclasses.replace(s, activation_checkpointing=True, out="again"))
    assert sum(calls) == 2 + 3                   # the two blocks of step 1, the three of step 2; evaluations keep no gradient
    for (name, p), q in zip(last_weights("again").items(), last_weights("plain").values(), strict=True):
        assert torch.equal(p, q), name


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 64), st.integers(1, 8), st.sampled_from(sorted(parallel.SCHEDULES)), st.booleans())
@settings(deadline=None, max_examples=300)
def test_the_validator_says_no_exactly_when_something_does_not_divide(dp, tp, pp, batch, micro, schedule, sequence):
    """check finds nothing if and only if heads, d_ff, vocabulary (and sequence) divide by tp, layers by the pipeline's stages, rows by dp and
    micro-batches, and the micro-batches suffice for the schedule; each finding names its numbers."""
    layout = Layout(dp, tp, pp, sequence_parallel=sequence, schedule=schedule)
    problems = parallel.check(layout, CONFIG, batch, micro)
    stages = pp * (1 if schedule in ("1F1B", "GPipe") else 2) if pp > 1 else 1
    fits = CONFIG.n_heads % tp == CONFIG.d_ff % tp == CONFIG.vocab_size % tp == CONFIG.n_layers % stages == batch % dp == 0
    fits = fits and batch // dp % micro == 0 and not (sequence and (tp == 1 or CONFIG.max_seq_len % tp))
    if pp > 1 and fits:
        n = batch // dp // micro
        fits = n >= stages and (stages == pp or n % pp == 0)
    assert (problems == []) == bool(fits)


@given(st.integers(1, 6), st.integers(1, 50), st.integers(1, 9), st.sampled_from(sorted(parallel.SCHEDULES)))
def test_a_pipeline_gets_whole_micro_batches(pp, rows, micro, schedule):
    """The rows that an evaluation is filled up to are the fewest that a pipeline takes: what the validator accepts as one dp rank's batch."""
    layout = Layout(pp=pp, schedule=schedule)
    deep = CONFIG.replace(n_layers=layout.stages)
    n = parallel.rows_needed(layout, rows, micro)
    if pp == 1:
        assert n == rows
        return
    assert n >= rows and not parallel.check(layout, deep, n, micro)
    assert all(parallel.check(layout, deep, k, micro) for k in range(rows, n))


# ---- The exercises of tutorials/05-parallel.md ------------------------------------------------------------------------

def test_05_exercise_1_micro_batches_against_the_bubble():
    """The bubble of 1F1B is (p - 1) / (m + p - 1): 3 / (m + 3) falls below 5% at m = 58, and is 1.6% at 180. The drawn timetable agrees."""
    bubble = lambda m: parallel.timetable(Layout(pp=4), m)[1]
    assert bubble(57) == pytest.approx(0.05) and bubble(58) < 0.05
    assert bubble(180) == pytest.approx(3 / 183) == pytest.approx(0.0164, abs=1e-4)


def test_05_exercise_2_one_sum_divided_once():
    """(256 * 2.0 + 8 * 5.0) / 264 = 2.091 nats; the mean of the means is 3.5. The engines average over dp = 2 ranks, so each rank's sum is
    multiplied by dp / count = 2 / 264: the mean of (2 / 264) * 512 and (2 / 264) * 40 is 552 / 264."""
    sums, count = (256 * 2.0, 8 * 5.0), 264
    assert sum(sums) / count == pytest.approx(2.091, abs=5e-4)
    assert sum(2 / count * nats for nats in sums) / 2 == pytest.approx(sum(sums) / count)
    assert (2.0 + 5.0) / 2 == 3.5


def test_05_exercise_3_what_two_processes_hold_whole():
    """The LayerNorms (gain and bias, two in a block and one at the end) and the biases of o and down, which are added once, after the sum:
    6 C in each block, 2 C at the end. In flm-101b 4,935,680 of 101,701,570,560: 0.005%."""
    config = PRESETS["flm-101b"]
    with torch.device("meta"):
        model = FLM(config)
    whole = sum(p.numel() for name, p in model.named_parameters() if "norm" in name or name.endswith(("o.bias", "down.bias")))
    assert whole == 6 * 10240 * 80 + 2 * 10240 == 4_935_680
    assert whole / sum(p.numel() for p in model.parameters()) == pytest.approx(4.85e-5, rel=0.01)


def test_05_exercise_4_bytes_on_a_gpu():
    """The first stage has 20 blocks and the embedding, 26.2 billion parameters; tp 4 leaves 6.55 billion to a GPU, 16 bytes each: 105 GB without
    the distributed optimizer, more than the card has, and 8.7 GB with it."""
    config = PRESETS["flm-101b"]
    with torch.device("meta"):
        part = FLM(config, range(20), True, False)
    size = sum(p.numel() for p in part.parameters())
    assert size / 4 == pytest.approx(6.55e9, rel=0.001)
    assert 16 * size / 4 / 1e9 == pytest.approx(104.8, abs=0.1) and 16 * size / 4 / 12 / 1e9 == pytest.approx(8.73, abs=0.01)
