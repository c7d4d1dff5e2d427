"""Tests of lab/pictures.py, and of the pictures that the chapters show.

What a picture shows is data, so most tests need no matplotlib. Those that draw are left out where
it is missing; CI has it."""

import itertools
import json
import math
import re
import shlex
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from flm import PRESETS
from lab import pictures, report
from lab.pictures import Box, Line, Panel, Picture
from lab.timetable import SCHEDULES, UNITS, timetable
from parallel import Layout

pytestmark = pytest.mark.quick
TUTORIALS = ROOT / "tutorials"
MOST = 60 * 1024  # bytes of a chapter's picture


def measured(name: str) -> dict:
    return json.loads((TUTORIALS / f"measurements/{name}.json").read_text())


# ----------------------------------------------------------------------------------------------
# The chapters' pictures

SHOWN = re.compile(
    r"^!\[(?P<alt>[^]]*)\]\((?P<file>[^)]+\.svg)\)\n(?P<rest>.*?^```sh\n(?P<sh>.*?)^```)",
    re.MULTILINE | re.DOTALL,
)
CHAPTERS = sorted(TUTORIALS.glob("*.md"))
IN_CHAPTERS = [
    pytest.param(chapter, found, id=Path(found["file"]).stem)
    for chapter in CHAPTERS
    for found in SHOWN.finditer(chapter.read_text())
]


def test_every_picture_is_in_a_chapter():
    """No picture lies there that no chapter shows, and no chapter shows one that is missing."""
    kept = {file.resolve() for file in (TUTORIALS / "pictures").iterdir()}
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", "\n".join(c.read_text() for c in CHAPTERS))
    assert kept == {(TUTORIALS / file).resolve() for file in shown}
    assert len(IN_CHAPTERS) == len(kept) >= 10


@pytest.mark.parametrize("chapter, found", IN_CHAPTERS)
def test_a_picture_is_small_and_has_its_command_beside_it(chapter, found):
    """At most 60 KB, a text for those who do not see it, no heading and no other picture between it
    and the block that draws it, and nothing in it that is fetched from elsewhere."""
    file = TUTORIALS / found["file"]
    assert file.stat().st_size <= MOST
    assert len(found["alt"]) > 20
    assert f"--out tutorials/{found['file']}" in found["sh"]
    between = found["rest"].partition("```sh")[0]
    assert "\n#" not in between and "![" not in between and len(between.splitlines()) < 12
    svg = file.read_text()
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', svg))
    assert not re.search(r"<script|<image|<foreignObject|@import|url\((?!#)", svg)
    ET.fromstring(svg)


@pytest.mark.parametrize(
    "chapter, found", [p for p in IN_CHAPTERS if "lab.report" in p.values[1]["sh"]]
)
def test_a_picture_is_the_one_of_its_numbers(chapter, found, tmp_path, monkeypatch):
    """The command beside it makes, from the files as they are now, the picture that is kept: if
    this fails, run that command again."""
    words = shlex.split(found["sh"].replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "lab.report"]
    made = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(pictures, "svg", lambda picture: made.append(picture) or "")
    at = words.index("--out") + 1
    report.main([*words[3:at], str(tmp_path / "a.svg"), *words[at + 1 :]])
    kept = (TUTORIALS / found["file"]).read_text()
    assert f'data-numbers="{pictures.digest(made[0])}"' in kept


def test_the_digest_sees_a_changed_number():
    """And a changed word; a rounding error in the last bits is no change."""

    def picture(y: float, name: str = "a") -> Picture:
        return Picture("t", [Panel("p", "x", "y", {name: Line([(1.0, y)])})])

    first = pictures.digest(picture(1.234))
    assert first == pictures.digest(picture(math.nextafter(1.234, 2)))
    assert first != pictures.digest(picture(1.236)) and first != pictures.digest(
        picture(1.234, "b")
    )


# ----------------------------------------------------------------------------------------------
# Of studies


