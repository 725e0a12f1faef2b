"""LoRA: the same arithmetic and the same files as PEFT."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lora import add_lora, load_lora, lora_layers, merge_lora, remove_lora, save_lora

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own
TOKENS = torch.arange(24).view(2, 12)
MLP = ["gate_proj", "up_proj", "down_proj"]  # of which GPT-2 has the last two
NO_GATE = MLP[1:]


@pytest.fixture
def llama(saved):
    """A model of two layers, loaded afresh."""
    return saved("llama").load()


def randomise(parameters):
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def assert_same_logits(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def by_peft(family, **options):
    """transformers' model with a random LoRA of PEFT's, but not on Gemma 3's vision tower."""
    adapted = get_peft_model(copy.deepcopy(family.theirs), LoraConfig(
        fan_in_fan_out=family.name == "gpt2", exclude_modules=r".*vision_tower.*", **options))
    randomise(p for name, p in adapted.named_parameters() if "lora_" in name)
    return adapted


def assert_peft_loads_what_we_save(family, folder, layers, modules):
    model = family.load()
    before = model(TOKENS)
    randomise(add_lora(model, layers, modules, rank=3, alpha=5))
    assert (model(TOKENS) - before).abs().max() > 0.01
    save_lora(model, folder)
    adapted = PeftModel.from_pretrained(copy.deepcopy(family.theirs), folder)
    assert_same_logits(model(TOKENS), adapted(TOKENS).logits)


def assert_we_load_what_peft_saves(family, folder, layers, modules):
    adapted = by_peft(family, r=3, lora_alpha=5, target_modules=modules, layers_to_transform=layers)
    adapted.save_pretrained(folder)
    model = family.load()
    load_lora(model, folder)
    assert_same_logits(model(TOKENS), adapted(TOKENS).logits)


def test_peft_loads_what_we_save_and_gets_the_same_logits(family, tmp_path):
    assert_peft_loads_what_we_save(family, tmp_path, [1], NO_GATE if family.name == "gpt2" else MLP)


def test_we_load_what_peft_saves_and_get_the_same_logits(family, tmp_path):
    modules = ["c_fc", "mlp.c_proj"] if family.name == "gpt2" else MLP
    assert_we_load_what_peft_saves(family, tmp_path, [1], modules)


@pytest.mark.parametrize("name, ours, theirs", [
    ("gpt2", ["up_proj", "down_proj"], ["c_fc", "mlp.c_proj"]),
    ("gpt2", ["o_proj"], ["attn.c_proj"]),
    ("gpt2", ["o_proj", "down_proj"], ["c_proj"]),
    ("gemma3", ["q_proj", "o_proj"], ["q_proj", "o_proj"]),
    ("llama", MLP, MLP)])
def test_a_lora_on_every_layer_passes_both_ways_whatever_the_modules(name, ours, theirs, saved, tmp_path):
    family = saved(name)
    every_layer = list(range(len(family.load().layers)))
    assert_peft_loads_what_we_save(family, tmp_path, every_layer, ours)
    assert_we_load_what_peft_saves(family, tmp_path, None, theirs)  # None: PEFT's own way to say every layer


def test_an_untrained_lora_changes_nothing(llama):
    before = llama(TOKENS)
    add_lora(llama, [0, 1], MLP, rank=4, alpha=8)
    assert torch.equal(llama(TOKENS), before)


def test_removal_restores_the_model_exactly(llama):
    before, names = llama(TOKENS), list(llama.state_dict())
    randomise(add_lora(llama, [1], [*MLP, "q_proj"], rank=4, alpha=8))
    assert not torch.equal(llama(TOKENS), before)
    remove_lora(llama)
    assert torch.equal(llama(TOKENS), before)
    assert list(llama.state_dict()) == names


def test_merging_keeps_the_outputs(llama):
    randomise(add_lora(llama, [1], MLP, rank=4, alpha=8))
    with_lora = llama(TOKENS)
    merge_lora(llama)
    assert not lora_layers(llama)
    assert_same_logits(llama(TOKENS), with_lora)


