"""Steering vectors, what a LoRA adds, and how a vector reads."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from data import EncodedQuestion, make_tree
from lora import add_lora, save_lora
from steer import (
    attach,
    constancy,
    detach,
    load_vector,
    logit_lens,
    natural_vector,
    save_vector,
    switched_off,
    what_is_added,
)

TOKENS = torch.arange(24).view(2, 12)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def llama(saved):
    """A model of two layers and a width of 32, loaded afresh."""
    return saved("llama").load()


# ---- the slot


@pytest.mark.parametrize("place", ["embedding", "middle", "last"])
def test_a_vector_gives_the_logits_of_transformers_with_a_forward_hook(place, family):
    model = family.load()
    vector = random(32)
    last = len(model.layers) - 1
    layer = {"embedding": -1, "middle": last // 2, "last": last}[place]
    before = model(TOKENS)
    attach(model, layer, vector)
    after = model(TOKENS)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, family.logits(TOKENS, layer, vector), atol=1e-4, rtol=0)


def test_in_a_tree_the_vector_is_added_where_the_tree_says(saved):
    family = saved("llama")
    model = family.load()
    text = list(range(1, 9))
    question = EncodedQuestion(text, [[9]], 0, [9], steered_at=[3, 5])
    tree = make_tree([question])
    attach(model, 0, random(32))
    added = torch.zeros(8, 32)
    added[[3, 5]] = random(32)
    expected = family.logits(torch.tensor([text]), 0, added)[0]
    torch.testing.assert_close(model(tree.tokens, tree), expected, atol=1e-4, rtol=0)


def test_only_steered_places_get_the_vector(llama):
    steering = attach(llama, 0, random(32))
    x = random(2, 3, 32, seed=1)
    steered = torch.tensor([[True, False, True], [False, False, True]])
    added = steering(x, steered) - x
    torch.testing.assert_close(added[steered], random(32).expand(3, -1), atol=1e-6, rtol=0)
    assert not added[~steered].any()


@pytest.mark.parametrize("layer", [-1, 0, 1])
def test_blocks_up_to_a_vector_end_before_it_and_those_after_begin_with_it(llama, layer):
    x = llama.embed(TOKENS)
    without = llama.run_blocks(x, 0, layer + 1)
    attach(llama, layer, random(32))
    kept = llama.run_blocks(x, 0, layer + 1)
    assert torch.equal(kept, without)
    assert torch.equal(llama.run_blocks(kept, layer + 1), llama.run_blocks(x))


def test_an_untrained_vector_changes_nothing(llama):
    before = llama(TOKENS)
    attach(llama, 0)
    assert torch.equal(llama(TOKENS), before)


def test_detaching_restores_the_model_exactly(llama):
    before = llama(TOKENS)
    attach(llama, 0, random(32))
    detach(llama)
    assert llama.steering is None
    assert torch.equal(llama(TOKENS), before)


def test_a_second_vector_is_refused(llama):
    attach(llama, 0, random(32))
    with pytest.raises(ValueError, match=r"attached already: detach\(model\) first"):
        attach(llama, 1)


def test_a_vector_enters_neither_the_state_dict_nor_the_parameters(llama):
    names = list(llama.state_dict())
    count = len(list(llama.parameters()))
    steering = attach(llama, 0, random(32))
    assert list(llama.state_dict()) == names
    assert len(list(llama.parameters())) == count
    assert not any(p is steering.vector for p in llama.parameters())


def test_only_the_vector_gets_a_gradient(llama):
    steering = attach(llama, 0)
    llama(TOKENS).logsumexp(-1).sum().backward()
    assert steering.vector.grad.abs().sum() > 0
    assert all(p.grad is None for p in llama.parameters())


def test_what_was_attached_is_copied(llama):
    given = random(32).requires_grad_()
    steering = attach(llama, 0, given)
    steering.vector.data.zero_()
    assert torch.equal(given, random(32))
    assert steering.vector.is_leaf


def test_a_vector_stays_float32_in_a_bfloat16_model(saved):
    model = saved("llama").load(dtype=torch.bfloat16)
    steering = attach(model, 0, random(32))
    assert steering.vector.dtype == torch.float32
    assert torch.equal(steering.vector, random(32))
    assert model(TOKENS).dtype == torch.bfloat16


@pytest.mark.parametrize("layer", [-2, 2])
def test_a_layer_that_the_model_has_not_is_refused(llama, layer):
    with pytest.raises(ValueError, match=f"no layer {layer}: -1 is the embedding"):
        attach(llama, layer)


@pytest.mark.parametrize("vector", [torch.ones(32, 1), torch.ones(1)])
def test_a_vector_that_does_not_fit_is_refused(llama, vector):
    with pytest.raises(ValueError, match="as wide as the residual stream"):
        attach(llama, 0, vector)
    assert llama.steering is None


# ---- its file


@pytest.mark.parametrize("layer", [-1, 1])
def test_saved_and_loaded_again_it_is_the_same(llama, tmp_path, layer):
    steering = attach(llama, layer, random(32))
    expected = llama(TOKENS)
    save_vector(steering, tmp_path)
    detach(llama)
    assert load_vector(llama, tmp_path).layer == layer
    assert torch.equal(llama(TOKENS), expected)


def test_a_vector_of_another_model_is_refused(llama, model, tmp_path):
    save_vector(attach(model, 1), tmp_path)
    with pytest.raises(ValueError, match="as wide as the residual stream"):
        load_vector(llama, tmp_path)
    assert llama.steering is None


def test_a_file_that_is_missing_or_damaged_is_refused(llama, tmp_path):
    with pytest.raises(FileNotFoundError, match="vector.safetensors"):
        load_vector(llama, tmp_path)
    (tmp_path / "vector.safetensors").write_text("{")
    with pytest.raises(SafetensorError):
        load_vector(llama, tmp_path)
    assert llama.steering is None


# ---- what a LoRA adds


@pytest.fixture
def adapted(model):
    """The bundled model with a random LoRA on two modules of layer 1, and its parameters."""
    parameters = add_lora(model, [1], ["up_proj", "down_proj"], rank=2, alpha=4)
    for seed, parameter in enumerate(parameters):
        parameter.data = 0.1 * random(*parameter.shape, seed=seed)
    return model, parameters


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_what_is_added_is_the_difference_of_pefts_hidden_states(adapted, reference, tmp_path):
    from peft import PeftModel

    model, parameters = adapted
    save_lora(model, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path)
    after = theirs(TOKENS, output_hidden_states=True).hidden_states[2]
    before = reference(TOKENS, output_hidden_states=True).hidden_states[2]
    added = what_is_added(model, parameters, 1, TOKENS)
    assert added.abs().max() > 0.01
    torch.testing.assert_close(added, after - before, atol=1e-4, rtol=0)


def test_what_is_added_is_the_same_in_a_tree(adapted):
    model, parameters = adapted
    texts = TOKENS.tolist()
    tree = make_tree([EncodedQuestion(text, [[0]], 0, [0], None) for text in texts])
    added = what_is_added(model, parameters, 1, tree.tokens, tree)
    expected = what_is_added(model, parameters, 1, TOKENS)
    torch.testing.assert_close(tree.unfold(added), expected, atol=1e-5, rtol=0)


def test_before_its_layer_a_lora_adds_nothing(adapted):
    model, parameters = adapted
    assert not what_is_added(model, parameters, 0, TOKENS).any()


def test_switched_off_a_lora_gives_the_base_model_and_then_comes_back(adapted, reference):
    model, parameters = adapted
    with_lora = model(TOKENS)
    with switched_off(parameters):
        torch.testing.assert_close(model(TOKENS), reference(TOKENS).logits, atol=1e-4, rtol=0)
    assert torch.equal(model(TOKENS), with_lora)


def test_switched_off_a_vector_gives_the_base_model(llama):
    before = llama(TOKENS)
    steering = attach(llama, 0, random(32))
    with switched_off([steering.vector]):
        assert torch.equal(llama(TOKENS), before)
    assert torch.equal(steering.vector, random(32))


def test_switching_off_ends_after_an_error_too(adapted):
    model, parameters = adapted
    before = [parameter.detach().clone() for parameter in parameters]
    with pytest.raises(KeyError), switched_off(parameters):
        raise KeyError
    assert all(torch.equal(p, value) for p, value in zip(parameters, before))


def test_the_natural_vector_of_equal_rows_is_the_row():
    torch.testing.assert_close(natural_vector(random(7).expand(5, -1)), random(7))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_natural_vector_has_the_rows_direction_and_mean_length(sign):
    lengths = torch.tensor([[1.0], [0.2], [7.2]])  # 2.8 on average
    rows = sign * lengths * torch.tensor([0.6, 0.0, -0.8])
    expected = sign * 2.8 * torch.tensor([0.6, 0.0, -0.8])
    torch.testing.assert_close(natural_vector(rows), expected)


def test_constancy_is_of_every_two_rows():
    rows = random(9, 5)
    pairs = []
    for i in range(9):
        pairs += [F.cosine_similarity(rows[i], rows[j], dim=0).item() for j in range(i)]
    absolute = np.abs(pairs)
    figures = constancy(rows)
    assert figures["cosine"] == pytest.approx(np.mean(pairs), abs=1e-5)
    assert figures["abs_cosine"] == pytest.approx(np.mean(absolute), abs=1e-5)


def test_rows_on_one_line_in_both_directions_have_an_absolute_cosine_of_one():
    signs = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    figures = constancy(signs * random(5))
    assert figures["abs_cosine"] == pytest.approx(1, abs=1e-5)
    assert figures["cosine"] == pytest.approx(-1 / 3, abs=1e-5)  # 2 pairs of 6 alike


def test_rows_of_zeros_are_not_constant():
    assert constancy(torch.zeros(4, 5))["abs_cosine"] == 0


def test_the_natural_vector_is_along_numpys_first_singular_vector():
    rows = random(9, 5)
    _, _, directions = np.linalg.svd(rows.numpy())
    direction = F.normalize(natural_vector(rows), dim=0).numpy()
    assert abs(direction @ directions[0]) == pytest.approx(1, abs=1e-5)


# ---- the logit lens


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_logit_lens_orders_tokens_by_transformers_logits_of_the_vector(saved, name):
    """GPT-2's norm has a bias, of which a difference between two streams sees nothing."""
    family = saved(name)
    vector = random(32)
    inner = family.theirs.transformer if name == "gpt2" else family.theirs.model
    norm = inner.ln_f if name == "gpt2" else inner.norm
    logits = (norm(vector) - norm(torch.zeros(32))) @ family.theirs.lm_head.weight.T
    model = family.load()
    assert logit_lens(model, vector, 5) == logits.topk(5).indices.tolist()
    assert logit_lens(model, -vector, 5) == (-logits).topk(5).indices.tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_logit_lens_reads_a_float32_vector_in_a_bfloat16_model(saved, name):
    lens = logit_lens(saved(name).load(dtype=torch.bfloat16), random(32), 5)
    assert len(lens) == 5
