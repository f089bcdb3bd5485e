"""Gated linear attention with a decay for each key channel (GLA, arXiv 2312.06635; Liger, arXiv 2503.01496, eq. 6).

    S_t = diag(exp(log_g_t)) S_{t-1} + k_tᵀ v_t,    o_t = q_t S_t

Shapes, everywhere: q `[B, T, H, K]`; k `[B, T, KV, K]`; v `[B, T, KV, V]`; log_g as k, or `[B, T, KV, 1]` for one decay
a head (Mamba2, RetNet), at most 0; state `[B, KV, K, V]` in fp32; document `[B, T]`, which rises by one where a packed
document begins: state never crosses that line. H is a multiple of KV: the query heads of a group share one state, and
nothing is repeated for them.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from linearize.ops.dispatch import MOST, kernel_dtype, may_look, warn_once, why_no_kernel

# for one product to serve a whole chunk in fp32: of its summed log decay, which keys are multiplied by the inverse of,
LIMIT = -30.0
# and of each token's, since its gradient is what a token's own read, which does not decay, leaves when it cancels
STEEPEST = -2.0
PART = 32  # chunks at a time on a CPU, so that what is made of them stays in its cache

Output = tuple[Float[Tensor, "B T H V"], Float[Tensor, "B KV K V"]]


def gated_linear(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T KV K"],
    v: Float[Tensor, "B T KV V"],
    log_g: Float[Tensor, "B T KV #K"],
    state: Float[Tensor, "B KV K V"] | None = None,
    document: Int[Tensor, "B T"] | None = None,
) -> Output:
    """The recurrence by the fastest code there is for these inputs: output in q's dtype, final state in fp32."""
    if state is None:
        state = q.new_zeros(q.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)
    dtype = kernel_dtype(v)
    with torch.autocast(q.device.type, enabled=False):  # sums over the whole text do not fit into bf16
        return run(q, k, v, log_g, state, document, dtype)


def run(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T KV K"],
    v: Float[Tensor, "B T KV V"],
    log_g: Float[Tensor, "B T KV #K"] | Float[Tensor, "B T KV #V"],
    state: Float[Tensor, "B KV K V"],
    document: Int[Tensor, "B T"] | None,
    dtype: torch.dtype | None,
    by_value: bool = False,
) -> Output:
    """As `gated_linear`, from a given state, with a decay for each value channel if `by_value`; by kernels only with v
    in this dtype."""
    if q.shape[1] == 1 and not by_value:
        return step(q, k, v, log_g, state)
    if dtype is not None:
        if (reason := why_not_fused(q, k, v)) is None:
            return fused(q, k, v.to(dtype), log_g, state, document, by_value)
        warn_once(f"gated linear attention runs without its kernels, several times slower: {reason}")
    return (chunked_by_value if by_value else chunked)(q, k, v, log_g, state, document)


def why_not_fused(
    q: Float[Tensor, "B T H K"], k: Float[Tensor, "B T KV K"], v: Float[Tensor, "B T KV V"]
) -> str | None:
    """What the kernels lack for these inputs; None if nothing."""
    K, V = k.shape[3], v.shape[3]
    unsupported = {
        f"keys of size {K} and values of size {V}": max(K, V) > 128,
        f"{q.numel()} numbers in q": q.numel() >= 2**31,
        f"{q.shape[1]} tokens": q.shape[1] > 64 * MOST,
        f"{q.shape[0]} sequences of {q.shape[2]} heads": q.shape[0] * q.shape[2] > MOST,
    }
    return why_no_kernel(q, unsupported)


def fused(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T KV K"],
    v: Float[Tensor, "B T KV V"],
    log_g: Float[Tensor, "B T KV #K"] | Float[Tensor, "B T KV #V"],
    state: Float[Tensor, "B KV K V"],
    document: Int[Tensor, "B T"] | None = None,
    by_value: bool = False,
) -> Output:
    """By the Triton kernels, which `why_not_fused` must have nothing against: operands of products in bf16, unless v is
    in fp32, where q, k and their gradients may be. With a decay for each value channel if `by_value`."""
    from linearize.ops import gated_linear_fused

    return gated_linear_fused.run(q, k, v, log_g, state, document, by_value)


def reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T KV K"],
    v: Float[Tensor, "B T KV V"],
    log_g: Float[Tensor, "B T KV #K"] | Float[Tensor, "B T KV #V"],
    state: Float[Tensor, "B KV K V"],
    document: Int[Tensor, "B T"] | None = None,
    by_value: bool = False,
) -> Output:
    """The equation, token by token, in float64: what every other form is tested against. With a decay for each value
    channel if `by_value`."""
    q, k, v, log_g, state = (x.double() for x in (q, k, v, log_g, state))
    groups = q.shape[2] // k.shape[2]
    decay = log_g.exp().unsqueeze(-2 if by_value else -1)
    outputs = []
    for t in range(q.shape[1]):
        if document is not None and t > 0:
            state = state * (document[:, t] == document[:, t - 1])[:, None, None, None]
        state = decay[:, t] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t].unflatten(1, (-1, groups)) @ state).flatten(1, 2))
    return torch.stack(outputs, dim=1), state


def step(
    q: Float[Tensor, "B 1 H K"],
    k: Float[Tensor, "B 1 KV K"],
    v: Float[Tensor, "B 1 KV V"],
    log_g: Float[Tensor, "B 1 KV #K"],
    state: Float[Tensor, "B KV K V"],
) -> Output:
    """One token, for decoding."""
    q_, k_, v_ = q[:, 0].float().unflatten(1, (k.shape[2], -1)), k[:, 0].float(), v[:, 0].float()
    state = log_g[:, 0].float().exp()[..., None] * state + k_[..., None] * v_[:, :, None]
    return (q_ @ state).flatten(1, 2)[:, None].to(q.dtype), state


def chunked(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T KV K"],
    v: Float[Tensor, "B T KV V"],
    log_g: Float[Tensor, "B T KV #K"],
    state: Float[Tensor, "B KV K V"],
    document: Int[Tensor, "B T"] | None = None,
    chunk: int = 64,
) -> Output:
    """Matrix products inside chunks, a state between them; differentiable, T of any length.

    Inside a chunk, blocks merge pairwise: 1 + 1 tokens, 2 + 2, 4 + 4 ... At each merge a query of the right block
    sees the keys of the left one through `exp(log_g summed from the boundary to the query)` times `exp(log_g summed
    from the key to the boundary)`. Both exponents are at most 0 whatever the gates are, and both sums grow with the
    blocks, so nothing overflows, nothing is clamped and no large sums are subtracted. On a CPU, chunks that decay by
    little are read by one product in place of these merges.
    """
    return _chunked(q, k, v, log_g, state, document, chunk, by_value=False)


def chunked_by_value(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T KV K"],
    v: Float[Tensor, "B T KV V"],
    log_g: Float[Tensor, "B T KV #V"],
    state: Float[Tensor, "B KV K V"],
    document: Int[Tensor, "B T"] | None = None,
    chunk: int = 64,
) -> Output:
    """As `chunked`, with a decay for each value channel: `S_t = S_{t-1} diag(exp(log_g_t)) + k_tᵀ v_t`.

    The same merges, or product; the two factors are on the values of the left block and on what the right one reads.
    """
    return _chunked(q, k, v, log_g, state, document, chunk, by_value=True)


def with_bonus(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T KV K"],
    v: Float[Tensor, "B T KV V"],
    log_g: Float[Tensor, "B T KV #K"],
    bonus: Float[Tensor, "KV K"],
    state: Float[Tensor, "B KV K V"] | None = None,
    document: Int[Tensor, "B T"] | None = None,
) -> Output:
    """RWKV6's read (arXiv 2404.05892): `o_t = q_t (S_{t-1} + diag(bonus) k_tᵀ v_t)`, the state as in `gated_linear`.

    `S_{t-1}`, before the decay of token t, is what `gated_linear` reads at t when keys, values and decays come one
    token late; the last token is then written on its own.
    """
    if state is None:
        state = q.new_zeros(q.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)
    dtype = kernel_dtype(v)
    with torch.autocast(q.device.type, enabled=False):
        q_, k_, v_, log_g_ = (x.float() for x in (q, k, v, log_g))
        late_k, late_v, late_g = (F.pad(x, (0, 0, 0, 0, 1, -1)) for x in (k_, v_, log_g_))
        if document is not None:  # a document begins with an empty state: the token before it is of another one
            same = document == torch.cat([document[:, :1], document[:, :-1]], dim=1)
            late_k = late_k * same[:, :, None, None]
        output, state = run(q_, late_k, late_v, late_g, state, document, dtype)
        grouped = q_.unflatten(2, (k.shape[2], -1))
        weight = (grouped * (bonus.float() * k_)[:, :, :, None]).sum(-1, keepdim=True)
        output = output + (weight * v_[:, :, :, None]).flatten(2, 3)
        state = log_g_[:, -1].exp()[..., None] * state + k_[:, -1, :, :, None] * v_[:, -1, :, None]
    return output.to(q.dtype), state


