"""The schema of report.json, and the words that its numbers become. `synthetic` is the report of a made-up run."""

import json
import math
from typing import Any

import numpy as np
import pytest

from linearize.errors import LinearizeError
from linearize.report import table
from linearize.results import (
    Curve,
    ModelResult,
    Report,
    byte_size,
    context,
    count,
    findings,
    late_gap_closed,
    percent,
    ratio,
    read,
    verdict,
)

LENGTH, BUCKET = 1024, 16
LATE = {  # late loss, perplexity and agreement of a plausible run
    "teacher": (3.246, 28.5, None, 0),
    "untrained": (3.512, 35.1, 0.78, 0),
    "window_only": (3.448, 32.2, 0.832, 9_830_400),
    "window_equal_memory": (3.371, 30.6, 0.861, 9_830_400),
    "converted": (3.402, 31.1, 0.853, 9_830_400),
    "recurrence_off": (4.31, 71.4, 0.52, 9_830_400),
    "window_off": (7.2, 1900.0, 0.11, 9_830_400),
}
WINDOWS = {"teacher": None, "window_equal_memory": 128}


def synthetic(**changes: Any) -> Report:
    """The report of a made-up run; `changes` replace its fields."""
    rng = np.random.default_rng(0)
    return Report(**(_measured(rng) | _learned(rng) | _made() | changes))


