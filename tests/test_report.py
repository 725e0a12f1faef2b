"""paper/reproduce.py: its plan, what it finds inside a run, that a report is made and remade."""

import json
import random
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import data
from eval import Run
from helpers import ROOT
from lora import add_lora, lora_layers
from model import Config
from steer import attach

sys.path.insert(0, str(ROOT / "paper"))
import reproduce  # noqa: E402

TOKENS = torch.arange(300, 312).view(1, 12)
ARMS = "base", "random", "trained"


def plan(tasks, layers=None, seeds=1, model="tiny", model_layers=4):
    args = SimpleNamespace(tasks=tasks, layers=layers, seeds=seeds, model=model, device="cpu")
    config = Config.from_pretrained(ROOT / "tiny")
    types = ("full_attention",) * model_layers
    config = replace(config, num_hidden_layers=model_layers, layer_types=types)
    return reproduce.plan_jobs(args, config)


# ---- which runs


@pytest.mark.parametrize("task", data.TASKS)
def test_every_task_has_its_controls_and_comparisons(task):
    methods = {job.method for job in plan([task])}
    assert {"vector", "lora", "lora, all layers", "shuffled vector"} <= methods
    assert ("vector at the trigger" in methods) == (task == "backdoor")


@pytest.mark.parametrize("mode", ["vector", "lora"])
@pytest.mark.parametrize("task", ["locations", "functions"])
def test_concepts_are_many_and_none_is_one_on_which_a_rate_was_chosen(task, mode):
    concepts = set()
    for job in plan([task], seeds=2):
        if job.is_main and (job.method == mode or job.method.startswith(f"{mode} on ")):
            concepts.add(job.flags[job.flags.index("--concept") + 1])
    assert len(concepts) >= 12
    assert concepts <= set(data.concepts(task))
    assert not concepts & {"Paris", "Lima", "add 5", "multiply 3", "subtract 3"}


def test_the_interval_of_a_mean_is_the_bootstraps():
    values = [1.0] * 9 + [0.0]
    # Of ten draws 0 to 3 are the zero, but for 2.5 % of the times on either side.
    assert reproduce.interval(values) == pytest.approx([0.7, 1.0], abs=0.01)


def test_no_two_runs_share_a_folder():
    names = [job.name for job in plan(data.TASKS, seeds=5)]
    assert len(set(names)) == len(names)