def reference_with_bonus(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T KV K"],
    v: Float[Tensor, "B T KV V"],
    log_g: Float[Tensor, "B T KV #K"],
    bonus: Float[Tensor, "KV K"],
    state: Float[Tensor, "B KV K V"],
    document: Int[Tensor, "B T"] | None = None,
) -> Output:
    """The equation of `with_bonus`, token by token, in float64."""
    q, k, v, log_g, bonus, state = (x.double() for x in (q, k, v, log_g, bonus, state))
    groups = q.shape[2] // k.shape[2]
    outputs = []
    for t in range(q.shape[1]):
        if document is not None and t > 0:
            state = state * (document[:, t] == document[:, t - 1])[:, None, None, None]
        written = k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t].unflatten(1, (-1, groups)) @ (state + bonus[..., None] * written)).flatten(1, 2))
        state = log_g[:, t].exp()[..., None] * state + written
    return torch.stack(outputs, dim=1), state


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, state: Tensor, document: Tensor | None, chunk: int, by_value: bool
) -> tuple[Tensor, Tensor]:
    """`chunked`, or `chunked_by_value`. Below, N is B * KV, M all chunks, C a chunk's tokens, G a group's heads."""
    B, T, H, _ = q.shape
    KV, V = k.shape[2], v.shape[3]
    while chunk // 2 >= T:
        chunk //= 2
    pad = -T % chunk

    def chunks(x: Tensor) -> Tensor:  # [B, T, KV*G, D] -> [N, chunks, C, G, D]; a padded token changes nothing
        x = x.float().unflatten(2, (KV, -1)).transpose(1, 2).flatten(0, 1)
        return F.pad(x, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, chunk))

    q_, k_, v_, g_ = chunks(q), *(chunks(x)[:, :, :, 0] for x in (k, v, log_g))
    packed: tuple[Tensor, ...] = ()
    if document is not None:
        document = torch.cat([document, document[:, -1:].expand(-1, pad)], dim=1).repeat_interleave(KV, dim=0)
        packed = document.unflatten(1, (-1, chunk)), continues(document, chunk)
    before, state = _between_chunks(k_, v_, g_, state.flatten(0, 1), packed, by_value)
    output = _read(*(x.flatten(0, 1) for x in (q_, k_, v_, g_, before, *packed)), by_value=by_value)
    output = output.view(B, KV, T + pad, -1, V)[:, :, :T].transpose(1, 2).reshape(B, T, H, V)
    return output.to(q.dtype), state.unflatten(0, (B, KV))


def _between_chunks(
    k: Tensor, v: Tensor, log_g: Tensor, state: Tensor, packed: tuple[Tensor, ...], by_value: bool
) -> tuple[Tensor, Tensor]:
    """The state before every chunk `[N, chunks, K, V]` and the one after the last `[N, K, V]`."""
    # what decays a token after it, summed up from the chunk's end: nothing is subtracted
    to_end = F.pad(log_g, (0, 0, -1, 1)).flip(2).cumsum(2).flip(2).exp()
    decay = log_g.sum(2).exp()
    k, v = (k, v * to_end) if by_value else (k * to_end, v)
    if packed:
        number, reaches = packed
        k = k * (number == number[:, :, -1:])[..., None]
        decay = decay * reaches[:, :, -1:]
    written, decay = k.mT @ v, decay.unsqueeze(-2 if by_value else -1)
    states = []
    for n in range(k.shape[1]):
        states.append(state)
        state = decay[:, n] * state + written[:, n]
    return torch.stack(states, dim=1), state


def _read(*inputs: Tensor, by_value: bool) -> Tensor:
    """What tokens read from their own chunk and from the state before it `[M, C, G, V]`; inputs as `_at_once` has."""
    if not may_look(inputs[0]):
        return _by_merges(*inputs, by_value=by_value)
    reads = []
    for part in zip(*(x.split(PART) for x in inputs), strict=True):
        log_g = part[3]
        mild = ((log_g.sum(1) > LIMIT) & (log_g.amin(1) > STEEPEST)).all()
        reads.append((_at_once if mild else _by_merges)(*part, by_value=by_value))
    return torch.cat(reads)


