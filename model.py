"""One decoder for GPT-2, Llama, Qwen 2 and 3, Gemma 2 and 3, read straight from a Hugging Face checkpoint.

The families differ in few places, and each difference is a field of Config. In the comments on shapes: B batch,
T tokens, S tokens so far (cached ones too), d hidden_size, H query heads, K key/value heads, D head_dim.
"""
import json
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, or not for this: one line that names the file, tensor or field at fault."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckpointError(message)


# What a config.json leaves unsaid: the family's structure, and the defaults that its authors rely on.
GEMMA = dict(norm="rms_plus_one", post_norms=True, scale_embedding=True, tie_word_embeddings=True, head_dim=256,
             num_attention_heads=8, num_key_value_heads=4, query_pre_attn_scalar=256, sliding_window=4096,
             hidden_act="gelu_pytorch_tanh")
GEMMA3 = dict(GEMMA, global_every=6, vocab_size=262208, qk_norm=True, rope_theta=1e6, rope_local_base_freq=1e4)
FAMILIES = {
    "gpt2": dict(norm="layer", gated_mlp=False, learned_positions=True, attention_bias=True, mlp_bias=True,
                 tie_word_embeddings=True, hidden_act="gelu_new", rms_norm_eps=1e-5, max_position_embeddings=1024),
    "llama": dict(),
    "qwen2": dict(attention_bias=True, attention_out_bias=False),
    "qwen3": dict(qk_norm=True, head_dim=128),
    "gemma2": dict(GEMMA, global_every=2, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    "gemma3_text": GEMMA3,
    "gemma3": GEMMA3,  # text and vision, of which only the text part is read
}
OTHER_NAMES = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
               "n_inner": "intermediate_size", "n_positions": "max_position_embeddings",
               "layer_norm_epsilon": "rms_norm_eps", "activation_function": "hidden_act",  # so far GPT-2
               "hidden_activation": "hidden_act", "sliding_window_pattern": "global_every"}  # Gemma
# Switches that would change the result, so not to be ignored; and fields where null is "none", not "the default".
REFUSED = "quantization_config", "use_sliding_window", "use_bidirectional_attention", "scale_attn_by_inverse_layer_idx"
NULLABLE = "attn_logit_softcapping", "final_logit_softcapping", "sliding_window"
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
               "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}
