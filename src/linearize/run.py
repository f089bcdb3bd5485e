"""The main job: convert, align, distill, evaluate, report, and write a checkpoint."""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from peft import PeftModel
from pydantic import BaseModel
from transformers import PreTrainedModel

from linearize import checkpoint, processes
from linearize import recipe as recipes
from linearize import report as reports
from linearize.checkpoint import unwrapped
from linearize.errors import LinearizeError
from linearize.evaluate import evaluate, hardware
from linearize.evaluate import suite as suites
from linearize.evaluate.kept import Kept
from linearize.evaluate.late_gap import pooled
from linearize.files import (
    MARKER,
    check_replaceable,
    check_writable,
    files_of_others,
    new_folder,
    read_json,
    remove_empty,
    verify_folder,
    write_text,
)
from linearize.measures import Suite
from linearize.recipe import AlignSettings, Baseline, DistillSettings, Recipe
from linearize.results import Report
from linearize.results import read as read_report
from linearize.train.documents import files_of
from linearize.train.trainer import keep
from linearize.variants import Base, Trained, build, load_base, stages, train_stage, train_variant, with_adapters


def run(recipe: Recipe | str | Path, out: str | Path, overwrite: bool = False) -> Report:
    """The whole job by `recipe`, one in hand or the name of a shipped one or of a file; the checkpoint, its card, its
    recipe and its report are written to `out`.

    What an interrupted run has done is in `<out>.work` and is used again; a finished run of the same recipe is read,
    not repeated; another checkpoint in its place is replaced if `overwrite`. Of several processes, as `torchrun` starts
    them, only the first comes back from here. Raises LinearizeError for whatever is wrong with what was given, before
    anything is written.
    """
    out, recipe = Path(out), recipe if isinstance(recipe, Recipe) else recipes.read(recipe)
    check_replaceable(out)
    if done := _finished(recipe, out):
        processes.end_others()
        print(f"{out} holds this recipe's result already; remove it to run again", file=sys.stderr)
        return done
    _check_free(out, overwrite)
    names = ("converted", *recipe.baselines)
    base = load_base(recipe, names, train=True, heldout=True)
    with _work(recipe, out) as work:
        variants = {name: train_variant(recipe, name, base, work) for name in names}
        processes.end_others()
        kept = _kept(recipe, work)
        report = _measure(recipe, base, variants, kept)
        with new_folder(out, kind="checkpoint", sources=_sources(recipe), **_made_of(base.teacher)) as folder:
            # last, since merging writes into parameters that the teacher and the other variants share
            ours = variants["converted"]
            checkpoint.write(ours.student, base.tokenizer, recipe, ours.curves, folder, out)
            _write_report(report, recipe, folder)
        kept.forget()
    return report


def _check_free(out: Path, overwrite: bool) -> None:
    """LinearizeError where `out` is no place for a checkpoint, or there is one that is not to be replaced."""
    check_replaceable(out)
    if (out / MARKER).is_file():
        if not overwrite:
            raise LinearizeError(f"{out} holds a checkpoint already; give another --out, or --overwrite")
        if others := files_of_others(out):
            raise LinearizeError(f"{out} holds files of others as well ({others[0]}); move them, or give another --out")


def convert_only(recipe: Recipe, out: Path, overwrite: bool = False) -> None:
    """The first stage alone: an untrained conversion in `out`."""
    _check_free(out, overwrite)
    base = load_base(recipe)
    recipe = recipe.model_copy(update={"align": None, "distill": None})
    processes.end_others()
    with new_folder(out, kind="checkpoint", teacher=_made_of(base.teacher)["teacher"]) as folder:
        student = build(recipe, recipe.mixer, base.teacher)
        checkpoint.write(student, base.tokenizer, recipe, [], folder, out)


