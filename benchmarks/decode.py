"""Decoding on a GPU: a converted model's step under a CUDA graph, beside the original's with a static cache.

    python -m benchmarks.decode --out docs/results/decode_h100.json --seconds 500
    python -m benchmarks.decode --structure default --out default.json --seconds 500
    python -m benchmarks.decode --smoke --out smoke.json       # right? 120 s; of one structure, --structure default
    python -m benchmarks.decode --prompt --out docs/results/prompt_h100.json --seconds 200
    python -m benchmarks.decode --tune --out tune.json --seconds 90   # the default's, then gla's

Random weights in bf16, in the shapes of real models; caches are filled with random values up to the context, not by
reading a prompt. What is timed is the replay of a graph of one step, by device events, both sides in one process. The
original runs by transformers' forward and `StaticCache`, SDPA, in up to three forms, of which the fastest counts:
"static", as transformers runs it; "unmasked", the same without the mask, which lets SDPA take FlashAttention on
unrepeated heads and is right here because every place of the cache is filled; "compiled", that one after torch.compile.
A result file that is there already is gone on from.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache

from benchmarks.results import provenance, write
from benchmarks.timing import copy_speed, graphed, times
from linearize import convert, revert
from linearize.config import MixerConfig, MixerSettings
from linearize.convert import choose_layers
from linearize.decoder import Decoder
from linearize.heads import parse_heads
from linearize.inspect import recurrent_bytes
from linearize.recipe import read

SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "Llama-3.2-1B": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "SmolLM2-135M": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
DEFAULT = dict(read("default").mixer.root)  # the recipe's
CONVERTED: dict[str, dict[str, Any]] = {  # what the converted side may be
    "gla": {"structure": "gla"},
    "default": DEFAULT,
    "gated_deltanet_gated": DEFAULT | {"readout": "gated"},
    "hybrid": DEFAULT | {"softmax_every": 10},  # every tenth layer stays softmax attention
    "heads": DEFAULT | {"softmax_heads": read("hybrid").softmax_heads},  # the recipe's, of SmolLM2-135M
}
ANY_MODEL = [name for name, settings in CONVERTED.items() if "softmax_heads" not in settings]
BATCHES, CONTEXTS = (1, 16, 64, 256), (1024, 4096, 16384, 65536)
TELLING = ((1, 16384), (16, 16384), (1, 1024), (256, 16384))  # batch and context; first, for every model
REST = (
    *((16, context) for context in (1024, 2048, 4096, 8192, 32768, 65536)),  # the paper's batch
    *((batch, context) for batch in BATCHES for context in CONTEXTS if batch != 16),
)
COMPILED = {"none": (), "telling": TELLING[:2], "all": (*TELLING, *REST)}
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def main() -> None:
    """Do what the arguments say, and write what there is after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=500, help="begin nothing after this long")
    parser.add_argument("--model", choices=SHAPES, action="append", help="only this one")
    parser.add_argument(
        "--structure", choices=CONVERTED, help="of the converted side, one for each file; else gla, of a prompt default"
    )
    parser.add_argument("--smoke", action="store_true", help="only see whether it is right")
    parser.add_argument("--prompt", action="store_true", help="read a prompt of a million tokens in chunks")
    parser.add_argument("--tokens", type=int, default=2**20, help="of that prompt")
    parser.add_argument("--tune", action="store_true", help="time the step's kernel with other launch settings")
    parser.add_argument(
        "--compile", choices=COMPILED, default="telling", help="where the original is timed in its compiled form, too"
    )
    arguments = parser.parse_args()
    stop = time.perf_counter() + arguments.seconds
    torch.manual_seed(0)
    if arguments.smoke and arguments.structure == "heads":
        parser.error("--smoke is of a tiny model, which has none of the heads of --structure heads")
    elif arguments.smoke or arguments.tune:
        from benchmarks import decode_checks as checks

        structures = [arguments.structure] if arguments.structure else ANY_MODEL
        checks.smoke(arguments.out, structures, stop) if arguments.smoke else checks.tune(arguments.out, stop)
    elif arguments.structure == "heads" and arguments.model != ["SmolLM2-135M"]:
        parser.error("--structure heads names heads of SmolLM2-135M; give --model SmolLM2-135M")
    elif arguments.prompt:
        from benchmarks.prompt import read_prompt

        name, structure = (arguments.model or ["SmolLM2-135M"])[0], arguments.structure or "default"
        read_prompt(arguments.out, name, arguments.tokens, stop, structure=structure)
    else:
        arguments.structure = arguments.structure or "gla"
        compare(arguments.out, arguments.model or [name for name in SHAPES if name != "tiny"], stop, arguments)


# --- models and caches ---