def _measured(rng: np.random.Generator) -> dict[str, Any]:
    x = (np.arange(LENGTH // BUCKET) + 0.5) * BUCKET
    shared = rng.normal(0, 0.035, len(x))
    models = {}
    for name, (late, perplexity, agreement, tokens) in LATE.items():
        shape = 3.246 + 2.1 * np.exp(-x / 28) + 0.35 * np.exp(-x / 260) + shared
        lost = (late - 3.246) * (1 - np.exp(-np.maximum(x - 40, 0) / 170)) + rng.normal(0, 0.006, len(x)) * (tokens > 0)
        losses = (shape + lost).round(4).tolist()
        models[name] = {
            "perplexity": perplexity,
            "early_loss": float(np.mean(losses[:8])),
            "late_loss": late,
            "loss_by_position": losses,
            "agreement": agreement,
            "trained_tokens": tokens,
            "window": WINDOWS.get(name, 64),
        }
    contexts = [1024 * 2**i for i in range(6)]
    return {
        "sequence_length": LENGTH,
        "bucket": BUCKET,
        "eval_tokens": 65_536,
        "heldout": "heldout_wiki",
        "models": models,
        "decode_parity": 3.2e-6,
        "cache_bytes": {
            "teacher": {c: c * 30 * 3 * 64 * 2 * 2 for c in contexts},
            "converted": dict.fromkeys(contexts, 30 * 3 * (64 * 64 * 4 + 68 * 64 * 2 * 2)),
        },
        "tokens_per_second": {
            "teacher": {c: 3900 / (1 + c / 6000) for c in contexts},
            "converted": {c: 3300.0 + 20 * i for i, c in enumerate(contexts)},
        },
    }


def _learned(rng: np.random.Generator) -> dict[str, Any]:
    curves = []
    for stage, end, floor in (("align", 1_966_080, 0.012), ("distill", 7_864_320, 0.21)):
        tokens = np.linspace(16_384, end, 480).astype(int)
        for model, extra in (("converted", 1.0), ("window_only", 1.09)):
            fall = floor * extra * (1 + 1.6 * np.exp(-tokens / end * 7)) * np.exp(rng.normal(0, 0.05, len(tokens)))
            curves.append({"stage": stage, "model": model, "tokens": tokens.tolist(), "loss": fall.tolist()})
    layers = [
        {
            "layer": i,
            "mixing": (0.02 + 0.3 * rng.beta(1.2, 6, 9) * (1 + np.sin(i / 4))).tolist(),
            "decay_tokens": np.exp(rng.normal(4 + i / 15, 1.1, 3)).tolist(),
            "half_life": np.sort(np.exp(rng.normal(3 + i / 15, 1.5, 5))).tolist(),
        }
        for i in range(30)
        if i not in (7, 15, 23)
    ]
    return {"curves": curves, "layers": layers}


def full_suite() -> dict[str, Any]:
    """What the full suite may have measured in such a run."""
    rng = np.random.default_rng(1)
    names = [name for name in LATE if name != "untrained"]
    compared = names[:4]
    late = []
    for length, texts in ((1024, 20), (4096, 15)):
        hard = rng.normal(0, 0.2, texts)
        losses = {name: [(LATE[name][0] + hard + rng.normal(0, 0.02, texts)).tolist()] for name in names}
        closed = {
            "window_only": {"value": 0.23, "low": 0.11, "high": 0.36},
            "window_equal_memory": {"value": -0.25, "low": -0.5, "high": -0.04},
        }
        late.append({"length": length, "articles": list(range(1, texts + 1)), "losses": losses, "closed": closed})
    recall = {
        name: [
            {
                "task": task,
                "distance": d,
                "trials": 64,
                "chance": chance,
                "exact": 0.5 * reach,
                "accuracy": chance + (1 - chance) * reach,
            }
            for task, chance in (
                ("needle", 0.1),
                ("multi_key", 0.1),
                ("multi_value", 0.4),
                ("lookup", 0.1),
                ("copy", 0.0),
            )
            for d in [32 * 2**i for i in range(9)]
            for reach in [1.0 if name == "teacher" else 1 / (1 + (d / (90 + 120 * place)) ** 2)]
        ]
        for place, name in enumerate(names)
    }
    tasks = {
        name: [
            {
                "task": task,
                "metric": "acc",
                "items": 1838,
                "score": 0.67 - place / 200,
                "error": 0.011,
                "difference": None if place == 0 else {"value": -place / 200, "low": -0.02, "high": 0.01},
                "answered": [0.4, 0.2, 0.2, 0.2],
                "right": [0.25] * 4,
            }
            for task in ("piqa", "mmlu")
        ]
        for place, name in enumerate(compared)
    }
    generation = {
        name: {
            "prompts": 50,
            "tokens": 256,
            "greedy_repetition": 0.6,
            "sampled_repetition": 0.03,
            "judged_loss": 3.1 + place / 10,
        }
        for place, name in enumerate(compared)
    }
    short = {name: {"value": -0.004, "low": -0.012, "high": 0.004} for name in compared[1:]}
    return {"late": late, "recall": recall, "tasks": tasks, "short_tasks": short, "generation": generation}


def _made() -> dict[str, Any]:
    return {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "structure": "gla",
        "seconds": {"align": 61.2, "distill": 412.7, "evaluate": 44.0, "decode": 3920.0},
        "trained_tokens": {"align": 1_966_080, "distill": 7_864_320},
        "hardware": "1 × NVIDIA H100 80GB HBM3, 26 CPU cores",
        "versions": {"linearize": "0.1.0", "torch": "2.11.0", "transformers": "5.17.0", "peft": "0.18.1"},
        "recipe": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "mixer": {"structure": "gla", "window": 64},
                   "distill": {"tokens": 7_864_320, "lr": 1e-3, "lora": {"rank": 32, "targets": ["q", "k", "v", "o"]}}},
        "seeds": {"init": 0, "data": 0},
    }  # fmt: skip


def without(report: Report, *names: str) -> Report:
    """The report as if some of its models had not been evaluated."""
    data = report.model_dump()
    data["models"] |= dict.fromkeys(names)
    return Report(**data)


def late(report: Report, **losses: float) -> Report:
    """The report with other late losses."""
    data = report.model_dump()
    for name, loss in losses.items():
        data["models"][name]["late_loss"] = loss
    return Report(**data)


def result(loss: float) -> ModelResult:
    return ModelResult(perplexity=30.0, early_loss=3.8, late_loss=loss, loss_by_position=[3.8, loss])


@pytest.mark.parametrize(
    ("baseline", "ours", "teacher", "closed"),
    [
        (3.5, 3.4, 3.0, 0.2),
        (3.5, 3.5, 3.0, 0.0),
        (3.5, 3.6, 3.0, -0.2),
        (3.5, 3.0, 3.0, 1.0),
        (3.0, 3.4, 3.0, None),
        (2.9, 3.4, 3.0, None),
        (math.nan, 3.4, 3.0, None),
        (3.5, math.inf, 3.0, None),
    ],
)
def test_late_gap_closed(baseline, ours, teacher, closed):
    found = late_gap_closed(result(baseline), result(ours), result(teacher))
    assert found == (None if closed is None else pytest.approx(closed))


def test_no_baseline_no_gap():
    assert late_gap_closed(None, result(3.4), result(3.0)) is None


def test_gap_follows_from_the_models():
    report = synthetic(late_gap_closed={"window_only": 0.99})
    assert report.late_gap_closed.window_only == pytest.approx((3.448 - 3.402) / (3.448 - 3.246))


def test_verdict_when_the_recurrence_helps():
    text = verdict(synthetic())
    assert text.startswith("The recurrent branch closes 23 % of the late gap that the window alone leaves")
    assert "At equal memory it adds nothing: a window of 128 tokens without the recurrence does better" in text
    assert "raises late loss by 0.908 nats" in text
    assert "alone proves nothing" in text
    assert "0.156 nats are left" in text
    assert "not matched" not in text


@pytest.mark.parametrize("loss", [3.448, 3.447, 3.449])
def test_verdict_when_it_adds_nothing(loss):
    first = findings(late(synthetic(), converted=loss))[0]
    assert first.startswith(
        "The recurrent branch adds nothing over the window: late loss is 3.448 with the window only"
    )


def test_verdict_when_it_is_worse():
    assert "adds nothing over the window and is worse than it" in verdict(late(synthetic(), converted=3.6))


def test_verdict_when_equal_memory_is_beaten():
    assert "At equal memory, a window of 128 tokens, it closes 14 %" in verdict(late(synthetic(), converted=3.354))


def test_windows_that_differ_from_layer_to_layer():
    report = late(synthetic(), converted=3.354)
    report.models.window_equal_memory.narrowest_window = 96
    assert "At equal memory, a window of 96 to 128 tokens, it closes 14 %" in verdict(report)
    assert "| 96–128 |" in table(report).replace("  ", "")


def test_verdict_without_baselines():
    text = verdict(without(synthetic(), "window_only", "window_equal_memory", "recurrence_off"))
    assert text.count("not compared") == 2
    assert "adds" in text
    assert "closes" not in text
    assert "switched off" not in text.lower()


def test_verdict_without_a_gap():
    assert verdict(late(synthetic(), window_only=3.2)).startswith("There is no late gap for the recurrent branch")


def test_verdict_of_a_diverged_run():
    assert "diverged" in verdict(late(synthetic(), converted=math.nan))


def test_verdict_names_what_is_not_matched():
    data = synthetic().model_dump()
    data["models"]["window_only"] |= {"trained_tokens": 1000, "window": 32}
    text = verdict(Report(**data))
    assert "not matched: it was trained on 1,000 tokens, the converted model on 9,830,400" in text
    assert "its window is 32, the converted one's 64" in text


@pytest.mark.parametrize(("off", "words"), [(3.402, "changes nothing"), (3.1, "does harm")])
def test_verdict_of_an_unused_recurrence(off, words):
    assert words in verdict(late(synthetic(), recurrence_off=off))


def test_verdict_says_when_little_was_scored():
    assert "Only 4,096 held-out tokens" in verdict(synthetic(eval_tokens=4096))
    assert "noise" not in verdict(synthetic())


def test_percent():
    assert [percent(x) for x in (0.226, -0.034, 1.0, 0.004)] == ["23 %", "−3.4 %", "100 %", "0.4 %"]


def test_numbers():
    assert [count(n) for n in (0, 950, 1500, 999_999, 2.5e6)] == ["0", "950", "1.5k", "1M", "2.5M"]
    assert [context(n) for n in (512, 1000, 1024, 131_072, 1 << 20)] == ["512", "1,000", "1k", "128k", "1M"]
    assert [byte_size(n) for n in (12, 1023, 1024, 3 << 20)] == ["12 B", "1,023 B", "1 KiB", "3 MiB"]
    assert [ratio(n) for n in (1.04, 9.96, 247.6)] == ["1.0×", "10×", "248×"]


def test_round_trip(tmp_path):
    report = late(synthetic(), untrained=math.inf, recurrence_off=math.nan)
    path = tmp_path / "report.json"
    path.write_text(report.model_dump_json(indent=2))
    json.loads(path.read_text(), parse_constant=pytest.fail)  # no NaN or Infinity: plain JSON
    back = read(tmp_path)
    assert back.cache_bytes["teacher"][1024] == report.cache_bytes["teacher"][1024]
    assert back.models.untrained.late_loss == math.inf
    assert back.model_dump_json() == report.model_dump_json() == read(path).model_dump_json()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "JSON"),
        (lambda text: "", "JSON"),
        (lambda text: "[]", "object"),
        (lambda text: text.replace('"hardware"', '"hardwear"'), "hardwear"),
        (lambda text: text.replace('"bucket": 16', '"bucket": 0'), "bucket"),
    ],
)
def test_read_names_the_file_and_the_fault(tmp_path, damage, words):
    path = tmp_path / "report.json"
    path.write_text(damage(synthetic().model_dump_json(indent=2)))
    with pytest.raises(LinearizeError, match=words) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_missing_file(tmp_path):
    with pytest.raises(LinearizeError, match=r"missing\.json"):
        read(tmp_path / "missing.json")


def test_curves_must_be_whole():
    with pytest.raises(ValueError, match="2 token counts but 1 losses"):
        Curve(stage="align", model="converted", tokens=[1, 2], loss=[0.1])
