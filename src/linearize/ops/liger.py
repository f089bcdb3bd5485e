"""Liger Attention as one operator: a gated recurrence and a softmax window on one set of projections
(arXiv 2503.01496, eq. 8-10).

    o_t = w · φ(q_t) S_t + (1 - w) · softmax(scale · R q_t (R k_j)ᵀ) v_j
    S_t = diag(exp(log_g_t)) S_{t-1} + k'_tᵀ v_t

R is RoPE; j runs over the last W tokens and the sinks that have left the window; the gate log_g and the recurrence's
key k' are functions of k alone, which `GATES` names. Shapes: q `[B, T, H, D]`; k, v `[B, T, KV, D]`, before RoPE and
unrepeated; the mixing weights w `[H]`; state `[B, KV, D, D]` in fp32. `first` `[B, T]` is the index of the first token
of each token's document (`first_tokens` makes it): neither branch sees across, sinks are each document's own. A
padding token is a document of its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from linearize.ops import gated_delta, gated_linear, local
from linearize.ops.dispatch import HALF, MOST, why_no_kernel
from linearize.ops.dispatch import warn_once as warn_once
from linearize.ops.local import NEVER, Scoring, Sinks

Output = tuple[Float[Tensor, "B T H D"], Float[Tensor, "B KV D D"]]
Rope = tuple[Float[Tensor, "... T R"], Float[Tensor, "... T R"]]  # cos and sin, as rotate-half takes them


class Settings(NamedTuple):
    """What is fixed in a layer; the names are those of `MixerConfig`."""

    gate: str
    scale: float
    temperature: float = 16.0
    feature_map: str = "softmax"
    window: int = 64
    sinks: int = 4
    lower: float = 0.0  # hgrn2's least decay
    strength: float = 1.0  # the delta rule's largest β


def why_not_fused(
    q: Tensor, k: Tensor, v: Tensor, settings: Settings, first: Tensor | None, rope: Rope | None
) -> str | None:
    """What the kernels lack for these inputs; None if nothing."""
    if settings.gate not in GATES | DELTA:
        return f"no kernel for gate {settings.gate}"
    if settings.feature_map not in FEATURES:
        return f"no kernel for feature map {settings.feature_map}"
    if settings.window > 64:
        return f"no kernel for both branches with a window of {settings.window}"
    return why_not_windowed(q, k, v, settings, first, rope)


def why_not_windowed(
    q: Tensor, k: Tensor, v: Tensor, settings: Settings, first: Tensor | None, rope: Rope | None
) -> str | None:
    """As `why_not_fused`, for the window alone."""
    B, T, H, D = q.shape
    R = 0 if rope is None else rope[0].shape[-1]
    unsupported = {
        f"a window of {settings.window} over packed documents": settings.window < 64 and first is not None,
        f"{settings.sinks} sinks": settings.sinks > 16,
        f"head size {D}": D > 128,
        f"value heads of size {v.shape[-1]} with key heads of size {D}": v.shape[-1] != D,
        f"{R} rotated channels": R % 2 == 1 or R > D,
        f"{q.dtype}, {k.dtype} and {v.dtype} together": not q.dtype == k.dtype == v.dtype,
        f"{q.dtype}": q.dtype not in HALF,
        f"{T} tokens": T * H * D >= 2**31 or T > 64 * MOST,
        f"{B} sequences of {H} heads": B * H > MOST,
    }
    return why_no_kernel(q, unsupported)


def fused(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T KV D"],
    v: Float[Tensor, "B T KV D"],
    mixing: Float[Tensor, "H"],
    settings: Settings,
    rope: Rope | None = None,
    state: Float[Tensor, "B KV D D"] | None = None,
    first: Int[Tensor, "B T"] | None = None,
    decay: Float[Tensor, "KV"] | None = None,
) -> Output:
    """By the Triton kernels, which `why_not_fused` must have nothing against: output in q's dtype, final state in fp32.

    `decay` is lightning's log decay of each head.
    """
    from linearize.ops import liger_fused, liger_operator

    call, initial = liger_fused.call_of(q, k, v, mixing, settings, rope, state, first, decay)
    return liger_operator.run(call, initial)


def windowed(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T KV D"],
    v: Float[Tensor, "B T KV D"],
    settings: Settings,
    rope: Rope | None = None,
    first: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T H D"]:
    """The softmax window alone, by its Triton kernels, which `why_not_windowed` must have nothing against."""
    from linearize.ops import liger_window

    return liger_window.run(q, k, v, settings, rope, first)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    settings: Settings,
    rope: Rope | None = None,
    state: Tensor | None = None,
    first: Tensor | None = None,
    decay: Tensor | None = None,
) -> Output:
    """The equations in float64, token by token: what the kernels are tested against."""
    q, k, v, mixing = (x.double() for x in (q, k, v, mixing))
    rope = None if rope is None else (rope[0].double(), rope[1].double())
    state = no_state(k).double() if state is None else state
    operators = gated_delta.reference if settings.gate in DELTA else gated_linear.reference, local.reference
    return compose(q, k, v, mixing, settings, rope, state, first, decay, *operators)


def unfused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    settings: Settings,
    rope: Rope | None = None,
    state: Tensor | None = None,
    first: Tensor | None = None,
    decay: Tensor | None = None,
) -> Output:
    """The two branches one after the other, in PyTorch."""
    recurrence = gated_delta.gated_delta if settings.gate in DELTA else gated_linear.gated_linear
    operators = recurrence, local.local_attention
    return compose(q, k, v, mixing, settings, rope, state, first, decay, *operators)


def compose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    settings: Settings,
    rope: Rope | None,
    state: Tensor | None,
    first: Tensor | None,
    decay: Tensor | None,
    recurrence: Callable[..., tuple[Tensor, Tensor]],
    attention: Callable[..., tuple[Tensor, Any]],
) -> Output:
    """Both branches by the given operators, and their mixture."""
    query = FEATURES[settings.feature_map](wide(q))
    if settings.gate in DELTA:
        query = F.normalize(query, dim=-1)
        key, *gates = DELTA[settings.gate](wide(k), settings)
    else:
        key, *gates = GATES[settings.gate](wide(k), settings, decay)
    document = None if first is None else F.pad((first[:, 1:] != first[:, :-1]).cumsum(1), (1, 0))
    recurrent, state = recurrence(query, key, v, *gates, state, document)
    q, k = (x if rope is None else rotate(x, *rope) for x in (q, k))
    sinks = sinks_of(k, v, settings.sinks, document)
    windowed, _ = attention(q, k, v, settings.window, Scoring(settings.scale), sinks, document=document)
    w = mixing[:, None].to(windowed.dtype)
    return w * recurrent.to(windowed.dtype) + (1 - w) * windowed, state


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE over the first R channels, as `rotate_half` has it."""
    R = cos.shape[-1]
    turned, rest = x[..., :R], x[..., R:]
    left, right = turned.chunk(2, dim=-1)
    turned = turned * cos.unsqueeze(-2) + torch.cat([-right, left], dim=-1) * sin.unsqueeze(-2)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def inverse(rope: Rope) -> Rope:
    """The angles that turn back, in fp32 at least, what these turned, and scaled, as in YaRN or by being rounded."""
    cos, sin = (wide(x) for x in rope)
    square = cos.square() + sin.square()
    return cos / square, -sin / square