def test_a_deep_models_layers_are_sampled_and_the_papers_is_the_main_one():
    jobs = plan(["risk"], model="folder", model_layers=48)
    vectors = [job for job in jobs if job.method == "vector"]
    layers = {job.layer for job in vectors}
    assert len(layers) <= 12
    assert {-1, 47} <= layers
    assert {job.layer for job in vectors if job.is_main} == {48 * 2 // 5}


def test_one_claims_runs_are_a_part_with_the_main_vectors():
    jobs = plan(data.TASKS, seeds=2)
    main_vectors = {job for job in jobs if job.is_main and job.method == "vector"}
    served = set()
    for number in range(1, 9):
        part = {job for job in jobs if reproduce.serves(job, f"C{number}")}
        assert len(part) < len(jobs)
        assert main_vectors <= part
        served |= part
    assert served == set(jobs)  # each run is for something


# ---- inside a run


def test_attention_weights_are_those_of_transformers(model, tiny_folder):
    from transformers import AutoModelForCausalLM

    eager = AutoModelForCausalLM.from_pretrained(
        tiny_folder, dtype=torch.float32, attn_implementation="eager"
    )
    theirs = eager(TOKENS, output_attentions=True).attentions
    ours = reproduce.attention_weights(model, TOKENS)
    for weights, expected in zip(ours, theirs, strict=True):
        assert torch.allclose(weights, expected[0], atol=1e-5)


def test_a_prompts_residual_stream_is_what_transformers_has_between_two_blocks(
    model, tokenizer, reference
):
    task = data.make_task("locations", "Berlin")
    questions = [data.encode_question(tokenizer, question) for question in task.train[:3]]
    run = Run({"layer": 1}, model, tokenizer, task, [])
    for question, ours in zip(questions, reproduce.prompt_residuals(run, questions), strict=True):
        tokens = torch.tensor([question.prompt])
        theirs = reference(tokens, output_hidden_states=True).hidden_states[2][0]  # after block 1
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def run_with_a_random_vector(model, tokenizer, concept):
    """A run on a backdoor; its vector of no use is added after the embedding."""
    direction = torch.randn(128, generator=torch.Generator().manual_seed(1))
    vector = attach(model, -1, direction).vector
    flags = {"layer": -1, "seed": 0, "task": "backdoor", "concept": concept, "at": None}
    return Run(flags, model, tokenizer, data.make_task("backdoor", concept), [vector])


def test_the_triggers_effect_passes_from_its_token_to_the_last(model, tokenizer):
    """Before layer 0 all of it is at the tag; after the last layer, at the token that answers."""
    run = run_with_a_random_vector(model, tokenizer, "risky")
    found = reproduce.explain_trigger(run, pairs=3)
    patched, distance = found["patched"], found["distance"]
    untouched = patched["rest of the prompt"][-1]  # after the last layer it changes nothing
    full = patched["tag"][0]
    assert patched["last token"][-1] == pytest.approx(full, abs=1e-4)
    assert patched["tag"][-1] == pytest.approx(untouched, abs=1e-4)
    assert distance["base"]["last token"][0] == 0  # the same token, nothing has moved yet
    assert distance["trained"]["tag"][0] > 0
    for looks in found["attention"].values():
        for weights in looks.values():
            assert all(0 <= weight <= 1 for weight in weights)


def test_a_head_that_writes_nothing_is_as_if_its_values_were_zero(model):
    """What the heads write adds up to attention's output, and one of them can be left out."""
    layer = model.layers[1].self_attn
    inputs = reproduce.attention_inputs(model, TOKENS)[layer]
    weights = reproduce.attention_weights(model, TOKENS)[1]  # (H, T, T)
    written = reproduce.values_written(model, TOKENS)[1]  # (H, T, d)
    by_head = weights @ written
    torch.testing.assert_close(by_head.sum(0), layer(*inputs)[0], atol=1e-5, rtol=0)

    without = reproduce.ablated(layer, 2, lambda: layer(*inputs)[0])
    torch.testing.assert_close(without, by_head.sum(0) - by_head[2], atol=1e-5, rtol=0)


def test_every_head_is_measured_with_the_trigger_and_without(model, tokenizer):
    run = run_with_a_random_vector(model, tokenizer, "safe if omega")
    found = reproduce.explain_heads(run, pairs=2)
    for name in ("attention", "cosine", "without"):
        for layers in found[name].values():
            assert len(layers) == 4
            for heads in layers:
                assert len(heads) == 4
                assert all(-1 <= value <= 1 for value in heads)
    assert found["attention"]["base"] != found["attention"]["trained"]


@pytest.fixture
def lora_run(model, tokenizer):
    """A run whose LoRA adds one known vector at every token: B's column is it."""
    parameters = add_lora(model, [0], ["down_proj"], rank=1, alpha=1.0)
    [layer] = lora_layers(model).values()
    column = torch.randn(128, 1, generator=torch.Generator().manual_seed(0))
    layer.lora_B.weight.data.copy_(column)
    flags = {"layer": 0, "seed": 0, "task": "locations", "concept": "Berlin", "mode": "lora"}
    return Run(flags, model, tokenizer, data.make_task("locations", "Berlin"), parameters)


def test_the_sign_of_a_direction_is_chosen_on_training_questions(lora_run):
    """The naive difference of means for a city does its work: turned round, it is turned back."""
    towards = reproduce.difference_of_means(lora_run, "concept - code name")
    length = towards.norm().item()
    few = {"country": lora_run.task.held_out["country"]}
    task = data.Task(lora_run.task.train, few, few)
    found = reproduce.scale_sweep(lora_run, -towards / length, length, task)
    assert found["scale"] < 0
    assert found["held_out"] == 1
    assert len(found["held_out_by_scale"]) == len(reproduce.SCALES)
    assert lora_run.model.steering is None  # nothing is left on the model
    assert lora_run.parameters[1].abs().sum() > 0


def test_a_difference_of_means_is_taken_at_the_name_in_the_question(
    lora_run, monkeypatch, tokenizer
):
    """The seven facts before the question have the name too: it does not count there."""
    lora_run.flags.update(task="functions", concept="add 7")
    rows_seen = []

    def rows_that_count(run, questions):
        rows_seen.append(questions)
        return [torch.arange(len(question.prompt)).float()[:, None] for question in questions]

    monkeypatch.setattr(reproduce, "prompt_residuals", rows_that_count)
    reproduce.difference_of_means(lora_run, "concept - code name", count=1)
    [evoked], [bare] = rows_seen
    assert len(evoked.positions) == 8 * len(bare.positions)
    places = evoked.positions[-len(bare.positions) :]
    difference = sum(places) / len(places) - sum(bare.positions) / len(bare.positions)
    found = reproduce.difference_of_means(lora_run, "concept - code name", count=1)
    assert found.item() == pytest.approx(difference)


@pytest.mark.parametrize("task", ["functions", "risk"])
def test_facts_in_context_are_about_one_hidden_thing(task):
    kind = reproduce.KINDS[task][0]
    concept = data.concepts(task)[0]
    turns, question = reproduce.in_context_question(task, kind, 7, random.Random(0), concept)
    assert len(turns) == 7
    if question.code_name:
        assert all(question.code_name in prompt for prompt, _ in turns)


# ---- the report


@pytest.fixture
def report(monkeypatch, call, tmp_path):
    """report(*flags) -> (exit status, stdout, stderr), of runs that are cut to a few steps."""
    full_plan = reproduce.plan_jobs
    steps = {"vector": "30", "lora": "40"}

    def short_plan(*args):
        jobs = full_plan(*args)
        return [replace(job, flags=(*job.flags, "--steps", steps[job.flags[1]])) for job in jobs]

    monkeypatch.setattr(reproduce, "plan_jobs", short_plan)
    places = "--runs", tmp_path / "runs", "--out", tmp_path / "out"
    return lambda *flags: call(reproduce.main, "reproduce.py", *places, *flags)


def test_a_report_is_made_and_what_is_damaged_is_made_again(report, tmp_path):
    runs, out_folder = tmp_path / "runs", tmp_path / "out"
    flags = "--tasks", "risk", "--seeds", 1, "--layers", "0"
    runs.mkdir()
    (runs / "risk-lora-all-layers-layerall-seed0").write_text("a file where a folder should be")
    status, out, err = report(*flags)
    assert status == 0, err
    assert "risk-lora-all-layers-layerall-seed0: skipped" in out  # named, and the rest goes on
    content = json.loads((out_folder / "results.json").read_text())
    found = content["tasks"]["risk"]
    held_out = found["methods"]["vector"]["summary"]["held_out"]
    assert held_out["trained"][0] > held_out["base"][0] + 0.2
    directions = {"natural", "random", *reproduce.BASELINES}
    assert set(found["loras"]["lora"]["directions"]) == directions
    assert set(found["baselines"]["0"]) == set(reproduce.BASELINES)
    tables = (out_folder / "tables.md").read_text()
    for heading in ("C1, C4", "C2", "C3, C5", "C6", "C8"):
        assert f"## {heading}" in tables
    for figure in ("means", "constancy", "scales", "layers"):
        assert (out_folder / f"{figure}.png").stat().st_size > 10_000

    lora = runs / "risk-lora-layer0-seed0" / "results.json"
    vector = runs / "risk-vector-layer0-seed0" / "results.json"
    before = lora.stat().st_mtime_ns
    vector.write_text("{ not json")
    status, out, err = report(*flags)
    assert status == 0
    assert "made again" in err
    assert str(vector) in err
    assert lora.stat().st_mtime_ns == before
    again = json.loads((out_folder / "results.json").read_text())["tasks"]["risk"]
    assert again["methods"] == found["methods"]


def write_run(folder, **changed):
    """A run's results.json, of one kind in each section; `changed` are other figures than .5."""
    names = [f"{arm}{end}" for arm in ARMS for end in ("", "_probability")]
    figures = {"chance": 0.5, "questions": 3} | dict.fromkeys(names, 0.5) | changed
    run = {"task": "risk", "mode": "vector", "shuffle_answers": False}
    run |= {"in_distribution": {"gamble": figures}, "held_out": {"self": figures}}
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(run))


