"""Steering vectors: one vector added to the residual stream (Wang et al. 2025, arXiv 2507.08218).

The model has one slot for it, between two blocks; GPT.run_blocks adds it on the way.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

class SteeringVector:
    """Adds `vector` (d,) to the residual stream after block `layer` (-1: after the embedding). It stays in
    float32 (bfloat16 would lose small steps). No nn.Module: it is not among the model's own parameters."""
    def __init__(self, layer, vector):
        self.layer = layer
        self.vector = nn.Parameter(vector.detach().clone().float())

    def __call__(self, x, steered):
        """x (..., d) plus the vector: everywhere, or at a tree's nodes that are `steered` (N,) bool."""
        vector = self.vector.to(x.dtype)
        return x + vector if steered is None else x + steered[:, None] * vector

def attach(model, layer: int, vector: torch.Tensor | None = None) -> SteeringVector:
    """Put a vector (d,; default: zeros) into the slot after block `layer` (-1: after the embedding).
    ValueError: the layer is out of range, the vector does not fit or one is attached already."""
    last, weight = len(model.layers) - 1, model.embed_tokens.weight
    if not -1 <= layer <= last:
        raise ValueError(f"layer {layer} is out of range: this model has layers -1 (the embedding) to {last}")
    if model.steering is not None:
        raise ValueError("a steering vector is attached already: detach(model) first")
    vector = torch.zeros(weight.shape[1]) if vector is None else vector
    if vector.shape != weight.shape[1:] or not vector.is_floating_point() or not vector.isfinite().all():
        found = f"{tuple(vector.shape)} of {vector.dtype}"
        raise ValueError(f"the vector should be {weight.shape[1]} finite real numbers, not {found}")
    model.steering = SteeringVector(layer, vector.to(weight.device))
    return model.steering

def detach(model):
    """Clear the slot; the model is then exactly what it was."""
    model.steering = None

def save_vector(steering: SteeringVector, folder: str | Path):
    """Write FOLDER/vector.safetensors: the tensor "vector" (d,) float32, the layer in its metadata."""
    path, layer = Path(folder) / "vector.safetensors", str(steering.layer)
    save_file({"vector": steering.vector.detach().cpu().contiguous()}, path, metadata={"layer": layer})

def load_vector(model, folder: str | Path) -> SteeringVector:
    """Attach the vector that `save_vector` wrote to `folder`; ValueError if it does not fit the model."""
    with safe_open(Path(folder) / "vector.safetensors", framework="pt") as file:
        return attach(model, int(file.metadata()["layer"]), file.get_tensor("vector"))

# Rows (N, d) below: what a LoRA adds to its layer's output, at N tokens.

def pairwise_cosines(rows):
    """The cosine between any two rows, (N (N - 1) / 2,)."""
    unit = F.normalize(rows.float(), dim=-1)
    cosines = unit @ unit.T
    return cosines[torch.ones_like(cosines, dtype=torch.bool).triu(1)]

def principal_component(rows):
    """The direction (d,) of length 1 with the largest sum of squared projections, with the sign of the rows'
    mean, and its share of the whole. Centring would take away the very constant that we look for."""
    _, singular, directions = torch.linalg.svd(rows.float(), full_matrices=False)
    direction = directions[0]
    if rows.mean(0) @ direction < 0:
        direction = -direction
    return direction, (singular[0].square() / singular.square().sum()).item()

def logit_lens(model, vector, count: int) -> tuple[list[int], list[int]]:
    """The ids of the `count` tokens whose logits a vector (d,) raises and lowers most if it is read straight
    through the final norm's weight and the unembedding (nostalgebraist 2020)."""
    weight = model.norm.weight.float() + getattr(model.norm, "offset", 0.0)  # Gemma stores weight - 1
    if isinstance(model.norm, nn.LayerNorm):  # GPT-2's, which also centres
        vector = vector - vector.mean()
    order = (model.lm_head.weight.float() @ (vector.to(weight) * weight)).argsort(descending=True).tolist()
    return order[:count], order[-count:][::-1]
