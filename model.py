"""One decoder for GPT-2, Llama, Qwen 2 and 3, Gemma 2 and 3, read straight from a Hugging Face checkpoint.

Each difference between them is a field of Config. Shapes: B rows, T columns, d hidden_size, H query heads, K
key/value heads, D head_dim; N nodes of a prefix tree (data.py), where what texts share is there once. Linear
layers and norms work on (N, d) as on (B, T, d); attention lays the nodes out as texts.
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

# What a config.json leaves unsaid: a family's structure, and its authors' defaults.
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
    "qwen2": dict(attention_bias=True),
    "qwen3": dict(qk_norm=True, head_dim=128),
    "gemma2": dict(GEMMA, global_every=2, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    "gemma3_text": GEMMA3,
    "gemma3": GEMMA3,  # only its text part is read
}
# Config's fields that no file sets, and those that only Gemma's may set.
STRUCTURE = "model_type norm gated_mlp learned_positions post_norms qk_norm scale_embedding "
GEMMA_ONLY = """layer_types global_every sliding_window query_pre_attn_scalar rope_local_base_freq
    attn_logit_softcapping final_logit_softcapping"""
OTHER_NAMES = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
               "n_inner": "intermediate_size", "n_positions": "max_position_embeddings",
               "layer_norm_epsilon": "rms_norm_eps", "activation_function": "hidden_act",  # so far GPT-2
               "hidden_activation": "hidden_act", "sliding_window_pattern": "global_every"}  # Gemma
# Switches that would change the result, as we have them; fields whose null means "none".
SWITCHES = {"quantization_config": None, "use_sliding_window": False, "partial_rotary_factor": 1.0,
            "use_bidirectional_attention": False, "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False}
NULLABLE = "attn_logit_softcapping", "final_logit_softcapping", "sliding_window"
gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_new": gelu_tanh, "gelu_pytorch_tanh": gelu_tanh}
ROPES = {"default": (), "linear": ("factor",),  # with what each needs
         "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}

def require(condition, message):
    if not condition:
        raise ValueError(message)

@dataclass
class Config:
    """The shape of a decoder, in config.json's names."""
    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int | None = None  # GPT-2: 4 * hidden_size
    num_key_value_heads: int | None = None  # fewer than heads: grouped-query attention
    head_dim: int | None = None  # hidden_size / num_attention_heads
    max_position_embeddings: int = 2048  # a limit only with learned positions
    tie_word_embeddings: bool = False  # lm_head is the embedding
    hidden_act: str = "silu"
    gated_mlp: bool = True  # all but GPT-2
    norm: str = "rms"  # "rms_plus_one": Gemma; "layer": GPT-2
    rms_norm_eps: float = 1e-6
    post_norms: bool = False  # Gemma: of what attention and MLP add
    qk_norm: bool = False  # Qwen 3, Gemma 3: of each query and key head
    attention_bias: bool = False  # GPT-2; Qwen 2 on q, k and v only
    mlp_bias: bool = False  # GPT-2
    learned_positions: bool = False  # GPT-2; all others: rope
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3.1 ("llama3"), Gemma 3 ("linear")
    rope_local_base_freq: float | None = None  # Gemma 3: rope_theta of the sliding layers, unscaled
    layer_types: list | None = None  # of "full_attention" or, in Gemma, "sliding_attention"
    global_every: int = 1  # if it has none: every so-manieth layer is full
    sliding_window: int | None = None  # Gemma: tokens that a sliding layer sees, itself included
    query_pre_attn_scalar: float | None = None  # Gemma: scales scores by this ** -0.5, not D ** -0.5
    attn_logit_softcapping: float | None = None  # Gemma 2: scores become cap * tanh(scores / cap)
    final_logit_softcapping: float | None = None  # and logits
    scale_embedding: bool = False  # Gemma: embeddings times sqrt(d)

    def __post_init__(self):
        """Checks each field; fills in what follows."""
        for field in fields(self):
            value = getattr(self, field.name)
            kind = field.type | int if field.type in (float, float | None) else field.type
            good = isinstance(value, kind) and (type(value) is not bool or field.type is bool)
            limit = 1000 if field.name == "num_hidden_layers" else 2 ** 53
            good &= type(value) not in (int, float) or 0 < value < limit
            kind = getattr(field.type, "__name__", field.type)
            require(good, f"{field.name} must be {kind}, a number above 0 and below {limit}, not {value!r}")
        layers, heads = range(1, self.num_hidden_layers + 1), self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or heads
        self.head_dim = self.head_dim or self.hidden_size // heads
        if self.intermediate_size is None and self.model_type == "gpt2":
            self.intermediate_size = 4 * self.hidden_size
        if self.layer_types is None:
            self.layer_types = [f"{'sliding' if i % self.global_every else 'full'}_attention" for i in layers]
        act, groups, types = self.hidden_act, self.num_key_value_heads, self.layer_types
        require(self.intermediate_size, "intermediate_size is missing")
        good = self.head_dim > 0 and (self.head_dim % 2 == 0 or self.learned_positions)
        require(good, f"head_dim must be even, not {self.head_dim}")
        require(act in ACTIVATIONS, f"hidden_act {act!r} is not among {[*ACTIVATIONS]}")
        require(heads % groups == 0, f"num_key_value_heads {groups} must divide {heads} heads")
        known = "full_attention", "sliding_attention"
        require(len(types) == len(layers) and all(kind in known for kind in types),
                f"layer_types must be {' or '.join(known)} for each layer, not {types}")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Config":
        """Reads folder/config.json."""
        return cls.from_dict(dict(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))))

    @classmethod
    def from_dict(cls, raw: dict) -> "Config":
        """The same from its content, in the hub's spelling or transformers 5's. ValueError: not supported."""
        kind = raw.get("model_type")
        require(kind in FAMILIES, f"model_type {kind!r} is not among {[*FAMILIES]}")
        raw = {**raw, **(raw.get("text_config") or {})} if kind == "gemma3" else dict(raw)
        unread = {"gemma2": "rope_local_base_freq", "gemma3": "attn_logit_softcapping"}
        unread = STRUCTURE + unread.get(kind.removesuffix("_text"), GEMMA_ONLY)
        reads, given = {field.name for field in fields(cls)} - {*unread.split()}, {}
        for name, value in [*read_rope(raw), *raw.items()]:
            ours, setting = OTHER_NAMES.get(name, name), SWITCHES.get(name, value)
            require(value in (None, setting), f"{name} must be {setting}, not {value}")
            if ours in reads and (value is not None or ours in NULLABLE):
                other = given.setdefault(ours, value)
                require(value == other, f"{ours} is given twice, as {other} and {value}")
        return cls(model_type=kind, **{**FAMILIES[kind], **given})  # its TypeError names what is missing

