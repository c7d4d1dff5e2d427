"""run_folder.py - what a run finds and leaves on the disk.

1. the folder      its lock, config.json, the log; what a new run may not touch
2. going on        the settings and stages of a run that is resumed
3. the text        the corpus, and whether it is still the same one
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import platform
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import torch

import data
import parallel
import schedule
from checkpoint import find_checkpoint, list_checkpoints, read_info, step_of
from console import make_folder, refuse, replace_file
from flm import FLMConfig
from machine import Machine
from parallel import World
from prepare import prepare_once
from schedule import Stage
from settings import FIELDS, Settings, check_settings, flag
from textfiles import stdlib_files
from tokenizer import get_tokenizer

# --------------------------------------------------------------------------------------------------
# 1. The folder


# How the lock of a run begins: by this, a folder is known as ours.
LOCK_MARK = "locked by train.py: "


def read_run(folder) -> tuple[Settings, list[Stage]]:
    """Settings and stages of an existing run. Raises ValueError where there is none."""
    try:
        run = json.loads((Path(folder) / "config.json").read_text())
        return Settings(**run["settings"]), [Stage.from_dict(stage) for stage in run["stages"]]
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{folder} is not the folder of a run: no readable config.json in it ({error})"
        ) from error


ONCE = {"data_changed": False, "profile": None}  # asked for once, not for ever


def write_run(
    folder: Path, s: Settings, stages: list[Stage], machine: Machine, corpus: data.Corpus
):
    """Write config.json: everything that the run can be repeated from."""
    content = {
        "settings": dataclasses.asdict(s) | ONCE,
        "stages": [stage.to_dict() for stage in stages],
        "corpus": str(corpus.path),
        "corpus_digest": corpus.digest,
        "machine": machine.why,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    replace_file(folder / "config.json", json.dumps(content, indent=1) + "\n")


def has_checkpoint(folder) -> bool:
    """Whether there is a run in the folder that can be resumed."""
    try:
        return find_checkpoint(folder).is_dir()
    except ValueError:
        return False


def is_ours(folder: Path) -> bool:
    """Whether train.py has written a run into this folder: its lock says so."""
    lock = folder / "lock"
    return lock.is_file() and lock.read_bytes().startswith(LOCK_MARK.encode())


def check_unused(folder: Path):
    """Raises ValueError where a new run must not write. A folder of ours without a checkpoint and
    with an empty log is fine: its run was killed in its first save, and nothing of it is lost."""
    if has_checkpoint(folder):
        where = shlex.quote(str(folder))
        raise ValueError(
            f"{folder} holds another run: go on with it (--resume {where}) or choose another "
            "folder (--out)"
        )
    log, ours = folder / "metrics.jsonl", is_ours(folder)
    if ours and log.is_file() and log.stat().st_size:
        raise ValueError(
            f"{folder} holds the log of another run, whose checkpoints are gone: choose another "
            "folder (--out)"
        )
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()) and not ours:
        raise ValueError(f"{folder} exists and is not a run: choose another folder (--out)")


def lock_folder(folder: Path, stack: contextlib.ExitStack):
    """Hold the lock of a run until `stack` closes; the system releases it however the process
    ends. Raises ValueError where another process holds it. Windows has no such lock."""
    lock = stack.enter_context(open(folder / "lock", "a+"))
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError:
        lock.seek(0)
        holder = lock.read().strip().removeprefix(LOCK_MARK) or "still starting"
        raise ValueError(
            f"{folder} is being written by another run ({holder}): wait for it, or choose another "
            "folder (--out)"
        ) from None
    lock.truncate(0)
    lock.write(f"{LOCK_MARK}process {os.getpid()} on {platform.node()}\n")
    lock.flush()
    os.fsync(lock.fileno())  # a network file system shows it to others only now


def check_shared(folder: Path, lock: str, patience: float = parallel.PATIENCE):
    """Raises ValueError where the folder's lock does not become what rank 0 has read there, in
    `patience` seconds: then this host has another folder under that name, and every checkpoint
    would lack its pieces."""
    end = time.monotonic() + patience
    while not is_ours(folder) or (folder / "lock").read_text() != lock:
        if time.monotonic() > end:
            raise ValueError(
                f"{platform.node()} does not have the folder {folder} that rank 0 writes to: give "
                "--out a folder on a file system that all hosts share"
            )
        time.sleep(0.2)


def claim_folder(s: Settings, stack: contextlib.ExitStack) -> str:
    """Choose, make and lock the folder of a new run; two runs that start at once get two folders.

    If the run ends before its first checkpoint, what was made is removed again, and nothing else.
    Raises ValueError for a folder that holds something, and where a file is in its way; OSError
    where it cannot be made."""
    for n in itertools.count(1):
        folder = Path(s.out or f"runs/{s.preset}" + (f"-{n}" if n > 1 else ""))
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        if s.out:
            check_unused(folder)
        try:
            make_folder(folder) if s.out else folder.mkdir(parents=True)
            break
        except FileExistsError:  # a run of ours, perhaps one that began a moment ago
            continue
        except OSError as error:
            problem = f"cannot make the run's folder {folder}: {error.strerror}"
            raise OSError(f"{problem}; choose another (--out)") from error
    lock_folder(folder, stack)
    check_unused(folder)
    stack.callback(remove_unbegun, folder, made)
    return str(folder)


def remove_unbegun(folder: Path, made: list[Path]):
    """Remove what a run has made before its first checkpoint, if it has none."""
    if has_checkpoint(folder):
        return
    for name in ("config.json", "metrics.jsonl", "lock"):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty: somebody else's files
        for path in made:
            path.rmdir()


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's log, without a last one that a killed run cut off. Raises ValueError
    that names the line which is not JSON with a step."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = []
    for number, line in enumerate(text.rpartition("\n")[0].splitlines(), 1):
        try:
            values = json.loads(line)
            if not isinstance(values["step"] + values.get("stage", 0), int):
                raise TypeError("a step is a whole number")
            lines.append(values)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number} is not a line of a log, which is JSON with a step "
                f"({error!r}): remove that line"
            ) from error
    return lines


def cut_log(folder: Path, step: int, stage: int):
    """Drop the log's lines on steps and growths after the checkpoint of that step and stage: the
    run writes them again. A last line that was cut off is dropped too."""
    lines = [line for line in read_log(folder) if line["step"] <= step]
    kept = [json.dumps(line) + "\n" for line in lines if line.get("stage", 0) <= stage]
    replace_file(folder / "metrics.jsonl", "".join(kept))


# --------------------------------------------------------------------------------------------------
# 2. Going on


def resumed_stages(s: Settings) -> list[Stage]:
    """The stages of the run in s.out, with what --resume may change: its end, and the peak of the
    learning rate."""
    old, stages = read_run(s.out)
    return schedule.extend_stages(stages, s.steps - old.steps, s.lr / old.lr)


def check_decay(s: Settings, samples: int):
    """Raises ValueError where another end, or another decay, would make the learning rate of a run
    with wsd jump: where the run is inside the old decay or the new one."""
    old, stages = read_run(s.out)
    before, now = (stages, old.lr_decay), (resumed_stages(s), s.lr_decay)
    starts = schedule.decay_start(*before), schedule.decay_start(*now)
    if samples <= min(starts):
        return
    paths = list_checkpoints(s.out)
    newer = [path for path in paths if read_info(path)["samples"] > min(starts)]
    advice = "no checkpoint from before it is left: begin a new run (--out)"
    if len(newer) < len(paths):
        names = " ".join(shlex.quote(str(path)) for path in newer)
        advice = (
            f"go back to {paths[-len(newer) - 1]}, which is from before it: remove the newer "
            f"checkpoints, and give the same command again\n  rm -r {names}"
        )
    raise ValueError(
        f"{s.out} is at sample {samples:,}. Its learning rate falls from sample {starts[0]:,} on; "
        f"with --steps {s.steps} --lr-decay {s.lr_decay:g} it would from sample {starts[1]:,} on. "
        f"So it would jump: {advice}"
    )


def set_diverged_aside(folder: Path, is_sound: Callable[[float], bool]) -> str | None:
    """The newest checkpoint of a run whose next step had a sound loss. Newer ones get another name,
    and so are no checkpoints any more; nothing happens where none is sound."""
    losses = {line["step"] - 1: line["loss"] for line in read_log(folder) if "loss" in line}
    ruined = []
    for path in reversed(list_checkpoints(folder)):
        if is_sound(losses.get(step_of(path.name), math.inf)):
            for old in ruined:
                names = (old.with_name(f"{old.name}.diverged-{n}") for n in itertools.count(1))
                old.rename(next(name for name in names if not name.exists()))
            return str(path)
        ruined.append(path)
    return None


def program(world: World) -> str:
    return "python train.py" if world.size == 1 else "torchrun ... train.py"


def resume_command(world: World, folder) -> str:
    return f"{program(world)} --resume {shlex.quote(str(folder))}"


def resumed(folder: str, given: dict) -> Settings:
    """The settings of the run in `folder`, changed by what was given. Raises ValueError for what
    --resume may not change, and where the run is already at its end."""
    where = shlex.quote(str(folder))
    if (Path(folder) / "checkpoint.json").exists():
        parent = shlex.quote(str(Path(folder).parent))
        raise ValueError(f"{folder} is one checkpoint; --resume takes its run: --resume {parent}")
    s, _ = read_run(folder)
    wanted = dataclasses.replace(s, **given)
    changed = {k: getattr(wanted, k) for k in given if getattr(wanted, k) != getattr(s, k)}
    fixed = {field.name for field in FIELDS if not field.metadata.get("resume")} & set(changed)
    problems = [f"{flag(k)} {changed[k]}: this run has {getattr(s, k)}" for k in sorted(fixed)]
    refuse(problems, "a run fixes these, start a new one to change them:")
    info = read_info(find_checkpoint(folder))
    s = dataclasses.replace(s, out=str(folder), **changed)
    refuse(check_settings(s))
    if not schedule.total_steps(resumed_stages(s), info["samples"]):
        more = f"ask for more, as in --resume {where} --steps {2 * info['step']}"
        raise ValueError(f"{folder} has done its {info['step']} steps: {more}")
    if s.lr_schedule == "wsd" and changed.keys() & {"steps", "lr_decay"}:
        check_decay(s, info["samples"])
    for name in {"steps", "lr", "min_lr", "lr_decay"} & set(changed):
        follows = "the learning rate follows the new schedule from here on"
        print(f"{flag(name)} is now {changed[name]}: {follows}")
    return s


# --------------------------------------------------------------------------------------------------
# 3. The text


def find_text(run: Path, given: str | None) -> tuple[str, str | None]:
    """(where the text of an existing run is, its digest when the run began). given: --data. Raises
    ValueError where the folder of before is gone."""
    config = json.loads((run / "config.json").read_text())
    text = given or config["corpus"]
    if text == config["corpus"] and not Path(text).exists():
        raise ValueError(
            f"the text of {run} was in {text}, and from here there is no such folder: say where it "
            "is with --data DIR"
        )
    return text, config.get("corpus_digest")


def default_corpus(tokenizer: str, tokenizer_file: str | None, config: FLMConfig) -> str:
    """The folder of the default corpus, Python's standard library, prepared on first use."""
    version = platform.python_version()
    folder = f"corpora/stdlib-{version}-{tokenizer}"
    if not Path(folder, "meta.json").is_file():
        encoding = get_tokenizer(tokenizer, tokenizer_file)
        check_vocabulary(encoding, config, folder)
        print(f"preparing the default corpus, Python {version}'s own source, in {folder}")
        prepare_once({"stdlib": stdlib_files()}, folder, encoding)
    return folder


