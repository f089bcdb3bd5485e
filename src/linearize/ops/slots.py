"""Gated slot attention (GSA, arXiv 2409.07146): softmax over a fixed number of slots, each with a decay of its own.

    α_t = exp(log_g_t),   K̃_t = diag(α_t) K̃_{t-1} + (1 - α_t)ᵀ k_t,   Ṽ_t = diag(α_t) Ṽ_{t-1} + (1 - α_t)ᵀ v_t
    o_t = softmax(q_t K̃_tᵀ) Ṽ_t

Shapes as in `gated_linear`, with log_g `[B, T, KV, M]`, one decay for each of M slots, and state `[B, KV, M, K+V]`: K̃
and Ṽ side by side, in fp32. Scores are not scaled here. A log decay of 0 writes nothing, which is what padding has.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from linearize.ops import gated_linear
from linearize.ops.dispatch import kernel_dtype

Output = tuple[Float[Tensor, "B T H V"], Float[Tensor, "B KV M K+V"]]


def gated_slots(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T KV K"],
    v: Float[Tensor, "B T KV V"],
    log_g: Float[Tensor, "B T KV M"],
    state: Float[Tensor, "B KV M K+V"] | None = None,
    document: Int[Tensor, "B T"] | None = None,
) -> Output:
    """The recurrence by the fastest code there is for these inputs: output in q's dtype, final state in fp32."""
    if state is None:
        size = k.shape[3] + v.shape[3]
        state = q.new_zeros(q.shape[0], *log_g.shape[2:], size, dtype=torch.float32)
    dtype = kernel_dtype(v)
    with torch.autocast(q.device.type, enabled=False):
        if q.shape[1] == 1:
            return step(q, k, v, log_g, state)
        return in_two_passes(q, k, v, log_g, state, document, dtype)


def reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T KV K"],
    v: Float[Tensor, "B T KV V"],
    log_g: Float[Tensor, "B T KV M"],
    state: Float[Tensor, "B KV M K+V"],
    document: Int[Tensor, "B T"] | None = None,
) -> Output:
    """The equation, token by token, in float64: what every other form is tested against."""
    q, k, v, log_g, state = (x.double() for x in (q, k, v, log_g, state))
    groups = q.shape[2] // k.shape[2]
    outputs = []
    for t in range(q.shape[1]):
        if document is not None and t > 0:
            state = state * (document[:, t] == document[:, t - 1])[:, None, None, None]
        decay = log_g[:, t, :, :, None].exp()
        state = decay * state + (1 - decay) * torch.cat([k[:, t], v[:, t]], dim=-1)[:, :, None]
        keys, values = state.split([k.shape[3], v.shape[3]], dim=-1)
        read = (q[:, t].unflatten(1, (-1, groups)) @ keys.mT).softmax(-1)
        outputs.append((read @ values).flatten(1, 2))
    return torch.stack(outputs, dim=1), state


def step(
    q: Float[Tensor, "B 1 H K"],
    k: Float[Tensor, "B 1 KV K"],
    v: Float[Tensor, "B 1 KV V"],
    log_g: Float[Tensor, "B 1 KV M"],
    state: Float[Tensor, "B KV M K+V"],
) -> Output:
    """One token, for decoding."""
    log_g_, new = log_g[:, 0].float()[..., None], torch.cat([k[:, 0].float(), v[:, 0].float()], dim=-1)
    state = log_g_.exp() * state - torch.expm1(log_g_) * new[:, :, None]
    keys, values = state.split([k.shape[3], v.shape[3]], dim=-1)
    read = (q[:, 0].float().unflatten(1, (k.shape[2], -1)) @ keys.mT).softmax(-1)
    return (read @ values).flatten(1, 2)[:, None].to(q.dtype), state


def in_two_passes(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T KV K"],
    v: Float[Tensor, "B T KV V"],
    log_g: Float[Tensor, "B T KV M"],
    state: Float[Tensor, "B KV M K+V"],
    document: Int[Tensor, "B T"] | None = None,
    dtype: torch.dtype | None = None,
) -> Output:
    """Two passes of gated linear attention, a softmax between them; differentiable, T of any length. By kernels only
    with what is written in this dtype.

    `q_t K̃_tᵀ` is linear attention whose values are what a token writes to each slot, `1 - α`, decaying by value
    channel; the softmax of it reads Ṽ, whose keys are `1 - α` and whose decay is by key channel.
    """
    keys, values = state.split([k.shape[3], v.shape[3]], dim=-1)
    write = -torch.expm1(log_g.float())  # 1 - α, without the cancellation near 1
    scores, keys = gated_linear.run(q.float(), k, write, log_g, keys.mT, document, dtype, by_value=True)
    output, values = gated_linear.run(scores.softmax(-1), write, v, log_g, values, document, dtype)
    return output.to(q.dtype), torch.cat([keys.mT, values], dim=-1)
