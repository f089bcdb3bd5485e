"""Outputs that are whole or absent: written beside their place, then renamed into it."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from linearize.errors import LinearizeError

MARKER = "linearize.json"  # every folder this package writes carries one, so that it knows what it may replace
REWRITTEN = ("README.md", "report.json", "report.html")  # in place, by eval and report; all else is hashed


def check_replaceable(folder: Path) -> None:
    """Raise unless `folder` is absent, empty, or was written by this package, and its place can be written to."""
    try:
        if folder.is_dir():
            if any(folder.iterdir()) and not (folder / MARKER).is_file():
                raise LinearizeError(f"{folder} holds something else; give a folder that is new, empty or linearize's")
        elif folder.exists() or folder.is_symlink():
            raise LinearizeError(f"{folder} is a file; give a folder that is new, empty or linearize's")
        check_writable(folder)
    except OSError as error:  # a name too long, a folder that cannot be looked into
        raise disk_error(folder, error) from error


def check_file(path: Path, overwrite: bool) -> None:
    """LinearizeError where `path` cannot be written, or would replace a file that is not to be replaced."""
    if path.is_file() and not overwrite:
        raise LinearizeError(f"there is a file {path} already; give another --out, or --overwrite")
    check_writable(path)


def files_of_others(folder: Path) -> list[str]:
    """Names in a folder of this package that it did not write; hidden ones, which systems leave, are none."""
    written = {MARKER, *REWRITTEN, *_entries(folder / MARKER, "sha256")}
    files = [path for path in sorted(folder.rglob("[!.]*")) if path.is_symlink() or not path.is_dir()]
    return [name for path in files if (name := path.relative_to(folder).as_posix()) not in written]


def check_writable(path: Path) -> None:
    """Raise unless something can be made beside `path`, or where its first missing parent folder would be."""
    path = path.absolute()
    try:
        parent = next(parent for parent in path.parents if parent.exists())
        os.rmdir(tempfile.mkdtemp(prefix=f".{path.name}.", dir=parent))
    except OSError as error:
        raise disk_error(path, error) from error


@contextmanager
def new_folder(folder: str | Path, kind: str, **more: str | None) -> Iterator[Path]:
    """Yield a temporary sibling of `folder`; when the block ends without an error it takes the folder's place.

    `kind` says what the folder holds and is written to its marker, with `more` that somebody wants to know later. On
    an error or a kill the old folder, if any, is as it was, and nothing new is left. A full or read-only disk is a
    `LinearizeError` that names it.
    """
    target = Path(folder).absolute()
    check_replaceable(target)
    missing = [parent for parent in target.parents if not parent.exists()]
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        temporary.chmod(0o755)  # mkdtemp makes it private
        yield temporary
        (temporary / MARKER).write_text(
            json.dumps({"kind": kind, **more, "sha256": _digests(temporary)}, indent=2) + "\n"
        )
        for path in temporary.rglob("*"):
            if path.is_file():
                _fsync(path)
        replace_folder(temporary, target)
    except Exception as error:
        if reason := _disk_reason(error):
            raise disk_error(target, reason) from error
        raise
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # only what is empty goes
                parent.rmdir()


def replace_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target`; a folder already there is moved aside first and removed last."""
    if target.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        os.rename(target, aside / "old")
        os.rename(source, target)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(source, target)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the whole new one."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """As `write_text`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        _fsync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_empty(folder: Path) -> None:
    """Remove `folder`, and the folders in it, as far as they hold no file."""
    for path in sorted([folder, *folder.rglob("*")], reverse=True):
        with suppress(OSError):
            path.rmdir()


def disk_error(path: Path, error: OSError | str) -> LinearizeError:
    """`error`, met while writing `path`, in words."""
    reason = error if isinstance(error, str) else error.strerror or error
    return LinearizeError(f"cannot write {path}: {reason}; give a folder on a writable disk with space")


def _disk_reason(error: Exception) -> str | None:
    """What a disk did, if it was one: safetensors, tokenizers and torch have no common class for it."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # Rust's
        return os.strerror(int(found[1]))
    return "torch.save met a full or broken disk" if "inline_container.cc" in str(error) else None


def _digests(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in REWRITTEN)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths}


def _fsync(path: Path) -> None:
    with open(path, "r+b") as file:  # Windows flushes nothing that is open to be read alone
        os.fsync(file.fileno())


def verify_folder(folder: Path) -> None:
    """Raise if a file of a folder that this package wrote is not what it was; other folders pass unread.

    Names that lead out of the folder (in the marker or a shard index) are refused before they are opened.
    """
    for index in folder.rglob("*.safetensors.index.json"):
        _check_inside(index, _entries(index, "weight_map").values())
    if not (folder / MARKER).is_file():
        return
    digests = _entries(folder / MARKER, "sha256")
    _check_inside(folder / MARKER, digests)
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            raise LinearizeError(f"{folder} lacks {name}; give a whole checkpoint")
        if sha256(path) != digest:
            raise LinearizeError(f"{path} is not the file that was written (truncated or changed); write it again")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint; LinearizeError where it is damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LinearizeError(f"{path} is damaged (no JSON); give a whole checkpoint") from error
    if not isinstance(data, dict):
        raise LinearizeError(f"{path} is damaged (holds {type(data).__name__}, no object); give a whole checkpoint")
    return data


def _entries(path: Path, key: str) -> dict[str, str]:
    """The names in one object of a JSON file."""
    entries = read_json(path).get(key)
    if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
        raise LinearizeError(f"{path} is damaged (no {key!r}); give a whole checkpoint")
    return entries


def _check_inside(source: Path, names: Iterable[str]) -> None:
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise LinearizeError(f"{source} names files outside its folder: {name!r}")


def sha256(path: Path) -> str:
    """The hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
