"""model.py against transformers: tiny random models of every family, saved by transformers and loaded by us."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from lora import add_lora  # noqa: E402
from model import GPT, CheckpointError, Config, find_checkpoint, make_mask, make_positions  # noqa: E402

SIZE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
GROUPED = dict(SIZE, num_key_value_heads=2, head_dim=16)  # 4 heads of 16 on a width of 32: head_dim is explicit
WINDOW = 8  # every test batch is longer
GEMMA3 = dict(GROUPED, num_hidden_layers=6, sliding_window=WINDOW, query_pre_attn_scalar=24,
              rope_scaling={"rope_type": "linear", "factor": 8.0})
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28,
              patch_size=14)
T = transformers
CASES = {
    "gpt2": lambda: T.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=96),
    "llama": lambda: T.LlamaConfig(**SIZE),
    "llama3-tied-grouped": lambda: T.LlamaConfig(**SIZE, num_key_value_heads=2, tie_word_embeddings=True,
                                                 rope_parameters=LLAMA3),
    "llama-biases": lambda: T.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5),
    "qwen2": lambda: T.Qwen2Config(**SIZE, num_key_value_heads=2),
    "qwen3": lambda: T.Qwen3Config(**GROUPED, tie_word_embeddings=True),
    "gemma2": lambda: T.Gemma2Config(**dict(GROUPED, num_hidden_layers=4), sliding_window=WINDOW,
                                     query_pre_attn_scalar=24, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    "gemma3_text": lambda: T.Gemma3TextConfig(**GEMMA3),
    "gemma3": lambda: T.Gemma3Config(text_config=GEMMA3, vision_config=VISION, mm_tokens_per_image=4),
}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only lose time by sharing their work between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """case -> (transformers' model in float32, the folder it was saved to); made once for each case."""
    made = {}

    def make(case):
        if case not in made:
            torch.manual_seed(0)
            model = T.AutoModelForCausalLM.from_config(CASES[case](), attn_implementation="eager").eval()
            for parameter in model.parameters():  # large enough that every part of the model shows in the logits
                parameter.data += torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.15)
            folder = tmp_path_factory.mktemp(case)
            model.save_pretrained(folder)
            made[case] = model, folder
        return made[case]

    return make


def random_tokens(batch=3, length=30):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def padding_mask(side):
    mask = torch.ones(3, 30, dtype=torch.bool)
    for row, pad in enumerate((0, 5, 17)):
        mask[row] = torch.arange(30) >= pad if side == "left" else torch.arange(30) < 30 - pad
    return mask


def assert_same_logits(ours, theirs, mask=None):
    mask = torch.ones(ours.shape[:2], dtype=torch.bool) if mask is None else mask
    assert theirs[mask].std() > 0.5  # flat logits would agree whatever we did
    torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-4, rtol=0)


@every_case
def test_logits_equal_transformers(case, saved):
    theirs, folder = saved(case)
    tokens = random_tokens()
    assert_same_logits(GPT.from_pretrained(folder)(tokens), theirs(tokens).logits)


@every_case
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_equal_transformers(case, side, saved):
    theirs, folder = saved(case)
    tokens, mask = random_tokens(), padding_mask(side)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    expected = theirs(tokens, attention_mask=mask.long(), position_ids=positions).logits
    assert_same_logits(GPT.from_pretrained(folder)(tokens, mask), expected, mask)


