"""parallel.py's drawing, trace and rehearsal. What needs process groups runs in processes of its own: one of them, alone in a world
whose other processes are not there, is rehearsed on tensors without numbers and then really run."""
import concurrent.futures
import dataclasses
import gc
import json
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import parallel
from flm import FLMConfig, forward_flops
from parallel import (
    SCHEDULES,
    UNITS,
    Layout,
    alone,
    build,
    describe_rehearsal,
    draw,
    judge,
    line,
    measure,
    rehearse,
    timetable,
)

CONFIG = FLMConfig(n_layers=4, d_model=128, n_heads=4, head_dim=32, d_ff=512, vocab_size=384, max_seq_len=128)
LAYOUTS = {                                      # dp 3 divides none of the sizes: the shards are padded
    "pipeline": Layout(dp=3, tp=2, pp=2, sequence_parallel=True),
    "no pipeline": Layout(dp=2, tp=2, sequence_parallel=True),
    "interleaved": Layout(pp=2, schedule="Interleaved1F1B"),
}
WIDE, NARROW = torch.float32, torch.bfloat16     # weights, arithmetic
MICRO = 2                                        # rows of a micro-batch
COUNTS = {"pipeline": (3, 4, 5), "no pipeline": (2, 3, 4), "interleaved": (4, 6, 8)}      # two that are measured, one to scale to


# ---------------------------------------------------------------------------------------------------------------------
# The drawing

def shapes(schedule):
    """Pipelines that a schedule can do: (pp, micro-batches)."""
    each = SCHEDULES[schedule]
    return st.tuples(st.integers(2, 6), st.integers(1, 4), st.integers(0, 5)).map(
        lambda x: (x[0], x[0] * each + x[2]) if each == 1 else (x[0], x[0] * (each - 1 + x[1])))


@given(shapes("1F1B"), st.sampled_from(["1F1B", "GPipe"]))
def test_bubble_of_one_stage_per_process(shape, schedule):
    """1F1B and GPipe idle (p-1)/(m+p-1) of the time, for any p processes and m micro-batches; only rounding is tolerated."""
    p, m = shape
    assert timetable(Layout(pp=p, schedule=schedule), m)[1] == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


@pytest.mark.parametrize("p, m", [(2, 4), (2, 8), (4, 8), (4, 12), (3, 9)])
def test_bubble_of_the_interleaved_schedule(p, m):
    """Two stages per process make the bubble (p-1)/(2m+p-1)."""
    assert timetable(Layout(pp=p, schedule="Interleaved1F1B"), m)[1] == pytest.approx((p - 1) / (2 * m + p - 1), abs=1e-12)


@given(st.sampled_from(sorted(SCHEDULES)).flatmap(lambda name: st.tuples(st.just(name), shapes(name))))
def test_timetable_obeys_its_dependencies(drawn):
    """In every schedule: each stage does each micro-batch's forward and backward pass once, on its own process, one thing at a time;
    nothing starts before what it needs is done; no process could have started sooner what it did; the bubble is the idle share."""
    name, (p, m) = drawn
    layout = Layout(pp=p, schedule=name)
    rows, bubble = timetable(layout, m)
    end = {(kind, stage, i): start + UNITS[kind] for row in rows for start, kind, stage, i in row}
    backward = {(stage, i): end.get(("B", stage, i), end.get(("I", stage, i))) for stage in range(layout.stages) for i in range(m)}
    assert len(rows) == p and sum(map(len, rows)) == len(end)
    assert {key[1:] for key in end if key[0] == "F"} == set(backward) and None not in backward.values()
    assert all((("B", s, i) in end) != (("I", s, i) in end and ("W", s, i) in end) for s, i in backward)
    for rank, row in enumerate(rows):
        free = 0
        for start, kind, stage, i in row:
            assert stage in layout.stage_ids(rank)
            if kind == "F":
                needs = end["F", stage - 1, i] if stage else 0
            elif kind == "W":
                needs = end["I", stage, i]
            else:
                needs = backward[stage + 1, i] if stage + 1 < layout.stages else end["F", stage, i]
            assert start == max(free, needs)
            free = start + UNITS[kind]
    last = max(end.values())
    assert bubble == pytest.approx(1 - 3 * m * layout.stages / (p * last), abs=1e-12)


