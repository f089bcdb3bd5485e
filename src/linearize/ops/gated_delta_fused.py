"""The delta rule by its Triton kernels, with gates that are given: those of Liger Attention, without its window."""

from typing import Any

import torch
from torch import Tensor

from linearize.ops.liger import Settings, first_tokens
from linearize.ops.liger_delta import Gradients, Solved, add_gradients, add_recurrence
from linearize.ops.liger_fused import Call, call_of


class GatedDelta(torch.autograd.Function):
    """(q, k, v, log decay and β `[B * KV, T]`, initial state, call without q, k and v) to (output, final state)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor, initial: Tensor, call: Call
    ) -> Any:
        output = torch.empty_like(q)
        final, made = add_recurrence(call._replace(q=q, k=k, v=v), beta, log_g, initial, output, keep=True)
        ctx.save_for_backward(q, k, v, *made)
        ctx.call = call
        return output, final

    @staticmethod
    def backward(ctx: Any, doutput: Tensor, dfinal: Tensor) -> Any:
        q, k, v, *rest = ctx.saved_tensors
        made, call = Solved(*rest), ctx.call._replace(q=q, k=k, v=v)
        given = (torch.empty_like(x) for x in (q, k, v, call.mixing, made.beta, made.log_g))
        sums = Gradients(*given)
        dinitial = add_gradients(call, made, doutput.contiguous(), dfinal.contiguous(), sums)
        return sums.q, sums.k, sums.v, sums.log_g, sums.beta, dinitial, None


def run(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor, state: Tensor, document: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `gated_delta.fused`."""
    unread = torch.empty(1, device=q.device)  # there are no mixing weights
    fixed = Settings("gated_deltanet", scale=1.0, feature_map="given")
    call, initial = call_of(q, k, v, unread, fixed, None, state, first_tokens(document, None), None)
    log_g, beta = (x[..., 0].float().transpose(1, 2).flatten(0, 1).contiguous() for x in (log_g, beta))
    given = call.q, call.k, call.v, log_g, beta, initial
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        nothing: Any = None
        return GatedDelta.apply(*given, call._replace(q=nothing, k=nothing, v=nothing))
    output = torch.empty_like(call.q)
    final, _ = add_recurrence(call, beta, log_g, initial, output, keep=False)
    return output, final
