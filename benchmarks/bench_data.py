"""How far data.py prepare is from tiktoken alone: python benchmarks/bench_data.py [CL100K_FILE]

The same documents on the same cores, in turn in one run: everything that `prepare` does (check,
read, cut, encode, hash, write), tiktoken's own encode_ordinary_batch, and one process a core that
does nothing but encode_ordinary. Each number is the median of the rounds.
"""

import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data


def count_tokens(texts: list[str]) -> int:
    """What each process does; TOKENIZER is set before the processes are forked."""
    return sum(len(TOKENIZER.encode_ordinary(text)) for text in texts)


def seconds(work: Callable) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(name: str, file: str | None, rounds: int) -> dict:
    """MB/s of the three ways with one tokenizer, and the ratios."""
    global TOKENIZER
    TOKENIZER = data.get_tokenizer(name, file if name != "bytes" else None)
    files, cores = data.stdlib_files() * 3, os.cpu_count()
    documents = [
        document for path in files for document in data.read_text(path, "", lambda n: None)
    ]
    texts = [document.text for document in documents]
    shares = [texts[i::cores] for i in range(cores)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    times = {"prepare": [], "encode_ordinary_batch": [], "processes": []}
    with (
        multiprocessing.get_context("fork").Pool(cores) as pool,
        tempfile.TemporaryDirectory() as d,
    ):

        def prepare():
            shutil.rmtree(f"{d}/out", ignore_errors=True)
            data.prepare({"stdlib": files}, f"{d}/out", TOKENIZER, workers=cores, progress=False)

        def batch():
            TOKENIZER.encode_ordinary_batch(texts, num_threads=cores)

        for _ in range(rounds):
            times["prepare"].append(seconds(prepare))
            times["encode_ordinary_batch"].append(seconds(batch))
            times["processes"].append(seconds(lambda: pool.map(count_tokens, shares)))
    rates = {what: megabytes / statistics.median(times[what]) for what in times}
    result = {"tokenizer": name, "MB": round(megabytes, 1), "cores": cores}
    result |= {f"{what}, MB/s": round(rate, 1) for what, rate in rates.items()}
    for other in ("encode_ordinary_batch", "processes"):
        result[f"prepare / {other}"] = round(rates["prepare"] / rates[other], 2)
    return result


def main(file: str | None = None, rounds: int = 5):
    """Prints a JSON object for each tokenizer; cl100k_base needs its file."""
    for name in data.TOKENIZERS if file else ("bytes",):
        print(json.dumps(measure(name, file, rounds), indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
