"""Text of the teacher's own: every document is what the model would have written alone, and made once."""

import gzip
import json
import warnings

import numpy as np
import pytest
import tiny
import torch

from linearize import LinearizeError, Recipe, cli, convert, variants
from linearize import run as run_recipe
from linearize.assets import cache_folder
from linearize.checkpoint import load_pretrained
from linearize.train import sample as module
from linearize.train.documents import load_documents
from linearize.train.sample import FREE, Script, sample, sampled_documents, scripts, stop_tokens
from linearize.train.sequences import tokenize

TEMPLATE = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '.,' }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
END = 1
GREEDY = 1e-5  # a temperature at which the likeliest token is certain


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))


def words(template: str | None = None):
    found = tiny.tokenizer()
    found.chat_template = template
    return found


def alone(model, document: list[int], script: Script, stops: list[int]) -> list[int]:
    """`document` once more, each token by a forward pass over all before it."""
    made, place = [], 0
    while len(made) < len(document) and place < len(script.tokens):
        token = script.tokens[place]
        if token == FREE:
            token = int(tiny.logits(model, torch.tensor([made]))[0, -1].argmax())
            if token in stops:
                token = script.closing[place]
                place += 1
        else:
            place += 1
        made.append(token)
    return made


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt_oss", "mixtral", "phi"])
def test_documents_are_as_if_each_were_alone(family):
    wide = {"final_logit_softcapping": 30.0} if "gemma" in family else {}  # else many tokens are as likely
    model = tiny.tiny(family, eos_token_id=END, **wide)
    kinds = [Script((5, 6, FREE, 8, FREE), (FREE, FREE, 7, FREE, END)), Script((9, FREE), (FREE, END))]
    stops = list(range(1, 40))  # so many that documents are short
    documents = sample(module._sampler(model), kinds, stops, 4, 60, GREEDY, seed=0)
    assert sum(map(len, documents)) == 4 * 60
    by_kind = {5: kinds[0], 9: kinds[1]}
    for document in documents:
        assert document.dtype == np.int32
        assert alone(model, document.tolist(), by_kind[document[0]], stops) == document.tolist()
    assert sum(document[-1] == END for document in documents) > 4  # rows went on after a document's end
    assert {int(document[0]) for document in documents} == {5, 9}


def test_places_that_are_empty_are_not_read():
    """As a CUDA graph reads the cache: more of it than has been written."""
    model = module._sampler(tiny.tiny())
    tokens, start = torch.randint(5, 40, (3, 9)), torch.tensor([0, 0, 4])
    exact, more = module.Step(model, 3, 9), module.Step(model, 3, 9)
    more.run = lambda read: module.Step.run(more, min(read + 4, 9))
    with torch.no_grad():
        for time in range(9):
            given = time, tokens[:, time], start.clamp(max=time)
            assert torch.allclose(exact(*given), more(*given), atol=1e-5)


def test_what_can_be_graphed():
    assert module.can_be_graphed(tiny.tiny("llama"))
    assert not any(module.can_be_graphed(tiny.tiny(family)) for family in ("mixtral", "gemma2", "gemma3_text"))


@pytest.mark.gpu
def test_a_graph_writes_the_same(monkeypatch):
    monkeypatch.setattr(module, "GRAPHED", 16)
    model = module._sampler(tiny.tiny(eos_token_id=END).cuda())
    kinds, stops = (
        [Script((5, 6, FREE, 8, FREE), (FREE, FREE, 7, FREE, END)), Script((9, FREE), (FREE, END))],
        [1, 2, 3],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphed = sample(model.float(), kinds, stops, 4, 60, GREEDY, seed=0)
    monkeypatch.setattr(module, "can_be_graphed", lambda model: False)
    plain = sample(model, kinds, stops, 4, 60, GREEDY, seed=0)
    assert [x.tolist() for x in graphed] == [x.tolist() for x in plain]


def test_the_teacher_keeps_its_own_attention():
    model = tiny.tiny()
    assert module._sampler(model).config._attn_implementation == module.GROUPED
    assert model.config._attn_implementation == "sdpa"


def test_tokens_are_drawn_with_their_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0, -3.0])
    found = module._drawn(logits.expand(40_000, 4), 2.0, torch.Generator().manual_seed(0))
    shares = torch.bincount(found, minlength=4) / 40_000
    assert (shares - (logits / 2.0).softmax(-1)).abs().max() < 0.01


