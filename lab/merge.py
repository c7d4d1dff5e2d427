"""Make one prepared folder of several, which other jobs or machines have prepared.

    python data.py prepare en=dump/0 --out part-0     # on one machine
    python data.py prepare en=dump/1 --out part-1     # on another one
    python -m lab.merge part-0 part-1 --out corpora/dump

The folder is the one that a single command with the inputs of all of them would have made.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from itertools import chain, product
from pathlib import Path

import console
from console import refuse
from data import WEIGHT_HELP, parse_weight, tell
from prepare import (
    MERGING,
    SPLITS,
    UNFINISHED,
    add_skipped,
    append_to_shard,
    building,
    check_place,
    check_weights,
    entries_of,
    new_entry,
    open_shard,
    read_meta,
    trained,
    write_meta,
)
from tokenizer import token_type


def merge(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    weights: dict[str, float] | None = None,
    progress: bool = True,
) -> dict:
    """Make one folder of several, which other jobs have prepared; returns its meta.

    The result is what one `prepare` of all their files, in this order, would have made. weights: as
    for `prepare`; without them those of the folders. ValueError where the folders do not fit
    together; OSError as for `prepare`."""
    out, metas = Path(out).resolve(), {Path(folder): read_meta(Path(folder)) for folder in folders}
    given, problems = {}, []
    for name, weight in chain.from_iterable(meta["weights"].items() for meta in metas.values()):
        if given.setdefault(name, weight) != weight and not weights:
            problems.append(f"source {name!r} has the weights {given[name]} and {weight}: give one")
    names = [name for meta in metas.values() for name in trained(meta)]
    problems += check_weights(weights or given, names) + check_merged(metas)
    if len(metas) < len(folders):
        problems.append("a folder is named twice")
    refuse(problems + check_place(out, None))
    first = next(iter(metas.values()))
    request = hashlib.sha256(json.dumps([list(metas.values()), weights]).encode()).hexdigest()
    dtype = token_type(first["tokenizer"]["n_vocab"])
    total = sum(path.stat().st_size for folder in metas for path in folder.glob("*.tokens"))
    options = {"total": total, "unit": "B", "unit_scale": True, "disable": not progress}
    mark = out / UNFINISHED / MERGING

    def is_same():
        return mark.read_text() == request if mark.is_file() else not any(mark.parent.glob("*"))

    with (
        building(out, None, is_same, keep=True),
        console.progress(desc="merging", **options) as bar,
    ):
        mark.write_text(request)
        entries, skipped, limits = entries_of(None), {}, {}
        for folder, meta in metas.items():
            limits |= meta["limits"]
            add_skipped(skipped, meta["skipped"])
            for signal, found in entries_of(meta).items():
                for name, split in product(found, SPLITS):
                    new = new_entry(signal, len(entries[signal]))
                    entry, more = entries[signal].setdefault(name, new)[split], found[name][split]
                    tokens = open_shard(folder / more["shard"], more["tokens"], dtype)
                    append_to_shard(out / entry["shard"], entry, tokens, more)
                    bar.update(tokens.nbytes)
        merged = {"limits": limits, "entries": entries, "skipped": skipped}
        about = first["tokenizer"], first["val_fraction"]
        return write_meta(out, *about, weights or given, **merged)


def check_merged(metas: dict[Path, dict]) -> list[str]:
    """Why prepared folders cannot become one."""
    problems, limits, first = [], {}, next(iter(metas.items()))
    for folder, meta in metas.items():
        if meta["tokenizer"] != first[1]["tokenizer"]:
            names = (f"{path}: {one['tokenizer']['name']}" for path, one in (first, (folder, meta)))
            problems.append(f"the tokens are not of one tokenizer: {', '.join(names)}")
        for signal, limit in meta["limits"].items():
            known, where = limits.setdefault(signal, (limit, folder))
            if limit != known:
                problems.append(
                    f"{folder} holds out other documents ({signal}) than {where}: prepare both "
                    "with the same --val-fraction; what has only a few documents takes another "
                    "share, so add its files with --append in place of merging"
                )
    return problems


def main(argv: list[str] | None = None):
    """`python -m lab.merge`."""
    parser = argparse.ArgumentParser(
        prog="lab.merge", description="Make one prepared folder of several."
    )
    add = parser.add_argument
    add("folders", nargs="+", metavar="DIR", help="a folder that `python data.py prepare` made")
    add("--out", required=True, metavar="DIR", help="the folder to make; must not be there")
    add("--weight", action="append", default=[], metavar="NAME=W", help=WEIGHT_HELP)
    args = parser.parse_args(argv)
    tell(args.out, merge(args.folders, args.out, weights=dict(map(parse_weight, args.weight))))


if __name__ == "__main__":
    console.run(main, "stopped; the same command begins again")