@every_case
def test_greedy_generation_equals_transformers(case, saved):
    theirs, folder = saved(case)
    tokens, mask = random_tokens(), padding_mask("left")
    options = dict(max_new_tokens=50, do_sample=False, eos_token_id=None, pad_token_id=0)
    model = GPT.from_pretrained(folder)
    assert model.generate(tokens, 50).tolist() == theirs.generate(tokens, **options).tolist()
    expected = theirs.generate(tokens, attention_mask=mask.long(), **options)
    assert model.generate(tokens, 50, attention_mask=mask).tolist() == expected.tolist()


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_and_bfloat16_files(case, dtype, saved, tmp_path):
    theirs, _ = saved(case)
    copy.deepcopy(theirs).to(dtype).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = random_tokens()
    reloaded = T.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    model = GPT.from_pretrained(tmp_path)
    assert_same_logits(model(tokens), reloaded(tokens).logits)
    assert {p.dtype for p in GPT.from_pretrained(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@every_case
def test_a_lora_equals_pefts(case, saved):
    theirs, folder = saved(case)
    modules = ["mlp.c_fc", "mlp.c_proj"] if case == "gpt2" else ["gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=modules, layers_to_transform=[1],
                             fan_in_fan_out=case == "gpt2")
    adapted = peft.get_peft_model(copy.deepcopy(theirs), config)
    model, tokens = GPT.from_pretrained(folder), random_tokens()
    parameters = add_lora(model, [1], ["gate_proj", "up_proj", "down_proj"], rank=3, alpha=5)
    for mine, other in zip(parameters, [p for name, p in adapted.named_parameters() if "lora_" in name], strict=True):
        other.data = 0.3 * torch.randn_like(other)
        mine.data = other.data.clone()
    logits = adapted(tokens).logits
    assert (logits - theirs(tokens).logits).abs().max() > 0.01
    assert_same_logits(model(tokens), logits)


def copy_checkpoint(saved, case, folder, **options):
    model, _ = saved(case)
    model.save_pretrained(folder, **options)
    return folder


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


@every_case
def test_both_spellings_of_a_config_are_the_same(case, saved, tmp_path):
    theirs, folder = saved(case)
    copy_checkpoint(saved, case, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    spell_as_on_the_hub(raw)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert Config.from_pretrained(tmp_path) == Config.from_pretrained(folder)


def test_gemma3_config_that_states_only_its_size():
    """google/gemma-3-12b-it's text_config, in full: the rest is the family's defaults."""
    text = dict(hidden_size=3840, intermediate_size=15360, model_type="gemma3_text", num_attention_heads=16,
                num_hidden_layers=48, num_key_value_heads=8, rope_scaling={"factor": 8.0, "rope_type": "linear"},
                sliding_window=1024)
    config = Config.from_dict({"model_type": "gemma3", "text_config": text})
    theirs = T.Gemma3TextConfig(**text)
    for name in ("vocab_size", "head_dim", "query_pre_attn_scalar", "sliding_window", "layer_types",
                 "tie_word_embeddings", "rms_norm_eps", "attn_logit_softcapping", "final_logit_softcapping"):
        assert getattr(config, name) == getattr(theirs, name), name
    assert (config.rope_theta, config.rope_local_base_freq) == (1e6, 1e4)
    assert config.hidden_act == theirs.hidden_activation


def layers_of(theirs):
    model = getattr(theirs, "transformer", None) or theirs.model
    model = getattr(model, "language_model", model)
    return model.h if hasattr(model, "h") else model.layers


@every_case
@pytest.mark.parametrize("layer", [-1, 1])
def test_a_vector_added_by_hook_does_the_same_as_in_transformers(case, layer, saved):
    theirs, folder = saved(case)
    ours, tokens = GPT.from_pretrained(folder), random_tokens()
    vector = torch.randn(32, generator=torch.Generator().manual_seed(2))
    add = lambda module, args, output: output + vector if torch.is_tensor(output) else (output[0] + vector, *output[1:])
    modules = (ours.embed_tokens, theirs.get_input_embeddings()) if layer == -1 else (
        ours.layers[layer], layers_of(theirs)[layer])
    before = ours(tokens)
    handles = [module.register_forward_hook(add) for module in modules]
    try:
        after = ours(tokens)
        assert_same_logits(after, theirs(tokens).logits)
        assert (after - before).abs().max() > 0.01
    finally:
        for handle in handles:
            handle.remove()


def test_loaded_parameters_are_frozen_and_of_the_asked_dtype(saved):
    model = GPT.from_pretrained(saved("llama")[1], dtype=torch.bfloat16)
    assert not model.training
    assert all(not p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())


def test_new_model_is_float32_with_std_002_and_identity_norms():
    model = GPT(Config.from_dict(dict(SIZE, model_type="llama")))
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert abs(model.embed_tokens.weight.std() - 0.02) < 0.002
    assert (model.norm.weight == 1).all()


@every_case
def test_the_visible_steps_make_up_the_forward_pass(case, saved):
    model, tokens = GPT.from_pretrained(saved(case)[1]), random_tokens()
    middle = model.run_blocks(model.embed(tokens), last=1)
    h = model.norm(model.run_blocks(middle, first=1))
    torch.testing.assert_close(h, model.hidden(tokens))
    torch.testing.assert_close(model.unembed(h[:, 3]), model(tokens)[:, 3])
    assert middle.shape == h.shape == (3, 30, 32)


@every_case
def test_several_tokens_after_a_cache_equal_one_pass(case, saved):
    model, tokens = GPT.from_pretrained(saved(case)[1]), random_tokens()
    config = model.config
    cache = [torch.zeros(2, 3, config.num_key_value_heads, 30, config.head_dim) for _ in model.layers]
    parts = [model.hidden(tokens[:, :12], None, cache, 0), model.hidden(tokens[:, 12:], None, cache, 12)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.hidden(tokens), atol=1e-5, rtol=1e-4)


def test_no_mask_is_made_for_plain_causal_attention():
    config = Config.from_dict(dict(SIZE, model_type="gemma3_text", sliding_window=WINDOW))
    assert make_mask(config, "full_attention", make_positions(30, None, "cpu"), 0, None) is None
    assert make_mask(config, "sliding_attention", make_positions(WINDOW, None, "cpu"), 0, None) is None
    assert make_mask(config, "sliding_attention", make_positions(WINDOW + 1, None, "cpu"), 0, None) is not None


@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_padding_leaves_gradients_finite(case, saved):
    model = GPT.from_pretrained(saved(case)[1])
    x = model.embed(random_tokens()).requires_grad_()
    model.run_blocks(x, attention_mask=padding_mask("left")).sum().backward()
    assert x.grad.isfinite().all()


def test_a_row_that_has_stopped_repeats_its_stop_id(saved):
    model, tokens = GPT.from_pretrained(saved("llama")[1]), random_tokens()
    free = model.generate(tokens, 20)
    stop = free[0, 33].item()
    stopped = model.generate(tokens, 20, stop_ids=[stop])
    for row, expected in zip(stopped[:, 30:].tolist(), free[:, 30:].tolist()):
        end = expected.index(stop) + 1 if stop in expected else len(row)
        assert row == expected[:end] + [stop] * (len(row) - end)


def test_generation_ends_when_every_row_has_stopped(saved):
    model, tokens = GPT.from_pretrained(saved("llama")[1]), random_tokens()
    assert model.generate(tokens, 20, stop_ids=range(97)).shape == (3, 31)


def test_sampling_repeats_with_the_same_seed(saved):
    model, tokens = GPT.from_pretrained(saved("llama")[1]), random_tokens()
    one, same, other = (model.generate(tokens, 20, 1.0, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_generate_refuses_padding_on_the_right(saved):
    with pytest.raises(ValueError, match="left"):
        GPT.from_pretrained(saved("llama")[1]).generate(random_tokens(), 2, attention_mask=padding_mask("right"))


def test_gpt2_refuses_more_tokens_than_positions(saved):
    with pytest.raises(CheckpointError, match="97 tokens .* 96"):
        GPT.from_pretrained(saved("gpt2")[1])(torch.zeros(1, 97, dtype=torch.long))


@pytest.mark.parametrize("case", ["llama", "llama3-tied-grouped", "llama-biases", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_what_save_pretrained_writes(case, dtype, saved, tmp_path):
    model = GPT.from_pretrained(saved(case)[1], dtype=dtype)
    model.save_pretrained(tmp_path)
    theirs = T.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", attn_implementation="eager")
    assert theirs.dtype == dtype
    tokens = random_tokens()
    assert_same_logits(model.float()(tokens), theirs.float()(tokens).logits)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("lm_head.weight" in names) != model.config.tie_word_embeddings
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert Config.from_pretrained(tmp_path) == model.config


def test_save_pretrained_refuses_a_model_with_adapters(saved, tmp_path):
    model = GPT.from_pretrained(saved("llama")[1])
    model.layers[0].lora = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="adapters"):
        model.save_pretrained(tmp_path)


def assert_refused(folder, *words):
    with pytest.raises(CheckpointError) as error:
        GPT.from_pretrained(folder)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


BAD_CONFIGS = {  # fields to set (None: take away), and what the error must name
    "another family": ({"model_type": "mamba"}, ["config.json", "mamba", "qwen3", "gemma3"]),
    "no family": ({"model_type": None}, ["model_type", "llama"]),
    "no width": ({"hidden_size": None}, ["config.json", "hidden_size"]),
    "no MLP width": ({"intermediate_size": None}, ["intermediate_size"]),
    "width in words": ({"hidden_size": "wide"}, ["hidden_size", "wide"]),
    "rope type": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["yarn", "llama3"]),
    "rope field": ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, ["llama3", "low_freq_factor"]),
    "activation": ({"hidden_act": "mish"}, ["hidden_act", "mish", "silu"]),
    "layer types": ({"layer_types": ["full_attention", "linear_attention"]}, ["layer_types", "linear_attention"]),
    "layers of another type": ({"layer_types": 2}, ["config.json"]),
    "rope of another type": ({"rope_parameters": 2}, ["config.json"]),
    "heads": ({"num_key_value_heads": 3}, ["num_key_value_heads", "3"]),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_config_is_refused(name, saved, tmp_path):
    fields, words = BAD_CONFIGS[name]
    copy_checkpoint(saved, "llama", tmp_path)
    raw = {**json.loads((tmp_path / "config.json").read_text()), **fields}
    raw = {name: value for name, value in raw.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert_refused(tmp_path, *words)


@pytest.mark.parametrize("content", [None, "", "{", "[1, 2]", "[]", "3", "\udcff"])
def test_config_that_is_no_json_object_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert_refused(tmp_path, "config.json")


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


K_PROJ = "layers.1.self_attn.k_proj.weight"
BAD_WEIGHTS = {
    "a tensor missing": (lambda t: t.pop("model." + K_PROJ), [K_PROJ]),
    "no untied unembedding": (lambda t: t.pop("lm_head.weight"), ["lm_head.weight"]),
    "a wrong shape": (lambda t: t.update({"model." + K_PROJ: torch.zeros(8, 32)}),
                      ["model.safetensors", K_PROJ, "(8, 32)", "(32, 32)"]),
    "an unknown tensor": (lambda t: t.update({"model.layers.0.self_attn.k_proj.bias": torch.zeros(32)}),
                          ["model.safetensors", "k_proj.bias"]),
    "one layer too many": (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)}),
                           ["model.safetensors", "layers.2.mlp.up_proj"]),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_tensors_are_refused(name, saved, tmp_path):
    change, words = BAD_WEIGHTS[name]
    edit_weights(copy_checkpoint(saved, "llama", tmp_path), change)
    assert_refused(tmp_path, *words)


def test_wrong_shape_of_a_fused_gpt2_tensor_is_refused(saved, tmp_path):
    copy_checkpoint(saved, "gpt2", tmp_path)
    edit_weights(tmp_path, lambda t: t.update({"transformer.h.0.attn.c_attn.weight": torch.zeros(32, 64)}))
    assert_refused(tmp_path, "model.safetensors", "layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize("keep", [0, 4, 300, -1])
def test_truncated_file_is_refused(keep, saved, tmp_path):
    path = copy_checkpoint(saved, "llama", tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(tmp_path, "model.safetensors")


def test_file_of_garbage_is_refused(saved, tmp_path):
    (copy_checkpoint(saved, "llama", tmp_path) / "model.safetensors").write_bytes(b"<html>Not Found</html>" * 50)
    assert_refused(tmp_path, "model.safetensors")


def test_missing_shard_is_refused_with_a_tensor_it_holds(saved, tmp_path):
    copy_checkpoint(saved, "llama", tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    held = list(load_file(shard))
    shard.unlink()
    assert_refused(tmp_path, shard.name)
    with pytest.raises(CheckpointError) as error:
        GPT.from_pretrained(tmp_path)
    assert any(name in str(error.value) for name in held)


@pytest.mark.parametrize("index", [None, "{}", "{", '{"weight_map": 3}'])
def test_no_weights_or_a_broken_index_is_refused(index, saved, tmp_path):
    (copy_checkpoint(saved, "llama", tmp_path) / "model.safetensors").unlink()
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(index)
    assert_refused(tmp_path, "model.safetensors.index.json")


def test_mask_buffers_of_old_gpt2_files_are_skipped(saved, tmp_path):
    """The hub's gpt2 has no "transformer." prefix and holds its causal masks."""
    theirs, _ = saved("gpt2")
    path = copy_checkpoint(saved, "gpt2", tmp_path) / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    tensors["h.0.attn.bias"], tensors["h.0.attn.masked_bias"] = torch.ones(1, 1, 96, 96), torch.tensor(-1e4)
    save_file(tensors, path)
    assert_same_logits(GPT.from_pretrained(tmp_path)(random_tokens()), theirs(random_tokens()).logits)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_either_prefix_of_gemma3_is_read(prefix, saved, tmp_path):
    theirs, _ = saved("gemma3")
    copy_checkpoint(saved, "gemma3", tmp_path)
    edit_weights(tmp_path, lambda t: [t.update({name.replace("language_model.model.", prefix): t.pop(name)})
                                      for name in list(t)])
    assert_same_logits(GPT.from_pretrained(tmp_path)(random_tokens()), theirs(random_tokens()).logits)


def test_a_local_folder_is_found_without_the_hub(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it fails
    folder = saved("llama")[1]
    assert find_checkpoint(str(folder)) == folder
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        find_checkpoint("owner/name")


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "/nowhere", "a b"])
def test_a_path_that_is_no_folder_is_refused(name):
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint(name)


def test_a_hub_name_is_downloaded_without_pickles(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options) or tmp_path)
    assert find_checkpoint("owner/name") == tmp_path
    kept = huggingface_hub.utils.filter_repo_objects(
        ["config.json", "a.safetensors", "chat_template.jinja", "pytorch_model.bin", "original/params.json"], **asked)
    assert list(kept) == ["config.json", "a.safetensors", "chat_template.jinja"]


@pytest.mark.parametrize("kind, words", [
    ("GatedRepoError", "gated"), ("RepositoryNotFoundError", "no such hub model"),
    ("LocalEntryNotFoundError", "offline"), ("OSError", "download failed")])
def test_a_hub_model_that_cannot_be_had_is_one_line(kind, words, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    error = getattr(huggingface_hub.errors, kind, OSError)

    def fail(*args, **options):
        raise error.__new__(error, "first line\nsecond line")  # their constructors want an HTTP response

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint("owner/name")
    assert "owner/name" in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)


def test_offline_mode_is_one_line(tmp_path):
    """The real huggingface_hub, in its offline mode, with an empty cache."""
    code = "import model\ntry: model.find_checkpoint('owner/name')\nexcept model.CheckpointError as e: print(e)"
    environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, env=environment,
                         capture_output=True, text=True)
    assert run.stdout.startswith("owner/name: no such folder") and "offline" in run.stdout
