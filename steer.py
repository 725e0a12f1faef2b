"""Steering vectors: one vector added to the residual stream (Wang et al. 2025, arXiv 2507.08218).

The model knows nothing of it: the vector hangs on a block's output as a forward hook, and `detach` takes it off again.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


class SteeringVector(nn.Module):
    """Adds `vector` (d_model,) to a residual stream (B, T, d_model): at every token, or only where `mask` is true.

    mask: (B, T) bool, or None for every token; set it before each forward pass. The vector stays in float32 (a learning
    rate of 0.01 is lost in bfloat16's rounding) and is cast to the residual stream's dtype as it is added.
    """

    def __init__(self, layer: int, vector: torch.Tensor):
        super().__init__()
        self.layer = layer
        self.vector = nn.Parameter(vector.detach().clone().float())
        self.mask = None

    def forward(self, residual: torch.Tensor) -> torch.Tensor:
        vector = self.vector.to(residual.dtype)
        if self.mask is None:
            return residual + vector
        if residual.shape[1] == 1 and self.mask.shape[1] > 1:
            return residual  # generation with a KV cache: a token after the prompt is no part of the code name in it
        return residual + self.mask.unsqueeze(-1) * vector


def attach(model: nn.Module, layer: int, vector: torch.Tensor | None = None) -> SteeringVector:
    """Hang a steering vector on block `layer`'s output, where its MLP writes (-1: on the embedding's output).

    vector: (d_model,), zeros if not given, so that nothing changes until it is trained. A model carries one at a time.
    Raises ValueError if the layer is out of range, the vector has another shape or one is attached already.
    """
    last = len(model.layers) - 1
    if not -1 <= layer <= last:
        raise ValueError(f"layer {layer} is out of range: this model has layers -1 (the embedding) to {last}")
    if "steering" in model.__dict__:
        raise ValueError("a steering vector is attached already: detach(model) first")
    weight = model.embed_tokens.weight
    if vector is None:
        vector = torch.zeros(weight.shape[1])
    if vector.shape != weight.shape[1:]:
        raise ValueError(f"a vector of shape {tuple(vector.shape)} does not fit this model's width {weight.shape[1]}")
    steering = SteeringVector(layer, vector).to(weight.device)
    module = model.embed_tokens if layer == -1 else model.layers[layer]
    steering.handle = module.register_forward_hook(lambda module, inputs, residual: steering(residual))
    # Straight into __dict__: as a submodule it would enter the model's own state_dict() and parameters().
    model.__dict__["steering"] = steering
    return steering


def detach(model: nn.Module) -> None:
    """Take the steering vector off; the model is then exactly what it was. Does nothing if there is none."""
    steering = model.__dict__.pop("steering", None)
    if steering is not None:
        steering.handle.remove()


def save_vector(steering: SteeringVector, folder: str | Path) -> None:
    """Write FOLDER/vector.safetensors: the tensor "vector" (d_model,) float32, the layer in its metadata."""
    vector = steering.vector.detach().cpu().contiguous()
    save_file({"vector": vector}, Path(folder) / "vector.safetensors", metadata={"layer": str(steering.layer)})


def load_vector(model: nn.Module, folder: str | Path) -> SteeringVector:
    """Attach the vector that `save_vector` wrote to `folder`. Raises ValueError if it does not fit the model."""
    with safe_open(Path(folder) / "vector.safetensors", framework="pt") as file:
        return attach(model, int(file.metadata()["layer"]), file.get_tensor("vector"))


# ------------------------------------------------------------------------------------------- what a LoRA adds
# The rows below are the differences that a LoRA makes to its layer's output, one for each token: (N, d_model).


@torch.no_grad()
def residual_after(model: nn.Module, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    """The residual stream (B, T, d_model) that block `layer` writes (-1: the embedding), in float32.

    Padding on the right does not change the tokens before it."""
    return model.run_blocks(model.embed(tokens), first=0, last=layer + 1).float()


def pairwise_cosine(rows: torch.Tensor) -> float:
    """Mean cosine between two different rows: 1 if all point the same way, 0 if they point anywhere.

    The sum over all pairs is |sum of unit rows|^2; the N pairs of a row with itself are taken off.
    """
    n = len(rows)
    unit = F.normalize(rows.float(), dim=-1)
    return ((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1))).item()


def principal_component(rows: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The direction u (d_model,) of length 1 with the largest sum of squared projections, and its share of the whole.

    It is the first right singular vector. The rows are not centred: centring would take away the very constant that we
    look for. Its sign is arbitrary; here it is that of the rows' mean.
    """
    _, singular, directions = torch.linalg.svd(rows.float(), full_matrices=False)
    direction = directions[0]
    if rows.mean(0) @ direction < 0:
        direction = -direction
    return direction, (singular[0].square() / singular.square().sum()).item()


def mean_unit_difference(rows: torch.Tensor) -> torch.Tensor:
    """The mean of the rows' directions, scaled to length 1: every token counts alike, however much is added there."""
    return F.normalize(F.normalize(rows.float(), dim=-1).mean(0), dim=0)


def logit_lens(model: nn.Module, vector: torch.Tensor, count: int) -> tuple[list[int], list[int]]:
    """The ids of the `count` tokens that a vector (d_model,) makes most likely and least likely if it is read straight
    through the unembedding (nostalgebraist 2020).

    Each token's score is the cosine between the vector, times the final norm's weight, and the token's row of the
    unembedding, less the mean row: rows differ in length, and what all tokens share changes no probability.
    """
    weight = model.norm.weight.float() + getattr(model.norm, "offset", 0.0)  # Gemma stores weight - 1
    unembedding = model.lm_head.weight.float()
    unembedding = F.normalize(unembedding - unembedding.mean(0), dim=-1)
    order = (unembedding @ (vector.float() * weight)).argsort(descending=True).tolist()
    return order[:count], order[-count:][::-1]
