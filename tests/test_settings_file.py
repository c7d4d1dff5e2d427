"""--settings FILE: the options of train.py as JSON."""

# ruff: noqa: F401, F811 (pytest finds fixtures by their names)

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from workshop import assert_same_run, corpus, few, job, workshop

import run_folder
import settings
import train
from flm import PRESETS
from settings import FIELDS, Settings, make_parser, with_file
from train import main


def values(field: dataclasses.Field) -> st.SearchStrategy:
    """Every value that a setting may have."""
    kind, _, optional = field.type.partition(" | ")
    lowest, highest, _ = field.metadata.get("valid", (None, None, ""))
    if field.name == "preset":
        found = st.sampled_from(list(PRESETS))
    elif "choices" in field.metadata:
        found = st.sampled_from(field.metadata["choices"])
    elif kind == "int":
        found = st.integers(lowest, min(highest, 10**30))
    elif kind == "float":
        found = st.floats(lowest, highest)
    elif kind in ("str", "bool"):
        found = {"str": st.text(max_size=20), "bool": st.booleans()}[kind]
    else:
        found = st.lists(st.text(max_size=20), max_size=3).map(tuple)
    return st.none() | found if optional else found


every_settings = st.builds(Settings, **{field.name: values(field) for field in FIELDS})


def written(s: Settings) -> str:
    """A file of these settings, as write_run writes them."""
    Path("s.json").write_text(json.dumps({"settings": dataclasses.asdict(s)}, indent=1))
    return "s.json"


@few(100)
@given(s=every_settings)
def test_any_settings_come_back_from_their_file(s):
    """Settings -> JSON -> --settings are the same settings, whatever they are."""
    given = vars(make_parser().parse_args(["--settings", written(s)]))
    assert Settings(**with_file(given)) == s


@few(20)
@given(s=every_settings, seed=st.integers(0, 9), keep=st.integers(1, 9))
def test_the_command_line_wins(s, seed, keep):
    """What is given on the command line counts, all else is the file's."""
    words = ["--settings", written(s), "--seed", str(seed), "--keep", str(keep)]
    found = Settings(**with_file(vars(make_parser().parse_args(words))))
    assert found == dataclasses.replace(s, seed=seed, keep=keep)


def test_a_runs_own_config_starts_a_like_run(corpus):
    """config.json of a run starts another run, in another folder, that is the same bit for bit;
    with an option it differs in that option alone."""
    first = train.train(job(corpus))["folder"]
    assert main(["--settings", f"{first}/config.json", "--out", "second"]) == 0
    assert_same_run(first, "second")
    assert main(["--settings", f"{first}/config.json"]) == 0  # its own folder is taken
    assert_same_run(first, "runs/demo")
    main(["--settings", f"{first}/config.json", "--seed", "5", "--out", "third"])
    kept = dataclasses.replace(run_folder.read_run(first)[0], out="third", seed=5)
    assert run_folder.read_run("third")[0] == kept


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    """Unknown keys, with the nearest name, values of another type, values out of range and words
    that are no choice: all in one screen, each with what it must be; nothing is made."""
    wrong = {
        "batchsize": 8,
        "zzz": 1,
        "steps": 0.5,
        "lr": -1,
        "keep": True,
        "seed": "7",
        "model": "n_layers=2",
        "compile": 1,
        "mup": "maybe",
        "preset": "flm-2b",
        "eval_rows": 0,
        "data": ["a"],
        "clip": float("nan"),
    }
    Path("s.json").write_text(json.dumps({"settings": wrong, "step": 5}))
    with pytest.raises(ValueError) as caught:
        main(["--settings", "s.json", "--lr", "1"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "--settings s.json: these do not fit:"
    assert set(lines[1:]) == {
        "  unknown key 'step': options stand under \"settings\"",
        "  unknown key 'batchsize': did you mean batch_size?",
        "  unknown key 'zzz': train.py --help has all options",
        "  steps = 0.5: must be a whole number",
        "  --lr -1: must be a number above 0",
        "  keep = true: must be a whole number",
        '  seed = "7": must be a whole number',
        '  model = "n_layers=2": must be a list of texts',
        "  compile = 1: must be true or false",
        "  --mup maybe: must be one of on, off",
        f"  --preset flm-2b: must be one of {', '.join(PRESETS)}",
        "  --eval-rows 0: must be at least 1",
        '  data = ["a"]: must be a text',
        "  --clip nan: must be a number above 0",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "--settings s.json is not JSON"),
        ("[]", '--settings s.json: must hold {"settings": {option: value, ...}}'),
        ('{"lr": 1}', 'must hold {"settings"'),
        ('{"settings": []}', 'must hold {"settings"'),
        (None, "--settings s.json cannot be read"),
    ],
)
def test_a_file_that_holds_no_settings(text, words):
    """No JSON, JSON of another form, no file: each is told by name."""
    if text is not None:
        Path("s.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        main(["--settings", "s.json"])
    assert words in str(caught.value)


def test_another_preset_does_not_inherit_a_recipe():
    """--preset beside a file for another one: steps, batch, learning rate and warm-up of the file
    would count for a model that they are not for. They are named, with those of the preset's own
    recipe to type; whoever gives all of them, or names the same preset, goes on."""
    file = written(Settings(preset="demo", steps=600, lr=0.004, warmup=800, seed=3))
    words = ["--settings", file, "--preset", "flm-1b"]
    parse = lambda *more: with_file(vars(make_parser().parse_args([*words, *more])))
    with pytest.raises(ValueError) as caught:
        parse("--steps", "9")
    assert str(caught.value).splitlines() == [
        "--preset flm-1b: s.json is for demo, whose values would count here too. Say beside "
        "--preset what you want; the recipe of flm-1b has:",
        "  --lr 0.0004",
        f"  --warmup {settings.RECIPES['flm-1b']['warmup']}",
    ]
    given = parse("--steps", "9", "--lr", "1", "--warmup", "0")
    assert given["seed"] == 3 and given["preset"] == "flm-1b" and given["lr"] == 1
    words[-1] = "demo"
    assert parse()["steps"] == 600
    Path("s.json").write_text('{"settings": {"steps": 5}}')  # it names no preset
    words[-1] = "flm-1b"
    assert parse() == {"preset": "flm-1b", "steps": 5}


def test_where_a_file_has_no_meaning(corpus):
    """A run that goes on has its settings already, and an evaluation has few: refused. Under
    --auto-resume the file counts where the run begins, and where it goes on it is the same one."""
    s = job(corpus, out="run")
    file = written(s)
    with pytest.raises(ValueError, match="--settings: a run that goes on has its own settings"):
        main(["--resume", "run", "--settings", file])
    with pytest.raises(ValueError, match="--eval-only makes no use of --settings"):
        main(["--eval-only", "run", "--settings", file])
    train.train(s, stop_at=2)
    assert main(["--auto-resume", "--settings", file]) == 0
    assert_same_run("run", train.train(job(corpus))["folder"])


def test_every_setting_has_a_json_type():
    """A new option of a type that no file can give would be found here."""
    assert {field.type.removesuffix(" | None") for field in FIELDS} <= set(settings.TYPES)