def check_vocabulary(encoding, config: FLMConfig, folder: str):
    if encoding.n_vocab > config.vocab_size:
        raise ValueError(
            f"{folder} is made of {encoding.name} tokens, whose ids go up to "
            f"{encoding.n_vocab - 1}; the model's vocabulary ends at {config.vocab_size - 1}: add "
            f"--model vocab_size={-(-encoding.n_vocab // 128) * 128}"
        )


def open_corpus(
    folder: str | None,
    tokenizer: str,
    tokenizer_file: str | None,
    config: FLMConfig,
    world: World = World(),
    document_mask: bool = False,
) -> data.Corpus:
    """A prepared folder; None: the default corpus, which rank 0 prepares on first use. Raises
    ValueError where its ids exceed the model's vocabulary."""
    folder = folder or world.on_rank_0(default_corpus, tokenizer, tokenizer_file, config)
    options = folder, config.max_seq_len, tokenizer_file, document_mask
    corpus = world.raise_on_all_ranks(data.Corpus, *options)
    digest = world.broadcast_from_rank_0(corpus.digest)
    world.raise_on_all_ranks(check_same_corpus, corpus, digest)
    check_vocabulary(corpus.tokenizer, config, folder)
    for split, n in corpus.teacher_left_out.items():
        if n:
            too_long = f"longer than {config.max_seq_len} tokens and left out"
            print(f"{folder}: {n:,} teacher items ({split}) are {too_long}")
    return corpus


