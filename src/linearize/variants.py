"""What a run trains and compares: the converted model and its baselines, made of one teacher, on one text."""

import copy
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize import checkpoint, processes
from linearize.assets import resolve_model
from linearize.checkpoint import Student, load_pretrained
from linearize.config import MixerSettings
from linearize.convert import attention_of, check_convertible, convert
from linearize.errors import LinearizeError
from linearize.evaluate import suite as suites
from linearize.files import new_folder, sha256, verify_folder
from linearize.inspect import equal_memory_window
from linearize.recipe import DataSettings, Recipe, StageSettings
from linearize.results import Curve
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


def load_base(recipe: Recipe, variants: Iterable[str] = (), train: bool = False, heldout: bool = False) -> Base:
    """The teacher on the best device there is, its tokenizer, and the tokens to train on and to measure with.

    All that can be wrong with them, and with converting the teacher to `variants`, shows here, the quickest first.
    """
    processes.start()
    trained = bool(stages(recipe))
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
    train, heldout = (files_of(source) for source in (data.train, data.heldout))
    sizes = {path.stat().st_size for path in heldout}
    trained = {sha256(path) for path in train if path.stat().st_size in sizes}  # a copy is the same text as well
    return next((str(path) for path in heldout if trained and sha256(path) in trained), None)


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
    return max(settings.tokens for settings, _ in stages(recipe).values()) + recipe.data.sequence_length


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
    if not stages(recipe):
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
        for stage, (settings, loss) in stages(recipe).items():
            curves.append(train_stage(recipe, stage, name, settings, loss, student, base, work))
        if processes.is_first():
            with new_folder(done, kind="trained weights") as folder:
                tensors = {key: p.detach().cpu().contiguous() for key, p in trainable.items()}
                save_file(tensors, folder / "trainable.safetensors")
                checkpoint.write_curves(curves, folder)
            for stage in stages(recipe):
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


def stages(recipe: Recipe) -> dict[str, tuple[StageSettings, Loss]]:
    """The recipe's training stages, in order: settings and loss."""
    chosen: dict[str, tuple[StageSettings, Loss]] = {}
    if recipe.align is not None:
        chosen["align"] = recipe.align, partial(align_loss, checkpointing=recipe.align.gradient_checkpointing)
    if recipe.distill is not None:
        settings = recipe.distill
        chosen["distill"] = settings, partial(distill_loss, kl_weight=settings.kl_weight, ramp=settings.ramp)
    return chosen
