"""The cache of one converted layer: window, sinks and states, of constant size; heads that stay softmax grow."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from linearize.errors import LinearizeError
from linearize.ops.local import Past

RINGS = ("keys", "values", "valid", "positions", "late_gates")  # what there is of each token in the window
REST = ("sink_keys", "sink_values", "sink_time", "real", "state", "recent")
GROWS = ("grown_keys", "grown_values")  # with the text: of heads that stay softmax attention
_TENSORS = (*RINGS, *REST, *GROWS)


class Memory(NamedTuple):
    """What a recurrence carries to the next token; gates wait where it is behind the window."""

    state: Tensor  # in fp32, or in a cache as its layer's state_dtype says
    recent: Tensor | None = None  # [B, size - 1, 2 KV or H + 2 KV, D]: what a short convolution goes on from
    late_gates: Tensor | None = None  # [B, W, KV, P or 1], in the state's dtype: of the tokens in the window, oldest
    # first; no numbers where there is no token to be taken in


class MixerCacheLayer(CacheLayerMixin):
    """A layer of a transformers `Cache`; tensors are None until the first call, then replaced at every one.

    keys, values `[B, W, KV, D]`: the last W tokens, rotated. valid `[B, W]`: False at padding and before the first.
    positions `[B, W]`: where RoPE had them, int32; None where no key is turned back as it leaves the window.
    sink_keys, sink_values `[B, S, KV, D]`, sink_time `[B, S]`: see `tokens.Tokens`. real `[B]`: real tokens seen.
    state, recent, late_gates: see `Memory`; None where there is none.
    grown_keys, grown_values `[B, heads, tokens, D]`: all there were, of `heads.SoftmaxHeads`, if there are such heads.
    While a `decoder.Decoder` has the cache, it is the `lender`, all of them are parts of its buffers, and the window
    and what waits with it are rings: `settle` makes all as above again.
    """

    is_compileable = False
    is_sliding = None  # neither: a model's own full and sliding layers must not take their masks' sizes from here

    keys: Any
    values: Any
    valid: Any
    positions: Any
    sink_keys: Any
    sink_values: Any
    sink_time: Any
    real: Any
    state: Any
    recent: Any
    late_gates: Any
    grown_keys: Any
    grown_values: Any

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        for name in _TENSORS:
            setattr(self, name, None)
        self.lender: Any = None
        self.seen = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: `store` brings whole tensors."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not for this layer: its keys are of another layout. Raises TypeError."""
        raise TypeError("a converted layer's cache is read with past() and written with store()")

    def settle(self) -> None:
        """Tensors of its own, which nothing else writes to."""
        if self.lender is not None:
            self.lender.release()

    def __getstate__(self) -> dict[str, Any]:
        """For copies."""
        self.settle()
        return self.__dict__

    def past(self) -> Past | None:
        """The tokens before the next one, as `ops.local` takes them."""
        self.settle()
        return Past(self.keys, self.values, self.valid) if self.is_initialized else None

    @property
    def memory(self) -> Memory | None:
        """What the recurrence carries, if there is anything yet."""
        self.settle()
        return None if self.state is None else Memory(self.state, self.recent, self.late_gates)

    def store(
        self,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None,
        positions: Tensor | None,
        window: int,
        sinks: tuple[Tensor, Tensor, Tensor],
        real: Tensor,
        memory: Memory | None,
    ) -> None:
        """Take in new tokens: k, v `[B, T, KV, D]`, valid and positions `[B, T]`; keep the last `window`, and what else
        is given."""
        self.settle()
        B, T = k.shape[:2]
        if valid is None:
            valid = torch.ones(B, T, dtype=torch.bool, device=k.device)
        for name, x in zip(RINGS, (k, v, valid, positions), strict=False):
            if x is None:
                continue
            if self.is_initialized:
                x = torch.cat([getattr(self, name), x], dim=1)
            elif window > T:
                x = torch.nn.functional.pad(x, (*(0, 0) * (x.dim() - 2), window - T, 0))
            setattr(self, name, x[:, x.shape[1] - window :].clone())  # a view would keep the whole prompt alive
        self.sink_keys, self.sink_values, self.sink_time = sinks
        self.real = real
        self.state, self.recent, self.late_gates = memory or (None, None, None)
        self.seen += T
        self.is_initialized = True
        self.batch_size = B

    def grow(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take in k and v `[B, heads, T, D]` of heads that see all tokens; all of them so far."""
        if self.grown_keys is not None:
            k, v = torch.cat([self.grown_keys, k], dim=2), torch.cat([self.grown_values, v], dim=2)
        self.grown_keys, self.grown_values = k, v
        return k, v

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As a full layer would say, since unconverted layers may take their mask from this answer."""
        return self.seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raises unless nothing is to be removed: a recurrence cannot go back."""
        if tokens_to_remove != 0:
            raise LinearizeError(
                "a linearized model's cache cannot be cropped, so assisted decoding does not work, nor can it assist"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows: their indices, or a mask of them."""
        self._map(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Nothing to do: it is small and stays where it is."""

    def prefetch(self) -> None:
        """Nothing to do."""

    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(x.nbytes for name in _TENSORS if (x := getattr(self, name)) is not None)

    def _map(self, function: Any) -> None:
        self.settle()
        for name in _TENSORS:
            if (x := getattr(self, name)) is not None:
                setattr(self, name, function(x))
                self.batch_size = getattr(self, name).shape[0]


def adopt(cache: Cache, layers: list[int], num_layers: int) -> None:
    """Give `cache` a `MixerCacheLayer` at each of the converted `layers`, whatever kind of cache it is."""
    if cache.layer_class_to_replicate is not None:
        cache.layers.extend(DynamicLayer() for _ in range(num_layers - len(cache.layers)))
        cache.layer_class_to_replicate = None
    if any(getattr(layer, "is_compileable", False) for layer in cache.layers):
        raise LinearizeError("a static cache does not fit a linearized model; use the dynamic cache, the default")
    for index in layers:
        if not isinstance(cache.layers[index], MixerCacheLayer):
            if cache.layers[index].is_initialized:
                raise LinearizeError("this cache was filled by an unconverted model; start with a new one")
            cache.layers[index] = MixerCacheLayer()
        cache.layers[index].settle()
    if len(lengths := {layer.get_seq_length() for layer in cache.layers if layer.is_initialized}) > 1:
        raise LinearizeError(
            f"this cache's layers hold different numbers of tokens ({', '.join(map(str, sorted(lengths)))}), "
            "as after a crop that failed; start with a new one"
        )


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors that `cache` holds."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, MixerCacheLayer):
            total += layer.nbytes()
        elif layer.is_initialized:
            total += layer.keys.nbytes + layer.values.nbytes
    return total
