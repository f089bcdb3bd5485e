"""The rows of benchmarks.recovery: each is a valid recipe, and any number of them finds its way to the workers."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from benchmarks import recovery
from linearize.recipe import read
from linearize.variants import Base

ROWS = sorted((Path(recovery.__file__).parent / "rows").glob("*.yaml"))


def arguments(rows: Path | None = None, **given):
    return SimpleNamespace(rows=rows, data="wiki", heldout="text.jsonl", **{"recipes": [], "only": None, **given})


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)
def test_every_row_is_a_recipe(path):
    rows = recovery.read_rows(arguments(path))
    for given in rows.values():
        recipe = recovery.recipe_of(given, arguments())
        said = dict(item.split("=", 1) for item in given)  # of a key that is there twice the last counts
        shipped = read(said.get("recipe", "default")).mixer
        wanted = yaml.safe_load(said.get("mixer.structure", "null"))
        wanted = wanted if isinstance(wanted, list) else [wanted]
        every = [wanted[index * len(wanted) // 30] or shipped.layer(index, 30).structure for index in range(30)]
        assert [recipe.mixer.layer(index, 30).structure for index in range(30)] == every


def test_shipped_recipes_are_rows():
    rows = recovery.read_rows(arguments(recipes=["window-only", "default"], only=["default"]))
    assert rows == {"default": ["recipe=default"]}
    assert recovery.recipe_of(rows["default"], arguments()).mixer.values("structure") == ["gated_deltanet"]


def test_rows_of_another_text_have_tokens_of_their_own(monkeypatch):
    """As many as the row of that text needs that needs most, whatever other rows need."""
    asked = []

    def load(recipe, train):
        asked.append((recipe.data.shortest, recipe.distill.tokens))
        return Base(teacher=len(asked), tokenizer=None, documents=[recipe.data.shortest])

    monkeypatch.setattr(recovery, "load_base", load)
    monkeypatch.setattr(recovery, "_kept", {})
    rows = [["distill.tokens=2M"], ["distill.tokens=9M"], ["distill.tokens=20M", "data.shortest=64"]]
    every = [recovery.recipe_of(row, arguments()) for row in rows]
    bases = [recovery._base(recipe, every) for recipe in every]
    assert asked == [(0, 9_000_000), (64, 20_000_000)]
    assert [base.documents for base in bases] == [[0], [0], [64]]
    assert {base.teacher for base in bases} == {1}


def test_rows_of_one_name_and_several_files_have_weights_of_their_own(tmp_path):
    """But for how they are evaluated, which weights do not depend on."""
    rows = [[], ["evaluation.articles=21-30"], ["softmax_heads=8/0"], ["seed=1"], ["distill.tokens=3M"]]
    recipes = [recovery.recipe_of(row, arguments()) for row in rows]
    folders = [recovery.work_of("converted-0", recipe, tmp_path) for recipe in recipes]
    assert folders[0] == folders[1]
    assert len(set(folders)) == len(rows) - 1


@pytest.mark.slow
def test_more_rows_than_a_pipe_holds(tmp_path, monkeypatch):
    names = "\n".join(f"row-{n}: [{', '.join(['mixer.structure=none'] * 50)}]" for n in range(50))
    (tmp_path / "rows.yaml").write_text(names)
    command = [str(tmp_path / "rows.yaml"), "--out", str(tmp_path / "out.json"), "--seconds", "0", "--devices", "2"]
    monkeypatch.setattr(sys, "argv", ["recovery", *command])
    recovery.main()
    assert not (tmp_path / "out.json").exists()
