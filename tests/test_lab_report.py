"""Tests of lab/report.py: what a run says, the page, and the command line.

The pictures themselves are in test_lab_report_pictures.py. Here a stand-in takes their place, so
matplotlib is not needed."""

import copy
import html
import json
import re
import shutil
import sys

import pytest
from helpers import ROOT, error
from hypothesis import given
from hypothesis import strategies as st
from small_runs import MODEL, WORDS, write_corpus

import run_folder
import train
from lab import pictures, report
from schedule import learning_rate, training_flops

MEASURED = ROOT / "tutorials/measurements"
STAGES = [
    {"config": {"n_layers": 1}},
    {"config": {"n_layers": 2}, "start": 16, "ramp": 8, "warmup": 4},
    {"config": {"n_layers": 2, "d_ff": 80}, "start": 40, "ramp": 12},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two growths: 30 steps of 2 rows, an evaluation every 10."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "stages.json").write_text(json.dumps(STAGES))
    words = [*WORDS, "--data", write_corpus(folder), "--model", *MODEL, "--steps", 30]
    words += ["--batch-size", 2, "--warmup", 8, "--lr", 0.01, "--eval-every", 10]
    words += ["--stages", folder / "stages.json", "--out", folder / "grown"]
    assert train.main(list(map(str, words))) == 0
    return folder / "grown"


@pytest.fixture
def drawn(monkeypatch) -> list[pictures.Picture]:
    """Every picture that would have been drawn."""
    seen = []

    def svg(picture, only=None):
        seen.append(picture)
        return "<svg></svg>"

    monkeypatch.setattr(pictures, "svg", svg)
    return seen


def panel(name: str, *runs) -> pictures.Panel:
    """One panel of some runs."""
    return report.PANELS[name]([report.read_numbers(folder) for folder in runs])


def log_of(folder) -> list[dict]:
    return list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))


def page_of(folders, file, *words) -> str:
    report.main([*map(str, folders), "--out", str(file), *words])
    return file.read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------
# What a run says


def test_a_log_is_drawn_as_it_is(run):
    """A short log is not thinned: every loss, rate and norm is at its samples."""
    steps = [line for line in log_of(run) if "loss" in line]
    for name, key, label in (("lr", "lr", str(run)), ("loss", "loss", "training")):
        points = panel(name, run).lines[label].points
        assert [x for x, _ in points] == [line["samples"] for line in steps]
        assert [y for _, y in points] == pytest.approx([line[key] for line in steps], rel=1e-5)
    values = [(line["samples"], line["val_loss"]) for line in log_of(run) if "val_loss" in line]
    assert panel("loss", run).lines["held out"].points == values and len(values) == 3


def test_growths_are_marked(run):
    """By samples and by FLOPs, with the model from there on; the size has a step there."""
    _, stages = run_folder.read_run(run)
    starts = [stage.start for stage in stages[1:]]
    words = ["2 layers x 16", "2 layers x 16"]
    assert panel("loss", run).marks == list(zip(starts, words))
    by_flops = panel("flops", run)
    assert by_flops.x == "MFLOP of training"
    flops = [training_flops(stages, start) / 1e6 for start in starts]
    assert [x for x, _ in by_flops.marks] == pytest.approx(flops)
    sizes = [y for _, y in panel("size", run).lines[str(run)].points]
    assert sizes[1] < sizes[2] == sizes[3] < sizes[4]


def test_flops_and_rates_are_those_of_the_run(run):
    """The x of the FLOPs panel is training_flops, the rate learning_rate, at the same samples."""
    settings, stages = run_folder.read_run(run)
    by_samples, by_flops = (panel(name, run).lines["training"] for name in ("loss", "flops"))
    for (samples, loss), (flops, same) in zip(by_samples.points, by_flops.points):
        assert flops * 1e6 == pytest.approx(training_flops(stages, samples)) and loss == same
    for samples, rate in panel("lr", run).lines[str(run)].points:
        assert rate == pytest.approx(learning_rate(stages, samples, settings.min_lr), rel=1e-5)


