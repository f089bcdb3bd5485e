"""Choosing layers: what candidates are, equal ones are measured once, the layers that matter are found."""

import json

import pytest
import tiny
import torch
from tiny import TOLERANCE, assert_close, logits
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linearize import LinearizeError, cli, convert
from linearize import recipe as recipes
from linearize import select as module
from linearize.config import MixerSettings
from linearize.convert import choose_layers
from linearize.evaluate.perplexity import score
from linearize.heads import parse_heads
from linearize.probes import WORDS, Needles, Probes, needles, probes, recall
from linearize.ranges import spans
from linearize.select import Candidates, by_alignment, by_gain, uniform
from linearize.train.align import align_loss
from linearize.train.sequences import pack, tokenize
from linearize.variants import load_base

WINDOW = MixerSettings.model_validate({"structure": "none", "window": 6, "sinks": 2})
LAYERS = 4


def teacher(matter: tuple[int, ...]):
    """A model in which the attention of the other layers adds nothing."""
    model = tiny.tiny(num_hidden_layers=LAYERS)
    for index in range(LAYERS):
        if index not in matter:
            model.model.layers[index].self_attn.o_proj.weight.data.zero_()
    return model


def own_text(model, length: int = 64) -> torch.Tensor:
    """Greedy text of the model itself, so that no other model likes it better."""
    return model.generate(tiny.ids(3, 4), max_new_tokens=length - 4, min_new_tokens=length - 4, do_sample=False)


def candidates(model, heads: bool = False) -> Candidates:
    texts = own_text(model)
    asked = Needles(texts[:, :40], torch.zeros(3, dtype=torch.long), torch.tensor([5, 6, 7]))
    return Candidates(model, WINDOW, Probes(texts, [asked]), heads)


def test_a_candidate_keeps_its_layers_and_shares_the_weights():
    model = tiny.tiny(num_hidden_layers=LAYERS)
    found, text = candidates(model), tiny.ids(1, 40)
    before = logits(model, text)
    made = found.model([1, 2])
    assert made.config.linearize["layers"] == [0, 3]
    assert next(made.parameters()) is next(model.parameters())
    expected = convert(tiny.tiny(num_hidden_layers=LAYERS), layers=[0, 3], **WINDOW.root)
    assert_close(logits(made, text), logits(expected, text))
    assert found.model(range(LAYERS)) is model
    assert torch.equal(logits(model, text), before)
    assert found.late_loss([1, 2]) == pytest.approx(score(expected, found.probes.sequences).loss[:, 32:].mean().item())


def test_a_candidate_keeps_its_heads():
    found, text = candidates(tiny.tiny(num_hidden_layers=LAYERS), heads=True), tiny.ids(1, 40)
    assert list(found.units) == list(range(8))
    assert [found.name(unit) for unit in (0, 3, 6)] == ["0/0", "1/1", "3/0"]
    assert found.setting([3, 6, 7]) == ("softmax_heads", "1/1,3/0-1")
    expected = convert(tiny.tiny(num_hidden_layers=LAYERS), softmax_heads="1/1,3/0-1", **WINDOW.root)
    assert_close(logits(found.model([3, 6, 7]), text), logits(expected, text))
    assert found.model(()).config.linearize.keys() == {"layers", "mixer"}
    assert found.model(range(8)) is found.teacher


@pytest.mark.parametrize("kept", [(), (3, 6, 7)])
def test_the_gradient_is_that_of_a_share_of_full_attention(kept):
    """Of shares that are autograd's own variables, in a model that knows all heads' full attention."""
    found = candidates(tiny.tiny(num_hidden_layers=LAYERS).double(), heads=True)
    whole = torch.zeros(LAYERS, 2, dtype=torch.float64)
    whole.view(-1)[list(kept)] = 1
    shares = whole.clone().requires_grad_()

    def shared(module, q, k, v, mask, scaling, **_):
        index = torch.arange(q.shape[2])
        past = index[:, None] >= index
        near = past & ((index[:, None] - index < 6) | (index < 2))
        k, v = (x.repeat_interleave(3, dim=1) for x in (k, v))
        full, window = ((q @ k.mT * scaling).masked_fill(~sees, -torch.inf).softmax(-1) @ v for sees in (past, near))
        share = shares[module.layer_idx].repeat_interleave(3)[:, None, None]
        return (share * full + (1 - share) * window).transpose(1, 2), None

    given = found.gradient(kept)
    ALL_ATTENTION_FUNCTIONS.register("shared", shared)
    found.teacher.set_attn_implementation("shared")
    texts = found.probes.sequences
    losses = [torch.nn.functional.cross_entropy(found.teacher(ids[None]).logits[0, 31:-1], ids[32:]) for ids in texts]
    (expected,) = torch.autograd.grad(sum(losses) / len(texts), shares)
    others = [unit for unit in found.units if unit not in kept]
    assert_close(torch.tensor([given[unit] for unit in others]), -expected.flatten()[others])
    assert all(parameter.grad is None for parameter in found.teacher.parameters())