def test_what_coord_check_wrote():
    """One panel for each parametrization, one line for each layer: its size at the last step over
    that of the narrowest model, at every width; and the limits of the verdict."""
    layers = pictures.SHOWN_LAYERS
    sizes = [{layer: s * (i + 1) for i, layer in enumerate(layers)} for s in (1.0, 2.0)]
    wide = [sizes[0], {layer: 3 * size for layer, size in sizes[1].items()}]
    by_width = {"16": sizes, "128": wide}
    report_ = {"verdict": "not flat", "sizes": {"muP": by_width, "standard": by_width}}
    found = pictures.coord_check(report_ | {"axis": "width", "tested": "muP"})
    assert len(found.panels) == 2 and found.title.endswith("muP is not flat")
    assert {panel.x for panel in found.panels} == {"width"}
    for panel in found.panels:
        assert all(panel.lines[layer].points == [(16, 1.0), (128, 3.0)] for layer in layers)
        assert panel.lines["limit, growing"].points[1] == pytest.approx((128, 2.0))  # 8 ^ (1/3)
        assert panel.lines["limit, shrinking"].points[1] == pytest.approx((128, 0.5))
        assert "3 times" in panel.title


def test_what_the_sweep_wrote():
    """One panel for each parametrization, one line for each width, a star at its best value; a gap
    where a value diverged."""
    report_ = measured("mup-sweep-lr")
    for panel in pictures.sweep(report_).panels:
        name = panel.title.partition(":")[0]
        rows = report_["landscape"][name]
        assert len(panel.lines) == len(rows) + 1 == 5
        assert panel.lines["width 128"].points == [
            (float(v), loss) for v, loss in rows["128"].items()
        ]
        best = {int(width): lr for width, lr in report_[name]["best"].items()}
        assert [x for x, _ in panel.lines["best of its width"].points] == list(best.values())
    lost = {"axis": "lr", "landscape": {"muP": {"16": {"0.1": None, "0.2": 2.0}}}}
    panel = pictures.sweep(lost).panels[0]
    assert math.isnan(panel.lines["width 16"].points[0][1])
    assert panel.lines["best of its width"].points == [(0.2, 2.0)]
    lost["landscape"]["muP"]["16"] = {"0.1": None}
    assert pictures.sweep(lost).panels[0].title == "muP: everything diverged"


def test_what_the_growth_bench_wrote():
    """Loss over FLOPs, a line for each schedule, and as a distance the speed-up of the schedule
    that is best against any size: it ends on the curve from scratch, which lies below the straight
    line (in log FLOPs) between two budgets."""
    rows = measured("growth-16x16")["rows"]
    panel = pictures.growth({"rows": rows}).panels[0]
    scratch = [row for row in rows if row["name"] == "scratch"]
    losses = [row["mean"]["loss"] for row in scratch]
    assert panel.lines["scratch"].points == [(row["tflop"], row["mean"]["loss"]) for row in scratch]
    *names, distance = panel.lines
    assert set(names) == {row["name"] for row in rows}
    best = max(rows, key=lambda row: row["any_size"] or 0)
    assert distance == f"the loss of {best['name']}: {best['speed_up']:.2f} times the FLOPs"
    (start, loss), (end, same) = panel.lines[distance].points
    at = next(i for i in range(3) if losses[i] >= loss >= losses[i + 1])
    flops = [math.log(row["tflop"]) for row in scratch[at : at + 2]]
    share = (losses[at] - loss) / (losses[at] - losses[at + 1])
    assert flops[0] < math.log(end) < flops[0] + share * (flops[1] - flops[0])
    assert (start, loss) == (best["tflop"], best["mean"]["loss"])
    assert same == loss and panel.log == "x"


def test_speed_ups_by_the_time_of_growth():
    """Three times of growth or more have a panel of their own: a line for each size to begin with
    and each number of growths, and the number of steps over those from scratch. What has no
    speed-up, or never grows, is not there. Of many schedules this panel stands alone."""
    plain = {"mean": {"loss": 2.0}, "any_size": None, "speed_up": None, "last_growth": 0}
    plain |= {"tflop": 1.0, "budget": 8, "steps": 8, "stages": "4x8"}
    rows = [plain | {"name": "scratch", "speed_up": 1.0}]
    for i, when in enumerate((0.7, 0.2, 0.5)):
        stages = "1x8 -> 2x8 at 10%, ramp 5% -> 4x8 at 50%" if when == 0.5 else "1x8 -> 4x8 at 20%"
        grown = {"steps": 10 + i, "speed_up": 1.0 + i, "stages": stages, "last_growth": when}
        rows.append(plain | grown | {"name": f"g{i}"})
    rows.append(rows[-1] | {"name": "lost", "speed_up": None})
    _, panel = pictures.growth({"rows": rows}).panels
    assert list(panel.lines) == ["1x8, 1 growth", "1x8, 2 growths", "by arithmetic"]
    assert panel.lines["1x8, 1 growth"].points == [(0.2, 2.0), (0.7, 1.0)]
    assert panel.lines["1x8, 2 growths"].points == [(0.5, 3.0)]
    assert panel.lines["by arithmetic"].points == [(0.2, 11 / 8), (0.5, 12 / 8), (0.7, 10 / 8)]
    assert len(pictures.growth({"rows": rows[:3]}).panels) == 1
    many = rows + [rows[1] | {"name": f"more{i}"} for i in range(4)]
    (alone,) = pictures.growth({"rows": many}).panels
    assert alone.lines.keys() == panel.lines.keys()


