"""The delta rule with a decay for each head (DeltaNet, arXiv 2406.06484; Gated DeltaNet, arXiv 2412.06464).

    S_t = exp(log_g_t) (I - β_t k_tᵀ k_t) S_{t-1} + β_t k_tᵀ v_t,    o_t = q_t S_t

Shapes as in `gated_linear`, with log_g `[B, T, KV, 1]`, at most 0, and beta `[B, T, KV, 1]` in [0, 2]. Keys are of
length 1 (or 0, at padding), so that `I - β kᵀk` has eigenvalues in [-1, 1].
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from linearize.ops.dispatch import MOST, kernel_dtype, warn_once, why_no_kernel
from linearize.ops.gated_linear import Output, continues


def gated_delta(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T KV K"],
    v: Float[Tensor, "B T KV V"],
    log_g: Float[Tensor, "B T KV 1"],
    beta: Float[Tensor, "B T KV 1"],
    state: Float[Tensor, "B KV K V"] | None = None,
    document: Int[Tensor, "B T"] | None = None,
) -> Output:
    """The recurrence by the fastest code there is for these inputs: output in q's dtype, final state in fp32."""
    if state is None:
        state = q.new_zeros(q.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)
    dtype = kernel_dtype(v)
    with torch.autocast(q.device.type, enabled=False):
        if q.shape[1] == 1:
            return step(q, k, v, log_g, beta, state)
        if dtype is not None:
            reason = why_not_fused(q, k, v)
            if reason is None:
                return fused(q, k, v.to(dtype), log_g, beta, state, document)
            warn_once(f"the delta rule runs without its kernels, several times slower: {reason}")
        return chunked(q, k, v, log_g, beta, state, document)


def why_not_fused(
    q: Float[Tensor, "B T H K"], k: Float[Tensor, "B T KV K"], v: Float[Tensor, "B T KV V"]
) -> str | None:
    """What the kernels lack for these inputs; None if nothing."""
    K, V = k.shape[3], v.shape[3]
    unsupported = {
        f"keys of size {K} and values of size {V}": max(K, V) > 128 and (K > 256 or V > 64),
        f"{q.numel()} numbers in q": q.numel() >= 2**31,
        f"{q.shape[0]} sequences of {q.shape[2]} heads": q.shape[0] * q.shape[2] > MOST,
    }
    return why_no_kernel(q, unsupported)


def fused(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T KV K"],
    v: Float[Tensor, "B T KV V"],
    log_g: Float[Tensor, "B T KV 1"],
    beta: Float[Tensor, "B T KV 1"],
    state: Float[Tensor, "B KV K V"],
    document: Int[Tensor, "B T"] | None = None,
) -> Output:
    """By the Triton kernels, which `why_not_fused` must have nothing against: operands of products in bf16, unless v is
    in fp32, where q, k and their gradients may be."""
    from linearize.ops import gated_delta_fused

    return gated_delta_fused.run(q, k, v, log_g, beta, state, document)


def reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T KV K"],
    v: Float[Tensor, "B T KV V"],
    log_g: Float[Tensor, "B T KV 1"],
    beta: Float[Tensor, "B T KV 1"],
    state: Float[Tensor, "B KV K V"],
    document: Int[Tensor, "B T"] | None = None,
) -> Output:
    """The equation, token by token, in float64: what every other form is tested against."""
    q, k, v, log_g, beta, state = (x.double() for x in (q, k, v, log_g, beta, state))
    groups = q.shape[2] // k.shape[2]
    outputs = []
    for t in range(q.shape[1]):
        if document is not None and t > 0:
            state = state * (document[:, t] == document[:, t - 1])[:, None, None, None]
        state = log_g[:, t, :, :, None].exp() * state
        key = k[:, t, :, :, None]
        state = state + beta[:, t, :, :, None] * key * (v[:, t, :, None] - key.mT @ state)
        outputs.append((q[:, t].unflatten(1, (-1, groups)) @ state).flatten(1, 2))
    return torch.stack(outputs, dim=1), state