ROPES = {"default": (), "linear": ("factor",),  # and the fields that each needs
         "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


@dataclass
class Config:
    """The shape of a decoder, in config.json's names where it has one. Made by from_pretrained or from_dict."""
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int                      # fewer than the query heads: grouped-query attention
    head_dim: int                                 # Qwen 3, Gemma: need not be hidden_size / num_attention_heads
    layer_types: list[str]                        # "full_attention" or, in Gemma only, "sliding_attention"
    max_position_embeddings: int = 2048           # a limit only with learned positions
    tie_word_embeddings: bool = False             # lm_head is the embedding: GPT-2, Gemma, small Llamas and Qwens
    hidden_act: str = "silu"                      # GPT-2, Gemma: gelu
    gated_mlp: bool = True                        # all but GPT-2
    norm: str = "rms"                             # "rms_plus_one": Gemma; "layer": GPT-2
    rms_norm_eps: float = 1e-6
    post_norms: bool = False                      # Gemma: also norm what attention and MLP add
    qk_norm: bool = False                         # Qwen 3, Gemma 3: norm each query and key head
    attention_bias: bool = False                  # on q, k, v: GPT-2, Qwen 2
    attention_out_bias: bool = False              # on o: GPT-2
    mlp_bias: bool = False                        # GPT-2
    learned_positions: bool = False               # GPT-2; all others: rope
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None              # Llama 3.1 and later ("llama3"), Gemma 3 ("linear")
    rope_local_base_freq: float | None = None     # Gemma 3: rope_theta of the sliding layers, which have no scaling
    sliding_window: int | None = None             # Gemma: tokens that a sliding layer sees, the current one included
    query_pre_attn_scalar: float | None = None    # Gemma: scores are scaled by this ** -0.5 instead of D ** -0.5
    attn_logit_softcapping: float | None = None   # Gemma 2: scores become cap * tanh(scores / cap)
    final_logit_softcapping: float | None = None  # Gemma 2: and so do the logits
    scale_embedding: bool = False                 # Gemma: embeddings times sqrt(d)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Config":
        """Reads folder/config.json, in the hub's usual spelling or transformers 5's; CheckpointError if it cannot."""
        path = Path(folder) / "config.json"
        raw = read_json(path)
        try:
            return cls.from_dict(raw)
        except (AttributeError, TypeError, ValueError) as error:  # the first two: a value of another type
            raise CheckpointError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: dict) -> "Config":
        """The same from the content of a config.json."""
        kind = raw.get("model_type")
        require(kind in FAMILIES, f"model_type {kind!r} is not supported; supported are {', '.join(FAMILIES)}")
        raw = {**raw, **(raw.get("text_config") or {})}  # gemma3's section on its text part
        for name in REFUSED:
            require(not raw.get(name), f"{name} is set, which is not supported")
        raw = {OTHER_NAMES.get(name, name): value for name, value in {**raw, **read_rope(raw)}.items()}
        names = {"global_every", *(field.name for field in fields(cls))}
        given = {k: v for k, v in raw.items() if k in names and (v is not None or k in NULLABLE)}
        values = {**FAMILIES[kind], **given, "model_type": kind}
        if kind == "gpt2" and "hidden_size" in values:
            values.setdefault("intermediate_size", 4 * values["hidden_size"])
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            is_count = type(values.get(name)) is int and values[name] > 0
            require(is_count, f"{name} must be a whole number above 0, not {values.get(name)!r}")
        heads, layers, every = values["num_attention_heads"], values["num_hidden_layers"], values.pop("global_every", 1)
        types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
        derived = {"num_key_value_heads": heads, "head_dim": values["hidden_size"] // heads, "layer_types": types,
                   "attention_out_bias": values.get("attention_bias", False)}
        config = cls(**{**derived, **values})
        act, groups, types = config.hidden_act, config.num_key_value_heads, config.layer_types
        require(act in ACTIVATIONS, f"hidden_act {act!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
        require(groups > 0 and heads % groups == 0, f"num_key_value_heads {groups} must divide {heads} heads")
        require(len(types) == layers and {*types} <= {"full_attention", "sliding_attention"},
                f"layer_types must be {layers} times full_attention or sliding_attention, not {types}")
        return config


def read_rope(raw: dict) -> dict:
    """Config's three rope fields, from the hub's spelling or from transformers 5's rope_parameters."""
    new = raw.get("rope_parameters") or {}  # Gemma 3 has one for each layer type
    local, scaling = new.get("sliding_attention") or {}, new.get("full_attention", new) or raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    require(kind in ROPES, f"rope scaling {kind!r} is not supported; supported are {', '.join(ROPES)}")
    for name in ROPES[kind]:
        require(name in scaling, f"rope scaling {kind!r} needs the field {name}")
    used = {"rope_type": kind, **{name: scaling[name] for name in ROPES[kind]}}
    return {"rope_theta": scaling.get("rope_theta", raw.get("rope_theta")),
            "rope_scaling": used if ROPES[kind] else None,
            "rope_local_base_freq": local.get("rope_theta", raw.get("rope_local_base_freq"))}


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a readable JSON object ({error})") from None


class Embedding(nn.Embedding):
    """Token embedding, already times sqrt(d) for Gemma: its output is the residual stream before layer 0."""
    def __init__(self, config: Config):
        super().__init__(config.vocab_size, config.hidden_size)
        self.scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = super().forward(tokens)
        # Rounded to the weights' dtype, as in Gemma's training: sqrt(3584) = 59.87 is 59.75 in bfloat16.
        return x if self.scale == 1.0 else x * torch.tensor(self.scale, dtype=x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    def __init__(self, size: int, eps: float, offset: float):
        super().__init__()
        self.eps, self.offset = eps, offset  # Gemma stores weight - 1
        self.weight = nn.Parameter(torch.ones(size) - offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float() + self.offset, self.eps).to(x.dtype)


def make_norm(config: Config, size: int) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(size, config.rms_norm_eps)
    return RMSNorm(size, config.rms_norm_eps, offset=1.0 if config.norm == "rms_plus_one" else 0.0)


def make_rope(config: Config, layer_type: str, positions: torch.Tensor, dtype: torch.dtype):
    """cos and sin, (B or 1, 1, T, D) each, of rotary position embedding (Su et al. 2021, arXiv 2104.09864).

    Pair i of a head's elements, i and i + D/2, turns by the angle position * theta ** (-2 i / D).
    """
    local = layer_type == "sliding_attention" and config.rope_local_base_freq is not None
    theta, scaling = (config.rope_local_base_freq, None) if local else (config.rope_theta, config.rope_scaling)
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = 1.0 / theta ** (pairs / config.head_dim)
    if scaling is not None and scaling["rope_type"] == "linear":
        frequency = frequency / scaling["factor"]
    elif scaling is not None:  # llama3: slow down the pairs that turn seldom within the original context, not the rest
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / scaling["factor"]
    angles = positions[:, None, :, None].float() * frequency.repeat(2)  # float32: in bfloat16 position 257 is 256
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


SHARED = -1  # in an attention_mask: tokens with which each of the row's texts begins


def make_positions(S: int, attention_mask: torch.Tensor | None, device) -> torch.Tensor:
    """Positions (B or 1, S) of S tokens, each counted from the beginning of its own text."""
    index = torch.arange(S, device=device)[None]
    if attention_mask is not None:
        begins = F.pad(attention_mask[:, 1:] != attention_mask[:, :-1], (1, 0))  # another text, or padding
        shared = (attention_mask == SHARED).sum(1, keepdim=True)
        index = index - (index * begins).cummax(dim=1).values + shared * (attention_mask > 0)
        index = index * (attention_mask != 0)
    return index


def make_mask(config: Config, layer_type: str, positions: torch.Tensor, start: int, attention_mask):
    """Which of the S tokens, at these positions (B or 1, S), each of T from `start` on sees: bool (B or 1, 1, T, S).
    None: plain causal attention does it."""
    S, device = positions.shape[1], positions.device
    slides = layer_type == "sliding_attention" and config.sliding_window is not None and S > config.sliding_window
    several = 0 < start < S - 1  # is_causal would align these with the oldest tokens
    if attention_mask is None and not slides and not several and config.attn_logit_softcapping is None:
        return None
    query, key = torch.arange(start, S, device=device)[:, None], torch.arange(S, device=device)
    mask = (key <= query)[None, None]
    if slides:
        mask = mask & (positions[:, None, None] > positions[:, None, start:, None] - config.sliding_window)
    if attention_mask is not None:  # padding sees padding, for a softmax over nothing is NaN
        of_query, of_key = attention_mask[:, None, start:, None], attention_mask[:, None, None]
        mask = mask & ((of_query == of_key) | (of_key == SHARED))
    return mask


def pick(x: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
    """The positions `at` (B, A) of x (B or 1, ..., T, n): (B, ..., A, n); all of them if `at` is None."""
    if at is None:
        return x
    return x.take_along_dim(at[..., None] if x.dim() == 3 else at[:, None, :, None], dim=-2)


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023, arXiv 2305.13245)."""
    def __init__(self, config: Config):
        super().__init__()
        d, D, H, K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.softcap = D, config.attn_logit_softcapping
        self.scale = (config.query_pre_attn_scalar or D) ** -0.5
        self.q_proj = nn.Linear(d, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(d, K * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(d, K * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, d, bias=config.attention_out_bias)
        self.q_norm = make_norm(config, D) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, D) if config.qk_norm else nn.Identity()

    def forward(self, x: torch.Tensor, rope=None, mask=None, cache=None, start: int = 0, at=None) -> torch.Tensor:
        B, T, _ = x.shape
        if at is not None and mask is None:
            mask = torch.arange(T, device=x.device) <= at[:, None, :, None]  # causal
        elif at is not None:
            mask = pick(mask, at)
        q = self.q_proj(pick(x, at))  # (B, T or A, H * D)
        q = self.q_norm(q.view(B, q.shape[1], -1, self.head_dim).transpose(1, 2))  # (B, H, T or A, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2))  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, *(pick(turns, at) for turns in rope)), rotate(k, *rope)
        if cache is not None:  # (2, B, K, longest S, D), filled as tokens come
            cache[:, :, :, start:start + T] = torch.stack([k, v])
            k, v = cache[:, :, :, :start + T]
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, scale=self.scale, enable_gqa=True)
        else:  # the fast kernels that take a mask need as many key heads as query heads
            k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1) for heads in (k, v))
            if self.softcap is None:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
            else:  # which no kernel does
                scores = self.softcap * torch.tanh(q @ k.mT * self.scale / self.softcap)
                y = scores.masked_fill(~mask, -math.inf).softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (SwiGLU: Shazeer 2020, arXiv 2002.05202); in GPT-2 down(act(up(x)))."""
    def __init__(self, config: Config):
        super().__init__()
        d, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(d, inner, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(d, inner, bias=bias)
        self.down_proj = nn.Linear(inner, d, bias=bias)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(x)
        return self.down_proj(self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x)) * up)


class Block(nn.Module):
    """One layer: residual stream (B, T, d) in, the same plus attention's and the MLP's output out.

    With `at` (B, A) only these positions come out, (B, A, d): keys and values are made of all, the rest only there.
    """
    def __init__(self, config: Config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)
        self.post_norms = config.post_norms
        if config.post_norms:
            self.pre_feedforward_layernorm = make_norm(config, config.hidden_size)
            self.post_feedforward_layernorm = make_norm(config, config.hidden_size)

    def forward(self, x: torch.Tensor, rope=None, mask=None, cache=None, start: int = 0, at=None) -> torch.Tensor:
        attended = self.self_attn(self.input_layernorm(x), rope, mask, cache, start, at)
        x = pick(x, at)
        if self.post_norms:
            x = x + self.post_attention_layernorm(attended)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))  # a misnomer of Llama's: it is the MLP's input norm


