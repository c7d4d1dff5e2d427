"""Folders, options and mistakes."""

# ruff: noqa: F401, F811 (pytest finds fixtures by their names)
import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from helpers import error
from hypothesis import given
from hypothesis import strategies as st
from workshop import (
    CONFIG,
    FLOAT64,
    SIZE,
    contents,
    corpus,
    equal,
    few,
    flags,
    job,
    other_corpus,
    steps_of,
    workshop,
)

import launch
import parallel
import run_folder
import sample
import schedule
import train
from flm import PRESETS
from lab import bench
from settings import resolve
from train import Settings, World, main

# --------------------------------------------------------------------------------------------------
# Run folders


@few(4)
@given(keep=st.integers(1, 4), every=st.integers(1, 3))
def test_keep_keeps_the_newest(corpus, keep, every):
    """Of the checkpoints (the start, every `save_every` steps, the end) the newest `keep` are
    there."""
    s = job(corpus, keep=keep, save_every=every)
    train.train(s)
    saved = [0, *range(every, 6, every), 6]
    assert steps_of(s.out) == [f"step-{step:08d}" for step in saved[-keep:]]


def test_runs_are_named_after_the_preset(corpus, capsys):
    """The first run goes to runs/demo, the next to runs/demo-2, runs/demo-3; a hole in the row is
    filled."""
    s = job(corpus, out=None, steps=1)
    assert [train.train(s)["folder"] for _ in range(3)] == [
        "runs/demo",
        "runs/demo-2",
        "runs/demo-3",
    ]
    shutil.rmtree("runs/demo-2")
    assert train.train(s)["folder"] == "runs/demo-2"


def test_out_that_holds_something_is_refused(corpus):
    """Another run, any other folder with something in it, and a file are left alone; an empty
    folder is taken."""
    s = job(corpus, out="mine", steps=1)
    Path("mine").mkdir()
    train.train(s)
    before = contents("mine")
    with pytest.raises(
        ValueError,
        match=r"mine holds another run: go on with it \(--resume mine\) or choose another",
    ):
        main(flags(s))
    assert equal(contents("mine"), before)
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("all of it")
    for out in ("full", "full/thesis.txt"):
        with pytest.raises(
            ValueError, match=f"{out} exists and is not a run: choose another folder"
        ):
            main(flags(s) + ["--out", out])
    assert (
        Path("full/thesis.txt").read_text() == "all of it"
        and len(list(Path("full").iterdir())) == 1
    )


def test_config_json_describes_the_run(corpus):
    """config.json holds every setting as it was used, the stages with their models, versions and
    the machine."""
    s = job(corpus, dtype="auto", lr=None, out=None)
    train.train(s)
    run = json.loads(Path("runs/demo/config.json").read_text())
    assert [stage["config"] for stage in run["stages"]] == [CONFIG.to_dict()]
    assert run["torch"] == torch.__version__
    assert run["settings"]["lr"] == train.RECIPES["demo"]["lr"]
    assert run["settings"]["dtype"] == "float32"
    assert set(run["settings"]) == {field.name for field in dataclasses.fields(Settings)}
    assert "utilisation is against" in run["machine"]
    used = dataclasses.replace(train.resolve(s)[0], dtype="float32", out="runs/demo")
    assert run_folder.read_run(Path("runs/demo"))[0] == used


