"""The main job on a tiny model and tiny text: in one go, stage by stage, killed and gone on with."""

import importlib
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import assert_close, ids, logits, relative, timeless
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize import LinearizeError, Recipe, convert, load, variants
from linearize.checkpoint import read_curves, read_recipe
from linearize.convert import mixers
from linearize.decoder import Decoder
from linearize.evaluate import ablations, recurrence_off, window_off
from linearize.measures import Suite
from linearize.recipe import AlignSettings
from linearize.results import read as read_report

job = importlib.import_module("linearize.run")  # as an attribute of the package, `run` is the function

TOKENS = ids(1, 60)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    folder = tmp_path_factory.mktemp("given")
    tiny.checkpoint(folder / "model")
    for name, seed in (("train", 1), ("heldout", 2)):
        (folder / f"{name}.txt").write_text(tiny.text(2000, seed), encoding="utf-8")
    return Recipe.model_validate(
        {
            "model": str(folder / "model"),
            "mixer": {"window": 4, "sinks": 2, "mixing_weight": 0.1},
            "data": {
                "train": str(folder / "train.txt"),
                "heldout": str(folder / "heldout.txt"),
                "sequence_length": 32,
            },
            "lora": {"r": 4, "alpha": 8, "kept": 0.7},
            "align": {"tokens": 192, "batch_size": 2, "learning_rate": 1e-2, "save_every": 1},
            "distill": {"tokens": 192, "batch_size": 2, "learning_rate": 1e-2},
            "evaluation": {"sequence_length": 64, "sequences": 3, "contexts": [16, 40], "decode_tokens": 2},
            "baselines": ["window_only", "window_equal_memory"],
        }
    )


def changed(recipe: Recipe, **changes) -> Recipe:
    return Recipe.model_validate(recipe.model_dump() | changes)


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory) -> Path:
    """The folder of a whole run."""
    out = tmp_path_factory.mktemp("run") / "out"
    job.run(recipe, out)
    return out


@pytest.fixture
def trained(monkeypatch) -> list[tuple[str, str]]:
    """The stages that are trained during a test, (stage, model)."""
    calls = []

    def watched(stage, name, *rest):
        calls.append((stage, name))
        return original(stage, name, *rest)

    original = variants.train
    monkeypatch.setattr(variants, "train", watched)
    return calls


def kill_at(monkeypatch, stage: str, name: str) -> None:
    def killed(*args):
        if args[:2] == (stage, name):
            raise KeyboardInterrupt
        return original(*args)

    original = variants.train
    monkeypatch.setattr(variants, "train", killed)


def test_the_folder_holds_all_that_belongs_to_it(done, recipe):
    names = {path.name for path in done.iterdir()}
    assert names >= {
        *("config.json", "model.safetensors", "tokenizer.json", "recipe.yaml", "curves.json", "linearize.json"),
        *("report.json", "report.html", "README.md"),
    }
    assert not any(name.startswith((".", "adapter", "base")) for name in names)
    assert read_recipe(done) == recipe
    assert [path.name for path in done.parent.iterdir() if path.name.startswith(".")] == []


def test_transformers_loads_it(done):
    model, info = AutoModelForCausalLM.from_pretrained(done, output_loading_info=True)
    assert not any(info.values())
    ours, tokenizer = load(done)
    assert torch.equal(logits(model.eval(), TOKENS), logits(ours, TOKENS))
    assert type(ours).__name__ == "LinearizedLlamaForCausalLM"
    assert tokenizer("a text")["input_ids"] == AutoTokenizer.from_pretrained(done)("a text")["input_ids"]


