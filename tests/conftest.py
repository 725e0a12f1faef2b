"""What several test files share: the bundled model, and a tiny random model of every family."""

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

WINDOW = 8  # of the sliding layers; the texts in the tests are longer
SIZE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
GROUPED = dict(SIZE, num_key_value_heads=2, head_dim=16)  # 4 heads of 16 on a width of 32
GEMMA = dict(GROUPED, sliding_window=WINDOW, query_pre_attn_scalar=24)
GEMMA3 = dict(GEMMA, num_hidden_layers=6, rope_scaling={"rope_type": "linear", "factor": 8.0})
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28,
              patch_size=14)
FAMILIES = {  # name: transformers' class for its config, and what that takes
    "gpt2": ("GPT2Config", dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=96)),
    "llama": ("LlamaConfig", SIZE),
    "llama3-tied-grouped": ("LlamaConfig", dict(SIZE, num_key_value_heads=2, tie_word_embeddings=True,
                                                rope_parameters=LLAMA3)),
    "llama-biases": ("LlamaConfig", dict(GROUPED, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5)),
    "qwen2": ("Qwen2Config", dict(SIZE, num_key_value_heads=2)),
    "qwen3": ("Qwen3Config", dict(GROUPED, tie_word_embeddings=True)),
    "gemma2": ("Gemma2Config", dict(GEMMA, num_hidden_layers=4, attn_logit_softcapping=5.0,
                                    final_logit_softcapping=3.0)),
    "gemma3_text": ("Gemma3TextConfig", GEMMA3),
    "gemma3": ("Gemma3Config", dict(text_config=GEMMA3, vision_config=VISION, mm_tokens_per_image=4)),
}


class Family:
    """transformers' model in float32, and the folder that it was saved to."""

    def __init__(self, name, folder):
        import transformers
        self.name, self.folder = name, folder
        kind, options = FAMILIES[name]
        torch.manual_seed(0)
        self.theirs = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, kind)(**options), attn_implementation="eager").eval()
        for parameter in self.theirs.parameters():  # large enough for every part to show in the logits
            parameter.data += torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.15)
        self.theirs.save_pretrained(folder)

    def load(self, **options):
        """Our model of the same weights, loaded afresh."""
        from model import GPT
        return GPT.from_pretrained(self.folder, **options)

    def logits(self, tokens, layer=None, added=None):
        """transformers' logits; a hook adds `added` to the output of block `layer` (-1: the embedding)."""
        if layer is None:
            return self.theirs(tokens).logits
        inner = getattr(self.theirs, "transformer", None) or self.theirs.model
        inner = getattr(inner, "language_model", inner)
        blocks = inner.h if hasattr(inner, "h") else inner.layers
        module = self.theirs.get_input_embeddings() if layer == -1 else blocks[layer]
        handle = module.register_forward_hook(
            lambda module, inputs, out: (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added)
        try:
            return self.theirs(tokens).logits
        finally:
            handle.remove()


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
    """call(main, program, *flags) -> (exit status, stdout, stderr) of a command line, run in this process."""
    from eval import run_main

    def run(main, program, *flags):
        monkeypatch.setattr(sys, "argv", [program, *map(str, flags)])
        status = 0
        try:
            run_main(main)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return run
