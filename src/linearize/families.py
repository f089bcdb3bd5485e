"""The model families: a row of data each. `docs/families.md` says how to add one."""

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name

from linearize.errors import LinearizeError

Projected = tuple[Tensor, Tensor, Tensor]


def separate(attention: nn.Module, x: Tensor) -> Projected:
    """q, k and v by a linear layer each: x `[B, T, hidden]` to `[B, T, H, D]` and twice `[B, T, KV, D]`, no RoPE."""
    a: Any = attention
    return tuple(p(x).unflatten(-1, (-1, a.head_dim)) for p in (a.q_proj, a.k_proj, a.v_proj))


def separate_with_norms(attention: nn.Module, x: Tensor) -> Projected:
    """As `separate`, with a norm over the head size of q and k."""
    a: Any = attention
    q, k, v = separate(a, x)
    return a.q_norm(q), a.k_norm(k), v


def separate_with_optional_norms(attention: nn.Module, x: Tensor) -> Projected:
    """As `separate_with_norms` where `config.use_qk_norm` says so, else as `separate`."""
    a: Any = attention
    return (separate_with_norms if a.original.use_qk_norm else separate)(attention, x)


def separate_with_layernorms(attention: nn.Module, x: Tensor) -> Projected:
    """As `separate`, with a LayerNorm over the head size of q and k where `config.qk_layernorm` says so."""
    a: Any = attention
    q, k, v = separate(a, x)
    return (a.q_layernorm(q), a.k_layernorm(k), v) if a.original.qk_layernorm else (q, k, v)


def separate_with_wide_norms(attention: nn.Module, x: Tensor) -> Projected:
    """As `separate`, with a norm over all heads of q and of k together."""
    a: Any = attention
    q, k, v = a.q_norm(a.q_proj(x)), a.k_norm(a.k_proj(x)), a.v_proj(x)
    return tuple(p.unflatten(-1, (-1, a.head_dim)) for p in (q, k, v))


def separate_clipped(attention: nn.Module, x: Tensor) -> Projected:
    """As `separate`, with values beyond `config.clip_qkv` cut off, where there is such a bound."""
    a: Any = attention
    bound = a.original.config.clip_qkv
    q, k, v = separate(a, x)
    return (q, k, v) if bound is None else (q.clamp(-bound, bound), k.clamp(-bound, bound), v.clamp(-bound, bound))


def fused(attention: nn.Module, x: Tensor) -> Projected:
    """One linear layer for q, k and v, in this order."""
    a: Any = attention
    heads = a.qkv_proj(x).unflatten(-1, (-1, a.head_dim))
    return heads.split((a.num_heads, a.num_key_value_heads, a.num_key_value_heads), dim=-2)


def as_they_are(config: PreTrainedConfig, logits: Tensor) -> Tensor:
    """What the output embedding gives."""
    return logits


def softcapped(config: Any, logits: Tensor) -> Tensor:
    """c · tanh(logits / c), c = `config.final_logit_softcapping`, where there is one."""
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * (logits / cap).tanh()


def divided(config: Any, logits: Tensor) -> Tensor:
    """Divided by `config.logits_scaling`."""
    return logits / config.logits_scaling


def multiplied(config: Any, logits: Tensor) -> Tensor:
    """Multiplied by `config.logit_scale`."""
    return logits * config.logit_scale


class Family(NamedTuple):
    """A row: what differs from family to family, the most common as the default."""

    prefix: str  # what transformers' class names begin with
    project: Callable[[nn.Module, Tensor], Projected] = separate  # makes q, k and v as the family does
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")  # linear layers, the output's last
    logits: Callable[[Any, Tensor], Tensor] = as_they_are  # from the config and what the output embedding gives
    softcap: str | None = None  # the attention's attribute that bounds its scores
    null_logits: str | None = None  # the attention's parameter of one more score for each head
    rotates_first: bool = False  # `apply_rotary_pos_emb` is for the first channels alone, as many as cos has
    rotates_halves: bool = True  # it pairs channel i with i + size / 2, with a cos for each, as fused kernels do
    separates_documents: bool = True  # by position ids that start over, in its own softmax layers


