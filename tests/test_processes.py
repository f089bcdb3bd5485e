"""Two processes train as one does in batches twice as large, and write once."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from linearize import Recipe, processes, run
from linearize.results import read as read_report


def recipe_in(folder: Path, batch_size: int) -> Recipe:
    stage = {"tokens": 256, "batch_size": batch_size, "learning_rate": 1e-2, "save_every": 2}
    return Recipe.model_validate(
        {
            "model": str(folder / "model"),
            "mixer": {"window": 4, "sinks": 2, "mixing_weight": 0.1},
            "data": {"train": str(folder / "train.txt"), "heldout": str(folder / "heldout.txt"), "sequence_length": 32},
            "align": None,  # whose loss, a share of all squares of a batch, is no mean over tokens
            "distill": stage | {"ramp": 16},
            "evaluation": {"sequence_length": 64, "sequences": 2, "contexts": [16], "decode_tokens": 2},
            "baselines": ["window_only"],
        }
    )


@pytest.mark.slow
def test_two_processes_are_one_with_batches_twice_as_large(tmp_path):
    tiny.checkpoint(tmp_path / "model")
    for name, seed in (("train", 1), ("heldout", 2)):
        (tmp_path / f"{name}.txt").write_text(tiny.text(2000, seed), encoding="utf-8")
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(recipe_in(tmp_path, 1).model_dump(mode="json")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "linearize", "run", str(tmp_path / "two.yaml"), "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("| converted, untrained") == 1
    expected = run(recipe_in(tmp_path, 2), tmp_path / "one")
    found = read_report(tmp_path / "two")
    assert found.trained_tokens == expected.trained_tokens
    assert found.models.converted.late_loss == pytest.approx(expected.models.converted.late_loss, rel=1e-4)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-3, atol=1e-5, msg=name)
    assert not any(path.name.startswith(".two.") for path in tmp_path.iterdir())


def test_unfinished_work_is_of_so_many_processes(tmp_path, monkeypatch):
    """Whose steps are as many times as large."""
    tiny.checkpoint(tmp_path / "model")
    recipe, places = recipe_in(tmp_path, 1), []
    for count in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", count)
        with importlib.import_module("linearize.run")._work(recipe, tmp_path / "out") as place:
            places.append(place)
    assert places[0] != places[1]


def test_others_end_where_the_first_goes_on(monkeypatch):
    processes.end_others()
    monkeypatch.setenv("RANK", "1")
    assert not processes.is_first()
    with pytest.raises(SystemExit) as ended:
        processes.end_others()
    assert ended.value.code == 0
