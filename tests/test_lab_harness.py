"""lab/harness.py and lab/harness_model.py: a checkpoint gets the scores in lm-evaluation-harness
that its exported weights get there, and that iqeval.py gives it. No task is downloaded."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import error, few, save_model, seeds, wild
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("lm_eval")  # optional for users; .ci/run installs it, and accelerate
import datasets
import lm_eval.evaluator
import lm_eval.tasks.manager
from lm_eval._cli import HarnessCLI
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from published import flm_logits, read_folder
from test_iqeval_scoring import tiny_checkpoint
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

import console
import iqeval
from flm import FLM, FLMConfig, preset
from iqeval import TASKS
from lab import harness, publish
from lab.harness_model import HarnessModel

SIZES = dict(vocab_size=257, max_seq_len=48)
TELE = preset("tele-demo").replace(n_layers=2, d_model=16, n_heads=2, head_dim=8, d_ff=24, **SIZES)
TELE = TELE.replace(mup_base_width=8)
XPOS = FLMConfig(1, 4, 1, head_dim=4, d_ff=12, mup_base_width=4, **SIZES)
BUILT_IN = Path(lm_eval.tasks.manager.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory):
    """No cache in the user's home, no look at the machine, and a harness with few tasks: to read
    all of its own takes ten seconds."""
    folder = tmp_path_factory.mktemp("tasks")
    for part in ("arc", "hellaswag", "mmlu/default", "truthfulqa"):
        shutil.copytree(BUILT_IN / part, folder / part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda r: r.update(pretty_env_info=""))
        patch.setattr(lm_eval.tasks.manager, "__file__", str(folder / "manager.py"))
        yield


def checkpoint(folder: Path, config: FLMConfig, dtype=torch.float64) -> Path:
    """A checkpoint of random weights whose choices differ from place to place."""
    return save_model(folder / "step-00000001", wild(FLM(config).to(dtype)))


@pytest.fixture(scope="module")
def tele(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("tele"), TELE)


@pytest.fixture(scope="module")
def xpos(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("xpos"), XPOS)


# --------------------------------------------------------------------------------------------------
# The same results as the harness's own class for transformers

LONG = "The road was long. No bird sang. It was late, and the rain fell on the hill. "
CHOICES = [  # one context is longer than the model's, one is empty
    {"question": "Is it so?", "choices": ["yes", "no", "perhaps"], "gold": 1},
    {"question": LONG, "choices": ["a", "b", "语"], "gold": 2},
    {"question": "", "choices": ["one", "two"], "gold": 0},
    {"question": "two\n", "choices": ["x", "xy", "xyz", "x z"], "gold": 3},
]
TEXTS = [{"text": LONG * 2}, {"text": "short"}, {"text": "x" * 48}, {"text": "y" * 49}]
PROMPTS = [{"question": q, "answer": "x"} for q in ("ab", LONG, "def f(", "语言", "Q: 1\nA:")]
KINDS = {
    "tiny_choice": """output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_text": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "tiny_say": """output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {until: %s, max_gen_toks: 14}
