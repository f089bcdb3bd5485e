"""What `inspect` says of memory is what a cache really holds."""

import pytest
import torch
from tiny import FAMILIES, ids, tiny
from transformers import DynamicCache

from linearize import MixerConfig, convert
from linearize.cache import MixerCacheLayer, cache_bytes
from linearize.checkpoint import unwrapped
from linearize.inspect import _runs, equal_memory_window, inspect, recurrent_bytes
from linearize.recipe import LoraSettings, read
from linearize.structures import STRUCTURES
from linearize.train.trainer import with_lora

BOOKKEEPING = ("valid", "sink_time", "real")  # a few bytes of masks and counts, not spoken of


def bytes_of(model, context: int) -> int:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids(1, context), past_key_values=cache)
    layers = [layer for layer in cache.layers if isinstance(layer, MixerCacheLayer)]
    return cache_bytes(cache) - sum(getattr(layer, name).nbytes for layer in layers for name in BOOKKEEPING)


@pytest.mark.parametrize("structure", ["gla", "none"])
@pytest.mark.parametrize("layers", ["all", "1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_of_a_real_cache(family, layers, structure):
    model = convert(tiny(family).bfloat16(), structure=structure, layers=layers, window=5, sinks=3)
    for context in (16, 50):
        assert inspect(model).cache_bytes(context) == bytes_of(model, context)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("late", [{}, {"behind": True}, {"behind": True, "rope": "both"}], ids=str)
def test_every_structure_s_states_weigh_what_is_said(late, family, structure):
    slots = {"slots": 7} if structure == "gsa" else {}
    model = convert(tiny(family).bfloat16(), structure=structure, window=5, sinks=3, **slots, **late)
    assert inspect(model).cache_bytes(16) == bytes_of(model, 16)


def test_an_adapter_is_not_counted():
    model = convert(tiny(), mixing="data_dependent", gate_source="learned")
    expected = inspect(model)
    assert expected.new_parameters > 0
    assert inspect(unwrapped(with_lora(model, LoraSettings(r=2)))) == expected


@pytest.mark.parametrize("form", ["linear", "silu"])
def test_what_a_convolution_goes_on_from_weighs_what_is_said(form):
    model = convert(tiny().bfloat16(), window=5, sinks=3, convolution=4, convolution_form=form)
    assert inspect(model).cache_bytes(16) == bytes_of(model, 16)


@pytest.mark.parametrize("layers", ["0", "1"])
@pytest.mark.parametrize("family", ["gemma2", "mistral", "olmo3"])
def test_softmax_layers_with_a_window_stop_growing(family, layers):
    model = tiny(family, sliding_window=9).bfloat16()
    for context in (7, 8, 9, 10, 30):
        assert inspect(model).cache_bytes(context) == bytes_of(model, context)
    convert(model, layers=layers, window=5, sinks=3)
    for context in (8, 30):
        assert inspect(model).cache_bytes(context) == bytes_of(model, context)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_original_s_bytes(family):
    model = tiny(family).bfloat16()
    expected = bytes_of(model, 33)
    assert inspect(model).cache_bytes(33) == expected
    assert inspect(convert(model)).cache_bytes(33, original=True) == expected


def test_what_a_model_is_made_of():
    model = tiny()
    before = inspect(model)
    assert (before.family, before.converted, before.new_parameters) == ("llama", [], 0)
    after = inspect(convert(model, layers="0,2", window=5, sinks=3))
    assert (after.family, after.converted, after.new_parameters) == ("llama", [0, 2], 12)
    assert after.parameters == before.parameters + 12
    assert [memory.per_token for memory in after.layers] == [0, 64, 0]
    assert inspect(convert(tiny(), mixing="fixed")).new_parameters == 0


@pytest.mark.parametrize(("heads", "head_dim", "extra"), [(2, 8, 8), (1, 64, 64), (3, 16, 16), (8, 128, 128)])
def test_a_window_of_equal_memory(heads, head_dim, extra):
    """A state in fp32 weighs as much as head_dim tokens in bf16."""
    assert equal_memory_window(MixerConfig(window=5), 3 * heads, heads, head_dim) == 5 + extra
    assert equal_memory_window(MixerConfig(window=5, structure="none"), 3 * heads, heads, head_dim) == 5


def test_the_default_recipe_s_window_of_equal_memory():
    """Of SmolLM2-135M, a state in fp16 weighs 32 tokens; the gates and positions of the 64 in the window, 2."""
    assert equal_memory_window(read("default").mixer.layer(0, 30), 9, 3, 64) == 64 + 32 + 2


@pytest.mark.parametrize(("dtype", "weight"), [("float32", 512), ("float16", 256), ("bfloat16", 256)])
def test_a_model_of_the_equal_window_weighs_the_same(dtype, weight):
    config = MixerConfig(window=5, sinks=3, state_dtype=dtype)
    window = equal_memory_window(config, 6, 2, 8)
    ours = convert(tiny().bfloat16(), window=5, sinks=3, state_dtype=dtype)
    baseline = convert(tiny().bfloat16(), structure="none", window=window, sinks=3)
    assert bytes_of(ours, 50) == bytes_of(baseline, 50)
    assert recurrent_bytes(config, 6, 2, 8) == weight


def test_layers_that_differ_have_rows_of_their_own():
    model = convert(tiny(num_hidden_layers=4), layers="0-2", window=[4, 9])
    assert _runs(inspect(model)) == [(0, 1), (2, 2), (3, 3)]
