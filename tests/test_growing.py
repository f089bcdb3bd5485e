"""Steps by fixed addresses of models that leave layers or heads softmax attention, whose caches grow."""

import copy

import pytest
import torch
from test_cache import LENGTH, in_parts, one_by_one
from test_decoding import BY_OPERATIONS, DEVICE, GPU, UNFUSED, WHOLE, learned, steps  # noqa: F401 - a fixture
from tiny import assert_close, ids, logits, relative
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from linearize import decoding, growing
from linearize.cache import cache_bytes
from linearize.plain_layers import PLAIN

pytestmark = [pytest.mark.filterwarnings(warning) for warning in UNFUSED]  # on a GPU, in fp32
KEPT = [{"layers": "1"}, {"layers": "0,2"}, {"softmax_heads": "0/1,2/0"}, {"layers": "0-1", "softmax_heads": "1/0"}]
PUBLISHED, DEFAULT = {}, WHOLE[4]


@pytest.fixture(autouse=True)
def little_room(monkeypatch):
    """So that it is full now and then."""
    monkeypatch.setattr(growing, "STEP", 4)


@pytest.mark.parametrize("prompt", [1, 9, 12])
@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("settings", [PUBLISHED, DEFAULT, *BY_OPERATIONS[11:14]], ids=str)
def test_steps_are_the_full_forward(settings, kept, prompt, steps):  # noqa: F811
    model, tokens = learned(settings | kept), ids(2, LENGTH).to(DEVICE)
    full = logits(model, tokens, use_cache=False)
    found, cache = in_parts(model, tokens, one_by_one(prompt))
    assert_close(found, full)
    assert len(steps) == LENGTH - prompt
    assert len(set(steps)) == 1
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("family", [family for family in PLAIN if family != "llama"])
@pytest.mark.parametrize("kept", [KEPT[0], KEPT[2]], ids=str)
def test_every_plain_family(family, kept, steps):  # noqa: F811
    model, tokens = learned(DEFAULT | kept, family), ids(2, LENGTH).to(DEVICE)
    full = logits(model, tokens, use_cache=False)
    assert_close(in_parts(model, tokens, one_by_one(9))[0], full)
    assert len(steps) == LENGTH - 9


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_padding_on_the_left_and_between(kept, steps):  # noqa: F811
    """A row that has seen nothing but padding is a number, too."""
    model, tokens = learned(DEFAULT | kept), ids(3, LENGTH).to(DEVICE)
    mask = torch.ones(3, LENGTH, dtype=torch.long, device=DEVICE)
    mask[1, :7], mask[2, :11] = 0, 0
    found, _ = in_parts(model, tokens, one_by_one(9), mask)
    for row, first in enumerate((0, 7, 11)):
        assert_close(found[[row], first:], logits(model, tokens[[row], first:], use_cache=False))
    assert len(steps) == LENGTH - 9


@torch.no_grad()
@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_two_caches_in_turn_and_chunks_between(kept, steps):  # noqa: F811
    model, first, second = learned(DEFAULT | kept), *ids(4, LENGTH).to(DEVICE).split(2)
    caches, outputs, begin = [in_parts(model, x[:, :6], [6])[1] for x in (first, second)], [[], []], 6
    for size in (1, 1, 1, 4, 1, 1, 3, 1, 5):
        for tokens, cache, output in zip((first, second), caches, outputs, strict=True):
            output.append(model(tokens[:, begin : begin + size], past_key_values=cache).logits)
        begin += size
    for tokens, output in zip((first, second), outputs, strict=True):
        assert_close(torch.cat(output, 1), logits(model, tokens[:, :begin], use_cache=False)[:, 6:])
    assert len(steps) == 12


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "repeat"],
)
@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_rows_that_move(kept, change, rows, steps):  # noqa: F811
    model, tokens = learned(DEFAULT | kept), ids(3, LENGTH).to(DEVICE)
    _, cache = in_parts(model, tokens[:, :12], one_by_one(9)[:4])
    change(cache)
    parts = [logits(model, tokens[rows][:, [t]], past_key_values=cache) for t in range(12, LENGTH)]
    assert_close(torch.cat(parts, 1), logits(model, tokens[rows], use_cache=False)[:, 12:])


