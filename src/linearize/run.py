"""The main job: convert, align, distill, evaluate, report, and write a checkpoint."""

import copy
import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize import checkpoint, processes
from linearize import recipe as recipes
from linearize import report as reports
from linearize.assets import resolve_model
from linearize.checkpoint import Student, load_pretrained, unwrapped
from linearize.config import MixerSettings
from linearize.convert import attention_of, check_convertible, convert
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
from linearize.inspect import equal_memory_window
from linearize.measures import Suite
from linearize.recipe import AlignSettings, DataSettings, DistillSettings, Recipe, StageSettings
from linearize.results import Curve, Report
from linearize.results import read as read_report
from linearize.train.align import align_loss
from linearize.train.distill import distill_loss
from linearize.train.documents import SELF, Document, files_of, heldout_documents, load_documents
from linearize.train.sample import sampled_documents
from linearize.train.sequences import heldout_sequences, pack, tokenize
from linearize.train.trainer import Loss, keep, shared_copy, train, with_lora


class Base(NamedTuple):
    """What every stage starts from."""

    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    documents: Sequence[np.ndarray] = ()  # tokens to train on, where they are read already
    heldout: Tensor | None = None  # [N, T], where it is to be measured
    texts: Mapping[int, str] = MappingProxyType({})  # the documents that `heldout` was cut from, by number


class Trained(NamedTuple):
    """A variant after its stages."""

    student: Student
    mixer: MixerSettings
    curves: list[Curve]

    @property
    def tokens(self) -> int:
        """Tokens it was trained on, all stages together."""
        return sum(curve.tokens[-1] for curve in self.curves)


def run(recipe: Recipe, out: str | Path, overwrite: bool = False) -> Report:
    """The whole job by `recipe`; the checkpoint, its card, its recipe and its report are written to `out`.

    What an interrupted run has done is in `<out>.work` and is used again; a finished run of the same recipe is read,
    not repeated; another checkpoint in its place is replaced if `overwrite`. Of several processes, as `torchrun` starts
    them, only the first comes back from here. Raises LinearizeError for whatever is wrong with what was given, before
    anything is written.
    """
    out = Path(out)
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
    settings, loss = _stages(recipe)[name]
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


def evaluate_only(source: Path, recipe: Recipe, seeds: Sequence[Path] = ()) -> Report:
    """Evaluate the checkpoint in `source` against its teacher and, trained here by its recipe, its baselines.

    `seeds` are checkpoints of the same recipe but for its seed, whose full reports are there: late gaps are pooled.
    """
    check_writable(source / "report.json")
    others = [_other_seed(seed, recipe) for seed in seeds]
    before = checkpoint.read_recipe(source)
    moved = _gone(before.data.train) or not recipe.baselines  # else a baseline would be of another text
    free: Any = {"model": True, "evaluation": True, "baselines": True, "data": {"heldout", *["train"] * moved}}
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


def load_base(recipe: Recipe, variants: Iterable[str] = (), train: bool = False, heldout: bool = False) -> Base:
    """The teacher on the best device there is, its tokenizer, and the tokens to train on and to measure with.

    All that can be wrong with them, and with converting the teacher to `variants`, shows here, the quickest first.
    """
    processes.start()
    trained = bool(_stages(recipe))
    train = train and trained
    if trained and heldout and (both := _trained_and_heldout(recipe.data)):
        raise LinearizeError(f"data.train and data.heldout are both {both!r}; give a held-out text of its own")
    texts = load_documents(recipe.data.train, "train") if train and recipe.data.train != SELF else []
    heldout_texts: dict[int, str] = {}
    if heldout:
        suites.check(recipe.evaluation)
        heldout_texts = heldout_documents(recipe.data.heldout, recipe.evaluation.articles, recipe.data.train)
    teacher, tokenizer = load_pretrained(resolve_model(recipe.model))
    for name in variants:
        chosen = recipe.layers, recipe.softmax_every, recipe.softmax_heads
        check_convertible(teacher, mixer_of(recipe, name, teacher), *chosen)
    sequences = _sequences(recipe, tokenizer, list(heldout_texts.values())) if heldout else None
    if heldout:
        suites.check_text(recipe.evaluation, tokenizer, list(heldout_texts.values()))
    documents = _tokens(recipe, tokenizer, texts) if texts else []
    teacher.to("cuda" if torch.cuda.is_available() else "cpu")
    if train and recipe.data.train == SELF:
        documents = _sampled(recipe, teacher, tokenizer)
    return Base(teacher, tokenizer, documents, sequences, heldout_texts)


def _trained_and_heldout(data: DataSettings) -> str | None:
    """What would be trained on and measured with, if there is such a text; articles are kept apart by number."""
    if data.heldout in (data.train, data.train.removesuffix(":train"), f"{data.train}:train"):
        return None if data.train == "wiki" else data.train
    train, heldout = ({path.resolve() for path in files_of(source)} for source in (data.train, data.heldout))
    return next((str(path) for path in sorted(train & heldout)), None)


def _sequences(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Document]) -> Tensor:
    settings = recipe.evaluation
    return heldout_sequences(
        tokenize(texts, tokenizer), settings.sequence_length, settings.sequences, recipe.data.heldout
    )


def _documents(recipe: Recipe, base: Base) -> Sequence[np.ndarray]:
    """The training text's tokens, read or sampled here if they are not in `base`."""
    if base.documents:
        return base.documents
    if recipe.data.train == SELF:
        return _sampled(recipe, base.teacher, base.tokenizer)
    return _tokens(recipe, base.tokenizer, load_documents(recipe.data.train, "train"))


