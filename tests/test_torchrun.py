"""train.py under torchrun: killed ranks, refusals, growth over several ranks. All on gloo and the
CPU."""

import json
import sys
from pathlib import Path

import pytest
import torch
from processes import ROOT, Shared, start, wait

import data
import parallel
import train
from checkpoint import find_checkpoint, load_model, read_info

# train.py with accidents on RANK. ACCIDENTS names one for each start, separated by commas; a start
# for which there is none is undisturbed.
ACCIDENT = """
import math, os, runpy, signal, sys
from pathlib import Path
import parallel
from checkpoint import StepWriter
accidents, rank, calls = sys.argv[1].split(","), sys.argv[2], [0]
sys.argv = ["train.py", *sys.argv[3:]]
step, write = parallel.Worker.gradients, StepWriter.write_data
start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
mine = os.environ["RANK"] == rank and start < len(accidents)
what = accidents[start] if mine else "nothing"

def gradients(worker, *args, **options):
    nats = step(worker, *args, **options)
    calls[0] += 1
    if calls[0] == 3 and what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if calls[0] == 3 and what == "poison":
        parallel.local(worker.named[2][1].grad).view(-1)[0] = math.inf
    return nats

def write_data(writer, *args):
    if writer.path.name == "step-00000004.tmp" and what == "kill in a save":
        os.kill(os.getpid(), signal.SIGKILL)
    return write(writer, *args)

parallel.Worker.gradients, StepWriter.write_data = gradients, write_data
if what == "another argument":
    sys.argv += ["--lr", "0.5"]
runpy.run_path(parallel.__file__.replace("parallel.py", "train.py"), run_name="__main__")
"""
FIELDS = "n_layers=2 d_model=16 n_heads=2 head_dim=8 d_ff=32 max_seq_len=32 mup_base_width=16"
SIZE = ["--model", *FIELDS.split()]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


class Workshop:
    """A folder with a small corpus and the program of accidents."""

    def __init__(self, folder: Path):
        self.folder, self.corpus = folder, folder / "tokens"
        self.accident = folder / "accident.py"
        self.accident.write_text(ACCIDENT)
        (folder / "text").mkdir()
        for i in range(20):
            text = f"document {i}: " + "the cat sat on the mat. " * 20
            (folder / "text" / f"{i}.txt").write_text(text)
        items = [{"text": f"t{i}", "proposition": f"{i}", "label": i % 2} for i in range(400)]
        teacher = folder / "teacher.jsonl"
        teacher.write_text("".join(json.dumps(item) + "\n" for item in items))
        sources = {"text": sorted((folder / "text").iterdir())}
        data.prepare(sources, self.corpus, data.get_tokenizer("bytes"), teacher=[teacher])
        self.undisturbed = Shared(self.run_undisturbed)

    def options(self, out: Path, dtype: str = "float64") -> list:
        """The options of a run of six steps."""
        words = "--device cpu --steps 6 --batch-size 8 --save-every 2 --eval-rows 4 --keep 9"
        return [*words.split(), *SIZE, "--data", self.corpus, "--dtype", dtype, "--out", out]

    def torchrun(self, size: int, out: Path, *words, script=None, launcher=(), dtype="float64"):
        """(exit code, what was printed) of train.py, or another script, on so many ranks."""
        script = script or [ROOT / "train.py"]
        launch = [*TORCHRUN, "--standalone", "--nproc-per-node", size, *launcher]
        log = out.with_name(f"{out.name}.log")
        command = [*launch, *script, *words, *self.options(out, dtype)]
        code = wait(start(command, log, cwd=self.folder), log)
        return code, log.read_text()

    def run_undisturbed(self) -> dict:
        """The last weights of a tp 2 x dp 2 run without an accident."""
        code, output = self.torchrun(4, self.folder / "undisturbed", "--tp", 2)
        assert code == 0, output
        return last_weights(self.folder / "undisturbed")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("torchrun"))


def last_weights(run: Path) -> dict:
    return dict(load_model(run)[0].named_parameters())