def test_a_speed_up_beyond_the_runs_from_scratch_has_no_distance():
    """There the line from scratch is only guessed, and lab.growth prints a bound: None."""
    rows = [row for row in measured("growth-16x16")["rows"] if row["speed_up"]]
    best = max(rows, key=lambda row: row["speed_up"])
    assert pictures.same_loss(rows, best) and not pictures.same_loss(rows, rows[0])
    assert not pictures.same_loss(rows, best | {"speed_up": 4.6})
    assert not pictures.same_loss(rows, best | {"speed_up": None})


def test_what_predict_wrote():
    """The law goes through its own values at the fitted sizes; the interval and what was measured
    stand at the size that was predicted."""
    found = measured("mup-prediction")
    (panel,) = pictures.prediction(found).panels
    law = dict(panel.lines["law"].points)
    first, last = found["fitted"][0], found["predicted"][0]
    assert law[min(law)] == pytest.approx(first["law"]) and min(law) == pytest.approx(first["N"])
    assert law[max(law)] == pytest.approx(last["predicted"])
    assert panel.lines["measured"].points == [(last["N"], last["loss"])]
    (interval,) = [line for name, line in panel.lines.items() if name.startswith("95%")]
    assert [y for _, y in interval.points] == last["interval"]
    assert len(panel.lines["one seed"].points) == 3 * 7 and "+0.64%" in panel.title


def test_what_the_curve_says():
    """Every task once, in percent of its items, in the panel of its kind with its chance."""
    curve = {str(step): {"head-tail": step, "claim-head-slicing": 2, "sense-en": 3,
                         "single-fact": {"right": 1, "n": 2}} for step in (0, 10)}  # fmt: skip
    found = pictures.iq_curve({"curve: right of 20 of each task": curve})
    strings, stories, claims, labels = found.panels
    assert strings.lines["head-tail"].points == [(0, 0.0), (10, 50.0)] and len(strings.lines) == 1
    assert stories.lines["single-fact"].points == [(0, 50.0), (10, 50.0)]
    assert stories.lines["chance"].points[0][1] == pytest.approx(100 / 6)
    assert claims.lines["head-slicing"].points[0] == (0, 10.0)
    assert labels.lines["chance"].points == [(0, 50.0), (10, 50.0)]


# ----------------------------------------------------------------------------------------------
# Computed


def test_the_spiral_is_xpos():
    """A point at distance d is zeta^(d / 512) e^(j d theta), by the formula of the paper."""
    left, right = pictures.rotary().panels
    D = PRESETS["flm-101b"].head_dim

    def factor(i: int, distance: int) -> complex:
        zeta, theta = (2 * i / D + 0.4) / 1.4, 10000 ** (-2 * i / D)
        turned = distance * theta
        return zeta ** (distance / 512) * complex(math.cos(turned), math.sin(turned))

    for i in (32, 40, 48):
        for n, (x, y) in enumerate(left.lines[f"pair {i}"].points):
            assert abs(complex(x, y) - factor(i, 16 * n)) < 1e-6
    for i in (0, 63):
        for distance, size in right.lines[f"pair {i}"].points:
            assert size == pytest.approx(abs(factor(i, distance)), rel=1e-5)


def test_the_block_shows_every_mask():
    """The six places of flm.Block: both norms, heads, hidden units, the end of both branches."""
    (panel,) = pictures.masks().panels
    masked = [box.text for box in panel.boxes if "\u00d7 c" in box.text]
    assert [text.split("\n")[0] for text in masked] == [
        *("LayerNorm", "heads", "branch", "LayerNorm", "hidden units", "branch")
    ]
    assert len({box.fill for box in panel.boxes}) == len(pictures.MASKS) + 1