def test_seeds():
    model, kinds = tiny.tiny(eos_token_id=END), [Script((9, FREE), (FREE, END))]
    one, same, other = (sample(model, kinds, [END], 2, 30, 1.0, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not np.array_equal(np.concatenate(one), np.concatenate(other))


def test_what_documents_are_like():
    plain = Script((1, FREE), (FREE, 1), dropped=1)
    assert scripts(words()) == [plain]
    head, tail = (words()(text)["input_ids"] for text in ("<user>", ".,<a>"))
    chat, second = scripts(words(TEMPLATE))
    assert chat == Script((*head, FREE, *tail[1:], FREE), (*[FREE] * len(head), tail[0], *[FREE] * (len(tail) - 1), 1))
    assert second == plain
    assert scripts(words("no user here")) == [plain]
    model = tiny.tiny(eos_token_id=[1, 4])
    assert stop_tokens(model, words(TEMPLATE), [chat, plain]) == sorted({1, 4, tail[0]})
    mute = words()
    mute.eos_token = mute.bos_token = None
    with pytest.raises(LinearizeError, match="no token to begin or to end a text with"):
        scripts(mute)


def test_plain_text_comes_without_what_it_began_from():
    model = tiny.tiny(eos_token_id=END)
    kinds = scripts(words())
    documents = sample(model, kinds, stop_tokens(model, words(), kinds), 3, 40, 1.0, 0)
    assert all(document[0] != END or len(document) == 1 for document in documents)
    assert sum(map(len, documents)) < 3 * 40


def test_a_batch_is_made_once_and_made_again_where_damaged(monkeypatch):
    made = []

    def watched(*given):
        made.append(given[3])
        return sample(*given)

    monkeypatch.setattr(module, "sample", watched)
    model = tiny.tiny(eos_token_id=END)

    def tokens(count, **kwargs):
        return np.concatenate(sampled_documents(model, words(TEMPLATE), count, 32, rows=2, **kwargs))

    first = tokens(100)
    assert 100 <= len(first) < 100 + 32
    batches = len(made)
    assert batches >= 2
    assert np.array_equal(tokens(100), first)
    assert len(made) == batches
    more = tokens(64 * batches + 1)
    assert len(made) > batches
    assert np.array_equal(more[: len(first)], first)
    batches = len(made) - 1
    damaged = next(cache_folder().rglob("1/sample.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\0\0\0\0")
    assert np.array_equal(tokens(100), first)
    assert len(made) == batches + 2
    assert not np.array_equal(tokens(100, seed=1), first)
    other = tiny.tiny(eos_token_id=END)
    other.lm_head.weight.data *= 2
    model = other
    before = len(made)
    tokens(10)
    assert len(made) > before


def test_what_is_sampled_is_the_same_whatever_was_asked_for_before(monkeypatch):
    monkeypatch.setattr(module, "ROWS", {"cpu": (2, 4)})
    asked = []
    monkeypatch.setattr(module, "sample", lambda *given: asked.append(given[3]) or sample(*given))
    model = tiny.tiny(eos_token_id=END)
    sampled_documents(model, words(), 20, 32)
    after = sampled_documents(model, words(), 500, 32)
    assert asked[:3] == [2, 4, 4]
    monkeypatch.setenv("LINEARIZE_CACHE", str(cache_folder().with_name("other")))
    at_once = sampled_documents(model, words(), 500, 32)
    assert len(after) == len(at_once)
    assert all(np.array_equal(a, b) for a, b in zip(after, at_once, strict=True))


def test_an_interrupted_sampling_goes_on(monkeypatch):
    model = tiny.tiny(eos_token_id=END)
    monkeypatch.setenv("LINEARIZE_CACHE", str(cache_folder().with_name("other")))
    whole = sampled_documents(model, words(), 150, 32, rows=2)
    monkeypatch.setenv("LINEARIZE_CACHE", str(cache_folder().with_name("cache")))
    calls = []

    def killed(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(*given)

    monkeypatch.setattr(module, "sample", killed)
    with pytest.raises(KeyboardInterrupt):
        sampled_documents(model, words(), 150, 32, rows=2)
    again = sampled_documents(model, words(), 150, 32, rows=2)
    assert len(calls) > 2
    assert all(np.array_equal(a, b) for a, b in zip(again, whole, strict=True))


def test_a_full_gpu_gets_fewer_rows(monkeypatch):
    asked = []

    def small(*given):
        asked.append(given[3])
        if given[3] > 2:
            raise torch.OutOfMemoryError
        return sample(*given)

    monkeypatch.setattr(module, "sample", small)
    sampled_documents(tiny.tiny(eos_token_id=END), words(), 200, 32, rows=5)
    assert asked[:2] == [5, 2]
    assert set(asked[2:]) <= {2, 1}


def test_what_cannot_be_sampled_from():
    with pytest.raises(LinearizeError, match="this one is converted"):
        sampled_documents(convert(tiny.tiny()), words(), 10, 8)
    with pytest.raises(LinearizeError, match="temperature above 0, not 10, None, 8, 0"):
        sampled_documents(tiny.tiny(), words(), 10, 8, temperature=0.0)


# --- as training text ---


@pytest.fixture
def recipe(tmp_path):
    tiny.checkpoint(tmp_path / "model")
    (tmp_path / "heldout.txt").write_text(tiny.text(2000, 2), encoding="utf-8")
    return Recipe.model_validate(
        {
            "model": str(tmp_path / "model"),
            "mixer": {"window": 4, "sinks": 2},
            "data": {"train": "self", "heldout": str(tmp_path / "heldout.txt"), "sequence_length": 32},
            "lora": {"r": 2},
            "align": {"tokens": 64},
            "distill": {"tokens": 96},
            "evaluation": {"sequence_length": 64, "sequences": 2, "contexts": [16], "decode_tokens": 2},
        }
    )


def test_a_run_on_text_of_its_own(recipe, tmp_path, monkeypatch):
    asked = []

    def watched(*given):
        asked.append(given[2:])
        return sampled_documents(*given)

    monkeypatch.setattr(variants, "sampled_documents", watched)
    report = run_recipe(recipe, tmp_path / "out")
    assert asked == [(96 + 32, 32, 0, 1.0)]  # once, for both variants
    assert report.models.converted.trained_tokens == report.models.window_only.trained_tokens == 160
    assert report.recipe["data"]["train"] == "self"


def test_fewer_tokens_are_read_again(recipe, tmp_path, monkeypatch):
    data = recipe.data.model_copy(update={"self_tokens": 40, "self_temperature": 0.5})
    monkeypatch.setattr(variants, "sampled_documents", lambda *given: asked.append(given[2:]) or made)
    asked, made = [], [np.arange(40, dtype=np.int32)]
    report = run_recipe(recipe.model_copy(update={"data": data}), tmp_path / "out")
    assert asked == [(40, 32, 0, 0.5)]
    assert report.models.converted.trained_tokens == 160


def test_heldout_text_is_real():
    with pytest.raises(LinearizeError, match="self is text to train on, which the model samples"):
        load_documents("self", "heldout")


def test_the_command(tmp_path, capsys):
    folder, out = tiny.checkpoint(tmp_path / "model"), tmp_path / "own.jsonl.gz"
    words(TEMPLATE).save_pretrained(folder)
    command = ["sample", str(folder), "--tokens", "200", "--length", "32", "--rows", "4", "--out", str(out)]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.startswith(f"{out}: ")
    rows = [json.loads(line) for line in gzip.decompress(out.read_bytes()).splitlines()]
    texts = [row["text"] for row in rows]
    assert load_documents(str(out)) == [text for text in texts if text.strip()]
    model, tokenizer = load_pretrained(str(folder))
    documents = sampled_documents(model, tokenizer, 200, 32, rows=4)
    assert len(documents) == len(rows)
    read = tokenize(texts, tokenizer)
    whole = [d for d in documents if d[-1] == END]
    assert whole
    for document, again in zip(documents, read, strict=True):
        if max(document) < len(tokenizer.get_vocab()) and document[-1] == END and 2 not in document:
            assert np.array_equal(document, again)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--out own.txt", "own.txt does not end with one of .jsonl, .jsonl.gz, .jsonl.xz"),
        ("--tokens few", "'few' is no number of tokens"),
        ("--temperature 0", "temperature above 0"),
    ],
)
def test_what_the_command_refuses(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    tiny.checkpoint(tmp_path / "model")
    command = "sample model --tokens 64 --length 16 --out own.jsonl"
    assert cli.main([*command.split(), *arguments.split()]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "own.jsonl").exists()
