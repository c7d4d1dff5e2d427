"""schedule.py - a run as pure functions of the samples seen: stages, learning rate, FLOPs.

A run is a list of stages; at the start of each one but the first the model grows. Everything is
counted in samples, which are rows of T tokens, so nothing here depends on the batch size. How many
samples a step takes is in one place, fit_stages. (The growth mask is a function of the samples too:
flm.growth_mask.)

Two words: stages are `given` as a list of dicts, as in a JSON file; `stages` are Stage objects.

Read it from top to bottom:

    1. a stage             its fields, and the paper's three stages
    2. reading stages      from a file: every mistake is named
    3. fitting a run       recipes; stages of whole optimizer steps
    4. at a sample         learning_rate, training_flops, flop_progress
"""

import dataclasses
import math
from dataclasses import dataclass, replace

import console
from console import read_json
from flm import FLMConfig, forward_flops, preset
from grow import check_growth, layer_origins

# --------------------------------------------------------------------------------------------------
# 1. A stage


@dataclass(frozen=True)
class Stage:
    """One stage of a run. None: not given.

    >>> stage = Stage("small", preset("demo"), start=0, end=320, batch_size=16)
    >>> Stage.from_dict(stage.to_dict()) == stage
    True
    """

    name: str
    config: FLMConfig
    start: int = 0  # in samples, as end, ramp and warmup
    end: int | None = None
    ramp: int = 0  # from the growth until the mask is at 1
    layers: str | list = "stack"  # where new layers come from: grow.layer_origins
    lr: float | None = None  # at the start of the stage; None: it just goes on
    warmup: int | None = None
    batch_size: int | None = None  # rows of a step
    # what the stage costs: lab/plan.py
    tokens: float | None = None
    days: float | None = None
    gpus: int | None = None
    tflops: float | None = None  # TFLOP/s of one GPU
    dp: int | None = None
    tp: int | None = None
    pp: int | None = None

    def to_dict(self) -> dict:
        """Plain JSON values, without what is not given."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if value is not None}

    @staticmethod
    def from_dict(values: dict) -> "Stage":
        return Stage(**{**values, "config": FLMConfig.from_dict(values["config"])})


# The paper's three stages. Its Table 1: lr (at the start of the stage), warmup, days, tokens. Its
# Table 2: batch_size (rows of 2048 tokens), tp, pp, dp, tflops (while training). (Table 1 says
# "4.31M tokens" for the last batch; 2160 rows are 4.42M.) The shapes behind the presets flm-16b and
# flm-51b are OURS, as are layers and ramp: the paper prints none.
# fmt: off
PAPER_STAGES = [
    {"name": "16B", "preset": "flm-16b", "lr": 4e-4, "warmup": 4_608_000, "batch_size": 2304,
     "tokens": 245.37e9, "days": 9.63, "tp": 2, "pp": 1, "dp": 96, "tflops": 162},
    {"name": "51B", "preset": "flm-51b", "lr": 3.4e-4, "warmup": 230_400, "batch_size": 2304,
     "tokens": 39.64e9, "days": 5.37, "tp": 4, "pp": 2, "dp": 24, "tflops": 160,
     "layers": "stack", "ramp": 230_400},
    {"name": "101B", "preset": "flm-101b", "lr": 2e-4, "warmup": 230_400, "batch_size": 2160,
     "tokens": 26.54e9, "days": 6.54, "tp": 4, "pp": 4, "dp": 12, "tflops": 165,
     "layers": "stack", "ramp": 230_400},
]
# fmt: on

# --------------------------------------------------------------------------------------------------
# 2. Reading stages

LARGEST = 10**18  # of every number: a larger one is a mistake, and floats overflow
WHOLE, NUMBER = (int, 1, "a whole number above 0"), ((int, float), 1e-99, "a number above 0")
KEYS = {  # what a stage in a file may have: {key: (type, least value, both in words)}
    "name": (str, None, "a text"),
    "preset": (str, None, "the name of a preset"),
    "config": (dict, None, "{field: value, ...}"),
    "layers": ((str, list), None, "a rule or a row of layers"),
    **dict.fromkeys(("start", "ramp", "warmup"), (int, 0, "a whole number, 0 or above")),
    **dict.fromkeys(("batch_size", "gpus", "dp", "tp", "pp"), WHOLE),
    **dict.fromkeys(("lr", "tokens", "days", "tflops"), NUMBER),
}


def key_problems(given: dict) -> list[str]:
    """What is wrong with the keys and values of a stage, each by itself."""
    problems = []
    for key, value in given.items():
        kind, least, words = KEYS.get(key, (object, None, ""))
        right = isinstance(value, kind) and not isinstance(value, bool)
        if key not in KEYS:
            problems.append(f"unknown key {key!r}; there are {', '.join(KEYS)}")
        elif not right or least is not None and not least <= value <= LARGEST:
            problems.append(f"{key} = {value!r}: must be {words}")
    return problems


def stage_config(given: dict, base: FLMConfig | None) -> FLMConfig:
    """The model of a stage: its preset, or else `base`, with the fields that it names."""
    base = preset(given["preset"]) if "preset" in given else base
    return FLMConfig.from_dict({**(base.to_dict() if base else {}), **given.get("config", {})})


def earliest_start(before: Stage) -> int:
    """Where the stage after `before` may start: `before` has at least one sample and its ramp."""
    return before.start + max(1, before.ramp)


def too_early(start: int, before: Stage) -> str:
    """What to say of a start before the earliest one."""
    earliest = earliest_start(before)
    return (
        f"starts at sample {start:,}. The stage before it starts at {before.start:,} and has a "
        f'ramp of {before.ramp:,}, so this one may start at {earliest:,} or later: "start": '
        f"{earliest}"
    )


def stage_start(given: dict, before: Stage | None) -> int:
    """The sample at which a stage starts. Raises ValueError where it cannot."""
    start = given.get("start")
    if before is None:
        if start:
            raise ValueError(f"starts at sample {start:,}; the first stage starts at 0")
        return 0
    if start is None and before.tokens is None:
        raise ValueError("needs a start in samples, or the stage before it its tokens")
    if start is None:
        start = before.start + round(before.tokens / before.config.max_seq_len)
    if start < earliest_start(before):
        raise ValueError(too_early(start, before))
    return start


def read_stage(given: dict, name: str, before: Stage | None, base: FLMConfig | None) -> Stage:
    """One stage, after `before`. Raises ValueError with what is wrong with it."""
    console.refuse(key_problems(given))
    config = stage_config(given, before.config if before else base)
    values = {"name": name, **given, "config": config}
    values.pop("preset", None)
    if before:
        check_growth(before.config, config)
        layer_origins(before.config.n_layers, config.n_layers, values.get("layers", "stack"))
    if {"dp", "tp", "pp"} <= given.keys():
        values.setdefault("gpus", given["dp"] * given["tp"] * given["pp"])
    return Stage(**{**values, "start": stage_start(given, before)})


def read_stages(given: list[dict], base: FLMConfig | None = None) -> list[Stage]:
    """The stages of a run, checked, with every start filled in.

    A stage is {"preset": name, and/or "config": {fields}}: its model. Fields that are not named are
    those of the preset, or of the stage before; of `base` in the first stage. Its length is its
    "tokens" or the next stage's "start". KEYS has all keys. Training reads start, ramp, layers, lr,
    warmup and batch_size; lab/plan.py reads tokens, gpus (or dp, tp, pp), and days or tflops.

    Raises ValueError with what is wrong with the first bad stage (the later ones build on it)."""
    is_list = isinstance(given, list) and all(isinstance(item, dict) for item in given)
    if not is_list or not given:
        raise ValueError(
            'stages are a JSON list, such as [{"preset": "flm-16b", "tokens": 245.37e9}, ...]'
        )
    stages = []
    for number, values in enumerate(given, 1):
        name = str(values.get("name", values.get("preset", f"stage {number}")))
        before = stages[-1] if stages else None
        try:
            stage = read_stage(values, name, before, base)
        except ValueError as error:
            heading = f"these stages do not work: stage {number} ({name})"
            raise ValueError(f"{heading}\n  {error}") from None
        if before and before.tokens is None:
            tokens = (stage.start - before.start) * before.config.max_seq_len
            stages[-1] = replace(before, tokens=tokens)
        stages.append(stage)
    return stages


# --------------------------------------------------------------------------------------------------
# 3. Fitting a run

# The paper's recipe in miniature; start, ramp and warmup in shares of the run.
DEMO_STAGES = [
    {"config": {"n_layers": 2}},
    {"config": {"n_layers": 4}, "start": 0.55, "ramp": 0.08, "layers": "stack", "warmup": 0.02},
    {"config": {"n_layers": 6}, "start": 0.78, "ramp": 0.08, "layers": "stack", "warmup": 0.02},
]
FEWEST_STEPS = 5  # 3, 1 and 1 for these stages; of 4 steps none would be left for the last stage


def paper_recipe(given: dict) -> dict:
    """A run of one stage of the paper; its steps are inferred: tokens / batch."""
    steps = round(given["tokens"] / given["batch_size"] / 2048)
    return {"steps": steps, **{key: given[key] for key in ("batch_size", "lr", "warmup")}}


def our_recipe(parameters: float, batch_size: int, T: int, lr: float) -> dict:
    """OURS, not tuned, for a model whose training no paper prints. 20 tokens for each parameter
    (Hoffmann et al., arXiv 2203.15556), and a warm-up of the same share of the run as in the
    paper's first stage (4,608k of 119.8M samples)."""
    steps = round(20 * parameters / batch_size / T)
    share = PAPER_STAGES[0]["warmup"] / PAPER_STAGES[0]["tokens"] * 2048
    warmup = round(share * steps) * batch_size
    return {"steps": steps, "batch_size": batch_size, "lr": lr, "warmup": warmup}


