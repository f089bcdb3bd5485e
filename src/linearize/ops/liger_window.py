"""The window of Liger Attention by itself, by its Triton kernels."""

from typing import Any

import torch
from torch import Tensor

from linearize.ops import liger_window_triton as windows
from linearize.ops.liger import Rope, Settings
from linearize.ops.liger_fused import Call, add_sink_gradients, call_of, launch, window


def window_gradients(call: Call, lse: Tensor, doutput: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Through `window`: of q, of k and v but for the sinks, of the mixing weights by chunk `[B, H, chunks]`, and what
    `add_sink_gradients` takes."""
    B, T, H, D = call.q.shape
    dq, dk, dv = torch.empty_like(call.q), torch.empty_like(call.k), torch.empty_like(call.v)
    delta, dmixing = torch.empty_like(lse), lse.new_empty(B, H, call.chunks)
    sinks = [lse.new_empty(B, H, call.chunks, call.sinks, D) for _ in range(2)]
    told = call.heads() | {"PACKED": call.packed}
    given = call.q, call.k, call.v, call.cos, call.sin, call.mixing, call.first, lse
    windows.window_query_gradients_kernel[(call.chunks, B * H)](
        *given, doutput, dq, delta, dmixing, *sinks, T, call.rope_stride, call.scale,
        R=call.rotary, W=call.window, SINKS=call.sinks, **told, **launch("window_query_gradients", call),
    )  # fmt: skip
    windows.window_key_gradients_kernel[(call.chunks, call.pairs)](
        *given, delta, doutput, dk, dv, T, call.rope_stride, call.scale,
        R=call.rotary, W=call.window, **told, **launch("window_key_gradients", call),
    )  # fmt: skip
    return dq, dk, dv, dmixing, sinks


class Window(torch.autograd.Function):
    """(q, k, v, call without those) to the output."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        B, T, H, _ = q.shape
        output, lse = torch.empty_like(q), call.mixing.new_empty(B, H, T)
        window(call._replace(q=q, k=k, v=v), output, lse)
        ctx.save_for_backward(q, k, v, lse)
        ctx.call = call
        return output

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> Any:
        q, k, v, lse = ctx.saved_tensors
        call = ctx.call._replace(q=q, k=k, v=v)
        dq, dk, dv, _, sinks = window_gradients(call, lse, doutput.contiguous())
        if call.sinks > 0:
            add_sink_gradients(call, dk, dv, *sinks)
        return dq, dk, dv, None


def run(q: Tensor, k: Tensor, v: Tensor, settings: Settings, rope: Rope | None, first: Tensor | None) -> Tensor:
    """As `liger.windowed`."""
    none_of_the_recurrence = torch.zeros(q.shape[2], device=q.device)
    call, _ = call_of(q, k, v, none_of_the_recurrence, settings, rope, None, first, None)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        nothing: Any = None
        return Window.apply(call.q, call.k, call.v, call._replace(q=nothing, k=nothing, v=nothing))
    output = torch.empty_like(call.q)
    window(call, output)
    return output
