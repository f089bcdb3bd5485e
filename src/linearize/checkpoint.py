"""Checkpoint folders: ordinary transformers checkpoints, with the recipe that made them; LoRA merged or beside them."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from pydantic import TypeAdapter
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from linearize import recipe as recipes
from linearize.assets import quick_hub
from linearize.errors import LinearizeError
from linearize.families import FAMILIES, base_model_type, family_of
from linearize.files import read_json, verify_folder
from linearize.recipe import Recipe
from linearize.results import Curve

BASE = "base"  # the subfolder of the converted model that an adapter belongs to
WHOLE = f"a whole model, in a folder or on a hub that answers, of {', '.join(FAMILIES)}"

Student: TypeAlias = "PreTrainedModel | PeftModel"


def unwrapped(model: Student) -> PreTrainedModel:
    """The causal language model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def as_merged(model: PreTrainedModel) -> Iterator[None]:
    """`model` without the modules of PEFT around its own, as merging leaves it but for the values of weights: its steps
    take as long as the merged model's, which alone decodes at its full speed."""
    wrapped: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, ModulesToSaveWrapper):
                wrapped.append((parent, name, child, child.modules_to_save[child.active_adapters[0]]))
            elif isinstance(child, BaseTunerLayer):
                wrapped.append((parent, name, child, child.get_base_layer()))
    for parent, name, _, own in wrapped:
        setattr(parent, name, own)
    try:
        yield
    finally:
        for parent, name, child, _ in wrapped:
            setattr(parent, name, child)


def write(
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    curves: list[Curve],
    folder: Path,
    out: Path,
) -> None:
    """Write a checkpoint into `folder`, which is to become `out`; merging, and another `recipe.dtype`, change
    `student`'s weights in place.

    `recipe.adapter` decides what becomes of LoRA: "merged" into the weights, or "separate", a PEFT adapter with the
    converted model in `base/` beside it.
    """
    if isinstance(student, PeftModel) and recipe.adapter == "merged":
        student = student.merge_and_unload()
    student.to(getattr(torch, recipe.dtype))
    if not isinstance(student, PeftModel):
        student.save_pretrained(folder)
    else:
        student.peft_config["default"].base_model_name_or_path = str(out.absolute() / BASE)
        student.save_pretrained(
            folder, save_embedding_layers=False
        )  # they are in base/, which PEFT looks for on the hub
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's template
        _without_adapter(student, folder / BASE)
    tokenizer.save_pretrained(folder)
    (folder / "recipe.yaml").write_text(recipes.dump(recipe), encoding="utf-8")
    write_curves(curves, folder)


def load(path: str | Path, **kwargs: Any) -> tuple[Student, PreTrainedTokenizerBase]:
    """A checkpoint folder's model, in eval mode, fp32 unless `dtype` says otherwise, and its tokenizer.

    A folder with a PEFT adapter gives a PeftModel, ready to be trained on. `kwargs` go to `from_pretrained`.
    Raises LinearizeError where the folder is missing, is no checkpoint, is truncated or was tampered with.
    """
    folder = Path(path)
    _check_exists(folder)
    verify_folder(folder)
    adapter = folder / "adapter_config.json"
    if not adapter.is_file():
        _check_type(folder)
        return load_pretrained(str(folder), **kwargs)
    _check_type(folder / BASE)
    base, _ = load_pretrained(str(folder / BASE), tokenizer=folder, **kwargs)
    with _readable(str(folder)):
        model = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
        return model, AutoTokenizer.from_pretrained(folder)


