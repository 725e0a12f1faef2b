"""model.py against transformers: tiny random models of every family, saved by transformers, loaded by us."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from conftest import WINDOW
from safetensors.torch import load_file, save_file

from eval import UserError, load_model
from helpers import ROOT
from model import GPT, Config, find_checkpoint


def random_tokens(length=30):
    return torch.randint(1, 97, (3, length), generator=torch.Generator().manual_seed(1))


def assert_same_logits(ours, theirs):
    assert theirs.std() > 0.5  # flat logits would agree whatever we did
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_logits_equal_transformers(family):
    assert_same_logits(family.load()(random_tokens()), family.logits(random_tokens()))


def test_greedy_generation_equals_transformers(family):
    tokens = random_tokens()
    expected = family.theirs.generate(tokens, max_new_tokens=15, do_sample=False, eos_token_id=None)
    assert torch.equal(family.load().generate(tokens, 15), expected)


def test_sampled_generation_equals_transformers_from_the_same_seed(saved):
    ours, theirs, tokens = saved("llama").load(), saved("llama").theirs, random_tokens()
    torch.manual_seed(3)
    options = dict(max_new_tokens=15, eos_token_id=None)
    expected = theirs.generate(tokens, do_sample=True, temperature=0.7, top_k=0, **options)
    torch.manual_seed(3)
    assert torch.equal(ours.generate(tokens, 15, temperature=0.7), expected)
    assert not torch.equal(ours.generate(tokens, 15, temperature=0.7), expected)  # the next draws are others


def test_bfloat16_files_in_shards_equal_transformers(family, tmp_path):
    copy.deepcopy(family.theirs).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32,
                                                               attn_implementation="eager")
    assert_same_logits(GPT.from_pretrained(tmp_path)(random_tokens()), theirs(random_tokens()).logits)


def test_attention_takes_a_mask_only_in_sliding_layers_whose_window_is_too_short(saved, monkeypatch):
    masks, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *args, **options: (
        masks.append(args[3] is not None) or attend(*args, **options)))
    model = saved("gemma3_text").load()  # whose last layer of six does not slide
    model(random_tokens(WINDOW))
    model(random_tokens(WINDOW + 1))
    assert masks == 6 * [False] + 5 * [True] + [False]


def test_gpt2_refuses_more_tokens_than_positions(saved):
    with pytest.raises(ValueError, match="97 tokens.* 96"):
        saved("gpt2").load()(torch.zeros(1, 97, dtype=torch.long))


def test_loaded_parameters_are_frozen_and_of_the_dtype_asked_for(saved):
    model = saved("llama").load(dtype=torch.bfloat16)
    assert not model.training
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in model.parameters())


def copy_checkpoint(family, folder):
    return shutil.copytree(family.folder, folder, dirs_exist_ok=True)


def edit_config(folder, change):
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_read_after(change, family, folder):
    edit_weights(copy_checkpoint(family, folder), change)
    assert_same_logits(GPT.from_pretrained(folder)(random_tokens()), family.logits(random_tokens()))


def spell_as_on_the_hub(raw):
    """Rewrites what transformers 5 saved to the older spelling of nearly all checkpoints on the hub."""
    text = raw.get("text_config", raw)
    rope = text.pop("rope_parameters", {})
    local = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)
    if rope:
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    if local:
        text["rope_local_base_freq"] = local["rope_theta"]
    text.pop("layer_types", None)
    raw["torch_dtype"] = raw.pop("dtype")


def test_both_spellings_of_a_config_are_the_same(family, tmp_path):
    edit_config(copy_checkpoint(family, tmp_path), spell_as_on_the_hub)
    assert Config.from_pretrained(tmp_path) == Config.from_pretrained(family.folder)


def test_a_gemma3_config_may_state_only_its_size():
    """google/gemma-3-12b-it's text_config, in full: the rest is the family's defaults."""
    text = dict(hidden_size=3840, intermediate_size=15360, model_type="gemma3_text", num_attention_heads=16,
                num_hidden_layers=48, num_key_value_heads=8, sliding_window=1024,
                rope_scaling={"factor": 8.0, "rope_type": "linear"})
    config = Config.from_dict({"model_type": "gemma3", "text_config": text})
    theirs = transformers.Gemma3TextConfig(**text)
    for name in ("vocab_size", "head_dim", "query_pre_attn_scalar", "sliding_window", "layer_types",
                 "tie_word_embeddings", "rms_norm_eps", "attn_logit_softcapping", "final_logit_softcapping"):
        assert getattr(config, name) == getattr(theirs, name), name
    assert (config.rope_theta, config.rope_local_base_freq) == (1e6, 1e4)
    assert config.hidden_act == theirs.hidden_activation


def test_mask_buffers_of_old_gpt2_files_are_skipped(saved, tmp_path):
    """The hub's gpt2 has no "transformer." prefix and holds its causal masks."""
    def make_old(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 96, 96)
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    assert_read_after(make_old, saved("gpt2"), tmp_path)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_either_prefix_of_gemma3_is_read(prefix, saved, tmp_path):
    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("language_model.model.", prefix)] = tensors.pop(name)
    assert_read_after(rename, saved("gemma3"), tmp_path)