def test_draw_prints_every_process_and_refuses_nonsense():
    """`parallel.py draw` prints a row per process under the bubble and its formula; what no pipeline can do is one screen, exit code 2."""
    text = draw(Layout(pp=2), 3)
    assert "25.0% ((p-1)/(m+p-1) = 25.0%)" in text
    assert "\nprocess 0  F0 F1 .  .  B0 -  F2 B1 -  .  B2 -\n" in text and "\nprocess 1  .  F0 B0 -  F1 B1 -  F2 B2 -  .  .\n" in text
    done = subprocess.run([sys.executable, ROOT / "parallel.py", "draw", "--pp", "4", "--micro-batches", "6", "--schedule", "Interleaved1F1B"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr and "needs at least 8" in done.stderr
    for layout, m, word in ((Layout(pp=0), 4, "--pp 0"), (Layout(pp=2), 0, "--micro-batches 0"), (Layout(pp=4), 3, "at least 4"),
                            (Layout(pp=2, schedule="1f1b"), 4, "Interleaved1F1B"), (Layout(pp=2, schedule="ZBVZeroBubble"), 5, "multiple of --pp 2")):
        with pytest.raises(ValueError, match=word):
            timetable(layout, m)


# ---------------------------------------------------------------------------------------------------------------------
# The rehearsal, against real tensors and closed formulas

def in_processes(function, jobs, workers=1):
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        return list(pool.map(function, *zip(*jobs)))


def allocated(world, n):
    """The peak of a really run step of a process that is alone: the bytes that all tensors alive before the step take, plus what
    the profiler saw the CPU's allocator give and take back in it."""
    worker = parallel.Worker(build(CONFIG, world, torch.device("cpu"), WIDE, NARROW), world, NARROW)
    parameters = [p for _, p in worker.named]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    with torch.no_grad():
        for p in parameters:
            p.fill_(0.01)
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    tokens = torch.zeros(n * MICRO, CONFIG.max_seq_len, dtype=torch.long)
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and type(x) in (torch.Tensor, torch.nn.Parameter)]
    before = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        worker.gradients(tokens, tokens, MICRO, 1.0)
    events = sorted((e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = peak = before
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def rehearsed_and_run(name, pp_rank):
    torch.set_num_threads(1)
    found, layout = {}, LAYOUTS[name]
    with alone(CONFIG, layout, pp_rank, MICRO, NARROW) as world:
        for again in (False, True):
            mine = dataclasses.replace(world, layout=dataclasses.replace(layout, activation_checkpointing=again))
            found["real", again] = allocated(mine, COUNTS[name][0])
            for n in COUNTS[name]:
                found[n, again] = measure(mine, CONFIG, n, MICRO, WIDE, NARROW)
    return found


PROCESSES = [("pipeline", 0), ("pipeline", 1), ("no pipeline", 0), ("interleaved", 1)]
BOTH = [(*key, again) for key in PROCESSES for again in (False, True)]


@pytest.fixture(scope="module")
def found():
    return dict(zip(PROCESSES, in_processes(rehearsed_and_run, PROCESSES)))


def pieces(layout, pp_rank):
    """Shapes of what a process computes with, after tensor parallelism: an independent list, from the table in the Megatron paper."""
    C, F, HD, V, tp = CONFIG.d_model, CONFIG.d_ff, CONFIG.n_heads * CONFIG.head_dim, CONFIG.vocab_size, layout.tp
    block = [(3 * HD // tp, C), (3 * HD // tp,), (C, HD // tp), (C,), (F // tp, C), (F // tp,), (C, F // tp), (C,), (C,), (C,), (C,), (C,)]
    stages = layout.stage_ids(pp_rank)
    first, last = 0 in stages, layout.stages - 1 in stages
    ends = [(V // tp, C)] * (2 if first and last and layout.stages > 1 else first or last) + [(C,), (C,)] * last
    return block * (CONFIG.n_layers // layout.pp) + ends


@pytest.mark.parametrize("name, pp_rank", PROCESSES)
def test_parameters_are_those_of_the_closed_formula(found, name, pp_rank):
    """Parameters by hand from the config: rows or columns cut by tp, then each parameter's rows by dp, rank 0 holding the ceiling.
    Exactly equal; and weights, moments and gradients are 4, 8 and 4 bytes for each in fp32."""
    layout, n = LAYOUTS[name], COUNTS[name][0]
    shapes = pieces(layout, pp_rank)
    got = found[name, pp_rank][n, False]
    size = lambda shape, rows: rows * (shape[1] if len(shape) == 2 else 1)
    assert got["parameters_tp"] == sum(size(shape, shape[0]) for shape in shapes)
    assert got["parameters"] == sum(size(shape, -(-shape[0] // layout.dp)) for shape in shapes)
    assert (got["weights"], got["moments"], got["gradients"]) == (4 * got["parameters"], 8 * got["parameters"], 4 * got["parameters"])


@pytest.mark.parametrize("name, pp_rank, again", BOTH)
def test_communication_is_that_of_the_closed_formulas(found, name, pp_rank, again):
    """What one process says in a step, by hand. With S the bytes of a micro-batch's whole residual stream: under sequence parallelism
    each matrix pair of a block gathers S once forward and once backward, and reduce-scatters it as often; recomputing gathers twice
    more and reduce-scatters once more (the recomputation stops at the last tensor that the backward pass reads). The stream between
    stages is S/tp, the parameters (padded) go around dp once in bf16, their gradients once in fp32. Within 1%."""
    layout, n, C, T = LAYOUTS[name], COUNTS[name][2], CONFIG.d_model, CONFIG.max_seq_len
    got = found[name, pp_rank][n, again]
    stages, L = layout.stage_ids(pp_rank), CONFIG.n_layers // layout.pp
    first, last, S = 0 in stages, layout.stages - 1 in stages, MICRO * T * C * 2
    want = {}
    if layout.tp > 1:
        want["tp all-gather"] = n * S * (L * (6 if again else 4) + first + last)
        want["tp reduce-scatter"] = n * S * (L * (5 if again else 4) + first + last)
        want["tp all-reduce"] = 4 * C * (4 * L + 2 * last) + last * n * 3 * 4 * MICRO * T      # gains and biases; the loss of V/tp logits
    if layout.dp > 1:
        padded = layout.dp * got["parameters"]
        want["dp all-gather"], want["dp reduce-scatter"] = 2 * padded, 4 * padded
    sends = sum((s > 0) + (s < layout.stages - 1) for s in stages)
    if layout.pp > 1:
        want["pp send"] = want["pp receive"] = n * S // layout.tp * sends
        want["pp all-reduce"] = 4 * CONFIG.vocab_size // layout.tp * C // layout.dp            # the tied embedding's gradient
    assert set(got["said"]) == set(want)
    for what, size in want.items():
        assert got["said"][what][1] == pytest.approx(size, rel=0.01), what


@pytest.mark.parametrize("name, pp_rank, again", BOTH)
def test_peak_memory_is_that_of_a_real_run(found, name, pp_rank, again):
    """The rehearsed peak, with and without activation checkpointing, is within 5% of what the same step of the same process takes
    from the CPU's allocator when its tensors hold numbers. The difference is scratch inside kernels: where the peak falls on none
    that has any, a ten-thousandth."""
    got = found[name, pp_rank]
    assert got[COUNTS[name][0], again]["peak"] == pytest.approx(got["real", again], rel=0.05)


@pytest.mark.parametrize("name, pp_rank, again", BOTH)
def test_scaling_equals_measuring(found, name, pp_rank, again):
    """What two small numbers of micro-batches say of a larger one is what that one measures, in every number, exactly."""
    a, b, n = COUNTS[name]
    got = found[name, pp_rank]
    assert line(a, b, got[a, again], got[b, again], n) == got[n, again]


def test_checkpointing_saves_what_it_should(found):
    """Without activation checkpointing a process keeps some 34 numbers per channel, token and block, with it the block's input
    alone: on this model the peak falls."""
    for key in PROCESSES:
        n = COUNTS[key[0]][0]
        assert found[key][n, True]["peak"] < found[key][n, False]["peak"]


# ---------------------------------------------------------------------------------------------------------------------
# The whole, and its refusals

def test_rehearse_reports_and_refuses():
    """The result is JSON that the report describes; the step's time is the sum of its parts and the model's FLOPs are split among the
    processes without loss; a layout that does not fit even with checkpointing, or that cannot be, is refused with its numbers."""
    layout = LAYOUTS["no pipeline"]
    result = rehearse(CONFIG, layout, 24, 2)
    assert json.loads(json.dumps(result)) == result
    t = result["time"]
    assert t["step"] == pytest.approx(t["compute"] + t["tp"] + t["pp"] + t["dp"] + t["bubble"])
    flop = 3 * forward_flops(CONFIG, CONFIG.max_seq_len) * 24 * CONFIG.max_seq_len
    assert sum(p["flop"] for p in result["modes"]["plain"]["processes"]) * layout.size == flop == result["flop"]
    text = describe_rehearsal(result)
    assert "2 and 3 micro-batches; what grows with them is scaled to 6" in text and "fits" in text
    peaks = [result["modes"][mode]["peak"] / 2 ** 30 for mode in ("plain", "checkpointing")]
    assert peaks[1] < peaks[0]
    with pytest.raises(ValueError, match="does not fit.*GiB without activation checkpointing.*GiB with"):
        judge(result["modes"], layout, peaks[1] / 2)
    assert judge(result["modes"], layout, (peaks[0] + peaks[1]) / 2) == ["checkpointing"]
    with pytest.raises(ValueError, match="n_heads 4: must be a multiple of --tp 3"):
        rehearse(CONFIG, Layout(tp=3), 60, 2)
    with pytest.raises(ValueError, match="--dp 2 without --shard-optimizer"):
        rehearse(CONFIG, Layout(dp=2), 60, 2)


# ---------------------------------------------------------------------------------------------------------------------
# The trace, among real processes

def traced(rank, port):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")
    cpu, n = torch.device("cpu"), COUNTS["interleaved"][0]
    world = parallel.arrange(parallel.World(rank=rank, control=dist.new_group(backend="gloo")), LAYOUTS["interleaved"], cpu)
    worker = parallel.Worker(build(CONFIG, world, cpu, WIDE, NARROW), world, NARROW)
    worker.init_weights(0)
    tokens = torch.zeros(n * MICRO, CONFIG.max_seq_len, dtype=torch.long)
    worker.gradients(tokens, tokens, MICRO, 1.0)         # the stages ask each other for shapes
    lines = []
    with parallel.trace(worker, 7, lines.append) as said:
        worker.gradients(tokens, tokens, MICRO, 1.0)
    dist.barrier()
    return lines, {f"{axis} {kind}": [said.calls[axis, kind], said.bytes[axis, kind]] for axis, kind in said.calls}


def test_trace_tells_what_the_rehearsal_counts(found):
    """Two real processes, two stages of the pipeline each, tell of each other what the rehearsal of their layout counts, call for call
    and byte for byte; what one sends the other receives, with its micro-batch and pass."""
    told = in_processes(traced, [(rank, 20000 + os.getpid() % 20000) for rank in range(2)], workers=2)
    for rank, (lines, said) in enumerate(told):
        assert all(text.startswith(f"rank {rank} (pp {rank}, dp 0, tp 0)  step 7 ") for text in lines)
        assert len(lines) == sum(calls for calls, _ in said.values())
    n = COUNTS["interleaved"][0]
    assert told[1][1] == found["interleaved", 1][n, False]["said"]

    def spoken(rank, kind):
        return sorted(" ".join(text.split("step 7")[1].split()) for text in told[rank][0] if f" {kind} " in text)

    forward, backward = ([f"micro-batch {i} {way} pp send (2, 128, 128) bfloat16 65,536 bytes" for i in range(n)] for way in ("forward", "backward"))
    assert spoken(0, "send") == sorted(2 * forward + backward)           # from stages 0 and 2; from 2 back to 1
    assert spoken(1, "send") == sorted(forward + 2 * backward)
    assert [text.replace("receive", "send") for text in spoken(0, "receive")] == spoken(1, "send")
    assert [text.replace("receive", "send") for text in spoken(1, "receive")] == spoken(0, "send")
