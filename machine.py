"""machine.py - where a run computes and in what: device, arithmetic, and the peak rate that
utilisation is measured against."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
import time
from dataclasses import dataclass

import torch

import parallel
from parallel import World
from schedule import Stage
from settings import Settings, layout_of

# Dense bf16 peaks in TFLOP/s, from the makers' data sheets. The longest name that is part of the
# card's own name counts.
# fmt: off
PEAKS = {
    "A100": 312, "A800": 312, "H100": 989, "H800": 989, "H200": 989, "H100 PCIe": 756, "B200": 2250,
    "A10": 125, "A40": 150, "A6000": 155, "L4": 121, "L40": 181, "L40S": 362, "RTX 4090": 165,
    "RTX 3090": 71,
}
# fmt: on


@dataclass(frozen=True)
class Machine:
    """Where a run computes, and how."""

    device: torch.device
    dtype: torch.dtype  # of the arithmetic
    peak: float  # FLOP/s that utilisation is measured against, of all ranks
    why: str  # one line for a person
    measured: bool = True  # whether the peak is a measured one, not a data sheet's

    @property
    def weights(self) -> torch.dtype:
        """The dtype of weights and moments: bf16 arithmetic keeps fp32 weights."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def exact(self) -> Machine:
        """The same machine, computing in the dtype of the weights."""
        return dataclasses.replace(self, dtype=self.weights)

    def measure_again(self, world: World) -> Machine:
        """The best of several measurements is the peak: a busy machine only lowers one of them."""
        if not self.measured:
            return self
        (rate,) = world.sum(matmul_rate(self.device, self.dtype, 1024))
        return dataclasses.replace(self, peak=max(self.peak, rate))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def now(device: torch.device) -> float:
    """Seconds, after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def matmul_rate(device: torch.device, dtype: torch.dtype, n: int = 2048) -> float:
    """FLOP/s of the best of six n x n matrix products. Where products are slow (a CPU that has to
    emulate bf16), smaller ones."""
    size = min(n, 256)
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        best = math.inf
        for _ in range(6):
            start = now(device)
            a @ b
            best = min(best, now(device) - start)
        if size >= n or best > 0.1:
            return 2 * size**3 / best
        size = min(n, 2 * size)


def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda, cuda:n or mps. Raises ValueError for a device that is not there.

    auto never takes mps: it has no float64, and nothing was tried on it."""
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", name):
        raise ValueError(f"unknown device {name!r}: use auto, cpu, cuda or mps")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' asked for, but PyTorch sees no Apple GPU: use --device cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"device {name!r} asked for, but PyTorch {torch.__version__} sees {count} CUDA "
            "devices: use --device cpu, or install a CUDA build of PyTorch"
        )
    return device


def check_device(name: str, world: World) -> torch.device:
    """The device that this rank computes on. Raises ValueError where ranks would share a GPU."""
    device, cards = pick_device(name), torch.cuda.device_count()
    shared = device.index is not None or world.neighbours > cards
    if device.type == "cuda" and world.size > 1 and shared:
        raise ValueError(
            f"--device {name}: {world.neighbours} processes on this machine take a GPU each, and "
            f"it has {cards}: give torchrun --nproc-per-node {cards} and train.py --device cuda, "
            "or --device cpu"
        )
    return device


# A CPU with one of these computes bf16 matrix products faster than fp32 ones.
BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")


def pick_dtype(device: torch.device, dtype: str) -> tuple[str, str]:
    """The arithmetic of a run, and the reason in brackets. `auto` decides by what the processor
    can do and never by a stopwatch, so machines of one kind choose alike. bf16 has the range of
    fp32 with fewer digits, so it needs no loss scaling (section 3)."""
    if device.type == "mps" and dtype == "float64":
        raise ValueError("--dtype float64: an Apple GPU has no float64: use --device cpu")
    if dtype != "auto":
        return dtype, ""
    if device.type == "mps":
        return "float32", " (bf16 was not tried on it)"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float32", f" (compute capability {major}.{minor})"
    known = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.11 does not have it
    found = [name for name in BF16_INSTRUCTIONS if known.get(name)]
    if found:
        return "bfloat16", f" (the processor has {found[0]})"
    return "float32", " (no bf16 instructions known of this processor)"


def pick_machine(device: str, dtype: str, world: World = World()) -> Machine:
    """Choose where and in what to compute, and say why. Rank 0 chooses the arithmetic; utilisation
    is measured against the rates of all ranks together."""
    place = world.raise_on_all_ranks(check_device, device, world)
    dtype, reason = world.broadcast_from_rank_0(pick_dtype(place, dtype))
    kind, name = getattr(torch, dtype), f"cpu with {torch.get_num_threads()} threads"
    if place.type == "cuda":
        name = torch.cuda.get_device_name(place)
    if place.type == "mps":
        name = "Apple GPU"
    cards = [card for card in PEAKS if card in name and kind == torch.bfloat16]
    if cards:
        rate, source = 1e12 * PEAKS[max(cards, key=len)], "its dense peak"
    else:
        rate = matmul_rate(place, kind, 4096 if place.type == "cuda" else 2048)
        source = "a matrix product measured at the start"
    why = f"{name}, {dtype}{reason}; utilisation is against {rate / 1e9:,.0f} GFLOP/s, {source}"
    if world.size > 1:
        why = f"{world.size} processes, rank 0 on {why}"
    return Machine(place, kind, *world.sum(rate), why, measured=not cards)


def set_up(s: Settings, stages: list[Stage], world: World) -> tuple[Machine, World]:
    """The machine of these settings, and the ranks in their layout. Raises ValueError where a stage
    does not fit the layout, or the device is not there."""
    layout = layout_of(s, stages, world.size)
    if s.threads:
        torch.set_num_threads(s.threads)
    machine = pick_machine(s.device, s.dtype, world)
    return machine, parallel.arrange(world, layout, machine.device)


def memory_size(device: torch.device) -> int | None:
    """Bytes of the memory that a tensor on this device lies in; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if hasattr(os, "sysconf"):  # not on Windows
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def peak_memory(device: torch.device) -> float | None:
    """GiB that this process has used at most; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