# Printed for Tele-FLM-52B (arXiv 2404.16645, Table 4), with a weight decay of 0 (--weight-decay 0):
# 2T tokens in batches of 1,344 x 4,096. For 102B and 1T it is OURS.
TELE_RECIPE = {"steps": 363_304, "batch_size": 1344, "lr": 1.5e-4, "warmup": 2000 * 1344}
RECIPES = {  # of each preset; those of the demos are ours, by trying
    "demo": {"steps": 800, "batch_size": 16, "lr": 4e-3, "warmup": 800, "stages": DEMO_STAGES},
    "iq-demo": {"steps": 4000, "batch_size": 8, "lr": 2e-3, "warmup": 1000},
    # The learning rates are the papers', for muP carries them from the proxy to any width. Batches:
    # 1M tokens for 1B parameters, as for GPT-3's 1.3B (arXiv 2005.14165, Table 2.1); its 0.5M for
    # the proxies.
    "flm-proxy": our_recipe(0.0636e9, 256, 2048, PAPER_STAGES[0]["lr"]),
    "flm-1b": our_recipe(1.011e9, 512, 2048, PAPER_STAGES[0]["lr"]),
    "tele-flm-proxy": our_recipe(0.2816e9, 128, 4096, TELE_RECIPE["lr"]),
    **{given["preset"]: paper_recipe(given) for given in PAPER_STAGES},
    # ours, not tuned
    "tele-demo": {"steps": 600, "batch_size": 16, "lr": 3e-3, "warmup": 800},
    **{f"tele-flm-{size}": TELE_RECIPE for size in ("52b", "102b", "1t")},
}