metric_list: [{metric: exact_match}]
""",
}


def write_tasks(folder: Path, until: list[str]) -> Path:
    """A folder with a task of each kind that asks something else of a model."""
    folder.mkdir()
    for (name, kind), rows in zip(KINDS.items(), (CHOICES, TEXTS, PROMPTS)):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        shots = "num_fewshot: 1\nfewshot_split: test\n" if name == "tiny_choice" else ""
        files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        kind = kind.replace("%s", json.dumps(until))
        text = f"task: {name}\n{files}test_split: test\n{shots}{kind}metadata: {{version: 1.0}}\n"
        (folder / f"{name}.yaml").write_text(text)
    return folder


def stops_of(model: HarnessModel) -> list[str]:
    """Texts that end what this model says somewhere in the middle; one is of two tokens."""
    prompts = [model.tok_encode(row["question"])[-34:] for row in PROMPTS]
    said = model.say(prompts, 14, [], temperature=0.0)
    plain = [text.replace("\ufffd", "") for text in said]
    return [plain[0][2:4], plain[2][-1:], "\n"]


def results_of(model, folder: Path) -> dict:
    manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=list(KINDS), task_manager=manager)


def assert_same(ours: dict, theirs: dict):
    """The same answers to every request, the same metrics."""
    for name in KINDS:
        rows = zip(ours["samples"][name], theirs["samples"][name], strict=True)
        for mine, other in rows:
            assert mine["arguments"] == other["arguments"]
            for (a,), (b,) in zip(mine["resps"], other["resps"], strict=True):
                if name == "tiny_choice":
                    assert a[0] == pytest.approx(b[0], rel=1e-5) and a[1] == b[1]
                else:
                    assert a == (pytest.approx(b, rel=1e-5) if name == "tiny_text" else b)
        for metric, value in theirs["results"][name].items():
            assert ours["results"][name][metric] == (
                pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            )


def test_a_checkpoint_scores_as_its_export_does_in_transformers(tele, tmp_path):
    """Granite of transformers with the exported weights and tokenizer, run by the harness's own
    class: the same log-likelihoods, greedy flags, texts and metrics, whatever the batch."""
    published = publish.save(tele, tmp_path / "granite", "granite")[0].parent
    ours = HarnessModel(tele, batch_size=3)
    stops = stops_of(ours)
    folder = write_tasks(tmp_path / "tasks", stops)
    theirs = results_of(HFLM(pretrained=str(published), device="cpu", batch_size=2), folder)
    found = results_of(ours, folder)
    assert_same(found, theirs)
    assert_same(results_of(HarnessModel(tele, batch_size=1), folder), theirs)
    said = [row["resps"][0][0] for row in found["samples"]["tiny_say"]]
    assert len({len(text) for text in said}) > 1  # some were stopped, some were not
    assert ours.cut["contexts"] and ours.cut["longest"] > TELE.max_seq_len


class Independent(PreTrainedModel, GenerationMixin):
    """FLM-101B's own layout, which transformers does not have, as a model of transformers: row by
    row, without a cache, by the independent model of tests/published.py."""

    def __init__(self, folder: Path):
        values, self.weights_by_name = read_folder(folder)
        shape = dict(num_hidden_layers=1, hidden_size=1, num_attention_heads=1)  # of no cache
        super().__init__(PretrainedConfig(n_positions=values["n_positions"], **shape))
        self.values = values
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.generation_config.eos_token_id = 256

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids, attention_mask=None, **kwargs):
        pads = [0] * len(input_ids)
        if attention_mask is not None:
            pads = (attention_mask == 0).sum(1).tolist()
        logits = torch.zeros(*input_ids.shape, 257, dtype=torch.float64)
        for row, (ids, pad) in enumerate(zip(input_ids, pads)):
            logits[row, pad:] = flm_logits(self.values, self.weights_by_name, ids[pad:])
        return CausalLMOutput(logits=logits)


def test_the_xpos_layout_scores_as_an_independent_model_does(xpos, tmp_path):
    """transformers has no architecture with xPos. So the weights are exported under FLM-101B's own
    names, and an independent model that reads those is what the harness's own class runs."""
    published = publish.save(xpos, tmp_path / "flm", "flm")[0].parent
    tokenizer = PreTrainedTokenizerFast.from_pretrained(published)
    theirs = HFLM(pretrained=Independent(published), tokenizer=tokenizer, batch_size=4)
    ours = HarnessModel(xpos, batch_size=4)
    folder = write_tasks(tmp_path / "tasks", stops_of(ours))
    assert_same(results_of(ours, folder), results_of(theirs, folder))


# --------------------------------------------------------------------------------------------------
# What is asked of a model


