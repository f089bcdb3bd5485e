"""Softmax attention over the last W tokens and the attention sinks (StreamingLLM, arXiv 2309.17453).

Shapes: q `[B, T, H, D]`; k `[B, T, KV, D]`; v `[B, T, KV, V]`, H a multiple of KV and nothing repeated; rotated
already. Token t sees tokens t-W+1 .. t, exactly W of them, or fewer where `first` says so, and every sink before these.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

NEVER = 1 << 40  # the time of a sink that is not there yet


class Scoring(NamedTuple):
    """How queries and keys become weights."""

    scale: float  # of their products
    normalizer: bool = False  # whether the logarithm of the sum of exponentials is wanted as well
    softcap: float | None = None  # c · tanh(score / c) is what counts of a scaled score
    null_logits: Float[Tensor, "H"] | None = None  # one more score for each query head, of a value that is nothing
    power: int | None = None  # of softplus attention with re-weighting, which has a scale of its own; None: softmax


class Past(NamedTuple):
    """The W tokens before the first of the call, as the cache keeps them."""

    k: Float[Tensor, "B W KV D"]
    v: Float[Tensor, "B W KV V"]
    valid: Bool[Tensor, "B W"]  # False: padding, or before the first token


class Sinks(NamedTuple):
    """The first real tokens of each document."""

    k: Float[Tensor, "B M KV D"]
    v: Float[Tensor, "B M KV V"]
    time: Int[Tensor, "B M"]  # index from the first token of the call, negative in the past
    document: Int[Tensor, "B M"] | None = None
    q: Float[Tensor, "B T H D"] | None = None  # queries for the sinks alone, where their distance is clamped


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    scoring: Scoring,
    sinks: Sinks,
    past: Past | None = None,
    valid: Tensor | None = None,
    document: Tensor | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The whole score matrix, in float64: what `local_attention` is tested against."""
    B, T, H, _ = q.shape
    groups = H // k.shape[2]
    t = torch.arange(T)
    keys, values = k.double(), v.double()
    times, real = t.expand(B, T), torch.ones(B, T, dtype=torch.bool) if valid is None else valid
    if past is not None:
        keys, values = torch.cat([past.k.double(), keys], 1), torch.cat([past.v.double(), values], 1)
        times = torch.cat([torch.arange(-past.k.shape[1], 0).expand(B, -1), times], 1)
        real = torch.cat([past.valid, real], 1)
    age = t[:, None] - times[:, None]
    first = t - window + 1 if first is None else first
    seen = (age >= 0) & (times[:, None] >= first[..., None]) & real[:, None] | (age == 0)
    sink_seen = sinks.time[:, None] < first[..., None]
    if document is not None and sinks.document is not None:
        seen = seen & (document[:, :, None] == document[:, None])
        sink_seen = sink_seen & (document[:, :, None] == sinks.document[:, None])
    sink_q = q if sinks.q is None else sinks.q
    if scoring.power is not None:
        q, keys, sink_q, sink_k = (F.normalize(x.double(), dim=-1) for x in (q, keys, sink_q, sinks.k))
        sinks = sinks._replace(k=sink_k)
    scores = torch.cat(
        [
            torch.einsum("bthd,bshd->bhts", x.double(), y.double().repeat_interleave(groups, 2))
            for x, y in ((q, keys), (sink_q, sinks.k))
        ],
        dim=-1,
    )
    mask = torch.cat([seen, sink_seen], dim=-1)
    values = torch.cat([values, sinks.v.double()], 1).repeat_interleave(groups, 2)
    if scoring.power is not None:
        weights = _reweighted_reference(scores * math.log(q.shape[-1]), mask[:, None], scoring.power)
        return torch.einsum("bhts,bshd->bthd", weights, values), torch.zeros(B, T, H)
    scores = scores * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    scores = scores.masked_fill(~mask[:, None], -torch.inf)
    if scoring.null_logits is not None:
        scores = torch.cat([scores, scoring.null_logits.double().view(1, H, 1, 1).expand(B, H, T, 1)], dim=-1)
        values = F.pad(values, (0, 0, 0, 0, 0, 1))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), values), scores.logsumexp(-1).transpose(1, 2)


def _reweighted_reference(scores: Tensor, mask: Tensor, power: int) -> Tensor:
    """LSSAR row by row: A = softplus(log n · score), of sum 1; then relu(n A - o)^power, of sum 1, where not all 0."""
    weights = torch.zeros_like(scores)
    mask = mask.expand_as(scores)
    for row in range(scores.flatten(0, -2).shape[0]):
        seen = mask.flatten(0, -2)[row]
        n = int(seen.sum())
        a = F.softplus(math.log(n) * scores.flatten(0, -2)[row][seen])
        a = a / a.sum()
        sharp = (n * a - float(n > 3)).relu()
        if sharp.max() > 0:
            a = (sharp / sharp.max()) ** power
        weights.flatten(0, -2)[row, seen] = a / a.sum()
    return weights


