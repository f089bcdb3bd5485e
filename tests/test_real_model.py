"""The embedded model: what must hold of a real one, on real text. Fetches both where they are not cached."""

import copy

import pytest
import torch
from tiny import assert_close, logits
from transformers import DynamicCache, TextIteratorStreamer

from linearize import convert, revert
from linearize.assets import resolve_model
from linearize.cache import cache_bytes
from linearize.checkpoint import load_pretrained
from linearize.evaluate.decoding import decode_parity
from linearize.evaluate.perplexity import score, summarize
from linearize.recipe import read
from linearize.train.documents import load_documents
from linearize.train.sequences import heldout_sequences, tokenize
from linearize.train.trainer import shared_copy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def real():
    """The teacher, its tokenizer and two held-out sequences of 1024 tokens."""
    torch.set_num_threads(2)
    teacher, tokenizer = load_pretrained(resolve_model("smollm2-135m"))
    documents = tokenize(load_documents("wiki", "heldout"), tokenizer)
    yield teacher, tokenizer, heldout_sequences(documents, 1024, 2)
    torch.set_num_threads(1)


def perplexity(model, sequences) -> float:
    return summarize(score(model, sequences), None, 32).perplexity


@pytest.mark.parametrize("settings", [{}, read("default").mixer.model_dump(), read("demo").mixer.model_dump()])
def test_an_untrained_conversion_is_hardly_worse_than_the_window(real, settings):
    teacher, _, sequences = real
    window = perplexity(convert(shared_copy(teacher), structure="none"), sequences)
    converted = perplexity(convert(shared_copy(teacher), **settings), sequences)
    assert perplexity(teacher, sequences) < window < 100
    assert converted <= 1.05 * window


def test_without_recurrence_and_with_a_full_window_it_is_the_teacher(real):
    teacher, _, sequences = real
    expected = logits(teacher, sequences[:1, :300], use_cache=False)
    student = convert(shared_copy(teacher), window=300, mixing="fixed", mixing_weight=0)
    assert_close(logits(student, sequences[:1, :300], use_cache=False), expected)
    assert torch.equal(logits(revert(student), sequences[:1, :300], use_cache=False), expected)


@pytest.mark.parametrize("softmax_every", [None, 8])
def test_decoding_is_the_full_forward(real, softmax_every):
    teacher, _, sequences = real
    student = convert(shared_copy(teacher), mixing_weight=0.1, softmax_every=softmax_every)
    assert decode_parity(student, sequences[0, :400]) <= 1e-5


def test_left_padded_rows_are_as_if_alone(real):
    teacher, _, sequences = real
    student = convert(shared_copy(teacher), mixing_weight=0.1)
    tokens, mask = sequences[:, :200], torch.ones(2, 200, dtype=torch.long)
    mask[1, :77] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = logits(student, tokens, attention_mask=mask, position_ids=positions)
    assert_close(padded[0], logits(student, tokens[:1])[0])
    assert_close(padded[1, 77:], logits(student, tokens[1:, 77:])[0])


def test_it_generates_in_constant_memory_as_it_streams(real):
    teacher, tokenizer, sequences = real
    student = convert(shared_copy(teacher))
    prompt, sizes = sequences[:1, :100], []
    cache = DynamicCache(config=student.config)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    watched = student.register_forward_hook(lambda *_: sizes.append(cache_bytes(cache)))
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    output = student.generate(prompt, past_key_values=cache, streamer=streamer, **given)
    watched.remove()
    assert len(sizes) == 40
    assert len(set(sizes)) == 1
    assert "".join(streamer) == tokenizer.decode(output[0, 100:])
    assert torch.equal(output, student.generate(prompt, use_cache=False, **given))


def test_it_survives_being_saved(real, tmp_path):
    teacher, tokenizer, sequences = real
    student = convert(copy.deepcopy(teacher), mixing_weight=0.1, softmax_every=8)
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_pretrained(str(tmp_path))
    assert torch.equal(logits(loaded, sequences[:1, :200]), logits(student, sequences[:1, :200]))