def test_heads_stay_through_the_whole_job(recipe, tmp_path):
    """With the adapter beside the weights; and stage by stage, where the checkpoint knows which they are."""
    plain = ["window_only"]
    whole = changed(recipe, softmax_heads="0/1,2/0", adapter="separate", baselines=plain)
    job.run(whole, tmp_path / "whole")
    report = read_report(tmp_path / "whole")
    assert report.kept == "2 of 6 key/value heads"
    assert [row.kept for row in report.layers] == [[1], [], [0]]
    assert {len(row.mixing) for row in report.layers} == {3, 6}
    assert "2 of 6 key/value heads stay as they are" in (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")
    job.convert_only(changed(recipe, softmax_heads="0/1,2/0"), tmp_path / "converted")
    for stage, source in (("align", "converted"), ("distill", "align")):
        job.stage_only(stage, tmp_path / source, changed(recipe, baselines=plain), tmp_path / stage)
    assert read_recipe(tmp_path / "distill").softmax_heads == "0/1,2/0"
    again = job.evaluate_only(tmp_path / "distill", read_recipe(tmp_path / "distill"))
    assert again.kept == report.kept
    assert again.models.window_only is not None
    chosen = [mixer.softmax_heads and mixer.softmax_heads.chosen for mixer in mixers(load(tmp_path / "distill")[0])]
    assert chosen == [(1,), None, (0,)]


def test_the_report(done, recipe):
    report = read_report(done)
    models = report.models
    assert models.window_only.window == models.converted.window == 4
    assert models.window_equal_memory.window == 4 + 8  # 512 bytes of states, 64 of keys and values a token
    for result in (models.converted, models.window_only, models.window_equal_memory):
        assert result.trained_tokens == 384
    assert models.converted.perplexity < models.untrained.perplexity
    assert models.teacher.agreement is None
    assert 0 < models.converted.agreement <= 1
    gap = models.window_only.late_loss - models.teacher.late_loss
    if gap > 0:
        share = (models.window_only.late_loss - models.converted.late_loss) / gap
        assert report.late_gap_closed.window_only == pytest.approx(share)
    assert report.decode_parity < 1e-5
    assert [(c.stage, c.model) for c in report.curves] == [
        (stage, name) for name in ("converted", "window_only", "window_equal_memory") for stage in ("align", "distill")
    ]
    assert all(curve.tokens == [64, 128, 192] for curve in report.curves)
    assert [layer.layer for layer in report.layers] == [0, 1, 2]
    assert any(abs(weight - 0.1) > 1e-4 for layer in report.layers for weight in layer.mixing)
    assert report.cache_bytes["converted"][16] == report.cache_bytes["converted"][40]
    assert report.cache_bytes["teacher"][40] == 40 * 3 * 2 * 2 * 8 * 4
    assert report.recipe == recipe.model_dump(mode="json")


def test_the_report_s_losses_are_those_of_the_checkpoint(done, recipe):
    """Worked out again, without the cutting, packing and chunking of the evaluation."""
    model, tokenizer = load(done)
    text = Path(recipe.data.heldout).read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text)["input_ids"])[: 3 * 64].view(3, 64)
    losses = [model(row[None], labels=row[None]).loss.item() for row in tokens]
    measured = read_report(done).models.converted
    assert torch.tensor(losses).mean().exp().item() == pytest.approx(measured.perplexity, rel=1e-4)
    with recurrence_off(model):
        off = [model(row[None], labels=row[None]).loss.item() for row in tokens]
    ablation = read_report(done).models.recurrence_off
    assert torch.tensor(off).mean().exp().item() == pytest.approx(ablation.perplexity, rel=1e-4)
    assert off != losses


def test_a_second_run_reuses_the_first(done, recipe, trained):
    before = {path.name: path.read_bytes() for path in done.iterdir()}
    assert job.run(recipe, done) == read_report(done)
    assert trained == []
    assert {path.name: path.read_bytes() for path in done.iterdir()} == before


def test_another_recipe_replaces_the_result_if_it_may_with_what_work_it_can(done, recipe, trained):
    other = changed(recipe, baselines=["window_only"], evaluation=recipe.evaluation.model_dump() | {"sequences": 2})
    for job_of in (partial(job.run, other), partial(job.convert_only, other), partial(job.merge_only, done.parent)):
        with pytest.raises(LinearizeError, match="holds a checkpoint already; give another --out, or --overwrite"):
            job_of(done)
    assert job.run(recipe, done) == read_report(done)
    report = job.run(other, done, overwrite=True)
    assert trained == []
    assert report.models.window_equal_memory is None
    assert read_recipe(done) == other
    job.run(recipe, done, overwrite=True)