def read_rope(raw):
    """Config's rope fields, from the hub's rope_scaling or transformers 5's rope_parameters."""
    old, new = raw.pop("rope_scaling", None) or {}, raw.get("rope_parameters") or {}  # Gemma 3: two of these
    require(not (old and new), "rope_scaling and rope_parameters are both given")
    local, scaling = new.get("sliding_attention") or {}, old or new.get("full_attention", new)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    require(kind in ROPES, f"rope scaling {kind!r} is not among {[*ROPES]}")
    require(local.get("rope_type", "default") == "default", "sliding_attention must have the default rope")
    used = {name: scaling[name] for name in ROPES[kind]}
    good = all(type(x) in (int, float) and 0 < x < math.inf for x in used.values())
    good = good and used.get("low_freq_factor", 0) < used.get("high_freq_factor", 1)
    require(good, f"rope scaling {used} is out of range")
    return [("rope_scaling", {"rope_type": kind, **used} if used else None),
            ("rope_theta", scaling.get("rope_theta")), ("rope_local_base_freq", local.get("rope_theta")),
            ("partial_rotary_factor", scaling.get("partial_rotary_factor"))]

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    def __init__(self, size, eps, offset):
        super().__init__()
        self.eps, self.offset = eps, offset  # Gemma stores weight - 1
        self.weight = nn.Parameter(torch.full((size,), 1 - offset))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float() + self.offset, self.eps).to(x.dtype)

def make_embedding(count, size):
    """nn.Embedding(count, size), without its slow imports on the meta device."""
    weight = torch.empty(count, size)
    return nn.Embedding.from_pretrained(weight if weight.is_meta else weight.normal_(), freeze=False)

def make_norm(config, size):
    if config.norm == "layer":
        return nn.LayerNorm(size, config.rms_norm_eps)
    return RMSNorm(size, config.rms_norm_eps, offset=float(config.norm == "rms_plus_one"))

def make_rope(config, layer_type, positions, dtype):
    """cos and sin, (T, 1, D) each, of rotary position embedding (Su et al. 2021, arXiv 2104.09864) at
    positions (T,): elements i and i + D/2 of a head turn by the angle position * theta ** (-2 i / D)."""
    theta, scaling = config.rope_theta, config.rope_scaling
    if layer_type == "sliding_attention" and config.rope_local_base_freq is not None:
        theta, scaling = config.rope_local_base_freq, None
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = 1.0 / theta ** (pairs / config.head_dim)
    if scaling is not None and scaling["rope_type"] == "linear":
        frequency = frequency / scaling["factor"]
    elif scaling is not None:  # llama3: slow down what turns seldom within the original context
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
    """Which of T tokens (columns) each (row) sees: (T, T) bool; None: just causal."""
    window = config.sliding_window if layer_type == "sliding_attention" else None
    slides = window is not None and T > window
    if not slides and config.attn_logit_softcapping is None:
        return None
    seen = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    return seen.triu(1 - window) if slides else seen