def test_the_mask_falls_to_zero_at_each_growth(run):
    """1 before, 0 at the growth, straight up to 1 at the end of the ramp."""
    mask = dict(panel("mask", run).lines[str(run)].points)
    assert [mask[x] for x in (14, 15, 16, 20, 24, 39, 40, 46, 52, 60)] == [
        *(1, 1, 0, 0.5, 1, 1, 0, 0.5, 1, 1)
    ]


def test_titles_say_what_the_run_did(run):
    """A loss that goes on without a jump, one with a jump, and the learning rate's own schedule."""
    smooth = report.read_numbers(run)
    other = copy.deepcopy(smooth)
    other["growths"][0]["loss_after"] = other["growths"][0]["loss_before"] + 0.25
    other["asked"]["lr_schedule"] = "wsd"
    picture = report.runs_picture([smooth], ["loss"])
    assert picture.title.startswith("At each growth the loss goes on without a jump, to ")
    assert picture.panels[0].title.endswith("moves it by less than 0.00005 nats")
    picture = report.runs_picture([other], ["loss"])
    assert picture.title.startswith(f"{run} ends at")
    assert picture.panels[0].title.endswith("moves it by at most 0.2500 nats")
    assert "a warm-up, then a cosine;" in report.rate_panel([smooth]).title
    assert "wsd (warm-up, stable, decay);" in report.rate_panel([other]).title


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=60), st.integers(1, 20))
def test_thinning_keeps_the_order_and_the_mean(values, most):
    """Not more rows than asked for, in order; the mean of all stays what it was."""
    rows = [[i, 8 * i, value] for i, value in enumerate(values, 1)]
    found = report.thin(rows, most)
    assert len(found) <= most and [row[0] for row in found] == sorted(row[0] for row in found)
    size = -(-len(rows) // most)
    counts = [min(size, len(rows) - i) for i in range(0, len(rows), size)]
    assert sum(n * row[2] for n, row in zip(counts, found)) == pytest.approx(
        sum(values), rel=1e-4, abs=1e-3
    )


def test_numbers_that_are_kept_draw_the_same(run, drawn, tmp_path, capsys):
    """--out FILE.json keeps what a picture needs: the file gives the picture of the folder."""
    report.main([str(run), "--out", str(tmp_path / "kept.json")])
    assert f"numbers: {tmp_path / 'kept.json'};" in capsys.readouterr().out
    words = ["--panels", *report.PANELS, "--out", str(tmp_path / "a.svg")]
    for what in (run, tmp_path / "kept.json"):
        report.main([str(what), *words])
    assert pictures.digest(drawn[0]) == pictures.digest(drawn[1])
    assert len(drawn[0].panels) == len(report.PANELS)


def test_a_run_that_is_under_way(run, tmp_path, drawn):
    """A last line that is not whole yet is left out; a folder without a step has nothing to draw;
    a line that is no JSON is named."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    whole = report.read_numbers(copy)
    log = copy / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 31, "samp')
    assert report.read_numbers(copy) == whole
    log.write_text("not JSON\n")
    assert error(report.read_numbers, copy).startswith(f"{log}, line 1 is not a line of a log")
    log.write_text("")
    assert error(report.read_numbers, copy).endswith("has no step yet: there is nothing to draw")
    assert "config.json" in error(report.main, [str(tmp_path), "--out", str(tmp_path / "a.svg")])


# ----------------------------------------------------------------------------------------------
# The page


def test_the_page_needs_no_network(run, drawn, tmp_path):
    """No script, no address, nothing that a browser would fetch; and it says so to the browser."""
    page = page_of([run], tmp_path / "a.html")
    assert "default-src 'none'" in page
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\(|(?:src|href)=|https?:", page)
    assert len(drawn) == len(report.PANELS)


def test_beside_each_picture_are_its_numbers(run, drawn, tmp_path):
    """Each pair has a picture, a table with every point, and JSON with the same points."""
    page = page_of([run], tmp_path / "a.html")
    pairs = page.split('<div class="pair">')[1:]
    for name, text in zip(report.PANELS, pairs, strict=True):
        shown = panel(name, run)
        assert "<figure><svg></svg></figure>" in text
        found = json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", text, re.DOTALL)[1]))
        points = {key: [list(p) for p in line.points] for key, line in shown.lines.items()}
        assert found["lines"] == points and found["title"] == shown.title
        head, rows = pictures.table(shown)
        assert text.count("<tr>") >= 1 + len(rows) and all(
            f"<th>{name}</th>" in text for name in head
        )


def test_the_page_has_evaluation_stages_and_text(run, drawn, tmp_path):
    """The last held-out loss, a row for each stage, and what the model writes after each prompt."""
    page = page_of([run], tmp_path / "a.html", "--prompt", "line <1>", "--prompt", "small")
    last = [line for line in log_of(run) if "val_loss" in line][-1]
    assert f"<td>{report.shown(last['val_loss'])}</td>" in page
    assert f"<td>{report.shown(last['val_bpb'])}</td>" in page
    assert all(f"<tr><td>stage {n}</td>" in page for n in (1, 2, 3))
    assert "writes after &#x27;small&#x27;" in page and "<pre>line &lt;1&gt;" in page


def test_several_runs_are_in_one_picture(run, drawn, tmp_path):
    """A line of each run in each panel, each in a color of its own; a run without a checkpoint
    writes no text, and the page says why. A name is text, not HTML."""
    other = tmp_path / "an <other> one"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("step-*"))
    page = page_of([run, other], tmp_path / "a.html")
    assert "no checkpoint of this run is left" in page
    assert "<other>" not in page and "an &lt;other&gt; one" in page
    for shown in drawn[0].panels:
        ours = [line for name, line in shown.lines.items() if name.startswith(str(run))]
        theirs = [line for name, line in shown.lines.items() if name.startswith(str(other))]
        assert [line.points for line in ours] == [line.points for line in theirs] and ours
        assert {line.color for line in ours} == {0} and {line.color for line in theirs} == {1}


def test_studies_are_on_the_page(drawn, tmp_path):
    """A file of a study is a section of the page, with its title."""
    page = page_of([MEASURED / "mup-sweep-lr.json", "timetable"], tmp_path / "a.html")
    titles = list(dict.fromkeys(picture.title for picture in drawn))
    assert len(titles) == 2 and all(html.escape(title) in page for title in titles)


# ----------------------------------------------------------------------------------------------
# The command line


@pytest.mark.quick
@pytest.mark.parametrize("ending", ["svg", "png", "html"])
def test_a_picture_needs_matplotlib(monkeypatch, tmp_path, ending):
    """Without matplotlib: one line with the command that installs it, and no file."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = [str(MEASURED / "mup-sweep-lr.json"), "--out", str(tmp_path / f"a.{ending}")]
    assert error(report.main, words) == "a picture needs matplotlib: pip install matplotlib"
    assert not list(tmp_path.iterdir())


@pytest.mark.quick
@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        "{}",
        '{"landscape": {"muP": 1}}',
        '{"rows": [{}]}',
        '{"steps": [1]}',
        '{"curve": 1}',
    ],
)
def test_a_file_of_another_kind_is_refused(text, tmp_path):
    """With its name, and with what would be right."""
    (tmp_path / "a.json").write_text(text)
    message = error(report.main, [str(tmp_path / "a.json"), "--out", str(tmp_path / "a.svg")])
    assert message.startswith(f"{tmp_path / 'a.json'} is not what muP.py coord-check, lab.transfer")


@pytest.mark.quick
def test_all_wrong_words_are_named_at_once(tmp_path):
    """Each with what is allowed."""
    words = ["nowhere", "rotary", "--out", "a.gif", "--pp", "2", "--prompt", "a"]
    message = error(report.main, words)
    for part in ("nowhere: no folder", "a.gif: must end in .html", "--pp: only ranks", "--prompt"):
        assert part in message
    assert "--tp 0: must be at least 1" in error(
        report.main, ["ranks", "--tp", "0", "--out", "a.svg"]
    )
    assert "one run" in error(report.main, ["rotary", "--out", "a.json"])
    message = error(report.main, ["timetable", "--micro-batches", "1", "--out", "a.svg"])
    assert message.startswith("this pipeline cannot be drawn:")
