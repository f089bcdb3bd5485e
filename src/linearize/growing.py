"""Softmax attention in decoding steps: all tokens so far at fixed addresses, with room for more."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.ops.dispatch import HALF, warn_once, why_no_kernel
from linearize.ops.liger import Rope

STEP = 256  # tokens of room at once, or an eighth of those that there are


class Growing:
    """Keys and values of a layer that stays softmax attention, or of those of its heads that do: `[B, KV, room, D]`."""

    def __init__(
        self, heads: tuple[int, int], rotate: Callable[..., tuple[Tensor, Tensor]], scaling: float, like: Tensor
    ) -> None:
        """`heads` are H and KV; `like` `[B, 0, D]` has batch, head size, dtype and device."""
        self.heads, self.rotate, self.scaling = heads, rotate, scaling
        self.keys, self.values = (like[:, None].repeat(1, heads[1], 1, 1) for _ in range(2))

    def reserve(self, room: int) -> None:
        """Room for so many tokens, of which there are none yet; zeros, since a mask does not hide what is no number."""
        B, KV, _, D = self.keys.shape
        self.keys, self.values = (self.keys.new_zeros(B, KV, room, D) for _ in range(2))

    def take(self, keys: Tensor, values: Tensor) -> None:
        """The tokens of a cache, `[B, KV, T, D]`."""
        for kept, given in ((self.keys, keys), (self.values, values)):
            kept[:, :, : given.shape[2]].copy_(given)
            kept[:, :, given.shape[2] :].zero_()  # of a text before this

    def shown(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first tokens, as a cache has them."""
        return self.keys[:, :, :tokens], self.values[:, :, :tokens]

    def holds(self, keys: Tensor | None) -> bool:
        """Whether these are keys as `shown`."""
        return keys is not None and keys.data_ptr() == self.keys.data_ptr()

    def attend(self, heads: Tensor, rope: Rope, time: Tensor, seen: Tensor) -> Tensor:
        """A new token, q, k and v as `heads` `[B, H + 2 KV, D]` before RoPE, comes to `time` `[1]` and sees those that
        are `seen` `[B, room]`: `[B, H, D]`. A group's queries stand as those of its head, which is not repeated."""
        (H, KV), (B, _, D) = self.heads, heads.shape
        q, k, v = heads[:, None].split([H, KV, KV], dim=2)
        q, k = self.rotate(q, k, *(x[:, None] for x in rope), unsqueeze_dim=2)
        self.keys.index_copy_(2, time, k.transpose(1, 2).to(self.keys.dtype))
        self.values.index_copy_(2, time, v.transpose(1, 2).to(self.values.dtype))
        grouped = q.reshape(B, KV, H // KV, D)
        if why_not_in_parts(grouped, self.keys) is None:
            from triton.runtime.errors import OutOfResources

            from linearize.ops.growing_triton import attend

            try:
                with torch.cuda.device_of(grouped):  # kernels run on the current device
                    output = attend(grouped.contiguous(), self.keys, self.values, seen, time, self.scaling)
                return output.reshape(B, H, D)
            except OutOfResources as error:  # before anything ran
                warn_once(f"softmax attention in decoding steps is not divided, slower: {error}")
        output = F.scaled_dot_product_attention(
            grouped, self.keys, self.values, attn_mask=seen[:, None, None], scale=self.scaling
        )
        return output.reshape(B, H, D)


def why_not_in_parts(q: Tensor, keys: Tensor) -> str | None:
    """Why there is no kernel for q `[B, KV, G, D]` and these keys; None if there is."""
    unsupported = {
        f"head size {q.shape[-1]}": q.shape[-1] > 256,
        f"{q.shape[2]} query heads to a key/value head": q.shape[2] > 64,
        f"{q.dtype}": q.dtype not in (*HALF, torch.float32),
        f"{q.dtype} and keys in {keys.dtype}": q.dtype != keys.dtype,
    }
    return why_no_kernel(q, unsupported)


def room_for(tokens: int) -> int:
    """Tokens to reserve for one more than so many."""
    step = max(STEP, tokens // (8 * STEP) * STEP)
    return (tokens // step + 1) * step