def test_a_file_may_hold_a_tied_unembedding_all_the_same(saved, tmp_path):
    assert_read_after(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
                      saved("qwen3"), tmp_path)


def assert_refused(folder, *words):
    if Path(folder).is_dir():
        shutil.copy(ROOT / "tiny" / "tokenizer.json", folder)  # there is nothing wrong with it
    with pytest.raises(UserError) as error:
        load_model(str(folder), "cpu", "float32")
    for word in (str(folder), *words):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, fields", [
    ("llama", {"sliding_window": 4, "query_pre_attn_scalar": 7, "attn_logit_softcapping": 3.0, "qk_norm": True,
               "final_logit_softcapping": 2.0, "post_norms": True, "norm": "layer", "scale_embedding": True}),
    ("qwen3", {"layer_types": ["full_attention"] * 2, "sliding_window": 4, "rope_local_base_freq": 5.0}),
    ("gemma3_text", {"attn_logit_softcapping": 3.0, "norm": "layer", "learned_positions": True}),
    ("gpt2", {"rope_theta": 5.0, "qk_norm": True, "gated_mlp": True, "sliding_window": 4})])
def test_a_field_that_the_family_does_not_read_changes_nothing(name, fields, saved, tmp_path):
    edit_config(copy_checkpoint(saved(name), tmp_path), lambda raw: raw.update(fields))
    assert_same_logits(GPT.from_pretrained(tmp_path)(random_tokens()), saved(name).logits(random_tokens()))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert_same_logits(theirs(random_tokens()).logits, saved(name).logits(random_tokens()))


def test_a_sliding_layer_of_a_family_without_them_is_full(saved, tmp_path):
    fields = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4}
    edit_config(copy_checkpoint(saved("llama"), tmp_path), lambda raw: raw.update(fields))
    assert_same_logits(GPT.from_pretrained(tmp_path)(random_tokens()), saved("llama").logits(random_tokens()))


BAD_FIELDS = [  # family, fields to set, what the error must name
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights must be True"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False"),
    ("gpt2", {"n_layer": 3, "num_hidden_layers": 2}, "num_hidden_layers is given twice"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window must be False"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"rope_theta": 5.0}, "rope_theta is given twice"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling and rope_parameters"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "out of range"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": float("nan")}}, "out of range"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "out of range"),
    ("llama", {"rope_parameters": {"rope_type": None, "factor": 2.0}}, "rope scaling None is not among"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2, "original_max_position_embeddings": 8,
                                   "low_freq_factor": 4, "high_freq_factor": 4}}, "out of range"),
    ("llama", {"head_dim": 7}, "head_dim must be even"),
    ("llama", {"num_hidden_layers": 10 ** 9}, "num_hidden_layers"),
    ("llama", {"hidden_size": 2.5}, "hidden_size must be int"), ("llama", {"hidden_size": True}, "hidden_size"),
    ("llama", {"hidden_size": -32}, "hidden_size"), ("llama", {"hidden_size": "32"}, "hidden_size must be int"),
    ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps"), ("llama", {"tie_word_embeddings": "no"}, "tie_word"),
    ("gemma2", {"hidden_act": "silu"}, "hidden_act is given twice"),
    ("gemma2", {"layer_types": [["full_attention"]] * 4}, "layer_types"),
    ("gemma2", {"layer_types": 2}, "layer_types"),
    ("gemma2", {"layer_types": ["full_attention", "linear_attention"] * 2}, "linear_attention"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention must be False"),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
     "sliding_attention must have the default rope")]


@pytest.mark.parametrize("name, fields, said", BAD_FIELDS)
def test_a_config_for_another_arithmetic_or_of_the_wrong_type_is_refused(name, fields, said, saved, tmp_path):
    edit_config(copy_checkpoint(saved(name), tmp_path), lambda raw: raw.update(fields))
    assert_refused(tmp_path, "config.json", said)


