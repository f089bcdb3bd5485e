"""What a converted layer is: one frozen, validated object, saved in `config.json`."""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from linearize.errors import LinearizeError, unknown
from linearize.features import SIGNED
from linearize.structures import STRUCTURES

T = TypeVar("T", bound=BaseModel)


class MixerConfig(BaseModel):
    """The settings of Liger Attention; their names are those of the recipe and of the flags."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    structure: str = Field("gla", description="the recurrence; none leaves the window and the sinks alone")
    window: int = Field(64, ge=1, description="tokens that softmax attention sees, the current one included")
    sinks: int = Field(4, ge=0, description="first tokens of each document that softmax attention always sees")
    feature_map: Literal["softmax", "l2", "relu", "elu", "none"] = Field(
        "softmax", description="of q and k in the recurrence, over the head size"
    )
    readout: Literal["none", "rms", "denominator"] = Field(
        "none", description="of the recurrence: as it is, by its root mean square, or by the sum of its weights"
    )
    gate_temperature: float = Field(16.0, gt=0, description="the log decay is divided by it")
    decay_schedule: Literal["paper", "alibi"] = Field(
        "paper", description="of lightning's fixed decays, by head and layer"
    )
    negative_eigenvalues: bool = Field(False, description="of the delta rule's transition: beta in [0, 2]")
    slots: int = Field(64, ge=1, description="of gsa, for each key/value head: places that it writes to and attends to")
    mixing: Literal["fixed", "per_head"] = Field(
        "per_head", description="the recurrence's weight: a constant, or learned"
    )
    mixing_weight: float | None = Field(
        None,
        ge=0,
        le=1,
        description="its (initial) value; by default 0.5 for fixed, the paper's, and 0.02 for per_head",
    )

    @field_validator("structure")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in STRUCTURES and name != "none":
            raise unknown("structure", name, [*STRUCTURES, "none"])
        return name

    @model_validator(mode="after")
    def _means_something(self) -> "MixerConfig":
        if self.structure == "none":  # a matched baseline keeps the settings of what it is matched with
            return self
        if self.negative_eigenvalues and not self.structure.endswith("deltanet"):
            raise LinearizeError(f"negative_eigenvalues is of deltanet and gated_deltanet, not of {self.structure}")
        if self.decay_schedule != "paper" and self.structure != "lightning":
            raise LinearizeError(f"decay_schedule is of lightning, not of {self.structure}")
        if self.slots != type(self).model_fields["slots"].default and self.structure != "gsa":
            raise LinearizeError(f"slots is of gsa, not of {self.structure}")
        if self.feature_map != "softmax" and STRUCTURES[self.structure].own_features:
            raise LinearizeError(f"feature_map has no say in {self.structure}, which has features of its own")
        if self.readout == "denominator" and not STRUCTURES[self.structure].weighs:
            raise LinearizeError(f"readout denominator needs weights that add up, which {self.structure} has not")
        if self.readout == "denominator" and self.feature_map in SIGNED:
            raise LinearizeError(
                f"readout denominator needs a feature map that is never negative, and {self.feature_map} may be"
            )
        return self

    @property
    def initial_mixing_weight(self) -> float:
        """The weight w of the recurrence at conversion: output = w · recurrence + (1 - w) · window."""
        if self.mixing_weight is not None:
            return self.mixing_weight
        return 0.5 if self.mixing == "fixed" else 0.02


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