def test_by_gradient_the_layer_that_matters_is_found():
    found = candidates(teacher(matter=(2,)))
    kept, (scores,) = by_gain(found, 1, "gradient", greedy=False)
    assert kept == [2]
    assert [unit for unit, gain in scores.items() if gain] == [2]
    found = candidates(teacher(matter=(2,)), heads=True)
    kept, rounds = by_gain(found, 2, "gradient", greedy=True)
    assert set(kept) == {4, 5}
    assert [len(scores) for scores in rounds] == [8, 7]
    assert sum(rounds[0].values()) == pytest.approx(scores[2])


def test_one_function_is_measured_once(monkeypatch):
    scored = []
    monkeypatch.setattr(module, "score", lambda model, ids: scored.append(model) or score(model, ids))
    found = candidates(teacher(matter=(2,)))
    losses = [found.late_loss(kept) for kept in ((), (0,), (1, 3), (2,), (2, 3), (3, 2), range(LAYERS))]
    assert losses[0] == losses[1] == losses[2] > losses[3] == losses[4] == losses[5] == losses[6]
    assert len(scored) == found.functions == 2


def test_the_layer_that_matters_is_found():
    found = candidates(teacher(matter=(2,)))
    kept, rounds = by_gain(found, 2, "late", greedy=False)
    gap = found.late_loss(()) - found.late_loss(range(LAYERS))
    assert gap > 0.1
    assert rounds == [{0: 0, 1: 0, 2: gap, 3: 0}]
    assert kept == [2, 0]


def test_greedy_scores_a_layer_beside_those_chosen_before():
    found = candidates(teacher(matter=(0, 1, 3)))
    kept, rounds = by_gain(found, 3, "late", greedy=True)
    assert set(kept) == {0, 1, 3}
    assert [len(scores) for scores in rounds] == [4, 3, 2]
    assert rounds[1][kept[1]] == found.late_loss(()) - found.late_loss(kept[:2])
    alone, (scores,) = by_gain(found, 3, "late", greedy=False)
    assert scores == rounds[0]
    assert alone == sorted(scores, key=lambda index: -scores[index])[:3]


def test_both_is_the_mean_share_of_the_gaps():
    model = tiny.tiny(num_hidden_layers=LAYERS)
    texts = own_text(model)
    favourites = logits(model, texts[:, :40])[:, -1].argmax(-1)
    asked = Needles(texts[:, :40], favourites, torch.arange(tiny.VOCAB))
    found = Candidates(model, WINDOW, Probes(texts, [asked]))
    assert module.both_gain(found, range(LAYERS)) == pytest.approx(1)
    assert module.both_gain(found, ()) == 0
    late = (found.late_loss(()) - found.late_loss([2])) / (found.late_loss(()) - found.late_loss(range(LAYERS)))
    words = (found.recall([2])[0] - found.recall(())[0]) / (found.recall(range(LAYERS))[0] - found.recall(())[0])
    assert module.both_gain(found, [2]) == pytest.approx((late + words) / 2)


def test_shares_of_a_gap_that_is_none_are_refused():
    model = tiny.tiny(num_hidden_layers=LAYERS)
    texts = own_text(model)
    worst = logits(model, texts[:, :40])[:, -1].argmin(-1)
    asked = [Needles(texts[:, :40], worst, torch.arange(tiny.VOCAB))]
    with pytest.raises(LinearizeError, match=r"valid selectors: late, recall, gradient, align"):
        module.both_gain(Candidates(model, WINDOW, Probes(texts, asked)), [1])


def test_recall_reads_the_last_position():
    model, rows = tiny.tiny(), tiny.ids(3, 20)
    asked = Needles(rows, torch.tensor([0, 1, 1]), torch.tensor([5, 9]))
    words = logits(model, rows)[:, -1][:, [5, 9]].log_softmax(-1)
    right = torch.stack([words[0, 0], words[1, 1], words[2, 1]])
    log_probability, accuracy = recall(model, [asked], rows=2)
    assert log_probability == pytest.approx(right.mean().item(), rel=TOLERANCE)
    assert accuracy == (right.exp() > 0.5).double().mean().item()


def test_needles_state_and_ask():
    words = tiny.tokenizer()
    made = needles(tokenize([tiny.text(2000)], words), words, 256, 12, seed=0)
    assert made.rows.shape == (12, 256)
    for row, answer in zip(made.rows, made.answers, strict=True):
        text = words.decode(row).replace("<unk>", "T").replace(" ", "")
        stated = f"secretwordis{WORDS[answer]}."
        assert text.count(stated) == 1
        assert 256 - 80 > text.index(stated) > 0
        assert text.endswith("secretwordis")
    assert words.convert_ids_to_tokens(made.choices) == [word[0] for word in WORDS]
    again = needles(tokenize([tiny.text(2000)], words), words, 256, 12, seed=0)
    assert torch.equal(again.rows, made.rows)
    assert not torch.equal(needles(tokenize([tiny.text(2000)], words), words, 256, 12, seed=1).rows, made.rows)