def plain_score(model: FLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One forward pass over one row, without a cache; cut at the left as the harness cuts."""
    T = model.config.max_seq_len
    ids = torch.tensor((context + continuation)[-T - 1 :])
    log_p = model(ids[None, :-1])[0].log_softmax(-1)[-len(continuation) :]
    wanted = torch.tensor(continuation)
    score = log_p.gather(-1, wanted[:, None]).sum().item()
    return score, log_p.argmax(-1).equal(wanted)


tokens = st.lists(st.integers(0, 256), min_size=1, max_size=60)
endings = st.lists(st.integers(0, 256), min_size=1, max_size=48)


@few
@given(st.lists(tokens, min_size=1, max_size=3), st.data(), st.integers(1, 4), st.booleans())
def test_batches_and_shared_contexts_change_no_likelihood(xpos, contexts, drawn, size, piecewise):
    """Contexts of any length, some longer than the model's, each with several continuations, in
    any batch, and with the logits computed piece by piece: as one row at a time."""
    pairs = drawn.draw(st.lists(st.tuples(st.sampled_from(contexts), endings), max_size=12))
    model = HarnessModel(xpos, batch_size=size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iqeval, "PIECE", 257 * 5 if piecewise else iqeval.PIECE)
        found = model._loglikelihood_tokens([(("", ""), *pair) for pair in pairs])
    for (score, greedy), pair in zip(found, pairs, strict=True):
        expected = plain_score(model.scored.model, *pair)
        assert (score, greedy) == (pytest.approx(expected[0], rel=1e-5), expected[1])
    cut = [context for context, ending in pairs if len(context) + len(ending) > 49]
    assert model.cut == {"contexts": len(cut), "longest": max(map(len, cut), default=0)}


def ask(kind: str, *arguments) -> Instance:
    return Instance(kind, {}, arguments, 0, metadata=("some_task", 7, 1))


def test_a_text_without_context_follows_the_end_of_a_text(xpos):
    """An empty context, or one of blanks alone, is the end-of-text token; blanks at a context's end
    belong to what follows, by the harness's own rule."""
    model = HarnessModel(xpos)
    pairs = [("", "ab"), (" ", "ab"), ("x ", "ab")]
    found = model.loglikelihood([ask("loglikelihood", *pair) for pair in pairs])
    rows = [([256], list(b"ab")), ([256], list(b" ab")), (list(b"x"), list(b" ab"))]
    expected = [plain_score(model.scored.model, *row)[0] for row in rows]
    assert [score for score, _ in found] == pytest.approx(expected, rel=1e-5)
    assert model.loglikelihood_rolling([ask("loglikelihood_rolling", "")]) == [0.0]


def test_a_greedy_continuation_is_known_as_one(xpos):
    """What generation says is what the harness counts as greedy, and nothing else is."""
    model = HarnessModel(xpos)
    (text,) = model.say([list(b"Q: ")], 6, [], temperature=0.0)
    ids = model.tok_encode(text)
    model.scored.allowed[:] = True
    requests = [(("", ""), list(b"Q: "), row) for row in (ids, ids[:-1] + [ids[-1] ^ 1])]
    if "\ufffd" not in text:
        assert [greedy for _, greedy in model._loglikelihood_tokens(requests)] == [True, False]


def test_what_cannot_be_scored_is_refused(xpos):
    """An empty text, a text longer than the context, settings that are not known here: each is
    named, before anything is computed."""
    model = HarnessModel(xpos)
    text = error(model.loglikelihood, [ask("loglikelihood", "a", "")])
    assert text.startswith("some_task, document 7: a text to be scored is empty")
    text = error(model.loglikelihood, [ask("loglikelihood", "a", "b" * 49)])
    assert "after 'a': the text to be scored has 49 tokens; with 1 to 48" in text
    settings = {"until": [], "num_beams": 4, "max_gen_toks": 48}
    text = error(model.generate_until, [ask("generate_until", "a", settings)])
    assert "num_beams = 4" in text and "48 new tokens" in text and "room for 1 to 47" in text


@few
@given(seeds, st.integers(1, 3))
def test_generation_ends_before_the_first_stop(xpos, seed, size):
    """Whatever the texts that end an answer are made of, and whatever shares the batch, an answer
    is the longer one without them, cut before the first of them."""
    model = HarnessModel(xpos, batch_size=size)
    generator = torch.Generator().manual_seed(seed)
    contexts = ["ab"[i % 2] * (1 + seed % 7 * i) for i in range(4)]
    free = model.say([model.tok_encode(c)[-38:] for c in contexts], 10, [], temperature=0.0)
    at = int(torch.randint(8, (), generator=generator))
    until = [free[0][at : at + 2], free[1][at : at + 1]]
    settings = {"until": until, "max_gen_toks": 10, "do_sample": False}
    said = model.generate_until([ask("generate_until", c, settings) for c in contexts])
    for text, longer in zip(said, free):
        ends = [longer.find(stop) for stop in until if stop and stop in longer]
        assert text == longer[: min(ends)] if ends else text == longer


def test_a_draw_does_not_repeat_in_the_next_batch(xpos):
    """Two draws after one context differ, whether or not they share a batch."""
    settings = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 5.0}
    for size in (1, 2):
        requests = [ask("generate_until", "ab", settings) for _ in range(2)]
        assert len(set(HarnessModel(xpos, batch_size=size).generate_until(requests))) == 2


