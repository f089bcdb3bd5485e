"""What a model is made of, and what its cache weighs, before and after conversion."""

from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from linearize.assets import resolve_model
from linearize.checkpoint import as_merged, load, load_model, unwrapped
from linearize.config import MixerConfig
from linearize.convert import attention_of, is_linearized, kept_softmax, mixers, native_window
from linearize.families import base_model_type
from linearize.features import feature_size
from linearize.files import MARKER
from linearize.results import byte_size
from linearize.structures import STRUCTURES

CACHE_DTYPE_BYTES = 2  # keys and values are kept in bf16 where memory matters; states as state_dtype says


class Memory(NamedTuple):
    """Bytes of cache in one layer, keys and values in bf16 and states in their state_dtype."""

    per_token: int  # what each further token adds
    window: int  # keys and values of window and sinks, which a sequence keeps however long it is
    states: int  # what the recurrence keeps
    longest: int | None = None  # tokens after which a softmax layer with a window of its own grows no more


class Inspection(NamedTuple):
    """One row for the whole model and the memory of each layer."""

    family: str
    parameters: int
    new_parameters: int
    converted: list[int]
    layers: list[Memory]
    original: list[Memory]

    def cache_bytes(self, context: int, original: bool = False) -> int:
        """Bytes of one sequence of `context` tokens."""
        layers = self.original if original else self.layers
        return sum(m.per_token * min(context, m.longest or context) + m.window + m.states for m in layers)


def inspect(model: PreTrainedModel) -> Inspection:
    """Layers, parameters and memory of a model, converted or not; an adapter beside the weights is not counted."""
    with as_merged(model):
        return _inspect(model)


def _inspect(model: PreTrainedModel) -> Inspection:
    config = model.config
    count = config.num_hidden_layers
    head = attention_of(model, 0).head_dim
    token = 2 * config.num_key_value_heads * head * CACHE_DTYPE_BYTES
    windows = [native_window(model, index) for index in range(count)]
    longest = [None if window is None else window - 1 for window in windows]  # the token that is read is not yet kept
    original = [Memory(token, 0, 0, tokens) for tokens in longest]
    layers = list(original)
    added = 0
    for mixer in mixers(model):
        of_head, heads = token // config.num_key_value_heads, mixer.layer.num_key_value_heads
        kept = 0 if mixer.config.local == "none" else (mixer.config.window + mixer.config.sinks) * of_head * heads
        grows = of_head * (config.num_key_value_heads - heads)
        states = recurrent_bytes(mixer.config, mixer.layer.num_heads, heads, head)
        layers[mixer.layer_idx] = Memory(grows, kept, states)
        added += sum(p.numel() for name, p in mixer.named_parameters() if name.startswith(("mixing.", "recurrence.")))
    return Inspection(
        family=base_model_type(config.model_type),
        parameters=sum(p.numel() for p in model.parameters()),
        new_parameters=added,
        converted=config.linearize["layers"] if is_linearized(model) else [],
        layers=layers,
        original=original,
    )


def recurrent_bytes(config: MixerConfig, num_heads: int, num_key_value_heads: int, head_dim: int) -> int:
    """Bytes of one layer's states."""
    if config.structure == "none":
        return 0
    heads = num_key_value_heads
    structure, key_size = STRUCTURES[config.structure], feature_size(config.feature_map, head_dim, config.shifts)
    adds_up = config.shares_normalizer or config.readout == "denominator"
    value_size = head_dim + adds_up  # its sum of weights is one more channel
    late = 0  # bytes of a token that is still in the window: its gates, and the position from which its key turns back
    if config.is_behind:
        gates = max(1, structure.gates * structure.gate_size(config, key_size))
        late = config.state_bytes * heads * gates + 4 * config.turns_back
    convolved = 2 * heads + num_heads * (config.convolution_form == "silu")
    recent = convolved * head_dim * CACHE_DTYPE_BYTES * ((config.convolution or 1) - 1)
    return recent + structure.state_bytes(config, key_size, value_size, heads) + late * config.window


def equal_memory_window(config: MixerConfig, num_heads: int, num_key_value_heads: int, head_dim: int) -> int:
    """The window of a model without states that weighs what `config`'s window and states weigh together."""
    token = 2 * num_key_value_heads * head_dim * CACHE_DTYPE_BYTES
    window = 0 if config.local == "none" else config.window
    return window + -(-recurrent_bytes(config, num_heads, num_key_value_heads, head_dim) // token)


def show(name: str, contexts: list[int]) -> None:
    """Print the inspection of a checkpoint folder, an embedded model, a folder or a hub name."""
    if (Path(name) / MARKER).is_file():
        model = unwrapped(load(name)[0])
    else:
        model = load_model(resolve_model(name))
    found = inspect(model)
    console = Console()
    console.print(
        f"{name}: {found.family}, {len(found.layers)} layers, {len(found.converted)} converted, "
        f"{found.parameters:,} parameters ({found.new_parameters:,} new)"
    )
    if is_linearized(model) and (kept := kept_softmax(model)) is not None:
        names = model.config.linearize.get("softmax_heads")
        console.print(f"softmax attention stays in {kept}{f': {names}' if names else ''}")
    for config in dict.fromkeys(mixer.config for mixer in mixers(model)):
        console.print(str(config))
    table = Table("layers", "attention", "bytes/token", "original", "window bytes/sequence", "state bytes/sequence")
    for first, last in _runs(found):
        new, old = found.layers[first], found.original[first]
        name = "liger" if first in found.converted else "softmax"
        span = str(first) if first == last else f"{first}-{last}"
        table.add_row(span, name, f"{new.per_token:,}", f"{old.per_token:,}", f"{new.window:,}", f"{new.states:,}")
    console.print(table)
    dtypes = dict.fromkeys(mixer.config.state_dtype for mixer in mixers(model) if mixer.config.structure != "none")
    title = ", ".join(["one sequence; keys and values in bf16", *(f"states in {dtype}" for dtype in dtypes)])
    table = Table("context", "cache", "original", "ratio", title=title)
    for context in contexts:
        new_bytes, old_bytes = found.cache_bytes(context), found.cache_bytes(context, original=True)
        row = (byte_size(new_bytes), byte_size(old_bytes), f"{old_bytes / new_bytes:.1f} times")
        table.add_row(f"{context:,}", *row)
    console.print(table)


def _runs(found: Inspection) -> list[tuple[int, int]]:
    """Neighbouring layers that are alike: first and last."""
    kinds = [
        (index in found.converted, found.layers[index], found.original[index]) for index in range(len(found.layers))
    ]
    runs: list[tuple[int, int]] = []
    for index, kind in enumerate(kinds):
        if runs and kind == kinds[runs[-1][1]]:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs
