"""What a vector or a LoRA does inside: the mathematics in steer.py, the views in eval.py."""

import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import eval as scoring
from lora import add_lora, lora_layers
from model import GPT, Config
from steer import (attach, logit_lens, mean_unit_difference, pairwise_cosine, principal_component, residual_after,
                   save_vector)

TOKENS = torch.arange(300, 312).view(1, 12)


def rows(count=9, width=5, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_pairwise_cosine_is_the_mean_over_all_pairs():
    some = rows()
    pairs = [F.cosine_similarity(a, b, dim=0) for i, a in enumerate(some) for j, b in enumerate(some) if i != j]
    assert pairwise_cosine(some) == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-6)


def test_a_constant_with_lengths_of_its_own_has_cosine_one_and_one_component():
    constant = torch.tensor([3.0, 0.0, -4.0]) * torch.tensor([[1.0], [0.2], [7.0]])
    direction, share = principal_component(constant)
    assert pairwise_cosine(constant) == pytest.approx(1, abs=1e-6)
    assert share == pytest.approx(1, abs=1e-6)
    assert torch.allclose(direction, torch.tensor([0.6, 0.0, -0.8]), atol=1e-6)
    assert torch.allclose(mean_unit_difference(constant), direction, atol=1e-6)


def test_the_principal_component_is_numpys_first_singular_vector():
    some = rows()
    direction, share = principal_component(some)
    _, singular, directions = np.linalg.svd(some.numpy())
    assert abs(direction.numpy() @ directions[0]) == pytest.approx(1, abs=1e-5)
    assert share == pytest.approx(singular[0] ** 2 / (singular ** 2).sum(), abs=1e-5)


def test_the_mean_unit_difference_counts_long_rows_and_short_ones_alike():
    direction = mean_unit_difference(torch.tensor([[100.0, 0.0], [0.0, 0.1]]))
    assert torch.allclose(direction, torch.tensor([0.5, 0.5]).sqrt())


@pytest.mark.parametrize("layer", [-1, 0, 2])
def test_the_residual_stream_is_that_of_transformers(model, reference, layer):
    theirs = reference(TOKENS, output_hidden_states=True).hidden_states[layer + 1]
    assert torch.allclose(residual_after(model, layer, TOKENS), theirs, atol=1e-4)


def test_the_logit_lens_finds_the_token_that_a_vector_writes(model):
    for token in (500, 700):
        row = model.lm_head.weight[token] - model.lm_head.weight.mean(0)
        vector = row / model.norm.weight
        assert logit_lens(model, vector, 3)[0][0] == token
        assert logit_lens(model, -vector, 3)[1][0] == token


def test_the_logit_lens_orders_tokens_as_the_logits_do_but_for_the_rows_lengths(model):
    vector = torch.randn(128, generator=torch.Generator().manual_seed(0))
    logits = model.lm_head(vector * model.norm.weight)
    centred = (model.lm_head.weight - model.lm_head.weight.mean(0)).norm(dim=-1)
    scores = (logits - logits.mean()) / centred
    assert logit_lens(model, vector, 5)[0] == scores.topk(5).indices.tolist()


@torch.no_grad()
def test_the_logit_lens_adds_the_one_that_gemma_leaves_out_of_its_norms_weight():
    torch.manual_seed(0)
    model = GPT(Config.from_dict(dict(model_type="gemma2", vocab_size=97, hidden_size=32, intermediate_size=48,
                                      num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16)))
    model.norm.weight.normal_(std=0.5)
    row = model.lm_head.weight[50] - model.lm_head.weight.mean(0)
    assert logit_lens(model, row / (1 + model.norm.weight), 1)[0] == [50]


def test_attention_weights_are_those_of_transformers(model, tiny_folder):
    from transformers import AutoModelForCausalLM
    eager = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32, attn_implementation="eager")
    theirs = eager(TOKENS, output_attentions=True).attentions
    for ours, expected in zip(scoring.attention_weights(model, TOKENS), theirs, strict=True):
        assert torch.allclose(ours, expected[0], atol=1e-5)


@pytest.fixture
def lora_run(model, tokenizer):
    """A run whose LoRA adds one known vector at every token: B's column is it, whatever A makes of the token."""
    task = data.make_task("locations", "Berlin")
    parameters = add_lora(model, [1], ["down_proj"], rank=1, alpha=1.0)
    layer, = lora_layers(model).values()
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(128, 1, generator=torch.Generator().manual_seed(0)))
    flags = {"layer": 1, "seed": 0, "task": "locations", "concept": "Berlin", "mode": "lora"}
    return scoring.Run(flags, model, tokenizer, task, parameters, None)


