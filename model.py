"""One decoder for GPT-2, Llama, Qwen 2 and 3, Gemma 2 and 3, read straight from a Hugging Face checkpoint.

The families differ in few places, and each difference is a field of Config. Shapes: B rows, T columns, d
hidden_size, H query heads, K key/value heads, D head_dim; N nodes of a prefix tree (data.py), in which what
several texts begin with is there once. Linear layers and norms work on (N, d) as on (B, T, d): only attention
has to know which node follows which, and lays the nodes out as texts while it works.
"""
import json
import math
import re
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

# What a config.json leaves unsaid: the family's structure, and the defaults that its authors rely on.
GEMMA = dict(norm="rms_plus_one", post_norms=True, scale_embedding=True, tie_word_embeddings=True,
             hidden_act="gelu_pytorch_tanh", num_attention_heads=8, num_key_value_heads=4, head_dim=256,
             query_pre_attn_scalar=256, sliding_window=4096)
GEMMA3 = dict(GEMMA, global_every=6, vocab_size=262208, qk_norm=True, rope_theta=1e6,
              rope_local_base_freq=1e4)
FAMILIES = {
    "gpt2": dict(norm="layer", gated_mlp=False, learned_positions=True, attention_bias=True, mlp_bias=True,
                 tie_word_embeddings=True, hidden_act="gelu_new", rms_norm_eps=1e-5,
                 max_position_embeddings=1024),
    "llama": dict(),
    "qwen2": dict(attention_bias=True, attention_out_bias=False),
    "qwen3": dict(qk_norm=True, head_dim=128),
    "gemma2": dict(GEMMA, global_every=2, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    "gemma3_text": GEMMA3,
    "gemma3": GEMMA3,  # of which only the text part is read
}
OTHER_NAMES = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
               "n_inner": "intermediate_size", "n_positions": "max_position_embeddings",
               "layer_norm_epsilon": "rms_norm_eps", "activation_function": "hidden_act",  # so far GPT-2
               "hidden_activation": "hidden_act", "sliding_window_pattern": "global_every"}  # Gemma
# Switches that would change the result; and fields where null means "none", not "the default".
REFUSED = ("quantization_config", "use_sliding_window", "use_bidirectional_attention",
           "scale_attn_by_inverse_layer_idx")