def given_stages(word: str | None, preset_name: str, steps: int, batch_size: int) -> list[dict]:
    """What --stages means, for fit_stages: a list of dicts. word: "none", "paper", a JSON file, or
    None for what the recipe of the preset has. Raises ValueError for a file that cannot be read,
    and for a run that is too short for the recipe."""
    if word is not None:
        return {"none": [{}], "paper": PAPER_STAGES}.get(word) or read_json("--stages", word)
    shares = RECIPES[preset_name].get("stages", [{}])
    if len(shares) > 1 and steps < FEWEST_STEPS:
        raise ValueError(
            f"{steps} steps are too few for the growths of the recipe {preset_name}: ask for "
            f"--steps {FEWEST_STEPS} or more, or for a run without growth: --stages none"
        )
    return in_samples(shares, steps * batch_size)


def in_samples(shares: list[dict], samples: int) -> list[dict]:
    """Stages whose start, ramp and warmup are shares of a run, for a run of so many samples."""
    keys = ("start", "ramp", "warmup")
    return [
        {key: round(value * samples) if key in keys else value for key, value in stage.items()}
        for stage in shares
    ]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def fill_in(stage: Stage, **defaults) -> Stage:
    """The stage with these values where it has none."""
    missing = {key: value for key, value in defaults.items() if getattr(stage, key) is None}
    return replace(stage, **missing)


