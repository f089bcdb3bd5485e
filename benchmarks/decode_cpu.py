"""Decoding on a CPU: tokens per second of SmolLM2-135M's shape, converted and as it was, after a prompt.

    python -m benchmarks.decode_cpu --out docs/results/decode_cpu.json

Random weights in fp32, batch 1, greedy steps through transformers' forward; the original with its static and with its
dynamic cache, and with its static one and matrix products shared among cores as the converted model's are. The sides
take turns, so that whatever else the machine does meets all of them. Beside them the default's matrix products alone,
as its step takes them and by `F.linear`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from benchmarks.decode import random_model
from benchmarks.results import provenance, write
from linearize import convert, recipe
from linearize.cache import cache_bytes
from linearize.decoding import _decoders
from linearize.ops.products import product

SHARED = "static, products shared among cores"


def main() -> None:
    """Read the prompt on every side, then let them take turns, and write the raw times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8, help="of each side in each turn")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--layers", type=int, default=30)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    shape = {"num_hidden_layers": arguments.layers}
    original, plain, default = (random_model("SmolLM2-135M", torch.float32, **shape) for _ in range(3))
    convert(plain, structure="gla")
    convert(default, **recipe.read("default").mixer.root)
    room = arguments.context + arguments.steps * (arguments.turns + 1)
    sides: dict[str, tuple[PreTrainedModel, Cache]] = {
        "gla": (plain, DynamicCache(config=plain.config)),
        "default": (default, DynamicCache(config=default.config)),
        "static": (original, StaticCache(config=original.config, max_cache_len=room)),
        "dynamic": (original, DynamicCache(config=original.config)),
        SHARED: (original, StaticCache(config=original.config, max_cache_len=room)),
    }
    wide, narrow = (torch.randn(1, getattr(original.config, name)) for name in ("intermediate_size", "hidden_size"))
    tokens = {name: read(*side, arguments.context) for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    alone: dict[str, list[float]] = {"in blocks": [], "by F.linear": []}
    for turn in range(arguments.turns + 1):
        for name, side in sides.items():
            with patch.object(nn.Linear, "forward", linear_in_blocks) if name == SHARED else nullcontext():
                tokens[name], taken = steps(*side, tokens[name], arguments.steps)
            seconds[name] += taken if turn > 0 else []  # the first warms up
        for name, run in (("in blocks", product), ("by F.linear", lambda x, linear: F.linear(x, *linear))):
            alone[name] += products(default, run, wide, narrow) if turn > 0 else []
    rows: list[dict[str, Any]] = []
    for name, (_, cache) in sides.items():
        rows.append({"side": name, "seconds": seconds[name], "cache_bytes": size(cache)})
        speed = 1 / statistics.median(seconds[name])
        print(f"{name:10} {speed:6.2f} tokens/s, cache {rows[-1]['cache_bytes'] / 2**20:6.1f} MiB", flush=True)
    for name, taken in alone.items():
        print(f"products alone {name}: {1000 * statistics.median(taken):.1f} ms", flush=True)
    write(arguments.out, {**provenance(), "context": arguments.context, "rows": rows, "products": alone})


def linear_in_blocks(self: nn.Linear, x: Tensor) -> Tensor:
    """What the converted model's layers do, for `nn.Linear.forward`."""
    return product(x.flatten(0, -2), (self.weight, self.bias)).unflatten(0, x.shape[:-1])


@torch.no_grad()
def read(model: PreTrainedModel, cache: Cache, context: int) -> Tensor:
    """The first token after a random prompt."""
    ids = torch.randint(0, 49152, (1, context), generator=torch.Generator().manual_seed(0))
    for part in ids.split(1024, dim=1):
        logits = model(part, past_key_values=cache, logits_to_keep=1).logits
    return logits[:, -1:].argmax(-1)


@torch.no_grad()
def steps(model: PreTrainedModel, cache: Cache, token: Tensor, count: int) -> tuple[Tensor, list[float]]:
    """The token after `count` greedy steps, and the seconds of each."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        token = model(token, past_key_values=cache).logits.argmax(-1)
        seconds.append(time.perf_counter() - start)
    return token, seconds


@torch.no_grad()
def products(model: PreTrainedModel, run: Callable[..., Tensor], wide: Tensor, narrow: Tensor) -> list[float]:
    """Seconds of all matrix products of a step, of random inputs `[1, intermediate]` and `[1, hidden]`."""
    layers: Any = _decoders[model][1].layers
    start = time.perf_counter()
    for layer in layers:
        for linear in (layer.qkv, layer.output, layer.gate_up):
            run(narrow, linear)
        run(wide, layer.down)
    run(narrow, (model.get_output_embeddings().weight, None))
    return [time.perf_counter() - start]


def size(cache: Cache) -> int:
    """Bytes of what a cache holds, of a static one all that it reserves."""
    if isinstance(cache, StaticCache):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return cache_bytes(cache)


if __name__ == "__main__":
    main()