def step(
    q: Float[Tensor, "B 1 H K"],
    k: Float[Tensor, "B 1 KV K"],
    v: Float[Tensor, "B 1 KV V"],
    log_g: Float[Tensor, "B 1 KV 1"],
    beta: Float[Tensor, "B 1 KV 1"],
    state: Float[Tensor, "B KV K V"],
) -> Output:
    """One token, for decoding."""
    queries, key = q[:, 0].float().unflatten(1, (k.shape[2], -1)), k[:, 0].float()[..., None]
    state = log_g[:, 0].float().exp()[..., None] * state
    written = beta[:, 0].float()[..., None] * (v[:, 0].float()[:, :, None] - key.mT @ state)
    state = state + key * written
    return (queries @ state).flatten(1, 2)[:, None].to(q.dtype), state


def chunked(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T KV K"],
    v: Float[Tensor, "B T KV V"],
    log_g: Float[Tensor, "B T KV 1"],
    beta: Float[Tensor, "B T KV 1"],
    state: Float[Tensor, "B KV K V"],
    document: Int[Tensor, "B T"] | None = None,
    chunk: int = 64,
) -> Output:
    """Inside a chunk the state is `exp(b_t) S + Σ_j exp(b_t - b_j) k_jᵀ u_j`, b the sum of log_g since its start, and
    what the tokens really write, u, solves a unit lower-triangular system:

        u_t + β_t Σ_{j<t} exp(b_t - b_j) (k_t·k_j) u_j = β_t v_t - β_t exp(b_t) k_t S

    solved for all chunks at once, for the two terms on the right apart, since S is known only when its chunk's turn
    comes. Differentiable, T of any length.
    """
    B, T, H, K = q.shape
    KV, V = k.shape[2], v.shape[3]
    chunk = min(chunk, T)
    pad = -T % chunk

    def chunks(x: Tensor) -> Tensor:  # [B, T, KV*G, D] -> [B*KV, chunks, chunk, G, D]; a padded token changes nothing
        x = F.pad(x.unflatten(2, (KV, -1)).transpose(1, 2).flatten(0, 1), (0, 0, 0, 0, 0, pad))
        return x.unflatten(1, (-1, chunk))

    q_, k_, v_, beta_ = chunks(q.float()), *(chunks(x.float())[:, :, :, 0] for x in (k, v, beta))
    b = chunks(log_g.double())[:, :, :, 0, 0].cumsum(-1)  # differences of large sums are taken below
    seen = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    reaches = ends = torch.ones_like(b, dtype=torch.bool)  # tokens that S reaches, and those that reach the chunk's end
    if document is not None:
        document = torch.cat([document, document[:, -1:].expand(-1, pad)], dim=1).repeat_interleave(KV, dim=0)
        number = document.unflatten(1, (-1, chunk))
        seen = seen & (number[..., :, None] == number[..., None, :])
        reaches, ends = continues(document, chunk), number == number[:, :, -1:]
    decay = (b[..., :, None] - b[..., None, :]).masked_fill(~seen, -torch.inf).exp().float()
    from_start = (b.exp() * reaches).float()[..., None]
    to_end = ((b[..., -1:] - b).exp() * ends).float()[..., None]

    system = (beta_ * (k_ @ k_.mT) * decay).tril(-1)
    right = torch.cat([beta_ * v_, beta_ * from_start * k_], dim=-1)
    written, erased = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split([V, K], -1)
    keys = k_ * to_end
    states, current = [], state.flatten(0, 1)
    for n in range(k_.shape[1]):
        states.append(current)
        current = from_start[:, n, -1:] * current + keys[:, n].mT @ (written[:, n] - erased[:, n] @ current)
    before = torch.stack(states, dim=1)
    written = written - erased @ before
    scores = (q_.flatten(2, 3) @ k_.mT).unflatten(2, (chunk, -1)) * decay[:, :, :, None]
    output = scores.flatten(2, 3) @ written + (q_ * from_start[..., None]).flatten(2, 3) @ before
    output = output.unflatten(2, (chunk, -1)).flatten(1, 2)[:, :T].unflatten(0, (B, KV))
    return output.transpose(1, 2).reshape(B, T, H, V).to(q.dtype), current.unflatten(0, (B, KV))
