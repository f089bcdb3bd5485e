"""Swap the softmax attention of a loaded model for mixers, in place, and back; classes that save and load it."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache, wraps
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from linearize.cache import adopt
from linearize.config import MixerConfig, MixerSettings, validated
from linearize.decoding import forget, next_token
from linearize.errors import LinearizeError
from linearize.families import FAMILIES, LINEARIZED, base_classes, base_model_type, family_of, ropes
from linearize.heads import Heads, heads_text, parse_heads
from linearize.mixer import LinearizedAttention, parts
from linearize.packing import document_masks
from linearize.ranges import numbers
from linearize.tokens import Tokens, describe, most_sinks

Layers = str | int | Iterable[int]


def convert(
    model: PreTrainedModel,
    structure: str | list[str] = "gla",
    layers: Layers = "all",
    softmax_every: int | None = None,
    softmax_heads: str | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Replace the attention of the chosen `layers` ("all", "0-7,16", or indices) by Liger Attention; return `model`.

    `softmax_every=8` leaves layers 7, 15, 23 ... as they are, `softmax_heads="8/0,17/1-2"` key/value heads of layers
    that are converted, with their query heads. `structure` and `settings` are those of `MixerConfig`, each a value or a
    list by layer (`MixerSettings`). Its class and config change with the model, so that
    `save_pretrained` and `from_pretrained` give the same model again. No weight changes; new ones come with settings
    that are learned, such as `mixing="per_head"`, and start at the same values every time.
    Raises LinearizeError for an unknown family, setting or layer, and for a model that is converted already.
    """
    mixer = validated(MixerSettings, {"structure": structure, **settings}, "mixer")
    chosen, heads = check_convertible(model, mixer, layers, softmax_every, softmax_heads)
    config_class, model_class = linearized_classes(model.config.model_type)
    model.config.__class__, model.__class__ = config_class, model_class
    model.config.linearize = {"layers": chosen, "mixer": mixer.model_dump(mode="json")}
    if heads:
        model.config.linearize["softmax_heads"] = heads_text(heads)
    _swap(model)
    return model


def check_convertible(
    model: PreTrainedModel, mixer: MixerSettings, layers: Layers, every: int | None, softmax_heads: str | None = None
) -> tuple[list[int], Heads]:
    """The layers that `convert` would convert, and heads of them that it would not; LinearizeError where it would
    refuse. A layer of which no head would be converted is left as it is."""
    _check_unwrapped(model)
    if is_linearized(model):
        raise LinearizeError("the model is linearized already; linearize.revert(model) undoes it")
    family_of(model.config)
    if type(model) is not (wanted := base_classes(model.config.model_type)[1]):
        raise LinearizeError(f"a {type(model).__name__} is no {wanted.__name__}; load it by AutoModelForCausalLM")
    chosen = choose_layers(layers, every, model.config.num_hidden_layers)
    heads: Heads = {}
    if softmax_heads is not None:
        chosen, heads = _choose_heads(model, softmax_heads, chosen)
    for index in chosen:
        if not getattr(attention_of(model, index), "is_causal", True):
            raise LinearizeError(
                f"layer {index} sees the tokens after its own (use_bidirectional_attention); valid: causal attention"
            )
        _check_layer(model, index, mixer.layer(index, model.config.num_hidden_layers))
    return chosen, heads


def _choose_heads(model: PreTrainedModel, softmax_heads: str, layers: list[int]) -> tuple[list[int], Heads]:
    """The layers of which some heads are converted, and the heads of them that are not."""
    count, family = model.config.num_key_value_heads, family_of(model.config)
    heads = parse_heads(softmax_heads, model.config.num_hidden_layers, count)
    if outside := sorted(set(heads) - set(layers)):
        raise LinearizeError(f"softmax_heads {softmax_heads!r} names layer {outside[0]}, which is not converted")
    if special := family.softcap or family.null_logits:
        raise LinearizeError(f"softmax_heads has no place for the {special} of {model.config.model_type}; valid: null")
    if sliding := [layer for layer in heads if native_window(model, layer) is not None]:
        raise LinearizeError(
            f"softmax_heads {softmax_heads!r} names layer {sliding[0]}, which has a sliding window of its own; "
            "valid: layers that see all tokens"
        )
    whole = {layer for layer, chosen in heads.items() if len(chosen) == count}
    if not (converted := [layer for layer in layers if layer not in whole]):
        raise LinearizeError(f"softmax_heads {softmax_heads!r} leaves no head to convert")
    return converted, {layer: chosen for layer, chosen in heads.items() if layer not in whole}