def _at_once(
    q: Float[Tensor, "M C G K"],
    k: Float[Tensor, "M C K"],
    v: Float[Tensor, "M C V"],
    log_g: Float[Tensor, "M C #K"] | Float[Tensor, "M C #V"],
    before: Float[Tensor, "M K V"],
    number: Int[Tensor, "M C"] | None = None,
    reaches: Bool[Tensor, "M C"] | None = None,
    *,
    by_value: bool,
) -> Float[Tensor, "M C G V"]:
    """In mild chunks: queries decay from the chunk's beginning on, keys by the inverse, and one product has all scores.

    `before` is the state before the chunk; of packed documents, `number` says each token's, and `reaches` whether
    the state is of the same one."""
    chunk, groups = q.shape[1:3]
    to_query = log_g.cumsum(1)
    decay = to_query.exp()[:, :, None]
    if by_value:
        v = v * (-to_query).exp()
    else:
        q, k = q * decay, k * (-to_query).exp()
    unseen = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)[:, None]
    if number is not None:
        unseen = unseen | (number[:, :, None, None] != number[:, None, None])
    scores = (q.flatten(1, 2) @ k.mT).unflatten(1, (chunk, groups)).masked_fill_(unseen, 0.0).flatten(1, 2)
    if reaches is not None:
        q = q * reaches[:, :, None, None]
    output = torch.baddbmm(q.flatten(1, 2) @ before, scores, v).unflatten(1, (chunk, groups))
    return output * decay if by_value else output


def _by_merges(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor,
    before: Tensor,
    number: Tensor | None = None,
    reaches: Tensor | None = None,
    *,
    by_value: bool,
) -> Tensor:
    """As `_at_once`, whatever decays: blocks merge pairwise, as `chunked` says."""
    chunk, groups = q.shape[1:3]
    output = (q * k[:, :, None]).sum(-1, keepdim=True) * v[:, :, None]
    to_query, to_end = log_g, torch.zeros_like(log_g)
    size = 1
    while size < chunk:
        pairs = (-1, 2, size)
        left_to_query, right_to_query = to_query.unflatten(1, pairs).unbind(2)
        left_to_end, right_to_end = to_end.unflatten(1, pairs).unbind(2)
        right_q, left_k, left_v = (x.unflatten(1, pairs)[:, :, i] for x, i in ((q, 1), (k, 0), (v, 0)))
        to_boundary, from_boundary = left_to_end.exp(), right_to_query.exp()[:, :, :, None]
        if by_value:
            left_v = left_v * to_boundary
        else:
            right_q, left_k = right_q * from_boundary, left_k * to_boundary
        scores = (right_q.flatten(2, 3) @ left_k.mT).unflatten(2, (size, -1))
        if number is not None:
            left, right = number.unflatten(1, pairs).unbind(2)
            scores = scores * (right[:, :, :, None, None] == left[:, :, None, None, :])
        read = (scores.flatten(2, 3) @ left_v).unflatten(2, (size, -1))
        if by_value:
            read = read * from_boundary
        left_out, right_out = output.unflatten(1, pairs).unbind(2)
        output = torch.stack([left_out, right_out + read], dim=2).flatten(1, 3)
        to_query = torch.stack([left_to_query, right_to_query + left_to_query[:, :, -1:]], dim=2).flatten(1, 3)
        to_end = torch.stack([left_to_end + right_to_query[:, :, -1:], right_to_end], dim=2).flatten(1, 3)
        size *= 2
    decay = to_query.exp()[:, :, None]
    if reaches is not None:
        q = q * reaches[:, :, None, None]
    read = ((q if by_value else q * decay).flatten(1, 2) @ before).unflatten(1, (chunk, groups))
    return output + (read * decay if by_value else read)


def continues(document: Tensor, chunk: int) -> Tensor:
    """Whether a token `[N, T/chunk, chunk]` belongs to the document of the last token before its chunk."""
    chunks = document.unflatten(1, (-1, chunk))
    before = torch.cat([document[:, :1], chunks[:, :-1, -1]], dim=1)
    return chunks == before[:, :, None]
