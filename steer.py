"""Steering vectors: one vector added to the residual stream (Wang et al. 2025, arXiv 2507.08218).

The model has one slot for it, between two blocks; GPT.run_blocks adds it on the way. Below: how constant what
a LoRA adds is, to be compared with such a vector, and how a vector reads in the unembedding.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

class SteeringVector:
    """Adds `vector` (d,) to the residual stream after block `layer` (-1: after the embedding).

    It stays in float32 (a learning rate of 0.01 is lost in bfloat16's rounding) and is cast as it is added.
    No nn.Module, so that it does not enter the parameters and the state_dict of the model it is attached to.
    """

    def __init__(self, layer, vector):
        self.layer = layer
        self.vector = nn.Parameter(vector.detach().clone().float())

    def __call__(self, x, steered):
        """x (..., d) plus the vector: everywhere, or of a tree's (N, d) at the nodes `steered` (N,) bool."""
        vector = self.vector.to(x.dtype)
        return x + vector if steered is None else x + steered[:, None] * vector

def attach(model, layer: int, vector: torch.Tensor | None = None) -> SteeringVector:
    """Put a vector (d,; default: zeros) into the model's slot after block `layer` (-1: after the embedding).
    ValueError if the layer is out of range, the vector has another shape or one is attached already."""
    last, weight = len(model.layers) - 1, model.embed_tokens.weight
    if not -1 <= layer <= last:
        raise ValueError(f"layer {layer} is out of range: this model has layers -1 (the embedding) to {last}")
    if model.steering is not None:
        raise ValueError("a steering vector is attached already: detach(model) first")
    if vector is None:
        vector = torch.zeros(weight.shape[1])
    if vector.shape != weight.shape[1:]:
        raise ValueError(f"a vector of shape {tuple(vector.shape)} does not fit the width {weight.shape[1]}")
    model.steering = SteeringVector(layer, vector.to(weight.device))
    return model.steering

def detach(model) -> None:
    """Clear the slot; the model is then exactly what it was."""
    model.steering = None

def save_vector(steering: SteeringVector, folder: str | Path) -> None:
    """Write FOLDER/vector.safetensors: the tensor "vector" (d,) float32, the layer in its metadata."""
    path, layer = Path(folder) / "vector.safetensors", str(steering.layer)
    save_file({"vector": steering.vector.detach().cpu().contiguous()}, path, metadata={"layer": layer})

def load_vector(model, folder: str | Path) -> SteeringVector:
    """Attach the vector that `save_vector` wrote to `folder`; ValueError if it does not fit the model."""
    with safe_open(Path(folder) / "vector.safetensors", framework="pt") as file:
        return attach(model, int(file.metadata()["layer"]), file.get_tensor("vector"))

# The rows below are the differences that a LoRA makes to its layer's output, one for each token: (N, d).

def pairwise_cosines(rows):
    """The cosine between any two different rows, (N (N - 1) / 2,): 1 if they point the same way."""
    unit = F.normalize(rows.float(), dim=-1)
    cosines = unit @ unit.T
    return cosines[torch.ones_like(cosines, dtype=torch.bool).triu(1)]

def principal_component(rows):
    """The direction (d,) of length 1 with the largest sum of squared projections, and its share of the whole.

    It is the first right singular vector. The rows are not centred: centring would take away the very
    constant that we look for. Its sign is arbitrary; here it is that of the rows' mean.
    """
    _, singular, directions = torch.linalg.svd(rows.float(), full_matrices=False)
    direction = directions[0]
    if rows.mean(0) @ direction < 0:
        direction = -direction
    return direction, (singular[0].square() / singular.square().sum()).item()

def logit_lens(model, vector, count: int) -> tuple[list[int], list[int]]:
    """The ids of the `count` tokens that a vector (d,) makes most and least likely if it is read straight
    through the unembedding (nostalgebraist 2020). A token's score is the cosine between the vector, times the
    final norm's weight, and the token's row of the unembedding, less the mean row: rows differ in length, and
    what all tokens share changes no probability."""
    weight = model.norm.weight.float() + getattr(model.norm, "offset", 0.0)  # Gemma stores weight - 1
    unembedding = model.lm_head.weight.float()
    unembedding = F.normalize(unembedding - unembedding.mean(0), dim=-1)
    order = (unembedding @ (vector.float() * weight)).argsort(descending=True).tolist()
    return order[:count], order[-count:][::-1]
