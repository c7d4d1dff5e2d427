"""How far data.py prepare is from tiktoken alone:

    python -m benchmarks.bench_data [GIGABYTES [CL100K_FILE]]

Makes so much text (0.1 without the argument) from Python's library, its paragraphs in another order
each time: a .txt file of half of it, two thousand small files, a .jsonl and a .jsonl.gz. For each
tokenizer, in one run: one process a core that does nothing but tiktoken's encode_ordinary on a
sample, then `python data.py prepare`, then the processes again; and the same command once more,
killed with kill -9 in the middle and repeated. Prints a JSON object: rates, their ratios, memory.

CPU seconds are those of all processes, whatever else the machine does; so is their ratio.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

if sys.platform != "linux":
    sys.exit("bench_data.py reads the memory of processes from /proc: on Windows use WSL")

import console
from prepare import cores
from textfiles import cut_text, read_parts, stdlib_files
from tokenizer import TOKENIZERS, get_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = 16_000_000  # bytes of text a core for tiktoken alone


def make_text(folder: Path, size: int):
    """Fill a folder with `size` bytes of text."""
    draw, paragraphs = random.Random(0), []
    for path in stdlib_files():
        paragraphs += path.read_text(encoding="utf-8").split("\n\n")

    def text(n: int) -> str:
        parts, length = [], 0
        while length < n:
            parts += draw.sample(paragraphs, 100)
            length += sum(len(part) + 2 for part in parts[-100:])
        return "\n\n".join(parts)

    with open(folder / "one.txt", "w", encoding="utf-8") as file:
        for _ in range(16):
            file.write(text(size // 32))
    for k in range(2000):
        path = folder / f"small/{k % 40:02}/{k:04}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(size // 8000), encoding="utf-8")
    with (
        open(folder / "rows.jsonl", "w", encoding="utf-8") as rows,
        gzip.open(folder / "packed.jsonl.gz", "wt", 6, encoding="utf-8") as packed,
    ):
        for file in (rows, packed):
            length = 0
            while length < size // 8:
                line = json.dumps({"text": text(draw.choice((500, 2000, 50_000)))})
                length += file.write(line + "\n")


def count_tokens(texts: list[str]) -> int:
    """What each process does; TOKENIZER is set before the processes are forked."""
    return sum(len(TOKENIZER.encode_ordinary(text)) for text in texts)


def timed(work: Callable) -> tuple[float, float]:
    """(seconds, CPU seconds of the child processes that it has waited for)."""
    before, start = os.times(), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - start, os.times()
    return seconds, sum(after[2:4]) - sum(before[2:4])


def tiktoken_alone(texts: list[str]) -> dict:
    """MB/s of tiktoken in one process a core, together, and MB per CPU second."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    shares = [texts[i :: cores()] for i in range(cores())]

    def work():
        context = multiprocessing.get_context("fork")
        with context.Pool(cores()) as pool:
            pool.map(count_tokens, shares, chunksize=1)
            pool.close()
            pool.join()

    seconds, cpu = timed(work)
    return {"MB/s": megabytes / seconds, "MB/CPU s": megabytes / cpu}


def read_alone(path: Path) -> float:
    """MB of unpacked text for a CPU second of the process that reads, unpacks and hands out."""
    size, start = 0, time.process_time()
    for part in read_parts(path, "text"):
        size += part.size
        pickle.loads(pickle.dumps(part))
    return size / 1e6 / (time.process_time() - start)


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(child) for task in tasks for child in task.read_text().split()]
    return [pid, *(each for child in found for each in descendants(child))]