def assert_same_weights(found: dict, expected: dict):
    """Equal bit for bit."""
    assert set(found) == set(expected)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------
# Ranks that fail


def test_a_killed_rank_is_restarted(workshop, tmp_path):
    """kill -9 of rank 1 of a tp 2 x dp 2 run, in the middle of a step, and in the next start in the
    middle of a save: torchrun starts all ranks again, which go on from the last whole checkpoint;
    the run ends with the very weights of an undisturbed one, and a log without gaps."""
    expected, run = workshop.undisturbed(), tmp_path / "run"
    accident = [workshop.accident, "kill,kill in a save", 1]
    restarts = ["--max-restarts", 2]
    code, output = workshop.torchrun(
        4, run, "--auto-resume", "--tp", 2, script=accident, launcher=restarts
    )
    assert code == 0, output
    assert output.count(f"going on with {run}\n") == 2  # the second start, the third
    assert_same_weights(last_weights(run), expected)
    steps = [line["step"] for line in read_log(run)]
    assert sorted(set(steps)) == list(range(1, 7)) and steps == sorted(steps)


def test_a_number_that_is_not_finite_stops_all_ranks(workshop, tmp_path):
    """An infinite gradient on one of four ranks: all stop before the optimizer, rank 0 says so
    once and names the newest sound checkpoint, here that of the start. No rank is left waiting: the
    command ends by itself."""
    accident = [workshop.accident, "poison", 3]
    words = ["--tp", 2, "--pp", 2, "--micro-batch", 2]
    code, output = workshop.torchrun(4, tmp_path / "run", *words, script=accident)
    assert code == 1
    assert output.count("stopped before the optimizer") == 1
    assert "step 3 stopped before the optimizer: loss " in output
    assert read_info(find_checkpoint(tmp_path / "run"))["step"] == 0


# --------------------------------------------------------------------------------------------------
# Mistakes


def test_ranks_that_differ_are_named(workshop, tmp_path):
    """A rank that was started with another learning rate: one screen that names the option and the
    rank; no run begins."""
    accident = [workshop.accident, "another argument", 1]
    code, output = workshop.torchrun(2, tmp_path / "run", script=accident)
    assert code == 1  # torchrun's own
    assert output.count("different arguments") == 1
    assert "rank 1: started with different arguments than rank 0:\n  --lr 0.5, not None" in output
    assert not (tmp_path / "run").exists()


def test_every_reason_at_once(workshop, tmp_path):
    """Too few ranks; heads, d_ff, vocabulary and sequence that tp does not divide; layers that pp
    does not divide; a batch that does not split: one screen, from rank 0, with every number; no run
    begins. Once: torchrun was told to restart three times, but a mistake ends the job."""
    words, restarts = (
        ["--tp", 3, "--pp", 5, "--dp", 3, "--sequence-parallel"],
        ["--max-restarts", 3],
    )
    code, output = workshop.torchrun(2, tmp_path / "run", *words, launcher=restarts)
    assert code == 1  # torchrun's own
    for line in (
        "dp 3 x tp 3 x pp 5 = 45 processes, but torchrun started 2",
        "n_heads 2: must be a multiple of --tp 3",
        "d_ff 32: must be a multiple of --tp 3",
        "max_seq_len 32: must be a multiple of --tp 3",
        "n_layers 2: must be a multiple of the 5 pipeline stages",
        "--batch-size 8: must be a multiple of --dp 3",
    ):
        assert output.count(line) == 1, output
    assert "Traceback" not in output.split("train.py: this layout does not fit")[0]
    assert not (tmp_path / "run").exists()


def test_without_torchrun_the_command_is_named():
    """--tp 2 in one process: the message names the command that starts two."""
    with pytest.raises(ValueError) as error:
        train.main(["--tp", "2", *SIZE])
    assert "dp 1 x tp 2 x pp 1 = 2 processes, but this is one" in str(error.value)
    assert "torchrun --standalone --nproc-per-node 2" in str(error.value)


