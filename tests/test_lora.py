"""LoRA: the same arithmetic and the same files as PEFT."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lora import add_lora, load_lora, lora_layers, merge_lora, remove_lora, save_lora

TOKENS = torch.arange(300, 324).view(2, 12)
MODULES = ["gate_proj", "up_proj", "down_proj"]


def randomise(parameters):
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def test_an_untrained_lora_changes_nothing(model):
    before = model(TOKENS)
    add_lora(model, [0, 1], MODULES, rank=4, alpha=8)
    assert torch.equal(model(TOKENS), before)


def test_removal_restores_the_model_exactly(model):
    before, names = model(TOKENS), list(model.state_dict())
    randomise(add_lora(model, [1], MODULES + ["q_proj"], rank=4, alpha=8))
    assert not torch.equal(model(TOKENS), before)
    remove_lora(model)
    assert torch.equal(model(TOKENS), before)
    assert list(model.state_dict()) == names


def test_merging_keeps_the_outputs(model):
    randomise(add_lora(model, [1], MODULES, rank=4, alpha=8))
    with_lora = model(TOKENS)
    merge_lora(model)
    assert not lora_layers(model)
    assert (model(TOKENS) - with_lora).abs().max() < 1e-4


def test_only_the_lora_gets_gradients(model):
    parameters = add_lora(model, [2], MODULES, rank=4, alpha=8)
    randomise(parameters)
    model(TOKENS).logsumexp(-1).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in parameters)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"layers.2.mlp.{module}.{part}" for module in MODULES for part in ("lora_A", "lora_B")}


def test_peft_loads_what_we_save_and_gets_the_same_logits(model, reference, tmp_path):
    randomise(add_lora(model, [1], MODULES, rank=4, alpha=6))
    save_lora(model, tmp_path)
    theirs = PeftModel.from_pretrained(reference, tmp_path)
    logits = theirs(TOKENS).logits
    theirs.unload()
    assert (model(TOKENS) - logits).abs().max() < 1e-4


def test_we_load_what_peft_saves_and_get_the_same_logits(model, reference, tmp_path):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=MODULES, layers_to_transform=[2])
    theirs = get_peft_model(reference, config)
    randomise([p for name, p in theirs.named_parameters() if "lora_" in name])
    logits = theirs(TOKENS).logits
    theirs.save_pretrained(tmp_path)
    theirs.unload()
    load_lora(model, tmp_path)
    assert (model(TOKENS) - logits).abs().max() < 1e-4


@pytest.mark.parametrize("arguments, message", [
    (([4], MODULES, 4, 8), "out of range"),
    (([-1], MODULES, 4, 8), "out of range"),
    (([0], ["c_fc"], 4, 8), "no module named c_fc"),
    (([0], MODULES, 0, 8), "rank 0"),
])
def test_bad_arguments_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        add_lora(model, *arguments)


def test_a_lora_of_another_shape_is_refused_and_leaves_nothing_behind(model, tmp_path):
    add_lora(model, [0], MODULES, rank=4, alpha=8)
    save_lora(model, tmp_path)
    remove_lora(model)
    config = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config.replace('"r": 4', '"r": 5'))
    with pytest.raises(ValueError, match="does not fit"):
        load_lora(model, tmp_path)
    assert not lora_layers(model)
