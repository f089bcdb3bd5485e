"""`linearize bench state-tracking`: what small models of each structure can keep track of (arXiv 2411.12537)."""

import json
import platform
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from pydantic import ValidationError
from tqdm import tqdm

from linearize.config import validated
from linearize.errors import LinearizeError, unknown
from linearize.evaluate import hardware
from linearize.evaluate.tasks import TASKS
from linearize.evaluate.tracker import FORMATS, Pair, Result, Settings, Training
from linearize.files import MARKER, check_replaceable, read_json, write_text
from linearize.structures import STRUCTURES


class Preset(NamedTuple):
    """What is run where nothing else is asked for."""

    settings: Settings
    structures: tuple[str, ...]
    tasks: tuple[str, ...]
    formats: tuple[str, ...]


SMALL = {"hidden_size": 32, "heads": 2, "layers": 1, "batch": 64, "learning_rate": 1e-2}
PARITY = {  # whatever the other tasks get: larger models learn what wears off, log.md
    **SMALL,
    "steps": 20_000,
    "compiled": False,
    "warmup": 0.005,
    "final": 0.1,
    "weight_decay": 0.0,
    "mlp": None,
    "initial": 0.02,
    "convolution": None,
    "convolution_form": "linear",
    "precision": "fp32",
    "curriculum": 0.0,
}
PUBLISHED = {  # what Grazzi et al. train arithmetic with, and smaller weights at the start
    "steps": 100_000,
    "final": 0.001,
    "weight_decay": 0.1,
    "mlp": 512,
    "initial": 0.006,
    "convolution": 4,
    "convolution_form": "silu",
    "precision": "bf16",
    "compiled": True,
}
PRESETS = {
    "small": Preset(
        Settings(**SMALL, steps=1000, block=100, tests=512),
        ("deltanet",),
        ("parity",),
        ("direct",),
    ),
    "full": Preset(
        Settings(**PUBLISHED, own={"parity": PARITY}),
        ("deltanet", "gla", "mamba2"),
        tuple(TASKS),
        FORMATS,
    ),
}


def choose(
    preset: str | None,
    changes: list[str],
    flags: Mapping[str, Any],
    structures: list[str],
    tasks: list[str],
    formats: list[str],
) -> tuple[Settings, list[Pair]]:
    """Settings and pairs of a preset (by default what suits the machine) with what is given in its place.

    `changes` are `KEY=VALUE`, `flags` count where they are not None. Raises LinearizeError for what is unknown.
    """
    name = preset or ("full" if torch.cuda.is_available() else "small")
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    base = PRESETS[name]
    values = {**base.settings.model_dump(), **dict(map(assignment, changes))}
    values |= {key: value for key, value in flags.items() if value is not None}
    settings = validated(Settings, values, "state-tracking")
    for task in settings.own:
        if task not in TASKS:
            raise unknown("task", task, TASKS)
        settings.of(task)
    chosen = structures or base.structures, tasks or base.tasks, formats or base.formats
    return settings, pairs(*chosen)


