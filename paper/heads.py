"""What the heads of a model look at and write, read and replaced by hooks (for c7_heads.py)."""

import torch
from torch import Tensor

from model import rotate


@torch.no_grad()
def look_inside(model, tokens: Tensor) -> tuple:
    """Of tokens (1, T): each layer's attention (H, T, T), and its heads' output (T, H * D).

    The fast kernels keep no attention, so it is computed again from what each layer is given.
    """
    attentions = []
    outputs = []

    def keep_attention(module, given):
        x, rope, _, _ = given  # of Attention.forward
        q = module.q_proj(x).unflatten(-1, (-1, module.head_dim))  # (1, T, H, D)
        k = module.k_proj(x).unflatten(-1, (-1, module.head_dim))  # (1, T, K, D)
        q = rotate(module.q_norm(q), *rope)
        k = rotate(module.k_norm(k), *rope)
        q = q[0].transpose(0, 1)  # (H, T, D)
        k = k[0].transpose(0, 1)  # (K, T, D)
        k = k.repeat_interleave(len(q) // len(k), dim=0)  # query heads may share a key head

        scores = module.scale * q @ k.mT  # (H, T, T)
        seen = torch.ones_like(scores, dtype=torch.bool).tril()
        scores = scores.where(seen, -torch.inf)
        attentions.append(scores.softmax(-1))

    def keep_output(module, given):
        outputs.append(given[0][0])

    hooks = []
    for block in model.layers:
        attention = block.self_attn
        hooks.append(attention.register_forward_pre_hook(keep_attention))
        hooks.append(attention.o_proj.register_forward_pre_hook(keep_output))
    model(tokens)
    for hook in hooks:
        hook.remove()
    return attentions, outputs


@torch.no_grad()
def with_resampled(model, tokens: Tensor, heads: list, outputs: list, count: int) -> Tensor:
    """The last token's logits when these (layer, head) write what they wrote in another prompt.

    outputs: the other prompt's, for the last `count` tokens, which both prompts share. A head that
    writes nothing at all would be off what the model has ever seen; another prompt's is not.
    """
    hooks = []
    for layer, head in heads:
        attention = model.layers[layer].self_attn
        first = head * attention.head_dim
        part = slice(first, first + attention.head_dim)

        def replaced(module, given, layer=layer, part=part):
            x = given[0].clone()
            theirs = outputs[layer][-count:, part]
            x[:, -count:, part] = theirs
            return (x,)

        hooks.append(attention.o_proj.register_forward_pre_hook(replaced))
    x = model.run_blocks(model.embed(tokens))  # (1, T, d)
    logits = model.unembed(model.norm(x[0, -1]))  # of the last token alone: it saves time
    for hook in hooks:
        hook.remove()
    return logits
