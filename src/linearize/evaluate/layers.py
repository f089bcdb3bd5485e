"""What the converted layers learned: how much each head takes from the recurrence, and how long it remembers."""

import math
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from linearize.convert import decoder, mixers
from linearize.results import Layer

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of half-lives, over the channels of a layer's states


@torch.no_grad()
def layer_statistics(model: PreTrainedModel, ids: Int[Tensor, "T"]) -> list[Layer]:
    """A row for each layer with a recurrence; its weights and decay times are means over the tokens of `ids`, and the
    latter over channels as well."""
    rows: list[Layer] = []
    weights: dict[int, list[float]] = {}

    def watch(mixer: Any) -> Any:
        def hook(recurrence: Any, arguments: tuple[Any, ...]) -> None:
            inputs = recurrence.inputs(recurrence.parts(*arguments[:7])[0])
            log_g = getattr(inputs, "log_g", torch.zeros_like(inputs.k)).double()
            decay = -1 / log_g.mean(dim=(0, 1)).clamp(max=-1e-9)
            half_life: list[float] = []
            if hasattr(inputs, "log_g"):
                half_life = (math.log(2) * decay.flatten().quantile(decay.new_tensor(QUANTILES))).tolist()
            row = Layer(
                layer=mixer.layer_idx,
                mixing=mixer.mixing_weights().tolist(),
                decay_tokens=decay.mean(-1).tolist(),
                half_life=half_life,
                kept=[] if mixer.softmax_heads is None else list(mixer.softmax_heads.chosen),
            )
            rows.append(row)

        return hook

    def watch_mixing(mixer: Any) -> Any:
        def hook(mixing: Any, arguments: tuple[Any, ...]) -> None:
            w = torch.as_tensor(mixing.shares(*arguments[2:])).double()
            weights[mixer.layer_idx] = w.expand(*arguments[0].shape[:3]).mean(dim=(0, 1)).tolist()

        return hook

    recurrent: list[Any] = [mixer for mixer in mixers(model) if mixer.recurrence is not None]
    handles = [mixer.recurrence.register_forward_pre_hook(watch(mixer)) for mixer in recurrent]
    both = [mixer for mixer in recurrent if mixer.mixing is not None]  # and where there is one branch, its weight is 1
    handles += [mixer.mixing.register_forward_pre_hook(watch_mixing(mixer)) for mixer in both]
    try:
        decoder(model)(input_ids=ids[None].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [row.model_copy(update={"mixing": weights.get(row.layer, row.mixing)}) for row in rows]
