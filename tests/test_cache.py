"""Cached decoding is the full forward, in constant memory, through everything that generation does with a cache."""

from unittest.mock import patch

import pytest
import torch
from tiny import FAMILIES, assert_close, ids, logits, tiny
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from linearize import LinearizeError, convert
from linearize.cache import MixerCacheLayer, cache_bytes

LENGTH = 24
SETTINGS = {"window": 5, "sinks": 3, "mixing_weight": 0.4}
LAYERS = ["all", "1,2"]


def converted(family: str = "llama", layers: str = "all", settings: dict = SETTINGS, **overrides):
    return convert(tiny(family, **overrides), layers=layers, **settings)


@torch.no_grad()
def in_parts(model, tokens: Tensor, sizes: list[int], mask: Tensor | None = None) -> tuple[Tensor, Cache]:
    """Logits of all tokens, read in calls of the given sizes, and the cache after them."""
    cache, outputs, end = DynamicCache(config=model.config), [], 0
    for part in tokens.split(sizes, dim=1):
        end += part.shape[1]
        kwargs = {}
        if mask is not None:
            positions = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, -part.shape[1] :]
            kwargs = {"attention_mask": mask[:, :end], "position_ids": positions}
        outputs.append(model(part, past_key_values=cache, **kwargs).logits)
    return torch.cat(outputs, 1), cache


def one_by_one(prompt: int) -> list[int]:
    return [prompt] + [1] * (LENGTH - prompt)


SPLITS = [[1] * LENGTH, one_by_one(13), [5, 18, 1], [7, 1, 9, 3, 4], [2, 1, 2, 19]]


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_split_is_the_full_forward(family, layers, sizes):
    model = converted(family, layers)
    full = logits(model, ids(2, LENGTH), use_cache=False)
    assert_close(in_parts(model, ids(2, LENGTH), sizes)[0], full)


@pytest.mark.parametrize(
    "settings",
    [
        {"window": 1, "sinks": 0},
        {"window": 1, "sinks": 4},
        {"window": 64, "sinks": 2},
        {"window": 3, "sinks": 12},
        {"structure": "none", "window": 4},
        {"mixing": "fixed"},
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", [[1] * LENGTH, one_by_one(9)], ids=["steps", "prompt"])
def test_any_settings(settings, sizes):
    model = converted(settings=settings)
    full = logits(model, ids(1, LENGTH), use_cache=False)
    assert_close(in_parts(model, ids(1, LENGTH), sizes)[0], full)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_rows_decode_as_if_alone(family, layers):
    model, pads = converted(family, layers), (0, 3, 9)
    mask = (torch.arange(LENGTH) >= torch.tensor(pads)[:, None]).long()
    for sizes in (one_by_one(10), [4, 2, 10, 1, 7]):
        padded, _ = in_parts(model, ids(3, LENGTH), sizes, mask)
        for row, pad in enumerate(pads):
            assert_close(padded[row, pad:], logits(model, ids(3, LENGTH)[row : row + 1, pad:])[0])


@pytest.mark.filterwarnings("ignore:padding behind tokens of its row")
def test_padding_between_turns_neither_decays_nor_writes():
    model = converted(settings={"window": 64, "mixing_weight": 0.4, "gate_temperature": 1.0})
    tokens, mask = ids(1, LENGTH), torch.ones(1, LENGTH, dtype=torch.long)
    mask[0, 8:12] = 0
    padded, _ = in_parts(model, tokens, [8, 10, 6], mask)
    assert_close(padded[mask.bool()], logits(model, tokens[mask.bool()][None])[0])


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("family", ["llama", "cohere", "gemma3_text", "gpt_oss", "olmo3", "phi"])
def test_beyond_the_length_the_model_was_trained_at(family, layers):
    """Past it, sinks keep the largest distance that the model knows: not the rotation of their true one."""
    model = converted(family, layers, max_position_embeddings=10)
    full = logits(model, ids(2, LENGTH), use_cache=False)
    for sizes in ([1] * LENGTH, one_by_one(8), [12, 6, 6]):
        assert_close(in_parts(model, ids(2, LENGTH), sizes)[0], full)
    unclamped = logits(converted(family, layers), ids(2, LENGTH), use_cache=False)
    assert_close(full[:, :10], unclamped[:, :10])
    assert not torch.allclose(full[:, 12:], unclamped[:, 12:], atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi"])
def test_given_positions_beyond_the_length_the_model_was_trained_at(family):
    """Which a text may reach that has not as many tokens."""
    model = converted(family, "all", max_position_embeddings=LENGTH + 3)
    positions = torch.arange(LENGTH)[None] + 10
    full = logits(model, ids(2, LENGTH), position_ids=positions, use_cache=False)
    for sizes in (one_by_one(8), [12, 6, 6]):
        cache, parts = DynamicCache(config=model.config), []
        for part, there in zip(ids(2, LENGTH).split(sizes, 1), positions.split(sizes, 1), strict=True):
            parts.append(logits(model, part, position_ids=there, past_key_values=cache))
        assert_close(torch.cat(parts, 1), full)


def test_native_sliding_layers_beside_converted_ones():
    model = converted("mistral", "0,2", sliding_window=6)
    full = logits(model, ids(1, LENGTH), use_cache=False)
    for sizes in ([1] * LENGTH, one_by_one(9)):
        assert_close(in_parts(model, ids(1, LENGTH), sizes)[0], full)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True, "top_k": 20}, {}], ids=str)
