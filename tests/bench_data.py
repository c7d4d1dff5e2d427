"""How far data.py prepare is from tiktoken alone: python tests/bench_data.py [CL100K_FILE]

The same documents on the same cores, in turn in one run: everything that `prepare` does (read, cut, encode, hash, write),
tiktoken's own encode_ordinary_batch, and one process a core that does nothing but encode_ordinary."""
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data


def encode_share(share):
    return sum(len(TOKENIZER.encode_ordinary(text)) for text in share)


def main(file=None, rounds=5):
    global TOKENIZER
    files, cores = data.stdlib_files() * 3, os.cpu_count()
    texts = [document.text for path in files for document in data.read_text(path, "stdlib", lambda n: None)]
    size = sum(len(text.encode()) for text in texts) / 1e6
    for name in ("bytes", "cl100k_base") if file else ("bytes",):
        TOKENIZER = data.get_tokenizer(name, file if name != "bytes" else None)
        times = {"prepare": [], "encode_ordinary_batch": [], "processes": []}
        with multiprocessing.get_context("fork").Pool(cores) as pool, tempfile.TemporaryDirectory() as folder:
            def prepare():
                shutil.rmtree(f"{folder}/out", ignore_errors=True)
                data.prepare({"stdlib": files}, f"{folder}/out", TOKENIZER, workers=cores, progress=False)

            for _ in range(rounds):
                for what, work in (("prepare", prepare),
                                   ("encode_ordinary_batch", lambda: TOKENIZER.encode_ordinary_batch(texts, num_threads=cores)),
                                   ("processes", lambda: pool.map(encode_share, [texts[i::cores] for i in range(cores)]))):
                    start = time.perf_counter()
                    work()
                    times[what].append(time.perf_counter() - start)
        rate = {what: size / statistics.median(t) for what, t in times.items()}
        print(json.dumps({"tokenizer": name, "MB": round(size, 1), "cores": cores, **{f"{k}, MB/s": round(r, 1) for k, r in rate.items()},
                          **{f"prepare / {k}": round(rate["prepare"] / rate[k], 2) for k in ("encode_ordinary_batch", "processes")}}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
