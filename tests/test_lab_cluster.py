"""The rehearsal, against real tensors and closed formulas, and the trace, against the rehearsal.

What needs a process group runs in processes of its own. One of them, alone in a layout whose other
ranks are not there, is rehearsed on tensors without numbers, and then takes the same step with real
tensors. All measurements are made once, by the fixture `found`; the tests look at them."""

import concurrent.futures
import dataclasses
import gc
import importlib.util
import json
import multiprocessing
import sys
from collections import Counter

import pytest
import torch
from helpers import error, run_command
from processes import start, wait
from torch.profiler import ProfilerActivity, profile

import data
import parallel
from flm import FLMConfig, forward_flops
from lab import cluster
from lab.cluster import WITH, WITHOUT, Cluster, Job, extrapolate
from parallel import Layout

# As few blocks as there can be: each operation of a rehearsal takes long, whatever its size.
CONFIG = FLMConfig(
    n_layers=2,
    d_model=128,
    n_heads=4,
    head_dim=32,
    d_ff=1024,
    vocab_size=384,
    max_seq_len=128,
)
DEEPER = CONFIG.replace(n_layers=4)
MICRO = 2  # rows of a micro-batch
JOBS = {  # dp 3 divides none of the sizes: the shards are padded
    "pipeline": Job(CONFIG, Layout(dp=3, tp=2, pp=2, sequence_parallel=True), 96, MICRO),
    "no pipeline": Job(CONFIG, Layout(dp=2, tp=2, sequence_parallel=True), 24, MICRO),
    "interleaved": Job(DEEPER, Layout(pp=2, schedule="Interleaved1F1B"), 16, MICRO),
}
# Numbers of micro-batches: two that are measured, and one to extrapolate to.
COUNTS = {"pipeline": (3, 4, 5), "no pipeline": (2, 3, 6), "interleaved": (4, 6, 8)}
RANKS = [("interleaved", 1), ("pipeline", 0), ("pipeline", 1), ("no pipeline", 0)]  # longest first
BOTH = [(*rank, case) for rank in RANKS for case in cluster.CASES]


# --------------------------------------------------------------------------------------------------
# Measurements


def allocated(job, world, n):
    """The peak of a step with real tensors: the bytes of all tensors that are alive before the
    step, and what the profiler saw the CPU's allocator give and take back in it."""
    parts = parallel.build_parts(
        job.config, world, torch.device("cpu"), job.weights, job.arithmetic
    )
    worker = parallel.Worker(parts, world, job.arithmetic)
    parameters = [p for _, p in worker.named]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    with torch.no_grad():
        for p in parameters:
            p.fill_(0.01)
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    tokens = torch.zeros(n * job.micro, job.config.max_seq_len, dtype=torch.long)
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
    now = peak = sum({s._cdata: s.nbytes() for s in storages}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        worker.gradients(tokens, tokens, job.micro)
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def measure_and_run(name, pp_rank):
    """{(case, number of micro-batches): measurement}, and under (case, "real") the real peak."""
    torch.set_num_threads(1)
    found, job = {}, JOBS[name]
    with cluster.fake_cluster(job, pp_rank) as world:
        for case in cluster.CASES:
            again = case == WITH
            layout = dataclasses.replace(job.layout, activation_checkpointing=again)
            mine = dataclasses.replace(world, layout=layout)
            found[case, "real"] = allocated(job, mine, COUNTS[name][0])
            for n in COUNTS[name]:
                found[case, n] = cluster.measure(job, mine, n)
    return found


@pytest.fixture(scope="module")
def found():
    """{(job, pp rank): what measure_and_run gives}"""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, spawn, max_tasks_per_child=1) as pool:
        return dict(zip(RANKS, pool.map(measure_and_run, *zip(*RANKS))))


# --------------------------------------------------------------------------------------------------
# A measurement


