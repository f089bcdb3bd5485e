"""The parts of README and docs that are made from code and raw results: `make docs` writes them, a test holds them.

A part stands between `<!-- part: NAME -->` and `<!-- end -->`.
"""

import inspect
import json
import re
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from benchmarks import documents_claims as claims
from benchmarks import documents_recovery as recovery
from benchmarks import documents_speed as speed
from benchmarks.results import RESULTS, versions
from linearize.config import MixerConfig, MixerSettings
from linearize.drawing import to_svg
from linearize.evaluate.state_tracking import eigenvalues
from linearize.evaluate.state_tracking import table as tracking_table
from linearize.evaluate.tracker import Result, Settings
from linearize.families import FAMILIES, Family
from linearize.recipe import Recipe
from linearize.report import figures
from linearize.results import Report
from linearize.results import read as read_report
from linearize.structures import STRUCTURES

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "docs/ablations.md",
    "docs/families.md",
    "docs/performance.md",
    "docs/recipe.md",
    "docs/report.md",
    "docs/recovery.md",
    "docs/selection.md",
    "docs/settings.md",
    "docs/state-tracking.md",
    "docs/structures.md",
    "docs/training-text.md",
)
PART = re.compile(r"(<!-- part: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
SKIPPED = {"__pycache__", "linearize.egg-info", "results", "images"}


def main() -> None:
    """Write every part, and the pictures."""
    for page in PAGES:
        path = ROOT / page
        path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")
    images = ROOT / "docs" / "images"
    images.mkdir(exist_ok=True)
    pictures = {"loss_by_position": figures(read_report(RESULTS / "demo.json"))["loss_by_position"]}
    pictures |= {name: to_svg(figure, name) for name, figure in (recovery.pictures() | claims.pictures()).items()}
    for name, svg in pictures.items():
        (images / f"{name}.svg").write_text(svg, encoding="utf-8")


def rendered(page: str) -> str:
    """A page with all its parts made anew."""
    return PART.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}\n{match[3]}", page)


def tree() -> str:
    """Every source file with the first sentence of what it says of itself."""
    lines = ["```"]
    for folder in ("src/linearize", "benchmarks", "docs", "tests"):
        lines.append(f"{folder}/")
        lines.extend(_entries(ROOT / folder, "  ", deep=folder == "src/linearize"))
    return "\n".join([*lines, "```"])


def _entries(folder: Path, indent: str, deep: bool) -> Iterator[str]:
    paths = sorted(path for path in folder.iterdir() if path.name not in SKIPPED and not path.name.startswith("."))
    for path in (*(p for p in paths if p.is_file()), *(p for p in paths if p.is_dir())):
        if path.is_file() and path.name != "__init__.py" and (deep or folder.name != "tests"):
            yield f"{indent}{path.name} ".ljust(36) + _says(path)
        elif path.is_dir() and folder.name != "tests":
            about = next((path / name for name in ("__init__.py", "README.md") if (path / name).exists()), None)
            yield f"{indent}{path.name}/ ".ljust(36) + (_says(about) if about else "")
            if deep:
                yield from _entries(path, indent + "  ", deep)