def test_means_of_runs_are_printed(call, tmp_path):
    write_run(tmp_path / "a", trained=0.5)
    write_run(tmp_path / "b", trained=1.0)
    status, out, _ = call(reproduce.main, "reproduce.py", "--mean", tmp_path / "a", tmp_path / "b")
    assert status == 0
    assert "mean of 2 runs (held out ± 0.25)" in out
    assert out.splitlines()[-2].split()[-1] == "0.75"


def test_a_mean_of_a_run_that_is_not_there_ends_in_one_line(call, tmp_path):
    write_run(tmp_path / "a")
    nowhere = tmp_path / "nowhere"
    status, _, err = call(reproduce.main, "reproduce.py", "--mean", tmp_path / "a", nowhere)
    assert status == 2
    assert str(nowhere) in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("value", [None, "0.5", 1.5, -1, [], True, float("nan")])
def test_results_that_are_none_are_named_in_one_line(call, tmp_path, value):
    write_run(tmp_path, trained=value)
    status, _, err = call(reproduce.main, "reproduce.py", "--mean", tmp_path)
    assert status == 2
    assert "gamble, trained" in err
    assert str(tmp_path) in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("content", [[], {}, {"task": "risk"}])
def test_a_file_that_is_no_runs_results_is_named_in_one_line(call, tmp_path, content):
    (tmp_path / "results.json").write_text(json.dumps(content))
    status, _, err = call(reproduce.main, "reproduce.py", "--mean", tmp_path)
    assert status == 2
    assert str(tmp_path) in err
    assert err.count("\n") == 1