NULLABLE = "attn_logit_softcapping", "final_logit_softcapping", "sliding_window"
gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_new": gelu_tanh, "gelu_pytorch_tanh": gelu_tanh}
ROPES = {"default": (), "linear": ("factor",),  # and the fields that each needs
         "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}

def require(condition, message):
    if not condition:
        raise ValueError(message)

@dataclass
class Config:
    """The shape of a decoder, in config.json's names where it has one."""
    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int | None = None  # GPT-2: 4 * hidden_size
    num_key_value_heads: int | None = None  # fewer than the query heads: grouped-query attention
    head_dim: int | None = None  # Qwen 3, Gemma: need not be hidden_size / num_attention_heads
    max_position_embeddings: int = 2048  # a limit only with learned positions
    tie_word_embeddings: bool = False  # lm_head is the embedding: GPT-2, Gemma, small Llamas and Qwens
    hidden_act: str = "silu"  # GPT-2, Gemma: gelu
    gated_mlp: bool = True  # all but GPT-2
    norm: str = "rms"  # "rms_plus_one": Gemma; "layer": GPT-2
    rms_norm_eps: float = 1e-6
    post_norms: bool = False  # Gemma: also norm what attention and MLP add
    qk_norm: bool = False  # Qwen 3, Gemma 3: norm each query and key head
    attention_bias: bool = False  # on q, k, v: GPT-2, Qwen 2
    attention_out_bias: bool | None = None  # on o: GPT-2
    mlp_bias: bool = False  # GPT-2
    learned_positions: bool = False  # GPT-2; all others: rope
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3.1 and later ("llama3"), Gemma 3 ("linear")
    rope_local_base_freq: float | None = None  # Gemma 3: rope_theta of the sliding layers, which do not scale
    layer_types: list | None = None  # of "full_attention" or, in Gemma only, "sliding_attention"
    global_every: int = 1  # without layer_types: every so-manieth layer has full attention
    sliding_window: int | None = None  # Gemma: tokens that a sliding layer sees, the current one included
    query_pre_attn_scalar: float | None = None  # Gemma: scores are scaled by this ** -0.5, not D ** -0.5
    attn_logit_softcapping: float | None = None  # Gemma 2: scores become cap * tanh(scores / cap)
    final_logit_softcapping: float | None = None  # Gemma 2: and so do the logits
    scale_embedding: bool = False  # Gemma: embeddings times sqrt(d)

    def __post_init__(self):
        """Checks each field against its type above (ValueError names one at fault); fills in what follows."""
        for field in fields(self):
            value = getattr(self, field.name)
            kind = field.type | int if field.type in (float, float | None) else field.type
            good = isinstance(value, kind) and (type(value) is not bool or field.type in (bool, bool | None))
            good &= type(value) not in (int, float) or 0 < value < 2 ** 53  # in none of them 0 means anything
            kind = getattr(field.type, "__name__", field.type)
            require(good, f"{field.name} must be of type {kind} and, if a number, above 0, not {value!r}")
        layers, heads = range(1, self.num_hidden_layers + 1), self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or heads
        self.head_dim = self.head_dim or self.hidden_size // heads
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        if self.intermediate_size is None and self.model_type == "gpt2":
            self.intermediate_size = 4 * self.hidden_size
        if self.layer_types is None:
            self.layer_types = [f"{'sliding' if i % self.global_every else 'full'}_attention" for i in layers]
        require(self.intermediate_size, "intermediate_size is missing")
        act, groups, types = self.hidden_act, self.num_key_value_heads, self.layer_types
        require(act in ACTIVATIONS, f"hidden_act {act!r} is not among {[*ACTIVATIONS]}")
        require(heads % groups == 0, f"num_key_value_heads {groups} must divide {heads} heads")
        require(len(types) == len(layers) and {*types} <= {"full_attention", "sliding_attention"},
                f"layer_types must be full_attention or sliding_attention for each layer, not {types}")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Config":
        """Reads folder/config.json, in the hub's usual spelling or transformers 5's."""
        return cls.from_dict(dict(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))))

    @classmethod
    def from_dict(cls, raw: dict) -> "Config":
        """The same from the content of a config.json. ValueError names a field that is not supported."""
        kind = raw.get("model_type")
        require(kind in FAMILIES, f"model_type {kind!r} is not among {[*FAMILIES]}")
        raw = {**raw, **(raw.get("text_config") or {})}  # gemma3's section on its text part
        for name in REFUSED:
            require(not raw.get(name), f"{name} is set, which is not supported")
        raw = {OTHER_NAMES.get(name, name): value for name, value in {**raw, **read_rope(raw)}.items()}
        names = [field.name for field in fields(cls)]
        given = {k: v for k, v in raw.items() if k in names and (v is not None or k in NULLABLE)}
        return cls(**{**FAMILIES[kind], **given, "model_type": kind})  # its TypeError names what is missing

def read_rope(raw):
    """Config's three rope fields, from the hub's spelling or from transformers 5's rope_parameters."""
    new = raw.get("rope_parameters") or {}  # Gemma 3 has one for each layer type
    local = new.get("sliding_attention") or {}
    scaling = new.get("full_attention", new) or raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    require(kind in ROPES, f"rope scaling {kind!r} is not among {[*ROPES]}")
    used = {"rope_type": kind, **{name: float(scaling[name]) for name in ROPES[kind]}}
    return {"rope_theta": scaling.get("rope_theta", raw.get("rope_theta")),
            "rope_scaling": used if ROPES[kind] else None,
            "rope_local_base_freq": local.get("rope_theta", raw.get("rope_local_base_freq"))}

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    def __init__(self, size, eps, offset):
        super().__init__()
        self.eps, self.offset = eps, offset  # Gemma stores weight - 1
        self.weight = nn.Parameter(torch.ones(size) - offset)

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float() + self.offset, self.eps).to(x.dtype)

