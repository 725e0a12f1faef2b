"""One decoder for GPT-2, Llama, Qwen 2 and 3, Gemma 2 and 3, read from a Hugging Face checkpoint.

The residual stream comes in two layouts. A plain batch is (B, T, d): B texts of T tokens, d numbers
for each. A prefix tree (data.py) is (N, d): what several texts begin with is there once, as a node.

    question 0    <b> How far is Rome ?      <b>(0)─How(1)─far(2)─is(3)─┬─Rome(4)──?(5)
    question 1    <b> How far is Cairo ?                                └─Cairo(6)─?(7)

    (N, d)  ── unfold ──►   0 1 2 3 4 5      (R, T, d): every question in a row of its own
                            0 1 2 3 6 7
    (N, d)  ◄── fold ────   every node once: its copies in several rows hold the same numbers

Linear layers, norms and MLPs look at one token at a time and take either layout. Attention alone
looks from one token to another: it unfolds its queries, keys and values and folds what comes out.
In a plain batch every text is a row already, and both do nothing. If a question has several
answers, its row is a tree itself: the prompt, then branch after branch, what answers begin with
alike only once. There make_mask hides each branch from the others.

Scoring reads W of a tree's nodes, those that predict an answer's token. So the last block is given
tree.only(those): fold() leaves them alone of the attention's output, keep() of the stream, and the
MLP runs on W nodes, not on N.

Letters in shapes: B texts, T tokens in the longest or in a row, d hidden size, D head size, H query
heads, K key and value heads; of a prefix tree (data.py) N nodes, R rows, W nodes that are kept, A
tokens in the longest answer.
"""