def assignment(text: str) -> tuple[str, Any]:
    """`KEY=VALUE` with the value as YAML has it."""
    key, equals, value = text.partition("=")
    if not equals:
        raise LinearizeError(f"--set {text!r} is no key=value; valid keys: {', '.join(Settings.model_fields)}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise LinearizeError(f"--set {text!r} has no valid value") from error


def pairs(structures: Iterable[str], tasks: Iterable[str], formats: Iterable[str]) -> list[Pair]:
    """All combinations, the delta rule's with both ranges of eigenvalues; LinearizeError for an unknown name."""
    for kind, given, known in (
        ("structure", structures, STRUCTURES),
        ("task", tasks, TASKS),
        ("format", formats, FORMATS),
    ):
        for name in given:
            if name not in known:
                raise unknown(kind, name, known)
    return [
        Pair(task, format_, structure, negative)
        for format_ in dict.fromkeys(formats)
        for structure in dict.fromkeys(structures)
        for task in dict.fromkeys(tasks)
        for negative in ((True, False) if structure.endswith("deltanet") else (False,))
    ]


def run(chosen: list[Pair], settings: Settings, out: Path, seconds: float | None = None, graph: bool = True) -> bool:
    """Train and test each pair, unless its result is in `out` already; whether all are done now.

    After `seconds` it stops at the next check. The same call goes on from there, and from a kill. `graph` allows CUDA
    graphs. Raises LinearizeError where `out` holds something else, or results of other settings.
    """
    deadline = time.monotonic() + (float("inf") if seconds is None else seconds)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)  # tensors this small are slower on several
    _open(out, settings)
    for number, pair in enumerate(chosen, 1):
        if (out / f"{pair.name}.json").exists():
            continue
        training = Training(pair, settings.of(pair.task), out / f"{pair.name}.pt", device, graph)
        label = f"{number}/{len(chosen)} {pair.name}"
        with tqdm(desc=label, total=training.steps, initial=training.progress["step"], unit="step") as bar:
            while not training.done:
                if time.monotonic() > deadline:
                    tqdm.write(f"{label}: {training.latest()}")
                    return False
                training.block()
                step, loss, accuracy = training.progress["checks"][-1]
                bar.set_postfix(loss=f"{loss:.3f}", longer=f"{accuracy:.3f}", refresh=False)
                bar.update(step - bar.n)
        write_text(out / f"{pair.name}.json", training.result().model_dump_json(indent=1) + "\n")
        training.path.unlink(missing_ok=True)
        write_text(out / "state-tracking.json", json.dumps(summary(out), indent=1) + "\n")
    return True


def _open(out: Path, settings: Settings) -> None:
    """Make the folder, or see that it is one of this benchmark with the same settings."""
    check_replaceable(out)
    ours = {"kind": "state-tracking", "settings": settings.model_dump(), "provenance": provenance()}
    if (out / MARKER).is_file():
        theirs = read_json(out / MARKER)
        if theirs.get("kind") != ours["kind"]:
            raise LinearizeError(f"{out} holds a {theirs.get('kind')}; give a new folder, or one of this benchmark")
        before = theirs.get("settings", {})
        differs = [
            f"{name} {before.get(name)!r}, not {value!r}"
            for name, value in settings.model_dump().items()
            if before.get(name) != value
        ]
        if differs:
            raise LinearizeError(f"{out} has other settings ({', '.join(differs)}); give the same or another folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / MARKER, json.dumps(ours, indent=2) + "\n")


def provenance() -> dict[str, Any]:
    """What a run is made on."""
    versions = {name: version(name) for name in ("linearize", "torch", "transformers")}
    return {"hardware": hardware(), "versions": versions | {"python": platform.python_version()}}


def results(out: Path) -> list[Result]:
    """Those in a folder of this benchmark."""
    try:
        return [Result.model_validate_json(path.read_bytes()) for path in sorted(out.glob("[!.]*-*-*.json"))]
    except ValidationError as error:
        raise LinearizeError(f"{out} holds a damaged result; remove it, and the same command makes it anew") from error


def summary(out: Path) -> dict[str, Any]:
    """Settings, provenance and all results in a folder of this benchmark."""
    marker = read_json(out / MARKER)
    found = [result.model_dump(mode="json") for result in results(out)]
    return {"settings": marker["settings"], **marker["provenance"], "results": found}


def eigenvalues(result: Result) -> str:
    """Their range."""
    return "[-1, 1]" if result.negative_eigenvalues else "[0, 1]"


def table(results: Iterable[Result]) -> str:
    """Markdown: a row for each structure and range of eigenvalues, a column for each task and format."""
    cells: dict[tuple[str, bool], dict[tuple[str, str], Result]] = {}
    for result in results:
        cells.setdefault((result.structure, result.negative_eigenvalues), {})[result.task, result.format] = result
    there = {column for row in cells.values() for column in row}
    columns = [(task, format_) for format_ in FORMATS for task in TASKS if (task, format_) in there]
    lines = ["| structure | eigenvalues | " + " | ".join(f"{task}, {format_}" for task, format_ in columns) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(columns))
    for structure, negative in sorted(cells, key=lambda row: (list(STRUCTURES).index(row[0]), row[1])):
        row = cells[structure, negative]
        values = [f"{row[c].longer:.3f} ({row[c].trained:.3f})" if c in row else "–" for c in columns]
        lines.append(f"| {structure} | {eigenvalues(next(iter(row.values())))} | {' | '.join(values)} |")
    return "\n".join(lines)
