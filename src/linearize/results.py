"""What a run measured: the schema of `report.json`, and what its numbers say in words."""

import math
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from linearize.errors import LinearizeError
from linearize.measures import Schema, Suite

EARLY = 128  # positions that `early_loss` covers
NOTHING = 0.01  # a smaller share of the late gap is called nothing
FEW_TOKENS = 50_000  # below, a difference of a few hundredths of a nat may be noise


class ModelResult(Schema):
    """One model on the held-out text. Losses are means in nats."""

    perplexity: float = Field(description="exp of the mean loss")
    early_loss: float = Field(description="the first 128 positions")
    late_loss: float = Field(description="positions >= T / 2")
    loss_by_position: list[float] = Field(description="in buckets of `Report.bucket` positions")
    agreement: float | None = Field(None, description="share of positions where the greedy next token is the teacher's")
    trained_tokens: int | None = None
    window: int | None = Field(None, description="its tokens; where layers differ, the widest")
    narrowest_window: int | None = Field(None, description="that of the narrowest layer, where layers differ")


class Models(Schema):
    """The teacher, the converted model before and after training, and what it is compared with."""

    teacher: ModelResult
    untrained: ModelResult
    converted: ModelResult
    window_only: ModelResult | None = Field(
        None, description="the same window, sinks, recipe and tokens; no recurrence"
    )
    window_equal_memory: ModelResult | None = Field(
        None, description="the same, with a window longer by what the states weigh"
    )
    recurrence_off: ModelResult | None = Field(
        None, description="ablation: the converted model with its recurrence switched off"
    )
    window_off: ModelResult | None = Field(
        None, description="ablation: the converted model with its window and sinks switched off"
    )

    def measured(self) -> dict[str, ModelResult]:
        """The models that were evaluated, by field name, in the order in which reports show them."""
        order = (
            "teacher",
            "untrained",
            "window_only",
            "window_equal_memory",
            "converted",
            "recurrence_off",
            "window_off",
        )
        return {name: result for name in order if (result := getattr(self, name)) is not None}


class Curve(Schema):
    """The training loss of one model in one stage, against the tokens seen in it."""

    stage: str = Field(description="'align' or 'distill'")
    model: str = Field(description="'converted', 'window_only', ...")
    tokens: list[int] = Field(description="seen so far")
    loss: list[float] = Field(description="of the step that ended there")
    seconds: float = Field(0.0, description="of the stage; where it was interrupted, since it was taken up again")

    @model_validator(mode="after")
    def _same_length(self) -> "Curve":
        if len(self.tokens) != len(self.loss):
            raise ValueError(f"{len(self.tokens)} token counts but {len(self.loss)} losses")
        return self


class Layer(Schema):
    """What one converted layer learned."""

    layer: int = Field(ge=0)
    mixing: list[float] = Field(
        description="weight of the recurrence, a mean over a held-out text, for each query head that is converted"
    )
    decay_tokens: list[float] = Field(
        description="mean decay time, -1 / mean log decay, for each key/value head that is converted"
    )
    kept: list[int] = Field(default_factory=list, description="key/value heads that are not")
    half_life: list[float] = Field(
        default_factory=list,
        description="of the state in tokens: 5, 25, 50, 75, 95 % of its channels are below; [] without decay",
    )


class LateGapClosed(Schema):
    """The share of each baseline's late gap to the teacher that the recurrence closes."""

    window_only: float | None = None
    window_equal_memory: float | None = None


