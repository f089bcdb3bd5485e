"""`--suite full` from end to end on a tiny model: every part is there, for every model, and in the report."""

from importlib import import_module

import pytest
import tiny

from linearize import LinearizeError, Recipe, variants
from linearize.convert import mixers
from linearize.evaluate import suite
from linearize.evaluate.kept import Kept
from linearize.evaluate.layers import QUANTILES
from linearize.results import read as read_report

job = import_module("linearize.run")
ABLATIONS = {"recurrence_off", "window_off"}
COMPARED = {"teacher", "window_only", "window_equal_memory", "converted"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    folder = tmp_path_factory.mktemp("given")
    tiny.checkpoint(folder / "model", max_position_embeddings=512)
    (folder / "train.txt").write_text(tiny.text(2000, 1), encoding="utf-8")
    for number in range(4):
        (folder / "heldout").mkdir(exist_ok=True)
        (folder / "heldout" / f"{number}.txt").write_text(tiny.text(250 - 60 * number, number + 2), encoding="utf-8")
    return Recipe.model_validate(
        {
            "model": str(folder / "model"),
            "softmax_every": 2,
            "mixer": {"window": 4, "sinks": 2, "mixing_weight": 0.3},
            "data": {"train": str(folder / "train.txt"), "heldout": str(folder / "heldout"), "sequence_length": 32},
            "align": None,
            "distill": None,
            "baselines": ["window_only", "window_equal_memory"],
            "evaluation": {
                "sequence_length": 64,
                "sequences": 3,
                "contexts": [16],
                "decode_tokens": 2,
                "articles": "1-3",
                "suite": "full",
                "lengths": [64, 128, 1024],
                "distances": [64, 128],
                "trials": 2,
                "tasks": [],
                "limit": 3,
            },
        }
    )


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "NEW_TOKENS", 24)
        return job.run(recipe, out), out


def test_an_interrupted_suite_goes_on_where_it_was(done, recipe, tmp_path, monkeypatch):
    report, _ = done
    monkeypatch.setattr(suite, "NEW_TOKENS", 24)
    original = suite.generation

    def cut_off(model, *arguments):
        if hasattr(model.config, "linearize"):
            raise KeyboardInterrupt
        return original(model, *arguments)

    monkeypatch.setattr(suite, "generation", cut_off)
    with pytest.raises(KeyboardInterrupt):
        job.run(recipe, tmp_path / "out")
    assert len(list((tmp_path / "out.work").rglob("suite-*.json"))) == 1
    monkeypatch.setattr(suite, "generation", original)
    for name in ("late_losses", "recall"):
        monkeypatch.setattr(suite, name, lambda *_, **__: pytest.fail("measured already"))
    again = job.run(recipe, tmp_path / "out")
    assert again.suite == report.suite
    assert not (tmp_path / "out.work").exists()


def test_what_is_kept_is_of_the_same_settings_and_weights(recipe, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "linearize.json").write_text(f'{{"sha256": "{name}"}}')
    other = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"trials": 3})})
    given = [(recipe,), (other,), (recipe, tmp_path / "a"), (recipe, tmp_path / "b")]
    paths = [job._kept(given[0], tmp_path, *given[1:]).path for given in given * 2]
    assert len(set(paths)) == 4
    assert paths[:4] == paths[4:]


def test_answers_are_kept_as_they_are(tmp_path):
    answers = [suite.choice.Answers("arc_easy", "acc", [1.0, 0.0], [2, 1], [2, 0])]
    assert Kept(tmp_path / "kept.json")("tasks", list[suite.choice.Answers], lambda: answers) == answers
    again = Kept(tmp_path / "kept.json")
    assert again("tasks", list[suite.choice.Answers], lambda: 1 / 0) == answers
    again.forget()
    assert not Kept(tmp_path / "kept.json").found


def test_every_part_of_every_model(done, recipe):
    report, out = done
    assert read_report(out) == report
    found = report.suite
    assert [gap.length for gap in found.late] == [64, 128]  # no text has 1,024 tokens
    assert found.late[0].articles == [1, 2, 3]
    assert found.late[1].articles == [1, 2, 3]
    for gap in found.late:
        assert set(gap.losses) == COMPARED | ABLATIONS
    assert set(found.recall) == COMPARED | ABLATIONS
    assert {(score.task, score.distance) for score in found.recall["teacher"]} == {
        (task, distance)
        for task in ("needle", "multi_key", "multi_value", "lookup", "copy")
        for distance in recipe.evaluation.distances
    }
    assert set(found.generation) == COMPARED
    assert found.generation["converted"].prompts == 3
    assert found.tasks == {}
    assert report.models.window_off.late_loss != report.models.recurrence_off.late_loss
    assert {"late gap", "recall", "tasks", "generation"} <= set(report.seconds)


def test_the_suite_and_the_quick_part_agree(done):
    report, _ = done
    models = report.models.measured()
    for name, losses in report.suite.late[0].losses.items():
        assert sum(losses[0]) / len(losses[0]) == pytest.approx(models[name].late_loss, rel=1e-6)


def test_seeds_are_pooled(done, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "NEW_TOKENS", 8)
    first, out = done
    second = recipe.model_copy(update={"seed": 1})
    job.run(second, tmp_path / "second")
    report = job.evaluate_only(tmp_path / "second", second, [out])
    for gap, own in zip(report.suite.late, first.suite.late, strict=True):
        assert gap.losses["converted"][1] == own.losses["converted"][0]
        assert len(gap.losses["teacher"]) == 2
        assert all(len(share.by_seed) == 2 for share in gap.closed.values())
    with pytest.raises(LinearizeError, match="the seed is the same"):
        job.evaluate_only(out, recipe, [out])
    fewer = recipe.evaluation.model_copy(update={"trials": 1})
    with pytest.raises(LinearizeError, match="no other seed of this recipe: evaluation"):
        job.evaluate_only(tmp_path / "second", second.model_copy(update={"evaluation": fewer}), [out])
    quick = recipe.evaluation.model_copy(update={"suite": "quick"})
    with pytest.raises(LinearizeError, match="both need --suite full"):
        job.evaluate_only(tmp_path / "second", second.model_copy(update={"evaluation": quick}), [out])


def test_half_lives_are_quantiles_of_the_layers(done):
    report, _ = done
    assert [layer.layer for layer in report.layers] == [0, 2]
    for layer in report.layers:
        assert len(layer.half_life) == len(QUANTILES)
        assert layer.half_life == sorted(layer.half_life)
        assert layer.half_life[0] > 0


def test_a_baseline_keeps_the_same_softmax_layers(recipe):
    """So that what a hybrid's softmax layers do is not taken for what its recurrence does."""
    listed = recipe.model_copy(update={"layers": "0,2", "softmax_every": None})
    for chosen in (recipe, listed):
        teacher = tiny.tiny()
        for name in ("converted", *chosen.baselines):
            model = variants.build(chosen, variants.mixer_of(chosen, name, teacher), teacher)
            assert [mixer.layer_idx for mixer in mixers(model)] == [0, 2]
            assert model.config.linearize["layers"] == [0, 2]


def test_articles_that_are_not_there(recipe, tmp_path):
    evaluation = recipe.evaluation.model_copy(update={"articles": "3-9"})
    with pytest.raises(LinearizeError, match=r"'3-9'.*within 1-4"):
        job.run(recipe.model_copy(update={"evaluation": evaluation}), tmp_path / "out")