# --------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "line, words",
    [
        (["--preset", "flm-101"], ["unknown preset 'flm-101': did you mean", "flm-101b"]),
        (["--preset", "zzz"], ["unknown preset 'zzz'", "there are demo, ", "flm-101b"]),
        (
            [
                "--steps",
                "0",
                "--batch-size",
                "-4",
                "--eval-every",
                "0",
                "--eval-rows",
                "0",
                "--save-every",
                "0",
                "--keep",
                "0",
                "--eval-batch",
                "0",
                "--lr",
                "nan",
                "--clip",
                "0",
                "--min-lr",
                "1.5",
                "--teacher-fraction",
                "2",
                "--weight-decay",
                "-1",
                "--warmup",
                "-1",
                "--threads",
                "0",
            ],
            [
                "do not fit together",
                "--steps 0: must be at least 1",
                "--batch-size -4:",
                "--eval-every 0:",
                "--eval-rows 0:",
                "--save-every 0:",
                "--keep 0:",
                "--eval-batch 0:",
                "--lr nan: must be a number above 0",
                "--clip 0.0:",
                "--min-lr 1.5: must be between 0 and 1",
                "--teacher-fraction 2.0: must be between 0 and 1",
                "--weight-decay -1.0:",
                "--warmup -1:",
                "--threads 0:",
            ],
        ),
        (
            ["--batch-size", "6", "--micro-batch", "4"],
            ["--micro-batch 4: must divide the 6 rows"],
        ),
        (
            ["--batch-size", "6", "--micro-batch", "0", "--keep", "0"],
            ["--micro-batch 0: must be at least 1", "--keep 0: must"],
        ),
        (
            ["--model", "d_model=0", "head_dim=3", "d_ff=1.5", "tie_embeddings=7", "--steps", "0"],
            [
                "d_model = 0: must be a whole number above 0",
                "head_dim = 3: must be even",
                "d_ff = 1.5: must be a whole",
                "tie_embeddings = 7: must be true",
                "--steps 0",
            ],
        ),
        (
            [
                "--model",
                "depth=3",
                "d_model=ten",
                "n_layers",
                "head_dim=3",
                "max_seq_len=1e9",
                "--keep",
                "0",
            ],
            [
                "--model depth=3: ",
                "n_layers, d_model, n_heads",
                "--model d_model=ten: ",
                "--model n_layers: ",
                "head_dim = 3: must be even",
                "--keep 0",
            ],
        ),
        (["--model", "max_seq_len=1000000"], ["max_seq_len = 1000000: must be at most"]),
        (
            ["--device", "cuda"],
            ["device 'cuda' asked for, but PyTorch", "sees 0 CUDA", "use --device cpu"],
        ),
        (["--device", "tpu9"], ["unknown device 'tpu9': use auto, cpu, cuda or mps"]),
        (
            ["--data", "nowhere"],
            ["nowhere does not exist", "python data.py prepare INPUT... --out nowhere"],
        ),
        (
            ["--data", "{other}", "--teacher-fraction", "0.5", "--model", *SIZE],
            [
                "--teacher-fraction 0.5, but {other} has no teacher signal: "
                "prepare it with --teacher FILE.jsonl"
            ],
        ),
        (
            ["--data", "{corpus}", "--model", *SIZE, "vocab_size=200"],
            [
                "{corpus} is made of bytes tokens, whose ids go up to 256",
                "vocabulary ends at 199",
                "add --model vocab_size=384",
            ],
        ),
        (
            ["--data", "{corpus}", "--model", "max_seq_len=20000"],
            ["{corpus}: a row of seq_len 20000 takes 20,001 tokens", "Choose a smaller seq_len"],
        ),
        (
            ["--data", "{corpus}", "--tokenizer-file", "x"],
            ["the tokenizer bytes reads no file, but got 'x'"],
        ),
        (
            ["--tokenizer", "cl100k_base", "--tokenizer-file", "nowhere"],
            ["cannot read the tokenizer file 'nowhere'"],
        ),
        (["--eval-only", "nowhere"], ["no checkpoint at nowhere: there is no such file or folder"]),
        (["--stages", "{corpus}/../text.jsonl"], ["text.jsonl is not JSON"]),
        (["--stages", "nowhere.json"], ["nowhere.json"]),
        (["--init-from", "nowhere"], ["no checkpoint at nowhere"]),
    ],
    ids=lambda value: " ".join(value)[:50] if value and value[0].startswith("--") else "",
)
def test_bad_input(corpus, other_corpus, tmp_path, monkeypatch, line, words):
    """Each mistake is a ValueError that says what is wrong and what mends it, all violations at
    once, before anything is made. `python train.py` turns it into one screen and exit code 2
    (test_exit_codes)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def fill(text):
        return text.format(corpus=corpus, other=other_corpus)

    with pytest.raises(ValueError) as caught:
        main([fill(word) for word in line])
    for word in words:
        assert fill(word) in str(caught.value)
    assert len(str(caught.value).splitlines()) < 24
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    [
        ["--steps", "ten"],
        ["--mup", "maybe"],
        ["--auto-resume", "--resume", "x"],
        ["--nope"],
        ["--tokenizer", "x"],
        ["--dtype", "float16"],
    ],
)
def test_bad_words(line, capsys, tmp_path):
    """What argparse itself can see leaves with exit code 2, a usage and one line that names the
    word."""
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 2 and line[0][2:] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_option_is_on_the_command_line(capsys):
    """Every setting has a flag that gives it and a line of help, and the help names the presets
    that there are."""
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for field in dataclasses.fields(Settings):
        assert "--" + field.name.replace("_", "-") in text and field.metadata["help"][:30] in text
    unbroken = text.replace("- ", "-")  # argparse breaks a line after a hyphen, too
    assert all(name in unbroken for name in PRESETS)


def test_every_preset_has_a_recipe():
    """A preset's name is all that is needed: each resolves to complete settings, and there are no
    recipes without one."""
    assert set(train.RECIPES) == set(PRESETS)
    for name, config in PRESETS.items():
        s, stages = train.resolve(Settings(preset=name))
        assert stages[-1].config == config
        assert None not in (s.steps, s.batch_size, s.lr, s.warmup)
        assert s.warmup < s.steps * s.batch_size  # it reaches its peak


def test_steps_of_the_papers_run():
    """--stages paper ends with the paper's tokens, and says in how many steps; --steps given with
    it is the number of steps of the whole run."""
    s, stages = train.resolve(Settings(preset="flm-101b", stages="paper"))
    assert stages[-1].end == stages[-1].start + round(26.54e9 / 2048)
    assert s.steps == schedule.total_steps(stages)
    s, stages = train.resolve(Settings(preset="flm-101b", stages="paper", steps=70_000))
    assert s.steps == schedule.total_steps(stages) == 70_000


@pytest.mark.parametrize("seed", [-1, 2**63, 10**20])
@pytest.mark.parametrize("command", [main, bench.main])
def test_a_seed_is_refused_everywhere_alike(seed, command):
    """What PyTorch's generators do not take is refused by training and benchmark."""
    with pytest.raises(ValueError, match=rf"--seed {seed}: must be between 0 and 2\^63 - 1"):
        command(["--seed", str(seed)])


