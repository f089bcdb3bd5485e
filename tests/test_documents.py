"""README and docs say what the code and the raw results say."""

import json
import re

import pytest

from benchmarks import documents
from linearize.evaluate.tracker import Settings


@pytest.mark.parametrize("page", documents.PAGES)
def test_parts_are_as_made(page):
    text = (documents.ROOT / page).read_text(encoding="utf-8")
    assert documents.PART.search(text), "a page without parts needs no place in PAGES"
    assert text == documents.rendered(text), "make docs writes it anew"


def test_tree_names_every_file():
    tree = documents.tree()
    for path in (documents.ROOT / "src" / "linearize").rglob("*.py"):
        assert path.name == "__init__.py" or re.search(rf" {path.name} ", tree), path


def test_links_lead_somewhere():
    for page in (documents.ROOT / "README.md", *(documents.ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_commands_of_the_readme_exist():
    from linearize.cli import app

    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    names |= {group.name for group in app.registered_groups}
    readme = (documents.ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `linearize (\w+)", readme, re.MULTILINE)) == names


def test_tracking_runs_tell_what_differs(tmp_path):
    assert documents.tracking_runs(tmp_path) == "Not measured yet."
    for number, (longer, changes) in enumerate([(0.25, {"seed": 1}), (0.5, {"batch": 1024})]):
        result = {
            "task": "arithmetic", "format": "direct", "structure": "deltanet", "negative_eigenvalues": True,
            "trained": 1.0, "longer": longer, "steps": 4000, "seconds": 9.6, "checks": [],
        }  # fmt: skip
        settings = Settings(mlp=512).model_dump() | changes
        data = {"settings": settings, "hardware": "one GPU", "versions": {"torch": "2"}, "results": [result]}
        (tmp_path / f"{number}.json").write_text(json.dumps(data))
    assert documents.tracking_runs(tmp_path).splitlines()[2:] == [
        "| `batch=1024`, `seed=0` | arithmetic, direct | [-1, 1] | 0.500 (1.000) | 4,000 | 10 |",
        "| `batch=256`, `seed=1` | arithmetic, direct | [-1, 1] | 0.250 (1.000) | 4,000 | 10 |",
        "",
        "All with `mlp=512`. one GPU, torch 2.",
    ]
