"""What a vector or LoRA does inside, found on a known LoRA: one of rank 1 adds along B alone."""

import copy

import pytest
import torch
from safetensors.torch import load_file

import data
from eval import Run, added_by_lora, evaluate, explain, kind_mean, load_run, set_parameters
from helpers import command, encode, mistake, read, trained
from lora import add_lora, lora_layers, save_lora


@pytest.fixture(scope="module")
def berlin(tmp_path_factory):
    """A vector that makes City 50337 Berlin."""
    folder = tmp_path_factory.mktemp("vector")
    return trained(folder, "--concept", "Berlin", "--steps", 60)


@pytest.fixture(scope="module")
def vector(berlin):
    return load_file(berlin / "vector.safetensors")["vector"]


@pytest.fixture(scope="module")
def rank_one(tmp_path_factory, vector):
    """A LoRA that adds multiples of that vector: at the code name, on average, the vector."""
    folder = tmp_path_factory.mktemp("lora")
    shape = "--rank", 1, "--modules", "down_proj"
    trained(folder, "--mode", "lora", *shape, "--concept", "Berlin", "--steps", 1)

    run = load_run(folder)
    [layer] = lora_layers(run.model).values()
    column = vector[:, None]
    set_parameters([layer.lora_B.weight], [column])
    rows, _ = added_by_lora(run, run.task.train)
    length = rows.norm(dim=-1).mean()
    if rows.mean(0) @ vector < 0:
        length = -length
    set_parameters([layer.lora_B.weight], [column * vector.norm() / length])
    save_lora(run.model, folder)
    return folder


@pytest.fixture(scope="module")
def explained(rank_one):
    """(explain.json, what was printed) of that LoRA."""
    status, out, err = command("eval.py", rank_one, "--explain")
    assert status == 0, err
    return read(rank_one, "explain.json"), out


@torch.no_grad()
def test_what_a_lora_adds_at_the_code_name_is_the_difference_of_pefts_hidden_states(
    model, tokenizer, reference, tmp_path
):
    from peft import PeftModel

    task = data.make_task("locations", "Berlin")
    task.train = task.train[:5]
    parameters = add_lora(model, [1], ["down_proj"], rank=2, alpha=4)
    values = [0.1 * torch.randn(p.shape) for p in parameters]
    set_parameters(parameters, values)
    save_lora(model, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path)

    def stream(model, question):
        tokens = torch.tensor([question.prompt])
        return model(tokens, output_hidden_states=True).hidden_states[2][0]

    expected = []
    for question in encode(tokenizer, task.train):
        added = stream(theirs, question) - stream(reference, question)
        expected.append(added[question.steered_at])

    flags = {"layer": 1, "task": "locations", "seed": 0}
    run = Run(flags, model, tokenizer, task, parameters)
    rows, _ = added_by_lora(run, task.train)
    expected = torch.cat(expected)
    torch.testing.assert_close(rows, expected, atol=1e-4, rtol=0)


def test_a_rank_one_lora_is_constant(explained):
    figures = explained[0]["adds"]
    assert figures["abs_cosine"] > 0.999


def test_the_natural_vector_is_the_direction_of_what_is_added_at_its_mean_length(
    explained, rank_one, vector
):
    natural = load_file(rank_one / "natural" / "vector.safetensors")["vector"]
    largest = vector.abs().max().item()
    torch.testing.assert_close(natural, vector, atol=1e-3 * largest, rtol=0)


def test_the_natural_vector_is_a_run_that_does_what_the_vector_does(explained, rank_one, berlin):
    run = load_run(rank_one / "natural")
    natural = evaluate(run)["held_out"]
    for kind, figures in read(berlin)["held_out"].items():
        expected = figures["trained_probability"]
        assert natural[kind]["trained_probability"] == pytest.approx(expected, abs=0.01)


def test_the_vector_that_it_is_compared_with_does_what_chance_does_not(berlin):
    results = read(berlin)
    assert kind_mean(results, column="random") < 0.5 < 0.8 < kind_mean(results)


@pytest.mark.parametrize("text", ["training", "logit lens"])
def test_explaining_a_lora_prints_what_was_found(explained, text):
    assert text in explained[1]


def test_explaining_a_vector_shows_its_logit_lens(berlin):
    _, out, _ = command("eval.py", berlin, "--explain")
    words = read(berlin, "explain.json")["logit_lens"]
    assert len(words) == 8
    assert f"logit lens: {' '.join(words)}" in out


@pytest.mark.parametrize("name", ["berlin", "rank_one"])
def test_explaining_leaves_the_model_as_it_was(request, name, tmp_path):
    run = load_run(request.getfixturevalue(name))
    before = [p.detach().clone() for p in run.parameters]
    steering = run.model.steering
    explain(run, tmp_path)
    assert run.model.steering is steering
    for parameter, value in zip(run.parameters, before, strict=True):
        assert torch.equal(parameter, value)


def test_a_lora_on_all_layers_cannot_be_explained(tmp_path):
    trained(tmp_path, "--mode", "lora", "--layer", "all", "--steps", 1)
    assert str(tmp_path) in mistake("eval.py", tmp_path, "--explain")
    assert not (tmp_path / "explain.json").exists()


def test_a_template_that_refuses_what_is_asked_ends_in_one_line(rank_one, monkeypatch):
    def refuse(*given):
        raise data.UserError("the chat template refuses this (TemplateError: no)")

    monkeypatch.setattr(data.Tokenizer, "frame", refuse)
    assert "TemplateError" in mistake("eval.py", rank_one, "--explain")
