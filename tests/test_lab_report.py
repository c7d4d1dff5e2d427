"""Tests of lab/report.py: numbers as JSON files, and pictures of them."""

import json
import sys
from unittest import mock

import numpy as np
import pytest
from helpers import ROOT, error

from lab import report

pytestmark = pytest.mark.quick
MEASURED = ROOT / "tutorials/measurements"


def test_json_comes_back(tmp_path, capsys):
    """What is written is what is read, in a folder that is made for it; the user sees where."""
    file = tmp_path / "new" / "numbers.json"
    report.write_json(file, {"a": [1.5, None]})
    assert json.loads(file.read_text()) == {"a": [1.5, None]}
    assert capsys.readouterr().out == f"numbers: {file}\n"


def test_a_picture_needs_matplotlib(monkeypatch, tmp_path):
    """Without matplotlib: one line with the command that installs it, and no file."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = [str(MEASURED / "mup-sweep-lr.json"), "--out", str(tmp_path / "a.svg")]
    assert error(report.main, words) == "a picture needs matplotlib: pip install matplotlib"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"landscape": {"muP": 1}}', '{"rows": [{}]}'])
def test_a_file_of_another_kind_is_refused(text, tmp_path):
    """With its name, and with what would be right."""
    (tmp_path / "a.json").write_text(text)
    message = error(report.main, [str(tmp_path / "a.json"), "--out", str(tmp_path / "a.svg")])
    assert message.startswith(f"{tmp_path / 'a.json'} is not what muP.py coord-check, lab.transfer")


@pytest.fixture
def drawn(monkeypatch) -> dict:
    """A stand-in for matplotlib: {title: {name of a line: (xs, ys)}} of each picture."""
    pictures: dict = {}

    class Axis(mock.MagicMock):
        def plot(self, xs, ys, style, label, **options):
            self.drawn_lines[label] = (xs, ys)

        def set(self, title, **options):
            pictures[title] = self.drawn_lines

    def subplots(rows, columns, **options):
        axes = np.empty((rows, columns), object)
        for place in np.ndindex(rows, columns):
            axes[place] = Axis(drawn_lines={})
        return mock.MagicMock(), axes

    monkeypatch.setattr(report, "pyplot", lambda: mock.MagicMock(subplots=subplots))
    return pictures


def test_what_coord_check_wrote(drawn, tmp_path):
    """One panel for each parametrization and layer, one line for each step, at every width."""
    sizes = [{"q": s, "ff.up": 2 * s, "block": 3 * s, "logits": 4 * s} for s in (1.0, 2.0)]
    wrote = {"sizes": {"muP": {"16": sizes, "32": sizes}, "standard": {"16": sizes, "32": sizes}}}
    (tmp_path / "c.json").write_text(json.dumps(wrote))
    report.main([str(tmp_path / "c.json"), "--out", str(tmp_path / "c.svg")])
    assert len(drawn) == 8
    assert drawn["muP: block"] == {"step 0": ((16, 32), (3, 3)), "step 1": ((16, 32), (6, 6))}


def test_what_the_sweep_wrote(drawn, tmp_path):
    """One panel for each parametrization, one line for each width; a gap where a value diverged."""
    report.main([str(MEASURED / "mup-sweep-lr.json"), "--out", str(tmp_path / "s.svg")])
    landscape = json.loads((MEASURED / "mup-sweep-lr.json").read_text())["landscape"]
    assert set(drawn) == {"muP", "standard"}
    for name, lines in drawn.items():
        assert len(lines) == 4
        row = landscape[name]["128"]
        assert lines["width 128"] == (tuple(map(float, row)), tuple(row.values()))
    gap = report.sweep_panels({"axis": "lr", "landscape": {"muP": {"16": {"0.1": None}}}})
    assert np.isnan(gap[0][3]["width 16"][0][1])


def test_what_the_growth_bench_wrote(drawn, tmp_path):
    """Loss over FLOPs and over CPU seconds, a line for each schedule."""
    report.main([str(MEASURED / "growth-8x32.json"), "--out", str(tmp_path / "g.svg")])
    rows = json.loads((MEASURED / "growth-8x32.json").read_text())["rows"]
    scratch = [row for row in rows if row["name"] == "scratch"]
    losses = tuple(row["mean"]["loss"] for row in scratch)
    by_flop, by_second = drawn.values()
    assert by_flop["scratch"] == (tuple(row["tflop"] for row in scratch), losses)
    assert by_second["scratch"][1] == losses and by_flop.keys() == {row["name"] for row in rows}
