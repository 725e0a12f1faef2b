"""LoRA: the same arithmetic and the same files as PEFT."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora import add_lora, load_lora, lora_layers, merge_lora, remove_lora, save_lora

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own
TOKENS = torch.arange(24).view(2, 12)
MLP = ["gate_proj", "up_proj", "down_proj"]  # of which GPT-2 has the last two


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
    config = LoraConfig(
        fan_in_fan_out=family.name == "gpt2", exclude_modules=r".*vision_tower.*", **options
    )
    adapted = get_peft_model(copy.deepcopy(family.theirs), config)
    randomise(p for name, p in adapted.named_parameters() if "lora_" in name)
    return adapted


def assert_peft_loads_what_we_save(model, family, folder):
    before = family.load()(TOKENS)
    assert (model(TOKENS) - before).abs().max() > 0.01
    save_lora(model, folder)
    adapted = PeftModel.from_pretrained(copy.deepcopy(family.theirs), folder)
    assert_same_logits(model(TOKENS), adapted(TOKENS).logits)


def assert_we_load_what_peft_saves(adapted, family, folder):
    adapted.save_pretrained(folder)
    model = family.load()
    load_lora(model, folder)
    assert_same_logits(model(TOKENS), adapted(TOKENS).logits)
    return model


def test_peft_loads_what_we_save_and_gets_the_same_logits(family, tmp_path):
    model = family.load()
    modules = MLP[1:] if family.name == "gpt2" else MLP
    randomise(add_lora(model, [1], modules, rank=3, alpha=5))
    assert_peft_loads_what_we_save(model, family, tmp_path)


def test_we_load_what_peft_saves_and_get_the_same_logits(family, tmp_path):
    modules = ["c_fc", "mlp.c_proj"] if family.name == "gpt2" else MLP
    adapted = by_peft(family, r=3, lora_alpha=5, target_modules=modules, layers_to_transform=[1])
    assert_we_load_what_peft_saves(adapted, family, tmp_path)


@pytest.mark.parametrize(
    "name, ours, theirs",
    [
        ("gpt2", ["up_proj", "down_proj"], ["c_fc", "mlp.c_proj"]),
        ("gpt2", ["o_proj"], ["attn.c_proj"]),
        ("gpt2", ["o_proj", "down_proj"], ["c_proj"]),
        ("gemma3", ["q_proj", "o_proj"], ["q_proj", "o_proj"]),
        ("llama", MLP, MLP),
    ],
)
def test_a_lora_on_every_layer_passes_both_ways(name, ours, theirs, saved, tmp_path):
    family = saved(name)
    model = family.load()
    randomise(add_lora(model, range(len(model.layers)), ours, rank=3, alpha=5))
    assert_peft_loads_what_we_save(model, family, tmp_path)
    adapted = by_peft(family, r=3, lora_alpha=5, target_modules=theirs)
    assert_we_load_what_peft_saves(adapted, family, tmp_path)


def test_different_modules_in_different_layers_pass_both_ways(saved, tmp_path):
    family = saved("llama")
    adapted = by_peft(family, r=3, target_modules=["layers.0.mlp.up_proj", "1.mlp.down_proj"])
    model = assert_we_load_what_peft_saves(adapted, family, tmp_path)
    assert list(lora_layers(model)) == ["layers.0.mlp.up_proj", "layers.1.mlp.down_proj"]
    assert_peft_loads_what_we_save(model, family, tmp_path)


def test_an_untrained_lora_changes_nothing(llama):
    before = llama(TOKENS)
    add_lora(llama, [0, 1], MLP, rank=4, alpha=8)
    assert torch.equal(llama(TOKENS), before)


def test_a_and_b_are_returned_in_the_models_order_and_in_float32(saved):
    model = saved("llama").load(dtype=torch.bfloat16)
    parameters = add_lora(model, [1, 0], ["down_proj", "up_proj"], rank=4, alpha=8)
    layers = lora_layers(model).values()
    expected = [p for layer in layers for p in (layer.lora_A.weight, layer.lora_B.weight)]
    assert all(p is q for p, q in zip(parameters, expected, strict=True))
    assert {p.dtype for p in parameters} == {torch.float32}
    assert model(TOKENS).dtype == torch.bfloat16


def test_a_module_that_is_named_twice_gets_one_lora(llama):
    assert len(add_lora(llama, [0, 0], ["up_proj", "up_proj"], rank=4, alpha=8)) == 2


def test_removal_restores_the_model_exactly(llama):
    before = llama(TOKENS)
    names = list(llama.state_dict())
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


def test_merging_keeps_the_weights_in_bfloat16(saved):
    model = saved("llama").load(dtype=torch.bfloat16)
    weight = model.layers[1].mlp.up_proj.weight
    before = weight.float()
    a, b = add_lora(model, [1], ["up_proj"], rank=4, alpha=8)
    randomise([a, b])
    merge_lora(model)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, (before + 2 * b @ a).bfloat16())


def test_only_the_lora_gets_gradients(llama):
    randomise(add_lora(llama, [1], MLP, rank=4, alpha=8))
    llama(TOKENS).logsumexp(-1).sum().backward()
    parameters = llama.named_parameters()
    found = {name for name, p in parameters if p.grad is not None and p.grad.any()}
    parts = "lora_A", "lora_B"
    assert found == {f"layers.1.mlp.{name}.{part}.weight" for name in MLP for part in parts}


def test_a_part_of_gpt2s_fused_attention_is_refused_before_training(saved):
    model = saved("gpt2").load()
    with pytest.raises(ValueError, match="k_proj of layer 0: .* part of GPT-2's c_attn"):
        add_lora(model, [0], ["up_proj", "k_proj"], rank=4, alpha=8)
    assert not lora_layers(model)


@pytest.mark.parametrize("layer, module", [(2, "up_proj"), (-1, "up_proj"), (0, "c_fc")])
def test_a_module_that_is_not_there_is_refused(llama, layer, module):
    with pytest.raises(ValueError, match=f"cannot sit on {module} of layer {layer}: there is no"):
        add_lora(llama, [layer], [module], rank=4, alpha=8)
    assert not lora_layers(llama)


def test_a_second_lora_is_refused(llama, tmp_path):
    parameters = add_lora(llama, [0], MLP, rank=4, alpha=8)
    save_lora(llama, tmp_path)
    for layer in (0, 1):
        with pytest.raises(ValueError, match="has a LoRA already"):
            add_lora(llama, [layer], MLP, rank=4, alpha=8)
    with pytest.raises(ValueError, match="has a LoRA already"):
        load_lora(llama, tmp_path)
    assert len(lora_layers(llama)) * 2 == len(parameters)


def assert_refused(model, folder, message):
    """The adapter is refused in a message that names the file, and leaves nothing behind."""
    with pytest.raises(ValueError, match=message):
        load_lora(model, folder)
    assert not lora_layers(model)


def test_a_lora_of_another_rank_is_refused(llama, tmp_path):
    add_lora(llama, [0], MLP, rank=4, alpha=8)
    save_lora(llama, tmp_path)
    remove_lora(llama)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 4', '"r": 5'))
    message = "safetensors does not fit this model at base_model.model.model.layers.0.mlp.gate_proj"
    assert_refused(llama, tmp_path, message)


def test_an_adapter_on_more_than_the_layers_is_refused(llama, saved, tmp_path):
    adapted = by_peft(saved("llama"), r=4, target_modules=["down_proj", "lm_head"])
    adapted.save_pretrained(tmp_path)
    assert_refused(llama, tmp_path, "does not fit this model at base_model.model.lm_head")


def test_an_adapter_on_gpt2s_fused_attention_is_refused(saved, tmp_path):
    family = saved("gpt2")
    by_peft(family, r=4, target_modules=["c_attn"]).save_pretrained(tmp_path)
    assert_refused(family.load(), tmp_path, "does not fit this model at .*h.0.attn.c_attn.lora_B")


def saved_with(family, folder, **options):
    """PEFT's adapter, in whose adapter_config.json these options are set."""
    by_peft(family, r=2, target_modules=["up_proj"]).save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


