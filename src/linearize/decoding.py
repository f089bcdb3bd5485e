"""Which calls of a converted model a `Decoder` answers, and which model has one.

`next_token` stands before the forward of every converted model. A call with one new token for each row, a cache and no
gradients is its; what it cannot do goes on to the ordinary forward. A cache that it serves is lent to the model's
decoder for as many sequences. Threads that generate with one model have its decoders in turns, a token each.
"""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from linearize.cache import MixerCacheLayer
from linearize.decoder import Decoder, turn
from linearize.families import base_model_type
from linearize.mixer import LinearizedAttention
from linearize.ops.liger import warn_once
from linearize.plain_layers import PLAIN, is_plain

MOVING = ("dynamic", "longrope")  # RoPE whose frequencies depend on the largest position
UNEVEN = ("mixtral", "gpt_oss")  # experts: how much work there is depends on the text
TAKEN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
TAKEN |= {"cache_position", "return_dict"}
OWN = ("output_capturing_hook", "_prepare")  # hooks that are not a user's

MOST = 4  # decoders of one model

_decoders: WeakKeyDictionary[PreTrainedModel, dict[int, Decoder]] = WeakKeyDictionary()  # by how many sequences


def next_token(model: PreTrainedModel, given: Mapping[str, Any]) -> CausalLMOutputWithPast | None:
    """What the forward of `model` would return for the arguments `given`; None where that has to do it itself."""
    ids, cache, mask = given.get("input_ids"), given.get("past_key_values"), given.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != 1 or not isinstance(cache, Cache):
        return None
    converted = any(isinstance(layer, MixerCacheLayer) for layer in cache.layers)
    if not converted or not all(layer.is_initialized for layer in cache.layers):
        return None
    if (reason := _slow(model, cache, ids)) is not None:
        _say_slow(model, reason)
        return None
    seen, batch = cache.get_seq_length(), ids.shape[0]
    if not _ordinary(model, given) or any(getattr(layer, "batch_size", batch) != batch for layer in cache.layers):
        return None
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (batch, seen + 1)):
        return None
    with turn:
        decoder = _decoders.get(model, {}).get(batch)
        if decoder is None or not decoder.holds(cache):
            with torch.inference_mode(False), torch.no_grad():  # buffers outlive the caller's mode
                decoder = _lend(model, cache, batch, mask)
        if decoder is None:
            return None
        valid = None if mask is None else mask[:, -1]
        logits = decoder.step(ids, seen if given.get("position_ids") is None else given["position_ids"], valid)
    return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


def _slow(model: PreTrainedModel, cache: Cache, ids: Tensor) -> str | None:
    """Why one more token has to go the ordinary way, by how it is asked for; None if it has not."""
    reasons = {
        "gradients are kept (torch.no_grad() keeps none)": torch.is_grad_enabled(),
        "the model is in training mode": model.training,
        "autocast": torch.is_autocast_enabled(ids.device.type),
        "an offloaded cache": getattr(cache, "offloading", False),
        "a quantised cache, or one of a sliding window that stays": any(
            type(layer) not in (MixerCacheLayer, DynamicLayer) for layer in cache.layers
        ),
    }
    return next((reason for reason, true in reasons.items() if true), None)


def _say_slow(model: PreTrainedModel, reason: str) -> None:
    """Say why, on a GPU, where it counts."""
    if next(model.parameters()).is_cuda:
        warn_once(f"decoding goes without a CUDA graph, several times slower: {reason}")


def _ordinary(model: PreTrainedModel, given: Mapping[str, Any]) -> bool:
    """Whether nothing but logits is asked for."""
    config, kept = model.config, given.get("logits_to_keep")
    others = any(value is not None and value is not False for name, value in given.items() if name not in TAKEN)
    plain = given.get("use_cache") in (None, True) and given.get("return_dict", True) in (None, True)
    plain = plain and (kept is None or (isinstance(kept, int) and kept in (0, 1)))
    return plain and not others and config.return_dict and not (config.output_hidden_states or config.output_attentions)


def forget(model: PreTrainedModel) -> None:
    """Free what steps of the model need, its weights as they are among it; made anew when they are needed."""
    with turn:
        for decoder in _decoders.pop(model, {}).values():
            decoder.release()


def _lend(model: PreTrainedModel, cache: Cache, batch: int, mask: Tensor | None) -> Decoder | None:
    """The decoder that has the cache now; None where there is none for this model."""
    if (reason := why_not(model)) is not None:
        forget(model)
        _say_slow(model, reason)
        return None
    decoders = _decoders.setdefault(model, {})
    if (decoder := decoders.pop(batch, None)) is not None:
        decoder.release()
        if not decoder.fits(model):
            decoder = None
            forget(model)  # the others are for what the model was, too
            decoders = _decoders.setdefault(model, {})
    if decoder is None:  # before more memory is taken, that of others is free, but where they have caches
        idle = [size for size, other in decoders.items() if not other.serves()]
        for size in [*idle, *[size for size in decoders if size not in idle][: -(MOST - 1)]]:
            decoders.pop(size).release()
        decoder = Decoder(model, batch)
    decoders[batch] = decoder  # the last one is the latest
    decoder.take(cache, mask)
    return decoder


def why_not(model: PreTrainedModel) -> str | None:
    """Why there is no `Decoder` for a converted model; None if there is."""
    layers: list[Any] = [layer.self_attn for layer in model.base_model.layers]
    mixers = [attention for attention in layers if isinstance(attention, LinearizedAttention)]
    if any(hasattr(module, "base_layer") for module in model.modules()):  # PEFT's
        return "LoRA is not merged into the weights (linearize merge)"
    if len(mixers) < len(layers) or any(mixer.softmax_heads is not None for mixer in mixers):
        if not is_plain(model.base_model):
            return f"what stays softmax attention grows, for which layers must be as in {', '.join(PLAIN)}"
        if any(getattr(holder, "sliding_window", None) is not None for holder in (model.config, *layers)):
            return "what stays softmax attention has a sliding window of its own"
    if (name := base_model_type(model.config.model_type)) in UNEVEN:
        return f"the experts of {name} do a different amount of work for every text"
    rope_types = getattr(model.base_model.rotary_emb, "rope_type", "default")
    rope_types = rope_types.values() if isinstance(rope_types, dict) else [rope_types]
    if moving := [name for name in rope_types if name in MOVING]:
        return f"the frequencies of {moving[0]} RoPE depend on the length"
    if any(mixer.ablated for mixer in mixers):
        return "a branch is left out"
    if any(parameter.dtype == torch.float64 for parameter in model.parameters()):
        return "weights are in float64"
    devices = {parameter.device.type for parameter in model.parameters()}
    if len({parameter.device for parameter in model.parameters()}) > 1 or "meta" in devices:
        return "the model is spread over several devices"
    if any(_watched(module) for module in (*model.base_model.modules(), model.get_output_embeddings())):
        return "hooks on its layers would not be called"
    return None


def _watched(module: Any) -> bool:
    """Whether others want to know when a module runs; transformers, where it collects outputs, looks by itself, and
    what describes tokens knows of steps."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    others = [hook for hook in hooks if getattr(hook, "__name__", "") not in OWN]
    return bool(others) or hasattr(module, "_hf_hook")