class Report(Schema):
    """Everything that a run measured. `late_gap_closed` is worked out from `models`, whatever was given for it."""

    model: str
    structure: str
    kept: str | None = Field(None, description="what the conversion left softmax attention, in words; null: nothing")
    sequence_length: int = Field(gt=0, description="T, of the held-out sequences")
    bucket: int = Field(gt=0, description="positions for each point of loss_by_position")
    eval_tokens: int = Field(description="held-out tokens that were scored")
    heldout: str = Field(description="where the held-out text comes from")
    models: Models
    late_gap_closed: LateGapClosed = Field(default_factory=LateGapClosed)
    decode_parity: float = Field(description="relative norm: step-by-step decoded logits against the full forward")
    cache_bytes: dict[str, dict[int, int]] = Field(
        default_factory=dict, description="model -> context -> bytes for each sequence"
    )
    tokens_per_second: dict[str, dict[int, float]] = Field(
        default_factory=dict, description="decoding: model -> context -> speed"
    )
    cache_dtype: str = Field("float32", description="of keys and values in cache_bytes; states have mixer.state_dtype")
    suite: Suite | None = Field(None, description="of `--suite full`")
    curves: list[Curve] = Field(default_factory=list)
    layers: list[Layer] = Field(default_factory=list, description="layers left as full attention have no row")
    seconds: dict[str, float] = Field(default_factory=dict, description="by stage and model")
    trained_tokens: dict[str, int] = Field(default_factory=dict, description="by model, all stages together")
    hardware: str
    versions: dict[str, str] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(default_factory=dict)
    seeds: dict[str, int] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fill_gaps(self) -> "Report":
        models = self.models
        self.late_gap_closed = LateGapClosed(
            window_only=late_gap_closed(models.window_only, models.converted, models.teacher),
            window_equal_memory=late_gap_closed(models.window_equal_memory, models.converted, models.teacher),
        )
        return self

    def common_context(self, measured: dict[str, dict[int, Any]]) -> int | None:
        """The longest context at which both the teacher and the converted model were measured."""
        return max(measured.get("teacher", {}).keys() & measured.get("converted", {}).keys(), default=None)


def late_gap_closed(baseline: ModelResult | None, ours: ModelResult, teacher: ModelResult) -> float | None:
    """The share of the baseline's late gap to the teacher that `ours` closes; 1 is all of it, negative is worse.

    None where there is no baseline, it is no worse than the teacher, or a loss is not finite.
    """
    if baseline is None or not _finite(baseline, ours, teacher) or baseline.late_loss <= teacher.late_loss:
        return None
    return (baseline.late_loss - ours.late_loss) / (baseline.late_loss - teacher.late_loss)


def verdict(report: Report) -> str:
    """What the recurrent branch adds, in plain words."""
    return " ".join(findings(report))


def findings(report: Report) -> list[str]:
    """The sentences of the verdict, the most important one first."""
    models = report.models
    found = [_against_window(report), _against_equal_memory(report), _recalled(report)]
    found += _mismatches("window-only baseline", models.window_only, models.converted, same_window=True)
    found += _mismatches("equal-memory baseline", models.window_equal_memory, models.converted, same_window=False)
    found += [_ablation(models), _left(models)]
    if report.eval_tokens < FEW_TOKENS:
        found.append(f"Only {report.eval_tokens:,} held-out tokens were scored: small differences may be noise.")
    return [sentence for sentence in found if sentence]


def percent(share: float) -> str:
    """A share as a percentage, with a real minus sign and digits only where they are needed."""
    text = f"{100 * share:.1f}" if abs(share) < 0.095 else f"{100 * share:.0f}"
    return text.replace("-", "−").replace("inf", "∞") + " %"


def count(value: float) -> str:
    """1500000 as "1.5M"."""
    return _scaled(value, 1000, ("", "k", "M", "G", "T"), "")


def context(value: float) -> str:
    """A context length: powers of two by 1024, others as they are."""
    value = round(value)
    return _scaled(value, 1024, ("", "k", "M"), "") if value >= 1024 and value % 1024 == 0 else f"{value:,}"


def byte_size(value: float) -> str:
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"), " ")


def ratio(value: float) -> str:
    return f"{value:.0f}×" if value >= 9.95 else f"{value:.1f}×"


def _scaled(value: float, base: int, units: tuple[str, ...], space: str) -> str:
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    power = 0
    while abs(value) >= base * 0.9995 and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{value:.3g}{space}{units[power]}" if abs(value) < 1000 else f"{value:,.0f}{space}{units[power]}"


def _against_window(report: Report) -> str:
    models, share = report.models, report.late_gap_closed.window_only
    baseline = models.window_only
    if baseline is None:
        return "What the recurrent branch adds is unknown: it was not compared with the same window trained without it."
    losses = (
        f"late loss is {baseline.late_loss:.3f} with the window only, {models.converted.late_loss:.3f} converted, "
        f"{models.teacher.late_loss:.3f} in the teacher."
    )
    if share is None and not _finite(baseline, models.converted, models.teacher):
        return f"What the recurrent branch adds is unknown, because a model diverged: {losses}"
    if share is None:
        return f"There is no late gap for the recurrent branch to close: {losses}"
    if share < NOTHING:
        worse = " and is worse than it" if share <= -NOTHING else ""
        return f"The recurrent branch adds nothing over the window{worse}: {losses}"
    return f"The recurrent branch closes {percent(share)} of the late gap that the window alone leaves: {losses}"