@pytest.mark.parametrize(("family", "layers"), [*((family, "all") for family in FAMILIES), ("llama", "0,2")])
def test_generation_with_and_without_a_cache(family, settings, layers):
    uncapped = {"final_logit_softcapping": None} if family == "gemma2" else {}  # else two beams are equally likely
    model, mask = converted(family, layers, **uncapped), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    generated = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        given = {"attention_mask": mask, "max_new_tokens": 9, "use_cache": use_cache}
        generated.append(model.generate(ids(2, 9), **given, **settings))
    assert torch.equal(*generated)
    assert generated[0].shape == (2, 18)


def test_generation_reads_the_prompt_in_chunks():
    model, prompt = converted(), ids(1, 17)
    given = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    expected = model.generate(prompt, **given)
    assert torch.equal(model.generate(prompt, prefill_chunk_size=5, **given), expected)


def test_a_conversation_goes_on_from_its_cache():
    model, tokens = converted(), ids(1, LENGTH)
    cache = in_parts(model, tokens[:, :15], [15])[1]
    given = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(model.generate(tokens, past_key_values=cache, **given), model.generate(tokens, **given))


def test_the_default_forward_returns_a_cache():
    model = converted()
    cache = model(ids(1, 10)).past_key_values
    assert isinstance(cache.layers[1], MixerCacheLayer)
    assert cache.get_seq_length() == 10
    expected = logits(model, ids(1, LENGTH))[:, 10:]
    assert_close(logits(model, ids(1, LENGTH)[:, 10:], past_key_values=cache), expected)


@pytest.mark.parametrize("settings", [{"structure": "gla"}, {"structure": "none"}, {"behind": True}], ids=str)
def test_its_size_is_constant_to_the_byte(settings):
    model = converted(settings={"window": 5, "sinks": 3} | settings)
    sizes = {cache_bytes(in_parts(model, ids(1, n), [n])[1]) for n in (1, 4, 5, 6, 24, 100)}
    sizes |= {cache_bytes(in_parts(model, ids(1, 100), [70, *[1] * 30])[1])}
    assert len(sizes) == 1


@pytest.mark.parametrize("behind", [False, True])
def test_it_owns_no_more_than_it_says(behind):
    """No view keeps the storage of the whole prompt."""
    _, cache = in_parts(converted(behind=behind), ids(2, 200), [190, 5, 5])
    tensors = [x for layer in cache.layers for x in vars(layer).values() if isinstance(x, Tensor)]
    owned = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    assert sum(owned.values()) <= cache_bytes(cache)


def test_the_softmax_layers_of_a_hybrid_grow_alone():
    model = converted(layers="0,2")
    small, large = (in_parts(model, ids(1, n), [n])[1] for n in (30, 50))
    grown = [b.keys.nbytes - a.keys.nbytes for a, b in zip(small.layers, large.layers, strict=True)]
    assert grown == [0, 20 * 2 * 8 * 4, 0]
    assert cache_bytes(large) - cache_bytes(small) == 2 * sum(grown)