def run_prepare(folder: Path, tokenizer: list[str], kill_at: float | None = None) -> dict:
    """The command: seconds, CPU seconds, and the most memory that all its processes held together
    (proportional set size). kill_at: kill -9 when the shards have so many bytes."""
    out = folder.parent / "out"
    command = [sys.executable, str(ROOT / "data.py"), "prepare", f"text={folder}"]
    command += ["--out", str(out), "--tokenizer", *tokenizer]
    peak, done = 0, threading.Event()

    def watch(pid: int):
        nonlocal peak
        while not done.wait(0.5):
            total = 0
            for each in descendants(pid):
                try:
                    rollup = Path(f"/proc/{each}/smaps_rollup").read_text()
                    total += int(rollup.split("\nPss:")[1].split()[0])
                except OSError:  # has ended
                    continue
            peak = max(peak, total)
            written = sum(path.stat().st_size for path in out.glob("*.tokens"))
            if kill_at and written > kill_at:
                os.kill(pid, signal.SIGKILL)
                return

    def work():
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, **silent)
        thread = threading.Thread(target=watch, args=[process.pid])
        thread.start()
        process.wait()
        done.set()
        thread.join()

    seconds, cpu = timed(work)
    return {"seconds": seconds, "CPU seconds": cpu, "peak MiB": peak / 1024}


def measure(name: str, file: str | None, folder: Path, texts: list[str]) -> dict:
    """All numbers of one tokenizer."""
    global TOKENIZER
    TOKENIZER = get_tokenizer(name, file if name != "bytes" else None)
    words = [name] + (["--tokenizer-file", file] if name != "bytes" else [])
    out = folder.parent / "out"
    before = tiktoken_alone(texts)
    whole = run_prepare(folder, words)
    after = tiktoken_alone(texts)
    meta = (out / "meta.json").read_bytes()
    entry = json.loads(meta)["sources"][0]
    megabytes = (entry["train"]["bytes"] + entry["val"]["bytes"]) / 1e6
    size = sum(path.stat().st_size for path in out.glob("*.tokens"))
    shutil.rmtree(out)
    killed = run_prepare(folder, words, kill_at=size / 2)
    rest = run_prepare(folder, words)
    assert (out / "meta.json").read_bytes() == meta
    shutil.rmtree(out)
    alone = {key: (before[key] + after[key]) / 2 for key in before}
    found = {"MB/s": megabytes / whole["seconds"], "MB/CPU s": megabytes / whole["CPU seconds"]}
    result = {"tokenizer": name, "MB": round(megabytes), "cores": cores()}
    result |= {f"prepare, {key}": round(value, 1) for key, value in whole.items()}
    for key in alone:
        result[f"tiktoken alone, {key}"] = round(alone[key], 2)
        result[f"prepare, {key}"] = round(found[key], 2)
        result[f"prepare / tiktoken alone, {key}"] = round(found[key] / alone[key], 3)
    result["killed and repeated, seconds"] = round(killed["seconds"] + rest["seconds"], 1)
    for key, value in rest.items():
        result[f"repeated, {key}"] = round(value, 1)
    return result


def main(argv: list[str] | None = None):
    """Prints a JSON object for each tokenizer; cl100k_base needs its file."""
    parser = argparse.ArgumentParser(prog="benchmarks.bench_data")
    parser.add_argument("gigabytes", type=float, nargs="?", default=0.1, help="of text")
    parser.add_argument("file", nargs="?", help="cl100k_base.tiktoken")
    args = parser.parse_args(argv)
    if not 0.001 <= args.gigabytes <= 1000:
        raise ValueError(f"{args.gigabytes:g} gigabytes: give a number from 0.001 to 1000")
    if args.file:
        get_tokenizer("cl100k_base", args.file)  # before the text is made
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, "text")
        folder.mkdir()
        make_text(folder, int(args.gigabytes * 1e9))
        with open(folder / "one.txt", encoding="utf-8") as text:
            texts = list(cut_text(text.read(SAMPLE * cores())))
        names = ("one.txt", "rows.jsonl", "packed.jsonl.gz")
        reading = {name: round(read_alone(folder / name)) for name in names}
        print(json.dumps({"reading alone, MB/CPU s": reading}, indent=1), flush=True)
        for name in TOKENIZERS if args.file else ("bytes",):
            print(json.dumps(measure(name, args.file, folder, texts), indent=1), flush=True)


if __name__ == "__main__":
    console.run(main)
