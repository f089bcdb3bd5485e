"""Outputs are whole or absent, and what was changed since is noticed."""

import errno
import json
import os
from pathlib import Path

import pytest

from linearize.errors import LinearizeError
from linearize.files import MARKER, check_replaceable, new_folder, remove_empty, verify_folder, write_text


def make(folder: Path, content: str = "first") -> Path:
    with new_folder(folder, kind="test") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "weights").write_text(content)
        (temporary / "README.md").write_text("a card")
    return folder


def test_folder_is_new_or_replaced(tmp_path):
    out = make(tmp_path / "a" / "b" / "out")
    assert (make(out, "second") / "sub" / "weights").read_text() == "second"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert json.loads((out / MARKER).read_text())["kind"] == "test"
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        KeyboardInterrupt(),
        OSError(errno.ENOSPC, "No space left on device"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),  # torch.save
    ],
    ids=["bug", "interrupt", "os", "rust", "torch"],
)
@pytest.mark.parametrize("there", [True, False])
def test_failure_leaves_what_was_there(error, there, tmp_path):
    out = tmp_path / "a" / "out"
    if there:
        make(out)
    of_disk = not isinstance(error, ValueError | KeyboardInterrupt)

    def write() -> None:
        with new_folder(out, kind="test") as temporary:
            (temporary / "half").write_text("written")
            raise error

    with pytest.raises(LinearizeError if of_disk else type(error)) as raised:
        write()
    if of_disk:
        assert f"cannot write {out}: " in str(raised.value)
    if there:
        verify_folder(out)
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    else:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link", "in a file", "long"])
def test_other_things_are_not_replaced(kind, tmp_path):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "mine").touch()
    elif kind == "dangling link":
        out.symlink_to(tmp_path / "nowhere")
    elif kind != "long":
        out.touch()
    out = {"in a file": out / "x", "long": tmp_path / ("x" * 300)}.get(kind, out)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LinearizeError, match=r"new, empty or linearize's|writable disk"):
        check_replaceable(out)
    with pytest.raises(LinearizeError), new_folder(out, kind="test"):
        pytest.fail("the block was entered")
    assert sorted(tmp_path.rglob("*")) == before


def test_read_only_is_noticed_before_work(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(LinearizeError, match="out: Read-only file system; give a folder on a writable disk"):
        check_replaceable(tmp_path / "out")


def test_changes_are_noticed(tmp_path):
    out = make(tmp_path / "out")
    (out / "README.md").write_text("eval writes it again")
    (out / "more").write_text("a file of somebody else")
    verify_folder(out)
    (out / "sub" / "weights").write_text("changed")
    with pytest.raises(LinearizeError, match=r"sub/weights is not the file that was written"):
        verify_folder(out)
    (out / "sub" / "weights").unlink()
    with pytest.raises(LinearizeError, match="lacks sub/weights"):
        verify_folder(out)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sha256": 1}', '{"sha256": {"sub/weights": 1}}', "\udcff"])
def test_damaged_marker(content, tmp_path):
    out = make(tmp_path / "out")
    (out / MARKER).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(LinearizeError, match=f"{MARKER} is damaged"):
        verify_folder(out)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/../../secret"])
def test_names_that_lead_out_are_not_opened(name, tmp_path):
    (tmp_path / "secret").write_text("secret")
    out = make(tmp_path / "out")
    (out / MARKER).write_text(json.dumps({"sha256": {name: "0"}}))
    with pytest.raises(LinearizeError, match="outside its folder"):
        verify_folder(out)
    (out / MARKER).unlink()
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(LinearizeError, match="outside its folder"):
        verify_folder(out)


def test_write_text_replaces_whole_files(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "first")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(LinearizeError, match=r"cannot write .*a.txt: No space left on device"):
        write_text(path, "second")
    assert path.read_text() == "first"
    assert [found.name for found in tmp_path.iterdir()] == ["a.txt"]


def test_remove_empty_keeps_files(tmp_path):
    (tmp_path / "work" / "a" / "b").mkdir(parents=True)
    (tmp_path / "work" / "c").mkdir()
    (tmp_path / "work" / "c" / "kept").touch()
    remove_empty(tmp_path / "work")
    assert sorted(path.name for path in (tmp_path / "work").rglob("*")) == ["c", "kept"]
    (tmp_path / "work" / "c" / "kept").unlink()
    remove_empty(tmp_path / "work")
    remove_empty(tmp_path / "work")
    assert list(tmp_path.iterdir()) == []