def sinks_of(k: Tensor, v: Tensor, sinks: int, document: Tensor | None) -> Sinks:
    """The first tokens of every document, of k after RoPE and v."""
    B, T = k.shape[:2]
    count = 1 if document is None else int(document.max()) + 1  # without documents nothing waits for a GPU
    document = torch.zeros(B, T, dtype=torch.long, device=k.device) if document is None else document
    number = torch.arange(count, device=k.device).expand(B, -1).contiguous()
    begin, end = torch.searchsorted(document, number), torch.searchsorted(document, number, right=True)
    index = begin[..., None] + torch.arange(sinks, device=k.device)
    time = torch.where(index < end[..., None], index, NEVER).flatten(1)
    owner, index = number[..., None].expand_as(index).flatten(1), index.flatten(1).clamp(max=T - 1)
    key, value = (x.gather(1, index[..., None, None].expand(-1, -1, *x.shape[2:])) for x in (k, v))
    return Sinks(key, value, time, owner)


def first_tokens(document: Int[Tensor, "B T"] | None, valid: Bool[Tensor, "B T"] | None) -> Int[Tensor, "B T"] | None:
    """`first` from document numbers and from what is not padding."""
    if document is None and valid is None:
        return None
    given = document if document is not None else valid
    assert given is not None
    position = torch.arange(given.shape[1], device=given.device).expand(given.shape)
    begins = position == 0
    for labels in (document, valid):
        if labels is not None:
            begins = begins | F.pad(labels[:, 1:] != labels[:, :-1], (1, 0))
    if valid is not None:
        begins = begins | ~valid
    return (position * begins).cummax(1).values