def _check_layer(model: PreTrainedModel, index: int, config: MixerConfig) -> None:
    """Refuse settings that the model's sizes do not allow."""
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    size, recurrent = attention_of(model, index).head_dim, config.structure != "none"
    if recurrent and config.gate_source == "q" and heads != groups:
        raise LinearizeError(
            f"gate_source q needs a state for each of the {heads} query heads, and there is one for each of the "
            f"{groups} key/value heads, which a group shares; valid here: k, v, learned"
        )
    if recurrent and (config.slots or 0) > size and config.gate_source != "learned" and config.time_scales is None:
        raise LinearizeError(
            f"{config.slots} slots share the gates of {size} key channels and would hold the same; "
            f"valid: 1-{size}, or more with gate_source learned or time_scales"
        )
    family = family_of(model.config)
    if config.score != "softmax" and (family.softcap or family.null_logits):
        raise LinearizeError(
            f"score {config.score} has no place for the {family.softcap or family.null_logits} of "
            f"{model.config.model_type}; valid: softmax"
        )
    native = native_window(model, index)
    if config.local != "none" and native is not None and native < config.window:
        raise LinearizeError(
            f"layer {index} has a sliding window of {native} tokens of its own, less than window {config.window}; "
            f"valid: window 1-{native}, or layers without it"
        )


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `convert`: softmax attention again, with the projections as they are now; return `model`."""
    _check_unwrapped(model)
    if not is_linearized(model):
        raise LinearizeError(f"a {model.config.model_type!r} model is not linearized; there is nothing to revert")
    for mixer in mixers(model):
        for name in parts(mixer.original):
            setattr(mixer.original, name, getattr(mixer, name))
        decoder(model).layers[mixer.layer_idx].self_attn = mixer.original
    hooks = decoder(model)._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _prepare]:
        del hooks[key], decoder(model)._forward_pre_hooks_with_kwargs[key]
    del model.config.linearize
    model.config.__class__, model.__class__ = base_classes(base_model_type(model.config.model_type))
    return model


def _check_unwrapped(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise LinearizeError(
            f"a {type(model).__name__} is not a transformers model; give that itself (of PEFT: merge_and_unload())"
        )


def kept_softmax(model: PreTrainedModel) -> str | None:
    """What a converted model leaves softmax attention, in words; None if nothing."""
    config, converted = model.config, mixers(model)
    layers = config.num_hidden_layers - len(converted)
    heads = sum(len(mixer.softmax_heads.chosen) for mixer in converted if mixer.softmax_heads is not None)
    every = config.num_hidden_layers * config.num_key_value_heads
    parts = [f"{layers} of {config.num_hidden_layers} layers"] * (layers > 0)
    parts += [f"{heads} of {every} key/value heads"] * (heads > 0)
    return " and ".join(parts) or None


def is_linearized(model: nn.Module) -> bool:
    """Whether a model went through `convert`, in this process or before it was saved."""
    return getattr(getattr(model, "config", None), "linearize", None) is not None


def mixers(model: nn.Module) -> list[LinearizedAttention]:
    """The converted layers' attention modules, in order; also of a model that PEFT has wrapped."""
    return [module for module in model.modules() if isinstance(module, LinearizedAttention)]


def decoder(model: PreTrainedModel) -> Any:
    """The stack of decoder layers of a causal language model."""
    return model.base_model


def attention_of(model: PreTrainedModel, layer: int) -> Any:
    """The attention module of one layer, converted or not."""
    return decoder(model).layers[layer].self_attn


def native_window(model: PreTrainedModel, layer: int) -> int | None:
    """The tokens that a layer's softmax attention sees, the current one included, where it does not see all."""
    attention = attention_of(model, layer)
    if isinstance(attention, LinearizedAttention):
        attention = attention.original
    holder = attention if hasattr(attention, "sliding_window") else model.config  # where all layers are alike
    return getattr(holder, "sliding_window", None)


