"""What the full suite measured: the schema of `suite` in `report.json`, in which models go by the names of `Models`."""

from pydantic import BaseModel, ConfigDict, Field


class Schema(BaseModel):
    # Losses of a diverged model are not finite: written as strings, JSON stays JSON and reads back as floats.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Interval(Schema):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float
    by_seed: list[float] = Field(default_factory=list, description="the value of each training seed alone")


class LateGap(Schema):
    """Late losses (positions T / 2 and up) on held-out texts of one length, every model on the same sequences."""

    length: int = Field(description="T, tokens of a sequence")
    articles: list[int] = Field(description="the article of each sequence, counted from 1")
    losses: dict[str, list[list[float]]] = Field(
        description="model -> training seed -> late loss of each sequence in nats"
    )
    closed: dict[str, Interval] = Field(
        default_factory=dict,
        description="baseline -> share of its gap to the teacher that is closed, the interval over articles",
    )


class RecallScore(Schema):
    """One model in one recall task at one distance."""

    task: str = Field(description="needle, multi_key, multi_value, lookup or copy")
    distance: int = Field(description="tokens from where the answer was said to where it is asked for")
    trials: int
    chance: float = Field(description="accuracy without memory; of copy, measured when the passage is first read")
    accuracy: float = Field(description="of choosing among 10 by logarithmic probability; of copy, of its tokens")
    exact: float = Field(description="share of trials whose whole answer is what greedy decoding would give")


class TaskScore(Schema):
    """One model on one multiple-choice task."""

    task: str
    metric: str = Field(description="acc, or acc_norm: by log probability for each byte of the answer")
    items: int
    score: float
    error: float = Field(description="standard error")
    difference: Interval | None = Field(None, description="to the teacher, item by item")
    answered: list[float] = Field(default_factory=list, description="how often each option, by its place, is chosen")
    right: list[float] = Field(default_factory=list, description="how often each option is the right one")


class Generation(Schema):
    """Continuations of the fixed prompts."""

    prompts: int
    tokens: int = Field(description="generated for each prompt, at most")
    greedy_repetition: float = Field(description="share of 4-grams that stood in the continuation before, greedy")
    sampled_repetition: float = Field(description="the same, sampled at temperature 1")
    judged_loss: float = Field(description="the teacher's mean loss on what was sampled, in nats for each token")


class Suite(Schema):
    """What `linearize eval --suite full` measures beyond the quick one."""

    late: list[LateGap] = Field(default_factory=list, description="one for each length")
    recall: dict[str, list[RecallScore]] = Field(default_factory=dict, description="by model")
    tasks: dict[str, list[TaskScore]] = Field(default_factory=dict, description="by model")
    short_tasks: dict[str, Interval] = Field(
        default_factory=dict, description="model -> mean difference to the teacher over the five zero-shot tasks"
    )
    generation: dict[str, Generation] = Field(default_factory=dict, description="by model")
