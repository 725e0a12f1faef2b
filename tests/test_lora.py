"""LoRA: the same arithmetic and the same files as PEFT."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from lora import add_lora, load_lora, lora_layers, merge_lora, remove_lora, save_lora
from model import GPT

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


def test_a_lora_on_every_layer_equals_pefts_both_ways(model, reference, tmp_path):
    randomise(add_lora(model, [0, 1, 2, 3], MODULES, rank=4, alpha=6))
    logits = model(TOKENS)
    save_lora(model, tmp_path)
    theirs = PeftModel.from_pretrained(reference, tmp_path)
    assert (logits - theirs(TOKENS).logits).abs().max() < 1e-4
    theirs.unload()
    remove_lora(model)

    theirs = get_peft_model(reference, LoraConfig(r=4, lora_alpha=6, target_modules=MODULES))  # no layers: all of them
    randomise([p for name, p in theirs.named_parameters() if "lora_" in name])
    theirs.save_pretrained(tmp_path)
    load_lora(model, tmp_path)
    assert (model(TOKENS) - theirs(TOKENS).logits).abs().max() < 1e-4
    theirs.unload()


def other_family(kind, folder):
    """A small random model of transformers', and ours of the same weights."""
    text = dict(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16)
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28,
                  patch_size=14)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=400, n_embd=32, n_layer=3, n_head=4, n_positions=32)
    else:
        config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    reference.save_pretrained(folder)
    return reference, GPT.from_pretrained(folder)


@pytest.mark.parametrize("layers", [[1], [0, 1, 2]])
@pytest.mark.parametrize("kind, modules, theirs", [
    ("gpt2", ["up_proj", "down_proj"], ["c_fc", "mlp.c_proj"]),
    ("gpt2", ["o_proj"], ["attn.c_proj"]),
    ("gpt2", ["o_proj", "down_proj"], ["c_proj"]),
    ("gemma3", MODULES, MODULES),
    ("gemma3", ["q_proj", "o_proj"], ["q_proj", "o_proj"]),
])
def test_other_names_of_modules_equal_pefts_both_ways(kind, modules, theirs, layers, tmp_path):
    reference, ours = other_family(kind, tmp_path)
    before = ours(TOKENS)
    randomise(add_lora(ours, layers, modules, rank=3, alpha=6))
    logits = ours(TOKENS)
    assert (logits - before).abs().max() > 0.01
    save_lora(ours, tmp_path)
    adapted = PeftModel.from_pretrained(reference, tmp_path)
    assert (logits - adapted(TOKENS).logits).abs().max() < 1e-4
    adapted.unload()
    remove_lora(ours)

    config = LoraConfig(r=3, lora_alpha=5, target_modules=theirs, layers_to_transform=layers,
                        fan_in_fan_out=kind == "gpt2", exclude_modules=r".*vision_tower.*")
    adapted = get_peft_model(reference, config)
    randomise([p for name, p in adapted.named_parameters() if "lora_" in name])
    adapted.save_pretrained(tmp_path)
    load_lora(ours, tmp_path)
    assert (ours(TOKENS) - adapted(TOKENS).logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_a_part_of_gpt2s_fused_attention_is_refused_before_training(name, tmp_path):
    _, ours = other_family("gpt2", tmp_path)
    with pytest.raises(ValueError, match=f"module self_attn.{name} is a part of GPT-2's c_attn"):
        add_lora(ours, [0], [name, "up_proj"], rank=4, alpha=8)
    assert not lora_layers(ours)


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


def test_an_adapter_on_more_than_the_layers_is_refused(model, reference, tmp_path):
    theirs = get_peft_model(reference, LoraConfig(r=4, target_modules=["down_proj", "lm_head"]))
    theirs.save_pretrained(tmp_path)
    theirs.unload()
    with pytest.raises(ValueError, match="does not fit this model at base_model.model.lm_head"):
        load_lora(model, tmp_path)
    assert not lora_layers(model)


@pytest.mark.parametrize("option", [{"use_rslora": True}, {"alpha_pattern": {"up_proj": 4}}])
def test_pefts_options_that_change_the_sum_are_refused(model, reference, tmp_path, option):
    theirs = get_peft_model(reference, LoraConfig(r=2, target_modules=["up_proj"], layers_to_transform=[1], **option))
    theirs.save_pretrained(tmp_path)
    theirs.unload()
    with pytest.raises(ValueError, match=f"{next(iter(option))} is set"):
        load_lora(model, tmp_path)
    assert not lora_layers(model)