def check_same_corpus(corpus: data.Corpus, digest: str):
    """Raises ValueError where this host's text is not that of rank 0, which has this digest."""
    if corpus.digest != digest:
        raise ValueError(
            f"{corpus.path} on {platform.node()} is not the text that rank 0 has under that name: "
            "copy it from rank 0's host, or give --data a folder that all hosts share"
        )


def check_corpus(s: Settings, corpus: data.Corpus, digest: str | None):
    """Raises ValueError for a text that a run cannot use, or that is not the text of before."""
    if s.teacher_fraction and not corpus.n_rows("train", "teacher"):
        raise ValueError(
            f"--teacher-fraction {s.teacher_fraction}, but {corpus.path} has no teacher signal: "
            "prepare it with --teacher FILE.jsonl"
        )
    if digest not in (None, corpus.digest) and not s.data_changed:
        raise ValueError(
            f"the text in {corpus.path} is not the one that this run began with, so the batches "
            "would be other ones: give the folder of the same text (--data DIR), or say that you "
            "want another text (--data-changed)"
        )


def print_repeats(corpus: data.Corpus, samples: int, teacher_fraction: float):
    """Say which sources a run of so many samples reads more than once."""
    for name, epochs in corpus.epochs(samples, teacher_fraction).items():
        if epochs >= 1.05:
            print(
                f"note: this run reads {name} {epochs:.1f} times, each time in another order: more "
                "text, or a smaller share of the rows, repeats less"
            )


def check_tokenizer(corpus: data.Corpus, name: str, where):
    if corpus.tokenizer.name != name:
        raise ValueError(
            f"{corpus.path} is made of {corpus.tokenizer.name} tokens, {where} was trained on "
            f"{name}: prepare the text with --tokenizer {name}"
        )