def _sampled(recipe: Recipe, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """Text of the teacher's own, as much as the longest stage needs, or as the recipe says."""
    data = recipe.data
    tokens = data.self_tokens or _most_tokens(recipe)
    return sampled_documents(teacher, tokenizer, tokens, data.sequence_length, recipe.seed, data.self_temperature)


def _most_tokens(recipe: Recipe) -> int:
    """What the longest stage reads, and one sequence more."""
    return max(settings.tokens for settings, _ in _stages(recipe).values()) + recipe.data.sequence_length


def _tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Document]) -> list[np.ndarray]:
    """The training text's tokens, of as many documents as the longest stage needs; at least one sequence."""
    documents = tokenize(texts, tokenizer, _most_tokens(recipe), recipe.data.shortest)
    if not documents:
        data = recipe.data
        raise LinearizeError(f"{data.train} has no document of {data.shortest} tokens; lower data.shortest")
    pack(documents, recipe.data.sequence_length, 1, recipe.data.train)
    return documents


def mixer_of(recipe: Recipe, name: str, teacher: PreTrainedModel) -> MixerSettings:
    """The mixer of the variant called `name`: the recipe's, or that of one of its baselines."""
    if name == "converted":
        return recipe.mixer
    if name == "window_only":
        if "none" in recipe.mixer.values("local"):
            raise LinearizeError(
                "with local none there is no window for the baseline window_only; valid: window_equal_memory, or none"
            )
        return recipe.mixer.replace(structure="none")
    count = teacher.config.num_hidden_layers
    heads = teacher.config.num_attention_heads, teacher.config.num_key_value_heads
    head_dim = attention_of(teacher, 0).head_dim
    windows = [equal_memory_window(recipe.mixer.layer(index, count), *heads, head_dim) for index in range(count)]
    local = [recipe.mixer.layer(index, count).local.replace("none", "window") for index in range(count)]
    return recipe.mixer.replace(structure="none", window=_one(windows), local=_one(local))


def _one(values: list[Any]) -> Any:
    """The value that all layers have, or the list."""
    return values[0] if len(set(values)) == 1 else values


def build(recipe: Recipe, mixer: MixerSettings, teacher: PreTrainedModel) -> PreTrainedModel:
    """An untrained conversion: on the teacher's own parameters, or on copies where all of them are to be trained."""
    student = shared_copy(teacher) if recipe.lora is not None else copy.deepcopy(teacher)
    every, heads = recipe.softmax_every, recipe.softmax_heads
    return convert(student, layers=recipe.layers, softmax_every=every, softmax_heads=heads, **mixer.root)


def train_variant(recipe: Recipe, name: str, base: Base, work: Path) -> Trained:
    """The variant called `name` after all stages; from `work` where it is done already."""
    mixer = mixer_of(recipe, name, base.teacher)
    student: Student = build(recipe, mixer, base.teacher)
    if not _stages(recipe):
        return Trained(student, mixer, [])
    student = with_adapters(recipe, student)
    trainable = {key: p for key, p in student.named_parameters() if p.requires_grad}
    done = work / name
    if (done / "curves.json").is_file():
        verify_folder(done)
        for key, saved in load_file(done / "trainable.safetensors").items():
            trainable[key].data.copy_(saved)
        print(f"{name}: trained already, taken from {done}", file=sys.stderr)
    else:
        curves = []
        for stage, (settings, loss) in _stages(recipe).items():
            curves.append(train_stage(recipe, stage, name, settings, loss, student, base, work))
        if processes.is_first():
            with new_folder(done, kind="trained weights") as folder:
                tensors = {key: p.detach().cpu().contiguous() for key, p in trainable.items()}
                save_file(tensors, folder / "trainable.safetensors")
                checkpoint.write_curves(curves, folder)
            for stage in _stages(recipe):
                shutil.rmtree(work / f"{name}-{stage}", ignore_errors=True)  # an interrupted stage would resume from it
        processes.wait()
    if recipe.lora is not None:
        keep(student, recipe.lora.kept)
    return Trained(student.eval(), mixer, checkpoint.read_curves(done))


def train_stage(
    recipe: Recipe, stage: str, name: str, settings: StageSettings, loss: Loss, student: Student, base: Base, work: Path
) -> Curve:
    """One stage of one variant; all of them read the same text from its beginning."""
    data = recipe.data
    sequences = pack(_documents(recipe, base), data.sequence_length, settings.tokens, repeats=data.repeats)
    return train(stage, name, student, base.teacher, loss, sequences, settings, work / f"{name}-{stage}", recipe.seed)


def with_adapters(recipe: Recipe, student: PreTrainedModel) -> Student:
    """With the recipe's adapters, if it has any."""
    torch.manual_seed(recipe.seed)  # the adapters' start
    return student if recipe.lora is None else with_lora(student, recipe.lora)


def _stages(recipe: Recipe) -> dict[str, tuple[StageSettings, Loss]]:
    """The recipe's training stages, in order: settings and loss."""
    chosen: dict[str, tuple[StageSettings, Loss]] = {}
    if recipe.align is not None:
        chosen["align"] = recipe.align, partial(align_loss, checkpointing=recipe.align.gradient_checkpointing)
    if recipe.distill is not None:
        settings = recipe.distill
        chosen["distill"] = settings, partial(distill_loss, kl_weight=settings.kl_weight, ramp=settings.ramp)
    return chosen


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
