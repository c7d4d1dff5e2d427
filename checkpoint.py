"""checkpoint.py - a model and its optimizer on disk: whole or not there, in any layout.

A run (of train.py) has a folder, and in it a step folder for each checkpoint:

    runs/demo/step-00000200/checkpoint.json     plain JSON: the configuration, the samples seen so
                                                far, the record of the last growth (grow.py)
                            .metadata           which piece of which tensor lies where
                            __0_0.distcp        the pieces that process 0 held

PyTorch's distributed checkpoint (DCP) writes the tensors: each process writes the pieces that it
holds, and each process reads the pieces that it needs. So a model may be cut over processes in one
way (a layout, parallel.py) when it is written, and in another way when it is read.

Security: .metadata is a pickle. Trust a step folder as you trust code. `python -m lab.publish save
RUN --to FILE --as pt` writes one file that holds no code; pass that file around.

Read it from top to bottom:

    1. the folders of a run    their names, which are whole, which may be removed
    2. writing                 at once, or while training goes on; why a write failed
    3. reading                 read_info, read_tensors
    4. training                AdamW's moments beside the weights
    5. one model               load_model
"""

import contextlib
import json
import os
import re
import shlex
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from console import refuse
from flm import FLM, FLMConfig, growth_mask

FORMAT = 1  # version of the step folder that this code reads and writes

# --------------------------------------------------------------------------------------------------
# 1. The folders of a run

PARTS = re.compile(r"checkpoint\.json|\.metadata(\.tmp)?|__\d+_\d+\.distcp")  # our own files
LEFTOVER = re.compile(r"step-\d{8,}(\.old)?\.tmp")  # folders of a process killed while it wrote


def step_name(step: int) -> str:
    """The name of a step folder: the inverse of step_of."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that the name of a step folder stands for; None for any other name.

    >>> [step_of(name) for name in ("step-00000200", "step-123456789")]
    [200, 123456789]
    >>> [step_of(name) for name in ("step-200", "step-best", "step-00000200.tmp")]
    [None, None, None]
    """
    match = re.fullmatch(r"step-(\d{8,})", name)
    return int(match[1]) if match else None


def is_step(path: Path) -> bool:
    """Whether a folder is named as a step, and was written as that step. A copy under the number of
    another step is none: as "the newest" it would have the real ones removed."""
    step, file = step_of(path.name), path / "checkpoint.json"
    if step is None or not file.is_file():
        return False
    try:
        info = json.loads(file.read_text())
    except ValueError:  # it is damaged, as read_info will say
        return True
    return not isinstance(info, dict) or info.get("step", step) == step


def written_steps(run: Path) -> list[Path]:
    """The step folders of a run, oldest first. checkpoint.json is written last, so each one was
    whole once. It may be damaged today."""
    return sorted(filter(is_step, run.glob("step-*")), key=lambda path: step_of(path.name))