def test_reset_forgets_everything():
    model = converted()
    _, cache = in_parts(model, ids(2, LENGTH), [LENGTH])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache_bytes(cache) == 0
    again = logits(model, ids(1, LENGTH, seed=7), past_key_values=cache)
    assert_close(again, logits(model, ids(1, LENGTH, seed=7)))


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "repeat"],
)
@pytest.mark.parametrize("settings", [{}, {"layers": "0,2"}, {"behind": True}], ids=["all", "two", "behind"])
def test_rows_move_with_all_that_belongs_to_them(change, rows, settings):
    """Rows differ in padding too: one of them has not filled its sinks yet."""
    model, tokens = converted(**settings), ids(3, LENGTH)
    mask = (torch.arange(LENGTH) >= torch.tensor([0, 4, 8])[:, None]).long()
    _, cache = in_parts(model, tokens[:, :10], [10], mask)
    change(cache)
    mask, tokens = mask[rows], tokens[rows]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    after = logits(model, tokens[:, 10:], past_key_values=cache, attention_mask=mask, position_ids=positions[:, 10:])
    full = logits(model, tokens, attention_mask=mask, position_ids=positions, use_cache=False)
    assert_close(after, full[:, 10:])


def test_rows_of_an_empty_cache_may_move():
    layer = MixerCacheLayer()
    layer.batch_repeat_interleave(2)
    assert layer.past() is None
    assert layer.nbytes() == 0


def test_crop_is_refused():
    _, cache = in_parts(converted(), ids(1, 10), [10])
    with pytest.raises(LinearizeError, match="cannot be cropped, so assisted decoding does not work"):
        cache.crop(-2)


def test_assisted_decoding_is_refused():
    """Before anything is generated; as an assistant, where its guesses are to be taken back."""
    model, given = converted(), {"max_new_tokens": 8, "do_sample": False}
    with (
        patch.object(type(model), "forward", side_effect=AssertionError),
        pytest.raises(LinearizeError, match="assisted decoding does not work"),
    ):
        model.generate(ids(1, 9), prompt_lookup_num_tokens=3, **given)
    with pytest.raises(LinearizeError, match="nor can it assist"):
        tiny().generate(ids(1, 9), assistant_model=model, **given)


def test_the_cache_of_an_unconverted_model_is_refused():
    model = tiny()
    cache = model(ids(1, 10)).past_key_values
    convert(model)
    with pytest.raises(LinearizeError, match="filled by an unconverted model; start with a new one"):
        model(ids(1, 1), past_key_values=cache)


def test_other_code_cannot_write_into_it():
    with pytest.raises(TypeError, match=r"store\(\)"):
        MixerCacheLayer().update(torch.ones(1), torch.ones(1))


def test_caches_that_do_not_fit_are_refused():
    model = converted(layers="0,2")
    with pytest.raises(LinearizeError, match="static cache"):
        model(ids(1, 4), past_key_values=StaticCache(config=model.config, max_cache_len=9))
    positions = torch.tensor([[0, 1, 0, 1]])
    with pytest.raises(LinearizeError, match="packed documents do not fit a cache"):
        model(ids(1, 4), position_ids=positions, past_key_values=DynamicCache(config=model.config))


def test_rows_are_kept_by_a_mask():
    model = convert(tiny(), window=5, layers="1,2")
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        logits(model, ids(3, 9), past_key_values=cache)
    caches[0].batch_select_indices(torch.tensor([True, False, True]))
    caches[1].batch_select_indices(torch.tensor([0, 2]))
    found, other = (logits(model, ids(2, 3), past_key_values=cache) for cache in caches)
    assert_close(found, other)


def test_a_cache_whose_crop_failed_is_refused():
    model = convert(tiny(), window=5, layers="1,2")
    cache = DynamicCache(config=model.config)
    logits(model, ids(1, 9), past_key_values=cache)
    with pytest.raises(LinearizeError, match="cannot be cropped"):
        cache.crop(-2)
    with pytest.raises(LinearizeError, match=r"hold different numbers of tokens \(7, 9\)"):
        logits(model, ids(1, 3), past_key_values=cache)


@pytest.mark.parametrize(("row", "warns"), [([0, 0, 1, 1, 1], False), ([1, 1, 0, 1, 1], True), ([1, 1, 1, 0, 0], True)])
def test_padding_that_takes_up_the_window_is_told(row, warns, monkeypatch):
    told = []
    monkeypatch.setattr("linearize.tokens.warn_once", told.append)
    model, mask = convert(tiny(), window=5), torch.tensor([row])
    logits(model, ids(1, 5), attention_mask=mask, past_key_values=DynamicCache(config=model.config))
    assert bool(told) == warns
    told.clear()
    logits(model, ids(1, 5), attention_mask=mask, use_cache=False)
    assert bool(told) == (row == [1, 1, 0, 1, 1])