def random_model(name: str, dtype: torch.dtype = torch.bfloat16, **others: Any) -> PreTrainedModel:
    """Of that shape, but for what is `others`; made on the device in its dtype: no copy in fp32."""
    config = LlamaConfig(**SHAPES[name] | others, max_position_embeddings=131072)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def weight_bytes(model: PreTrainedModel, read: bool = False) -> int:
    """Of all parameters, or only of those that a step reads: of an input embedding of its own it reads some rows."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    untied = model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    return total - model.get_input_embeddings().weight.nbytes * (read and untied)


def key_value_bytes(config: Any, tokens: int) -> int:
    """Of one row's keys and values in bf16."""
    return 4 * tokens * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def layers_of(config: Any, settings: dict[str, Any]) -> list[tuple[MixerConfig, int]]:
    """The settings of every layer that is converted, and how many of its key/value heads are."""
    kept = {"softmax_every", "softmax_heads"}
    mixer = MixerSettings({name: value for name, value in settings.items() if name not in kept})
    count, KV = config.num_hidden_layers, config.num_key_value_heads
    names = settings.get("softmax_heads")
    heads = parse_heads(names, count, KV) if names else {}
    layers = choose_layers("all", settings.get("softmax_every"), count)
    return [(mixer.layer(index, count), KV - len(heads.get(index, ()))) for index in layers]


def window_bytes(config: Any, settings: dict[str, Any]) -> int:
    """Of one row's windows and sinks in bf16."""
    return sum(4 * (layer.window + layer.sinks) * KV * config.head_dim for layer, KV in layers_of(config, settings))


def growing_bytes(config: Any, settings: dict[str, Any], tokens: int) -> int:
    """Of one row's keys and values of all tokens in layers and heads that are not converted, in bf16."""
    heads = config.num_hidden_layers * config.num_key_value_heads
    kept = heads - sum(KV for _, KV in layers_of(config, settings))
    return key_value_bytes(config, tokens) * kept // heads


def state_bytes(config: Any, settings: dict[str, Any]) -> int:
    """Of one row's states."""
    groups = config.num_attention_heads // config.num_key_value_heads
    return sum(recurrent_bytes(layer, groups * KV, KV, config.head_dim) for layer, KV in layers_of(config, settings))


def timed(call: Callable[[], Any], budget: float = 0.6) -> list[float]:
    """Seconds of each of as many calls as there are in `budget` seconds."""
    if GPU:
        return times(call, budget)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def freed() -> int:
    """Bytes that are allocated after all garbage has gone."""
    gc.collect()
    if not GPU:
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak() -> int:
    """The most bytes that were allocated since `freed`."""
    return torch.cuda.max_memory_allocated() if GPU else 0


# --- the comparison ---


def compare(out: Path, names: list[str], stop: float, arguments: argparse.Namespace) -> None:
    """Every model at the telling rows first, then the others."""
    results: dict[str, Any] = {"structure": arguments.structure, "rows": []}
    if out.exists():
        results = json.loads(out.read_text(encoding="utf-8"))
        if (name := results.get("structure", "gla")) != arguments.structure:
            raise SystemExit(f"{out} is of structure {name}; give {arguments.structure} a file of its own")
    rows: list[dict[str, Any]] = results["rows"]
    copy = results["copy_bytes_per_second"] = copy_speed() if GPU else 1e10
    print(f"copy {copy / 1e12:.2f} TB/s", flush=True)
    for wanted in (TELLING, REST):
        for name in names:
            done = {(row["batch"], row["context"]) for row in rows if row["model"] == name}
            todo = [place for place in dict.fromkeys(wanted) if place not in done]
            if not todo or time.perf_counter() > stop:
                continue
            start = time.perf_counter()
            model = random_model(name)
            print(f"{name}: made in {time.perf_counter() - start:.1f} s", flush=True)
            settings = CONVERTED[arguments.structure]
            ours = converted_steps(model, settings, todo, stop)
            for batch, context in todo:
                if time.perf_counter() > stop or (batch, context) not in ours:
                    print(f"no time for {name}, batch {batch}, context {context}", flush=True)
                    continue
                compiled = (batch, context) in COMPILED[arguments.compile]
                row = {"model": name, "batch": batch, "context": context, **sizes(model, settings, batch, context)}
                row["linearized"] = ours[batch, context]
                row["original"] = original_steps(model, batch, context, compiled)
                rows.append(row)
                print(describe(row, copy), flush=True)
                write(out, {**provenance(), **results})
            del model
            freed()
    print("done" if time.perf_counter() < stop else "time is up; the same command goes on from here")


def sizes(model: PreTrainedModel, settings: dict[str, Any], batch: int, context: int) -> dict[str, int]:
    """Bytes: of weights, all and those read, of keys and values over the context and over the window, and of states."""
    config = model.config
    return {
        "weights": weight_bytes(model),
        "weights_read": weight_bytes(model, read=True),
        "key_value": batch * key_value_bytes(config, context),
        "window": batch * window_bytes(config, settings),
        "states": batch * (state_bytes(config, settings) + growing_bytes(config, settings, context)),
    }


