"""What a vector or a LoRA does inside, found on a known LoRA: of rank 1, so that all it adds lies along B."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import data
from eval import Run, constancy, evaluate, explain, kind_mean, load_run, set_parameters, what_lora_adds
from helpers import command, encode, error_line, read, trained
from lora import add_lora, lora_layers, save_lora


@pytest.fixture(scope="module")
def berlin(tmp_path_factory):
    """A vector that makes City 50337 Berlin."""
    return trained(tmp_path_factory.mktemp("vector"), "--concept", "Berlin", "--steps", 60)


@pytest.fixture(scope="module")
def vector(berlin):
    return load_file(berlin / "vector.safetensors")["vector"]


@pytest.fixture(scope="module")
def rank_one(tmp_path_factory, vector):
    """A LoRA on one layer that adds multiples of that vector: at the code name, on average, the vector."""
    flags = "--mode", "lora", "--rank", 1, "--modules", "down_proj", "--concept", "Berlin", "--steps", 1
    folder = trained(tmp_path_factory.mktemp("lora"), *flags)
    run = load_run(folder)
    layer, = lora_layers(run.model).values()
    set_parameters([layer.lora_B], [vector[:, None]])
    rows, _ = what_lora_adds(run)
    length = rows.norm(dim=-1).mean() * (rows.mean(0) @ vector).sign()
    set_parameters([layer.lora_B], [vector[:, None] * vector.norm() / length])
    save_lora(run.model, folder)
    return folder


@pytest.fixture(scope="module")
def explained(rank_one):
    """(explain.json, what was printed) of that LoRA."""
    status, out, _ = command("eval.py", rank_one, "--explain")
    assert status == 0
    return read(rank_one, "explain.json"), out


@torch.no_grad()
def test_what_a_lora_adds_at_the_code_name_is_the_difference_of_pefts_hidden_states(
        model, tokenizer, reference, tmp_path):
    from peft import PeftModel
    task, parameters = data.make_task("locations", "Berlin"), add_lora(model, [1], ["down_proj"], 2, 4)
    set_parameters(parameters, [torch.randn(p.shape) * 0.1 for p in parameters])
    save_lora(model, tmp_path)
    theirs, expected = PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path), []
    task.train = task.train[:5]
    for question in encode(tokenizer, task.train):
        after, before = (some(torch.tensor([question.prompt]), output_hidden_states=True).hidden_states[2][0]
                         for some in (theirs, reference))
        expected.append((after - before)[question.positions])
    flags = {"layer": 1, "task": "locations", "seed": 0}
    rows, _ = what_lora_adds(Run(flags, model, tokenizer, task, parameters))
    in_order = lambda some: some[some[:, 0].argsort()]
    torch.testing.assert_close(in_order(rows), in_order(torch.cat(expected)), atol=1e-4, rtol=0)


def test_constancy_is_of_each_two_rows():
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    pairs = [F.cosine_similarity(a, b, dim=0).item() for i, a in enumerate(rows) for b in rows[:i]]
    found = constancy(rows)
    assert found["cosine"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)
    assert found["abs_cosine"] == pytest.approx(sum(map(abs, pairs)) / len(pairs), abs=1e-5)
    bins = [sum(int(abs(cosine) * 20) == i for cosine in pairs) / len(pairs) for i in range(20)]
    assert found["histogram"] == pytest.approx(bins, abs=1e-5)


def test_the_histogram_counts_a_cosine_that_rounding_makes_more_than_one_too():
    rows = torch.rand(128, generator=torch.Generator().manual_seed(2)) * torch.linspace(-1, 3, 60)[:, None]
    assert constancy(rows)["histogram"] == pytest.approx([0] * 19 + [1], abs=1e-5)


def test_a_rank_one_lora_is_constant_on_training_held_out_and_unrelated_prompts(explained):
    adds = explained[0]["adds"]
    assert adds.keys() == {"training", "held out", "unrelated"}
    assert all(figures["abs_cosine"] > 0.999 and figures["share"] > 0.999 for figures in adds.values())


def test_the_natural_vector_is_the_direction_of_what_is_added_at_its_mean_length(explained, rank_one, vector):
    natural = load_file(rank_one / "natural" / "vector.safetensors")["vector"]
    torch.testing.assert_close(natural, vector, atol=1e-3 * vector.abs().max().item(), rtol=0)


def test_the_natural_vector_is_a_run_that_does_what_the_vector_does(explained, rank_one, berlin):
    assert f"python eval.py {rank_one / 'natural'}" in explained[1]
    alone = evaluate(load_run(rank_one / "natural"))
    for kind, figures in read(berlin)["held_out"].items():
        assert alone["held_out"][kind]["trained_probability"] == pytest.approx(figures["trained_probability"], abs=0.01)
    assert kind_mean(alone, column="random") < 0.5 < 0.8 < kind_mean(read(berlin))


def test_explaining_a_lora_prints_what_fits_on_a_screen(explained):
    assert all(text in explained[1] for text in ("unrelated", "natural", "logit lens, top"))


def test_explaining_a_vector_shows_its_logit_lens(berlin):
    _, out, _ = command("eval.py", berlin, "--explain")
    assert "logit lens, top" in out
    assert len(read(berlin, "explain.json")["logit_lens"]["top"]) == 8


@pytest.mark.parametrize("name", ["berlin", "rank_one"])
def test_explaining_leaves_the_model_as_it_was(request, name, tmp_path):
    run = load_run(request.getfixturevalue(name))
    before, steering = [p.detach().clone() for p in run.parameters], run.model.steering
    explain(run, tmp_path)
    assert run.model.steering is steering
    assert all(torch.equal(p, value) for p, value in zip(run.parameters, before))


def test_a_lora_on_all_layers_cannot_be_explained_and_is_named_in_one_line(tmp_path):
    trained(tmp_path, "--mode", "lora", "--layer", "all", "--steps", 1)
    status, _, err = command("eval.py", tmp_path, "--explain")
    assert status == 2 and str(tmp_path) in error_line(err)
    assert not (tmp_path / "explain.json").exists()


def test_a_template_that_refuses_what_is_asked_ends_in_one_line(rank_one, monkeypatch):
    def refuse(*given):
        raise ValueError("the chat template refuses this (TemplateError: no)")
    monkeypatch.setattr(data.Tokenizer, "frame", refuse)
    status, _, err = command("eval.py", rank_one, "--explain")
    assert status == 2 and "TemplateError" in error_line(err)
