"""What Windows and macOS get, as far as Linux can show it: a refusal in one line, or a choice."""

import pytest
import torch

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