def stage_only(name: str, source: Path, recipe: Recipe, out: Path, overwrite: bool = False) -> None:
    """One training stage of the checkpoint in `source`, to `out`; a recipe without it leaves it as it is by itself.

    `align` leaves LoRA beside the weights, so that `distill` goes on with it as `run` would.
    """
    if source.resolve() == out.resolve():
        raise LinearizeError(f"{source} cannot be both source and out; give another --out")
    _check_free(out, overwrite)
    before, curves = checkpoint.read_recipe(source), checkpoint.read_curves(source)
    student, tokenizer = checkpoint.load(source)
    recipe = _continued(recipe, before, source, trained=bool(curves))
    stage = getattr(recipe, name) or {"align": AlignSettings, "distill": DistillSettings}[name]()
    others: dict[str, Any] = {"distill": None} if name == "align" else {"align": before.align}
    recipe = recipe.model_copy(update={name: stage} | others)
    base = load_base(recipe, train=True)
    _check_made_of(base.teacher, source, trains=True)
    student.to(base.teacher.device)
    if not isinstance(student, PeftModel):
        student = with_adapters(recipe, student)
    settings, loss = stages(recipe)[name]
    with _work(recipe, out, source) as work:
        curve = train_stage(recipe, name, "converted", settings, loss, student, base, work)
        processes.end_others()
        if recipe.lora is not None and name == "distill":
            keep(student, recipe.lora.kept)
        with new_folder(out, kind="checkpoint", **_made_of(base.teacher)) as folder:
            kept = recipe.model_copy(update={"adapter": "separate"}) if name == "align" else recipe
            checkpoint.write(student, tokenizer, kept, [*curves, curve], folder, out)
        shutil.rmtree(work, ignore_errors=True)  # absent where no checkpoints were asked for


def _continued(recipe: Recipe, before: Recipe, source: Path, trained: bool) -> Recipe:
    """`recipe` on top of the one that made `source`: what both stages must share comes from there, or is refused.

    Only so is a baseline, which goes through all stages of one recipe, matched.
    """
    shared = {"layers", "softmax_every", "softmax_heads", "mixer"}
    shared |= {"lora", "seed", "data"} if trained else set()
    default = recipes.read("default")
    for key in sorted(shared):
        given, kept, usual = (_leaves(key, getattr(recipe, key)) for recipe in (recipe, before, default))
        free = {"data.heldout", *["data.train"] * _gone(before.data.train)}
        for name, value in given.items():
            if name not in free and (name, value) not in {*kept.items(), *usual.items()}:
                raise LinearizeError(
                    f"{name} is {value}, but {source} was made with {kept.get(name)}; both must be the same"
                )
    same = {key: getattr(before, key) for key in shared}
    if "data" in same and _gone(before.data.train):
        same["data"] = before.data.model_copy(update={"train": recipe.data.train})
    elsewhere = {} if recipe.model == default.model else {"model": recipe.model}
    return recipe.model_copy(update={"model": before.model} | same | elsewhere)


def _leaves(key: str, value: Any) -> dict[str, str]:
    """A recipe's key, or the keys of its section, with their values in words."""
    inner = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    found = {f"{key}.{name}": x for name, x in inner.items()} if isinstance(inner, dict) else {key: inner}
    return {name: json.dumps(x) for name, x in found.items()}


def _made_of(teacher: PreTrainedModel) -> dict[str, str]:
    """What a checkpoint's marker says of its training."""
    return {"teacher": checkpoint.fingerprint(teacher), "processes": str(processes.count())}


def _check_made_of(teacher: PreTrainedModel, source: Path, trains: bool) -> None:
    """LinearizeError where this is not what the checkpoint in `source` was made of, or, where it `trains`, it did with
    other steps."""
    marker = read_json(source / MARKER) if (source / MARKER).is_file() else {}
    if marker.get("teacher") not in (None, checkpoint.fingerprint(teacher)):
        raise LinearizeError(f"the model is another than {source} was made of; give that one, by --set model=FOLDER")
    if trains and (count := marker.get("processes")) not in (None, str(processes.count())):
        raise LinearizeError(
            f"{source} was trained by {count} processes at once, not {processes.count()}; start as many, or steps have "
            "another size"
        )