def whole_step(samples: int, stage: Stage) -> int:
    """The first sample at or after `samples` at which a step of the stage ends."""
    return stage.start + ceil_div(samples - stage.start, stage.batch_size) * stage.batch_size


def total_steps(stages: list[Stage], samples: int = 0) -> int:
    """The optimizer steps from `samples` to the end of the run.

    >>> options = {"batch_size": 16, "lr": 3e-3, "warmup": 0}
    >>> given = [{}, {"config": {"n_layers": 8}, "start": 100, "batch_size": 8}]
    >>> stages = fit_stages(given, preset("demo"), steps=20, **options)
    >>> total_steps(stages), total_steps(stages, 96), stages[-1].end
    (20, 14, 216)
    """
    left = ((stage.end - max(stage.start, samples), stage.batch_size) for stage in stages)
    return sum(ceil_div(rows, batch_size) for rows, batch_size in left if rows > 0)


def too_few_steps(steps: int, stages: list[Stage]) -> str:
    """What to say of a run of `steps` that ends before its last stage."""
    last, needed = stages[-1], total_steps(stages[:-1])
    return (
        f"{steps} steps end before the last stage, {last.name}, which starts at sample "
        f"{last.start:,} after {needed} steps: ask for --steps {needed + 1} or more"
    )


def fit_stages(
    given: list[dict],
    config: FLMConfig,
    *,
    steps: int | None,
    batch_size: int,
    lr: float,
    warmup: int,
    seen: int = 0,
) -> list[Stage]:
    """The stages of a run: whole steps, each with its end, lr, warmup and batch_size.

    given: see read_stages; the first stage builds on `config`. steps: optimizer steps of the whole
    run, whatever the batch sizes of its stages; None: the run ends with the tokens of its last
    stage. batch_size, lr, warmup: of the first stage, where it names none. A later stage has the
    same batch_size, no lr and no warmup, where it names none. seen: samples that a checkpoint
    brings along, from which all counts.

    A stage begins with the first whole step at or after its start, here with sample 112:

    >>> given = [{"config": {"n_layers": 2}}, {"config": {"n_layers": 6}, "start": 100}]
    >>> options = {"batch_size": 16, "lr": 3e-3, "warmup": 0}
    >>> stages = fit_stages(given, preset("demo"), steps=20, **options)
    >>> [(stage.config.n_layers, stage.start, stage.end) for stage in stages]
    [(2, 0, 112), (6, 112, 320)]

    Raises ValueError with all that does not fit: a stage without a step, a growth within the ramp
    before it. It names the start or the steps that would do."""
    first, *later = read_stages(given, config)
    stages, problems = [fill_in(first, lr=lr, warmup=warmup, batch_size=batch_size)], []
    for stage in later:
        before = stages[-1]
        start, earliest = (whole_step(n, before) for n in (stage.start, earliest_start(before)))
        if start < earliest:
            problems.append(f"{stage.name} {too_early(start, before)}")
        start = max(start, earliest)
        stages[-1] = replace(before, end=start)
        stages.append(fill_in(replace(stage, start=start), warmup=0, batch_size=batch_size))
    last = stages[-1]
    if steps is None:
        end = last.start + round((last.tokens or 0) / last.config.max_seq_len)
        if last.tokens is None:
            problems.append(f"{last.name} needs its tokens, or the run a number of steps: --steps")
    else:
        end = last.start + (steps - total_steps(stages[:-1])) * last.batch_size
        if end <= last.start:
            problems.append(too_few_steps(steps, stages))
    console.refuse(problems, "these stages do not fit the run:")
    stages[-1] = replace(last, end=end)
    return [replace(s, start=s.start + seen, end=s.end + seen) for s in stages]


