"""The examples in the docstrings of the modules print what they say."""

import doctest
import importlib

import pytest
from helpers import ROOT

FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("lab/*.py"), ROOT / "tests/helpers.py"])


@pytest.mark.quick
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_examples(path):
    """Every example of the module, if it has any."""
    name = f"lab.{path.stem}" if path.parent.name == "lab" else path.stem
    options = doctest.IGNORE_EXCEPTION_DETAIL
    assert doctest.testmod(importlib.import_module(name), optionflags=options).failed == 0