@torch.no_grad()
def test_a_cache_that_is_reset():
    model, tokens = learned(DEFAULT | KEPT[2]), ids(2, LENGTH).to(DEVICE)
    _, cache = in_parts(model, tokens, one_by_one(9))
    cache.reset()
    parts = [logits(model, part, past_key_values=cache) for part in tokens.split(one_by_one(20), 1)]
    assert_close(torch.cat(parts, 1), logits(model, tokens, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_copies_go_ways_of_their_own_and_weigh_what_was_read(kept):
    model, tokens = learned(DEFAULT | kept), ids(2, LENGTH).to(DEVICE)
    _, cache = in_parts(model, tokens[:, :12], one_by_one(9)[:4])
    other = copy.deepcopy(cache)
    for t in range(12, 17):
        ours = model(tokens[:, [t]], past_key_values=cache).logits
        theirs = model(tokens[:, [t + 3]], past_key_values=other).logits
    assert_close(ours, logits(model, tokens[:, :17], use_cache=False)[:, -1:])
    others = torch.cat([tokens[:, :12], tokens[:, 15:20]], 1)
    assert_close(theirs, logits(model, others, use_cache=False)[:, -1:])
    assert cache_bytes(cache) == cache_bytes(in_parts(model, tokens[:, :17], [17])[1])


@pytest.mark.skipif(GPU, reason="the kernel's fp32 is the interpreter's")
@pytest.mark.parametrize("kept", [KEPT[1], KEPT[2]], ids=str)
def test_with_the_keys_in_parts(kept, steps, monkeypatch):  # noqa: F811
    pytest.importorskip("triton", reason="the kernels are Triton's")
    import interpreted  # noqa: F401

    monkeypatch.setattr(growing, "why_not_in_parts", lambda *_: None)
    model, tokens = learned(DEFAULT | kept), ids(2, LENGTH)
    full = logits(model, tokens, use_cache=False)
    assert_close(in_parts(model, tokens, one_by_one(LENGTH - 4))[0], full)
    assert len(steps) == 4


@pytest.mark.skipif(GPU, reason="by the interpreter, as above")
def test_where_a_program_is_too_large_for_the_device(monkeypatch):
    pytest.importorskip("triton", reason="the kernels are Triton's")
    from triton.runtime.errors import OutOfResources

    from linearize.ops import growing_triton

    def refuse(*_):
        raise OutOfResources(300_000, 200_000, "shared memory")

    monkeypatch.setattr(growing, "why_not_in_parts", lambda *_: None)
    monkeypatch.setattr(growing_triton, "attend", refuse)
    model, tokens = learned(DEFAULT | KEPT[1]), ids(2, LENGTH)
    with pytest.warns(match="is not divided, slower: out of resource"):
        found, _ = in_parts(model, tokens, one_by_one(LENGTH - 4))
    assert_close(found, logits(model, tokens, use_cache=False))


@torch.no_grad()
def test_nothing_is_left_of_a_text_before():
    """Not even what is no number, which a mask does not hide."""
    model, tokens = learned(DEFAULT | KEPT[2]), ids(2, LENGTH).to(DEVICE)
    broken, other = (in_parts(model, tokens[:, :n], [n])[1] for n in (11, 8))
    broken.layers[0].grown_values[:, :, -1] = torch.nan
    logits(model, tokens[:, [11]], past_key_values=broken)
    found = [logits(model, tokens[:, [t]], past_key_values=other) for t in range(8, 11)]
    assert_close(torch.cat(found, 1), logits(model, tokens[:, :11], use_cache=False)[:, 8:])


def test_room_is_free_when_the_cache_is_gone():
    model, tokens = learned(DEFAULT | KEPT[2]), ids(2, LENGTH).to(DEVICE)
    _, cache = in_parts(model, tokens, one_by_one(9))
    decoder = decoding._decoders[model][2]
    assert decoder.seen.shape[1] > 0
    del cache
    assert decoder.seen.shape[1] == 0
    assert_close(in_parts(model, tokens, one_by_one(9))[0], logits(model, tokens, use_cache=False))


class Elsewhere(DynamicLayer):
    """A layer whose `keys` are not what attention sees."""

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.whole = key_states[:, :, :0], value_states[:, :, :0]
            self.lazy_initialization(key_states, value_states)
        self.whole = tuple(torch.cat(pair, dim=2) for pair in zip(self.whole, (key_states, value_states), strict=True))
        return self.whole

    def get_seq_length(self, *_):
        return self.whole[0].shape[2] if self.is_initialized else 0


@torch.no_grad()
def test_layers_of_another_kind_go_the_ordinary_way(steps):  # noqa: F811
    model, tokens = learned(DEFAULT | KEPT[1]), ids(2, LENGTH).to(DEVICE)
    cache = DynamicCache(config=model.config)
    cache.layers[1] = Elsewhere()
    parts = [model(part, past_key_values=cache).logits for part in tokens.split(one_by_one(9), 1)]
    assert_close(torch.cat(parts, 1), logits(model, tokens, use_cache=False))
    assert not steps


def test_room_grows_by_eighths():
    sizes = [growing.room_for(tokens) for tokens in (0, 3, 4, 63, 64, 100, 1000)]
    assert sizes == [4, 4, 8, 64, 72, 108, 1116]
    assert all(growing.room_for(tokens) > tokens for tokens in range(2000))


def test_beyond_the_length_the_model_was_trained_at(steps):  # noqa: F811
    """Where queries meet the sinks at another distance than they meet tokens at."""
    model, tokens = learned(BY_OPERATIONS[13] | KEPT[0]), ids(1, 270).to(DEVICE)
    full = logits(model, tokens, use_cache=False)
    assert_close(in_parts(model, tokens, [250] + [1] * 20)[0], full)
    assert len(steps) == 20


def test_generation_by_beams_uses_it(steps):  # noqa: F811
    model = learned(DEFAULT | KEPT[2])
    given = {"max_new_tokens": 9, "do_sample": False, "num_beams": 3}
    with_it = model.generate(ids(2, 9).to(DEVICE), **given)
    assert len(steps) == 8
    assert torch.equal(with_it, model.generate(ids(2, 9).to(DEVICE), use_cache=False, **given))


@pytest.mark.gpu
@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_sixteen_bits_on_a_gpu(kept, steps):  # noqa: F811
    """No further from the same weights in fp32 than the whole text is, but for chance."""
    model, tokens = learned(DEFAULT | kept).bfloat16(), ids(2, LENGTH).to(DEVICE)
    full, (found, cache) = logits(model, tokens, use_cache=False), in_parts(model, tokens, one_by_one(9))
    assert all(decoder.graph is not None for decoder in steps)
    del cache  # and the graph with it
    truth = logits(model.float(), tokens, use_cache=False)
    assert relative(found, truth) < 1.5 * relative(full, truth)


def test_what_slides_by_itself_has_no_decoder():
    model = learned(DEFAULT | {"layers": "0,2"}, "mistral")
    model.config.sliding_window = 100
    assert "a sliding window of its own" in str(decoding.why_not(model))