def _gone(place: str) -> bool:
    """Whether a recipe's text is no longer where it was."""
    return Path(place).is_absolute() and not Path(place).exists()


def merge_only(source: Path, out: Path, overwrite: bool = False) -> None:
    """The checkpoint in `source` with its LoRA adapter merged, to `out`, with its report if it has one."""
    _check_free(out, overwrite)
    student, tokenizer = checkpoint.load(source)
    if not isinstance(student, PeftModel):
        raise LinearizeError(f"{source} has no adapter to merge; its weights are whole")
    recipe = checkpoint.read_recipe(source).model_copy(update={"adapter": "merged"})
    made_of = {key: read_json(source / MARKER).get(key) for key in ("teacher", "processes")}
    with new_folder(out, kind="checkpoint", **made_of) as folder:
        checkpoint.write(student, tokenizer, recipe, checkpoint.read_curves(source), folder, out)
        if (source / "report.json").is_file():
            _write_report(read_report(source), recipe, folder)


def evaluate_only(source: Path, recipe: Recipe, seeds: Sequence[Path] = (), overwrite: bool = False) -> Report:
    """Evaluate the checkpoint in `source` against its teacher and, trained here by its recipe, its baselines.

    A report that has more than this one will is replaced only if `overwrite`. `seeds` are checkpoints of the same
    recipe but for its seed, whose full reports are there: late gaps are pooled.
    """
    check_writable(source / "report.json")
    others = [_other_seed(seed, recipe) for seed in seeds]
    before = checkpoint.read_recipe(source)
    if not overwrite and (lost := _would_lose(source, recipe)):
        raise LinearizeError(f"{source} has a report with {' and '.join(lost)}; measure that again, or --overwrite it")
    moved = ["train"] * _gone(before.data.train)
    free: Any = {"model": True, "evaluation": True, "baselines": True, "data": {"heldout", *moved}}
    if recipe.model_dump(exclude=free) != before.model_dump(exclude=free):
        raise LinearizeError(
            f"{source} was made by its recipe.yaml; valid to set: evaluation, baselines, data.heldout and, where they "
            "have moved, model and data.train"
        )
    student, _ = checkpoint.load(source)
    curves = checkpoint.read_curves(source)
    base = load_base(recipe, recipe.baselines, train=bool(recipe.baselines), heldout=True)
    _check_made_of(base.teacher, source, trains=bool(recipe.baselines))
    variants = {"converted": Trained(student.to(base.teacher.device), recipe.mixer, curves)}
    with _work(recipe, source) as work:
        for name in recipe.baselines:
            variants[name] = train_variant(recipe, name, base, work)
        processes.end_others()
        kept = _kept(recipe, work, source)
        report = _measure(recipe, base, variants, kept)
        if others and report.suite is not None:
            found = [report.suite.late, *(other.late for other in others)]
            report.suite.late = [pooled(gaps) for gaps in zip(*found, strict=True)]
            report.seeds |= {f"late gap of {seed}": read_report(seed).recipe["seed"] for seed in seeds}
        _write_report(report, recipe, source)
        kept.forget()
    return report


def _would_lose(source: Path, recipe: Recipe) -> list[str]:
    """What the report in `source` has and one by this recipe has not."""
    try:
        report = read_report(source)
    except LinearizeError:  # there is none, or nobody can read it
        return []
    lost = ["the full suite"] if report.suite is not None and recipe.evaluation.suite != "full" else []
    baselines = get_args(Baseline)
    return lost + [name for name in baselines if getattr(report.models, name) and name not in recipe.baselines]