class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023, arXiv 2305.13245) of x (B, T, d), or
    (N, d) with its tree, whose rows are padded at the end, where no real token looks. wanted (W,): only these
    nodes come out, (W, d)."""
    def __init__(self, config):
        super().__init__()
        d, D = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.softcap = D, config.attn_logit_softcapping
        self.scale = (config.query_pre_attn_scalar or D) ** -0.5
        self.q_proj = nn.Linear(d, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(d, K * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(d, K * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, d, bias=config.attention_bias and config.model_type != "qwen2")
        self.q_norm = make_norm(config, D) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, D) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, mask, tree=None, wanted=None):
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H or K, D), or (N, H or K, D)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if tree is not None:  # F.embedding: indexing whose backward pass is fast on a CPU
            q, k, v = (F.embedding(tree.rows, y.flatten(1)).unflatten(-1, y.shape[1:]) for y in (q, k, v))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H or K, T, D)
        if self.softcap is None:
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=self.scale,
                                               enable_gqa=True)
        else:  # which no kernel does
            k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1) for heads in (k, v))
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
    """Adds attention's and the MLP's output to the stream."""
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

class Recomputed(torch.autograd.Function):
    """run(x), keeping only x: the backward pass runs it again (Chen et al. 2016, arXiv 1604.06174)."""
    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.run(x).backward(gradient)
        return None, x.grad

class GPT(nn.Module):
    """The decoder. GPT(config) has random weights, GPT.from_pretrained a checkpoint's."""
    steering = None  # the slot for a steering vector: see steer.attach
    sharded = False  # are the blocks split over processes?
    recompute = False  # keep just each block's input for the backward pass?

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = make_embedding(config.vocab_size, config.hidden_size)
        if config.learned_positions:
            self.embed_positions = make_embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = make_norm(config, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens, tree=None):
        """Logits (B, T, vocab_size) of tokens (B, T) int64; or (N, vocab_size) of a tree's tokens (N,)."""
        return self.unembed(self.norm(self.run_blocks(self.embed(tokens, tree), tree=tree)))

    def embed(self, tokens, tree=None):
        """The residual stream (B, T, d) or (N, d) before layer 0; ValueError beyond the last position."""
        config, top = self.config, tokens.max().item()
        require(top < config.vocab_size, f"token {top} is beyond the embedding's {config.vocab_size}")
        x = self.embed_tokens(tokens)
        if config.scale_embedding:  # rounded: sqrt(3584) = 59.87 is 59.75 in bfloat16
            x = x * torch.tensor(config.hidden_size ** 0.5, dtype=x.dtype)
        if config.learned_positions:
            positions = torch.arange(x.shape[1], device=x.device) if tree is None else tree.positions
            length, limit = positions.max().item() + 1, config.max_position_embeddings
            require(length <= limit, f"a text has {length} tokens, but max_position_embeddings is {limit}")
            x = x + self.embed_positions(positions)
        return x

    def run_blocks(self, x, first=0, last=None, tree=None, wanted=None):
        """Runs blocks first to last - 1 (None: all that follow) on x, (B, T, d) or a tree's (N, d).

        A steering vector of layer L is added on the way from block L to L + 1: run_blocks(x, 0, L + 1) ends
        before it, run_blocks(x, L + 1) begins with it. wanted (W,): the last block runs only for these
        nodes, others' logits are not read; (W, d) comes out.
        """
        count, config = len(self.layers), self.config
        T, steered = (x.shape[1], None) if tree is None else (tree.rows.shape[1], tree.steered)
        positions = torch.arange(T, device=x.device) if tree is None else tree.positions
        shared = {}  # by all layers of one type
        for kind in set(config.layer_types):
            rope = None if config.learned_positions else make_rope(config, kind, positions, x.dtype)
            shared[kind] = {"rope": rope, "mask": make_mask(config, kind, T, x.device), "tree": tree}
        for i in range(first, count if last is None else last):
            x = self.steer(x, i - 1, steered)
            only = wanted if i == count - 1 else None
            run = partial(self.layers[i], **shared[config.layer_types[i]], wanted=only)
            x = Recomputed.apply(run, x) if self.recompute else run(x)
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
        """Logits (..., vocab_size) of h (..., d), the stream after the final norm."""
        logits, cap = self.lm_head(h), self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=0.0):
        """Continues tokens (B, T) to (B, T + max_new_tokens); greedy at temperature 0, else sampled."""
        for _ in range(max_new_tokens):
            logits = self(tokens)[:, -1]  # (B, vocab_size)
            new = logits.argmax(-1, keepdim=True)
            if temperature > 0:
                new = torch.multinomial((logits.float() / temperature).softmax(-1), 1)
            tokens = torch.cat([tokens, new], dim=1)
        return tokens

    @classmethod
    def from_pretrained(cls, name_or_dir, device="cpu", dtype=torch.float32, shard=False) -> "GPT":
        """A folder's or hub name's frozen model ("tiny": the bundled one). shard: split over processes."""
        folder = find_checkpoint(name_or_dir)
        config = Config.from_pretrained(folder)
        with torch.device("meta"):
            model = cls(config)
        tensors, home = {}, "cpu" if shard else device
        for name, tensor in read_tensors(folder):  # never all in memory twice
            require(name not in tensors, f"tensor {name} comes twice")
            require(tensor.is_floating_point(), f"tensor {name} should hold real numbers")
            tensors[name] = tensor.to(home, dtype, copy=not shard).contiguous()
            finite = all(bound.isfinite() for bound in tensors[name].aminmax())  # a NaN is both
            require(finite, f"tensor {name} should be finite")
        embedding = tensors.get("embed_tokens.weight")
        if config.tie_word_embeddings and embedding is not None:
            head = tensors.setdefault("lm_head.weight", embedding)  # some files have it
            require(torch.equal(head, embedding), "tie_word_embeddings, but lm_head.weight is another")
        model.load_state_dict(tensors, assign=True)  # names what does not fit
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        model.requires_grad_(False).eval()
        return model.shard_blocks(device) if shard else model

    def shard_blocks(self, device):
        """FSDP2: each process keeps a part of every block."""
        import torch.distributed as dist  # slow imports
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh, self.sharded = init_device_mesh(torch.device(device).type, (dist.get_world_size(),)), True
        for block in self.layers:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        return self.to(device)