def local_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T KV D"],
    v: Float[Tensor, "B T KV V"],
    window: int,
    scoring: Scoring,
    sinks: Sinks,
    past: Past | None = None,
    valid: Bool[Tensor, "B T"] | None = None,
    document: Int[Tensor, "B T"] | None = None,
    first: Int[Tensor, "#B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H"] | None]:
    """By the fastest code there is for these inputs; time and memory grow with T·W. The output and, where `scoring`
    wants it, the logarithm of its normaliser.

    `valid` is False at padding, which nothing sees (a padded query sees itself, so that no row is empty);
    `document` `[B, T]` separates packed documents, and goes with no past; `first` is the time of the oldest token that
    a query sees, t-W+1 or later: of its block, for attention in blocks.
    """
    if scoring.power is not None:
        q, k, scoring = F.normalize(q, dim=-1), F.normalize(k, dim=-1), scoring._replace(scale=math.log(q.shape[-1]))
        sink_q = None if sinks.q is None else F.normalize(sinks.q, dim=-1)
        sinks = sinks._replace(k=F.normalize(sinks.k, dim=-1), q=sink_q)
        past = past and past._replace(k=F.normalize(past.k, dim=-1))
    if sinks.q is not None:  # one product scores both: sinks live in dimensions of their own
        q, k = torch.cat([q, sinks.q], dim=-1), F.pad(k, (0, k.shape[-1]))
        sinks = sinks._replace(k=F.pad(sinks.k, (sinks.k.shape[-1], 0)))
        past = past and past._replace(k=F.pad(past.k, (0, past.k.shape[-1])))
    if q.shape[1] == 1 and past is not None:
        return step(q, k, v, window, scoring, sinks, past, first)
    return blocked(q, k, v, window, scoring, sinks, past, valid, document, first)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
    """Plain attention: q `[B, KV, N, R, D]` over k, v `[B, KV, N, S, D]`, R queries of one group of heads, those of one
    token side by side; mask `[B or 1, 1, N, R, S]`. Output and normaliser `[B, KV, N, R]`."""
    if not scoring.normalizer and scoring.power is None and scoring.softcap is None and scoring.null_logits is None:
        q_, k_, v_ = (x.flatten(0, 2)[:, None] for x in (q, k, v))
        mask = mask.expand(*q.shape[:3], -1, -1).flatten(0, 2)[:, None]
        output = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask, scale=scoring.scale)
        return output.view(*q.shape[:-1], -1), None
    scores = scoring.scale * (q @ k.mT).float()
    if scoring.power is not None:
        return reweighted(scores, mask, scoring.power).to(v.dtype) @ v, None
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if scoring.null_logits is not None:  # a group's heads follow one another in the rows of every token
        null = scoring.null_logits.float().unflatten(0, (q.shape[1], -1))
        null = null.repeat(1, q.shape[3] // null.shape[1])[:, None, :, None]
        scores = torch.cat([scores, null.expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : v.shape[-2]]
    return weights.to(v.dtype) @ v, scores.logsumexp(-1) if scoring.normalizer else None


def reweighted(scores: Tensor, mask: Tensor, power: int) -> Tensor:
    """Softplus attention with re-weighting (LSSAR): `a = softplus(log n · scores)` over the n keys that are seen, of
    sum 1, then `relu(n a - 1)^power`, of sum 1 again; the 1 is left out for n up to 3.

    A row is divided by its largest value before the power, and stays as it was where re-weighting leaves nothing.
    """
    count = mask.sum(-1, keepdim=True)
    weights = F.softplus(count.log() * scores).masked_fill(~mask, 0)
    weights = weights / weights.sum(-1, keepdim=True)
    sharp = (count * weights - (count > 3).float()).relu()
    largest = sharp.amax(-1, keepdim=True)
    sharp = torch.where(largest > 0, (sharp / largest.clamp(min=1e-30)) ** power, weights)
    return sharp / sharp.sum(-1, keepdim=True)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    scoring: Scoring,
    sinks: Sinks,
    past: Past,
    first: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """One token, for decoding."""
    keys = torch.cat([sinks.k, past.k[:, 1:], k], dim=1)
    values = torch.cat([sinks.v, past.v[:, 1:], v], dim=1)
    here, before = past.valid.new_ones(q.shape[0], 1), past.valid[:, 1:]
    first = torch.full_like(here, 1 - window, dtype=torch.long) if first is None else first
    before = before & (torch.arange(1 - window, 0, device=q.device) >= first)
    mask = torch.cat([(sinks.time < first).expand(q.shape[0], -1), before, here], dim=1)
    output, normalizer = attend(
        q[:, 0].unflatten(1, (k.shape[2], -1))[:, :, None],  # a group's queries as the rows of one attention
        keys.transpose(1, 2)[:, :, None],
        values.transpose(1, 2)[:, :, None],
        mask[:, None, None, None],
        scoring,
    )
    return output.flatten(1, 3)[:, None], None if normalizer is None else normalizer.flatten(1)[:, None]


def blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    scoring: Scoring,
    sinks: Sinks,
    past: Past | None,
    valid: Tensor | None,
    document: Tensor | None,
    first: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """In blocks of W queries, each against its own and the W keys before it."""
    B, T, H, _ = q.shape
    KV = k.shape[2]
    block = min(window, T)
    pad = -T % block
    blocks = (T + pad) // block
    queries = F.pad(q, (0, 0, 0, 0, 0, pad)).unflatten(1, (blocks, block)).unflatten(3, (KV, -1))
    queries = queries.permute(0, 3, 1, 2, 4, 5).flatten(3, 4)  # [B, KV, blocks, block*G, D]
    keys = _banded(k, past and past.k, sinks.k, window, block, pad)
    values = _banded(v, past and past.v, sinks.v, window, block, pad)
    mask = _mask(B, T, window, block, sinks, past, valid, document, first, q.device)
    mask = mask[:, None].repeat_interleave(H // KV, dim=3)
    output, normalizer = attend(queries, keys, values, mask, scoring)

    def by_token(x: Tensor) -> Tensor:  # [B, KV, blocks, block*G, ...] -> [B, T, H, ...]
        x = x.unflatten(3, (block, -1)).flatten(2, 3)[:, :, :T]
        return x.transpose(1, 2).flatten(2, 3)

    return by_token(output), None if normalizer is None else by_token(normalizer)


def _banded(x: Tensor, past: Tensor | None, sinks: Tensor, window: int, block: int, pad: int) -> Tensor:
    """`[B, KV, blocks, M + W + block, D]`: for each block of queries the sinks, the W tokens before it, and its own."""
    if past is None:
        past = x.new_zeros(x.shape[0], window, *x.shape[2:])
    x = F.pad(torch.cat([past, x], dim=1), (0, 0, 0, 0, 0, pad)).transpose(1, 2)
    bands = x.unfold(2, window + block, block).mT  # a view
    return torch.cat([sinks.transpose(1, 2)[:, :, None].expand(-1, -1, bands.shape[2], -1, -1), bands], dim=3)


def _mask(
    B: int,
    T: int,
    window: int,
    block: int,
    sinks: Sinks,
    past: Past | None,
    valid: Tensor | None,
    document: Tensor | None,
    first: Tensor | None,
    device: torch.device,
) -> Tensor:
    """`[B or 1, blocks, block, M + W + block]`: who sees whom."""
    pad = -T % block
    t = torch.arange(T + pad, device=device).view(-1, block)  # the queries of each block
    row = torch.arange(block, device=device)[:, None]
    column = torch.arange(window + block, device=device)[None]  # column row + W is the query itself
    seen = ((column > row) & (column <= row + window))[None, None]
    oldest = t[None] - window + 1 if first is None else F.pad(first, (0, pad)).view(-1, *t.shape)
    time = t[:, :1, None] - window + column  # of the keys of each block
    seen = seen & (time >= oldest[..., None])

    def bands(new: Tensor, before: Tensor, fill: int) -> Tensor:  # [B, T] -> [B, blocks, 1, W + block]
        return F.pad(torch.cat([before, new], 1), (0, pad), value=fill).unfold(1, window + block, block)[:, :, None]

    rows = 1 if past is None and valid is None else B
    real = torch.ones(rows, T, dtype=torch.bool, device=device) if valid is None else valid
    before = torch.zeros(rows, window, dtype=torch.bool, device=device) if past is None else past.valid
    seen = seen & bands(real, before, 0) | (column == row + window)
    sink_seen = sinks.time[:, None, None] < oldest[..., None]
    if document is not None and sinks.document is not None:
        own = F.pad(document, (0, pad), value=-1).unflatten(1, (-1, block))[..., None]
        seen = seen & (own == bands(document, document.new_full((B, window), -2), -1))
        sink_seen = sink_seen & (own == sinks.document[:, None, None])
    if sink_seen.shape[0] != seen.shape[0]:
        sink_seen, seen = sink_seen.expand(B, -1, -1, -1), seen.expand(B, -1, -1, -1)
    return torch.cat([sink_seen, seen.expand(-1, sink_seen.shape[1], -1, -1)], dim=-1)