def make_norm(config, size):
    if config.norm == "layer":
        return nn.LayerNorm(size, config.rms_norm_eps)
    return RMSNorm(size, config.rms_norm_eps, offset=1.0 if config.norm == "rms_plus_one" else 0.0)

def make_rope(config, layer_type, positions, dtype):
    """cos and sin, (T, 1, D) each, of rotary position embedding (Su et al. 2021, arXiv 2104.09864) at
    positions (T,): pair i of a head's elements, i and i + D/2, turns by the angle position * theta ** (-2 i /
    D)."""
    theta, scaling = config.rope_theta, config.rope_scaling
    if layer_type == "sliding_attention" and config.rope_local_base_freq is not None:
        theta, scaling = config.rope_local_base_freq, None
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = 1.0 / theta ** (pairs / config.head_dim)
    if scaling is not None and scaling["rope_type"] == "linear":
        frequency = frequency / scaling["factor"]
    elif scaling is not None:  # llama3: slow down the pairs that turn seldom within the original context
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / scaling["factor"]
    angles = positions[:, None, None].float() * frequency.repeat(2)  # float32: bfloat16 takes 257 for 256
    return angles.cos().to(dtype), angles.sin().to(dtype)

def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin

def make_mask(config, layer_type, T, device):
    """Which of T tokens (columns) each of them (rows) sees: (T, T) bool, or None: just causal."""
    window = config.sliding_window if layer_type == "sliding_attention" else None
    slides = window is not None and T > window
    if not slides and config.attn_logit_softcapping is None:
        return None
    seen = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    return seen.triu(1 - window) if slides else seen

class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023, arXiv 2305.13245).

    x is (B, T, d), or (N, d) with the tree whose nodes these are. A tree's rows are padded at the end, where
    no real token looks, so neither form needs a mask for padding. wanted (W,): only these nodes come out, (W,
    d).
    """
    def __init__(self, config):
        super().__init__()
        d, D = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.softcap = D, config.attn_logit_softcapping
        self.scale = (config.query_pre_attn_scalar or D) ** -0.5
        self.q_proj = nn.Linear(d, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(d, K * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(d, K * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, d, bias=config.attention_out_bias)
        self.q_norm = make_norm(config, D) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, D) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, mask, tree=None, wanted=None):
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H or K, D), or (N, H or K, D)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if tree is not None:  # F.embedding is plain indexing whose backward pass is fast on a CPU
            q, k, v = (F.embedding(tree.rows, y.flatten(1)).unflatten(-1, y.shape[1:]) for y in (q, k, v))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H or K, T, D)
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        else:  # the fast kernels that take a mask need as many key heads as query heads
            k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1) for heads in (k, v))
            if self.softcap is None:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
            else:  # which no kernel does
                scores = self.softcap * torch.tanh(q @ k.mT * self.scale / self.softcap)
                y = scores.masked_fill(~mask, -math.inf).softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        y = y.transpose(1, 2).flatten(2)  # (B, T, H * D)
        if tree is not None:
            places = tree.places if wanted is None else tree.places[wanted]
            y = F.embedding(places, y.flatten(0, 1))  # (N or W, H * D)
        return self.o_proj(y)

class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (SwiGLU: Shazeer 2020, arXiv 2002.05202); GPT-2: down(act(up(x)))."""
    def __init__(self, config):
        super().__init__()
        d, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(d, inner, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(d, inner, bias=bias)
        self.down_proj = nn.Linear(inner, d, bias=bias)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        up = self.up_proj(x)
        inner = self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x)) * up
        return self.down_proj(inner)