def test_the_largest_seed(corpus, capsys):
    """The largest seed trains, and is benchmarked."""
    seed = 2**63 - 1
    assert train.train(job(corpus, seed=seed, steps=1))["step"] == 1
    s, stages = train.resolve(job(corpus, seed=seed))
    worker = train.allocate(stages[0].config, FLOAT64)
    worker.init_weights(0)
    assert len(bench.time_steps(worker, train.make_optimizer(worker, s), s, 1)) == 3


def test_rows_of_one_token(other_corpus, capsys):
    """max_seq_len=1 trains to its end; there is no room for a sample, nor for the prompt that is
    advised for longer rows. What is advised is accepted."""
    s = job(other_corpus, model=SIZE + ("max_seq_len=1",), steps=2)
    assert main(flags(s)) == 0
    assert "What next?" in (out := capsys.readouterr().out) and "A sample" not in out
    (advised,) = re.findall(r"python sample\.py (.*)", out)
    assert sample.main(shlex.split(advised)) in (0, None)


def test_compile_without_a_compiler(corpus, monkeypatch, capsys):
    """Where PyTorch finds no C++ compiler, --compile ends with one screen and exit code 2."""

    class InvalidCxxCompiler(RuntimeError):
        __module__ = "torch._inductor.exc"

    def fails(*_, **__):
        raise InvalidCxxCompiler("No working C++ compiler found\nmany\nlines")

    monkeypatch.setattr(parallel.Worker, "gradients", fails)
    line = flags(job(corpus, compile=True))
    monkeypatch.setattr("sys.argv", ["train.py"])
    assert launch.call_main(lambda world: main(line, world), World()) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-2].startswith("train.py: --compile: PyTorch cannot compile here. It needs a C++")
    assert error[-1] == "  No working C++ compiler found"


@pytest.mark.quick
def test_a_model_that_its_first_stage_contradicts(tmp_path):
    """A field that --model and the stages' file set to two values is refused with both; sizes may
    differ, for --model may name those of the last stage."""
    file = tmp_path / "stages.json"
    first = {"n_layers": 1, "init_std": 0.02}
    file.write_text(json.dumps([{"config": first}, {"config": {"n_layers": 2}, "start": 64}]))
    options = {"stages": str(file), "steps": 20, "batch_size": 8}
    message = error(resolve, Settings(model=("n_layers=2", "init_std=0.1"), **options))
    assert "--model init_std=0.1" in message and f"--stages {file} 0.02" in message
    assert "n_layers" not in message
    _, stages = resolve(Settings(model=("n_layers=2", "init_std=0.02"), **options))
    assert [stage.config.n_layers for stage in stages] == [1, 2]
