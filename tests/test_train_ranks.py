"""Signals in a run of several ranks: all stop together, and the words are true."""

# ruff: noqa: F401, F811 (pytest finds fixtures by their names)

import signal
import sys
from pathlib import Path

import pytest
import torch
from processes import start, wait
from workshop import ROOT, contents, corpus, flags, job, log, steps_of, workshop

import train

# train.py on a rank that gets a signal in its second micro-batch of step 4; -1: on every rank.
SIGNALLED = """
import os, signal, sys
from flm import FLM
import train
real, micro_batches, rank = FLM.forward, [], int(sys.argv[1])
def forward(model, *args, **options):
    if model.training and sys._getframe(1).f_code.co_name != "held_out":
        micro_batches.append(0)
        if len(micro_batches) == 3 * 4 + 2 and rank in (-1, int(os.environ["RANK"])):
            os.kill(os.getpid(), signal.SIGTERM)
    return real(model, *args, **options)
FLM.forward = forward
sys.argv = ["train.py", *sys.argv[2:]]
train.launch(train.main)
"""


@pytest.mark.parametrize("rank", [1, -1], ids=["one rank", "all ranks"])
@pytest.mark.parametrize("shard", [False, True], ids=["replicated", "sharded"])
def test_a_signal_between_two_micro_batches_of_several_ranks(corpus, rank, shard):
    """One rank or all get SIGTERM inside a step of four micro-batches. All ranks throw the step
    away and save what was whole before it: the checkpoint is that of a run that stopped there. Only
    where a single rank got it does torchrun take the end for a failure, and the screen says so."""
    s = job(corpus, batch_size=8, micro_batch=1, eval_every=50, shard_optimizer=shard, steps=5)
    Path("signalled.py").write_text(SIGNALLED)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
    ]
    process = start([*launcher, "signalled.py", rank, *flags(s)], Path("screen"))
    assert wait(process, Path("screen")) != 0
    screen = Path("screen").read_text()
    go_on = f"torchrun ... train.py --resume {s.out}"
    assert f"stopped by SIGTERM after step 3, saved; to go on:\n  {go_on}\n" in screen
    alone = "only rank 1 received the signal: with --max-restarts it starts the run again"
    assert (alone in screen) == (rank == 1)
    assert steps_of(s.out)[-1] == "step-00000003" and log(s.out)[-1]["step"] == 3
    straight = train.train(job(corpus, batch_size=8, micro_batch=1, steps=5), stop_at=3)["folder"]
    found, expected = contents(s.out), contents(straight)
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # two ranks add gradients in another order
        if torch.is_tensor(value):
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