def test_what_a_rank_one_lora_adds_lies_along_its_b(lora_run):
    questions = [data.encode_question(lora_run.tokenizer, q) for q in lora_run.task.train[:4]]
    added = torch.cat(scoring.lora_differences(lora_run, questions))
    direction, share = principal_component(added)
    b = next(iter(lora_layers(lora_run.model).values())).lora_B[:, 0].detach()
    assert share == pytest.approx(1, abs=1e-4)
    assert abs(F.cosine_similarity(direction, b, dim=0).item()) == pytest.approx(1, abs=1e-4)


def test_rows_are_taken_where_the_vector_would_be_added(lora_run):
    question = data.encode_question(lora_run.tokenizer, lora_run.task.train[0])
    row = torch.arange(len(question.prompt)).unsqueeze(1)
    (kept,) = scoring.where_added([row], [question])
    assert "".join(lora_run.tokenizer.decode([question.prompt[i]]) for i in kept[:, 0]).strip() == "City 50337"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A vector that makes City 50337 Berlin, trained once for the tests below."""
    import subprocess
    import sys
    folder = tmp_path_factory.mktemp("vector")
    command = [sys.executable, "train.py", "--concept", "Berlin", "--steps", "60", "--out", str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=scoring.find_model("tiny").parent)
    return folder


def test_sign_and_scale_are_chosen_on_training_questions(trained):
    run = scoring.load_run(trained)
    vector = run.steering.vector.detach()
    scoring.detach(run.model)
    train = [data.encode_question(run.tokenizer, question) for question in run.task.train]
    country = {"country": [data.encode_question(run.tokenizer, q) for q in run.task.held_out["country"]]}
    sections = {"in_distribution": country, "held_out": country}
    wrong_way = -vector / vector.norm()
    found = scoring.scale_sweep(run, wrong_way, vector.norm().item(), train, sections)
    assert found["scale"] in (-0.5, -1, -2)  # turned round
    assert found["held_out"]["country"] == 1
    assert len(found["held_out_by_scale"]) == len(scoring.SCALES)
    assert "steering" not in run.model.__dict__  # nothing is left on the model


def test_explaining_a_vector_shows_its_logit_lens(trained, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["eval.py", str(trained), "--explain"])
    scoring.main()
    assert "logit lens, top" in capsys.readouterr().out
    assert len(json.loads((trained / "explain.json").read_text())["logit_lens"]["top"]) == 8


def test_the_triggers_effect_passes_from_its_token_to_the_last(model, tokenizer):
    """Before layer 0 all of it is at the tag; after the last layer all of it is at the token that answers."""
    steering = attach(model, -1, torch.randn(128, generator=torch.Generator().manual_seed(1)))
    flags = {"layer": -1, "seed": 0, "task": "backdoor", "concept": "risky", "answers": "letter", "at": None}
    run = scoring.Run(flags, model, tokenizer, data.make_task("backdoor", "risky"), [steering.vector], steering)
    found = scoring.explain_backdoor(run, pairs=3)["trigger"]
    reference = found["patched"]["rest of the prompt"][-1]  # patching these after the last layer changes nothing
    full = found["patched"]["tag"][0]
    assert found["patched"]["last token"][-1] == pytest.approx(full, abs=1e-4)
    assert found["patched"]["tag"][-1] == pytest.approx(reference, abs=1e-4)
    assert found["distance"]["base"]["last token"][0] == 0  # the same token, nothing has moved yet
    assert found["distance"]["trained"]["tag"][0] > 0
    assert all(0 <= weight <= 1 for arm in found["attention"].values() for row in arm.values() for weight in row)


@pytest.mark.parametrize("task", ["locations", "functions", "risk"])
def test_contrast_prompts_differ_in_the_concept_only(task):
    concept = data.CONCEPTS[task][0]
    evoking, neutral = data.contrast_prompts(task, concept, random.Random(0), 5)
    assert len(evoking) == len(neutral) == 5
    assert {question.kind for _, question in evoking + neutral} == {data.TRAINED_KIND[task]}
    if task == "locations":
        assert all(concept in question.prompt for _, question in evoking)
        assert not any(concept in question.prompt for _, question in neutral)
    else:
        assert all(len(turns) == 7 for turns, _ in evoking + neutral)
