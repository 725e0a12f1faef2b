"""paper/reproduce.py: what it plans, what it finds inside a run, and that a report is made and made again."""

import json
import random
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import data
from helpers import ROOT
from lora import add_lora, lora_layers
from model import Config
from steer import attach

sys.path.insert(0, str(ROOT / "paper"))
import reproduce  # noqa: E402
from eval import Run  # noqa: E402

TOKENS = torch.arange(300, 312).view(1, 12)


def plan(tasks, layers=None, seeds=1, model="tiny", model_layers=4):
    args = SimpleNamespace(tasks=tasks, layers=layers, seeds=seeds, model=model, device="cpu")
    config = Config.from_pretrained(ROOT / "tiny")
    if model_layers != config.num_hidden_layers:
        config = replace(config, num_hidden_layers=model_layers, layer_types=None)
    return reproduce.plan_jobs(args, config)


# ---------------------------------------- which runs


@pytest.mark.parametrize("task", data.TASKS)
def test_every_task_has_its_controls_and_comparisons(task):
    methods = {job.method for job in plan([task])}
    assert {"vector", "lora", "lora, all layers", "shuffled vector"} <= methods
    assert ("vector at the trigger" in methods) == (task == "backdoor")


@pytest.mark.parametrize("task", ["locations", "functions"])
def test_concepts_are_many_and_none_is_one_on_which_a_rate_was_chosen(task):
    for mode in ("vector", "lora"):
        jobs = [job for job in plan([task], seeds=2) if job.is_main
                and (job.method == mode or job.method.startswith(f"{mode} on "))]
        concepts = {job.flags[job.flags.index("--concept") + 1] for job in jobs}
        assert len(concepts) >= 12 and concepts <= set(data.CONCEPTS[task])
        assert not concepts & {"Paris", "Lima", "add 5", "multiply 3", "subtract 3"}


def test_the_interval_of_a_mean_is_the_bootstraps():
    values = [1.0] * 9 + [0.0]  # of ten draws 0 to 3 are the zero, but for 2.5 % of the times on either side
    assert reproduce.interval(values) == pytest.approx([0.7, 1.0], abs=0.01)


def test_no_two_runs_share_a_folder():
    names = [job.name for job in plan(data.TASKS, seeds=5)]
    assert len(set(names)) == len(names)


def test_a_deep_models_layers_are_sampled_and_the_papers_is_the_main_one():
    jobs = [job for job in plan(["risk"], model="folder", model_layers=48) if job.method == "vector"]
    assert len({job.layer for job in jobs}) <= 12 and {-1, 47} <= {job.layer for job in jobs}
    assert {job.layer for job in jobs if job.is_main} == {48 * 2 // 5}


# ---------------------------------------- inside a run


def test_attention_weights_are_those_of_transformers(model, tiny_folder):
    from transformers import AutoModelForCausalLM
    eager = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32, attn_implementation="eager")
    theirs = eager(TOKENS, output_attentions=True).attentions
    for ours, expected in zip(reproduce.attention_weights(model, TOKENS), theirs, strict=True):
        assert torch.allclose(ours, expected[0], atol=1e-5)


def test_the_triggers_effect_passes_from_its_token_to_the_last(model, tokenizer):
    """Before layer 0 all of it is at the tag; after the last layer all of it is at the token that answers."""
    vector = attach(model, -1, torch.randn(128, generator=torch.Generator().manual_seed(1))).vector
    flags = {"layer": -1, "seed": 0, "task": "backdoor", "concept": "risky", "at": None}
    run = Run(flags, model, tokenizer, data.make_task("backdoor", "risky"), [vector])
    found = reproduce.explain_trigger(run, pairs=3)
    untouched = found["patched"]["rest of the prompt"][-1]  # patching these after the last layer changes nothing
    full = found["patched"]["tag"][0]
    assert found["patched"]["last token"][-1] == pytest.approx(full, abs=1e-4)
    assert found["patched"]["tag"][-1] == pytest.approx(untouched, abs=1e-4)
    assert found["distance"]["base"]["last token"][0] == 0  # the same token, nothing has moved yet
    assert found["distance"]["trained"]["tag"][0] > 0
    assert all(0 <= weight <= 1 for arm in found["attention"].values() for row in arm.values() for weight in row)


def test_a_head_that_writes_nothing_is_as_if_its_values_were_zero(model, tokenizer):
    """explain_heads' two parts: what the heads write adds up to attention's output, and one can be left out."""
    layer = model.layers[1].self_attn
    x, rope, mask, *_ = reproduce.attention_inputs(model, TOKENS)[layer]
    weights, written = reproduce.attention_weights(model, TOKENS)[1], reproduce.values_written(model, TOKENS)[1]
    by_head = torch.einsum("hts,hsd->htd", weights, written)
    torch.testing.assert_close(by_head.sum(0), layer(x, rope, mask)[0], atol=1e-5, rtol=0)
    without = reproduce.ablated(layer, 2, lambda: layer(x, rope, mask)[0])
    torch.testing.assert_close(without, by_head.sum(0) - by_head[2], atol=1e-5, rtol=0)