FAMILIES = {  # by transformers' model_type
    "cohere": Family("Cohere", separate_with_optional_norms, logits=multiplied, rotates_halves=False),
    "gemma": Family("Gemma"),
    "gemma2": Family("Gemma2", logits=softcapped, softcap="attn_logit_softcapping"),
    "gemma3_text": Family("Gemma3", separate_with_norms, logits=softcapped),  # its attention has a softcap unused
    "glm4": Family("Glm4", rotates_halves=False),
    "gpt_oss": Family("GptOss", null_logits="sinks", rotates_halves=False, separates_documents=False),
    "granite": Family("Granite", logits=divided),
    "llama": Family("Llama"),
    "mistral": Family("Mistral"),
    "mixtral": Family("Mixtral"),
    "olmo": Family("Olmo", separate_clipped),
    "olmo2": Family("Olmo2", separate_with_wide_norms),
    "olmo3": Family("Olmo3", separate_with_wide_norms),
    "phi": Family(
        "Phi", separate_with_layernorms, projections=("q_proj", "k_proj", "v_proj", "dense"), rotates_first=True
    ),
    "phi3": Family("Phi3", fused, projections=("qkv_proj", "o_proj")),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3", separate_with_norms),
    "smollm3": Family("SmolLM3"),
    "starcoder2": Family("Starcoder2"),
}

LINEARIZED = "linearized_"  # what a converted model's model_type begins with


def base_model_type(model_type: str) -> str:
    """The family's name, of an original model's type or of a converted one's."""
    return model_type.removeprefix(LINEARIZED)


def family_of(config: PreTrainedConfig) -> Family:
    """The row for a model's config; a `LinearizeError` names the type and says what is missing."""
    model_type = base_model_type(config.model_type)
    if getattr(config, "is_encoder_decoder", False):
        raise LinearizeError(f"{model_type!r} is an encoder-decoder; valid: decoders of {', '.join(FAMILIES)}")
    made = getattr(config, "architectures", None) or []
    if model_type not in FAMILIES and made and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in made):
        raise LinearizeError(
            f"{model_type!r} ({made[0]}) is no decoder of text alone; valid: decoders of {', '.join(FAMILIES)}"
        )
    if model_type not in FAMILIES:
        raise LinearizeError(
            f"no row for model type {model_type!r} in families.py; a row needs the prefix of its class names and how "
            f"q, k and v are made (docs/families.md); valid: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def modeling(model_type: str) -> Any:
    """transformers' modeling module of a family."""
    module = model_type_to_module_name(model_type)  # gemma3_text lives in gemma3
    return importlib.import_module(f"transformers.models.{module}.modeling_{module}")


def base_classes(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """transformers' config class and causal language model class of a family."""
    prefix = FAMILIES[model_type].prefix
    model = getattr(modeling(model_type), f"{prefix}ForCausalLM")
    return model.config_class, model


def rotation(family: Family, model_type: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """How a family rotates q and k: `rotate(q, k, cos, sin, unsqueeze_dim=...)`."""
    rotate = modeling(model_type).apply_rotary_pos_emb
    return partial(_rotate_first, rotate) if family.rotates_first else rotate


def rotation_of(attention: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """As an attention module of a model rotates its q and k: `rotation`, or not at all (SmolLM3 has such layers)."""
    if not getattr(attention, "use_rope", True):
        return unrotated
    return rotation(family_of(attention.config), base_model_type(attention.config.model_type))


def unrotated(q: Tensor, k: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """What sees no positions."""
    return q, k


def _rotate_first(
    rotate: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int
) -> tuple[Tensor, Tensor]:
    size = cos.shape[-1]
    rotated = rotate(q[..., :size], k[..., :size], cos, sin, unsqueeze_dim=unsqueeze_dim)
    q, k = (torch.cat([new, old[..., size:]], dim=-1) for new, old in zip(rotated, (q, k), strict=True))
    return q, k


def ropes(stack: Any, positions: Sequence[Tensor | None]) -> list[Any]:
    """cos and sin `[B, T, R]` of each layer of a decoder stack at `positions` `[B, T]` of its own, as `rotation` takes
    them; None where it has none. Layers at the same ones share them if they rotate at the same speed."""
    weight = stack.get_input_embeddings().weight  # of which only type and device count
    speeds: list[dict[str, str]] = [{}] * len(positions)
    if hasattr(stack.rotary_emb, "layer_types"):  # full and sliding layers rotate at different ones
        speeds = [{"layer_type": name} for name in stack.config.layer_types]
    made: dict[Any, Any] = {}
    places = [(id(own), *speed.values()) for own, speed in zip(positions, speeds, strict=True)]
    for place, own, speed in zip(places, positions, speeds, strict=True):
        if place not in made:
            made[place] = None if own is None else stack.rotary_emb(weight, position_ids=own, **speed)
    return [made[place] for place in places]


class Head(nn.Module):
    """The decoder's last hidden state `[..., hidden]` to the model's own logits `[..., vocab]`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.config, self.family = model.config, family_of(model.config)
        self.output: Any = model.get_output_embeddings()

    def forward(self, hidden: Tensor) -> Tensor:
        """Scaled and capped as the family does, in the dtype of the output embedding."""
        return self.family.logits(self.config, self.output(hidden))
