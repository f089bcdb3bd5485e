"""What a converted layer is: one frozen, validated object for each, made from settings that `config.json` keeps."""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    RootModel,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from linearize.errors import LinearizeError, unknown
from linearize.features import SIGNED
from linearize.structures import STRUCTURES
from linearize.structures.base import absent

T = TypeVar("T", bound=BaseModel)


class Settings(BaseModel):
    """Settings that a person writes; frozen, and each of them known."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, given: Any, field: ValidationInfo) -> Any:
        if isinstance(given, bool) and cls.model_fields[field.field_name or ""].annotation is not bool:
            raise PydanticCustomError("no_switch", "it is no switch, and takes a value")  # which pydantic would make 1
        return given


class MixerConfig(Settings):
    """The settings of Liger Attention in one layer; their names are those of the recipe and of the flags."""

    structure: str = Field("gla", description="the recurrence; none leaves the window and the sinks alone")
    local: Literal["window", "block", "none"] = Field(
        "window",
        description="what softmax attention sees: the last tokens, those of its own block, or no softmax at all",
    )
    window: int = Field(64, ge=1, description="tokens of a window, the current one included, or of a block")
    sinks: int = Field(4, ge=0, description="first tokens of each document that softmax attention always sees")
    score: Literal["softmax", "softplus_reweighted"] = Field(
        "softmax", description="weights of the window; softplus_reweighted is LSSAR's"
    )
    score_power: int = Field(3, ge=1, description="the power of softplus_reweighted; the paper has 3 and 15")
    feature_map: Literal["softmax", "hedgehog", "linear", "products", "l2", "relu", "elu", "none"] = Field(
        "softmax",
        description="of q and k in the recurrence, over the head size; hedgehog, linear and products are learned",
    )
    shifts: int | None = Field(
        None,
        ge=1,
        description="of products: of each channel with those up to so many places on, K = (1 + shifts) D; null: as "
        "many as make up to 256 keys and a state of up to 128 x 128 numbers",
    )
    readout: Literal["none", "rms", "soft_rms", "denominator", "gated"] = Field(
        "none",
        description="of the recurrence: as it is, by its root mean square, by that with a learned floor, by the sum of "
        "its weights, or by its root mean square and a learned gate",
    )
    gate_source: Literal["k", "q", "v", "learned"] = Field(
        "k", description="what the gate is made of: a projection, or weights of its own"
    )
    gate_temperature: float = Field(16.0, gt=0, description="the log decay is divided by it")
    time_scales: float | None = Field(
        None, gt=1, description="a learned bias of the gate spreads decay times from 1 to so many tokens; null: no bias"
    )
    rope: Literal["both", "local", "none"] = Field("local", description="which branches see positions")
    decay_schedule: Literal["paper", "alibi"] = Field(
        "paper", description="of lightning's fixed decays, by head and layer"
    )
    negative_eigenvalues: bool = Field(False, description="of the delta rule's transition: beta in [0, 2]")
    state_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32",
        description="in which a cache keeps states and, behind a window, gates that wait; they are read, changed and "
        "trained in float32",
    )
    convolution: int | None = Field(
        None, ge=2, description="tokens of a short causal convolution over the recurrence's k and v; null: none"
    )
    convolution_form: Literal["linear", "silu"] = Field(
        "linear",
        description="linear starts as the token itself; silu, for training from nothing, starts at random, is over q "
        "as well and has a SiLU behind it",
    )
    bonus: bool = Field(
        False, description="of rwkv6: a learned weight for the current token, which is read before the decay"
    )
    slots: int | None = Field(
        None, ge=1, description="of gsa, for each key/value head: places that it writes to; by default the key size"
    )
    behind: bool = Field(
        False,
        description="whether the recurrence holds only what the window has not: each token is taken in when it leaves",
    )
    mixing: Literal["fixed", "per_head", "data_dependent", "shared_normalizer"] = Field(
        "per_head",
        description="the recurrence's weight: a constant, learned, made from the layer's input, or its part of one "
        "softmax over the window and, in the recurrence, the tokens beyond it",
    )
    mixing_weight: float | None = Field(
        None,
        ge=0,
        le=1,
        description="its (initial) value; by default 0.5 for fixed, the paper's, and 0.02 for the others",
    )

    @field_validator("structure")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in STRUCTURES and name != "none":
            raise unknown("structure", name, [*STRUCTURES, "none"])
        return name

    @model_validator(mode="after")
    def _means_something(self) -> "MixerConfig":
        idle = [
            f"{name} {getattr(self, name)} has no effect: {reason}"
            for name, reason in self.idle().items()
            if getattr(self, name) != _default(name)
        ]
        if wrong := idle + self._contradictions():
            raise LinearizeError("; ".join(wrong))
        return self

    def idle(self) -> dict[str, str]:
        """The settings that change nothing beside the others, with the reason."""
        if self.structure not in STRUCTURES:  # a matched baseline keeps the settings of what it is matched with
            return {}
        found, name, structure = {}, self.structure, STRUCTURES[self.structure]

        def of(reason: str, *settings: str) -> None:
            found.update(dict.fromkeys(settings, reason))

        if structure.gate_size is absent:
            of(f"{name} has no gate", "gate_source", "gate_temperature", "time_scales")
        elif not structure.decays:
            of(f"{name} does not decay", "gate_temperature", "time_scales")
        if structure.own_features:
            of(f"{name} has features of its own", "feature_map", "shifts")
        if self.feature_map != "products":
            of("it is of feature_map products", "shifts")
        for setting, owners in OWN.items():
            if name not in owners:
                of(f"it is of {' and '.join(owners)}, not of {name}", setting)
        if self.convolution is None:
            of("there is no convolution", "convolution_form")
        if self.local == "none":
            of("local is none", "window", "sinks", "score", "behind", "mixing", "mixing_weight")
        elif self.shares_normalizer:
            of("mixing shared_normalizer is behind the window as it is", "behind")
        if self.local == "none" or self.score == "softmax":
            of("it is of score softplus_reweighted", "score_power")
        return found

    def _contradictions(self) -> list[str]:
        found = []
        if self.structure == "none":
            return ["structure none and local none leave nothing"] if self.local == "none" else []
        if (shared := self.shares_normalizer) or self.readout == "denominator":
            what = "mixing shared_normalizer" if shared else "readout denominator"
            if not STRUCTURES[self.structure].weighs:
                found.append(f"{what} needs weights that add up, which {self.structure} has not")
            elif self.feature_map in SIGNED:
                found.append(f"{what} needs a feature map that is never negative, and {self.feature_map} may be")
        if shared:
            for name in ("readout", "score"):
                if getattr(self, name) != _default(name):
                    found.append(f"mixing shared_normalizer goes with {name} {_default(name)} only")
        if self.is_behind:
            what = "mixing shared_normalizer" if shared else "behind true"
            if self.local != "window":
                found.append(f"{what} goes with local window only: a block's tokens leave all at once")
            for name in ("bonus", "convolution"):
                if getattr(self, name) != _default(name):
                    found.append(f"{what} goes with {name} {_default(name)} only")
        if self.rope == "none" and self.local == "none":
            found.append("rope none is rope local where local is none; give rope local or both")
        return found

    @property
    def shares_normalizer(self) -> bool:
        """Whether window and recurrence are one softmax."""
        return self.mixing == "shared_normalizer" and self.local != "none" and self.structure != "none"

    @property
    def is_behind(self) -> bool:
        """Whether the recurrence takes a token in when it leaves the window."""
        return self.shares_normalizer or (self.behind and self.local != "none" and self.structure != "none")

    @property
    def turns_back(self) -> bool:
        """Whether a key of the window, which is rotated, is turned back when the recurrence takes its token in."""
        return self.is_behind and self.rope == "local"

    @property
    def state_bytes(self) -> int:
        """Of one number of a state in a cache."""
        return 4 if self.state_dtype == "float32" else 2

    @property
    def initial_mixing_weight(self) -> float:
        """The weight w of the recurrence at conversion: output = w · recurrence + (1 - w) · window."""
        if self.mixing_weight is not None:
            return self.mixing_weight
        return 0.5 if self.mixing == "fixed" else 0.02


OWN = {  # settings that only some structures have
    "negative_eigenvalues": ("deltanet", "gated_deltanet"),
    "decay_schedule": ("lightning",),
    "bonus": ("rwkv6",),
    "slots": ("gsa",),
}


def _default(name: str) -> Any:
    return MixerConfig.model_fields[name].default if name in MixerConfig.model_fields else None


class MixerSettings(RootModel[dict[str, Any]]):
    """The settings of all layers: those of `MixerConfig`, each a value or a list by layer.

    A list is spread evenly over the depth: `[block, none]` is one setting for the early half of the layers and one for
    the late half, and a list as long as the model gives each layer its own. A model of fewer layers than values takes
    those at the depths that it has.
    """

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        if isinstance(given, MixerConfig):
            given = given.model_dump()
        if not isinstance(given, Mapping):
            raise LinearizeError(f"mixer is {given!r}, not settings and their values")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        for name, value in values.items():
            if isinstance(value, tuple) and not value:
                raise LinearizeError(f"{name} is an empty list; give a value, or one for each part of the depth")
        parts, problems, made = _parts(values), [], []
        idle = _idle(parts)
        for here, without_effect in zip(parts, idle, strict=True):
            ignored = without_effect.keys() - _everywhere(idle).keys()  # what has an effect in another part
            try:
                made.append(validated(MixerConfig, _without(here, ignored), "mixer"))
            except LinearizeError as error:
                problems.append(str(error))
        if problems:
            raise LinearizeError("; ".join(dict.fromkeys(problems)))
        read = {name: _as_read(name, value, made) for name, value in values.items()}
        return {name: read.get(name, field.default) for name, field in MixerConfig.model_fields.items()}

    def layer(self, index: int, count: int) -> MixerConfig:
        """The settings of layer `index` of `count`; a setting without effect in this layer has its default."""
        here = {name: _at(value, index, count) for name, value in self.root.items()}
        return MixerConfig(**_without(here, MixerConfig.model_construct(**here).idle()))

    def replace(self, **settings: Any) -> "MixerSettings":
        """A copy with other values."""
        return MixerSettings(self.root | settings)

    def windows(self) -> list[int]:
        """Tokens of the windows or blocks of all layers, each once, the smallest first; 0 where there is none."""
        return sorted({part["window"] * (part["local"] != "none") for part in _parts(self.root)})

    def widest_window(self) -> int:
        """Tokens of the widest window or block in any layer; 0 where no layer has one."""
        return self.windows()[-1]

    def values(self, name: str) -> list[Any]:
        """The different values of a setting, in the order of layers."""
        value = self.root[name]
        return list(dict.fromkeys(value)) if isinstance(value, tuple) else [value]


def _parts(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The values in each of as many parts of the depth as lists tell apart."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    count = math.lcm(*(len(value) for value in values.values() if isinstance(value, tuple)))
    return [{name: _at(value, part, count) for name, value in values.items()} for part in range(count)]


def _as_read(name: str, value: Any, parts: list[MixerConfig]) -> Any:
    """A setting as the parts of the depth have it, 64 of "64", or, where it has no effect, as it was given."""
    each = value if isinstance(value, tuple) else (value,)
    size = len(parts) // len(each)
    found = [
        next((getattr(part, name) for part in parts[n * size : (n + 1) * size] if name in part.model_fields_set), given)
        for n, given in enumerate(each)
    ]
    return tuple(found) if isinstance(value, tuple) else found[0]


def _at(value: Any, index: int, count: int) -> Any:
    return value[index * len(value) // count] if isinstance(value, tuple) else value


def _without(values: Mapping[str, Any], names: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _idle(parts: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What has no effect in each part, and why; nothing where a value is of a wrong type, which validation tells."""
    try:
        return [MixerConfig.model_construct(**part).idle() for part in parts]
    except TypeError:
        return [{} for _ in parts]


