"""The window of Liger Attention by itself, by its Triton kernels."""

from typing import Any

import torch
from torch import Tensor

from linearize.ops import liger_window_triton as windows
from linearize.ops.liger import Rope, Settings
from linearize.ops.liger_fused import CHUNK, Call, add_sink_gradients, by_halves, call_of, launch, window


def window_gradients(call: Call, lse: Tensor, doutput: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Through `window`: of q, of k and v but for the sinks, of the mixing weights by chunk `[B, H, chunks]`, and what
    `add_sink_gradients` takes."""
    B, T, H, D = call.q.shape
    dq, dk, dv = torch.empty_like(call.q), torch.empty_like(call.k), torch.empty_like(call.v)
    delta, dmixing = torch.empty_like(lse), lse.new_empty(B, H, call.chunks)
    sinks = [lse.new_empty(B, H, call.chunks, call.sinks, D) for _ in range(2)]
    told, halves = call.heads() | {"PACKED": call.packed}, by_halves(call)
    given = call.q, call.k, call.v, call.cos, call.sin, call.mixing, call.first, lse
    given_to_queries = (*given, doutput, dq, delta, dmixing, *sinks, T, call.rope_stride, call.scale)
    told_queries = told | {"R": call.rotary, "W": call.window, "SINKS": call.sinks}
    if call.window > CHUNK:
        kernel = windows.long_window_query_gradients_kernel[call.grid(H)]
        kernel(*given_to_queries, **told_queries, **launch("long_window_query_gradients", call))
    else:
        kernel = windows.window_query_gradients_kernel[call.grid(H)]
        settings = {"TURNED": False, "HALVES": halves} | launch("window_query_gradients", call)
        kernel(*given_to_queries, **told_queries, **settings)
    windows.window_key_gradients_kernel[call.grid(call.k.shape[2])](
        *given, delta, doutput, dk, dv, T, call.rope_stride, call.scale,
        R=call.rotary, W=call.window, HALVES=halves, **told, **launch("window_key_gradients", call),
    )  # fmt: skip
    return dq, dk, dv, dmixing, sinks


Angles = Tensor | None


@torch.library.custom_op("linearize::window", mutates_args=())
def operator(
    q: Tensor, k: Tensor, v: Tensor, cos: Angles, sin: Angles, first: Tensor | None, scale: float, width: int,
    sinks: int, keep: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output and, if `keep`, its log-sum-exp `[B, H, T]`; as one operator, which `torch.compile` does not open."""
    call = _call(q, k, v, cos, sin, first, scale, width, sinks)
    output, lse = torch.empty_like(call.q), call.mixing.new_empty(_kept(q, keep))
    with torch.cuda.device_of(q):  # kernels run on the current device; backward, autograd sees to it
        window(call, output, lse if keep else None)
    return output, lse


@operator.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cos: Angles, sin: Angles, first: Tensor | None, scale: float, width: int,
    sinks: int, keep: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), q.new_empty(_kept(q, keep), dtype=torch.float32)


@torch.library.custom_op("linearize::window_gradients", mutates_args=())
def gradients(
    doutput: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, cos: Angles, sin: Angles, first: Tensor | None,
    scale: float, width: int, sinks: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of q, k and v."""
    call = _call(q, k, v, cos, sin, first, scale, width, sinks)
    dq, dk, dv, _, dsinks = window_gradients(call, lse, doutput.contiguous())
    if sinks > 0:
        add_sink_gradients(call, dk, dv, *dsinks)
    return dq, dk, dv


@gradients.register_fake
def _(
    doutput: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, cos: Angles, sin: Angles, first: Tensor | None,
    scale: float, width: int, sinks: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cos, sin, first, *ctx.fixed, _ = inputs
    ctx.save_for_backward(q, k, v, output[1], cos, sin, first)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, doutput: Tensor | None, _: Any) -> tuple[Any, ...]:
    given = (None, None, None) if doutput is None else gradients(doutput, *ctx.saved_tensors, *ctx.fixed)
    return *given, *[None] * 7


operator.register_autograd(_backward, setup_context=_keep)


def _call(
    q: Tensor, k: Tensor, v: Tensor, cos: Angles, sin: Angles, first: Tensor | None, scale: float, width: int,
    sinks: int
) -> Call:  # fmt: skip
    unread = torch.zeros(q.shape[2], device=q.device)  # mixing weights and state: there is no recurrence
    rope = None if cos is None or sin is None else (cos, sin)
    settings = Settings("none", scale, window=width, sinks=sinks)
    return call_of(q, k, v, unread, settings, rope, unread, first, None)[0]


def _kept(q: Tensor, keep: bool) -> tuple[int, ...]:
    return (q.shape[0], q.shape[2], q.shape[1]) if keep else (0,)


def run(q: Tensor, k: Tensor, v: Tensor, settings: Settings, rope: Rope | None, first: Tensor | None) -> Tensor:
    """As `liger.windowed`."""
    cos, sin = (None, None) if rope is None else rope
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    fixed = settings.scale, settings.window, settings.sinks
    return operator(q.contiguous(), k.contiguous(), v.contiguous(), cos, sin, first, *fixed, keep)[0]
