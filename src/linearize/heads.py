"""Heads of a converted layer that stay softmax attention, as DuoAttention's retrieval heads do (arXiv 2410.10819)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linearize.errors import LinearizeError
from linearize.families import rotation_of
from linearize.ranges import numbers, spans

Heads = Mapping[int, tuple[int, ...]]  # key/value heads by layer


class SoftmaxHeads(nn.Module):
    """The key/value heads `chosen` of one layer, each with its group of query heads.

    `split` takes them out of all heads, in the model's order, and `join` puts both outputs together again.
    """

    queries: Tensor
    other_queries: Tensor
    keys: Tensor
    other_keys: Tensor
    order: Tensor
    of_step: Tensor
    others_of_step: Tensor

    def __init__(self, chosen: Iterable[int], attention: Any) -> None:
        super().__init__()
        self.chosen, self.config = tuple(chosen), attention.config
        self.num_heads, self.num_key_value_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads  # transformers' functions look for it
        self.scaling, self.is_causal, self.rotate = attention.scaling, True, rotation_of(attention)
        self.place(None)

    def place(self, device: torch.device | None) -> None:
        """Make the indices of heads, on a device; made on the meta device they have no values, and are made again."""
        groups = torch.arange(self.num_heads, device=device).view(self.num_key_value_heads, -1)
        chosen = list(self.chosen)
        others = [head for head in range(self.num_key_value_heads) if head not in chosen]
        queries, other_queries = groups[chosen].flatten(), groups[others].flatten()
        self.register_buffer("queries", queries, persistent=False)
        self.register_buffer("other_queries", other_queries, persistent=False)
        self.register_buffer("keys", torch.tensor(chosen, device=device), persistent=False)
        self.register_buffer("other_keys", torch.tensor(others, device=device), persistent=False)
        self.register_buffer("order", torch.cat([other_queries, queries]).argsort(), persistent=False)
        H, KV = self.num_heads, self.num_key_value_heads  # of one token, q, k and v follow one another
        for name, own in (("of_step", (queries, self.keys)), ("others_of_step", (other_queries, self.other_keys))):
            self.register_buffer(name, torch.cat([own[0], H + own[1], H + KV + own[1]]), persistent=False)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[B, T, H, D]`, or keys or values `[B, T, KV, D]`, to the other heads' and these."""
        whole = x.shape[2] == self.num_heads
        others, own = (self.other_queries, self.queries) if whole else (self.other_keys, self.keys)
        return x.index_select(2, others), x.index_select(2, own)

    def split_step(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """One token's q, k and v, `[B, H + 2 KV, D]`, as `split` does."""
        return heads.index_select(1, self.others_of_step), heads.index_select(1, self.of_step)

    def join(self, others: Tensor, own: Tensor) -> Tensor:
        """Outputs of the other heads and of these to `[B, T, H, D]`."""
        return torch.cat([others, own.to(others.dtype)], dim=2).index_select(2, self.order)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], mask: Any, cache: Any, **others: Any
    ) -> Tensor:
        """Of these heads, before RoPE; `mask` and what `others` there are as transformers gives them to the model's own
        layers, `cache` a `MixerCacheLayer` or None."""
        q, k = self.rotate(q, k, *rope, unsqueeze_dim=2)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if cache is not None:
            k, v = cache.grow(k, v)
        name = self.config._attn_implementation
        attend: Any = ALL_ATTENTION_FUNCTIONS["sdpa" if name == "eager" else name]  # both take eager's masks
        return attend(self, q, k, v, mask, scaling=self.scaling, dropout=0.0, **others)[0]

    def extra_repr(self) -> str:
        """Which, in `print(model)`."""
        return f"key/value heads {', '.join(map(str, self.chosen))}"


def parse_heads(text: str, layers: int, heads: int) -> Heads:
    """What "8/0,17/1-2" means: key/value heads by layer, of a model of so many layers and key/value heads."""
    found: dict[int, set[int]] = {}
    try:
        for part in str(text).split(","):
            layer, _, span = part.partition("/")
            found.setdefault(int(layer), set()).update(numbers(span, heads))
    except ValueError as error:
        raise LinearizeError(f"softmax_heads {text!r} is not valid; give layer/head as in '8/0,17/1-2'") from error
    for index, chosen in found.items():
        if not 0 <= index < layers:
            raise LinearizeError(f"softmax_heads {text!r} names layer {index}; this model's layers are 0-{layers - 1}")
        if max(chosen) >= heads:
            raise LinearizeError(
                f"softmax_heads {text!r} names key/value heads of layer {index} that there are not; this model's are "
                f"0-{heads - 1}"
            )
    return {index: tuple(sorted(found[index])) for index in sorted(found)}


def heads_text(heads: Heads) -> str:
    """As `parse_heads` reads them."""
    return ",".join(f"{layer}/{span}" for layer, chosen in sorted(heads.items()) for span in spans(chosen).split(","))