def no_state(k: Tensor) -> Tensor:
    """Before the first token, fp32."""
    return k.new_zeros(k.shape[0], k.shape[2], k.shape[3], k.shape[3], dtype=torch.float32)


# --- from the key projection to the recurrence's key and log decay, `[B, T, KV, D]` and `[B, T, KV, D or 1]` ---


def wide(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def gla(k: Tensor, settings: Settings, decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """σ(k)^(1/temperature), one decay for each channel."""
    return FEATURES[settings.feature_map](k), F.logsigmoid(k) / settings.temperature


def rwkv6(k: Tensor, settings: Settings, decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """exp(-exp(k) / temperature), one decay for each channel; e^-e^10 is 0, and above exp(k) would overflow."""
    return FEATURES[settings.feature_map](k), -k.clamp(max=10.0).exp() / settings.temperature


def hgrn2(k: Tensor, settings: Settings, decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """lower + (1 - lower) σ(k)^(1/temperature); what it forgets is the key."""
    log_kept = F.logsigmoid(k) / settings.temperature
    key = (1 - settings.lower) * -torch.expm1(log_kept)
    return key, torch.log1p(-key) if settings.lower else log_kept  # without a bound, the key may round to 1


def mlstm(k: Tensor, settings: Settings, decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """σ(mean of k)^(1/temperature), one decay for each head."""
    return FEATURES[settings.feature_map](k), F.logsigmoid(k.mean(-1, keepdim=True)) / settings.temperature


def mamba2(k: Tensor, settings: Settings, decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """exp(-Δ / temperature) with Δ = softplus(mean of k), which also scales the key."""
    step = F.softplus(k.mean(-1, keepdim=True))
    return step * FEATURES[settings.feature_map](k), -step / settings.temperature


def lightning(k: Tensor, settings: Settings, decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """A fixed decay for each head."""
    assert decay is not None
    return FEATURES[settings.feature_map](k), wide(decay)[:, None].to(k.dtype).expand(*k.shape[:3], 1)


def deltanet(k: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """β = strength · σ(mean of k); the key, and the query, at length 1. No decay."""
    beta = settings.strength * k.mean(-1, keepdim=True).sigmoid()
    return F.normalize(FEATURES[settings.feature_map](k), dim=-1), torch.zeros_like(beta), beta


def gated_deltanet(k: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """As `deltanet`, with the decay of `mlstm`."""
    key, _, beta = deltanet(k, settings)
    return key, mlstm(k, settings, None)[1], beta


GATES = {"gla": gla, "rwkv6": rwkv6, "hgrn2": hgrn2, "mlstm": mlstm, "mamba2": mamba2, "lightning": lightning}
DELTA = {"deltanet": deltanet, "gated_deltanet": gated_deltanet}
FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": lambda x: x.softmax(-1), "none": lambda x: x}