def list_checkpoints(run: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first: folders with the exact name of a step (see
    step_of) in which no file is missing or cut off. Anything else in the run is not looked at."""
    whole = []
    for path in written_steps(Path(run)):
        with contextlib.suppress(ValueError, OSError):  # it is damaged
            read_info(path)
            whole.append(path)
    return whole


def find_checkpoint(path: str | Path) -> Path:
    """What CHECKPOINT on a command line means: a step folder, the newest one of a run folder, or a
    file of weights.

    The newest step folder of a run may be damaged. It is returned all the same, and read_info says
    what is wrong: training must not go back to an older one in silence. Raises ValueError where
    there is no checkpoint."""
    path = Path(path)
    if path.is_file() or (path / "checkpoint.json").is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"no checkpoint at {path}: there is no such file or folder")
    steps = written_steps(path)
    if not steps:
        raise ValueError(
            f"no checkpoint in {path}: expected a run folder with step folders such as "
            "step-00000200, one of those, or a file from lab.publish save --as pt"
        )
    return steps[-1]


def remove_parts(folder: Path):
    """Remove the files of a checkpoint, and its folder if it then is empty. Other files stay.
    checkpoint.json goes first: without it the rest is no checkpoint, if this process is killed."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for file in sorted(folder.iterdir(), key=lambda file: file.name != "checkpoint.json"):
        if PARTS.fullmatch(file.name):
            file.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def remove_old_checkpoints(run: str | Path, keep: int, spare: int | None = None):
    """Keep the `keep` newest whole checkpoints of a run, at least one, and that of the step
    `spare`. Remove the older ones, and what a killed process left half written. Nothing else in the
    run is touched."""
    for folder in list_checkpoints(run)[: -max(1, keep)]:
        if step_of(folder.name) != spare:
            remove_parts(folder)
    for folder in Path(run).glob("step-*.tmp"):
        if LEFTOVER.fullmatch(folder.name):
            remove_parts(folder)


# --------------------------------------------------------------------------------------------------
# 2. Writing


def causes(error: BaseException) -> list[BaseException]:
    """The error and what lies behind it: DCP collects the errors of all ranks in one of its own,
    and PyTorch's writers hide a full disk, or Ctrl-C, behind a second error."""
    found, errors = [], [error]
    if isinstance(error, CheckpointException):
        errors = [first for first, _ in error.failures.values()]  # {rank: (error, traceback)}
    for cause in errors:
        while cause is not None:
            found.append(cause)
            cause = cause.__context__
    return found


def failed_write(what: str | Path, error: BaseException) -> BaseException:
    """The exception to raise after a failed write: OSError with the reason in one line, in the
    operating system's words if it was the cause. Ctrl-C stays Ctrl-C."""
    found = causes(error)
    if any(isinstance(cause, KeyboardInterrupt) for cause in found):
        return KeyboardInterrupt()
    reason = (str(found[-1]).strip() or repr(found[-1])).splitlines()[-1]
    for cause in reversed(found):  # so that the first one counts
        if isinstance(cause, OSError) and cause.strerror:
            reason = f"{cause.strerror}: {cause.filename}" if cause.filename else cause.strerror
    return OSError(f"could not write {what}: {reason}")


class OneProcess:
    """What files above parallel.py need of its World, where one process works alone."""

    rank, size, files = 0, 1, None

    def on_rank_0(self, action: Callable, *args, **options):
        return action(*args, **options)

    on_all_ranks = on_rank_0


def make_empty(folder: Path):
    """An empty folder, in place of what a killed process left under that name."""
    remove_parts(folder)
    folder.mkdir(parents=True)


class StepWriter(dcp.FileSystemWriter):
    """DCP's writer of files, which writes a step folder FOLDER as FOLDER.tmp. DCP calls `finish` on
    rank 0 when all ranks have written their files: it makes a checkpoint of them."""

    def __init__(self, folder: Path, info: dict):
        super().__init__(folder.with_name(folder.name + ".tmp"))
        self.folder, self.info = folder, info

    def finish(self, metadata, results):
        """Write .metadata, then checkpoint.json, then rename the folder. A checkpoint that stands
        there already, of the same step, goes away only when the new one is in its place."""
        super().finish(metadata, results)
        files = {path.name: path.stat().st_size for path in sorted(self.path.iterdir())}
        with open(self.path / "checkpoint.json", "w") as file:
            json.dump({"format": FORMAT, **self.info, "files": files}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        old = self.folder.with_name(self.folder.name + ".old.tmp")
        remove_parts(old)
        if self.folder.exists():
            self.folder.rename(old)
        self.path.rename(self.folder)
        remove_parts(old)


@contextlib.contextmanager
def failed_writes(writer: StepWriter, world):
    """Around a write: after an error of it, remove the half that was written, and raise what
    failed_write makes of it."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        if world.rank == 0:
            remove_parts(writer.path)
        raise failed_write(f"the checkpoint {writer.folder}", error) from error


def begin_write(save: Callable, folder: Path, tensors: dict, info: dict, world):
    """Call `save`, which is dcp.save or dcp.async_save. Returns (its result, the writer)."""
    # DCP warns that torch.distributed is not initialized, which no_dist already says.
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    writer, group = StepWriter(folder, info), world.files
    with failed_writes(writer, world):
        world.on_rank_0(make_empty, writer.path)
        options = {"process_group": group, "no_dist": group is None}
        return save(tensors, storage_writer=writer, **options), writer


def write_checkpoint(folder: Path, tensors: dict, info: dict, world=OneProcess()) -> Path:
    """Write a step folder; returns it.

    tensors: {"model": {name: tensor}, "optimizer": {name: tensor}}, as training_tensors (section 4)
    gives them; without "optimizer" it is a checkpoint for inference.
    info: JSON values; INFO (section 3) names those that every checkpoint needs.
    world: a parallel.World. Each rank calls this with its pieces (DTensors) of the tensors, on a
    file system that all of them see; no rank returns before the folder is whole.

    Everything is written to FOLDER.tmp, which is then renamed. So a folder without .tmp is whole,
    whenever the process was killed. Raises OSError where the folder cannot be written (a full
    disk), after removing the half that was."""
    begin_write(dcp.save, folder, tensors, info, world)
    return folder


def write_in_background(
    folder: Path, tensors: dict, info: dict, world=OneProcess()
) -> tuple[Callable[[], bool], Callable[[], None]]:
    """write_checkpoint while training goes on: copies the tensors into the memory of the CPU, and
    lets a thread write the copy.

    Returns (done, wait). done(): whether the write has ended, well or not. wait(): returns when the
    folder is whole, and raises what write_checkpoint raises."""
    future, writer = begin_write(dcp.async_save, folder, tensors, info, world)

    def wait():
        with failed_writes(writer, world):
            future.result()

    return future.done, wait


# --------------------------------------------------------------------------------------------------
# 3. Reading

INFO = ("config", "dtype", "tokenizer", "samples", "growth")  # what load_model needs
DTYPES = ("float32", "float64", "bfloat16", "float16")


def check_info(path: Path, info: dict, needed: tuple[str, ...] = INFO):
    """Raise ValueError with every key that is missing, and for a dtype that is none."""
    problems = [f"{key} is missing" for key in needed if key not in info]
    if info.get("dtype", "float32") not in DTYPES:
        problems.append(f"dtype {info['dtype']!r} is none of {', '.join(DTYPES)}")
    refuse(problems, f"{path} was edited, or not written by train.py:")


def damaged_files(folder: Path, sizes: dict[str, int]) -> list[str]:
    """What is wrong with the files of a step folder. sizes: {name: bytes} when it was written."""
    problems = []
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{name}: {size:,} bytes expected, missing")
        elif file.stat().st_size != size:
            problems.append(f"{name}: {size:,} bytes expected, {file.stat().st_size:,} found")
    return problems


def read_info(path: Path) -> dict:
    """checkpoint.json of a step folder: what write_checkpoint got as `info`, "format" and "files".
    Raises ValueError where the folder is damaged or of another format."""
    file = path / "checkpoint.json"
    try:
        info = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not readable JSON ({error}): it was cut off or edited")
    version = info.get("format") if isinstance(info, dict) else None
    if version != FORMAT:
        raise ValueError(
            f"{file} has checkpoint format {version!r}, this code reads {FORMAT}: use the version "
            "of this repository that wrote it"
        )
    check_info(file, info, ("files", *INFO))
    refuse(
        damaged_files(path, info["files"]),
        f"{path} is cut off or damaged. To go on from the checkpoint before it, remove this one:\n"
        f"  rm -r {shlex.quote(str(path))}\nWhat is wrong:",
    )
    return info


def read_tensors(path: Path, tensors: dict):
    """Fill {"model": {name: tensor}, ...} in place from a step folder that any layout wrote.
    Raises ValueError where a name or a shape differs."""
    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.load(tensors, checkpoint_id=path, no_dist=True)
    except CheckpointException as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{path} does not hold these tensors: {reason}") from error


def stored_tensors(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """{"model.norm.weight": (shape, dtype), ...} of a step folder, without reading the tensors."""
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return {key: (meta.size, meta.properties.dtype) for key, meta in stored.items()}


# --------------------------------------------------------------------------------------------------
# 4. Training: AdamW's moments beside the weights

# Names and parameters of this process. A process that holds both the first and the last layers of a
# pipeline (parallel.py) has "embedding.weight" twice: the two ends of a tied embedding.
Named = list[tuple[str, torch.nn.Parameter]]


def training_tensors(named: Named, optimizer: torch.optim.AdamW) -> dict[str, dict]:
    """What a checkpoint holds of this process: {"model": {"layers.0.attn.o.weight": tensor, ...},
    "optimizer": {"layers.0.attn.o.weight.exp_avg": tensor, ...}}.

    Before the first step AdamW has no state. It is made here, of zeros as AdamW would make it, so
    that a checkpoint can be read into it. Of the ends of a tied embedding the first is taken."""
    tensors = {"model": {}, "optimizer": {}}
    for name, parameter in named:
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        if name not in tensors["model"]:
            tensors["model"][name] = parameter
            tensors["optimizer"] |= {f"{name}.{key}": value for key, value in state.items()}
    return tensors


@torch.no_grad()
def read_training(named: Named, optimizer: torch.optim.AdamW, path: Path):
    """Read weights and moments of a checkpoint, written in any layout, into these parameters and
    this optimizer. A checkpoint without moments (lab/publish.py) leaves them at zero. Raises
    ValueError as read_tensors does."""
    tensors = training_tensors(named, optimizer)
    has_moments = any(key.startswith("optimizer.") for key in stored_tensors(path))
    read_tensors(path, tensors if has_moments else {"model": tensors["model"]})
    for name, parameter in named:
        first = tensors["model"][name]
        if first is not parameter:  # the other end of a tied embedding
            parameter.copy_(first)
            for key, value in optimizer.state[parameter].items():
                value.copy_(tensors["optimizer"][f"{name}.{key}"])


# --------------------------------------------------------------------------------------------------
# 5. One model


def read_exported(file: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(info, {name: tensor}) of a file that lab/publish.py wrote. Raises ValueError for another."""
    try:
        blob = torch.load(file, map_location="cpu", weights_only=True)
        info, weights = blob["info"], blob["model"]
    except Exception as error:  # torch.load fails in many ways on a file that is no such file
        raise ValueError(
            f"{file} is not a file of weights from lab.publish save --as pt, or it was cut off "
            f"({type(error).__name__})"
        ) from error
    check_info(file, info)
    return info, weights


def copy_weights(model: FLM, weights: dict[str, torch.Tensor], file: Path):
    """Fill the model. Raises ValueError with every tensor that is missing or of another shape."""
    if model.config.tie_embeddings and "embedding.weight" in weights:
        weights = {**weights, "head.weight": weights["embedding.weight"]}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{file} does not hold the weights of its configuration: {error}"
        ) from None


def read_model(path: Path, device="cpu") -> tuple[FLM, dict]:
    """What load_model returns, for a step folder or a file, whether the weights are finite or not.
    The model is made without memory ("meta"), then with memory that the weights fill."""
    info, weights = read_exported(path) if path.is_file() else (read_info(path), None)
    with torch.device("meta"):
        model = FLM(FLMConfig.from_dict(info["config"]))
    model = model.to(getattr(torch, info["dtype"])).to_empty(device=device)
    if weights is None:
        read_tensors(path, {"model": dict(model.named_parameters())})
    else:
        copy_weights(model, weights, path)
    model.set_masks(info["growth"], growth_mask(info["growth"], info["samples"]))
    return model, info


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no number in the tensors is infinite or NaN. After a run diverged, some are."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def sound_checkpoint(run: str | Path) -> Path | None:
    """The newest whole checkpoint of a run whose weights are finite: the one to go back to after
    the run diverged. None where there is none."""
    for path in reversed(list_checkpoints(run)):
        if all_finite(read_model(path)[0].parameters()):
            return path
    return None


def load_model(path: str | Path, device="cpu") -> tuple[FLM, dict]:
    """The model of a CHECKPOINT (see find_checkpoint), its growth masks in place, and its info:
    {"config", "tokenizer", "samples", "growth", ...}. Only the checkpoint itself is read: other
    files beside it do not matter.

    Raises ValueError for what is no whole checkpoint, and for weights that are not finite numbers;
    then it names the checkpoint to use."""
    path = find_checkpoint(path)
    model, info = read_model(path, device)
    if not all_finite(model.parameters()):
        sound = sound_checkpoint(path.parent)
        advice = f"use {sound}" if sound else "train again with a smaller --lr, a longer --warmup"
        raise ValueError(f"{path} holds weights that are not finite: the run diverged; {advice}")
    return model, info