def _says(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        first = text.split('"""')[1]
    else:
        first = next(line.lstrip("# ") for line in text.splitlines() if line.strip("# "))
    return re.split(r"\.(\s|$)|\n", first)[0].strip()


def recipe_keys() -> str:
    """Every key of a recipe."""
    return _keys(Recipe)


def mixer_keys() -> str:
    """Every setting of a converted layer."""
    return _keys(MixerConfig)


def report_keys() -> str:
    """Every key of report.json."""
    return _keys(Report)


def structures() -> str:
    """Every structure: the paper's equation as its file gives it, and its operator."""
    lines = ["| name | what it is | operator |", "| --- | --- | --- |"]
    for name, structure in STRUCTURES.items():
        module = inspect.getmodule(structure.inputs)
        said = (inspect.getdoc(module) or "").split("\n")[0].rstrip(".")
        lines.append(f"| `{name}` | {said} | `{structure.operator.__name__}` |")
    return "\n".join(lines)


def settings() -> str:
    """Which structure takes which value of which setting."""
    names = [name for name in STRUCTURES if name != "gated_retention"]
    lines = ["| setting | " + " | ".join(f"`{name}`" for name in names) + " |", "| --- |" + " :-: |" * len(names)]
    for setting, value in _grid():
        cells = ["✓" if _refusal(name, setting, value) is None else "–" for name in names]
        lines.append(f"| `{setting}: {json.dumps(value).strip(chr(34))}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def refusals() -> str:
    """Why a value is refused where it is."""
    reasons: dict[str, tuple[dict[str, None], dict[str, None]]] = {}  # to settings and structures, in order
    for setting, value in _grid():
        for name in STRUCTURES:
            if reason := _refusal(name, setting, value):
                reason = re.sub(rf"^{setting} \S+ has no effect: |, not of {name}$", "", reason)
                reason = reason.replace(f"{setting} {value} ", "it ").replace(name, "the structure")
                what, where = reasons.setdefault(reason, ({}, {}))
                what[f"`{setting}: {json.dumps(value).strip(chr(34))}`"] = where[f"`{name}`"] = None
    return "\n".join(
        f"- {', '.join(what)}, with {', '.join(where) if len(where) < 5 else 'the others'}: {reason}."
        for reason, (what, where) in reasons.items()
    )


def _grid() -> Iterator[tuple[str, Any]]:
    """Every setting with each of its named values, or one other than its default."""
    numbers = {"gate_temperature": 256, "time_scales": 4096, "convolution": 4, "slots": 32}
    for name, field in MixerConfig.model_fields.items():
        if name in ("structure", "window", "sinks", "mixing_weight", "score_power", "shifts"):
            continue  # numbers that every structure takes
        for value in get_args(field.annotation) if name not in numbers else [numbers[name]]:
            yield name, value
        if field.annotation is bool:
            yield name, True


def _refusal(structure: str, setting: str, value: Any) -> str | None:
    beside = {"convolution": 4} if setting == "convolution_form" else {}  # without one it is nothing
    try:
        MixerConfig(structure=structure, **beside, **{setting: value})
    except ValueError as error:
        return str(error).split("Value error, ")[1].split(" [type=")[0]
    return None


def families() -> str:
    """Every row of families.py."""
    plain = Family("")
    lines = ["| model type | classes | q, k, v | linear layers | besides |", "| --- | --- | --- | --- | --- |"]
    for name, row in FAMILIES.items():
        special = [f"logits: {_first(row.logits)}"] if row.logits is not plain.logits else []
        special += [f"`{row.softcap}` on scores"] if row.softcap else []
        special += [f"`{row.null_logits}`: one more score for each head"] if row.null_logits else []
        special += ["rotates the first channels"] if row.rotates_first else []
        special += [] if row.rotates_halves else ["no fused kernel for its RoPE"]
        made = f"`{row.project.__name__}`" if row.project is not plain.project else ""
        layers = ", ".join(f"`{layer}`" for layer in row.projections) if row.projections != plain.projections else ""
        lines.append(f"| `{name}` | `{row.prefix}…` | {made} | {layers} | {'; '.join(special)} |")
    projections = ", ".join(f"`{layer}`" for layer in plain.projections)
    return "\n".join([*lines, "", f"Where nothing is said: `{plain.project.__name__}`, {projections}."])


def _first(function: Callable[..., Any]) -> str:
    said = (inspect.getdoc(function) or "").split("\n")[0].rstrip(".")
    return said[0].lower() + said[1:]


def tracking_settings() -> str:
    """Every setting of the benchmark, with the defaults of the full preset's."""
    return _keys(Settings)


def tracking(name: str) -> str:
    """Scaled accuracies by structure, task and format."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return "Not measured yet."
    data = json.loads(path.read_text(encoding="utf-8"))
    results = [Result.model_validate(result) for result in data["results"]]
    settings = Settings.model_validate(data["settings"])
    changed = _named(settings, Settings())
    for task in settings.own:
        changed += f"; of {task} {_named(settings.of(task), settings)}"
    longest = max(results, key=lambda result: result.seconds)
    made = (
        f"{data['hardware']}, {versions(data['versions'])}; {sum(r.seconds for r in results):.0f} s of training, "
        f"{longest.seconds:.0f} of them for {longest.task} with {longest.structure}."
    )
    return "\n".join([tracking_table(results), "", f"Settings: {changed or 'the defaults'}. {made}"])


def tracking_runs(folder: Path = RESULTS / "state-tracking-runs") -> str:
    """Runs with settings of their own, a file each: the best first, and what is special about it."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if not found:
        return "Not measured yet."
    runs = [(Result.model_validate(result), data["settings"]) for data in found for result in data["results"]]
    every = [Settings.model_validate(settings).of(result.task) for result, settings in runs]
    varied = {key for key, value in every[0] if any(getattr(settings, key) != value for settings in every)}
    rows = []
    for (result, _), settings in zip(runs, every, strict=True):
        special = ", ".join(f"`{key}={getattr(settings, key)}`" for key in Settings.model_fields if key in varied)
        row = f"| {special} | {result.task}, {result.format} | {eigenvalues(result)} |"
        row += f" {result.longer:.3f} ({result.trained:.3f}) | {result.steps:,} | {result.seconds:.0f} |"
        rows.append((-result.longer, row))
    shared = _named(every[0], Settings(), varied)
    lines = ["| settings | task | eigenvalues | accuracy | steps | s |", "| --- | --- | --- | ---: | ---: | ---: |"]
    made = "; ".join(dict.fromkeys(f"{data['hardware']}, {versions(data['versions'])}" for data in found)) + "."
    return "\n".join([*lines, *(row for _, row in sorted(rows)), "", f"All with {shared}. {made}"])


def _named(settings: Settings, usual: Settings, but: Collection[str] = ()) -> str:
    """What differs from the `usual`."""
    pairs = [(key, value) for key, value in settings if value != getattr(usual, key) and key not in {*but, "own"}]
    return ", ".join(f"`{key}={value}`" for key, value in pairs)


def _keys(model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    lines = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    lines.extend(_rows(schema, schema, "", {}))
    return "\n".join(lines)


def _rows(node: dict[str, Any], schema: dict[str, Any], prefix: str, told: dict[str, str]) -> Iterator[str]:
    for name, field in node.get("properties", {}).items():
        options = field.get("anyOf", [field])
        inner = next((o["$ref"].rpartition("/")[2] for o in options if "$ref" in o), None)
        inner = inner or field.get("items", {}).get("$ref", "").rpartition("/")[2]
        kind = " or ".join(_kind(option) for option in options)
        default = f"`{json.dumps(field['default'])}`" if "default" in field and not inner else ""
        said = field.get("description", "").split("\n")[0] or (f"as `{told[inner]}`" if inner in told else "")
        yield f"| `{prefix}{name}` | {kind} | {default} | {said} |"
        if inner == MixerSettings.__name__:  # a mapping of settings to values or lists
            yield from _rows(MixerConfig.model_json_schema(), schema, f"{prefix}{name}.", told)
        elif inner and inner not in told:
            told[inner] = prefix + name
            mark = "[]." if "items" in field else "."
            yield from _rows(schema["$defs"][inner], schema, f"{prefix}{name}{mark}", told)


def _kind(option: dict[str, Any]) -> str:
    if "enum" in option:
        return ", ".join(f"`{value}`" for value in option["enum"])
    if "$ref" in option:
        return "section"
    if option.get("type") == "array":
        return "list"
    if option.get("type") == "object" and isinstance(option.get("additionalProperties"), dict):
        return "mapping"
    return str(option.get("type", "any"))


PARTS: dict[str, Callable[[], str]] = {
    "tree": tree,
    "demo": claims.demo_table,
    "goals": claims.goals,
    "claim": partial(claims.claim, "claim"),
    "window-64": partial(claims.claim, "window_64"),
    "three-wide": partial(claims.claim, "three_wide"),
    "earlier": claims.earlier,
    "three-layers": partial(claims.claim, "three_layers_h200", "three full layers"),
    "nine-heads": partial(claims.claim, "heads_h200", "nine full heads"),
    "trained-otherwise": recovery.trained_otherwise,
    "behind": recovery.behind,
    "behind-both": recovery.behind_both,
    "late": partial(recovery.by_length, "late", "local"),
    "together": partial(recovery.by_length, "together", "default"),
    "align": partial(recovery.by_length, "align", "base"),
    "equal-memory": partial(recovery.by_length, "equal_memory", "base"),
    "layers": recovery.layers,
    "gap": recovery.gap,
    "kept": partial(recovery.by_length, "kept", "kept-1.0"),
    "recipes-trained": recovery.recipes,
    "short-tasks": partial(claims.short_tasks, "tasks_h100"),
    "short-tasks-default": partial(claims.short_tasks, "tasks_h200"),
    "recalled": claims.recalled,
    "tokens": recovery.tokens,
    "state-size": recovery.state_size,
    "changes": recovery.changes,
    "screening": recovery.screening,
    "recurrences": recovery.recurrences,
    "recovered": claims.recovered,
    "training": partial(speed.training, "train_default_h200"),
    "training-models": speed.training_models,
    "selection": partial(recovery.selection, "selection", "layers"),
    "selection-heads": partial(recovery.selection, "selection_heads", "heads"),
    "training-text": recovery.training_text,
    "operators": speed.operators,
    "kernels": speed.kernels,
    "peers": speed.peers,
    "errors": speed.errors,
    "delta-times": speed.delta_times,
    "decoding": partial(speed.decoding, "decode_default_h200"),
    "decoding-gla": partial(speed.decoding, "decode_h100"),
    "decoding-hybrid": partial(speed.decoding, "decode_hybrid_h200"),
    "decoding-heads": partial(speed.decoding, "decode_heads_h200"),
    "decoding-at-16k": speed.decoding_at_16k,
    "generation": speed.generation,
    "products": speed.products,
    "decoding-cpu": speed.decoding_cpu,
    "long-prompt": speed.long_prompt,
    "recipe-keys": recipe_keys,
    "mixer-keys": mixer_keys,
    "report-keys": report_keys,
    "settings": settings,
    "refusals": refusals,
    "structures": structures,
    "families": families,
    "state-tracking-settings": tracking_settings,
    "state-tracking-cpu": partial(tracking, "state-tracking-cpu"),
    "state-tracking": partial(tracking, "state-tracking"),
    "state-tracking-tasks": partial(tracking, "state-tracking-tasks"),
    "state-tracking-runs": tracking_runs,
}


if __name__ == "__main__":
    main()