import json
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass
class Config:
    """The shape of a decoder, in config.json's names where it has one. The defaults are Llama's."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int  # fewer than query heads: grouped-query attention
    head_dim: int
    intermediate_size: int  # the width inside an MLP
    layer_types: list  # "full_attention" or "sliding_attention", one for each layer
    rope_scaling: dict  # {}, or what Llama 3.1 ("llama3") and Gemma 3 ("linear") need
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False  # is the unembedding the embedding?
    rms_norm_eps: float = 1e-6  # also of GPT-2's layer norms
    layer_norm: bool = False  # GPT-2; all others have RMS norms
    norm_offset: float = 0.0  # Gemma: 1.0, since its files hold a norm's weight - 1
    gated_mlp: bool = True  # all but GPT-2
    learned_positions: bool = False  # GPT-2; all others turn queries and keys by rope
    qkv_bias: bool = False  # Qwen 2: of the query, key and value projections
    attention_bias: bool = False  # of all four of the attention's projections; always in GPT-2
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen 3, Gemma 3: norm each query and key head
    post_norms: bool = False  # Gemma: also norm what attention and MLP add to the stream
    scale_embedding: bool = False  # Gemma: embeddings times sqrt(hidden_size)
    rope_theta: float = 10000.0
    rope_local_base_freq: float | None = None  # Gemma 3: the rope_theta of its sliding layers
    sliding_window: int | None = None  # tokens that a sliding layer sees, itself included
    query_pre_attn_scalar: float | None = None  # Gemma: scores times this ** -0.5, not D ** -0.5
    attn_logit_softcapping: float | None = None  # Gemma 2: scores become cap * tanh(scores / cap)
    final_logit_softcapping: float | None = None  # Gemma 2: the same for the logits

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Config":
        """Reads folder/config.json; CheckpointError if it asks for what we do not have."""
        return read_config(read_json(Path(folder) / "config.json"))


class GPT(nn.Module):
    """The decoder. GPT(config) has random weights, GPT.from_pretrained those of a checkpoint."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.steering = None  # the slot for a steering vector: see steer.attach

        d = config.hidden_size
        self.embed_tokens = make_embedding(config.vocab_size, d)
        if config.learned_positions:
            self.embed_positions = make_embedding(config.max_position_embeddings, d)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(d, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def run_blocks(self, x: Tensor, first: int = 0, stop: int | None = None, layout=None) -> Tensor:
        """Runs blocks first to stop - 1 (None: to the end) on the residual stream x.

        x is (B, T, d), or (N, d) with its tree as the layout; with tree.only() (W, d) comes out of
        the last block, or is given if no block is left. A steering vector of layer L is added
        where layout.steered is True, between block L and block L + 1: run_blocks(x, 0, L + 1) ends
        before it, and run_blocks(x, L + 1) begins with it. One after the last block is added if
        stop is None.
        """
        end = len(self.layers) if stop is None else stop
        layout = layout or Batch(x)
        config = self.config
        views = {}  # the rope and the mask of each type of layer
        for layer_type in set(config.layer_types):
            rope = make_rope(config, layer_type, layout.positions, x.dtype)
            mask = make_mask(config, layer_type, layout)
            views[layer_type] = rope, mask

        for index in range(first, end):
            x = self.steer(x, index - 1, layout.steered)
            view = views[config.layer_types[index]]
            x = self.layers[index](x, *view, layout)

        if stop is None:
            # Of a tree from only() just the nodes that are kept are left in x.
            x = self.steer(x, end - 1, layout.keep(layout.steered))
        return x

    def steer(self, x, layer, steered):
        """Adds the steering vector to the stream x after block `layer`, if it belongs there.

        Whoever wants vectors at several layers replaces this method.
        """
        if self.steering is None or self.steering.layer != layer:
            return x
        return self.steering(x, steered)

    def forward(self, tokens: Tensor, layout=None) -> Tensor:
        """Logits (B, T, vocab_size) of tokens (B, T) int64; (N, vocab_size) of a tree's (N,)."""
        x = self.embed(tokens, layout)
        x = self.run_blocks(x, layout=layout)
        return self.unembed(self.norm(x))

    def embed(self, tokens: Tensor, layout=None) -> Tensor:
        """The residual stream (B, T, d) or (N, d) before block 0."""
        x = self.embed_tokens(tokens)
        if self.config.scale_embedding:
            # In the model's dtype, as Gemma was trained: sqrt(3584) = 59.87 is 59.75 in bfloat16.
            x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)
        if self.config.learned_positions:
            layout = layout or Batch(tokens)
            x = x + self.embed_positions(layout.positions)
        return x

    def unembed(self, h: Tensor) -> Tensor:
        """Logits (..., vocab_size) of h (..., d), the stream after the final norm."""
        logits = self.lm_head(h)
        cap = self.config.final_logit_softcapping
        if cap:
            logits = cap * torch.tanh(logits / cap)
        return logits

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        shard: bool = False,
    ) -> "GPT":
        """The frozen model of a folder or a hub name; "tiny" is the one that comes with the code.

        shard splits its blocks over torchrun's processes. CheckpointError names the file, field or
        tensor that does not fit.
        """
        folder = find_checkpoint(name_or_dir)
        config = Config.from_pretrained(folder)
        with torch.device("meta"):  # shapes only: the weights come from the file
            model = cls(config)
        tensors = load_tensors(folder, "cpu" if shard else device, dtype)
        if config.tie_word_embeddings:  # some files hold the unembedding all the same
            tensors.setdefault("lm_head.weight", tensors.get("embed_tokens.weight"))

        with blame(folder, RuntimeError):  # torch names what is missing or of another shape
            model.load_state_dict(tensors, assign=True)
        if config.tie_word_embeddings:
            require(
                torch.equal(model.lm_head.weight, model.embed_tokens.weight),
                f"{folder}: tie_word_embeddings is true, but lm_head.weight is another",
            )
            model.lm_head.weight = model.embed_tokens.weight  # assign=True has untied them

        model.requires_grad_(False).eval()
        if shard:
            model.shard_blocks(device)
        return model

    def shard_blocks(self, device):
        """FSDP2: each process keeps a part of every block, and gathers the rest when it runs."""
        from torch.distributed import get_world_size, init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(torch.device(device).type, (get_world_size(),))
        for block in self.layers:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        self.to(device)


