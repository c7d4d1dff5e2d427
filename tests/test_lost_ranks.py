"""Ranks that are late, lost or wrong: what the others say, and that all of them end."""

import datetime
import re
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import distributed
import frozen
import pytest
import torch.distributed as dist
from processes import Shared, start, wait

import parallel


def run_frozen(folder: Path) -> Path:
    """Run the cases of frozen.py with a short timeout; with a longer one where the machine was so
    busy that a rank was late before the other one was frozen."""
    for seconds in (2, 8, 30):
        found = folder / str(seconds)
        found.mkdir()
        log = found / "log"
        code = wait(start([sys.executable, frozen.__file__, found, seconds], log), log)
        assert code == 0, log.read_text()
        if all((found / f"{name}.frozen").exists() for name in frozen.CASES):
            return found
    pytest.fail(f"no case came to its end in {seconds} s", pytrace=False)


@pytest.fixture(scope="module")
def after_freezing(tmp_path_factory):
    """The folder of frozen.py's logs."""
    folder = tmp_path_factory.mktemp("frozen")
    return Shared(lambda: run_frozen(folder))


@pytest.mark.parametrize("name", frozen.CASES)
def test_a_frozen_rank_is_named_and_the_other_one_ends(after_freezing, name):
    """A rank that stops for good, as if its machine or its link were gone: in a sum of plain
    numbers, in a step over dp, tp and pp, in a save, in rank 0's own work. The other rank ends by
    itself, and says which rank is lost; of a rank that was killed, on which host it was."""
    said = (after_freezing() / f"{name}.log").read_text()
    lost = f"no answer from rank {frozen.CASES[name][0]} ("
    if name == "killed-1":
        lost = "a rank on 127.0.0.1 has closed its connection"
    assert lost in said


def test_the_others_wait_while_rank_0_works(after_freezing):
    """on_rank_0 may take longer than the timeout: three times as long, and the result arrives."""
    for name in ("rank-0-works-0.log", "rank-0-works-0-frozen.log"):
        assert "got the result" in (after_freezing() / name).read_text()


CONNECT = "import parallel; parallel.PATIENCE = 0.1; parallel.connect(100)"


def test_rank_0_says_for_whom_it_waits(tmp_path):
    """Of four ranks only rank 0 was started: after some seconds it names the others."""
    listener, log = distributed.free_port(), tmp_path / "log"
    environment = distributed.environment(0, 4, listener.getsockname()[1])
    store = distributed.serve_store(listener)
    process = start([sys.executable, "-c", CONNECT], log, env=environment)
    text = "waiting for 3 of 4 ranks: 1, 2, 3"
    wait(process, log, until=text)
    assert text in log.read_text()
    del store


def test_a_silent_listener_is_named(tmp_path):
    """Another program listens at the port where the ranks meet, and never answers: each rank says
    where it waits."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port, log = listener.getsockname()[1], tmp_path / "log"
        environment = distributed.environment(1, 2, port)
        process = start([sys.executable, "-c", CONNECT], log, env=environment)
        text = f"rank 1 waits for an answer from 127.0.0.1, port {port}"
        wait(process, log, until=text)
    assert text in log.read_text()


def test_a_rank_that_never_comes_is_an_error_for_people(tmp_path):
    """After the timeout, connect raises TimeoutError with the number of ranks and the time."""
    listener, log = distributed.free_port(), tmp_path / "log"
    environment = distributed.environment(0, 2, listener.getsockname()[1])
    store = distributed.serve_store(listener)
    program = "import parallel; parallel.PATIENCE = 0.1; parallel.connect(0.02)"
    code = wait(start([sys.executable, "-c", program], log, env=environment), log)
    last = log.read_text().splitlines()[-1]
    assert code == 1
    assert "TimeoutError: rank 0 has not met the 1 other ranks in 0.02 minutes: " in last
    del store


def test_a_rank_that_cannot_connect_tells_the_others(monkeypatch):
    """Rank 1 asks for an interface that its host does not have, and rank 0 waits for its
    connection: both raise the same error, which names the rank and the interface."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such")
    store, forever = dist.HashStore(), threading.Event()
    minute = datetime.timedelta(minutes=1)

    def form(rank: int):
        if rank == 0:
            forever.wait()
        dist.ProcessGroupGloo.create_device(interface="no-such")

    with ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(
                parallel.run_with_timeout, lambda rank=rank: form(rank), store, rank, minute
            )
            for rank in (0, 1)
        ]
        said = {str(call.exception()) for call in calls}
    forever.set()
    assert len(said) == 1
    assert "rank 1 on " in min(said)
    assert ": Unable to find address for: no-such" in min(said)
    assert "interface no-such (GLOO_SOCKET_IFNAME)" in min(said)


def test_connections_that_are_never_complete():
    """No rank fails, and none is done: TimeoutError, with what to look at."""
    forever, moment = threading.Event(), datetime.timedelta(seconds=0.01)
    with pytest.raises(TimeoutError, match="open all ports between the hosts"):
        parallel.run_with_timeout(forever.wait, dist.HashStore(), 0, moment)
    forever.set()


LIBRARY = """
import logging, os, sys, warnings
from pathlib import Path
import torch, parallel
file = parallel.redirect_library_output(Path(sys.argv[1]), 3)
print("our result")
print("our message", file=sys.stderr)
warnings.warn("a warning of a library")
logging.getLogger("torch.distributed").warning("a note of PyTorch")
os.write(2, b"a line from C++")
sys.exit(f"the file is {file.name}")
"""


def test_what_libraries_print_goes_to_a_file(tmp_path):
    """Warnings, PyTorch's loggers and C++ code write to the rank's file; what our own code prints
    stays on the screen."""
    log = tmp_path / "screen"
    assert wait(start([sys.executable, "-c", LIBRARY, tmp_path], log), log) == 1
    file, screen = (tmp_path / "rank-3.log").read_text(), log.read_text()
    for ours in ("our result", "our message", "the file is rank-3.log"):
        assert ours in screen and ours not in file
    for theirs in ("a warning of a library", "a note of PyTorch", "a line from C++"):
        assert theirs in file and theirs not in screen


def test_restarts_on_several_machines_need_their_own_stores(monkeypatch):
    """Ranks that torchrun restarts on several machines meet in the store of their first start,
    unless torchrun is told not to share it: refused, with the command that works."""
    environment = distributed.environment(0, 16, 1) | {"LOCAL_WORLD_SIZE": "8"}
    for name, value in (environment | {"TORCHELASTIC_MAX_RESTARTS": "3"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as error:
        parallel.connect()
    command = r"TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun .*--max-restarts"
    assert re.search(command, str(error.value))
