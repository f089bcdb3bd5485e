"""A scorer of recall must give an oracle 100 %, a model without memory chance, and all of them the same texts."""

import numpy as np
import pytest
import tiny
import torch

from linearize import LinearizeError, convert
from linearize.evaluate import recall as module
from linearize.evaluate.recall import CHOICES, CUE, LEAD, TASKS, read_language, recall

DISTANCES = (96, 200)
FILLER = [tiny.text(4000, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def language():
    return read_language(tiny.tokenizer(), FILLER)


@pytest.fixture
def fake(monkeypatch):
    """A model whose logits are a function of its tokens."""

    def make(answer):
        def forward(input_ids, use_cache):
            return type("Output", (), {"last_hidden_state": answer(input_ids)})

        monkeypatch.setattr("linearize.evaluate.perplexity.decoder", lambda model: forward)
        monkeypatch.setattr(module, "Head", lambda model: lambda logits: logits)
        return tiny.tiny()

    return make


def oracle(ids):
    """Always knows the next token."""
    after = torch.roll(ids, -1, dims=1)
    return torch.nn.functional.one_hot(after, tiny.VOCAB).double() * 20


def memoryless(ids):
    """Likes some tokens better than others, whatever was said."""
    liked = torch.randn(tiny.VOCAB, generator=torch.Generator().manual_seed(3))
    return liked.expand(*ids.shape, -1).clone()


def test_an_oracle_is_always_right(fake):
    for score in recall(fake(oracle), tiny.tokenizer(), FILLER, DISTANCES, trials=5):
        assert score.exact == 1
        assert score.accuracy == (1 if score.task != "multi_value" else score.accuracy)


def test_without_memory_it_is_chance(fake):
    found = recall(fake(memoryless), tiny.tokenizer(), FILLER, DISTANCES, trials=300)
    assert [(score.task, score.distance) for score in found] == [(task, d) for task in TASKS for d in DISTANCES]
    for score in found:
        expected = {"copy": score.chance, "multi_value": 0.4}.get(score.task, 0.1)
        assert score.chance == pytest.approx(expected)
        assert abs(score.accuracy - expected) < 0.07  # four standard errors
        assert score.exact < 0.5


@pytest.mark.parametrize("task", ["needle", "multi_key", "multi_value", "lookup"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_the_answer_was_said_at_the_distance(language, task, distance):
    for seed in range(20):
        trial = TASKS[task](language, distance, np.random.default_rng(seed))
        said = len(trial.ids) - len(trial.answer) - distance  # where the last token of the value stands
        start = said - len(trial.answer) + 1
        assert trial.ids[start : said + 1] == trial.answer
        assert len(trial.options) == len(set(trial.options)) == CHOICES
        right = [option for option, ok in zip(trial.options, trial.right, strict=True) if ok]
        assert len(right) == (4 if task == "multi_value" else 1)
        assert trial.answer[0] in right


@pytest.mark.parametrize("task", TASKS)
def test_all_trials_of_a_distance_are_about_as_long(language, task):
    lengths = [len(TASKS[task](language, 200, np.random.default_rng(seed)).ids) for seed in range(20)]
    assert min(lengths) >= 200 + LEAD // 2
    assert max(lengths) - min(lengths) < 60  # the characters of names and values; the scorer cuts to the shortest


def test_facts_are_whole_and_asked_for_in_their_own_words(language):
    tokenizer = tiny.tokenizer()
    trial = TASKS["lookup"](language, 300, np.random.default_rng(1))
    text = tokenizer.decode(trial.ids).replace(" ", "")
    question = tokenizer.decode(trial.ids[-len(trial.answer) - 4 : -len(trial.answer)]).replace(" ", "")
    assert text.count(question) == 2


def test_a_copy_begins_with_a_cue(language):
    trial = TASKS["copy"](language, 100, np.random.default_rng(0))
    whole = trial.ids[-len(trial.answer) - CUE :]
    assert trial.ids[-len(whole) - 100 : -100] == whole


def test_the_same_texts_each_time(language):
    for make in TASKS.values():
        assert make(language, 128, np.random.default_rng(5)) == make(language, 128, np.random.default_rng(5))


def test_a_window_does_not_see_what_a_teacher_sees():
    """Real code from end to end: equal where the window covers the text, and different models beyond it."""
    tokenizer, found = tiny.tokenizer(), {}
    for name, model in {
        "teacher": tiny.tiny(),
        "wide": convert(tiny.tiny(), structure="none", window=1000, sinks=0),
        "narrow": convert(tiny.tiny(), structure="none", window=2, sinks=0),
    }.items():
        found[name] = recall(model, tokenizer, FILLER, [64], trials=12, tasks=["needle", "copy"])
    assert found["wide"] == found["teacher"]
    assert found["narrow"] != found["teacher"]


def test_batches_make_no_difference(monkeypatch):
    model, given = tiny.tiny(), (tiny.tokenizer(), FILLER, [64, 100], 8)
    expected = recall(model, *given)
    monkeypatch.setitem(module.AT_ONCE, "cpu", 1)
    assert recall(model, *given) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"distances": [5]}, "distance 5 has no room"),
        ({"tasks": ["haystack"]}, "'haystack'.*needle"),
        ({"filler": ["a b"]}, "too few"),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments, words):
    given = {"filler": FILLER, "distances": [64]} | arguments
    with pytest.raises(LinearizeError, match=words):
        recall(tiny.tiny(), tiny.tokenizer(), trials=1, **given)


@pytest.mark.parametrize("task", TASKS)
def test_every_trial_begins_as_its_tokenizer_begins_texts(language, fake, task):
    """However much is cut off so that all are as long as the shortest."""
    seen = []

    def watched(ids):
        seen.append(ids)
        return oracle(ids)

    random, first = np.random.default_rng(0), tiny.VOCAB - 1
    begun = language._replace(begin=[first])
    trials = [TASKS[task](begun, 96, random) for _ in range(20)]
    score = module._scored(fake(watched), task, 96, trials, begin=1)
    assert score.exact == 1
    assert all((ids[:, 0] == first).all() for ids in seen)
    assert len({ids.shape[1] for ids in seen}) == 1
