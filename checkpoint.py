"""checkpoint.py - a model and its optimizer on disk."""
from __future__ import annotations

import json
import os
import shlex
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from flm import FLM, FLMConfig, growth_mask


FORMAT = 1         # version of the checkpoint folder that this code reads and writes


def why(error: BaseException) -> str:
    """The reason of a failed write in one line: PyTorch's writers hide a full disk behind errors of their own."""
    cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    while cause.__context__ is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return isinstance(cause, OSError) and cause.strerror or (str(cause).strip() or repr(cause)).splitlines()[-1]


def write_checkpoint(folder: Path, tensors: dict, info: dict, group=None) -> Path:
    """Write {"model": {name: tensor}, ...} and `info` (JSON values) as a checkpoint folder.

    Written to folder.tmp, then renamed: a folder without .tmp is whole, whatever happened. Raises OSError where it
    cannot be written (a full disk), after removing the half that was.

    group: a process group of all processes, each of which calls this with its pieces (DTensors) of the tensors, on a file
    system that all of them see. Each writes a file, rank 0 does the rest, and nobody goes on before the folder is whole."""
    tmp, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old.tmp")

    def on_rank_0(action):
        """A failure of rank 0 is everybody's: else the others would wait for it."""
        failure = [None]
        if group is None or dist.get_rank() == 0:
            try:
                action()
            except OSError as error:
                failure = [error]
        if group is not None:
            dist.broadcast_object_list(failure, src=0, group=group)
        if failure[0] is not None:
            raise failure[0]

    def begin():
        for half in (tmp, old):
            shutil.rmtree(half, ignore_errors=True)
        tmp.mkdir(parents=True)

    def finish():
        files = {p.name: p.stat().st_size for p in sorted(tmp.iterdir())}
        with open(tmp / "checkpoint.json", "w") as file:
            json.dump({"format": FORMAT, **info, "files": files}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if folder.exists():                      # the same step again: the old one goes only when the new one is there
            folder.rename(old)
        tmp.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    try:
        on_rank_0(begin)
        with warnings.catch_warnings():          # "distributed is uninitialized": yes, and no_dist says so
            warnings.simplefilter("ignore")
            dcp.save(tensors, checkpoint_id=tmp, no_dist=group is None, process_group=group)
        on_rank_0(finish)
    except (OSError, RuntimeError, CheckpointException) as error:
        shutil.rmtree(tmp, ignore_errors=True)
        raise OSError(f"could not write the checkpoint {folder}: {why(error)}") from error
    return folder


def find_checkpoint(path) -> Path:
    """What CHECKPOINT on a command line means: a step folder, the newest one of a run folder, or a file of weights.
    Raises ValueError that says what is there instead."""
    path = Path(path)
    if path.is_file() or (path / "checkpoint.json").is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"no checkpoint at {path}: there is no such file or folder")
    steps = sorted(p for p in path.glob("step-*") if p.suffix != ".tmp" and (p / "checkpoint.json").is_file())
    if not steps:
        raise ValueError(f"no checkpoint in {path}: expected a run folder with step-... folders, one of those, or a file "
                         f"written by train.py --export")
    return steps[-1]


INFO = ("config", "dtype", "tokenizer", "samples", "growth")     # what load_model needs


def check_info(path: Path, info: dict, needed=INFO):
    missing = [key for key in needed if key not in info]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it was edited, or not written by train.py")
    if info["dtype"] not in ("float32", "float64", "bfloat16", "float16"):
        raise ValueError(f"{path}: unknown dtype {info['dtype']!r}")


def read_info(path: Path) -> dict:
    """checkpoint.json of a step folder, after checking that the folder is whole and of this format."""
    try:
        info = json.loads((path / "checkpoint.json").read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path / 'checkpoint.json'} is not readable JSON ({error}): the checkpoint was cut off or edited")
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise ValueError(f"{path / 'checkpoint.json'} has checkpoint format {info.get('format') if isinstance(info, dict) else None!r}, "
                         f"this code reads {FORMAT}: use the version of this repository that wrote it")
    check_info(path / "checkpoint.json", info, ("files", *INFO))
    broken = [f"{name}: {size:,} bytes expected, " + (f"{(path / name).stat().st_size:,} found" if (path / name).is_file() else "missing")
              for name, size in info["files"].items() if not (path / name).is_file() or (path / name).stat().st_size != size]
    if broken:
        raise ValueError(f"{path} is cut off or damaged:\n  " + "\n  ".join(broken) + f"\nto go on from the checkpoint before it, remove this one: rm -r {shlex.quote(str(path))}")
    return info


def read_tensors(path: Path, tensors: dict):
    """Fill {"model": {name: tensor}, ...} in place from a step folder. Raises ValueError where names or shapes differ."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, checkpoint_id=path, no_dist=True)
    except CheckpointException as error:
        raise ValueError(f"{path} does not hold these tensors: {str(error).strip().splitlines()[-1]}") from error


def load_model(path, device="cpu") -> tuple[FLM, dict]:
    """The model of a CHECKPOINT (see find_checkpoint), its growth masks in place, and its info:
    {"config", "tokenizer", "samples", "growth", ...}."""
    path = find_checkpoint(path)
    if path.is_file():
        try:
            blob = torch.load(path, map_location="cpu", weights_only=True)
            info, weights = blob["info"], blob["model"]
        except Exception as error:               # torch.load fails in many ways on a file that is no such file
            raise ValueError(f"{path} is not a file of weights written by train.py --export, or it was cut off "
                             f"({type(error).__name__})") from error
        check_info(path, info)
    else:
        info, weights = read_info(path), None
    with torch.device("meta"):
        model = FLM(FLMConfig.from_dict(info["config"]))
    model = model.to(getattr(torch, info["dtype"])).to_empty(device=device)
    parameters = dict(model.named_parameters())
    if weights is None:
        read_tensors(path, {"model": parameters})
    else:
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        wrong = [f"{name}: shape {tuple(p.shape)} expected, found {found.get(name, 'nothing')}"
                 for name, p in parameters.items() if found.get(name) != tuple(p.shape)]
        if wrong:
            raise ValueError(f"{path} does not hold the weights of its configuration:\n  " + "\n  ".join(wrong))
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
    model.set_masks(info["growth"], growth_mask(info["growth"], info["samples"]))
    return model, info


def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda[:n]. Raises ValueError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: use auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported: use auto, cpu or cuda")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {name!r} asked for, but PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
                         f"devices: use --device cpu, or install a CUDA build of PyTorch")
    return device


def export_weights(checkpoint: str, file: str):
    """One file that torch.load(weights_only=True) reads: {"info": ..., "model": {name: tensor}}."""
    model, info = load_model(checkpoint)
    if Path(file).is_dir():
        raise ValueError(f"{file} is a folder: give the name of a file")
    tmp = Path(file + ".tmp")
    try:
        torch.save({"info": {k: v for k, v in info.items() if k != "files"},
                    "model": {k: p.detach() for k, p in model.named_parameters()}}, tmp)
        tmp.replace(file)
    except (OSError, RuntimeError) as error:
        tmp.unlink(missing_ok=True)
        raise OSError(f"could not write {file}: {why(error)}") from error
    print(f"wrote {file}: python flm.py sample {shlex.quote(file)} --prompt TEXT")
