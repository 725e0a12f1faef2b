"""model.py against transformers: random models of every family, saved by transformers."""

import copy
import json
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, WINDOW
from safetensors.torch import load_file, save_file

from model import GPT, Batch, CheckpointError, Config, find_checkpoint, read_config

LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
K_PROJ = "model.layers.1.self_attn.k_proj.weight"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def random_tokens(length=30):
    return torch.randint(1, 97, (3, length), generator=torch.Generator().manual_seed(1))


def assert_same_logits(ours, theirs):
    assert theirs.std() > 0.5  # flat logits would agree whatever we did
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def load_theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


# ---- the decoder


def test_logits_equal_transformers(family):
    assert_same_logits(family.load()(random_tokens()), family.logits(random_tokens()))


def test_blocks_can_be_run_in_two_parts(family):
    model = family.load()
    tokens = random_tokens()
    x = model.run_blocks(model.embed(tokens), 0, 1)
    x = model.run_blocks(x, 1)
    assert torch.equal(model.unembed(model.norm(x)), model(tokens))


def test_a_plain_batch_is_its_own_layout(saved):
    model = saved("gpt2").load()
    tokens = random_tokens()
    assert torch.equal(model(tokens, Batch(tokens)), model(tokens))


def test_only_sliding_layers_whose_window_is_too_short_take_a_mask(saved, monkeypatch):
    masks = []
    attend = F.scaled_dot_product_attention

    def record(q, k, v, mask, **options):
        masks.append(mask is not None)
        return attend(q, k, v, mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    model = saved("gemma3_text").load()  # whose last layer of six does not slide
    model(random_tokens(WINDOW))
    model(random_tokens(WINDOW + 1))
    assert masks == 6 * [False] + 5 * [True] + [False]


def test_gpt2_takes_no_more_tokens_than_it_has_positions(saved):
    model = saved("gpt2").load()
    assert model(torch.zeros(1, 96, dtype=torch.long)).shape == (1, 96, 97)
    with pytest.raises(IndexError):
        model(torch.zeros(1, 97, dtype=torch.long))


def test_loaded_parameters_are_frozen_and_of_the_dtype_asked_for(saved):
    model = saved("llama").load(dtype=torch.bfloat16)
    assert not model.training
    for parameter in model.parameters():
        assert parameter.dtype == torch.bfloat16
        assert not parameter.requires_grad


def test_loading_imports_no_compiler():
    """torch's takes longer to import than a small model to load."""
    code = "import sys; from model import GPT; GPT.from_pretrained('tiny');"
    code += "print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr


# ---- what is read from a checkpoint


def copy_checkpoint(family, folder):
    return shutil.copytree(family.folder, folder, dirs_exist_ok=True)


def set_fields(family, folder, fields):
    """A copy of the checkpoint with these fields in its config.json; ... takes one away."""
    path = copy_checkpoint(family, folder) / "config.json"
    raw = json.loads(path.read_text()) | fields
    raw = {name: value for name, value in raw.items() if value is not ...}
    path.write_text(json.dumps(raw))
    return folder


def change_weights(family, folder, change):
    """A copy of the checkpoint after change(tensors)."""
    path = copy_checkpoint(family, folder) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def save_in_two(family, folder, added=0.0):
    """Two shards with an index, `added` to each number, beside a config.json."""
    tensors = load_file(copy_checkpoint(family, folder) / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for shard, part in zip(SHARDS, (names[::2], names[1::2])):
        save_file({name: tensors[name] + added for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


def assert_as_saved(folder, family):
    ours = GPT.from_pretrained(folder)(random_tokens())
    assert_same_logits(ours, family.logits(random_tokens()))


def test_bfloat16_files_in_shards_equal_transformers(family, tmp_path):
    halved = copy.deepcopy(family.theirs).to(torch.bfloat16)
    halved.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    theirs = load_theirs(tmp_path)(random_tokens()).logits
    assert_same_logits(GPT.from_pretrained(tmp_path)(random_tokens()), theirs)


def test_a_shard_that_the_index_does_not_name_is_not_read(saved, tmp_path):
    save_in_two(saved("llama"), tmp_path)
    tensors = load_file(tmp_path / SHARDS[0])
    stale = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(stale, tmp_path / "model-00001-of-00003.safetensors")
    assert_as_saved(tmp_path, saved("llama"))


def test_a_whole_file_goes_before_shards(saved, tmp_path):
    save_in_two(saved("llama"), tmp_path, added=1.0)
    copy_checkpoint(saved("llama"), tmp_path)
    assert_as_saved(tmp_path, saved("llama"))


def test_mask_buffers_of_old_gpt2_files_are_skipped(saved, tmp_path):
    """The hub's gpt2 has no "transformer." prefix and holds its causal masks."""

    def make_old(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 96, 96, dtype=torch.uint8)
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)

    change_weights(saved("gpt2"), tmp_path, make_old)
    assert_as_saved(tmp_path, saved("gpt2"))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_either_prefix_of_gemma3_is_read(prefix, saved, tmp_path):
    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("language_model.model.", prefix)] = tensors.pop(name)

    change_weights(saved("gemma3"), tmp_path, rename)
    assert_as_saved(tmp_path, saved("gemma3"))


def test_a_file_may_hold_a_tied_unembedding_all_the_same(saved, tmp_path):
    def add_head(tensors):
        tensors[HEAD] = tensors[EMBEDDING].clone()

    change_weights(saved("qwen3"), tmp_path, add_head)
    assert_as_saved(tmp_path, saved("qwen3"))
    model = GPT.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.embed_tokens.weight


def spell_as_on_the_hub(text):
    """Rewrites what transformers 5 saved to the spelling of nearly all checkpoints on the hub."""
    rope = text.pop("rope_parameters", {})
    local = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)
    if rope:
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    if local:
        text["rope_local_base_freq"] = local["rope_theta"]
    text.pop("layer_types", None)


def test_both_spellings_of_a_config_are_the_same(family):
    raw = json.loads((family.folder / "config.json").read_text())
    config = read_config(raw)
    assert config == Config.from_pretrained(family.folder)
    spell_as_on_the_hub(raw.get("text_config", raw))
    assert read_config(raw) == config


def test_a_gemma3_config_may_state_only_its_size():
    """google/gemma-3-12b-it's text_config, in full: the rest is the family's defaults."""
    text = {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "model_type": "gemma3_text",
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = read_config({"model_type": "gemma3", "text_config": text})
    theirs = transformers.Gemma3TextConfig(**copy.deepcopy(text))
    for name in (
        "vocab_size",
        "head_dim",
        "query_pre_attn_scalar",
        "sliding_window",
        "tie_word_embeddings",
        "rms_norm_eps",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ):
        assert getattr(config, name) == getattr(theirs, name), name
    assert list(config.layer_types) == theirs.layer_types
    assert config.hidden_act == theirs.hidden_activation
    assert config.rope_theta == 1e6
    assert config.rope_local_base_freq == 1e4
    assert config.rope_scaling == {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_a_context_that_is_not_stated_is_the_familys(family):
    theirs = transformers.CONFIG_MAPPING[family]()
    names = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
    raw = {"model_type": family} | {name: getattr(theirs, name) for name in names}
    assert read_config(raw).max_position_embeddings == theirs.max_position_embeddings


# Fields that a family does not read, or that another field in the file goes before.
WITHOUT_EFFECT = {
    "gpt2": {
        "rope_theta": 5.0,
        "qk_norm": True,
        "gated_mlp": True,
        "sliding_window": 4,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "llama": {
        "rope_theta": 5.0,
        "layer_types": ["sliding_attention"] * 2,
        "sliding_window": 4,
        "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
        "qk_norm": True,
        "post_norms": True,
        "layer_norm": True,
        "scale_embedding": True,
    },
    "qwen2": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"sliding_window": 4, "rope_local_base_freq": 5.0, "norm_offset": 1.0},
    "gemma2": {"hidden_act": "silu", "sliding_window_pattern": 4, "rope_local_base_freq": 5.0},
    "gemma3_text": {
        "attn_logit_softcapping": 3.0,
        "layer_norm": True,
        "learned_positions": True,
        "rope_theta": 5.0,
    },
}


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_a_field_that_the_family_does_not_read_changes_nothing(name, saved, tmp_path):
    set_fields(saved(name), tmp_path, WITHOUT_EFFECT[name])
    assert_as_saved(tmp_path, saved(name))
    theirs = load_theirs(tmp_path)(random_tokens()).logits
    assert_same_logits(theirs, saved(name).logits(random_tokens()))


WITH_EFFECT = [
    ("gpt2", {"num_attention_heads": 2}),  # beside n_head 4
    ("gpt2", {"activation_function": "silu"}),
    ("llama", {"rope_scaling": LINEAR}),  # beside rope_parameters
    ("llama", {"rope_parameters": ..., "rope_theta": 50.0}),
    ("llama", {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("llama", {"rope_parameters": ..., "rope_scaling": LLAMA3}),
    ("gemma2", {"attn_logit_softcapping": None}),  # null is off
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": 6, "attn_logit_softcapping": 2.0}),
    ("gemma2", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
    ("gemma3_text", {"final_logit_softcapping": 2.0}),
    ("gemma3_text", {"rope_scaling": LINEAR}),
    ("gemma3_text", {"layer_types": ["full_attention"] * 6}),
    ("gemma3_text", {"layer_types": ..., "sliding_window_pattern": 2}),
]


@pytest.mark.parametrize("name, fields", WITH_EFFECT)
def test_an_edited_config_is_read_as_transformers_reads_it(name, fields, saved, tmp_path):
    set_fields(saved(name), tmp_path, fields)
    ours = GPT.from_pretrained(tmp_path)(random_tokens())
    assert_same_logits(ours, load_theirs(tmp_path)(random_tokens()).logits)
    assert not torch.allclose(ours, saved(name).logits(random_tokens()), atol=1e-3)


def test_null_means_the_default_but_no_window_where_it_says_the_window(saved, tmp_path):
    fields = {"head_dim": None, "query_pre_attn_scalar": None, "sliding_window": None}
    config = Config.from_pretrained(set_fields(saved("gemma2"), tmp_path, fields))
    assert config.head_dim == 256
    assert config.query_pre_attn_scalar == 256
    assert config.sliding_window is None


# ---- what is refused


def assert_refused(folder, *words):
    with pytest.raises(CheckpointError) as error:
        GPT.from_pretrained(folder)
    for word in words:
        assert word in str(error.value)


REFUSED = [  # family, fields to set, what the error must name
    ("llama", {"model_type": "mamba"}, ["model_type", "mamba", "qwen3", "gemma3"]),
    ("llama", {"model_type": ...}, ["model_type"]),
    ("llama", {"vocab_size": ...}, ["vocab_size"]),
    ("llama", {"hidden_size": None}, ["hidden_size"]),
    ("llama", {"num_hidden_layers": ...}, ["num_hidden_layers"]),
    ("llama", {"num_attention_heads": ...}, ["num_attention_heads"]),
    ("gpt2", {"n_embd": ...}, ["hidden_size"]),
    ("llama", {"hidden_act": "mish"}, ["hidden_act", "mish", "silu"]),
    ("gpt2", {"activation_function": "relu"}, ["hidden_act", "relu"]),
    ("gemma2", {"hidden_activation": "gelu"}, ["hidden_activation", "gelu"]),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
    ("gpt2", {"scale_attn_weights": False}, ["scale_attn_weights"]),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
    ("qwen2", {"use_sliding_window": True}, ["use_sliding_window"]),
    ("gemma2", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
    ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        ["partial_rotary_factor"],
    ),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["yarn", "llama3"]),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_type", "dynamic"]),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, ["factor"]),
    ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": None}}, ["low_freq_factor"]),
    (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": LINEAR}},
        ["sliding_attention", "linear"],
    ),
    ("gemma2", {"layer_types": ["full_attention"] * 3}, ["layer_types"]),
    ("gemma2", {"layer_types": ["full_attention", "linear_attention"] * 2}, ["linear_attention"]),
]


@pytest.mark.parametrize("name, fields, words", REFUSED)
def test_a_config_for_another_arithmetic_is_refused(name, fields, words, saved, tmp_path):
    set_fields(saved(name), tmp_path, fields)
    assert_refused(tmp_path, "config.json", *words)


@pytest.mark.parametrize(
    "fields", [{"intermediate_size": ...}, {"num_key_value_heads": 3}, {"head_dim": 7}]
)
def test_sizes_that_the_tensors_do_not_have_are_refused(fields, saved, tmp_path):
    set_fields(saved("llama"), tmp_path, fields)
    assert_refused(tmp_path, str(tmp_path), "size mismatch")


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff", b"version https://git-lfs"])
def test_a_config_that_is_no_json_object_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    assert_refused(tmp_path, str(tmp_path / "config.json"))


def test_a_config_may_begin_with_a_byte_order_mark(saved, tmp_path):
    path = copy_checkpoint(saved("llama"), tmp_path) / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert Config.from_pretrained(tmp_path) == Config.from_pretrained(saved("llama").folder)


BAD_WEIGHTS = {  # tensors to set (None takes one away), and what the error must name
    "a tensor missing": ({K_PROJ: None}, ["layers.1.self_attn.k_proj.weight"]),
    "no embedding": ({EMBEDDING: None}, ["embed_tokens.weight"]),
    "no unembedding": ({HEAD: None}, [HEAD]),
    "another shape": ({K_PROJ: torch.zeros(8, 32)}, ["layers.1.self_attn.k_proj", "8, 32"]),
    "an unknown tensor": ({"model.layers.0.mlp.up_proj.bias": torch.zeros(48)}, ["up_proj.bias"]),
    "a scalar": ({"model.scale": torch.tensor(1.0)}, ["scale"]),
    "one layer more": ({"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)}, ["layers.2"]),
    "integers": ({K_PROJ: torch.zeros(32, 32, dtype=torch.int8)}, ["model.safetensors", K_PROJ]),
    "truth values": ({K_PROJ: torch.zeros(32, 32, dtype=torch.bool)}, [K_PROJ]),
    "complex numbers": ({K_PROJ: torch.zeros(32, 32, dtype=torch.complex64)}, [K_PROJ]),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_tensors_are_refused_by_name(name, saved, tmp_path):
    changes, words = BAD_WEIGHTS[name]

    def change(tensors):
        tensors |= changes
        for key in [key for key, tensor in tensors.items() if tensor is None]:
            del tensors[key]

    change_weights(saved("llama"), tmp_path, change)
    assert_refused(tmp_path, str(tmp_path), *words)


def test_a_tied_unembedding_that_the_file_holds_as_another_is_refused(saved, tmp_path):
    def add_head(tensors):
        tensors[HEAD] = tensors[EMBEDDING] + 1

    change_weights(saved("qwen3"), tmp_path, add_head)
    assert_refused(tmp_path, str(tmp_path), "tie_word_embeddings", HEAD)


def test_a_tied_model_without_an_embedding_is_refused(saved, tmp_path):
    change_weights(saved("qwen3"), tmp_path, lambda tensors: tensors.pop(EMBEDDING))
    assert_refused(tmp_path, str(tmp_path), "embed_tokens.weight")


@pytest.mark.parametrize("keep", [0, 300, -1])
def test_a_truncated_file_is_refused(keep, saved, tmp_path):
    path = copy_checkpoint(saved("llama"), tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(tmp_path, str(path))


def test_a_missing_shard_is_refused_by_its_name(saved, tmp_path):
    save_in_two(saved("llama"), tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    assert_refused(tmp_path, str(tmp_path / SHARDS[1]))


def test_a_pickle_has_to_be_converted(saved, tmp_path):
    path = copy_checkpoint(saved("llama"), tmp_path) / "model.safetensors"
    path.rename(tmp_path / "pytorch_model.bin")
    assert_refused(tmp_path, str(path), "pytorch_model.bin", "converted")


# ---- where a checkpoint is


def test_tiny_and_local_folders_are_found_without_the_hub(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it fails
    assert find_checkpoint("tiny") == ROOT / "tiny"
    assert find_checkpoint(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "/nowhere", "a b"])
def test_a_path_that_is_no_folder_is_refused(name):
    assert_refused(name, name, "no such folder")


def test_a_hub_model_is_downloaded_without_pickles_and_subfolders(monkeypatch):
    asked = {}

    def download(name, **given):
        asked.update(given)
        return "folder"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert str(find_checkpoint("owner/name")) == "folder"
    wanted = ["config.json", "a.safetensors", "template.jinja"]
    others = ["pytorch_model.bin", "original/params.json"]
    kept = huggingface_hub.utils.filter_repo_objects(wanted + others, **asked)
    assert list(kept) == wanted


def test_without_a_network_a_hub_name_is_refused(monkeypatch, tmp_path):
    """The real huggingface_hub, in its offline mode, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert_refused("owner/name", "owner/name", "no such folder", "hub")
