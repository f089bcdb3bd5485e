"""Checkpoint folders that are whole, and those that are not."""

import json

import pytest
import tiny
import torch
from tiny import ids, logits

from linearize import LinearizeError, Recipe, convert, load
from linearize.checkpoint import load_pretrained, read_curves, read_recipe, write
from linearize.files import new_folder
from linearize.recipe import LoraSettings
from linearize.results import Curve
from linearize.train.trainer import with_lora

RECIPE = Recipe(mixer={"window": 4})
CURVE = Curve(stage="align", model="converted", tokens=[8, 16], loss=[0.5, float("inf")])


def written(out, adapter: str = "merged", lora: bool = True):
    """A checkpoint in `out` whose adapter and mixing weights are not as they began; the logits it must have."""
    student = convert(tiny.tiny(eos_token_id=1), window=4, mixing_weight=0.3)
    if lora:
        student = with_lora(student, LoraSettings(r=2, alpha=4)).eval()
        for _name, parameter in student.named_parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.rand_like(parameter)
    expected = logits(student, ids(1, 20))
    with new_folder(out, kind="checkpoint") as folder:
        recipe = RECIPE.model_copy(update={"adapter": adapter})
        write(student, tiny.tokenizer(), recipe, [CURVE], folder, out)
    return expected


@pytest.mark.parametrize(("adapter", "lora"), [("merged", True), ("separate", True), ("merged", False)])
def test_written_and_loaded_it_is_the_same(tmp_path, adapter, lora):
    expected = written(tmp_path / "out", adapter, lora)
    model, tokenizer = load(tmp_path / "out")
    tiny.assert_close(logits(model, ids(1, 20)), expected)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer.decode(tokenizer("some text")["input_ids"]).replace(" ", "") == "sometext"
    assert read_recipe(tmp_path / "out").mixer == RECIPE.mixer
    assert read_curves(tmp_path / "out") == [CURVE]


def test_a_separate_adapter_moves_with_its_folder(tmp_path):
    expected = written(tmp_path / "out", "separate")
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    tiny.assert_close(logits(load(tmp_path / "elsewhere")[0], ids(1, 20)), expected)


def test_an_adapter_can_be_trained_on(tmp_path):
    written(tmp_path / "out", "separate")
    trained = [name for name, p in load(tmp_path / "out")[0].named_parameters() if p.requires_grad]
    assert sum("lora_" in name for name in trained) == 3 * 4 * 2
    assert sum(".mixing." in name for name in trained) == 3
    assert len(trained) == 3 * 4 * 2 + 3


def test_dtype(tmp_path):
    written(tmp_path / "out")
    assert {p.dtype for p in load(tmp_path / "out", dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("adapter", "name"),
    [
        ("merged", "model.safetensors"),
        ("separate", "adapter_model.safetensors"),
        ("separate", "base/model.safetensors"),
    ],
)
@pytest.mark.parametrize("damage", ["tampered", "truncated", "removed"])
def test_weights_that_are_not_what_was_written(tmp_path, adapter, name, damage):
    written(tmp_path / "out", adapter)
    path = tmp_path / "out" / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(data if damage == "tampered" else data[:-100])
    with pytest.raises(LinearizeError, match=r"model\.safetensors"):
        load(tmp_path / "out")


@pytest.mark.parametrize("marker", [True, False])
@pytest.mark.parametrize("content", ["", '{"model_type": "linearized_ll', "[]", "{}", '{"model_type": "gpt2"}'])
def test_a_config_that_is_damaged(tmp_path, content, marker):
    written(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(content)
    if not marker:
        (tmp_path / "out" / "linearize.json").unlink()
    with pytest.raises(LinearizeError, match=r"config\.json|'gpt2'|families|llama"):
        load(tmp_path / "out")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../b"])
def test_a_shard_index_that_leads_out_of_the_folder(tmp_path, name):
    written(tmp_path / "out")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LinearizeError, match="files outside its folder"):
        load(tmp_path / "out")


def test_a_marker_that_leads_out_of_the_folder(tmp_path):
    written(tmp_path / "out")
    (tmp_path / "secret").write_text("x")
    (tmp_path / "out" / "linearize.json").write_text(json.dumps({"kind": "checkpoint", "sha256": {"../secret": "0"}}))
    with pytest.raises(LinearizeError):
        load(tmp_path / "out")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sha256": 3}', '{"kind": "checkpoint", "sha'])
def test_a_damaged_marker(tmp_path, content):
    written(tmp_path / "out")
    (tmp_path / "out" / "linearize.json").write_text(content)
    with pytest.raises(LinearizeError, match=r"linearize\.json is damaged"):
        load(tmp_path / "out")


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(LinearizeError, match="no checkpoint folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(LinearizeError, match=r"no config\.json"):
        load(tmp_path)
    with pytest.raises(LinearizeError, match=r"no recipe\.yaml"):
        read_recipe(tmp_path)
    with pytest.raises(LinearizeError, match=r"curves\.json is missing or damaged"):
        read_curves(tmp_path)


def test_a_model_without_its_tokenizer(tmp_path):
    tiny.tiny().save_pretrained(tmp_path)
    with pytest.raises(LinearizeError, match=r"there is no tokenizer in .*json"):
        load_pretrained(str(tmp_path))


def test_a_tokenizer_of_another_model(tmp_path):
    """With tokens that the model has no embeddings for."""
    tiny.checkpoint(tmp_path)
    model, tokenizer = load_pretrained(str(tmp_path))
    tokenizer.add_tokens([f"<{n}>" for n in range(model.config.vocab_size)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(LinearizeError, match=r"has a token [0-9]+, '<[0-9]+>', and the model embeddings for"):
        load_pretrained(str(tmp_path))


def test_a_model_of_another_shape_than_its_settings(tmp_path):
    tiny.checkpoint(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"intermediate_size": 80}))
    with pytest.raises(LinearizeError, match=r"mlp.down_proj.weight is \[\d+, \d+\], by its config.json \[\d+, 80\]"):
        load_pretrained(str(tmp_path))