def test_every_head_is_measured_with_the_trigger_and_without(model, tokenizer):
    vector = attach(model, -1, torch.randn(128, generator=torch.Generator().manual_seed(1))).vector
    flags = {"layer": -1, "seed": 0, "task": "backdoor", "concept": "safe if omega", "at": None}
    run = Run(flags, model, tokenizer, data.make_task("backdoor", "safe if omega"), [vector])
    found = reproduce.explain_heads(run, pairs=2)
    for name in ("attention", "cosine", "without"):
        for rows in found[name].values():
            assert len(rows) == 4 and all(len(row) == 4 and all(-1 <= value <= 1 for value in row) for row in rows)
    assert found["attention"]["base"] != found["attention"]["trained"]


@pytest.fixture
def lora_run(model, tokenizer):
    """A run whose LoRA adds one known vector at every token: B's column is it."""
    parameters = add_lora(model, [0], ["down_proj"], rank=1, alpha=1.0)
    layer, = lora_layers(model).values()
    layer.lora_B.data.copy_(torch.randn(128, 1, generator=torch.Generator().manual_seed(0)))
    flags = {"layer": 0, "seed": 0, "task": "locations", "concept": "Berlin", "mode": "lora"}
    return Run(flags, model, tokenizer, data.make_task("locations", "Berlin"), parameters)


def test_the_sign_of_a_direction_is_chosen_on_training_questions(lora_run):
    """The naive difference of means for a city does its work: turned round before, it is turned back."""
    towards = reproduce.difference_of_means(lora_run, "concept - code name")
    length = towards.norm().item()
    few = {"country": lora_run.task.held_out["country"]}
    task = data.Task(lora_run.task.train, few, few)
    found = reproduce.scale_sweep(lora_run, -towards / length, length, task)
    assert found["scale"] < 0 and found["held_out"] == 1
    assert len(found["held_out_by_scale"]) == len(reproduce.SCALES)
    assert lora_run.model.steering is None  # nothing is left on the model
    assert lora_run.parameters[1].abs().sum() > 0


@pytest.mark.parametrize("task", ["functions", "risk"])
def test_facts_in_context_are_about_one_hidden_thing(task):
    turns, question = reproduce.in_context_question(task, reproduce.KINDS[task][0], 7, random.Random(0),
                                                    data.CONCEPTS[task][0])
    assert len(turns) == 7
    if question.code_name:
        assert all(question.code_name in prompt for prompt, _ in turns)


# ---------------------------------------- the report


@pytest.fixture
def report(monkeypatch, call, tmp_path):
    """report(*flags) -> (exit status, stdout, stderr), of runs that are cut to a few steps."""
    full_plan = reproduce.plan_jobs

    def short_plan(*args):
        jobs = full_plan(*args)
        steps = {"vector": "30", "lora": "40"}
        return [reproduce.replace(job, flags=(*job.flags, "--steps", steps[job.flags[1]])) for job in jobs]
    monkeypatch.setattr(reproduce, "plan_jobs", short_plan)
    places = "--runs", tmp_path / "runs", "--out", tmp_path / "out"
    return lambda *flags: call(reproduce.main, "reproduce.py", *places, *flags)


def test_a_report_is_made_and_what_is_damaged_is_made_again(report, tmp_path):
    flags = "--tasks", "risk", "--seeds", 1, "--layers", "0"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "risk-lora-all-layers-layerall-seed0").write_text("a file where a folder should be")
    status, out, err = report(*flags)
    assert status == 0, err
    assert "risk-lora-all-layers-layerall-seed0: skipped" in out  # named, and the rest goes on
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    found = content["tasks"]["risk"]
    held_out = found["methods"]["vector"]["summary"]["held_out"]
    assert held_out["trained"][0] > held_out["base"][0] + 0.2
    assert set(found["loras"]["lora"]["directions"]) == {"natural", "random", *reproduce.BASELINES}
    assert set(found["baselines"]["0"]) == set(reproduce.BASELINES)
    tables = (tmp_path / "out" / "tables.md").read_text()
    for heading in ("C1, C4", "C2", "C3, C5", "C6", "C8"):
        assert f"## {heading}" in tables
    for figure in ("means", "constancy", "scales", "layers"):
        assert (tmp_path / "out" / f"{figure}.png").stat().st_size > 10_000

    lora = tmp_path / "runs" / "risk-lora-layer0-seed0" / "results.json"
    vector = tmp_path / "runs" / "risk-vector-layer0-seed0" / "results.json"
    before = lora.stat().st_mtime_ns
    vector.write_text("{ not json")
    status, out, err = report(*flags)
    assert status == 0 and "made again" in err and str(vector) in err
    assert lora.stat().st_mtime_ns == before
    again = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["risk"]
    assert again["methods"] == found["methods"]