class GPT(nn.Module):
    """The decoder: GPT(config) has random weights, GPT.from_pretrained(name_or_dir) those of a checkpoint."""
    sharded = False  # are the blocks split over several processes?

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config)
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

    def forward(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, T, vocab_size) of tokens (B, T) int64.

        attention_mask (B, T) is False at padding, on any side. Or a row holds several texts, one after the other: then
        it is their numbers from 1 on, 0 at padding, and SHARED at tokens in front with which each of them begins. Each
        text then is as if it were alone.
        """
        return self.unembed(self.hidden(tokens, attention_mask))

    def hidden(self, tokens: torch.Tensor, attention_mask=None, cache=None, start: int = 0) -> torch.Tensor:
        """The residual stream (B, T, d) after the final norm; unembed makes logits of it."""
        x = self.embed(tokens, attention_mask, start)
        return self.norm(self.run_blocks(x, 0, None, attention_mask, cache, start))

    def embed(self, tokens: torch.Tensor, attention_mask=None, start: int = 0) -> torch.Tensor:
        """The residual stream (B, T, d) before layer 0; CheckpointError beyond the last learned position."""
        x, limit = self.embed_tokens(tokens), self.config.max_position_embeddings
        if not self.config.learned_positions:
            return x
        positions = make_positions(start + tokens.shape[1], attention_mask, x.device)[:, start:]
        length = positions.max().item() + 1
        require(length <= limit, f"a text of {length} tokens is too long for this {self.config.model_type} checkpoint: "
                                 f"max_position_embeddings is {limit}")
        return x + self.embed_positions(positions)

    def run_blocks(self, x: torch.Tensor, first: int = 0, last: int | None = None, attention_mask=None, cache=None,
                   start: int = 0, at: torch.Tensor | None = None) -> torch.Tensor:
        """Runs layers first to last - 1 (all that follow if None) on x (B, T, d), the residual stream before `first`.

        With a cache, one tensor per layer, x holds the tokens from `start` on, and attention_mask (B, S) all so far.
        With `at` (B, A), the positions in x whose logits are wanted, only these are returned, (B, A, d): nothing reads
        the others' output of the last layer, so it is not computed.
        """
        if first == len(self.layers):  # no layer is left to do it
            return pick(x, at)
        positions = make_positions(start + x.shape[1], attention_mask, x.device)
        newest, shared = positions[:, start:], {}  # all layers of one type share mask and rope
        for kind in set(self.config.layer_types):
            rope = None if self.config.learned_positions else make_rope(self.config, kind, newest, x.dtype)
            shared[kind] = rope, make_mask(self.config, kind, positions, start, attention_mask)
        for i in range(len(self.layers))[first:last]:
            only = at if i == len(self.layers) - 1 else None
            x = self.layers[i](x, *shared[self.config.layer_types[i]], None if cache is None else cache[i], start, only)
        return x

    def unembed(self, h: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocab_size) of h (..., d), the residual stream after the final norm."""
        logits, cap = self.lm_head(h), self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def new_cache(self, B: int, S: int) -> list[torch.Tensor]:
        """Room for the keys and values of S tokens, for each layer (2, B, K, S, D)."""
        shape = 2, B, self.config.num_key_value_heads, S, self.config.head_dim
        return [self.embed_tokens.weight.new_zeros(shape) for _ in self.layers]

    @torch.no_grad()
    def generate(self, tokens: torch.Tensor, max_new_tokens: int, temperature: float = 0.0, stop_ids=(),
                 attention_mask: torch.Tensor | None = None, generator: torch.Generator | None = None) -> torch.Tensor:
        """Continues tokens (B, T) by n <= max_new_tokens: (B, T + n); greedy at temperature 0, else sampled.

        A row that has made one of stop_ids repeats it until all rows have. ValueError unless padding is on the left.
        """
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("generate: attention_mask must be True at the last token of every row (pad on the left)")
        cache = self.new_cache(len(tokens), tokens.shape[1] + max_new_tokens)
        stop_ids = torch.tensor(stop_ids, dtype=tokens.dtype, device=tokens.device)
        new, start, stopped = tokens, 0, torch.zeros_like(tokens[:, :1], dtype=torch.bool)
        for _ in range(max_new_tokens):
            logits = self.unembed(self.hidden(new, attention_mask, cache, start)[:, -1])  # (B, vocab_size)
            chosen = logits.argmax(-1, keepdim=True)
            if temperature > 0:
                chosen = torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)
            new, start = torch.where(stopped, new[:, -1:], chosen), tokens.shape[1]
            tokens = torch.cat([tokens, new], dim=1)
            stopped = torch.isin(new, stop_ids)
            if stopped.all():
                break
            if attention_mask is not None:
                attention_mask = F.pad(attention_mask, (0, 1), value=True)
        return tokens

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path, device="cpu", dtype: torch.dtype = torch.float32,
                        shard: bool = False) -> "GPT":
        """The model of a checkpoint folder or hub name, frozen, in eval mode; CheckpointError if it is not whole.

        Each tensor goes from its file to the device on its own: beside the model, memory holds at most one shard.
        shard: the processes that torchrun started split every block between them (FSDP2; embedding and unembedding are
        whole on each), and put one block together while it runs.
        """
        if shard:  # these imports take a second
            import torch.distributed as dist
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard
            from torch.distributed.tensor import DTensor, distribute_tensor
        folder = find_checkpoint(name_or_dir)
        config = Config.from_pretrained(folder)
        with torch.device("meta"):  # shapes without memory
            model = cls(config)
        if shard:
            mesh, model.sharded = init_device_mesh(torch.device(device).type, (dist.get_world_size(),)), True
            for block in model.layers:
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
        missing = dict(model.named_parameters())  # a tied lm_head is in it once, as embed_tokens
        for path, name, tensor in read_tensors(folder):
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue  # some files hold it all the same
            require(name in missing, f"{path}: tensor {name} comes twice, or a model of this config.json has none")
            parameter = missing.pop(name)
            shape, asked = tuple(tensor.shape), tuple(parameter.shape)
            require(shape == asked, f"{path}: tensor {name} has the shape {shape}, but config.json asks for {asked}")
            weight = torch.empty(asked, device=device, dtype=dtype).copy_(tensor)
            if shard and isinstance(parameter, DTensor):  # keep this process's part
                weight = distribute_tensor(weight, mesh, parameter.placements, src_data_rank=None)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
        require(not missing, f"{folder}: no file holds the tensor {min(missing, default='')} ({len(missing)} missing)")
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        return model.requires_grad_(False).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, which transformers loads too. Llama and Qwen only, no adapters."""
        folder, parameters = Path(folder), dict(self.named_parameters())  # a tied lm_head is not among them
        with torch.device("meta"):
            plain = dict(GPT(self.config).named_parameters())
        require(self.config.model_type in ("llama", "qwen2", "qwen3") and parameters.keys() == plain.keys(),
                f"{folder}: save_pretrained writes only Llama and Qwen models, and only without adapters")
        raw = {**asdict(self.config), "torch_dtype": str(self.embed_tokens.weight.dtype).removeprefix("torch.")}
        tensors = {name if name == "lm_head.weight" else f"model.{name}": parameter.detach().contiguous()
                   for name, parameter in parameters.items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


UNUSED = re.compile(r"vision_tower|multi_modal_projector|rotary_emb|\.attn\.(masked_)?bias$")  # the last: GPT-2's masks
OUR_NAMES = {r"^(language_model\.model|model\.language_model|language_model|transformer|model)\.": "",
             # and GPT-2's own
             r"^h\.": "layers.", r"^wte": "embed_tokens", r"^wpe": "embed_positions", r"^ln_f": "norm",
             r"\.ln_1": ".input_layernorm", r"\.ln_2": ".post_attention_layernorm",
             r"\.attn\.c_attn": ".self_attn.qkv_proj", r"\.attn\.c_proj": ".self_attn.o_proj",
             r"\.mlp\.c_fc": ".mlp.up_proj", r"\.mlp\.c_proj": ".mlp.down_proj"}


def read_tensors(folder: Path):
    """Yields (file, our name, tensor) for every tensor of a checkpoint, mapped from the file, not copied."""
    for path in find_shards(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    if not UNUSED.search(key):
                        yield from ((path, *pair) for pair in translate(key, file.get_tensor(key)))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: truncated or no safetensors file ({error}); get it again") from None


def translate(key: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """A checkpoint's tensor with our name for it: three of them for GPT-2's fused q, k and v, else one."""
    name = key
    for theirs, ours in OUR_NAMES.items():
        name = re.sub(theirs, ours, name)
    if ".c_" in key:
        tensor = tensor.transpose(0, -1)  # GPT-2's Conv1D stores (inputs, outputs), nn.Linear (outputs, inputs)
    if "qkv_proj" not in name:
        return [(name, tensor)]
    return [(name.replace("qkv_proj", f"{letter}_proj"), part) for letter, part in zip("qkv", tensor.chunk(3))]


def find_shards(folder: Path) -> list[Path]:
    """A checkpoint's safetensors files; CheckpointError if one is missing. Pickled weights are never read."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    require(index.exists(), f"{folder}: neither {single.name} nor {index.name} is there (pickles are not read)")
    shards = read_json(index).get("weight_map")
    require(isinstance(shards, dict), f"{index}: weight_map must say which file holds which tensor, not {shards!r}")
    for tensor, shard in shards.items():
        require((folder / shard).exists(), f"{folder / shard}: missing; by {index.name} it holds the tensor {tensor}")
    return [folder / shard for shard in sorted(set(shards.values()))]