def load_pretrained(
    name: str, tokenizer: str | Path | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model, as `load_model` loads it, and its tokenizer, from a folder or the hub."""
    model, place = load_model(name, **kwargs), Path(tokenizer or name)
    valid = "a folder that has its files too, like tokenizer.json"
    if place.is_dir() and not [*place.glob("*token*"), *place.glob("vocab*")]:
        raise LinearizeError(f"there is no tokenizer in {str(place)!r}; valid: {valid}")
    with _readable(name, "a tokenizer", valid):
        found = AutoTokenizer.from_pretrained(tokenizer or name)
    rows = model.get_input_embeddings().weight.shape[0]
    token, last = max(found.get_vocab().items(), key=itemgetter(1))
    if last >= rows:
        raise LinearizeError(
            f"the tokenizer of {name!r} has a token {last}, {token!r}, and the model embeddings for {rows}; "
            "give both of one model, or resize_token_embeddings"
        )
    return model, found


def load_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """A model in eval mode, fp32 unless `dtype` says otherwise, from a folder or the hub."""
    kwargs.setdefault("dtype", torch.float32)
    with nullcontext() if Path(name).is_dir() else quick_hub(), _readable(name):
        family_of(AutoConfig.from_pretrained(name))
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # which are told below
        model, found = AutoModelForCausalLM.from_pretrained(name, **kwargs)
        if missing := sorted(found["missing_keys"]):
            raise LinearizeError(f"{name} lacks weights ({', '.join(missing[:3])}); give a whole model")
        if other := sorted(found["mismatched_keys"]):
            key, here, wanted = other[0]
            raise LinearizeError(
                f"{name}: {key} is {list(here)}, by its config.json {list(wanted)}; give a whole model"
            )
    return model.eval()


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of the settings and of some values of every parameter: another one for other weights, without reading all
    of them."""
    apart = ("_name_or_path", "transformers_version", "dtype")  # where it is kept, and how
    settings = {key: value for key, value in model.config.to_diff_dict().items() if key not in apart}
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy()
        found.update(f"{name} {tuple(parameter.shape)}".encode() + some.tobytes())
    return found.hexdigest()


def read_recipe(folder: Path, overrides: Iterable[str] = (), given: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that made a checkpoint, with changes as `recipe.read` takes them; LinearizeError without one."""
    _check_exists(folder)
    if not (folder / "recipe.yaml").is_file():
        raise LinearizeError(f"{folder} has no recipe.yaml; give a checkpoint that linearize wrote")
    return recipes.read(folder / "recipe.yaml", overrides, given)


def write_curves(curves: list[Curve], folder: Path) -> None:
    """Keep the training curves with the weights that they led to."""
    (folder / "curves.json").write_bytes(_CURVES.dump_json(curves))


def read_curves(folder: Path) -> list[Curve]:
    """What `write_curves` kept; LinearizeError where it is missing or damaged."""
    try:
        return _CURVES.validate_json((folder / "curves.json").read_bytes())
    except (OSError, ValueError) as error:
        raise LinearizeError(
            f"{folder / 'curves.json'} is missing or damaged; give a checkpoint that is whole"
        ) from error


_CURVES = TypeAdapter(list[Curve])


@contextmanager
def _readable(name: str, what: str = "a model", valid: str = WHOLE) -> Iterator[None]:
    """What transformers, PEFT, safetensors and the hub raise has no common class: here it becomes a LinearizeError."""
    try:
        yield
    except LinearizeError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        reason = reason if " " in reason else f"{type(error).__name__} {reason}"  # a KeyError's is only a key
        raise LinearizeError(f"cannot load {what} from {name!r}: {reason}; valid: {valid}") from error


def _check_exists(folder: Path) -> None:
    if not folder.is_dir():
        raise LinearizeError(f"there is no checkpoint folder {str(folder)!r}; give one that linearize wrote")


def _check_type(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise LinearizeError(f"{folder} has no config.json; give the folder of a checkpoint")
    model_type = read_json(folder / "config.json").get("model_type")
    if base_model_type(str(model_type)) not in FAMILIES:
        raise LinearizeError(f"{folder} is a {model_type!r} checkpoint; valid families: {', '.join(FAMILIES)}")


def _without_adapter(student: PeftModel, folder: Path) -> None:
    """The converted model as it was before LoRA, in `folder`."""
    model = student.get_base_model()
    state = {}
    for key, tensor in model.state_dict().items():
        if "lora_" not in key and ".modules_to_save." not in key:
            state[key.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    model.save_pretrained(folder, state_dict=state)