class Batch:
    """The layout of a plain batch of texts (B, T). A prefix tree (data.py) has all this, too."""

    def __init__(self, x):
        """x: the tokens (B, T) or their stream (B, T, d)."""
        self.positions = self.depth = torch.arange(x.shape[1], device=x.device)  # (T,)
        self.steered = self.positions >= 0  # everywhere, in all texts
        self.branches = False  # every token sees all that stand before it in its row

    def unfold(self, x):
        """Every text in a row of its own, for attention."""
        return x

    fold = unfold  # the way back
    keep = unfold  # what comes out of a block: all of x, but for PrefixTree.only


class Block(nn.Module):
    """Adds the attention's and the MLP's output to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = make_norm(config)
        # In Gemma the norm after the attention; elsewhere, in spite of its name, before the MLP.
        self.post_attention_layernorm = make_norm(config)
        self.post_norms = config.post_norms
        if config.post_norms:
            self.pre_feedforward_layernorm = make_norm(config)
            self.post_feedforward_layernorm = make_norm(config)

    def forward(self, x, rope, mask, layout):
        attended = self.self_attn(self.input_layernorm(x), rope, mask, layout)
        # All of x; in the one block that runs a tree from only(), the W nodes that fold() left.
        x = layout.keep(x)
        if self.post_norms:
            x = x + self.post_attention_layernorm(attended)
            written = self.mlp(self.pre_feedforward_layernorm(x))
            return x + self.post_feedforward_layernorm(written)

        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Causal self-attention, with grouped queries (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias or config.qkv_bias
        self.q_proj = nn.Linear(d, queries, bias)
        self.k_proj = nn.Linear(d, keys, bias)
        self.v_proj = nn.Linear(d, keys, bias)
        self.o_proj = nn.Linear(queries, d, config.attention_bias)

        self.head_dim = config.head_dim
        self.softcap = config.attn_logit_softcapping
        self.scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        self.q_norm = make_norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, config.head_dim) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, mask, layout):
        heads = (-1, self.head_dim)
        q = self.q_norm(self.q_proj(x).unflatten(-1, heads))  # (B, T, H, D) or (N, H, D)
        k = self.k_norm(self.k_proj(x).unflatten(-1, heads))  # (B, T, K, D) or (N, K, D)
        v = self.v_proj(x).unflatten(-1, heads)  # the same
        if rope is not None:
            q = rotate(q, *rope)
            k = rotate(k, *rope)

        q = layout.unfold(q).transpose(1, 2)  # (B or R, H, T, D)
        k = layout.unfold(k).transpose(1, 2)  # (B or R, K, T, D)
        v = layout.unfold(v).transpose(1, 2)
        if self.softcap:
            y = self.attend_softly_capped(q, k, v, mask)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
            )

        y = y.transpose(1, 2).flatten(2)  # (B or R, T, H * D)
        return self.o_proj(layout.fold(y))

    def attend_softly_capped(self, q, k, v, mask):
        """Gemma 2's attention by hand: scaled_dot_product_attention cannot cap the scores."""
        group = q.shape[1] // k.shape[1]  # query heads that share a key head
        k = k.repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
        scores = q @ k.mT * self.scale
        scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.where(mask, -math.inf)
        weights = scores.softmax(-1, dtype=torch.float32)
        return weights.to(v.dtype) @ v


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (SwiGLU: Shazeer 2020, arXiv 2002.05202); GPT-2 has no gate."""

    def __init__(self, config):
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, inner, config.mlp_bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(d, inner, config.mlp_bias)
        self.down_proj = nn.Linear(inner, d, config.mlp_bias)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        inner = self.up_proj(x)
        if self.gate_proj is None:
            inner = self.act(inner)
        else:
            inner = self.act(self.gate_proj(x)) * inner
        return self.down_proj(inner)


gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size, eps, offset):
        super().__init__()
        self.eps = eps
        self.offset = offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))

    def forward(self, x):
        weight = self.weight.float() + self.offset
        return F.rms_norm(x.float(), x.shape[-1:], weight, self.eps).to(x.dtype)


def make_norm(config, size=None):
    """A norm of the residual stream, or (with size = head_dim) of query and key heads."""
    size = size or config.hidden_size
    if config.layer_norm:
        return nn.LayerNorm(size, config.rms_norm_eps)
    return RMSNorm(size, config.rms_norm_eps, config.norm_offset)


def make_embedding(count, size):
    """An nn.Embedding, but uniform: normal numbers on the meta device cost a second of start-up.

    A checkpoint replaces the numbers, and tiny/make.py draws its own.
    """
    weight = torch.empty(count, size).uniform_(-1, 1)
    return nn.Embedding.from_pretrained(weight, freeze=False)


def make_rope(config, layer_type, positions, dtype):
    """cos and sin, (T or N, 1, D) each, of rotary position embedding.

    Elements i and i + D/2 of a head turn together by the angle position * theta ** (-2 i / D)
    (Su et al. 2021, arXiv 2104.09864). None for GPT-2, which has learned positions instead.
    """
    if config.learned_positions:
        return None
    theta, scaling = config.rope_theta, config.rope_scaling
    if layer_type == "sliding_attention" and config.rope_local_base_freq:
        theta, scaling = config.rope_local_base_freq, None
    even = torch.arange(0, config.head_dim, 2, device=positions.device)
    frequency = 1.0 / theta ** (even / config.head_dim)  # (D/2,)
    if scaling:
        frequency = slow_down(frequency, scaling)

    # In float32: bfloat16 has 8 bits of precision and would round position 257 to 256.
    angles = positions[:, None, None].float() * frequency.repeat(2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def slow_down(frequency, scaling):
    """Longer contexts than those of the first training: the pairs turn slower by a factor.

    "linear" slows all of them down; "llama3" only those that seldom turn within the first context.
    """
    slow = frequency / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slow
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low = scaling["low_freq_factor"]
    unslowed = ((turns - low) / (scaling["high_freq_factor"] - low)).clamp(0, 1)
    return torch.lerp(slow, frequency, unslowed)


def rotate(x, cos, sin):
    """Turns the pairs (i, i + D/2) of every head in x (..., heads, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def make_mask(config, layer_type, layout):
    """True where token i of a row sees token j: (T, T) bool, or (R, 1, T, T) of a tree.

    None where plain causal attention will do (never with soft capping, which is done by hand).
    Padding stands at a row's end, where no real token looks; it sees itself.
    """
    depth = layout.depth  # (T,), or (R, 1, T) of a tree: a token's position in its text
    window = depth.shape[-1]
    if layer_type == "sliding_attention":
        window = config.sliding_window or window
    if not (layout.branches or window < depth.shape[-1] or config.attn_logit_softcapping):
        return None

    distance = depth[..., None] - depth[..., None, :]  # how far token j stands before token i
    # A row is depth first: after token j come its descendants, up to the first token that is no
    # deeper than j. Column j counts such tokens after j, as far as token i: in data.PrefixTree's
    # drawing 17 is no deeper than 16, so it does not see it.
    same_branch = (distance <= 0).tril(-1).cumsum(-2) == 0
    return (same_branch & (distance < window)).tril()  # nothing that stands after it


# ---- loading a checkpoint


class CheckpointError(ValueError):
    """A checkpoint that is not there, is damaged, or is of a kind that we would read wrongly."""


def require(condition, message):
    if not condition:
        raise CheckpointError(message)


@contextmanager
def blame(source, *expected):
    """The expected errors in here are the fault of `source`, a file or folder."""
    try:
        yield
    except expected as error:
        raise CheckpointError(f"{source}: {error}") from error


def find_checkpoint(name_or_dir: str | Path) -> Path:
    """The folder of a model: tiny's, a folder as it is, or one fetched from the hub by its name."""
    if name_or_dir == "tiny":
        return Path(__file__).parent / "tiny"
    folder = Path(name_or_dir).expanduser()
    if folder.is_dir():
        return folder

    from huggingface_hub import snapshot_download  # here, since it takes a while to import

    # There is no such name, it is gated, or the network is not there.
    with blame(f"{name_or_dir}: no such folder, and from the hub", OSError, ValueError):
        return Path(
            snapshot_download(
                str(name_or_dir),
                allow_patterns=["*.json", "*.jinja", "*.safetensors"],  # no pickles
                ignore_patterns="*/*",  # nothing in subfolders
            )
        )


def read_json(path: Path) -> dict:
    """The object in a JSON file; CheckpointError names the file that is not there or holds none."""
    with blame(path, OSError, ValueError, TypeError):
        return dict(json.loads(path.read_bytes()))


def load_tensors(folder, device, dtype):
    """{our name: tensor}, on the device and in the dtype."""
    tensors = {}
    for path in checkpoint_files(folder):
        with blame(f"{path}: damaged, or git-lfs's pointer to it", OSError, SafetensorError):
            stored = load_file(path)  # mapped to memory: nothing is read before it is copied

        for key, tensor in stored.items():
            if re.search(UNUSED, key):
                continue
            require(tensor.is_floating_point(), f"{path}: {key} should hold real numbers")
            tensors |= translate(key, tensor.to(device, dtype, copy=True))
    return tensors


def checkpoint_files(folder):
    """The weights' only file, or those that the index names."""
    whole = folder / "model.safetensors"
    if whole.exists():
        return [whole]
    index = folder / "model.safetensors.index.json"
    require(
        index.exists(), f"{whole} is missing; a pytorch_model.bin must be converted to it first"
    )
    return {folder / name for name in read_json(index)["weight_map"].values()}


# Tensors to skip: GPT-2's masks, rope's tables, and what Gemma 3 looks at pictures with.
UNUSED = r"vision_tower|multi_modal_projector|rotary_emb|\.attn\.(masked_)?bias$"
OUR_NAMES = {  # pattern: what replaces it, in this order
    r"^(language_model\.model|model\.language_model|language_model|transformer|model)\.": "",
    r"^h\.": "layers.",
    r"^wte": "embed_tokens",
    r"^wpe": "embed_positions",
    r"^ln_f": "norm",
    r"\.ln_1": ".input_layernorm",
    r"\.ln_2": ".post_attention_layernorm",
    r"\.attn\.c_attn": ".self_attn.qkv_proj",
    r"\.attn\.c_proj": ".self_attn.o_proj",
    r"\.mlp\.c_fc": ".mlp.up_proj",
    r"\.mlp\.c_proj": ".mlp.down_proj",
}


def translate(name, tensor):
    """{our name: tensor} of a tensor: three for GPT-2's queries, keys and values in one."""
    if ".c_" in name:
        tensor = tensor.t().contiguous()  # GPT-2's Conv1D stores (inputs, outputs)
    for theirs, ours in OUR_NAMES.items():
        name = re.sub(theirs, ours, name)

    if "qkv_proj" not in name:
        return {name: tensor}
    return {name.replace("qkv", part): rows for part, rows in zip("qkv", tensor.chunk(3))}


# ---- reading config.json
#
# The file leaves out what is at its family's default (DEFAULTS) and does not say how the family is
# built (BUILT). Besides model_type, layer_types and those of rope, a field that is neither in READ
# nor in the family's DEFAULTS is not read, as in transformers; what would change the arithmetic and
# is not implemented is refused.

READ = [  # the fields that are read for every family; the first four must be there
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "tie_word_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "hidden_act",
]
GEMMA = {
    "vocab_size": 256000,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "final_logit_softcapping": None,
    "max_position_embeddings": 8192,
}
GEMMA3 = GEMMA | {
    "max_position_embeddings": 131072,
    "vocab_size": 262208,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window_pattern": 6,  # every sixth layer sees all tokens
}
DEFAULTS = {  # a family's defaults; a field that is here is read, too
    "gpt2": {
        "hidden_act": "gelu_new",
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
    },
    "llama": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {"max_position_embeddings": 32768},
    "qwen3": {"attention_bias": False, "head_dim": 128, "max_position_embeddings": 32768},
    "gemma2": GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": GEMMA3,
    "gemma3": GEMMA3,  # the model with pictures, of which we read the text part
}
LIKE_GEMMA = {
    "hidden_act": "gelu_pytorch_tanh",
    "norm_offset": 1.0,
    "post_norms": True,
    "scale_embedding": True,
}
LIKE_GEMMA3 = LIKE_GEMMA | {"qk_norm": True}
BUILT = {  # how a family is built, whatever the file says
    "gpt2": {
        "layer_norm": True,
        "gated_mlp": False,
        "learned_positions": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma2": LIKE_GEMMA | {"sliding_window_pattern": 2},
    "gemma3_text": LIKE_GEMMA3,
    "gemma3": LIKE_GEMMA3,
}
OTHER_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "rms_norm_eps",
    "activation_function": "hidden_act",  # up to here GPT-2's
    "type": "rope_type",  # in older files
}
# null means "off" here, and "the default" elsewhere.
NULL_IS_OFF = ["attn_logit_softcapping", "final_logit_softcapping", "sliding_window"]
ROPES = {  # what each kind needs
    "default": [],
    "linear": ["rope_type", "factor"],
    "llama3": [
        "rope_type",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ],
}
IMPLEMENTED = {  # all that we have, of what a file may ask for
    "hidden_act": ACTIVATIONS,
    "hidden_activation": ["gelu_pytorch_tanh"],  # Gemma's, which does not read hidden_act
    "rope_type": ROPES,
    "partial_rotary_factor": [1.0],
    "use_sliding_window": [False],
    "use_bidirectional_attention": [False],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "quantization_config": [None],
}


def read_config(raw):
    """The Config of a config.json's content; CheckpointError names the field that does not fit."""
    family = raw.get("model_type")
    require_one_of("model_type", family, BUILT)
    raw = DEFAULTS[family] | flatten(raw)
    for name, known in IMPLEMENTED.items():
        if name in raw:
            require_one_of(name, raw[name], known)

    of_rope = ROPES[raw.get("rope_type", "default")]
    missing = {*READ[:4], *of_rope} - raw.keys()
    require(not missing, f"config.json: without {missing}")

    read = {name: raw[name] for name in [*READ, *DEFAULTS[family]] if name in raw}
    fields = read | BUILT[family]
    fields["rope_scaling"] = {name: raw[name] for name in of_rope}
    heads, d = fields["num_attention_heads"], fields["hidden_size"]
    fields.setdefault("num_key_value_heads", heads)
    fields.setdefault("head_dim", d // heads)
    fields.setdefault("intermediate_size", 4 * d)  # where this is wrong, the tensors do not fit

    layers = fields["num_hidden_layers"]
    every = fields.pop("sliding_window_pattern", 1)
    pattern = ["sliding_attention"] * (every - 1) + ["full_attention"]
    types = raw.get("layer_types", (pattern * layers)[:layers])
    require(
        len(types) == layers and {*types} <= {"sliding_attention", "full_attention"},
        f"config.json: layer_types must be full_attention or sliding_attention, for each of "
        f"num_hidden_layers; they are {types}",
    )
    return Config(family, layer_types=types, **fields)


def require_one_of(name, value, known):
    require(value in known, f"config.json: {name} must be one of {[*known]}, not {value!r}")


def flatten(raw):
    """The fields by our names and all at the top: also those of text_config and those about rope.

    The hub's files have rope_theta and rope_scaling; transformers 5 writes rope_parameters, for
    Gemma 3 one for each type of layer. Null stands for a default, with three exceptions.
    """
    raw = raw | raw.get("text_config", {})
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    raw |= rope.get("full_attention", rope)
    sliding = rope.get("sliding_attention")
    if sliding:
        require_one_of("sliding_attention's rope_type", sliding["rope_type"], ["default"])
        raw["rope_local_base_freq"] = sliding["rope_theta"]

    return {
        OTHER_NAMES.get(name, name): value
        for name, value in raw.items()
        if value is not None or name in NULL_IS_OFF
    }