def converted_steps(
    model: PreTrainedModel, settings: dict[str, Any], places: list[tuple[int, int]], stop: float
) -> dict[tuple[int, int], Any]:
    """Raw times of the converted model's step, by batch and context; the model is as before afterwards."""
    convert(model, **settings)
    found: dict[tuple[int, int], Any] = {}
    for batch in dict.fromkeys(batch for batch, _ in places):
        if time.perf_counter() > stop:
            break
        before = freed()
        try:
            start = time.perf_counter()
            decoder = Decoder(model, batch)
            capture = time.perf_counter() - start
            for context in (context for b, context in places if b == batch):
                fill(decoder, context)
                seconds = timed(decoder.run if decoder.graph is None else decoder.graph.replay)
                found[batch, context] = {"seconds": seconds, "bytes": peak() - before, "capture_seconds": capture}
            del decoder
        except Exception as error:
            failed: dict[str, Any] = {"seconds": [], "bytes": None, "error": said(error)}
            found |= {(b, context): failed for b, context in places if b == batch}
    freed()
    revert(model)
    return found


def fill(decoder: Decoder, context: int) -> None:
    """Random values, as after `context` tokens."""
    if decoder.grows:
        decoder.reserve(context)
        decoder.seen.fill_(True)
        for kept in decoder.growing:
            if kept is not None:
                kept.keys.normal_()
                kept.values.normal_()
    decoder.position.fill_(context)
    decoder.clock.time.fill_(context)
    decoder.clock.real.fill_(context)
    decoder.clock.sink_time.copy_(torch.arange(decoder.clock.sink_time.shape[1], device=DEVICE))
    for moment in decoder.moments:
        for buffer in (moment.held.keys, moment.held.values, moment.held.state):
            buffer.normal_()
        moment.held.valid.fill_(1)


@torch.no_grad()
def original_steps(model: PreTrainedModel, batch: int, context: int, compiled: bool) -> dict[str, Any]:
    """Raw times of the original's step in each form."""
    found: dict[str, Any] = {}
    for form in ("unmasked", "static", *["compiled"] * compiled):
        before = freed()
        start = time.perf_counter()
        try:
            call = original_step(model, form, batch, context)
            capture = time.perf_counter() - start
            found[form] = {"seconds": timed(call), "bytes": peak() - before, "capture_seconds": capture}
        except torch.OutOfMemoryError:
            found[form] = {"seconds": [], "bytes": None, "error": "out of memory"}
        except Exception as error:
            found[form] = {"seconds": [], "bytes": None, "error": said(error)}
        call = None  # type: ignore[assignment]
        if form == "compiled":
            torch.compiler.reset()
    freed()
    return found


def original_step(model: PreTrainedModel, form: str, batch: int, context: int) -> Callable[[], Any]:
    """The replay of the original's step over a static cache of `context` places, all filled."""
    cache = StaticCache(config=model.config, max_cache_len=context)
    ids = torch.zeros(batch, 1, dtype=torch.long, device=DEVICE)
    position = torch.full((batch, 1), context - 1, device=DEVICE)
    model(input_ids=ids, position_ids=position, past_key_values=cache)  # makes its tensors
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context - 100)  # every call moves it on, and there are fewer
    forward: Any = model.forward
    if form == "compiled":
        forward = torch.compile(model.forward, dynamic=False)
    unmasked = patch("transformers.models.llama.modeling_llama.create_causal_mask", lambda *_, **__: None)

    def call() -> Tensor:
        return forward(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True).logits

    if form == "static":
        return graphed(call)
    with unmasked:
        call()
        return graphed(call)


def said(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


# --- what a row says ---


def fastest(row: dict[str, Any]) -> tuple[str, float] | None:
    """The original's best form and the median of its times."""
    forms = {form: statistics.median(x["seconds"]) for form, x in row["original"].items() if x["seconds"]}
    return min(forms.items(), key=lambda item: item[1]) if forms else None


def ratio(row: dict[str, Any]) -> float:
    """R: (weights + keys and values) over (weights + states + window), in bytes."""
    return (row["weights"] + row["key_value"]) / (row["weights"] + row["states"] + row["window"])


def floor(row: dict[str, Any], copy: float) -> float:
    """Seconds to move the weights that a step reads, and states and window, at the copy speed."""
    return (row["weights_read"] + row["states"] + row["window"]) / copy


def describe(row: dict[str, Any], copy: float) -> str:
    """A line for the terminal."""
    what = f"{row['model']:13} batch {row['batch']:3} context {row['context']:6,}"
    if not row["linearized"]["seconds"]:
        return f"{what} failed: {row['linearized']['error']}"
    ours = statistics.median(row["linearized"]["seconds"])
    low = floor(row, copy)
    line = f"{what} ours {1000 * ours:7.3f} ms (floor {1000 * low:6.3f}, {low / ours:4.0%})"
    forms = ", ".join(
        f"{form} {1000 * statistics.median(x['seconds']):.3f}" if x["seconds"] else f"{form} {x['error'][:60]}"
        for form, x in row["original"].items()
    )
    best = fastest(row)
    if best is not None:
        speed = (row["weights_read"] + row["key_value"]) / best[1] / 1e9
        line += f"  original {1000 * best[1]:7.3f} ms ({speed:,.0f} GB/s): {best[1] / ours:5.2f}x"
    return f"{line}, R {ratio(row):.2f}, goal {1 + 0.75 * (ratio(row) - 1):.2f}  [{forms}]"


if __name__ == "__main__":
    main()
