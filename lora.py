"""LoRA: low-rank updates of frozen linear layers (Hu et al. 2021, arXiv 2106.09685).

    parameters = add_lora(model, layers=[0], modules=["up_proj", "down_proj"], rank=8, alpha=8)
    ...                                     # train these parameters, then:
    save_lora(model, folder)                # in PEFT's format
    remove_lora(model)                      # the model is exactly what it was; or
    merge_lora(model)                       # the LoRA becomes part of its weights

First comes the layer, then where it is put; PEFT's files come last.
"""

import fnmatch
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


class LoRALinear(nn.Module):
    """base(x) + alpha / rank * B A x, for x (..., in); the result (..., out) has the base's dtype.

    A's weight (rank, in) is random and B's (out, rank) zero, so that at first nothing changes. Both
    are kept in float32, since small steps would be lost in bfloat16.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = base
        self.alpha = alpha
        self.scale = alpha / rank
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        # No random numbers are drawn for what becomes zero anyway.
        self.lora_B = nn.utils.skip_init(nn.Linear, rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.to(base.weight.device)  # A was drawn on the CPU, so it is the same on every device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update = self.scale * self.lora_B(self.lora_A(x.float()))
        return self.base(x) + update.to(x.dtype)


def add_lora(model, layers: list, modules: list, rank: int, alpha: float) -> list:
    """Puts a LoRA on the linear layers of these names in these blocks; returns each A and B.

    ValueError: there is no such layer or module, PEFT's format has no place for it (GPT-2's q_proj,
    k_proj and v_proj are one module there, c_attn), or the model has a LoRA already.
    """
    names = []
    for layer in layers:
        for module in modules:
            found = fnmatch.filter(linear_names(model), f"layers.{layer}.*.{module}")
            if not found or "c_attn" in peft_name(model, found[0]):
                raise ValueError(
                    f"a LoRA cannot sit on {module} of layer {layer}: there is no such module, "
                    "or it is only a part of GPT-2's c_attn"
                )
            names += found
    return wrap(model, names, rank, alpha)


def wrap(model, names, rank, alpha):
    """Puts a LoRA on the linear layers of these full names; returns each A and B.

    They are in the model's order.
    """
    if lora_layers(model):
        raise ValueError("the model has a LoRA already: remove_lora(model) first")
    for name in dict.fromkeys(names):  # each once
        model.set_submodule(name, LoRALinear(model.get_submodule(name), rank, alpha))
    return list(peft_tensors(model).values())


def linear_names(model):
    """The full names of the linear layers in the model's blocks, with or without a LoRA."""
    return [name for name, _ in model.named_modules() if name.endswith("_proj")]


def lora_layers(model) -> dict:
    """The LoRA layers of a model by their names, e.g. "layers.0.mlp.down_proj"."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def remove_lora(model):
    """Puts the original linear layers back: the model is then exactly what it was."""
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.base)


@torch.no_grad()
def merge_lora(model):
    """Adds alpha / rank * B A to each wrapped weight and unwraps it: there is no way back."""
    for layer in lora_layers(model).values():
        layer.base.weight += layer.scale * layer.lora_B.weight @ layer.lora_A.weight
    remove_lora(model)


# ---- PEFT's files

# PEFT names modules as Hugging Face's code does, and so do we, but for these.
PEFT_NAMES = {
    "gpt2": {
        "layers": "transformer.h",
        "self_attn.q_proj": "attn.c_attn",
        "self_attn.k_proj": "attn.c_attn",
        "self_attn.v_proj": "attn.c_attn",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    },
    "gemma3": {"layers": "model.language_model.layers"},
}
OTHER_FAMILIES = {"layers": "model.layers"}
# Options of adapter_config.json that do not change what a LoRA adds, or that we read. All others
# have to be off, or to have a known value.
HARMLESS = (
    "r lora_alpha "  # are read
    "target_modules exclude_modules layers_to_transform layers_pattern bias "  # the tensors tell
    "base_model_name_or_path revision task_type auto_mapping peft_version "
    "lora_dropout inference_mode fan_in_fan_out megatron_core qalora_group_size"
).split()
KNOWN_VALUES = {
    "peft_type": ["LORA"],
    "init_lora_weights": [True, "gaussian", "orthogonal", "eva"],
}


def peft_name(model, name):
    """PEFT's name: layers.0.mlp.up_proj is transformer.h.0.mlp.c_fc in GPT-2."""
    for ours, theirs in PEFT_NAMES.get(model.config.model_type, OTHER_FAMILIES).items():
        name = name.replace(ours, theirs)
    return name


def peft_tensors(model) -> dict:
    """A and B of every LoRA layer by their names in PEFT's files, in the model's order."""
    return {
        f"base_model.model.{peft_name(model, name)}": parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


def save_lora(model, folder):
    """Writes adapter_config.json and adapter_model.safetensors as PEFT does."""
    wrapped = lora_layers(model)
    first = next(iter(wrapped.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": first.lora_A.out_features,
        "lora_alpha": first.alpha,
        "target_modules": [peft_name(model, name) for name in wrapped],
        "fan_in_fan_out": model.config.model_type == "gpt2",  # whose Conv1D stores (in, out)
    }
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(peft_tensors(model), Path(folder) / "adapter_model.safetensors")


def load_lora(model, folder) -> list:
    """Adds the LoRA that save_lora or PEFT wrote to the folder; returns each A and B.

    ValueError names what does not fit the model, or what would make PEFT compute another sum; it is
    an OSError or SafetensorError if a file is missing or the weights are damaged. The model is then
    as it was.
    """
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    rank, alpha = read_options(config)
    if not tensors:
        raise ValueError("adapter_model.safetensors has no tensors")

    names = [
        name
        for name in linear_names(model)
        if f"base_model.model.{peft_name(model, name)}.lora_A.weight" in tensors
    ]
    parameters = wrap(model, names, rank, alpha)

    ours = peft_tensors(model)
    for name in ours | tensors:
        if not fits(ours.get(name), tensors.get(name)):
            remove_lora(model)
            raise ValueError(f"adapter_model.safetensors does not fit this model at {name}")
        ours[name].data.copy_(tensors[name])
    return parameters


def fits(parameter, tensor):
    """Are both there, of the same shape, and is the tensor of finite real numbers?"""
    if parameter is None or tensor is None or parameter.shape != tensor.shape:
        return False
    return tensor.is_floating_point() and tensor.isfinite().all()


def read_options(config):
    """(rank, alpha) of adapter_config.json, unless it asks for what we would compute otherwise.

    PEFT always writes both as numbers; anything else is Python's KeyError or TypeError.
    """
    for option, value in config.items():
        allowed = option in HARMLESS or value in KNOWN_VALUES.get(option, [])
        if value and not allowed:
            raise ValueError(f"adapter_config.json: {option} is {value!r}, which is not supported")
    return config["r"], config["lora_alpha"]