def extend_stages(stages: list[Stage], more_steps: int, lr_ratio: float = 1.0) -> list[Stage]:
    """The stages of a run that is resumed with other --steps and --lr: the last stage ends so many
    steps later (or earlier), and every learning rate is multiplied. Raises ValueError where the
    last stage would have no step."""
    last = stages[-1]
    end = last.end + more_steps * last.batch_size
    if end <= last.start:
        raise ValueError(too_few_steps(total_steps(stages) + more_steps, stages))
    stages = [*stages[:-1], replace(last, end=end)]
    return [replace(s, lr=None if s.lr is None else s.lr * lr_ratio) for s in stages]


# --------------------------------------------------------------------------------------------------
# 4. At a sample


def cosine_phase(lr: float, peak: float, min_lr: float) -> float:
    """Where a learning rate lies on half a cosine from `peak` (0) down to min_lr * peak (1)."""
    share = (lr / peak - min_lr) / (1 - min_lr) if min_lr < 1 else 1.0
    return math.acos(max(-1.0, min(1.0, 2 * share - 1))) / math.pi


def cosine(stages: list[Stage], samples: int, min_lr: float) -> float:
    """The learning rate without the warm-ups of the stages: see learning_rate.

    A run of 110 samples, whose second stage meets an lr of 0.3 at sample 30. Half a cosine from 0.5
    to 0.1 is at 0.3 in its middle: a phase of 0.5. So the phase goes from 0 at sample 10, where the
    warm-up ends, to 0.5 at sample 30, and from there to 1 at sample 110.

    >>> given = [{}, {"config": {"n_layers": 8}, "start": 30, "lr": 0.3}]
    >>> options = {"batch_size": 1, "lr": 0.5, "warmup": 10}
    >>> stages = fit_stages(given, preset("demo"), steps=110, **options)
    >>> [round(cosine(stages, samples, 0.2), 3) for samples in (10, 20, 30, 70, 110)]
    [0.5, 0.441, 0.3, 0.159, 0.1]
    """
    with_lr = [stage for stage in stages if stage.lr is not None]
    peak = max(stage.lr for stage in with_lr)
    # What the cosine meets: at this sample, this phase.
    points = [(stage.start, cosine_phase(stage.lr, peak, min_lr)) for stage in with_lr]
    points.append((stages[-1].end, 1.0))
    last = sum(start < samples for start, _ in points[1:-1])  # the last point before `samples`
    (begin, begin_phase), (end, end_phase) = points[last : last + 2]
    if end_phase <= begin_phase:  # a higher lr, which is not on the way down
        end, end_phase = points[-1]
    if last == 0:
        begin += stages[0].warmup
    share = min(1.0, max(0.0, (samples - begin) / max(1, end - begin)))
    angle = math.pi * (begin_phase + (end_phase - begin_phase) * share)
    return peak * (min_lr + (1 - min_lr) * (1 + math.cos(angle)) / 2)


def decay_start(stages: list[Stage], decay: float) -> int:
    """The sample at which the last `decay` (a share) of the run begins."""
    begin, end = stages[0].start, stages[-1].end
    return end - round(decay * (end - begin))


def decay_step(stages: list[Stage], decay: float) -> int:
    """The last step before the last `decay` (a share) of the run."""
    return total_steps(stages) - total_steps(stages, decay_start(stages, decay))