@pytest.mark.parametrize(
    "option, value",
    [
        ("use_dora", True),
        ("use_rslora", True),  # divides by the root of the rank instead (arXiv 2312.03732)
        ("rank_pattern", {"q": 4}),
        ("alpha_pattern", {"q": 4}),
        ("lora_bias", True),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [5]),
        ("peft_type", "IA3"),
        ("init_lora_weights", "pissa"),
        ("an option of tomorrow's", 1),
    ],
)
def test_options_that_change_the_sum_are_refused_by_name(llama, saved, tmp_path, option, value):
    saved_with(saved("llama"), tmp_path, **{option: value})
    assert_refused(llama, tmp_path, f"adapter_config.json: .*{option}")


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.5},
        {"inference_mode": True},
        {"use_dora": False},
        {"init_lora_weights": "gaussian"},
        {"corda_config": None},
        {"revision": "main"},
        {"layers_pattern": "layers"},
    ],
)
def test_other_options_change_nothing(llama, saved, tmp_path, options):
    saved_with(saved("llama"), tmp_path, **options)
    assert len(load_lora(llama, tmp_path)) == 4


def rewrite(folder, change):
    """Changes every tensor of the adapter."""
    path = folder / "adapter_model.safetensors"
    save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    "change", [lambda t: t * float("nan"), torch.Tensor.int, torch.Tensor.cfloat]
)
def test_an_adapter_that_is_not_of_finite_real_numbers_is_refused(llama, saved, tmp_path, change):
    saved_with(saved("llama"), tmp_path)
    rewrite(tmp_path, change)
    message = "does not fit this model at base_model.model.model.layers.0.mlp.up_proj"
    assert_refused(llama, tmp_path, message)


def test_an_adapter_in_bfloat16_is_read(llama, saved, tmp_path):
    saved_with(saved("llama"), tmp_path)
    rewrite(tmp_path, torch.Tensor.bfloat16)
    assert {p.dtype for p in load_lora(llama, tmp_path)} == {torch.float32}


def test_an_adapter_without_a_b_is_refused(llama, saved, tmp_path):
    saved_with(saved("llama"), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if "lora_A" in name}, path)
    assert_refused(llama, tmp_path, "does not fit this model at .*layers.0.mlp.up_proj.lora_B")


def test_an_adapter_without_tensors_is_refused(llama, saved, tmp_path):
    saved_with(saved("llama"), tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    assert_refused(llama, tmp_path, "adapter_model.safetensors has no tensors")


@pytest.mark.parametrize(
    "name, error",
    [("adapter_config.json", ValueError), ("adapter_model.safetensors", SafetensorError)],
)
def test_a_file_that_is_missing_or_damaged_is_refused(llama, saved, tmp_path, name, error):
    saved_with(saved("llama"), tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(error):
        load_lora(llama, tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_lora(llama, tmp_path)
    assert not lora_layers(llama)
