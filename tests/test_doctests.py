"""The examples in the docstrings of the modules print what they say."""

import doctest
import importlib

import pytest
from helpers import ROOT

FILES = [*ROOT.glob("*.py"), *ROOT.glob("lab/*.py"), *ROOT.glob("course/*.py")]
FILES = sorted([*FILES, *ROOT.glob("course/checks/*.py"), ROOT / "tests/helpers.py"])


@pytest.mark.quick
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_examples(path):
    """Every example of the module, if it has any."""
    folders = path.relative_to(ROOT).parent.parts
    name = path.stem if folders == ("tests",) else ".".join([*folders, path.stem])
    options = doctest.IGNORE_EXCEPTION_DETAIL
    assert doctest.testmod(importlib.import_module(name), optionflags=options).failed == 0