HUB_ERRORS = {  # huggingface_hub's, and what to do
    "ModuleNotFoundError": "pip install huggingface_hub to download it",
    "HFValidationError": "nor is it a hub name such as google/gemma-2-9b-it",
    "GatedRepoError": "it is gated: accept its terms on its page at huggingface.co, then run hf auth login",
    "RepositoryNotFoundError": "no such hub model: check the name, or run hf auth login if it is private",
    "LocalEntryNotFoundError": "not in the hub's cache, and the hub is offline: connect, or give a folder",
}


def find_checkpoint(name_or_dir: str | Path) -> Path:
    """A local folder as it is, else a hub model's, downloaded unless the hub's cache has it; or CheckpointError."""
    folder = Path(name_or_dir).expanduser()
    if folder.is_dir():
        return folder
    try:
        from huggingface_hub import snapshot_download  # only here: local use does not need it
        wanted = ["*.json", "*.jinja", "*.safetensors"]  # no pickles, and nothing from subfolders
        return Path(snapshot_download(str(name_or_dir), allow_patterns=wanted, ignore_patterns="*/*"))
    except Exception as error:  # the network's too
        kind = type(error).__name__
        advice = HUB_ERRORS.get(kind, f"download failed, {kind}: {' '.join(str(error).split())}")
        raise CheckpointError(f"{name_or_dir}: no such folder; {advice}") from None
