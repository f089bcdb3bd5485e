"""What is said of generated text, on text and models whose figures are known."""

import math

import pytest
import tiny
import torch

from linearize.evaluate.generation import PROMPTS, continuations, generation, judged_loss, repetition

WORDS = ["the window", "a long text", "it sees"]


def test_fifty_prompts():
    assert len(set(PROMPTS)) == 50


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 5, 6], 0.0),
        ([1] * 13, 0.9),  # ten runs, one of them new
        ([1, 2, 3, 4, 1, 2, 3, 4], 0.2),
        ([1, 2, 3], 0.0),
        ([], 0.0),
    ],
)
def test_repetition(tokens, expected):
    assert repetition(tokens) == pytest.approx(expected)


def test_greedy_continuations_are_those_of_each_prompt_alone():
    """Left padding changes nothing, and nothing of what follows the end of a text is counted."""
    model, tokenizer = tiny.tiny(eos_token_id=1), tiny.tokenizer()
    found = continuations(model, tokenizer, WORDS, 12, sample=False)
    for prompt, tokens in zip(WORDS, found, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        alone = alone[0, ids.shape[1] :].tolist()
        assert tokens == (alone[: alone.index(1)] if 1 in alone else alone)


def test_samples_are_the_same_each_time_and_leave_the_generator_alone():
    model, tokenizer = tiny.tiny(), tiny.tokenizer()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = continuations(model, tokenizer, WORDS, 12, sample=True)
    assert torch.equal(torch.rand(2), expected)
    assert continuations(model, tokenizer, WORDS, 12, sample=True) == first
    assert first != continuations(model, tokenizer, WORDS, 12, sample=False)


def test_judged_loss_is_the_teacher_s():
    model, prompts, rows = tiny.tiny(), [[5, 6], [7]], [[8, 9, 10], [11, 12]]
    total = 0.0
    for prompt, text in zip(prompts, rows, strict=True):
        ids = torch.tensor([prompt + text])
        labels = torch.tensor([[-100] * len(prompt) + text])
        with torch.no_grad():
            total += model(ids, labels=labels).loss.item() * len(text)
    assert judged_loss(model, prompts, rows) == pytest.approx(total / 5, rel=1e-5)
    assert judged_loss(model, prompts, [[], []]) == 0


def test_a_model_s_own_samples_are_as_likely_as_its_entropy():
    """Sampled at temperature 1 and judged by itself: on average the entropy, below a uniform guess."""
    model = tiny.tiny()
    found = generation(model, model, tiny.tokenizer(), WORDS, 20)
    assert (found.prompts, found.tokens) == (3, 20)
    assert 0 < found.judged_loss < math.log(tiny.VOCAB)
    other = generation(model, tiny.tiny("qwen2"), tiny.tokenizer(), WORDS, 20)
    assert other.greedy_repetition == found.greedy_repetition
    assert other.judged_loss > found.judged_loss


def test_what_a_model_asks_for_of_generation_is_not_measured():
    """Its other ends of texts are, and what follows them is padding."""
    model, tokenizer = tiny.tiny(eos_token_id=1), tiny.tokenizer()
    expected = {sample: continuations(model, tokenizer, WORDS, 12, sample) for sample in (False, True)}
    config = model.generation_config
    config.repetition_penalty, config.no_repeat_ngram_size, config.min_p = 5.0, 1, 0.9
    for sample, found in expected.items():
        assert continuations(model, tokenizer, WORDS, 12, sample) == found
    assert model.generation_config is config
    config.eos_token_id = [1, expected[False][0][3]]
    ended = [
        row[: row.index(config.eos_token_id[1])] if config.eos_token_id[1] in row else row for row in expected[False]
    ]
    assert continuations(model, tokenizer, WORDS, 12, sample=False) == ended
