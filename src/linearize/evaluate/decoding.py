"""Step-by-step decoding: is it the same model, how fast is it, and what does it keep in memory?"""

import time

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from linearize.cache import cache_bytes


@torch.no_grad()
def decode_parity(model: PreTrainedModel, ids: Int[Tensor, "T"], steps: int = 32) -> float:
    """‖decoded - full‖ / ‖full‖ over the logits of the last `steps` tokens: all before them in one call, then one by
    one, against a single full forward; of a short text, over its second half."""
    steps = min(steps, len(ids) // 2)
    ids = ids.to(model.device)[None]
    full = model(ids, use_cache=False, logits_to_keep=steps).logits.double()
    cache = DynamicCache(config=model.config)
    model(ids[:, :-steps], past_key_values=cache, logits_to_keep=1)
    parts = [model(ids[:, [t]], past_key_values=cache).logits for t in range(ids.shape[1] - steps, ids.shape[1])]
    return ((torch.cat(parts, 1).double() - full).norm() / full.norm()).item()


@torch.no_grad()
def decode_speed(
    model: PreTrainedModel, contexts: tuple[int, ...], steps: int, label: str = "", chunk: int = 1024
) -> tuple[dict[int, float], dict[int, int]]:
    """Tokens per second (batch 1, median of `steps` greedy steps) and cache bytes after each of `contexts` tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, max(contexts)), generator=generator).to(model.device)
    cache, seen = DynamicCache(config=model.config), 0
    speed, size = {}, {}
    for context in tqdm(sorted(contexts), desc=f"decode {label}", unit="context", delay=1):
        if seen > context:  # by the steps of the one before
            cache, seen = DynamicCache(config=model.config), 0
        while seen < context:
            part = ids[:, seen : min(seen + chunk, context)]
            logits = model(part, past_key_values=cache, logits_to_keep=1).logits
            seen += part.shape[1]
        size[context] = cache_bytes(cache)
        seconds = []
        logits = model(logits[:, -1:].argmax(-1), past_key_values=cache).logits  # the first makes what the others use
        seen += 1
        for _ in range(min(steps, max(1, context // 2))):
            start = _now(model.device)
            logits = model(logits[:, -1:].argmax(-1), past_key_values=cache).logits
            seconds.append(_now(model.device) - start)
            seen += 1
        speed[context] = 1 / sorted(seconds)[len(seconds) // 2]
    return speed, size


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