def _other_seed(folder: Path, recipe: Recipe) -> Suite:
    """What the full suite found of another seed's checkpoint; LinearizeError where that is no match for `recipe`."""
    report = read_report(folder)
    if report.suite is None or recipe.evaluation.suite != "full":
        raise LinearizeError(f"{folder} cannot be pooled: both need --suite full")
    given, other = recipe, Recipe.model_validate(report.recipe)
    apart: Any = {"seed": True, "model": True, "dtype": True, "data": {"train"}}  # places may be called otherwise
    found = (one.model_dump(mode="json", exclude=apart).items() for one in (given, other))
    differ = [key for (key, ours), (_, theirs) in zip(*found, strict=True) if ours != theirs]
    if differ or given.seed == other.seed:
        raise LinearizeError(f"{folder} is no other seed of this recipe: {', '.join(differ) or 'the seed is the same'}")
    return report.suite


def _kept(recipe: Recipe, work: Path, source: Path | None = None) -> Kept:
    """What an interrupted suite has measured: by the same settings, of the same weights, on such a machine."""
    settings = recipe.model_dump_json(include={"evaluation", "data"})
    settings += _sources(recipe, source) + hardware() + torch.__version__
    return Kept(work / f"suite-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.json")


def _measure(recipe: Recipe, base: Base, variants: dict[str, Trained], kept: Kept) -> Report:
    assert base.heldout is not None
    untrained = build(recipe, recipe.mixer, base.teacher).eval()
    models = {name: (unwrapped(v.student).eval(), v.tokens, v.mixer) for name, v in variants.items()}
    curves = [curve for v in variants.values() for curve in v.curves]
    report = evaluate(recipe, base.teacher, base.heldout, untrained, models, curves)
    if recipe.evaluation.suite == "full":
        order = ("teacher", "window_only", "window_equal_memory", "converted")
        found = {"teacher": base.teacher} | {name: model for name, (model, _, _) in models.items()}
        compared = {name: found[name] for name in order if name in found}
        report.suite = suites.measure(recipe.evaluation, compared, base.tokenizer, base.texts, report.seconds, kept)
    return report


def _write_report(report: Report, recipe: Recipe, folder: Path) -> None:
    reports.write(report, folder)
    write_text(folder / "README.md", reports.model_card(report, recipe.model))


def _finished(recipe: Recipe, out: Path) -> Report | None:
    """The report in `out`, if that is the whole result of exactly this recipe."""
    if not (out / "report.json").is_file():
        return None
    try:
        verify_folder(out)
        report, made_by = read_report(out), checkpoint.read_recipe(out)  # the report may be of another evaluation
    except LinearizeError:
        return None
    same_sources = read_json(out / MARKER).get("sources") == _sources(recipe)
    return report if made_by == recipe and same_sources else None


def _sources(recipe: Recipe, source: Path | None = None, heldout: bool = True) -> str:
    """A digest of what lies behind the recipe's names: sizes and times of local files, and a stage's own source."""
    files = [path for path in sorted(Path(recipe.model).expanduser().glob("*")) if path.is_file()]
    files += files_of(recipe.data.train) + (files_of(recipe.data.heldout) if heldout else [])
    found = [(source / MARKER).read_text(encoding="utf-8")] if source else []
    found += [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


@contextmanager
def _work(recipe: Recipe, out: Path, source: Path | None = None) -> Iterator[Path]:
    """Where unfinished work is kept, by all that decides what the trained weights are; nothing empty stays of it."""
    parts = recipe.model_dump(mode="json", exclude={"evaluation", "baselines", "adapter", "dtype"})
    parts["processes"] = processes.count()  # steps are as many times as large
    del parts["data"]["heldout"]
    key = json.dumps(parts, sort_keys=True) + _sources(recipe, source, heldout=False)
    folder = out.absolute().with_name(f"{out.absolute().name}.work")
    try:
        yield folder / hashlib.sha256(key.encode()).hexdigest()[:12]
    finally:
        if processes.is_first():
            remove_empty(folder)
