"""A prompt of a million tokens, read in chunks, in memory that does not grow: `benchmarks.decode --prompt`."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.decode import CONVERTED, DEVICE, GPU, freed, peak, random_model
from benchmarks.results import provenance, write
from linearize import convert
from linearize.cache import cache_bytes


@torch.no_grad()
def read_prompt(out: Path, name: str, tokens: int, stop: float, chunk: int = 8192, structure: str = "default") -> None:
    """Read `tokens` random tokens in chunks: speed, memory and the cache's bytes as it goes; and the state that other
    chunks give."""
    model = convert(random_model(name), **CONVERTED[structure] | {"mixing_weight": 0.3})
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=DEVICE)
    short = ids[:, : min(tokens, 20000)]
    states = [prefilled(model, short, size)[0].layers[-1].state.double() for size in (chunk, 1000, len(short[0]))]
    agreement = [((x - states[0]).norm() / states[0].norm()).item() for x in states[1:]]
    print(f"states of other chunks differ by {agreement}", flush=True)
    states.clear()
    freed()
    rows: list[dict[str, Any]] = []

    def note(cache: DynamicCache, seen: int, seconds: float) -> bool:
        rows.append({"tokens": seen, "seconds": seconds, "peak_bytes": peak(), "cache_bytes": cache_bytes(cache)})
        if math.log2(seen / chunk).is_integer():
            print(rows[-1], flush=True)
        return time.perf_counter() < stop

    cache, logits = prefilled(model, ids, chunk, note)
    start = time.perf_counter()
    for _ in range(64):
        logits = model(logits[:, -1:].argmax(-1), past_key_values=cache).logits
    if GPU:
        torch.cuda.synchronize()
    after = {"decoded": 64, "seconds": time.perf_counter() - start, "finite": bool(logits.isfinite().all())}
    print(rows[-1], after, flush=True)
    told = {"model": name, "structure": structure, "chunk": chunk, "other_chunks": agreement}
    write(out, {**provenance(), **told, "rows": rows, **after})


def prefilled(
    model: PreTrainedModel, ids: Tensor, chunk: int, note: Callable[[DynamicCache, int, float], bool] | None = None
) -> tuple[DynamicCache, Tensor]:
    """The cache after `ids`, read in chunks, and the last logits; `note` says whether to go on."""
    cache, start = DynamicCache(config=model.config), time.perf_counter()
    for begin in range(0, ids.shape[1], chunk):
        part = ids[:, begin : begin + chunk]
        logits = model(part, past_key_values=cache, logits_to_keep=1).logits
        if note is not None:
            if GPU:
                torch.cuda.synchronize()
            if not note(cache, begin + part.shape[1], time.perf_counter() - start):
                break
    return cache, logits
