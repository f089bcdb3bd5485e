"""What is left of a model: loss by position, decoding parity, speed and memory, and what its layers learned."""

import platform
import time
from importlib.metadata import version

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from linearize.checkpoint import as_merged, unwrapped
from linearize.config import MixerSettings
from linearize.convert import kept_softmax
from linearize.evaluate.ablation import ablations, recurrence_off, window_off
from linearize.evaluate.decoding import decode_parity, decode_speed
from linearize.evaluate.layers import layer_statistics
from linearize.evaluate.perplexity import score, summarize
from linearize.recipe import Recipe
from linearize.results import Curve, Models, Report

BUCKETS = 32  # points of a loss-by-position curve
Variant = tuple[PreTrainedModel, int, MixerSettings]  # the model, its training tokens, its mixers


def evaluate(
    recipe: Recipe,
    teacher: PreTrainedModel,
    heldout: Int[Tensor, "N T"],
    untrained: PreTrainedModel,
    variants: dict[str, Variant],
    curves: list[Curve],
) -> Report:
    """Everything that the report says of `heldout`, for the teacher, the untrained conversion and all variants."""
    started, settings = time.perf_counter(), recipe.evaluation
    bucket = max(1, settings.sequence_length // BUCKETS)
    expected = score(teacher, heldout, "teacher")
    results = {"teacher": summarize(expected, None, bucket)}

    def add(name: str, model: PreTrainedModel, tokens: int, mixer: MixerSettings) -> None:
        scores, windows = score(model, heldout, name.replace("_", " ")), mixer.windows()
        narrowest = windows[0] if len(windows) > 1 else None
        results[name] = summarize(
            scores, expected, bucket, trained_tokens=tokens, window=windows[-1], narrowest_window=narrowest
        )

    add("untrained", untrained, 0, recipe.mixer)
    for name, variant in variants.items():
        add(name, *variant)
    ours = variants["converted"][0]
    if ablations(ours):
        with recurrence_off(ours):
            add("recurrence_off", *variants["converted"])
        if settings.suite == "full":
            with window_off(ours):
                add("window_off", *variants["converted"])

    speed, size = {}, {}
    for name, model in (("teacher", teacher), ("converted", ours)):
        with as_merged(model):
            speed[name], size[name] = decode_speed(model, settings.contexts, settings.decode_tokens, name)
    with as_merged(ours):  # else it would not be the steps that a merged model takes
        parity = decode_parity(ours, heldout[0])
    return Report(
        model=recipe.model,
        structure=", ".join(recipe.mixer.values("structure")),
        kept=kept_softmax(unwrapped(ours)),
        sequence_length=settings.sequence_length,
        bucket=bucket,
        eval_tokens=heldout.shape[0] * (heldout.shape[1] - 1),
        heldout=recipe.data.heldout,
        models=Models(**results),
        decode_parity=parity,
        cache_bytes=size,
        tokens_per_second=speed,
        cache_dtype=str(ours.dtype).removeprefix("torch."),
        curves=curves,
        layers=layer_statistics(ours, heldout[0]),
        seconds={f"{c.stage} {c.model}": c.seconds for c in curves}
        | {"evaluate": round(time.perf_counter() - started, 2)},
        trained_tokens={name: tokens for name, (_, tokens, _) in variants.items()},
        hardware=hardware(),
        versions={name: version(name) for name in ("linearize", "torch", "transformers", "peft", "accelerate")}
        | {"python": platform.python_version()},
        recipe=recipe.model_dump(mode="json"),
        seeds={"recipe": recipe.seed},
    )


def hardware() -> str:
    """What this ran on: the GPU's name, or the processor and its threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
