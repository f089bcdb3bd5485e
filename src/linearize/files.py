"""Outputs that are whole or absent: written beside their place, then renamed into it."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from linearize.errors import LinearizeError

MARKER = "linearize.json"  # every folder this package writes carries one, so that it knows what it may replace
HASHED = (".safetensors", ".gguf", ".pt")


def check_replaceable(folder: Path) -> None:
    """Raise unless `folder` is absent, empty, or was written by this package."""
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise LinearizeError(f"{folder} is a file; give one that is new, empty or written by linearize")
    if any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise LinearizeError(f"{folder} holds something else; give one that is new, empty or written by linearize")


@contextmanager
def new_folder(folder: str | Path, kind: str) -> Iterator[Path]:
    """Yield a temporary sibling of `folder`; when the block ends without an error it takes the folder's place.

    `kind` says what the folder holds and is written to its marker. On an error or a kill the old folder, if any,
    is as it was. Disk errors (full, read-only) become a `LinearizeError` that names the folder.
    """
    target = Path(folder).absolute()
    check_replaceable(target)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        temporary.chmod(0o755)  # mkdtemp makes it private
        yield temporary
        digests = {path.name: sha256(path) for path in sorted(temporary.glob("*")) if path.suffix in HASHED}
        (temporary / MARKER).write_text(json.dumps({"kind": kind, "sha256": digests}, indent=2) + "\n")
        for path in temporary.rglob("*"):
            if path.is_file():
                _fsync(path)
        replace_folder(temporary, target)
    except OSError as error:
        raise disk_error(target, error) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


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
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        _fsync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def disk_error(path: Path, error: OSError) -> LinearizeError:
    """`error`, met while writing `path`, in words."""
    return LinearizeError(
        f"cannot write {path}: {error.strerror or error}; give a folder on a writable disk with space"
    )


def _fsync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def verify_folder(folder: Path) -> None:
    """Raise if a file of a folder that this package wrote is not what it was; other folders pass unread.

    Names that lead out of the folder (in the marker or a shard index) are refused before they are opened.
    """
    for index in folder.glob("*.safetensors.index.json"):
        names = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        if outside := [name for name in names if Path(name).name != name]:
            raise LinearizeError(f"{index} names files outside its folder: {outside[0]!r}")
    if not (folder / MARKER).is_file():
        return
    for name, digest in json.loads((folder / MARKER).read_text(encoding="utf-8")).get("sha256", {}).items():
        path = folder / Path(name).name
        if not path.is_file():
            raise LinearizeError(f"{folder} lacks {path.name}; give a whole checkpoint")
        if sha256(path) != digest:
            raise LinearizeError(f"{path} is not the file that was written (truncated or changed); write it again")


def sha256(path: Path) -> str:
    """The hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
