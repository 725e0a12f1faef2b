"""Steering vectors: one vector added to the residual stream (Wang et al. 2025, arXiv 2507.08218).

A model has one slot for it, after the embedding or a block, and run_blocks adds it on the way:

    steering = attach(model, layer=0)       # zeros (d,), after block 0
    model(tokens)                           # with the vector at every token
    detach(model)                           # the model is exactly what it was

In a prefix tree, the other layout of texts (model.py), it is added at those tokens alone that the
tree says are steered.

Below that: what a LoRA adds to the residual stream, how constant that is, and the one vector that
stands for it; and the logit lens.
"""

from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize


class SteeringVector:
    """Adds `vector` (d,) to the residual stream after block `layer` (-1: after the embedding).

    It is kept in float32, since small steps would be lost in bfloat16. It is no nn.Module, so that
    model.parameters() and the state dict do not have it.
    """

    def __init__(self, layer: int, vector: Tensor):
        self.layer = layer
        self.vector = nn.Parameter(vector.clone().float())

    def __call__(self, x, steered):
        """x (B, T, d) or (N, d) plus the vector where `steered` (T,) or (N,) bool is True."""
        return x + steered[..., None] * self.vector.to(x.dtype)


def attach(model, layer: int, vector: Tensor | None = None) -> SteeringVector:
    """Puts a vector (d,), zeros by default, into the slot.

    It is added after block `layer` (-1: after the embedding). ValueError: the model has no such
    layer, the vector does not fit, or the slot is taken.
    """
    like = model.norm.weight  # (d,), on the model's device, as a vector has to be
    if vector is None:
        vector = torch.zeros_like(like)

    if model.steering is not None:
        raise ValueError("a steering vector is attached already: detach(model) first")
    if layer not in range(-1, len(model.layers)):
        raise ValueError(f"the model has no layer {layer}: -1 is the embedding, 0 the first block")
    if vector.shape != like.shape:  # One number alone, for example, would be added to all d.
        raise ValueError("the vector should be as wide as the residual stream")
    model.steering = SteeringVector(layer, vector.to(like.device))
    return model.steering


def detach(model):
    """Empties the slot: the model is then exactly what it was."""
    model.steering = None


def save_vector(steering: SteeringVector, folder):
    """Writes FOLDER/vector.safetensors: "vector" (d,) float32, and the layer in its metadata."""
    save_file(
        {"vector": steering.vector},
        Path(folder) / "vector.safetensors",
        metadata={"layer": str(steering.layer)},
    )


def load_vector(model, folder) -> SteeringVector:
    """Attaches the vector that save_vector wrote to the folder. ValueError if it does not fit.

    OSError or SafetensorError if the file is missing or damaged.
    """
    with safe_open(Path(folder) / "vector.safetensors", framework="pt") as file:
        layer = int(file.metadata()["layer"])
        return attach(model, layer, file.get_tensor("vector"))


# ---- what a LoRA adds


@torch.no_grad()
def what_is_added(model, parameters: list, layer: int, tokens, layout=None) -> Tensor:
    """What a LoRA adds to the residual stream after block `layer`: (B, T, d), or a tree's (N, d).

    It is the stream with the LoRA, minus the stream with zeros in its `parameters`; in float32.
    The layout says how tokens make texts (see the top of model.py); None: they are a plain batch.
    """

    def stream():
        return model.run_blocks(model.embed(tokens, layout), 0, layer + 1, layout).float()

    with_lora = stream()
    with switched_off(parameters):
        return with_lora - stream()


@contextmanager
def switched_off(parameters: list):
    """Inside of it the vector or LoRA holds zeros: the model is the base model."""
    values = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = torch.zeros_like(parameter)
    try:
        yield
    finally:
        for parameter, value in zip(parameters, values):
            parameter.data = value


def constancy(rows: Tensor) -> dict:
    """How alike rows (N, d) are: the mean cosine of every two.

    The paper takes the absolute value of each cosine (§4.2). The signed one says more: rows that
    point the same way have 1, rows that lie on one line in both directions about 0.
    """
    unit = normalize(rows, dim=-1)  # (N, d)
    two_rows = ~torch.eye(len(rows), dtype=torch.bool)  # not a row with itself
    cosines = (unit @ unit.T)[two_rows]  # (N (N - 1),): every two, twice
    return {
        "cosine": cosines.mean().item(),
        "abs_cosine": cosines.abs().mean().item(),
    }


def natural_vector(rows: Tensor) -> Tensor:
    """The main direction of rows (N, d) at their mean length: one vector (d,) instead of them all.

    Found in what a LoRA adds, it can do the LoRA's work alone: the paper's "natural" vector (§4.3).
    The direction is the one with the largest sum of squared projections, with the sign of the rows'
    mean. The rows are not centred: that would take away the very constant that we look for.
    """
    directions = torch.linalg.svd(rows, full_matrices=False).Vh
    vector = directions[0] * rows.norm(dim=-1).mean()
    return vector if (rows @ vector).sum() >= 0 else -vector


# ---- the logit lens


@torch.no_grad()
def logit_lens(model, vector: Tensor, count: int) -> list:
    """The ids of the `count` tokens whose logits a vector (d,) raises most.

    Pass -vector for those that it lowers most.

    It is read through the final norm and the unembedding alone (nostalgebraist 2020).
    """
    vector = vector.to(model.norm.weight)
    # GPT-2's norm also adds a bias, whatever the vector.
    normed = model.norm(vector) - model.norm(0 * vector)
    logits = model.lm_head(normed)  # (vocab_size,), without the cap, which keeps the order
    return logits.topk(count).indices.tolist()