# --------------------------------------------------------------------------------------------------
# Growth, evaluation, activation checkpointing


def test_a_run_grows_moves_and_is_evaluated(workshop, tmp_path):
    """A run with a teacher signal grows under tp 2 x pp 2 in bf16, with the same held-out loss in
    full precision before and after; each rank has a profile, and rank 0 alone prints one; its checkpoint is evaluated by two ranks and by one, the same
    but for rounding, and the run goes on in one process."""
    small, large = {"n_layers": 2, "d_model": 16}, {"n_layers": 4, "d_model": 32}
    stages = [{"config": small}, {"config": large, "start": 16, "ramp": 16}]
    (tmp_path / "stages.json").write_text(json.dumps(stages))
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["--tp", 2, "--pp", 2, "--sequence-parallel", "--stages", tmp_path / "stages.json"]
    words += ["--teacher-fraction", 0.25, "--eval-every", 3, "--profile", 2]
    code, output = workshop.torchrun(4, run, *words, dtype="bfloat16")
    assert code == 0, output
    assert output.count("profile of steps 4 to 5, cpu time") == 1
    assert len(list(run.glob("trace-step-4-rank-*.json"))) == 4
    lines = read_log(run)
    (grown,) = (line for line in lines if "grown" in line)
    assert grown["loss_after"] == pytest.approx(grown["loss_before"], rel=1e-6)
    assert "teacher_accuracy" in lines[-1]
    one = train.eval_only(str(run), {"device": "cpu", "dtype": "float32"})
    two_ranks = [*TORCHRUN, "--standalone", "--nproc-per-node", 2, ROOT / "train.py"]
    two_ranks += ["--eval-only", run, "--tp", 2, "--device", "cpu", "--dtype", "float32"]
    assert wait(start(two_ranks, log), log) == 0
    assert train.describe(one) in log.read_text()
    changes = dict(steps=8, tp=1, pp=1, dp=1, sequence_parallel=False)
    assert train.train(train.resumed(str(run), changes), resume=True)["step"] == 8


def small_run(workshop, **changes) -> train.Settings:
    """The settings of a run of two steps in one process."""
    fixed = dict(steps=2, batch_size=4, eval_rows=2, device="cpu", dtype="float64")
    given = fixed | dict(model=tuple(SIZE[1:]), data=str(workshop.corpus)) | changes
    return train.Settings(**given)


def test_activation_checkpointing_in_one_process(workshop, tmp_path, monkeypatch):
    """--activation-checkpointing counts without torchrun too, before a growth in the run and after
    it: every block is computed again in every step, and the weights are bit for bit those of a run
    without it."""
    monkeypatch.chdir(tmp_path)
    stages = [
        {"config": {"n_layers": 2, "d_model": 16}},
        {"config": {"n_layers": 3}, "start": 4, "ramp": 4},
    ]
    Path("stages.json").write_text(json.dumps(stages))
    plain = dict(stages="stages.json", eval_every=9)
    train.train(small_run(workshop, out="plain", **plain))
    calls, checkpoint = [], parallel.checkpoint

    def counted(*args, **options):
        calls.append(torch.is_grad_enabled())
        return checkpoint(*args, **options)

    monkeypatch.setattr(parallel, "checkpoint", counted)
    train.train(small_run(workshop, out="again", activation_checkpointing=True, **plain))
    # The two blocks of step 1, the three of step 2; evaluations keep no gradient.
    assert sum(calls) == 2 + 3
    assert_same_weights(last_weights("again"), last_weights("plain"))


def test_two_runs_do_not_share_a_folder(workshop, tmp_path, monkeypatch):
    """While another program holds the lock of a run's folder, the run is refused, and the message
    says who holds it; afterwards the folder is free."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.chdir(tmp_path)
    train.train(small_run(workshop, out="run"), stop_at=1)
    with open("run/lock", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(
            ValueError, match=r"run is being written by another run .process \d+ on "
        ):
            train.train(train.resumed("run", {}), resume=True)
    assert train.train(train.resumed("run", {}), resume=True)["step"] == 2
