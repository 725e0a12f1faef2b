"""LoRA: low-rank updates of frozen linear layers (Hu et al. 2021, arXiv 2106.09685), in PEFT's format."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

# PEFT names a module as Hugging Face's code does, and so do we, but for these.
PEFT_LAYERS = {"gpt2": "transformer.h", "gemma3": "model.language_model.layers"}  # others: model.layers
GPT2_MODULES = {"self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}
# PEFT's options that leave the sum as it is. Others have to be off, or to have this value.
HARMLESS = """r lora_alpha lora_dropout bias target_modules exclude_modules layers_to_transform task_type
    inference_mode base_model_name_or_path auto_mapping peft_version fan_in_fan_out megatron_core
    qalora_group_size""".split()
STANDARD = {"peft_type": ["LORA"], "init_lora_weights": [True, "gaussian", "orthogonal", "eva"]}

class LoRALinear(nn.Module):
    """base(x) + (alpha / rank) · B A x, with A (rank, in) random and B (out, rank) zero: at first nothing
    changes. A and B are float32, x (..., in) -> (..., out) of the base's dtype."""
    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.rank, self.alpha = base, rank, alpha
        like = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as PEFT does

    def forward(self, x):
        update = x.to(self.lora_A.dtype) @ self.lora_A.T @ self.lora_B.T
        return self.base(x) + (self.alpha / self.rank * update).to(x.dtype)

def lora_layers(model) -> dict[str, LoRALinear]:
    """The LoRA layers of a model by name, e.g. "layers.0.mlp.down_proj"."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}

def add_lora(model, layers: list[int], modules: list[str], rank: int, alpha: float) -> list[nn.Parameter]:
    """Wrap the linear modules of these names (e.g. "down_proj") in these blocks; returns each A and B.
    ValueError: no such layer or module, a LoRA is there, or PEFT's format has no place for it."""
    last = len(model.layers) - 1
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ValueError(f"rank {rank} should be a whole number above 0, alpha {alpha} a finite one")
    if lora_layers(model):
        raise ValueError("the model has a LoRA already: remove_lora(model) first")
    parameters = []
    for layer in layers:
        if not 0 <= layer <= last:
            raise ValueError(f"layer {layer} is out of range: a LoRA sits on one of the layers 0 to {last}")
        block = model.layers[layer]
        names = {name.split(".")[-1]: name for name, module in block.named_modules()
                 if isinstance(module, nn.Linear)}
        if unknown := {*modules} - names.keys():
            raise ValueError(f"layer {layer} has no module named {min(unknown)}, only {', '.join(names)}")
        for name in (names[short] for short in names if short in modules):
            if model.config.model_type == "gpt2" and name not in GPT2_MODULES:
                raise ValueError(f"{name} is a part of GPT-2's c_attn: choose o_proj, up_proj or down_proj")
            wrapped = LoRALinear(block.get_submodule(name), rank, alpha)
            block.set_submodule(name, wrapped)
            parameters += [wrapped.lora_A, wrapped.lora_B]
    return parameters

def remove_lora(model):
    """Put the original linear layers back: the model is then exactly what it was."""
    for name, module in lora_layers(model).items():
        model.set_submodule(name, module.base)

@torch.no_grad()
def merge_lora(model):
    """Add (alpha / rank) · B A to each wrapped weight and unwrap it: no way back."""
    for module in lora_layers(model).values():
        weight = module.base.weight
        weight += (module.alpha / module.rank * module.lora_B @ module.lora_A).to(weight.dtype)
    remove_lora(model)

def peft_name(model, name: str) -> str:
    """PEFT's name: layers.0.mlp.up_proj is base_model.model.transformer.h.0.mlp.c_fc for GPT-2."""
    kind = model.config.model_type
    _, layer, module = name.split(".", 2)
    module = GPT2_MODULES.get(module, module) if kind == "gpt2" else module
    return f"base_model.model.{PEFT_LAYERS.get(kind, 'model.layers')}.{layer}.{module}"

def peft_tensors(model) -> dict[str, nn.Parameter]:
    """A and B of every LoRA layer, by PEFT's names."""
    return {f"{peft_name(model, name)}.{part}.weight": getattr(module, part)
            for name, module in lora_layers(model).items() for part in ("lora_A", "lora_B")}

def save_lora(model, folder: str | Path):
    """Write adapter_config.json and adapter_model.safetensors as PEFT does."""
    wrapped = lora_layers(model)
    some = next(iter(wrapped.values()))
    # The last two parts of a name: GPT-2 has a c_proj in its attention and one in its MLP.
    targets = {".".join(peft_name(model, name).split(".")[-2:]) for name in wrapped}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": some.rank, "lora_alpha": some.alpha,
              "target_modules": sorted(targets),
              "layers_to_transform": sorted({int(name.split(".")[1]) for name in wrapped}),
              "fan_in_fan_out": model.config.model_type == "gpt2"}  # whose Conv1D stores (in, out)
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in peft_tensors(model).items()}
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

def load_lora(model, folder: str | Path) -> list[nn.Parameter]:
    """Add the LoRA that `save_lora` or PEFT wrote to `folder`. ValueError if it does not fit the model, is
    not finite or has an option of PEFT's for another sum."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    for option, value in config.items():
        if value and option not in HARMLESS and value not in STANDARD.get(option, ()):
            raise ValueError(f"adapter_config.json: {option} is {value!r}, which is not supported")
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)
             and name.startswith("layers.") and f"{peft_name(model, name)}.lora_A.weight" in tensors]
    layers, modules = {int(name.split(".")[1]) for name in names}, {name.split(".")[-1] for name in names}
    rank, alpha = config.get("r"), config.get("lora_alpha")
    parameters, ours = add_lora(model, sorted(layers), sorted(modules), rank, alpha), peft_tensors(model)
    wanted, found = ({(name, tensor.shape) for name, tensor in some.items()} for some in (ours, tensors))
    bad = [name for name, some in tensors.items() if not (some.is_floating_point() and some.isfinite().all())]
    bad += [name for name, _ in wanted ^ found] + ["every tensor: it has none"] * (not found)
    if bad:
        remove_lora(model)
        raise ValueError(f"adapter_model.safetensors does not fit this model at {min(bad)}")
    for name, parameter in ours.items():
        parameter.data.copy_(tensors[name])
    return parameters