UNUSED = re.compile(r"vision_tower|multi_modal_projector|rotary_emb|\.attn\.(masked_)?bias$")  # GPT-2's masks
OUR_NAMES = {r"^(language_model\.model|model\.language_model|language_model|transformer|model)\.": "",
             r"^h\.": "layers.", r"^wte": "embed_tokens", r"^wpe": "embed_positions", r"^ln_f": "norm",
             r"\.ln_1": ".input_layernorm", r"\.ln_2": ".post_attention_layernorm",
             r"\.attn\.c_attn": ".self_attn.qkv_proj", r"\.attn\.c_proj": ".self_attn.o_proj",
             r"\.mlp\.c_fc": ".mlp.up_proj", r"\.mlp\.c_proj": ".mlp.down_proj"}

def read_tensors(folder):
    """Yields (our name, tensor) of a checkpoint's file or files."""
    whole = folder / "model.safetensors"
    for path in [whole] if whole.exists() else sorted(folder.glob("model-*.safetensors")) or [whole]:
        try:
            with safe_open(path, framework="pt") as file:
                keys = file.keys()
            for key in keys:
                with safe_open(path, framework="pt") as file:  # anew: else what was read stays in memory
                    if not UNUSED.search(key):
                        yield from translate(key, file.get_tensor(key))
        except Exception as error:
            raise ValueError(f"{path.name}: {error}") from None

def translate(key, tensor):
    """[(our name, tensor)]: three for GPT-2's fused q, k and v."""
    name = key
    for theirs, ours in OUR_NAMES.items():
        name = re.sub(theirs, ours, name)
    if ".c_" in key:
        tensor = tensor.transpose(0, -1)  # GPT-2's Conv1D stores (inputs, outputs)
    if "qkv_proj" not in name:
        return [(name, tensor)]
    return [(name.replace("qkv", letter), part) for letter, part in zip("qkv", tensor.chunk(3))]

def find_checkpoint(name_or_dir: str | Path) -> Path:
    """Tiny's folder, a folder as it is, or a hub model's, downloaded unless in the cache."""
    folder = Path(__file__).parent / "tiny" if name_or_dir == "tiny" else Path(name_or_dir).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    try:
        wanted = ["*.json", "*.jinja", "*.safetensors"]  # no pickles, no subfolders
        return Path(snapshot_download(str(name_or_dir), allow_patterns=wanted, ignore_patterns="*/*"))
    except Exception as error:  # no such name, gated, offline, the network's
        raise ValueError(f"no such folder, and from the hub {type(error).__name__}: {error}") from None