def test_probes_come_from_documents_that_are_long_enough():
    words, texts = tiny.tokenizer(), [tiny.text(n, seed) for seed, n in enumerate((40, 700, 30, 900))]
    made = probes(texts, words, 128, 3, 2, seed=0)
    assert made.sequences.shape == (3, 128)
    found = tokenize([texts[1], texts[3]], words)
    assert all(any(torch.equal(row, torch.tensor(ids[:128]).long()) for ids in found) for row in made.sequences[:2])
    assert [asked.rows.shape for asked in made.needles] == [(2, 256), (2, 512)]
    with pytest.raises(LinearizeError, match="no document has 512 tokens"):
        probes(texts[:1], words, 128, 1, 1, seed=0)


def test_texts_must_be_longer_than_the_window():
    with pytest.raises(LinearizeError, match=r"8 tokens fit into window and sinks \(8\)"):
        Candidates(tiny.tiny(), WINDOW, Probes(tiny.ids(1, 8), []))


def test_alignment_scores_are_the_errors_of_the_layers(tmp_path):
    given = {"model": str(tiny.checkpoint(tmp_path / "model")), "data.train": str(tmp_path / "text.txt")}
    (tmp_path / "text.txt").write_text(tiny.text(2000), encoding="utf-8")
    keys = {"data.sequence_length": 32, "mixer": {"window": 6}, "align": {"tokens": 64}, "distill": None}
    recipe = recipes.read(None, given=given | keys)
    base = load_base(recipe, train=True)
    kept, (scores,) = by_alignment(recipe, base, 2, 64)
    assert kept == sorted(scores, key=lambda index: -scores[index])[:2]
    untrained = convert(tiny.tiny(eos_token_id=1), window=6)
    batch = {
        key: torch.stack([one[key] for one in pack(base.documents, 32, 64)[-4:]])
        for key in ("input_ids", "position_ids")
    }
    with torch.no_grad():
        assert 0 < sum(scores.values()) / 3 < align_loss(untrained, base.teacher, batch).item()


@pytest.mark.parametrize("indices", [[0], [0, 1, 2], [0, 2, 3, 4, 7], [1, 3]])
def test_spans_are_what_layers_takes(indices):
    assert choose_layers(spans(indices), None, 8) == indices
    assert spans([0, 2, 3, 4, 7]) == "0,2-4,7"


def test_uniform_is_even():
    assert uniform(3, 30) == [5, 15, 25]
    assert uniform(1, 4) == [2]
    assert uniform(4, 4) == [0, 1, 2, 3]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.checkpoint(tmp_path / "model", max_position_embeddings=1024)
    (tmp_path / "text.txt").write_text(tiny.text(2000), encoding="utf-8")
    return tmp_path


COMMAND = "select model --keep 1 --data text.txt --window 8 --set data.sequence_length=64 --sequences 2 --trials 2 "
COMMAND += "--tokens 128"


@pytest.mark.parametrize("arguments", ["--keep 1 --selector late --greedy", "--keep 2 --selector align"])
def test_the_command(folder, capsys, arguments):
    assert cli.main([*COMMAND.split(), *arguments.split(), "--out", "scores.json"]) == 0
    found = json.loads((folder / "scores.json").read_text())
    printed = capsys.readouterr().out
    assert printed.endswith(f"\nlayers: {found['value']}\n")
    assert sorted([*map(int, found["kept"]), *choose_layers(found["value"], None, 3)]) == [0, 1, 2]
    assert found["measured"].keys() == {"teacher", "window", "chosen", "uniform"}
    assert found["window"] == 8


def test_the_command_chooses_heads(folder, capsys):
    assert cli.main([*COMMAND.split(), "--heads", "--keep", "3", "--out", "scores.json"]) == 0
    found = json.loads((folder / "scores.json").read_text())
    printed = capsys.readouterr().out
    assert found["selector"] == "gradient"
    assert "full heads" in printed
    assert printed.endswith(f"\nsoftmax_heads: {found['value']}\n")
    assert sum(len(heads) for heads in parse_heads(found["value"], 3, 2).values()) == len(found["kept"]) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--keep 3", "keep is 3; valid for this model: 1-2"),
        ("--keep 6 --heads", "keep is 6; valid for this model: 1-5"),
        ("--heads --selector align", "align scores layers, not heads"),
        ("--selector best", "unknown selector 'best'; valid: align, both, gradient, late, recall"),
        ("--selector align --greedy", "greedy has no meaning for align"),
        ("--tokens many", "'many' is no number of tokens"),
        ("--data gone.txt", "no file gone.txt"),
        ("--set data.sequence_length=12", "12 tokens fit into window and sinks (12)"),
        ("--out text.txt/scores.json", "scores.json"),
    ],
)
def test_what_is_refused(folder, capsys, arguments, words):
    assert cli.main([*COMMAND.split(), *arguments.split()]) == 2
    assert words in capsys.readouterr().err