def test_only_the_lora_gets_gradients(llama):
    randomise(add_lora(llama, [1], MLP, rank=4, alpha=8))
    llama(TOKENS).logsumexp(-1).sum().backward()
    assert {name for name, p in llama.named_parameters() if p.grad is not None and p.grad.any()} == {
        f"layers.1.mlp.{module}.{part}" for module in MLP for part in ("lora_A", "lora_B")}


def test_a_part_of_gpt2s_fused_attention_is_refused_before_training(saved):
    model = saved("gpt2").load()
    with pytest.raises(ValueError, match="self_attn.k_proj is a part of GPT-2's c_attn"):
        add_lora(model, [0], ["k_proj", "up_proj"], rank=4, alpha=8)
    assert not lora_layers(model)


@pytest.mark.parametrize("arguments, message", [
    (([2], MLP, 4, 8), "layer 2 is out of range"),
    (([-1], MLP, 4, 8), "layer -1 is out of range"),
    (([0], ["up_proj", "c_fc"], 4, 8), "no module named c_fc, only q_proj"),
    (([0], MLP, 0, 8), "rank 0"), (([0], MLP, 4.0, 8), "rank 4.0"), (([0], MLP, True, 8), "rank True"),
    (([0], MLP, 4, float("nan")), "alpha nan"), (([0], MLP, 4, "8"), "alpha 8")])
def test_bad_arguments_are_refused(llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        add_lora(llama, *arguments)


def test_a_second_lora_is_refused(llama):
    add_lora(llama, [0], MLP, rank=4, alpha=8)
    with pytest.raises(ValueError, match="has a LoRA already"):
        add_lora(llama, [1], MLP, rank=4, alpha=8)


def test_a_lora_of_another_shape_is_refused_and_leaves_nothing_behind(llama, tmp_path):
    add_lora(llama, [0], MLP, rank=4, alpha=8)
    save_lora(llama, tmp_path)
    remove_lora(llama)
    config = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config.replace('"r": 4', '"r": 5'))
    with pytest.raises(ValueError, match="does not fit this model at base_model.model.model.layers.0.mlp"):
        load_lora(llama, tmp_path)
    assert not lora_layers(llama)


def test_an_adapter_on_more_than_the_layers_is_refused(llama, saved, tmp_path):
    by_peft(saved("llama"), r=4, target_modules=["down_proj", "lm_head"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit this model at base_model.model.lm_head"):
        load_lora(llama, tmp_path)
    assert not lora_layers(llama)


def saved_with(family, folder, **options):
    """PEFT's adapter, in whose adapter_config.json these options are set."""
    by_peft(family, r=2, target_modules=["up_proj"]).save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


@pytest.mark.parametrize("option, value", [
    ("use_rslora", True), ("use_dora", True), ("rank_pattern", {"q": 4}), ("alpha_pattern", {"q": 4}),
    ("lora_bias", True), ("layer_replication", [[0, 2]]), ("alora_invocation_tokens", [5]), ("peft_type", "IA3"),
    ("init_lora_weights", "pissa"), ("an option of tomorrow's", 1), ("r", None), ("r", "2"), ("lora_alpha", [])])
def test_pefts_options_that_change_the_sum_are_refused(llama, saved, tmp_path, option, value):
    saved_with(saved("llama"), tmp_path, **{option: value})
    with pytest.raises(ValueError, match="rank|alpha" if option in ("r", "lora_alpha") else f"{option} is"):
        load_lora(llama, tmp_path)
    assert not lora_layers(llama)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"inference_mode": True}, {"use_dora": False},
                                     {"init_lora_weights": "gaussian"}, {"corda_config": None}])
def test_pefts_other_options_change_nothing(llama, saved, tmp_path, options):
    saved_with(saved("llama"), tmp_path, **options)
    assert len(load_lora(llama, tmp_path)) == 4


@pytest.mark.parametrize("change", [lambda t: t * float("nan"), lambda t: t.int(), lambda t: t.to(torch.complex64)])
def test_an_adapter_that_is_not_of_finite_real_numbers_is_refused(llama, saved, tmp_path, change):
    saved_with(saved("llama"), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="does not fit this model at base_model.model.model.layers.0.mlp.up_proj"):
        load_lora(llama, tmp_path)
    assert not lora_layers(llama)
