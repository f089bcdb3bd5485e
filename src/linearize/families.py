"""The model families: a row of data each. `docs/families.md` says how to add one."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

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


class Family(NamedTuple):
    """A row: transformers' class names begin with `prefix`; `project` makes q, k and v as the family does."""

    prefix: str
    project: Callable[[nn.Module, Tensor], Projected]


FAMILIES = {  # by transformers' model_type
    "gemma": Family("Gemma", separate),
    "glm4": Family("Glm4", separate),
    "llama": Family("Llama", separate),
    "mistral": Family("Mistral", separate),
    "mixtral": Family("Mixtral", separate),
    "olmo": Family("Olmo", separate_clipped),
    "olmo2": Family("Olmo2", separate_with_wide_norms),
    "phi3": Family("Phi3", fused),
    "qwen2": Family("Qwen2", separate),
    "qwen3": Family("Qwen3", separate_with_norms),
    "smollm3": Family("SmolLM3", separate),
    "starcoder2": Family("Starcoder2", separate),
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
            f"{model_type!r} ({made[0]}) is no language model that decodes; valid: decoders of {', '.join(FAMILIES)}"
        )
    if model_type not in FAMILIES:
        raise LinearizeError(
            f"no row for model type {model_type!r} in families.py (docs/families.md says what a row needs); "
            f"valid: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def modeling(model_type: str) -> Any:
    """transformers' modeling module of a family."""
    return importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")


def base_classes(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """transformers' config class and causal language model class of a family."""
    prefix = FAMILIES[model_type].prefix
    model = getattr(modeling(model_type), f"{prefix}ForCausalLM")
    return model.config_class, model