# --------------------------------------------------------------------------------------------------
# The exported items


@pytest.fixture(scope="module")
def iq(tmp_path_factory):
    """A checkpoint with room for all items, the items, and the folder that they were exported to,
    which was moved since then."""
    folder = tmp_path_factory.mktemp("iq")
    words = ["--out", str(folder / "out"), "--items", "3", "--seed", "5"]
    harness.main(["export", *words])
    (folder / "out").rename(folder / "moved")
    suite = {}
    for name, task in TASKS.items():
        kinds = {"": "symbols", "-words": "words"} if "labels" in task.knobs else {"": None}
        for end, labels in kinds.items():
            suite[name + end] = task.generate(3, 5, **({"labels": labels} if labels else {}))
    return tiny_checkpoint(folder), suite, folder / "moved"


def test_exported_items_score_as_iqeval_scores_them(iq, tmp_path, monkeypatch):
    """Item by item and for every task: the harness puts together iqeval's prompt from instruction,
    shots and query, and the model says the same. Groups have their tasks' means; shots, versions
    and tags are there. The folder was moved, and the command runs elsewhere."""
    checkpoint_, suite, folder = iq
    monkeypatch.chdir(tmp_path)
    words = ["run", str(checkpoint_), "--include-path", str(folder), "--tasks", "iq"]
    harness.main([*words, "--batch-size", "4"])
    name = harness.free_name(checkpoint_, ["iq"]).replace(".json", "")
    (file,) = Path().glob("*.json")  # a name that says checkpoint and tasks, and is free next time
    assert checkpoint_.stem in file.name and name == f"{file.stem}-2"
    report = json.loads(file.read_text())
    expected = iqeval.evaluate(iqeval.CheckpointModel(checkpoint_), suite)
    for name, items in suite.items():
        task = f"iq_{name.replace('-', '_')}"
        config = report["configs"][task]
        shots = len(items[0].shots.examples) if items[0].shots else 0
        assert config["num_fewshot"] == shots == config["metadata"]["num_fewshot"]
        assert report["n-shot"][task] == shots and report["versions"][task] == 1.0
        rows = zip(report["samples"][task], expected[name]["items"], items, strict=True)
        for row, scored, item in rows:
            if item.labels:
                best = max(range(len(item.labels)), key=lambda k: row["filtered_resps"][k][0])
                assert item.labels[best] == scored["said"] and row["acc"] == scored["right"]
            else:
                said = iqeval.said(items[0].task.metric, scored["said"])
                assert row["filtered_resps"][0].replace("[invalid]", "") == said
                assert row["exact_match"] == scored["right"]
    for group, members in report["group_subtasks"].items():
        if group != "iq":
            key = "acc,none" if "acc,none" in report["results"][group] else "exact_match,first"
            scores = [report["results"][member][key] for member in members]
            assert report["results"][group][key] == pytest.approx(sum(scores) / len(scores))