def _against_equal_memory(report: Report) -> str:
    baseline, share = report.models.window_equal_memory, report.late_gap_closed.window_equal_memory
    if baseline is None:
        return "A longer window of equal memory was not compared."
    least = f"{baseline.narrowest_window} to " if baseline.narrowest_window else ""
    length = f" of {least}{baseline.window} tokens" if baseline.window else ""
    loss = f"late loss {baseline.late_loss:.3f}"
    if share is None:
        return f"Against a window{length} that takes as much memory there is no late gap to measure ({loss})."
    if share < NOTHING:
        verb = "does better" if share <= -NOTHING else "does as well"
        return f"At equal memory it adds nothing: a window{length} without the recurrence {verb} ({loss})."
    return f"At equal memory, a window{length}, it closes {percent(share)} of the late gap ({loss})."


def _recalled(report: Report) -> str:
    """What is left of needles beyond the window, all distances together."""
    found = {} if report.suite is None else report.suite.recall
    window = report.models.converted.window or 0
    shares = {}
    for name in ("converted", "window_only", "teacher"):
        scores = [score for score in found.get(name, ()) if score.task == "needle" and score.distance > window]
        if scores:
            shares[name] = sum(score.accuracy for score in scores) / len(scores)
    if "converted" not in shares:
        return ""
    others = {"window_only": "with the window only", "teacher": "the teacher's"}
    said = ", ".join(f"{percent(shares[name])} {words}" for name, words in others.items() if name in shares)
    return (
        f"Of single needles beyond the window it finds {percent(shares['converted'])} ({f'{said}, ' if said else ''}"
        "10 % by chance)."
    )


def _mismatches(name: str, baseline: ModelResult | None, ours: ModelResult, *, same_window: bool) -> list[str]:
    if baseline is None:
        return []
    found = []
    if None not in (baseline.trained_tokens, ours.trained_tokens) and baseline.trained_tokens != ours.trained_tokens:
        found.append(
            f"The {name} is not matched: it was trained on {baseline.trained_tokens:,} tokens, "
            f"the converted model on {ours.trained_tokens:,}."
        )
    if same_window and None not in (baseline.window, ours.window) and baseline.window != ours.window:
        found.append(f"The {name} is not matched: its window is {baseline.window}, the converted one's {ours.window}.")
    return found


def _ablation(models: Models) -> str:
    if models.recurrence_off is None:
        return ""
    change = models.recurrence_off.late_loss - models.converted.late_loss
    if not math.isfinite(change):
        return "With the recurrence switched off the loss is not finite."
    if change <= -0.001:
        return f"Switching the recurrence off lowers late loss by {-change:.3f} nats: the branch does harm."
    if change < 0.001:
        return "Switching the recurrence off changes nothing: the model does not use it."
    return (
        f"Switching the recurrence off raises late loss by {change:.3f} nats: the trained model leans on it, which "
        "alone proves nothing, because a window trained without it may do as well."
    )


def _left(models: Models) -> str:
    left = models.converted.late_loss - models.teacher.late_loss
    if not math.isfinite(left):
        return ""
    if left <= 0:
        return "At late positions nothing is left between the converted model and the teacher."
    return f"At late positions {left:.3f} nats are left between the converted model and the teacher."


def _finite(*results: ModelResult) -> bool:
    return all(math.isfinite(result.late_loss) for result in results)


def read(path: str | Path) -> Report:
    """The report at `path`, a `report.json` or the folder that holds one."""
    path = Path(path)
    if path.is_dir():
        path = path / "report.json"
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise LinearizeError(f"cannot read {path}: {error.strerror or error}; give a report.json") from error
    except ValidationError as error:
        problems = [
            ": ".join(filter(None, (".".join(map(str, found["loc"])), found["msg"]))) for found in error.errors()
        ]
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise LinearizeError(
            f"{path} is not a whole report: {'; '.join(problems[:3])}{more}; give a report.json written by linearize"
        ) from error
