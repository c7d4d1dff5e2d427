"""Start several processes, and wait for them as long as they make progress.

No test fails because the machine is slow. A process has stopped making progress when neither it nor
its children have used the processor, and nothing was added to its log."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 120  # seconds in which a working process gets some time on the busiest machine
TICKS = 10  # hundredths of a second on the processor that count as progress


def process_tree(pid: int) -> dict[int, int]:
    """{pid: hundredths of a second on the processor} of a process and all its descendants.

    Empty where the system has no /proc (macOS)."""
    parents, used = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:  # has ended
            continue
        number = int(path.parent.name)
        parents[number], used[number] = int(fields[1]), int(fields[11]) + int(fields[12])
    tree = {pid} & set(used)
    while grown := {p for p in used if parents[p] in tree} - tree:
        tree |= grown
    return {p: used[p] for p in tree}


def kill(process: subprocess.Popen):
    """End a process and all its descendants."""
    for pid in {process.pid, *process_tree(process.pid)}:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


def wait(process: subprocess.Popen, log: Path, until: str | None = None) -> int | None:
    """Wait for the end of a process, or until its log has a text. Returns the exit code, None if it
    had not ended; then the process is ended. The test fails when there is no progress any more.

    The root of the tree is not counted: torchrun uses the processor while it waits."""
    try:
        seen, last = None, time.monotonic()
        while process.poll() is None:
            if until and until in log.read_text():
                return None
            tree = process_tree(process.pid)
            if len(tree) > 1:
                tree.pop(process.pid)
            now = (set(tree), sum(tree.values()), log.stat().st_size)
            if seen is None or now[::2] != seen[::2] or abs(now[1] - seen[1]) >= TICKS or not tree:
                seen, last = now, time.monotonic()
            if time.monotonic() - last > PATIENCE:
                pytest.fail(
                    f"no progress for {PATIENCE} s\n{log.read_text()[-5000:]}", pytrace=False
                )
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            kill(process)
    return process.returncode


def start(command: list, log: Path, **options) -> subprocess.Popen:
    """Start a command; what it prints goes to the file `log`. options: those of Popen."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= options.pop("env", {})
    with log.open("w") as file:
        words = list(map(str, command))
        return subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=environment, **options
        )


class Shared:
    """What many tests need and one call makes. When it fails, one test fails, with the reason; each
    later one is skipped with a line that names it."""

    def __init__(self, make: Callable):
        self.make, self.made, self.failed = make, False, None

    def __call__(self):
        if self.failed:
            pytest.skip(f"needs what failed in {self.failed}")
        if not self.made:
            try:
                self.value = self.make()
            except BaseException:
                self.failed = os.environ.get("PYTEST_CURRENT_TEST", "?").removesuffix(" (call)")
                raise
            self.made = True
        return self.value