def test_the_harness_builds_the_prompts_of_iqeval(iq, capsys):
    """Whole prompts, for every item; with fewer shots, the first of an item's own; more than there
    are is refused. The harness's own command finds every task, group and tag."""
    _, suite, folder = iq
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    loaded = manager.load(["iq"])["tasks"]
    assert len(loaded) == len(suite)
    for name, items in suite.items():
        task = loaded[f"iq_{name.replace('-', '_')}"]
        shots = task.config.num_fewshot
        for doc, item in zip(task.eval_docs, items, strict=True):
            assert task.fewshot_context(doc, shots) == item.prompt
            if item.labels:
                texts = [request.args[1] for request in task.construct_requests(doc, item.prompt)]
                assert texts == [item.task.gap + label for label in item.labels]
    item = suite["head-tail"][0]
    task = loaded["iq_head_tail"]
    doc = task.eval_docs[0]
    assert item.prompt.startswith(task.fewshot_context(doc, 2)[: -len(doc["prompt"])])
    assert task.fewshot_context(doc, 0) == doc["prompt"]
    assert "an item has 5 examples, not 6" in error(task.fewshot_context, doc, 6)
    names = [*manager.all_groups, *manager.all_tags, *loaded]
    assert {"iq_symbolic", "iq_symbolic_words", "iq_chinese", "iq_english"} <= set(names)
    words = ["lm_eval", "validate", "--tasks", ",".join(names), "--include_path", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        command_line = HarnessCLI()
        command_line.execute(command_line.parse_args())
    assert "All tasks found and valid" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# The command


def command(*words) -> int:
    """The exit code of `python -m lab.harness WORDS`, in this process."""
    return console.exit_code(lambda: harness.main([str(word) for word in words]), "interrupted")


def test_run_writes_a_table_and_json(tele, tmp_path, capsys):
    """Scores with their standard error; every answer; what was cut off; that --limit is a trial."""
    folder, out = write_tasks(tmp_path / "tasks", ["\n"]), tmp_path / "out.json"
    words = ["run", tele.parent, "--tasks", *KINDS, "--include-path", folder, "--out", out]
    assert command(*words, "--limit", 2, "--num-fewshot", 2) == 0
    printed, report = capsys.readouterr().out, json.loads(out.read_text())
    for part in ("tiny_choice", "n-shot", "Stderr", "±", f"every answer is in {out}", "--limit"):
        assert part in printed
    assert f"longer than this model's {TELE.max_seq_len} tokens allow" in printed
    assert report["n-shot"] == dict.fromkeys(KINDS, 2)
    assert {len(rows) for rows in report["samples"].values()} == {2}
    assert report["context"] == TELE.max_seq_len and report["cut"]["contexts"] > 0


def test_run_tells_everything_that_is_wrong_at_once(tele, tmp_path, capsys):
    """Bad numbers and folders together; then unknown tasks with the nearest names and the task
    files that the harness passes over. No traceback: exit code 2."""
    words = ["run", tele, "--limit", "2.5", "--num-fewshot", -1, "--batch-size", 0]
    assert command(*words, "--include-path", tmp_path / "no", "--tasks", "x") == 2
    said = capsys.readouterr().err
    assert all(part in said for part in ("--limit 2.5", "fewshot -1", "size 0", "no such folder"))
    folder = write_tasks(tmp_path / "tasks", ["\n"])
    (folder / "mine.yaml").write_text("task: mine\n  doc_to_text: [")
    words = ["run", tele, "--include-path", folder, "--tasks", "tiny_chioce", "hellaswg"]
    assert command(*words) == 2
    said = capsys.readouterr().err
    assert "no task is called 'tiny_chioce': did you mean tiny_choice" in said
    assert "no task is called 'hellaswg': did you mean hellaswag" in said
    assert "mine.yaml cannot be read: " in said and "Traceback" not in said
    for limit in ("nan", "inf", "0", "-1"):
        assert command("run", tele, "--tasks", "x", f"--limit={limit}") == 2


def test_no_network_is_said_in_a_line(tele, capsys, monkeypatch):
    """A task whose data has to be downloaded, a task without its file, a damaged checkpoint."""

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub\nand so on")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert command("run", tele, "--tasks", "arc_challenge") == 2
    said = capsys.readouterr().err
    assert "the task arc_challenge cannot be loaded: ConnectionError: Couldn't reach" in said
    assert "there is no network" in said and "Traceback" not in said


def test_a_task_without_its_data_is_named(tele, tmp_path, capsys):
    """In a line, with the file."""
    folder = write_tasks(tmp_path / "tasks", ["\n"])
    (folder / "tiny_text.jsonl").unlink()
    words = ["run", tele, "--include-path", folder, "--tasks", "tiny_text"]
    assert command(*words) == 2
    said = capsys.readouterr().err
    assert "the task tiny_text cannot be loaded: FileNotFoundError" in said
    assert "tiny_text.jsonl" in said and "Traceback" not in said


def test_a_damaged_checkpoint_is_told(tmp_path, capsys):
    """As by every command that reads one; and one that is not there, before the list of tasks."""
    damaged = checkpoint(tmp_path, XPOS)
    next(damaged.glob("*.distcp")).write_bytes(b"")
    assert command("run", damaged, "--tasks", "arc_easy") == 2
    assert "cut off or damaged" in capsys.readouterr().err
    assert command("run", tmp_path / "none", "--tasks", "arc_easy") == 2
    assert "no checkpoint at" in capsys.readouterr().err


def test_without_the_harness_a_line_names_the_command(tele, capsys, monkeypatch):
    """lm_eval is optional."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert command("run", tele, "--tasks", "arc_easy") == 2
    assert "pip install lm_eval==0.4.13" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Table 4, with made-up rows in place of what would be downloaded


def made_up(path: str, name: str | None = None, **_) -> dict:
    """A dataset of 30 rows with the fields of the real one."""
    rows = {
        "allenai/ai2_arc": {
            "question": "Which?",
            "choices": {"text": ["one", "two"], "label": ["A", "B"]},
            "answerKey": "B",
        },
        "Rowan/hellaswag": {"ctx_a": "A man", "ctx_b": "runs", "activity_label": "Running"}
        | {"endings": ["far.", "up."], "label": "1"},
        "cais/mmlu": {"question": "2?", "subject": name, "choices": list("abcd"), "answer": 3},
        "truthfulqa/truthful_qa": {
            "question": "Why?",
            "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]},
            "mc2_targets": {"choices": ["a", "b"], "labels": [1, 0]},
        },
    }
    rows = datasets.Dataset.from_list([rows[path] | {"n": i} for i in range(30)])
    return dict.fromkeys(("train", "validation", "test", "dev"), rows)


def test_table_4_is_one_command(tele, tmp_path, capsys, monkeypatch):
    """The harness's own four tasks with the leaderboard's shots: 57 subjects of MMLU, one mean, and
    the paper's figures beside it."""
    monkeypatch.setattr(datasets, "load_dataset", made_up)
    out = tmp_path / "out.json"
    assert command("run", tele, "--tasks", "table4", "--limit", 1, "--out", out) == 0
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    subjects = [task for task in report["configs"] if task.startswith("mmlu_")]
    assert len(subjects) == 57 and len(report["configs"]) == 60
    shots = {"arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0}
    shots |= dict.fromkeys(subjects, 5)
    assert {task: report["n-shot"][task] for task in shots} == shots
    lines = printed[printed.index("table 4") :].splitlines()
    mean = sum(float(line.split()[-2]) for line in lines[1:5]) / 4
    assert float(lines[5].split()[1]) == pytest.approx(mean, abs=0.01)
    assert lines[5].split()[2] == "43.94"