@pytest.mark.parametrize(
    ("stage", "name", "left"),
    [
        ("distill", "converted", ["align converted", "distill converted", "align window_only", "distill window_only"]),
        ("align", "window_only", ["align window_only", "distill window_only"]),
    ],
)
def test_a_killed_run_goes_on(recipe, done, tmp_path, monkeypatch, trained, stage, name, left):
    recipe = changed(recipe, baselines=["window_only"])
    with monkeypatch.context() as patch:
        kill_at(patch, stage, name)
        with pytest.raises(KeyboardInterrupt):
            job.run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    trained.clear()
    report = job.run(recipe, tmp_path / "out")
    assert [" ".join(pair) for pair in trained] == left
    expected = read_report(done)
    assert timeless(report.curves) == timeless(expected.curves[:4])
    assert report.models.converted == expected.models.converted
    assert torch.equal(logits(load(tmp_path / "out")[0], TOKENS), logits(load(done)[0], TOKENS))


def test_a_failure_while_writing_leaves_nothing(recipe, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job, "_write_report", full)
    with pytest.raises(LinearizeError, match="No space left on device"):
        job.run(changed(recipe, align=None, distill=None, baselines=[]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_stage_by_stage_is_the_same_as_in_one_go(recipe, done, tmp_path):
    job.convert_only(recipe, tmp_path / "converted")
    untrained = convert(tiny.tiny(eos_token_id=1), **recipe.mixer.model_dump())
    assert torch.equal(logits(load(tmp_path / "converted")[0], TOKENS), logits(untrained, TOKENS))
    assert read_curves(tmp_path / "converted") == []
    job.stage_only("align", tmp_path / "converted", recipe, tmp_path / "aligned")
    job.stage_only("distill", tmp_path / "aligned", recipe, tmp_path / "distilled")
    assert timeless(read_curves(tmp_path / "distilled")) == timeless(read_report(done).curves[:2])
    assert_close(logits(load(tmp_path / "distilled")[0], TOKENS), logits(load(done)[0], TOKENS))
    report = job.evaluate_only(tmp_path / "distilled", changed(recipe, baselines=[]))
    assert job.evaluate_only(tmp_path / "distilled", changed(recipe, baselines=[])).models == report.models
    expected = read_report(done).models.converted.loss_by_position
    assert report.models.converted.loss_by_position == pytest.approx(expected, rel=1e-5)
    report.suite = Suite()
    (tmp_path / "distilled" / "report.json").write_text(report.model_dump_json(), encoding="utf-8")
    with pytest.raises(LinearizeError, match="has a report with the full suite; measure that again, or --overwrite it"):
        job.evaluate_only(tmp_path / "distilled", changed(recipe, baselines=[]))
    report = job.evaluate_only(tmp_path / "distilled", changed(recipe, baselines=[]), overwrite=True)
    assert read_report(tmp_path / "distilled") == report
    assert report.suite is None


def test_a_separate_adapter_is_the_merged_model(recipe, done, tmp_path):
    separate = changed(recipe, adapter="separate", baselines=[])
    job.run(separate, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    model, _ = load(tmp_path / "out")
    expected = logits(load(done)[0], TOKENS)
    assert_close(logits(model, TOKENS), expected)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    untrained = convert(tiny.tiny(eos_token_id=1), **recipe.mixer.model_dump())
    assert torch.equal(logits(base, TOKENS), logits(untrained, TOKENS))
    job.merge_only(tmp_path / "out", tmp_path / "merged")
    assert_close(logits(load(tmp_path / "merged")[0], TOKENS), expected)
    assert timeless(read_curves(tmp_path / "merged")) == timeless(read_curves(done))
    assert read_report(tmp_path / "merged") == read_report(tmp_path / "out")
    assert (tmp_path / "merged" / "README.md").is_file()


def test_parity_is_of_the_steps_that_a_merged_model_takes(recipe, tmp_path, monkeypatch):
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda *given: 1.5 * step(*given))
    report = job.run(changed(recipe, baselines=[]), tmp_path / "out")
    assert report.decode_parity == pytest.approx(0.5, rel=1e-3)


def test_all_parameters_without_lora(recipe, tmp_path):
    report = job.run(changed(recipe, lora=None, baselines=[]), tmp_path / "out")
    assert report.models.converted.perplexity < report.models.untrained.perplexity
    model, _ = load(tmp_path / "out")
    before = dict(tiny.tiny(eos_token_id=1).named_parameters())
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_no_training_at_all(recipe, tmp_path):
    report = job.run(changed(recipe, align=None, distill=None, baselines=["window_only"]), tmp_path / "out")
    assert report.curves == []
    assert report.models.converted.loss_by_position == report.models.untrained.loss_by_position


def test_recurrence_off_is_the_window_alone_and_comes_back(recipe):
    model = convert(tiny.tiny(), window=4, sinks=2, mixing_weight=0.3)
    expected, alone = logits(model, TOKENS), convert(tiny.tiny(), structure="none", window=4, sinks=2)
    with recurrence_off(model):
        assert_close(logits(model, TOKENS), logits(alone, TOKENS))
    assert torch.equal(logits(model, TOKENS), expected)
    with pytest.raises(KeyboardInterrupt), recurrence_off(model):
        raise KeyboardInterrupt
    assert not any(mixer.ablated for mixer in mixers(model))


@pytest.mark.parametrize("settings", [{"mixing_weight": 0.3}, {"mixing": "shared_normalizer", "readout": "none"}])
def test_window_off_is_the_recurrence_alone_and_comes_back(settings):
    """Under a shared normaliser that is the recurrence as it is: over the tokens beyond the window, and a mean."""
    model = convert(tiny.tiny(), window=4, sinks=2, **settings)
    expected = logits(model, TOKENS)
    with window_off(model):
        off = logits(model, TOKENS)
        if settings.get("mixing") is None:
            assert_close(off, logits(convert(tiny.tiny(), local="none"), TOKENS))
    assert torch.equal(logits(model, TOKENS), expected)
    assert relative(off, expected) > 1e-3


def test_what_has_one_branch_has_no_ablation():
    assert ablations(convert(tiny.tiny(), window=4, softmax_every=2))
    assert ablations(convert(tiny.tiny(), structure=["none", "gla", "gla"], window=4))
    assert not ablations(convert(tiny.tiny(), structure="none", window=4))
    assert not ablations(convert(tiny.tiny(), local="none"))
    assert not ablations(tiny.tiny())


def test_something_else_is_left_alone(recipe, tmp_path, trained):
    (tmp_path / "thesis.tex").write_text("years of work")
    for start in (
        lambda: job.run(recipe, tmp_path),
        lambda: job.convert_only(recipe, tmp_path),
        lambda: job.stage_only("align", tmp_path / "from", recipe, tmp_path),
        lambda: job.merge_only(tmp_path / "from", tmp_path),
    ):
        with pytest.raises(LinearizeError, match="holds something else"):
            start()
    assert trained == []
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no/such/folder"}, "valid: smollm2-135m, a local folder"),
        ({"data": {"train": "nothing.txt"}}, "no file nothing.txt"),
        ({"layers": "0-9"}, "this model's layers are 0-2"),
        ({"evaluation": {"suite": "full", "distances": [2, 64], "tasks": []}}, "distance 2 has no room for a question"),
    ],
)
def test_what_is_wrong_shows_before_anything_is_written(recipe, tmp_path, changes, message):
    if "data" in changes:
        changes = {"data": recipe.data.model_dump() | changes["data"]}
    with pytest.raises(LinearizeError, match=message):
        job.run(changed(recipe, **changes), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_same_folder_cannot_be_source_and_result(recipe, done):
    with pytest.raises(LinearizeError, match="cannot be both source and out"):
        job.stage_only("distill", done, recipe, done)


def test_merging_what_is_merged_is_refused(done, tmp_path):
    with pytest.raises(LinearizeError, match="has no adapter to merge"):
        job.merge_only(done, tmp_path / "out")


def test_the_marker_covers_every_weight(done):
    assert "model.safetensors" in json.loads((done / "linearize.json").read_text())["sha256"]


def test_a_stage_of_another_source_is_trained_anew(recipe, tmp_path):
    """Its work folder must not be taken for that of the source that was there before."""
    job.convert_only(recipe, tmp_path / "source")
    job.stage_only("distill", tmp_path / "source", recipe, tmp_path / "out")
    first = logits(load(tmp_path / "out")[0], TOKENS)
    other = changed(recipe, mixer=recipe.mixer.model_dump() | {"mixing_weight": 0.4})
    job.convert_only(other, tmp_path / "source", overwrite=True)
    job.stage_only("distill", tmp_path / "source", other, tmp_path / "out", overwrite=True)
    assert not torch.equal(logits(load(tmp_path / "out")[0], TOKENS), first)


def test_a_stage_without_training_checkpoints(recipe, tmp_path):
    job.convert_only(recipe, tmp_path / "source")
    none = changed(recipe, distill=recipe.distill.model_dump() | {"save_every": 0})
    job.stage_only("distill", tmp_path / "source", none, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_text_that_changed_is_read_again(recipe, tmp_path, trained):
    text = tmp_path / "train.txt"
    text.write_text(tiny.text(2000, 1), encoding="utf-8")
    mine = changed(recipe, data=recipe.data.model_dump() | {"train": str(text)}, baselines=[])
    job.run(mine, tmp_path / "out")
    assert trained == [("align", "converted"), ("distill", "converted")]
    text.write_text(tiny.text(2001, 3), encoding="utf-8")
    job.run(mine, tmp_path / "out", overwrite=True)
    assert len(trained) == 4


def test_held_out_text_decides_no_weights(recipe, tmp_path, trained):
    """Nor do other files beside the text; and a run knows its result after an evaluation by other settings."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "train.txt").write_text(tiny.text(2000, 1), encoding="utf-8")
    mine = changed(recipe, data=recipe.data.model_dump() | {"train": str(folder)}, baselines=["window_only"])
    job.run(mine, folder / "out")
    assert len(trained) == 4
    other = tmp_path / "other.txt"
    other.write_text(tiny.text(2001, 5), encoding="utf-8")
    report = job.evaluate_only(folder / "out", changed(mine, data=mine.data.model_dump() | {"heldout": str(other)}))
    shutil.rmtree(folder / "out.work")
    assert job.run(mine, folder / "out") == report
    assert len(trained) == 4


def test_stages_must_share_what_makes_a_baseline_matched(recipe, tmp_path):
    job.convert_only(recipe, tmp_path / "converted")
    job.stage_only("align", tmp_path / "converted", recipe, tmp_path / "aligned")
    with pytest.raises(LinearizeError, match=r"lora\.r is 2, .* was made with 4; .* must be the same"):
        job.stage_only("distill", tmp_path / "aligned", changed(recipe, lora={"r": 2}), tmp_path / "out")
    with pytest.raises(LinearizeError, match=r"lora is null, .* must be the same"):
        job.stage_only("distill", tmp_path / "aligned", changed(recipe, lora=None), tmp_path / "out")
    for key, value in (("mixer", {"window": 50}), ("data", {"sequence_length": 16})):
        other = changed(recipe, **{key: getattr(recipe, key).model_dump() | value})
        with pytest.raises(LinearizeError, match=r"valid to set: evaluation, baselines, data\.heldout"):
            job.evaluate_only(tmp_path / "aligned", other)


def test_a_stage_that_the_recipe_has_not_is_as_it_is_by_itself(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "AlignSettings", partial(AlignSettings, tokens=64))
    job.convert_only(recipe, tmp_path / "converted")
    job.stage_only("align", tmp_path / "converted", changed(recipe, align=None), tmp_path / "aligned")
    assert read_recipe(tmp_path / "aligned").align == AlignSettings(tokens=64)


def test_a_checkpoint_and_its_teacher_elsewhere(recipe, tmp_path):
    """As long as it is that teacher."""
    shutil.copytree(recipe.model, tmp_path / "here" / "teacher")
    mine = changed(recipe, model=str(tmp_path / "here" / "teacher"), baselines=[])
    report = job.run(mine, tmp_path / "out")
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(LinearizeError, match="is no folder here"):
        job.evaluate_only(tmp_path / "out", mine)
    moved = changed(mine, model=str(tmp_path / "there" / "teacher"))
    again = job.evaluate_only(tmp_path / "out", moved).models
    assert again.teacher == report.models.teacher
    assert again.converted.late_loss == pytest.approx(report.models.converted.late_loss, rel=1e-5)
    tiny.checkpoint(tmp_path / "another", initializer_range=0.2)
    with pytest.raises(LinearizeError, match=r"the model is another than .*out was made of"):
        job.evaluate_only(tmp_path / "out", changed(mine, model=str(tmp_path / "another")))


def test_paths_of_a_recipe_are_known_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(data={"train": "text.txt"})
    assert recipe.data.train == str(tmp_path / "text.txt")
    (tmp_path / "wiki").mkdir()
    recipe = Recipe(data={"train": "text.txt"})
    assert (recipe.model, recipe.data.heldout) == ("smollm2-135m", "wiki")
    assert [Recipe(model=name).model for name in ("", "x" * 300, "~nobody/x")] == ["", "x" * 300, "~nobody/x"]


def test_weights_in_another_dtype(recipe, tmp_path):
    job.convert_only(changed(recipe, dtype="bfloat16"), tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.bfloat16}
    assert load(tmp_path / "out")[0].dtype == torch.float32


def test_weights_are_merged_before_they_are_rounded(recipe, done, tmp_path):
    job.run(changed(recipe, dtype="bfloat16", baselines=[]), tmp_path / "out")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", done))
    assert all(torch.equal(ours[name], x.bfloat16()) for name, x in theirs.items())


def test_baselines_are_of_the_same_text_and_steps(recipe, tmp_path, monkeypatch):
    text = tmp_path / "train.txt"
    text.write_text(tiny.text(2000, 1), encoding="utf-8")
    mine = changed(recipe, data=recipe.data.model_dump() | {"train": str(text)}, baselines=[])
    job.run(mine, tmp_path / "out")
    (tmp_path / "other.txt").write_text(tiny.text(2000, 4), encoding="utf-8")
    data = mine.data.model_dump() | {"train": str(tmp_path / "other.txt")}
    for baselines in ([], ["window_only"]):  # else what was trained on might be measured with
        with pytest.raises(LinearizeError, match="valid to set"):
            job.evaluate_only(tmp_path / "out", changed(mine, data=data, baselines=baselines))
    monkeypatch.setattr(job.processes, "count", lambda: 2)
    with pytest.raises(LinearizeError, match="was trained by 1 processes"):
        job._check_made_of(load(recipe.model)[0], tmp_path / "out", trains=True)


def test_a_folder_with_files_of_others_is_left_alone(recipe, tmp_path):
    job.convert_only(recipe, tmp_path / "out")
    (tmp_path / "out" / "notes").mkdir()
    (tmp_path / "out" / "notes" / "README.md").write_text("mine")
    with pytest.raises(LinearizeError, match=r"holds files of others as well \(notes/README\.md\)"):
        job.convert_only(recipe, tmp_path / "out", overwrite=True)


def test_held_out_text_is_not_trained_on(recipe, tmp_path):
    """However it is called."""
    (folder := tmp_path / "texts").mkdir()
    (inside := folder / "heldout.txt").write_text(tiny.text(2000, 5), encoding="utf-8")
    (copied := tmp_path / "copied.txt").write_bytes(inside.read_bytes())
    again = folder, f"{folder}/../texts"
    for pair in ((inside, inside), (folder, copied), (folder, inside), again, ("owner/name", "owner/name")):
        data = recipe.data.model_dump() | dict(zip(("train", "heldout"), map(str, pair), strict=True))
        with pytest.raises(LinearizeError, match=r"data\.train and data\.heldout are both"):
            job.run(changed(recipe, data=data), tmp_path / "out")