class Block(nn.Module):
    """One layer: residual stream in, the same plus attention's and the MLP's output out (see Attention)."""
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.post_norms, d = config.post_norms, config.hidden_size
        self.input_layernorm = make_norm(config, d)
        self.post_attention_layernorm = make_norm(config, d)
        if self.post_norms:
            self.pre_feedforward_layernorm = make_norm(config, d)
            self.post_feedforward_layernorm = make_norm(config, d)

    def forward(self, x, rope, mask, tree=None, wanted=None):
        attended = self.self_attn(self.input_layernorm(x), rope, mask, tree, wanted)
        if wanted is not None:
            x = x[wanted]
        if self.post_norms:
            x = x + self.post_attention_layernorm(attended)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))  # a misnomer of Llama's: the MLP's input norm

class GPT(nn.Module):
    """The decoder: GPT(config) has random weights, GPT.from_pretrained(name_or_dir) those of a checkpoint."""
    steering = None  # the slot for a steering vector between two blocks: see steer.attach
    sharded = False  # are the blocks split over several processes?

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = make_norm(config, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens, tree=None):
        """Logits (B, T, vocab_size) of tokens (B, T) int64; or (N, vocab_size) of a tree's tokens (N,)."""
        return self.unembed(self.norm(self.run_blocks(self.embed(tokens, tree), tree=tree)))

    def embed(self, tokens, tree=None):
        """The residual stream (B, T, d) or (N, d) before layer 0; ValueError beyond the last position."""
        x, config = self.embed_tokens(tokens), self.config
        if config.scale_embedding:  # rounded as in Gemma's training: sqrt(3584) = 59.87 is 59.75 in bfloat16
            x = x * torch.tensor(config.hidden_size ** 0.5, dtype=x.dtype)
        if config.learned_positions:
            positions, limit = self.positions(x, tree), config.max_position_embeddings
            length = positions.max().item() + 1
            require(length <= limit, f"a text has {length} tokens, but max_position_embeddings is {limit}")
            x = x + self.embed_positions(positions)
        return x

    def positions(self, x, tree):
        """Each token's place in its text, from 0: (N,) of a tree's nodes, else (T,), alike for every row."""
        return torch.arange(x.shape[1], device=x.device) if tree is None else tree.positions

    def run_blocks(self, x, first=0, last=None, tree=None, wanted=None):
        """Runs blocks first to last - 1 on x, (B, T, d) or a tree's (N, d), the residual stream before
        `first`.

        A steering vector of layer L is added on the way from block L to L + 1: run_blocks(x, 0, L + 1) ends
        before it, and run_blocks(x, L + 1) begins with it. With last=None all that follow run, up to the
        final norm. wanted (W,): the nodes whose logits are wanted. Nothing reads what the last block makes of
        the others, so it is not computed, and (W, d) comes out.
        """
        count, positions = len(self.layers), self.positions(x, tree)
        T, steered = (x.shape[1], None) if tree is None else (tree.rows.shape[1], tree.steered)
        rope_and_mask = {}  # all layers of one type share them
        for kind in set(self.config.layer_types):
            rope = None if self.config.learned_positions else make_rope(self.config, kind, positions, x.dtype)
            rope_and_mask[kind] = rope, make_mask(self.config, kind, T, x.device)
        for i in range(first, count if last is None else last):
            x = self.steer(x, i - 1, steered)
            only = wanted if i == count - 1 else None
            x = self.layers[i](x, *rope_and_mask[self.config.layer_types[i]], tree, only)
        if last is not None:
            return x
        if wanted is not None:
            x, steered = x if first < count else x[wanted], steered[wanted]
        return self.steer(x, count - 1, steered)

    def steer(self, x, layer, steered):
        if self.steering is None or self.steering.layer != layer:
            return x
        return self.steering(x, steered)

    def unembed(self, h):
        """Logits (..., vocab_size) of h (..., d), the residual stream after the final norm."""
        logits, cap = self.lm_head(h), self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=0.0):
        """Continues tokens (B, T) to (B, T + max_new_tokens); greedy at temperature 0, else sampled. All is
        computed again for each token: simple, and fast enough for a few words."""
        for _ in range(max_new_tokens):
            logits = self(tokens)[:, -1]  # (B, vocab_size)
            new = logits.argmax(-1, keepdim=True)
            if temperature > 0:
                new = torch.multinomial((logits.float() / temperature).softmax(-1), 1)
            tokens = torch.cat([tokens, new], dim=1)
        return tokens

    @classmethod
    def from_pretrained(cls, name_or_dir, device="cpu", dtype=torch.float32, shard=False) -> "GPT":
        """The model of a checkpoint folder or hub name ("tiny": the bundled one), frozen, in eval mode.
        shard: the processes that torchrun started split every block between them."""
        folder = find_checkpoint(name_or_dir)
        config = Config.from_pretrained(folder)
        with torch.device("meta"):  # shapes without memory
            model = cls(config)
        tensors, home = {}, "cpu" if shard else device
        for name, tensor in read_tensors(folder):  # mapped from the file: memory never holds all twice
            require(name not in tensors, f"tensor {name} comes twice")
            tensors[name] = tensor.to(home, dtype, copy=not shard).contiguous()
        if config.tie_word_embeddings and "embed_tokens.weight" in tensors:  # some files hold it all the same
            tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
        model.load_state_dict(tensors, assign=True)  # names what is missing, unexpected or of another shape
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        model.requires_grad_(False).eval()
        return model.shard_blocks(device) if shard else model

    def shard_blocks(self, device):
        """FSDP2: each process keeps a part of every block, and they put one block together while it runs."""
        import torch.distributed as dist  # these imports take a second
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh, self.sharded = init_device_mesh(torch.device(device).type, (dist.get_world_size(),)), True
        for block in self.layers:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        return self.to(device)

