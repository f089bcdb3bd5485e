"""Causal third-order attention by features (Kronecker attention, arXiv 2310.04064), with the second value 1.

A query weighs pairs of tokens, `Σ_f q_tf k2_if k3_jf` for tokens i and j up to t, and reads the value of the first:

    S_t = S_{t-1} + k2_tᵀ v_t,   z2_t = z2_{t-1} + k2_t,   z3_t = z3_{t-1} + k3_t
    o_t = q_t (S_t ∘ z3_tᵀ 1) / q_t·(z2_t ∘ z3_t)

Shapes as in `gated_linear`, without a decay; q `[B, T, H, F]` and k `[B, T, KV, 2F]`, k2 and k3 side by side, are
features, of which the first is the constant 1; state `[B, KV, F, V+2]`: S, z2 and z3 side by side, in fp32. Padding is
shut out by a k of 0.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from linearize.ops.gated_linear import gated_linear

Output = tuple[Float[Tensor, "B T H V"], Float[Tensor, "B KV F V+2"]]
LEAST = 0.25  # mean weight of a pair; see `guarded`
EPSILON = 1e-6  # in place of the sum of weights before the first token


def kronecker(
    q: Float[Tensor, "B T H F"],
    k: Float[Tensor, "B T KV 2*F"],
    v: Float[Tensor, "B T KV V"],
    state: Float[Tensor, "B KV F V+2"] | None = None,
    document: Int[Tensor, "B T"] | None = None,
) -> Output:
    """The equation through `gated_linear`, one token or many: output in q's dtype, final state in fp32.

    `q_t (S_t ∘ z3_tᵀ 1) = (q_t ∘ z3_t) S_t`: since the second value is 1, this is linear attention with queries that
    know all of z3, and no state has to be formed for each token. Another value channel, always 1, sums the weights.
    """
    size = q.shape[-1]
    if state is None:
        state = q.new_zeros(q.shape[0], k.shape[2], size, v.shape[3] + 2, dtype=torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        k2, k3 = k.float().split(size, dim=-1)
        z3 = running_sum(k3, state[..., -1], document)
        queries = (q.float().unflatten(2, (k.shape[2], -1)) * z3[:, :, :, None]).flatten(2, 3)
        values = torch.cat([v.float(), torch.ones_like(v[..., :1], dtype=torch.float32)], dim=-1)
        kept = torch.zeros_like(values[..., :1])  # a log decay
        sums, last = gated_linear(queries, k2, values, kept, state[..., :-1], document)
        z2 = running_sum(k2[..., :1], state[..., :1, -2], document)
        weights = guarded(sums[..., -1:], (z2 * z3[..., :1]).repeat_interleave(q.shape[2] // k.shape[2], dim=2))
        return (sums[..., :-1] / weights).to(q.dtype), torch.cat([last, z3[:, -1, :, :, None]], dim=-1)


def reference(
    q: Float[Tensor, "B T H F"],
    k: Float[Tensor, "B T KV 2*F"],
    v: Float[Tensor, "B T KV V"],
    state: Float[Tensor, "B KV F V+2"],
    document: Int[Tensor, "B T"] | None = None,
) -> Output:
    """The equation, token by token, in float64: what `kronecker` is tested against."""
    q, k, v, state = (x.double() for x in (q, k, v, state))
    groups, V = q.shape[2] // k.shape[2], v.shape[3]
    k2, k3 = (x[..., None] for x in k.chunk(2, dim=-1))
    outputs = []
    for t in range(q.shape[1]):
        if document is not None and t > 0:
            state = state * (document[:, t] == document[:, t - 1])[:, None, None, None]
        state = state + torch.cat([k2[:, t] * v[:, t, :, None], k2[:, t], k3[:, t]], dim=-1)
        S, z2, z3 = state.split([V, 1, 1], dim=-1)
        queries = q[:, t].unflatten(1, (-1, groups))
        weights = guarded(queries @ (z2 * z3), (z2 * z3)[:, :, :1])
        outputs.append((queries @ (S * z3) / weights).flatten(1, 2))
    return torch.stack(outputs, dim=1), state


def guarded(weights: Tensor, pairs: Tensor) -> Tensor:
    """A sum of weights that may be divided by: at least `LEAST` for each of the pairs that it is a sum over.

    Features stand for `exp(x)` by `1 + x + ...`, which may be negative; up to degree 2 it is at least 1/2, so that
    only rounding is caught. The product of the two first features' sums counts the pairs.
    """
    return torch.maximum(weights, (LEAST * pairs).clamp(min=EPSILON))


def running_sum(
    x: Float[Tensor, "B T KV F"], state: Float[Tensor, "B KV F"], document: Int[Tensor, "B T"] | None
) -> Float[Tensor, "B T KV F"]:
    """The sum of a document's tokens so far, and of the state in the first one, summed in float64, in fp32."""
    sums = x.double().cumsum(1)
    if document is None:
        return (sums + state[:, None]).float()
    start = torch.searchsorted(document.contiguous(), document.contiguous())  # the first token of each token's document
    before = torch.cat([-state[:, None].double(), sums], dim=1)
    return (sums - before.gather(1, start[:, :, None, None].expand_as(sums))).float()
