"""What Windows and macOS get, as far as Linux can show it: a refusal in one line, or a choice."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

import machine
import parallel
from machine import pick_device

pytestmark = pytest.mark.quick


def test_an_apple_gpu_is_a_device_where_pytorch_has_it(monkeypatch):
    """mps is taken when it is named and there, never by auto; bf16 and float64 are not tried."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = pick_device("mps")
    assert device == torch.device("mps") and pick_device("auto").type != "mps"
    assert machine.pick_dtype(device, "auto")[0] == "float32"
    with pytest.raises(ValueError, match="no float64: use --device cpu"):
        machine.pick_dtype(device, "float64")


def test_an_apple_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'mps' asked for.*use --device cpu"):
        pick_device("mps")


def test_many_processes_on_windows_are_refused(monkeypatch):
    """torchrun's store and gloo are another matter there: one line says what to use instead."""
    monkeypatch.setattr(parallel.sys, "platform", "win32")
    with pytest.raises(ValueError, match="several processes need Linux or macOS: .* use WSL"):
        parallel.connect()


IMPORT_ALL = """
import importlib, os, signal, sys
from pathlib import Path
import pytest, torch.distributed.checkpoint, train  # PyTorch asks sys.platform
for name in "fcntl", "grp", "pty", "pwd", "resource", "termios":
    sys.modules[name] = None
for name in "SIGALRM", "SIGCONT", "SIGHUP", "SIGKILL", "SIGSTOP", "SIGUSR1", "SIGUSR2":
    vars(signal).pop(name, None)
for name in "fork", "getuid", "mkfifo":
    vars(os).pop(name, None)
for name in "transformers", "lm_eval":  # optional, and slow
    sys.modules[name] = None
for file in sorted(Path(sys.argv[1]).glob("*.py")):
    try:
        importlib.import_module(file.stem)
    except pytest.skip.Exception:
        pass
    except Exception as error:
        print(f"{file.name}: {type(error).__name__}: {error}")
"""


def test_every_file_of_tests_is_imported_without_what_windows_lacks():
    """Its signals, modules and fork are taken away; then each file of tests is imported, as pytest
    does before it knows which tests it runs. (Files that need transformers or lm_eval end early.)"""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(ROOT / "tests")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