@pytest.mark.parametrize("pp, dp, tp", [(2, 2, 2), (3, 1, 2), (1, 4, 1), (4, 12, 4)])
def test_the_grid_has_every_rank_at_its_place(pp, dp, tp):
    """As in the mesh of parallel.arrange: pp downwards, then dp, then tp to the right."""
    (panel,) = pictures.ranks(Layout(pp=pp, dp=dp, tp=tp)).panels
    by_row = {}
    for box in sorted(panel.boxes, key=lambda box: (-box.y, box.x)):
        by_row.setdefault(box.y, []).append(int(box.text.split()[-1]))
    mesh = torch.arange(pp * dp * tp).view(pp, dp, tp)
    assert list(by_row.values()) == mesh.flatten(1).tolist() and len(panel.rows) == pp


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_picture_of_a_timetable_is_the_timetable(schedule):
    """A box for each piece of work, none on another; what is white is the bubble."""
    (panel,) = pictures.timetables(2, 4, [schedule]).panels
    rows, bubble = timetable(2, 4, schedule)
    held = SCHEDULES[schedule]
    for rank, row in enumerate(rows):
        mine = sorted((b for b in panel.boxes if math.floor(b.y) == 1 - rank), key=lambda b: b.x)
        assert [(b.x * held, b.text) for b in mine] == [(s, str(micro)) for s, _, _, micro in row]
        assert [b.width * held for b in mine] == [UNITS[kind] for _, kind, _, _ in row]
        assert all(a.x + a.width <= b.x for a, b in itertools.pairwise(mine))
    end = max(box.x + box.width for box in panel.boxes)
    _, numbers = pictures.table(panel)
    assert [row[3][0] for row in numbers] == [kind for row in rows for _, kind, _, _ in row]
    assert [row[0] for row in numbers] == [f"pp {rank}" for rank in (0, 1) for _ in rows[rank]]
    white = 1 - sum(box.width for box in panel.boxes) / (2 * end)
    assert white == pytest.approx(bubble) and f"{bubble:.1%}" in panel.title
    assert ("darker:" in panel.title) == (held == 2)
    assert ("green:" in panel.title) == any(kind == "W" for row in rows for _, kind, _, _ in row)


# ----------------------------------------------------------------------------------------------
# Drawing


@pytest.fixture(scope="module")
def matplotlib():
    return pytest.importorskip("matplotlib", reason="pip install matplotlib")


EXAMPLE = Picture(
    "A title & more",
    [
        Panel("left $", "an x", "one y", {"first": Line([(1, 2.0), (10, math.nan), (100, 3.0)]),
              "level": Line([(1, 2.5), (100, 2.5)], ":", -1)}, "xy", [(5, "a mark")]),
        Panel("right", "an x", "one y", {"other": Line([(1, 9.0), (100, 4.0)])}),
        Panel("boxes", boxes=[Box(0, 0, 1, 1, "in it", "#abcdef")], words=[(2, 2, "a word")],
              arrows=[((0, 0), (2, 2))], rows=["a row"]),
    ],
)  # fmt: skip


def test_a_picture_has_all_its_words(matplotlib):
    """Titles, labels, names of lines, marks and boxes are text in the SVG, and its title is what a
    screen reader says. The same picture is the same file."""
    drawn = pictures.svg(EXAMPLE)
    assert drawn == pictures.svg(EXAMPLE)
    texts = {
        element.text for element in ET.fromstring(drawn).iter() if element.tag.endswith("}text")
    }
    words = {"A title & more", "left $", "an x", "one y", "first", "level", "other", "a mark"}
    assert words | {"in it", "a word", "a row", "right", "boxes"} <= texts
    assert ET.fromstring(drawn).get("aria-label") == "A title & more"
    alone = pictures.svg(EXAMPLE, only=1)
    assert "left" not in alone and ">other<" in alone


def test_panels_of_one_label_share_their_scale():
    """So that they can be compared: here y from 2 to 9 in both; a diagram is left alone."""
    pair = Picture(
        "t",
        [
            Panel("a", "x", "y", {"l": Line([(0, 2.0)])}),
            Panel("b", "x", "y", {"l": Line([(0, 9.0)])}),
        ],
    )
    assert pictures.common_limits(pair)["ylim"] == pytest.approx((1.65, 9.35))
    assert pictures.common_limits(EXAMPLE) == {}


def test_other_formats(matplotlib, tmp_path):
    """A .png and a .pdf are what they are called."""
    for ending, begin in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        report.main(["ranks", "--out", str(tmp_path / f"a.{ending}")])
        assert (tmp_path / f"a.{ending}").read_bytes().startswith(begin)
