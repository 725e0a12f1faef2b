"""Steering vectors: what is added, where, that nothing is left behind, and how a vector reads."""

import numpy as np
import pytest
import torch

from steer import attach, detach, load_vector, logit_lens, pairwise_cosines, principal_component, save_vector

TOKENS = torch.arange(24).view(2, 12)


def vector(width, seed=0):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def rows(count=9, width=5):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def llama(saved):
    """A model of two layers and a width of 32, loaded afresh."""
    return saved("llama").load()


@pytest.mark.parametrize("layer", ["embedding", "middle", "last"])
def test_a_vector_gives_the_logits_of_transformers_with_a_forward_hook(layer, family):
    model, added = family.load(), vector(32)
    last = len(model.layers) - 1
    layer = {"embedding": -1, "middle": last // 2, "last": last}[layer]
    before = model(TOKENS)
    attach(model, layer, added)
    assert (model(TOKENS) - before).abs().max() > 0.1
    torch.testing.assert_close(model(TOKENS), family.logits(TOKENS, layer, added), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer", [-1, 0, 1])
def test_blocks_up_to_a_vector_end_before_it_and_those_after_begin_with_it(llama, layer):
    x, without = llama.embed(TOKENS), llama.run_blocks(llama.embed(TOKENS), 0, layer + 1)
    attach(llama, layer, vector(32))
    kept = llama.run_blocks(x, 0, layer + 1)
    assert torch.equal(kept, without)
    assert torch.equal(llama.run_blocks(kept, layer + 1), llama.run_blocks(x))


def test_an_untrained_vector_changes_nothing(llama):
    before = llama(TOKENS)
    attach(llama, 0)
    assert torch.equal(llama(TOKENS), before)


def test_detaching_restores_the_model_exactly(llama):
    before = llama(TOKENS)
    attach(llama, 0, vector(32))
    detach(llama)
    assert llama.steering is None and torch.equal(llama(TOKENS), before)


def test_a_vector_enters_neither_the_state_dict_nor_the_parameters(llama):
    names, parameters = list(llama.state_dict()), list(llama.parameters())
    steering = attach(llama, 0, vector(32))
    assert list(llama.state_dict()) == names and len(list(llama.parameters())) == len(parameters)
    assert not any(p is steering.vector for p in llama.parameters())


def test_only_the_vector_gets_a_gradient(llama):
    steering = attach(llama, 0)
    llama(TOKENS).logsumexp(-1).sum().backward()
    assert steering.vector.grad.abs().sum() > 0
    assert all(p.grad is None for p in llama.parameters())


def test_a_vector_stays_float32_in_a_bfloat16_model(saved):
    model = saved("llama").load(dtype=torch.bfloat16)
    assert torch.equal(attach(model, 0, vector(32)).vector, vector(32))
    assert model(TOKENS).dtype == torch.bfloat16


def test_saved_and_loaded_again_it_is_the_same(llama, tmp_path):
    steering = attach(llama, 1, vector(32))
    expected = llama(TOKENS)
    save_vector(steering, tmp_path)
    detach(llama)
    assert load_vector(llama, tmp_path).layer == 1
    assert torch.equal(llama(TOKENS), expected)


@pytest.mark.parametrize("layer", [-2, 2])
def test_a_layer_that_the_model_has_not_is_refused(llama, layer):
    with pytest.raises(ValueError, match=f"layer {layer} is out of range.*-1.*1"):
        attach(llama, layer)


def test_a_second_vector_is_refused(llama):
    attach(llama, 0)
    with pytest.raises(ValueError, match="already"):
        attach(llama, 1)


def test_a_vector_of_another_width_is_refused(llama, model, tmp_path):
    save_vector(attach(model, 1), tmp_path)
    with pytest.raises(ValueError, match=f"should be 32 finite real numbers, not .{model.config.hidden_size},"):
        load_vector(llama, tmp_path)
    assert llama.steering is None


def test_pairwise_cosines_are_numpys_for_every_two_rows():
    some = rows()
    unit = some.numpy() / np.linalg.norm(some.numpy(), axis=1, keepdims=True)
    expected = (unit @ unit.T)[np.triu_indices(len(some), 1)]
    assert sorted(pairwise_cosines(some).tolist()) == pytest.approx(sorted(expected.tolist()), abs=1e-5)


def test_the_principal_component_is_numpys_first_singular_vector():
    direction, share = principal_component(rows())
    _, singular, directions = np.linalg.svd(rows().numpy())
    assert abs(direction.numpy() @ directions[0]) == pytest.approx(1, abs=1e-5)
    assert share == pytest.approx(singular[0] ** 2 / (singular ** 2).sum(), abs=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_principal_component_points_where_the_rows_do(sign):
    lengths = torch.tensor([[1.0], [0.2], [7.0]])
    direction, share = principal_component(sign * lengths * torch.tensor([3.0, 0.0, -4.0]))
    assert direction.tolist() == pytest.approx([0.6 * sign, 0, -0.8 * sign], abs=1e-6)
    assert share == pytest.approx(1, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_logit_lens_orders_tokens_by_transformers_logits_of_the_vector(saved, name):
    """GPT-2's final norm also has a bias, of which a difference between two residual streams sees nothing."""
    family, v = saved(name), vector(32)
    inner = getattr(family.theirs, "transformer", None) or family.theirs.model
    norm = inner.ln_f if name == "gpt2" else inner.norm
    logits = (norm(v) - norm(torch.zeros(32))) @ family.theirs.lm_head.weight.T
    top, bottom = logit_lens(family.load(), v, 5)
    assert top == logits.topk(5).indices.tolist() and bottom == (-logits).topk(5).indices.tolist()


@pytest.mark.parametrize("bad", [torch.full((32,), float("nan")), torch.zeros(32).int(), torch.zeros(32, 1),
                                 torch.zeros(32, dtype=torch.complex64)])
def test_a_vector_that_is_not_of_finite_real_numbers_is_refused(llama, bad):
    with pytest.raises(ValueError, match="should be 32 finite real numbers"):
        attach(llama, 0, bad)
    assert llama.steering is None