UNUSED = re.compile(r"vision_tower|multi_modal_projector|rotary_emb|\.attn\.(masked_)?bias$")  # GPT-2's masks
OUR_NAMES = {r"^(language_model\.model|model\.language_model|language_model|transformer|model)\.": "",
             # and GPT-2's own
             r"^h\.": "layers.", r"^wte": "embed_tokens", r"^wpe": "embed_positions", r"^ln_f": "norm",
             r"\.ln_1": ".input_layernorm", r"\.ln_2": ".post_attention_layernorm",
             r"\.attn\.c_attn": ".self_attn.qkv_proj", r"\.attn\.c_proj": ".self_attn.o_proj",
             r"\.mlp\.c_fc": ".mlp.up_proj", r"\.mlp\.c_proj": ".mlp.down_proj"}

def read_tensors(folder):
    """Yields (our name, tensor) for each tensor in a checkpoint's safetensors files (never pickles)."""
    files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / files[0]).exists() and index.exists():
        files = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    for name in files:
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():
                if not UNUSED.search(key):
                    yield from translate(key, file.get_tensor(key))

def translate(key, tensor):
    """[(our name, tensor)] of a checkpoint's tensor: three of them for GPT-2's fused q, k and v, else one."""
    name = key
    for theirs, ours in OUR_NAMES.items():
        name = re.sub(theirs, ours, name)
    if ".c_" in key:
        tensor = tensor.transpose(0, -1)  # GPT-2's Conv1D stores (inputs, outputs)
    if "qkv_proj" not in name:
        return [(name, tensor)]
    return [(name.replace("qkv", letter), part) for letter, part in zip("qkv", tensor.chunk(3))]

def find_checkpoint(name_or_dir: str | Path) -> Path:
    """The folder of "tiny", a folder as it is, or a hub model's, downloaded unless the hub's cache has it."""
    folder = Path(__file__).parent / "tiny" if name_or_dir == "tiny" else Path(name_or_dir).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    try:
        wanted = ["*.json", "*.jinja", "*.safetensors"]  # no pickles, and nothing from subfolders
        return Path(snapshot_download(str(name_or_dir), allow_patterns=wanted, ignore_patterns="*/*"))
    except Exception as error:  # no such name, gated, offline, the network's
        raise ValueError(f"no such folder, and from the hub {type(error).__name__}: {error}") from None