def choose_layers(layers: Layers, softmax_every: int | None, count: int) -> list[int]:
    """The indices that `layers` ("all", "0-7,16", or numbers) means for a model of `count` layers."""
    try:
        if isinstance(layers, str):
            chosen = set(range(count)) if layers == "all" else set(numbers(layers, count))
        else:
            chosen = {_index(index) for index in (layers if isinstance(layers, Iterable) else [layers])}
    except (ValueError, TypeError) as error:
        raise LinearizeError(
            f"layers {layers!r} is not valid; give 'all' or numbers and ranges like '0-7,16'"
        ) from error
    if softmax_every is not None:
        if type(softmax_every) is not int or softmax_every < 1:
            raise LinearizeError(f"softmax_every is {softmax_every!r}; valid: 1 and up")
        chosen -= set(range(softmax_every - 1, count, softmax_every))
    if outside := sorted(index for index in chosen if not 0 <= index < count):
        raise LinearizeError(f"layers {layers!r} names layer {outside[-1]}; this model's layers are 0-{count - 1}")
    if not chosen:
        raise LinearizeError(f"layers {layers!r} with softmax_every {softmax_every} leaves no layer to convert")
    return sorted(chosen)


def _index(given: Any) -> int:
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(given)
    return given


@cache
def linearized_classes(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """The config and model classes of a converted family, which transformers' Auto classes know."""
    base_config, base_model = base_classes(model_type)

    class Config(base_config):  # type: ignore[valid-type,misc]
        model_type = LINEARIZED + base_config.model_type
        linearize: dict | None = None

    class Model(base_model):  # type: ignore[valid-type,misc]
        config_class = Config

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            _plan(config)  # before anything large is made
            super().__init__(config, *args, **kwargs)
            _swap(self)

        @wraps(base_model.forward)  # generation looks at its signature
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = None
            if len(args) < len(_POSITIONAL):  # the last differs here
                output = next_token(self, dict(zip(_POSITIONAL, args, strict=False)) | kwargs)
            return super().forward(*args, **kwargs) if output is None else output

        def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
            raise LinearizeError("a linearized model's cache cannot go back, so assisted decoding does not work")

        def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
            raise LinearizeError("a linearized model's cache is no paged one, so continuous batching does not work")

        generate_batch = init_continuous_batching

        def _apply(self, *args: Any, **kwargs: Any) -> Any:
            forget(self)  # else weights as they were before would stay in memory
            return super()._apply(*args, **kwargs)

        def initialize_weights(self) -> None:
            super().initialize_weights()  # the decoder, a model with rules of its own, leaves mixing weights alone
            for mixer in mixers(self):
                mixer.reset_parameters()  # keeps what was loaded
                if mixer.family.null_logits is not None:  # as the original's, which the base class no longer finds
                    initialization.normal_(getattr(mixer, mixer.family.null_logits), std=self.config.initializer_range)

    for new, base in ((Config, base_config), (Model, base_model)):
        new.__name__ = new.__qualname__ = f"Linearized{base.__name__}"
    Config.__doc__ = f"{base_config.__name__} and `linearize`: the converted layers and their MixerConfig."
    Model.__doc__ = f"{base_model.__name__} with Liger Attention in the layers that its config lists."
    return Config, Model


def register() -> None:
    """Make converted checkpoints known to transformers' Auto classes."""
    for model_type in FAMILIES:
        config_class, model_class = linearized_classes(model_type)
        for new in (config_class, model_class):
            globals()[new.__name__] = new  # where pickle looks for it
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        if (conversion := get_checkpoint_conversion_mapping(model_type)) is not None:  # Mixtral's experts, one by one
            register_checkpoint_conversion_mapping(config_class.model_type, conversion, overwrite=True)


def _swap(model: PreTrainedModel) -> None:
    """Put mixers into the layers that the config lists, and the hook that describes tokens to them."""
    layers, settings, heads = _plan(model.config)
    family = family_of(model.config)
    for index in layers:
        attention = attention_of(model, index)
        own = settings.layer(index, model.config.num_hidden_layers)
        mixer = LinearizedAttention(attention, family, own, heads.get(index, ()))
        weight = next(attention.parameters())
        for branch in (mixer.recurrence, mixer.mixing, mixer.softmax_heads):
            if branch is not None:
                branch.to(device=weight.device, dtype=weight.dtype)
        decoder(model).layers[index].self_attn = mixer
    decoder(model).register_forward_pre_hook(_prepare, with_kwargs=True)


def _plan(config: PreTrainedConfig) -> tuple[list[int], MixerSettings, Heads]:
    """The converted layers, their settings and the heads of them that are not, out of a converted model's config."""
    plan = config.linearize
    if not isinstance(plan, dict) or plan.keys() - {"softmax_heads"} != {"layers", "mixer"}:
        raise LinearizeError(f"a {config.model_type!r} config lacks its 'linearize' entry of layers and mixer")
    layers = choose_layers(plan["layers"], None, config.num_hidden_layers)
    given = plan.get("softmax_heads")
    heads = {} if given is None else parse_heads(given, config.num_hidden_layers, config.num_key_value_heads)
    return layers, validated(MixerSettings, plan["mixer"], "mixer"), heads


_POSITIONAL = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")


def _prepare(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the decoder stack runs: a cache with the right layers, and a `Tokens` for the mixers."""
    if "tokens" in kwargs:  # a step that `decoding` runs
        return args, kwargs
    kwargs = {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}
    plan, config = module.config.linearize, module.config
    inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    past, positions = kwargs.get("past_key_values"), kwargs.get("position_ids")
    use_cache = kwargs.get("use_cache")
    if past is None and not module.training and (config.use_cache if use_cache is None else use_cache):
        past = DynamicCache(config=config)
    layer = None
    if past is not None:
        adopt(past, plan["layers"], config.num_hidden_layers)
        layer = past.layers[plan["layers"][0]]
    documents = kwargs.pop("documents", None)
    tokens = describe(
        tuple(inputs.shape[:2]),
        most_sinks(plan),
        inputs.device,
        kwargs.get("attention_mask"),
        positions,
        layer,
        documents,
    )
    if tokens.document is not None:
        if kwargs.get("past_key_values") is not None:
            raise LinearizeError("packed documents do not fit a cache, which holds one for each row; pass none")
        past = None
    kwargs["past_key_values"], kwargs["use_cache"] = past, past is not None
    kwargs["tokens"] = with_ropes(tokens, module, inputs, positions, past, documents)
    everything = len(plan["layers"]) == config.num_hidden_layers and "softmax_heads" not in plan
    if kwargs.get("output_attentions") or config.output_attentions:
        raise LinearizeError("a linearized model has no attention weights to give; valid: output_attentions=False")
    if everything:  # nobody needs the quadratic mask: a 4-D one is taken as it is
        kwargs["attention_mask"] = inputs.new_zeros(1, 1, 1, 1)
    elif tokens.document is not None:
        kwargs["attention_mask"] = document_masks(module, inputs, positions)
    return (), kwargs


def with_ropes(
    tokens: Tokens,
    module: Any,
    inputs: torch.Tensor,
    positions: torch.Tensor | None,
    past: Any = None,
    documents: int | None = None,
) -> Tokens:
    """With what mixers have to know of RoPE besides the angles of the tokens themselves; `documents` as `describe`
    has it, without which positions are looked at."""
    (B, T), limit = inputs.shape[:2], module.config.max_position_embeddings
    far = tokens.start + T > limit
    if positions is None:
        positions = torch.arange(tokens.start, tokens.start + T, device=inputs.device)[None]
    elif documents is None and not far:
        far = bool((positions >= limit).any())
    if far:  # sinks are kept within the length the model was trained at, however long the text
        clamped = positions.clamp(max=limit - 1)
        tokens = replace(tokens, sink_rope=ropes(module, [clamped] * module.config.num_hidden_layers))
    if past is not None:
        positions = positions.to(torch.int32).expand(B, -1)
        tokens = replace(tokens, rope_position=positions, leaving_rope=_leaving_rope(module, positions, past))
    return tokens


def _leaving_rope(module: Any, positions: torch.Tensor, past: Any) -> list[Any] | None:
    """cos and sin of each layer for those tokens in its cache that leave the window for the ones at `positions`
    `[B, T]`; None where keys are not turned back."""
    kept = [getattr(layer, "positions", None) for layer in past.layers]
    # beside them the last of this call, so that frequencies that depend on the length are those of this call
    last, T = positions.amax(dim=1, keepdim=True), positions.shape[1]
    leaving = {x.shape[1]: torch.cat([x[:, :T], last], dim=1) for x in kept if x is not None}  # by window
    if not leaving:
        return None
    made = ropes(module, [None if x is None else leaving[x.shape[1]] for x in kept])
    return [None if rope is None else tuple(x[:, :-1] for x in rope) for rope in made]