def _everywhere(idle: list[dict[str, str]]) -> dict[str, str]:
    """What has no effect in any part, and the reasons in the first."""
    return {name: reason for name, reason in idle[0].items() if all(name in other for other in idle)} if idle else {}


def drop_idle(settings: Mapping[str, Any], chosen: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """`settings` with those `chosen` on top, less what has no effect any more beside these; and the reasons."""
    both = {**settings, **chosen}
    given = {name for name in settings if settings[name] != _default(name)} - set(chosen)
    dropped = {name: reason for name, reason in _everywhere(_idle(_parts(both))).items() if name in given}
    return _without(both, dropped), dropped


def validated(model: type[T], given: Mapping[str, Any], what: str) -> T:
    """`model(**given)`, with all that is wrong reported in one `LinearizeError`."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        wrong = [item for item in error.errors() if item["type"] != "too_short" or not item["input"]]  # told by items
        raise LinearizeError("; ".join(_explain(model, what, item) for item in wrong)) from error


def _explain(model: type[BaseModel], what: str, item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        owner: Any = model
        for part in item["loc"][:-1]:
            annotation = owner.model_fields[part].annotation
            owner = next(a for a in (*get_args(annotation), annotation) if hasattr(a, "model_fields"))
        return f"unknown {what} key {name!r}; valid: {', '.join(owner.model_fields)}"
    if item["type"] == "missing":
        return f"{what} key {name!r} is missing"
    if item["type"] == "value_error":  # raised by a validator here, in words of its own
        return str(item["ctx"]["error"])
    return f"{what} key {name!r} is {item['input']!r}: {item['msg']}"