BAD_CONFIGS = {  # fields to set (None: take away), and what the error must name
    "another family": ({"model_type": "mamba"}, ["mamba", "qwen3", "gemma3"]),
    "no width": ({"hidden_size": None}, ["hidden_size"]),
    "no MLP width": ({"intermediate_size": None}, ["intermediate_size"]),
    "no vocabulary": ({"vocab_size": 0}, ["vocab_size", "0"]),
    "rope type": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["yarn", "llama3"]),
    "rope field": ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, ["low_freq_factor"]),
    "activation": ({"hidden_act": "mish"}, ["hidden_act", "mish", "silu"]),
    "heads": ({"num_key_value_heads": 3}, ["num_key_value_heads", "3"]),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_config_is_refused_naming_the_field(name, saved, tmp_path):
    fields, words = BAD_CONFIGS[name]
    edit_config(copy_checkpoint(saved("llama"), tmp_path), lambda raw: [
        raw.pop(field) if value is None else raw.update({field: value}) for field, value in fields.items()])
    assert_refused(tmp_path, "config.json", *words)


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"\xff"])
def test_a_config_that_is_no_json_object_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    assert_refused(tmp_path, "config.json")


K_PROJ = "layers.1.self_attn.k_proj.weight"
BAD_WEIGHTS = {  # what to change, and what the error must name
    "a tensor missing": (lambda t: t.pop("model." + K_PROJ), [K_PROJ]),
    "no untied unembedding": (lambda t: t.pop("lm_head.weight"), ["lm_head.weight"]),
    "a wrong shape": (lambda t: t.update({"model." + K_PROJ: torch.zeros(8, 32)}), [K_PROJ, "8, 32"]),
    "an unknown tensor": (lambda t: t.update({"model.layers.0.self_attn.k_proj.bias": torch.zeros(32)}),
                          ["layers.0.self_attn.k_proj.bias"]),
    "one layer too many": (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)}),
                           ["layers.2.mlp.up_proj"]),
    "a name twice": (lambda t: t.update({"norm.weight": torch.zeros(32)}), ["norm.weight"]),
    **{f"of {dtype}": (lambda t, dtype=dtype: t.update({"model." + K_PROJ: t["model." + K_PROJ].to(dtype)}), [K_PROJ])
       for dtype in (torch.int8, torch.bool, torch.complex64)},
    **{f"with {value}": (lambda t, value=value: t["model." + K_PROJ][0].fill_(value), [K_PROJ, "finite"])
       for value in (float("nan"), float("inf"))},
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_tensors_are_refused_by_name(name, saved, tmp_path):
    change, words = BAD_WEIGHTS[name]
    edit_weights(copy_checkpoint(saved("llama"), tmp_path), change)
    assert_refused(tmp_path, *words)


def test_a_tied_unembedding_that_the_file_holds_as_another_is_refused(saved, tmp_path):
    edit_weights(copy_checkpoint(saved("qwen3"), tmp_path), lambda t: t.update(
        {"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    assert_refused(tmp_path, "tie_word_embeddings", "lm_head.weight")


def test_a_token_beyond_the_embedding_is_refused(saved):
    with pytest.raises(ValueError, match="token 97 is beyond the embedding's 97"):
        saved("llama").load()(torch.tensor([[1, 97]]))


@pytest.mark.parametrize("keep", [0, 300, -1])
def test_a_truncated_file_is_refused(keep, saved, tmp_path):
    path = copy_checkpoint(saved("llama"), tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(tmp_path)


def test_a_missing_file_of_several_is_refused_with_what_it_held(saved, tmp_path):
    saved("llama").theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    lost = min(load_file(files[1])).removeprefix("model.")
    files[1].unlink()
    assert_refused(tmp_path, "Missing key(s)", lost)


def test_two_files_with_the_same_tensor_are_refused(saved, tmp_path):
    saved("llama").theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    some = sorted(tmp_path.glob("*.safetensors"))[0]
    shutil.copy(some, tmp_path / "model-other.safetensors")
    assert_refused(tmp_path, "comes twice")


def test_a_folder_without_weights_is_refused(saved, tmp_path):
    (copy_checkpoint(saved("llama"), tmp_path) / "model.safetensors").unlink()
    assert_refused(tmp_path, "model.safetensors")


def test_reading_weights_imports_no_compiler():
    """torch's takes longer to import than a small model to load."""
    code = "import sys; from model import GPT; GPT.from_pretrained('tiny'); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr


def test_a_local_folder_is_found_without_the_hub(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it fails
    assert find_checkpoint(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "/nowhere", "a b"])
def test_a_path_that_is_no_folder_is_refused(name):
    assert_refused(name, "no such folder")


def test_a_hub_model_is_downloaded_without_pickles_and_subfolders(monkeypatch):
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **given: asked.update(given) or "")
    find_checkpoint("owner/name")
    files = ["config.json", "a.safetensors", "template.jinja", "pytorch_model.bin", "original/params.json"]
    assert list(huggingface_hub.utils.filter_repo_objects(files, **asked)) == files[:3]


def test_without_a_network_a_hub_name_is_one_line(monkeypatch, tmp_path):
    """The real huggingface_hub, in its offline mode, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert_refused("owner/name", "no such folder", "LocalEntryNotFoundError")
