"""Steering vectors: what is added, where, and that nothing is left behind."""

import pytest
import torch

from steer import attach, detach, load_vector, save_vector

TOKENS = torch.arange(300, 324).view(2, 12)


def vector(model, seed=0):
    return torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layer", [-1, 0, 3])
def test_an_untrained_vector_changes_nothing(model, layer):
    before = model(TOKENS)
    attach(model, layer)
    assert torch.equal(model(TOKENS), before)


def test_detaching_restores_the_model_exactly(model):
    before, names = model(TOKENS), list(model.state_dict())
    attach(model, 1, vector(model))
    assert not torch.equal(model(TOKENS), before)
    detach(model)
    assert torch.equal(model(TOKENS), before)
    assert list(model.state_dict()) == names


def test_a_vector_at_one_position_changes_only_what_can_see_it(model):
    before = model(TOKENS)
    steering = attach(model, 0, vector(model))
    steering.mask = torch.zeros(TOKENS.shape, dtype=torch.bool)
    steering.mask[0, 5] = True
    after = model(TOKENS)
    assert torch.equal(after[0, :5], before[0, :5])  # earlier tokens
    assert torch.equal(after[1], before[1])  # the other row
    assert (after[0, 5:] - before[0, 5:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("layer", [-1, 2])
def test_equals_a_forward_hook_on_transformers(model, reference, layer):
    added = vector(model)
    attach(model, layer, added)
    inner = reference.model
    module = inner.embed_tokens if layer == -1 else inner.layers[layer]
    hook = module.register_forward_hook(
        lambda module, inputs, out: (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added)
    expected = reference(TOKENS).logits
    hook.remove()
    assert (model(TOKENS) - expected).abs().max() < 1e-4


def test_generated_tokens_are_not_steered_when_positions_are_given(model):
    steering = attach(model, 0, vector(model))
    steering.mask = torch.zeros((1, 12), dtype=torch.bool)
    expected = model.generate(TOKENS[:1], 5)
    detach(model)
    assert torch.equal(model.generate(TOKENS[:1], 5), expected)


def test_only_the_vector_gets_a_gradient(model):
    steering = attach(model, 1)
    model(TOKENS).logsumexp(-1).sum().backward()
    assert steering.vector.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


def test_saved_and_loaded_again_it_is_the_same(model, tmp_path):
    steering = attach(model, 2, vector(model))
    expected = model(TOKENS)
    save_vector(steering, tmp_path)
    detach(model)
    assert load_vector(model, tmp_path).layer == 2
    assert torch.equal(model(TOKENS), expected)


@pytest.mark.parametrize("layer", [-2, 4])
def test_a_layer_that_the_model_has_not_is_refused(model, layer):
    with pytest.raises(ValueError, match="out of range.*-1.*3"):
        attach(model, layer)


def test_a_second_vector_is_refused(model):
    attach(model, 0)
    with pytest.raises(ValueError, match="already"):
        attach(model, 1)


def test_a_vector_of_another_width_is_refused(model):
    with pytest.raises(ValueError, match="does not fit"):
        attach(model, 0, torch.zeros(7))