def wsd(stages: list[Stage], samples: int, min_lr: float, decay: float) -> float:
    """Warm-up, stable, decay, without the warm-ups: constant, then a straight line down.

    The constant is the lr of the newest stage that has one. The line takes the last `decay` of the
    run, whatever its stages, and ends at min_lr of the peak. So a run that stops before the line
    can go on to any other end, and many runs can share what comes before it.

    >>> stages = fit_stages([{}], preset("demo"), steps=100, batch_size=1, lr=0.5, warmup=0)
    >>> [round(wsd(stages, samples, 0.2, decay=0.5), 9) for samples in (1, 50, 75, 100)]
    [0.5, 0.5, 0.3, 0.1]
    """
    with_lr = [stage for stage in stages if stage.lr is not None]
    held = [stage.lr for stage in with_lr if stage.start < samples][-1]
    floor = min(held, min_lr * max(stage.lr for stage in with_lr))
    start = decay_start(stages, decay)
    share = (samples - start) / max(1, stages[-1].end - start)
    return held + (floor - held) * min(1.0, max(0.0, share))


def learning_rate(
    stages: list[Stage], samples: int, min_lr: float, decay: float | None = None
) -> float:
    """The learning rate of the step that brings the run to `samples`: a straight warm-up to the
    peak, then half a cosine that ends with the last sample, at min_lr (a share) of the peak. With
    `decay` it is not the paper's cosine, but wsd.

    The paper's stages "approximately inherit the previous learning rate and adhere to the same
    schedule" (section 2.4). A stage without an lr leaves the cosine alone. A lower lr than before
    is met at the start of its stage: the cosine is stretched so that it passes there. An lr as high
    as before, or higher, sets the cosine back to there. Each stage may warm up again.

    >>> options = {"batch_size": 1, "lr": 0.5, "warmup": 10}
    >>> stages = fit_stages([{}], preset("demo"), steps=110, **options)
    >>> [round(learning_rate(stages, samples, 0.2), 9) for samples in (5, 10, 60, 110)]
    [0.25, 0.5, 0.3, 0.1]

    Two stages: the second meets its own lr, 0.3, at sample 30 (not 60), and has a warm-up of 4.

    >>> given = [{}, {"config": {"n_layers": 8}, "start": 30, "lr": 0.3, "warmup": 4}]
    >>> stages = fit_stages(given, preset("demo"), steps=110, **options)
    >>> [round(learning_rate(stages, samples, 0.2), 3) for samples in (10, 30, 31, 34, 110)]
    [0.5, 0.3, 0.074, 0.284, 0.1]
    """
    stage = [stage for stage in stages if stage.start < samples][-1]
    warm = min(1.0, (samples - stage.start) / max(1, stage.warmup))
    if decay is None:
        return cosine(stages, samples, min_lr) * warm
    return wsd(stages, samples, min_lr, decay) * warm


def training_flops(stages: list[Stage], samples: float = math.inf) -> int:
    """Floating point operations of the model from the start of the run to `samples`, or to its end:
    three forward passes' worth for each token.

    >>> stages = fit_stages([{}], preset("demo"), steps=1, batch_size=1, lr=1.0, warmup=0)
    >>> training_flops(stages, 1) == 3 * forward_flops(preset("demo"), 256) * 256
    True
    """
    flops = 0
    for stage in stages:
        T, rows = stage.config.max_seq_len, min(samples, stage.end) - stage.start
        flops += 3 * forward_flops(stage.config, T) * T * max(0, rows)
    return flops


def flop_progress(stages: list[Stage], samples: int) -> tuple[int, int]:
    """(FLOPs of the run up to `samples`, FLOPs of the whole run). A bar that counts FLOPs keeps its
    promise over a growth, after which a step costs more.

    >>> given = [{"config": {"n_layers": 2}}, {"config": {"n_layers": 6}, "start": 160}]
    >>> options = {"batch_size": 16, "lr": 3e-3, "warmup": 0}
    >>> stages = fit_stages(given, preset("demo"), steps=20, **options)
    >>> done, total = flop_progress(stages, 160)  # half of the steps
    >>> round(done / total, 3)
    0.258
    """
    return training_flops(stages, samples), training_flops(stages)
