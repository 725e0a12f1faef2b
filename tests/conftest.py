"""What several test files share: the bundled model, and a tiny random model of every family."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Before torch. Models as small as these are no faster on two threads, which wait for each other
# where another program is running; the programs that tests start inherit it.
if "NANOOOCR_REAL" not in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

ROOT = Path(__file__).parent.parent

WINDOW = 8  # of the sliding layers; the texts in the tests are longer
SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = SIZE | {"num_key_value_heads": 2, "head_dim": 16}  # 4 heads of 16 on a width of 32
GEMMA = GROUPED | {"sliding_window": WINDOW, "query_pre_attn_scalar": 24}
GEMMA2 = GEMMA | {
    "num_hidden_layers": 4,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
}
GEMMA3 = GEMMA | {
    "num_hidden_layers": 6,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA3 = SIZE | {
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "rope_parameters": LLAMA3_ROPE,
}
LLAMA_BIASES = GROUPED | {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA3_WITH_VISION = {
    "text_config": GEMMA3,
    "vision_config": VISION,
    "mm_tokens_per_image": 4,
}
FAMILIES = {  # name: transformers' class for its config, and what that takes
    "gpt2": ("GPT2Config", GPT2),
    "llama": ("LlamaConfig", SIZE),
    "llama3-tied-grouped": ("LlamaConfig", LLAMA3),
    "llama-biases": ("LlamaConfig", LLAMA_BIASES),
    "qwen2": ("Qwen2Config", SIZE | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", GROUPED | {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", GEMMA2),
    "gemma3_text": ("Gemma3TextConfig", GEMMA3),
    "gemma3": ("Gemma3Config", GEMMA3_WITH_VISION),
}


class Family:
    """transformers' model in float32, and the folder that it was saved to."""

    def __init__(self, name, folder):
        import transformers

        self.name = name
        self.folder = folder
        kind, options = FAMILIES[name]
        config = getattr(transformers, kind)(**options)
        torch.manual_seed(0)
        self.theirs = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager"
        )
        self.theirs.eval()

        for parameter in self.theirs.parameters():  # large enough for every part to show
            size = 0.3 if parameter.dim() == 1 else 0.15
            parameter.data += size * torch.randn_like(parameter)
        self.theirs.save_pretrained(folder)

    def load(self, **options):
        """Our model of the same weights, loaded afresh."""
        from model import GPT

        return GPT.from_pretrained(self.folder, **options)

    def logits(self, tokens, layer=None, added=None):
        """transformers' logits; a hook adds `added` after block `layer` (-1: the embedding)."""
        if layer is None:
            return self.theirs(tokens).logits

        def hook(module, inputs, output):
            if isinstance(output, tuple):
                return (output[0] + added, *output[1:])
            return output + added

        handle = self.block(layer).register_forward_hook(hook)
        try:
            return self.theirs(tokens).logits
        finally:
            handle.remove()

    def block(self, layer):
        """transformers' module of this block; -1: the embedding."""
        if layer == -1:
            return self.theirs.get_input_embeddings()
        if self.name == "gpt2":
            return self.theirs.transformer.h[layer]
        inner = self.theirs.model
        inner = getattr(inner, "language_model", inner)
        return inner.layers[layer]


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """saved(name) -> Family, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = Family(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(params=FAMILIES)
def family(request, saved):
    """Each of the families in turn."""
    return saved(request.param)


@pytest.fixture(scope="session")
def tiny_folder():
    return ROOT / "tiny"


@pytest.fixture
def model(tiny_folder):
    """The bundled model, loaded afresh for each test that puts something on it."""
    from model import GPT

    return GPT.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def tokenizer(tiny_folder):
    from data import Tokenizer

    return Tokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def reference(tiny_folder):
    """The bundled model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture
def call(monkeypatch, capsys):
    """call(main, program, *flags) -> (exit status, stdout, stderr), run in this process."""
    from eval import run_main

    def run(main, program, *flags):
        monkeypatch.setattr(sys, "argv", [program, *map(str, flags)])
        status = 0
        try:
            run_main(main)
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return run