def pieces(job, pp_rank):
    """Shapes of what a rank computes with, after tensor parallelism: an independent list, from the
    table in the Megatron paper."""
    config, layout = job.config, job.layout
    C, F, V, tp = config.d_model, config.d_ff, config.vocab_size, layout.tp
    HD = config.n_heads * config.head_dim
    block = [(3 * HD // tp, C), (3 * HD // tp,), (C, HD // tp), (C,)]
    block += [(F // tp, C), (F // tp,), (C, F // tp), (C,)]
    block += [(C,)] * 4
    first, last = pp_rank == 0, pp_rank == layout.pp - 1
    ends = [(V // tp, C)] * (first or last) + [(C,), (C,)] * last
    return block * (config.n_layers // layout.pp) + ends


@pytest.mark.parametrize("name, pp_rank", RANKS)
def test_parameters_are_those_of_the_closed_formula(found, name, pp_rank):
    """Parameters by hand from the config: rows or columns cut by tp, then each parameter's rows by
    dp, rank 0 holding the ceiling. Exactly equal; and weights, moments and gradients are 4, 8 and 4
    bytes for each in fp32."""
    job = JOBS[name]
    got, shapes = found[name, pp_rank][WITHOUT, COUNTS[name][0]], pieces(job, pp_rank)

    def size(shape, rows):
        return rows * (shape[1] if len(shape) == 2 else 1)

    kept = sum(size(shape, -(-shape[0] // job.layout.dp)) for shape in shapes)
    assert got["parameters_tp"] == sum(size(shape, shape[0]) for shape in shapes)
    assert got["parameters"] == kept
    assert [got[k] for k in ("weights", "moments", "gradients")] == [4 * kept, 8 * kept, 4 * kept]


@pytest.mark.parametrize("name, pp_rank, case", BOTH)
def test_traffic_is_that_of_the_closed_formulas(found, name, pp_rank, case):
    """What one rank sends in a step, by hand. With S the bytes of a micro-batch's whole residual
    stream: under sequence parallelism each pair of matrices in a block gathers S once forward and
    once backward, and reduce-scatters it as often; recomputing gathers twice more and
    reduce-scatters once more (the recomputation stops at the last tensor that the backward pass
    reads). The stream between pipeline stages is S/tp, the parameters (padded) go around dp once in
    bf16, their gradients once in fp32. Within 1%."""
    job, n, again = JOBS[name], COUNTS[name][2], case == WITH
    C, T, V, layout = job.config.d_model, job.config.max_seq_len, job.config.vocab_size, job.layout
    got = found[name, pp_rank][case, n]
    stages, L = layout.stage_ids(pp_rank), job.config.n_layers // layout.pp
    first, last, S = pp_rank == 0, pp_rank == layout.pp - 1, MICRO * T * C * 2
    want = {}
    if layout.tp > 1:
        want["tp all-gather"] = n * S * (L * (6 if again else 4) + first + last)
        want["tp reduce-scatter"] = n * S * (L * (5 if again else 4) + first + last)
        gains_and_biases, loss = 4 * C * (4 * L + 2 * last), last * n * 3 * 4 * MICRO * T
        want["tp all-reduce"] = gains_and_biases + loss
    if layout.dp > 1:
        padded = layout.dp * got["parameters"]
        want["dp all-gather"], want["dp reduce-scatter"] = 2 * padded, 4 * padded
    if layout.pp > 1:
        sends = sum((s > 0) + (s < layout.pipeline_stages - 1) for s in stages)
        want["pp send"] = want["pp receive"] = n * S // layout.tp * sends
        want["pp all-reduce"] = 4 * V // layout.tp * C // layout.dp  # the tied embedding's gradient
    assert set(got["sent"]) == set(want)
    for what, size in want.items():
        assert got["sent"][what]["bytes"] == pytest.approx(size, rel=0.01), what


@pytest.mark.parametrize("name, pp_rank, case", BOTH)
def test_peak_memory_is_that_of_a_real_step(found, name, pp_rank, case):
    """The rehearsed peak, with and without activation checkpointing, is within 5% of what the same
    step of the same rank takes from the CPU's allocator when its tensors hold numbers. The
    difference is scratch inside kernels: where the peak falls on none, a ten-thousandth."""
    got = found[name, pp_rank]
    assert got[case, COUNTS[name][0]]["peak"] == pytest.approx(got[case, "real"], rel=0.05)


@pytest.mark.parametrize("name, pp_rank, case", BOTH)
def test_extrapolating_equals_measuring(found, name, pp_rank, case):
    """What two small numbers of micro-batches say of a larger one is what that one measures, in
    every number, exactly; and they are the numbers that a rehearsal chooses."""
    *few, n = COUNTS[name]
    got = found[name, pp_rank]
    assert extrapolate(few, [got[case, k] for k in few], n) == got[case, n]
    assert cluster.counts_to_measure(dataclasses.replace(JOBS[name], batch_size=9600)) == few


def test_activation_checkpointing_saves_memory(found):
    """Without activation checkpointing a rank keeps some 34 numbers per channel, token and block,
    with it the block's input alone: on this model the peak falls."""
    for rank, got in found.items():
        n = COUNTS[rank[0]][0]
        assert got[WITH, n]["peak"] < got[WITHOUT, n]["peak"]


# --------------------------------------------------------------------------------------------------
# The rehearsal


@pytest.fixture
def measured(found, monkeypatch):
    """rehearse(JOBS["no pipeline"]) uses what `found` has already measured."""

    def measure_ranks(job, counts):
        assert job.config == CONFIG and counts == [2, 3]
        got = found["no pipeline", 0]
        return {case: [[dict(got[case, n]) for n in counts]] for case in cluster.CASES}

    monkeypatch.setattr(cluster, "measure_ranks", measure_ranks)
    return JOBS["no pipeline"]


def test_the_result_adds_up(measured):
    """The result is JSON; the step's time is the sum of its parts; the model's FLOPs are split
    among the ranks without loss; the report says what was measured."""
    result = cluster.rehearse(measured)
    assert json.loads(json.dumps(result)) == result
    t = result["time"]
    assert t["step"] == pytest.approx(t["compute"] + t["tp"] + t["pp"] + t["dp"] + t["bubble"])
    flop = 3 * forward_flops(CONFIG, CONFIG.max_seq_len) * 24 * CONFIG.max_seq_len
    ranks = result["cases"][WITHOUT]
    assert sum(rank["flop"] for rank in ranks) * measured.layout.size == flop == result["flop"]
    text = cluster.report(measured, Cluster(), result)
    assert "2 and 3 micro-batches; what grows with them is scaled to 6" in text and "fits" in text


def test_each_assumption_counts(measured):
    """A twice as fast link halves the time of its traffic, a twice as fast GPU that of computing;
    the rest stays."""
    usual = cluster.rehearse(measured)["time"]
    changes = {"tp": {"tp_link": 400}, "dp": {"network": 50}, "compute": {"peak_tflops": 624}}
    for part, change in changes.items():
        time = cluster.rehearse(measured, Cluster(**change))["time"]
        expected = usual | {part: usual[part] / 2, "step": usual["step"] - usual[part] / 2}
        assert time == pytest.approx(expected)


def test_a_memory_that_is_too_small(measured):
    """Where the step fits with activation checkpointing alone, that is what is timed; where it fits
    in neither case, it is refused, with both numbers and advice."""
    usual = cluster.rehearse(measured)
    plain, less = (cluster.peak(usual["cases"][case]) for case in cluster.CASES)
    assert less < plain and usual["case"] == WITHOUT
    result = cluster.rehearse(measured, Cluster(memory_gb=(plain + less) / 2))
    assert result["case"] == WITH and result["tflops"] < usual["tflops"]
    message = error(cluster.rehearse, measured, Cluster(memory_gb=less / 2))
    assert "without activation checkpointing: " in message and "--tp" in message
    assert message.count("too much") == 3  # the third: without the distributed optimizer


@pytest.mark.quick
def test_what_cannot_be_rehearsed_is_refused():
    """Every reason at once: a layout that does not fit the model, plain data parallelism, numbers
    of a cluster that cannot be."""
    job = Job(CONFIG, Layout(dp=2, tp=1, sequence_parallel=True), 60, MICRO)
    message = error(cluster.rehearse, job, Cluster(utilisation=0.0))
    assert (
        "--sequence-parallel: needs --tp 2" in message and "--utilisation 0.0: must be" in message
    )
    job = Job(CONFIG, Layout(dp=2), 60, MICRO)
    message = error(cluster.rehearse, job, Cluster(tp_link=float("inf")))
    assert "--dp 2: add --shard-optimizer" in message and "--tp-link inf: must be" in message


@pytest.mark.quick
@pytest.mark.parametrize("word", ["--resume=runs/a", "--eval-only=runs/a", "--compile"])
def test_options_without_a_meaning_are_refused(word):
    """The other modes of train.py, and --compile, which hides from rehearsal and trace."""
    name = word.split("=")[0]
    for command in "rehearse", "trace":
        message = error(cluster.main, [command, word])
        assert message == f"{name}: {command} makes no use of it, leave it out"


@pytest.mark.quick
def test_a_trace_of_one_process_is_refused():
    """The message has the command that starts two."""
    message = error(cluster.main, ["trace", "--pp", "2"])
    assert "torchrun --standalone --nproc-per-node 2 -m lab.cluster trace" in message


@pytest.mark.quick
def test_another_pytorch(monkeypatch, capsys):
    """Where PyTorch lacks a private name, `rehearse` says in one line which version has it, and
    `draw` works."""
    monkeypatch.delattr("torch.distributed.pipelining.stage.InferenceMode")
    spec = importlib.util.spec_from_file_location("cluster_elsewhere", cluster.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    _, line = error(module.main, ["rehearse"]).split("\n")
    assert "torch==2.13" in line and "cannot import name 'InferenceMode'" in line
    assert module.main(["draw", "--pp", "2", "--micro-batches", "2"]) == 0
    assert "pp rank 1" in capsys.readouterr().out


def words_of(job):
    """The options of train.py that describe a job."""
    layout, fields = job.layout, job.config.to_dict()
    words = ["--dp", layout.dp, "--tp", layout.tp, "--pp", layout.pp, "--schedule", layout.schedule]
    words += ["--sequence-parallel"] * layout.sequence_parallel
    words += ["--batch-size", job.batch_size, "--micro-batch", job.micro, "--dtype", "bfloat16"]
    usual = FLMConfig.__dataclass_fields__
    sizes = [f"{k}={v}" for k, v in fields.items() if v != usual[k].default]
    return [*map(str, words), "--model", *sizes]


def test_the_command_rehearses(measured):
    """`python -m lab.cluster rehearse` measures in processes of its own what `found` has, prints
    the report, and shows its progress on stderr."""
    expected = cluster.report(measured, Cluster(), cluster.rehearse(measured))
    code, out, err = run_command("lab.cluster", "rehearse", *words_of(measured))
    assert code == 0, err
    assert out == expected + "\n" and "at a time: 100%" in err


def test_a_mistake_is_one_screen():
    """A user's mistake: exit code 2, no traceback."""
    words = ("draw", "--pp", 4, "--micro-batches", 8, "--schedule", "fast")
    code, out, err = run_command("lab.cluster", *words)
    assert (code, out) == (2, "") and "--schedule fast: must be one of" in err
    assert "Traceback" not in err


# --------------------------------------------------------------------------------------------------
# The trace


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """What two real ranks print in two steps of the job "interleaved"."""
    folder, job = tmp_path_factory.mktemp("trace"), JOBS["interleaved"]
    job = dataclasses.replace(job, batch_size=COUNTS["interleaved"][0] * MICRO)
    for i in range(8):
        (folder / f"{i}.txt").write_text(f"text {i}. " + "the cat sat on the mat. " * 100)
    files, tokenizer = sorted(folder.glob("*.txt")), data.get_tokenizer("bytes")
    data.prepare({"text": files}, folder / "tokens", tokenizer, val_fraction=0.5)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", 2, "-m", "lab.cluster", "trace", *words_of(job)]
    command += ["--steps", 2, "--eval-rows", 2, "--device", "cpu"]
    command += ["--data", folder / "tokens", "--out", folder / "run"]
    log = folder / "log"
    assert wait(start(command, log, cwd=folder), log) == 0, log.read_text()
    return [line for line in log.read_text().splitlines() if line.startswith("rank ")]


def lines_of(traced, rank, step):
    """The lines of one rank and step, without their beginning."""
    begin = f"rank {rank} (pp {rank}, dp 0, tp 0)  step {step}  "
    return [line.removeprefix(begin) for line in traced if line.startswith(begin)]


def test_the_trace_has_what_the_rehearsal_counts(found, traced):
    """Of two real ranks, with two pipeline stages each, the trace has what the rehearsal of their
    layout counts, call for call and byte for byte. In the first step they also agree on shapes; the
    sums of plain numbers go over all ranks ("world")."""
    calls, sizes = Counter(), Counter()
    for line in lines_of(traced, 1, 2):
        words = line.split()
        axis = next(word for word in words if word in ("dp", "tp", "pp", "world"))
        kind = words[words.index(axis) + 1]
        calls[f"{axis} {kind}"] += 1
        sizes[f"{axis} {kind}"] += int(words[-2].replace(",", ""))
    assert calls.pop("world all-reduce") == 2  # supervised tokens; loss and norm of the gradient
    sent = found["interleaved", 1][WITHOUT, COUNTS["interleaved"][0]]["sent"]
    assert sent == {what: {"calls": n, "bytes": sizes[what]} for what, n in calls.items()}


def test_what_one_rank_sends_the_other_receives(traced):
    """Each send of a rank is a receive of the other rank, of the same micro-batch and pass."""

    def messages(rank, kind):
        lines = [
            " ".join(line.split()) for line in lines_of(traced, rank, 2) if f" {kind} " in line
        ]
        return sorted(line.replace(f" {kind} ", " ") for line in lines)

    forward, backward = (
        [
            f"micro-batch {i} {which} pp (2, 128, 128) bfloat16 65,536 bytes"
            for i in range(COUNTS["interleaved"][0])
        ]
        for which in ("forward", "backward")
    )
    # Forward from pipeline stages 0 and 2, backward from 2; forward from 1, backward from 1 and 3.
    assert messages(0, "send") == messages(1, "receive") == sorted(2 * forward + backward)
    assert messages(1, "send") == messages(0, "receive") == sorted(forward + 2 * backward)