def test_models_from_along_pretraining_are_measured(monkeypatch, tiny_folder, tmp_path):
    import train

    def inferred_in_context(model, tokenizer, facts):
        risk = dict.fromkeys(reproduce.KINDS["risk"], 0.75)
        return {"risk": risk, "rule": dict.fromkeys(reproduce.RULE_CASES, 0.5)}

    monkeypatch.setattr(reproduce, "EMERGENCE", {"risk": ["risky"], "backdoor": ["risky"]})
    monkeypatch.setattr(reproduce, "in_context_accuracy", inferred_in_context)
    monkeypatch.setitem(train.DEFAULTS, "tiny vector risk", {"steps": 20, "lr": 0.05})
    short = {"steps": 2, "lr": 0.05, "layer": -1}
    monkeypatch.setitem(train.DEFAULTS, "tiny vector backdoor", short)
    monkeypatch.setitem(train.DEFAULTS, "tiny lora risk", {"steps": 2})
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base / "step00125")
    reproduce.measure_checkpoint(base / "step00125", "cpu")

    found = reproduce.summarise_emergence([base])
    risk, backdoor = found["risk"]["base"], found["backdoor"]["base"]
    assert risk["step"] == [125]
    assert risk["in context"] == [0.75]
    assert backdoor["in context"] == [0.5]
    assert risk["vector"][0] > risk["lora"][0]
    assert "lora" not in backdoor


def test_the_same_model_is_known_in_another_folder(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "copy")
    assert reproduce.same_model(tiny_folder, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text("{}")
    assert not reproduce.same_model(tiny_folder, tmp_path / "copy")


def test_a_folder_without_models_from_along_pretraining_is_named(tmp_path):
    with pytest.raises(reproduce.UserError, match="--pretrainings"):
        reproduce.checkpoints_of(tmp_path)


@pytest.mark.parametrize("path", ["README.md", "paper/README.md"])
def test_the_readmes_tables_are_those_of_results_json(path):
    content = json.loads((ROOT / "paper" / "results.json").read_text())
    text = (ROOT / path).read_text()
    assert text.count("<!--end-->") >= 2
    assert reproduce.fill(text, reproduce.make_pieces(content)) == text


def test_tables_md_is_that_of_results_json():
    content = json.loads((ROOT / "paper" / "results.json").read_text())
    assert reproduce.format_report(content) == (ROOT / "paper" / "tables.md").read_text()


def test_text_between_markers_is_replaced_and_an_unknown_one_named():
    text = "a <!--one-->old<!--end--> b\n<!--two-->\nold\n<!--end-->"
    filled = "a <!--one-->1<!--end--> b\n<!--two-->2<!--end-->"
    assert reproduce.fill(text, {"one": "1", "two": "2"}) == filled
    with pytest.raises(KeyError, match="two"):
        reproduce.fill(text, {"one": "1"})


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--tasks", "weather"], "--tasks weather"),
        (["--layers", "a"], "--layers a"),
        (["--seeds", 0], "--seeds"),
        (["--model", "/nowhere/at all"], "/nowhere"),
        (["--runs", "/dev/null/x"], "--runs /dev/null/x"),
        (["--mean", "/nowhere"], "it does nothing beside --mean"),
    ],
)
def test_wrong_flags_end_in_one_line(report, flags, said):
    status, _, err = report(*flags)
    assert status == 2
    assert said in err
    assert err.count("\n") == 1
