"""The decoding benchmarks run on a tiny model without a GPU, go on from their results, and their tables can be made."""

import json
import sys

import pytest
import torch

from benchmarks import decode, decode_checks, prompt, results
from benchmarks import documents_speed as speed

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="sizes are for a CPU")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command with arguments; its results."""
    monkeypatch.setattr(decode, "TELLING", ((16, 128),))
    monkeypatch.setattr(decode, "REST", ((1, 128), (16, 256)))
    monkeypatch.setattr(decode.gc, "collect", lambda: 0)  # slow beside all that the other tests made

    def command(*arguments: str, name: str = "decode_h100") -> dict:
        out = tmp_path / f"{name}.json"
        monkeypatch.setattr(
            sys, "argv", ["decode", "--model", "tiny", "--compile", "none", "--out", str(out), *arguments]
        )
        decode.main()
        return json.loads(out.read_text())

    return command


def test_rows_are_measured_once_and_told(run, monkeypatch, tmp_path, capsys):
    data = run()
    assert {(row["batch"], row["context"]) for row in data["rows"]} == {(16, 128), (1, 128), (16, 256)}
    for row in data["rows"]:
        assert all(len(side["seconds"]) == 3 for side in (row["linearized"], *row["original"].values()))
        assert row["key_value"] == row["batch"] * row["context"] * 2 * 2 * 2 * 16 * 2  # layers, k and v, heads, in bf16
    assert run() == data
    data["rows"] = [row | {"model": "Llama-3-8B"} for row in data["rows"]]
    data["rows"][2]["original"] = {form: {"seconds": [], "error": "out of memory"} for form in ("static", "unmasked")}
    (tmp_path / "decode_default_h200.json").write_text(json.dumps(data))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert speed.decoding("decode_default_h200").count("| Llama-3-8B | ") == 3
    assert "out of memory" in speed.decoding("decode_default_h200")
    assert speed.generation().count(" GB |") == 3  # of two lengths, one of them too long for the original


def test_a_file_is_of_one_structure(run):
    data = run("--structure", "default")
    assert data["structure"] == "default"
    assert all(len(row["linearized"]["seconds"]) == 3 for row in data["rows"])
    with pytest.raises(SystemExit, match="is of structure default"):
        run("--structure", "gla")


def test_failures_of_single_rows_are_recorded(run, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no room\nat all")

    monkeypatch.setattr(decode, "original_step", fail)
    data = run()
    assert all(
        form == {"seconds": [], "bytes": None, "error": "out of memory"}
        for form in data["rows"][0]["original"].values()
    )
    assert all(row["linearized"]["seconds"] for row in data["rows"])


def test_smoke_finds_what_is_right(tmp_path):
    decode_checks.smoke(tmp_path / "smoke.json", decode.ANY_MODEL, stop=float("inf"))
    found = json.loads((tmp_path / "smoke.json").read_text())["found"]
    assert max(error for name, error in found.items() if name.startswith("kernel")) < 2e-2
    for structure in decode.ANY_MODEL:
        assert found[f"{structure}: graph against ordinary forward, torch.float32"] < 1e-5
        assert found[f"{structure}: likeliest tokens that are the same, torch.float32"] == 1


def test_a_prompt_in_chunks(monkeypatch, tmp_path):
    prompt.read_prompt(tmp_path / "prompt_h100.json", "tiny", 300, stop=float("inf"), chunk=64)
    data = json.loads((tmp_path / "prompt_h100.json").read_text())
    assert [row["tokens"] for row in data["rows"]] == [64, 128, 192, 256, 300]
    assert len({row["cache_bytes"] for row in data["rows"]}) == 1
    assert data["finite"]
    assert max(data["other_chunks"]) < 0.05  # bf16
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert speed.long_prompt().count("\n| ") == 5  # 64, 128, 256, 300 and the line below the names