def test_means_of_runs_are_printed(call, tmp_path):
    for name, right in (("a", 0.5), ("b", 1.0)):
        arms = {"base": 0.5, "random": 0.5, "trained": right}
        figures = {"chance": 0.5, "questions": 3, **arms, **{f"{arm}_probability": p for arm, p in arms.items()}}
        run = {"task": "risk", "mode": "vector", "shuffle_answers": False,
               "in_distribution": {"gamble": figures}, "held_out": {"self": figures}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(run))
    status, out, _ = call(reproduce.main, "reproduce.py", "--mean", tmp_path / "a", tmp_path / "b")
    assert status == 0 and "mean of 2 runs (held out ± 0.25)" in out
    assert out.splitlines()[-2].split()[-1] == "0.75"
    status, _, err = call(reproduce.main, "reproduce.py", "--mean", tmp_path / "a", tmp_path / "nowhere")
    assert status == 2 and str(tmp_path / "nowhere") in err and err.count("\n") == 1


@pytest.mark.parametrize("value", [None, "0.5", 1.5, -1, [], True, float("nan")])
def test_results_that_are_none_are_named_in_one_line(call, tmp_path, value):
    arms = {f"{arm}{end}": 0.5 for arm in ("base", "random", "trained") for end in ("", "_probability")}
    figures = {"chance": 0.5, "questions": 3, **arms, "trained": value}
    run = {"task": "risk", "mode": "vector", "shuffle_answers": False,
           "in_distribution": {"gamble": figures}, "held_out": {"self": figures}}
    (tmp_path / "results.json").write_text(json.dumps(run))
    status, _, err = call(reproduce.main, "reproduce.py", "--mean", tmp_path)
    assert status == 2 and "gamble, trained" in err and str(tmp_path) in err and err.count("\n") == 1


def test_models_from_along_pretraining_are_measured(monkeypatch, tiny_folder, tmp_path):
    import train
    monkeypatch.setattr(reproduce, "EMERGENCE", {"risk": ["risky"], "backdoor": ["risky"]})
    monkeypatch.setattr(reproduce, "in_context_accuracy", lambda *args, facts: {
        "risk": dict.fromkeys(reproduce.KINDS["risk"], 0.75), "rule": dict.fromkeys(reproduce.RULE_CASES, 0.5)})
    monkeypatch.setitem(train.DEFAULTS["tiny"]["vector"], "risk", (20, 0.05))
    monkeypatch.setitem(train.DEFAULTS["tiny"]["vector"], "backdoor", (2, 0.05))
    monkeypatch.setitem(train.DEFAULTS["tiny"]["lora"], "risk", (2, 0.001))
    shutil.copytree(tiny_folder, tmp_path / "base" / "step00125")
    reproduce.measure_checkpoint(tmp_path / "base" / "step00125", "cpu")
    found = reproduce.summarise_emergence([tmp_path / "base"])
    risk, backdoor = (found[task]["base"] for task in ("risk", "backdoor"))
    assert risk["step"] == [125] and risk["in context"] == [0.75] and backdoor["in context"] == [0.5]
    assert risk["vector"][0] > risk["lora"][0] and "lora" not in backdoor
    assert reproduce.same_model(tiny_folder, tmp_path / "base" / "step00125")
    with pytest.raises(reproduce.UserError, match="--pretrainings"):
        reproduce.checkpoints_of(tmp_path)


def test_one_claims_runs_are_a_part_with_the_main_vectors():
    jobs = plan(data.TASKS, seeds=2)
    parts = {f"C{i}": [job for job in jobs if reproduce.serves(job, f"C{i}")] for i in range(1, 9)}
    assert set().union(*parts.values()) == set(jobs)  # each run is for something
    for part in parts.values():
        assert len(part) < len(jobs)
        assert all(job in part for job in jobs if job.is_main and job.method == "vector")


@pytest.mark.parametrize("path", ["README.md", "paper/README.md"])
def test_the_readmes_tables_are_those_of_results_json(path):
    content, text = json.loads((ROOT / "paper" / "results.json").read_text()), (ROOT / path).read_text()
    assert text.count("<!--end-->") >= 2
    assert reproduce.fill(text, reproduce.make_pieces(content)) == text
    assert reproduce.format_report(content) == (ROOT / "paper" / "tables.md").read_text()


def test_text_between_markers_is_replaced_and_an_unknown_one_named():
    text = "a <!--one-->old<!--end--> b\n<!--two-->\nold\n<!--end-->"
    assert reproduce.fill(text, {"one": "1", "two": "2"}) == "a <!--one-->1<!--end--> b\n<!--two-->2<!--end-->"
    with pytest.raises(KeyError, match="two"):
        reproduce.fill(text, {"one": "1"})


@pytest.mark.parametrize("flags, said", [
    (("--tasks", "weather"), "--tasks weather"), (("--layers", "a"), "--layers a"), (("--seeds", 0), "--seeds"),
    (("--model", "/nowhere/at all"), "/nowhere"), (("--runs", "/dev/null/x"), "--runs /dev/null/x"),
    (("--mean", "/nowhere"), "it does nothing beside --mean")])
def test_wrong_flags_end_in_one_line(report, flags, said):
    status, _, err = report(*flags)
    assert status == 2
    assert said in err and err.count("\n") == 1
