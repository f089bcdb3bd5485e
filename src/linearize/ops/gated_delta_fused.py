"""The delta rule by its Triton kernels, with gates that are given: those of Liger Attention, without its window."""

from typing import Any

import torch
from torch import Tensor

from linearize.ops.liger import Settings, first_tokens
from linearize.ops.liger_delta import Gradients, Solved, add_gradients, add_recurrence, empty
from linearize.ops.liger_fused import Call, call_of


@torch.library.custom_op("linearize::delta", mutates_args=())
def operator(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor, state: Tensor, first: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, final state and, if `keep`, what the gradients need; log decay and β are `[B * KV, T]`. As one operator,
    which `torch.compile` does not open."""
    call = _call(q, k, v, state, first)
    output = q.new_empty(*q.shape[:3], v.shape[3])
    with torch.cuda.device_of(q):  # kernels run on the current device; backward, autograd sees to it
        final, made = add_recurrence(call, beta, log_g, state, output)
    kept = (made.key, made.residual, made.left, made.solved, made.states)
    key, residual, left, solved, states = kept if keep else (x.new_empty(0) for x in kept)
    return output, final, key, residual, left, solved, states


@operator.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor, state: Tensor, first: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    output, final = q.new_empty(*q.shape[:3], v.shape[3]), state.new_empty(state.shape)
    kept = empty(_call(q, k, v, state, first))
    key, residual, left, solved, states = kept if keep else (x.new_empty(0) for x in kept)
    return output, final, key, residual, left, solved, states


@torch.library.custom_op("linearize::delta_gradients", mutates_args=())
def gradients(
    doutput: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, key: Tensor,
    residual: Tensor, left: Tensor, solved: Tensor, beta: Tensor, log_g: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of q, k, v, the log decay, β and the initial state."""
    call, made = _call(q, k, v, dfinal, first), Solved(key, residual, left, solved, beta, log_g, states)
    sums = Gradients(*(torch.empty_like(x) for x in (q, k, v, call.mixing, beta, log_g)))
    dinitial = add_gradients(call, made, doutput.contiguous(), dfinal.contiguous(), sums)
    return sums.q, sums.k, sums.v, sums.log_g, sums.beta, dinitial


@gradients.register_fake
def _(
    doutput: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, key: Tensor,
    residual: Tensor, left: Tensor, solved: Tensor, beta: Tensor, log_g: Tensor, states: Tensor
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(x.new_empty(x.shape) for x in (q, k, v, log_g, beta, dfinal))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_g, beta, state, first, _ = inputs
    _, _, key, residual, left, solved, states = output
    ctx.save_for_backward(q, k, v, first, key, residual, left, solved, beta, log_g, states)
    ctx.set_materialize_grads(False)
    ctx.state = state.shape


def _backward(ctx: Any, doutput: Tensor | None, dfinal: Tensor | None, *_: Any) -> tuple[Any, ...]:
    q, _, v, *_ = saved = ctx.saved_tensors  # asked for once, which is all that gradient checkpointing allows
    doutput = q.new_zeros(*q.shape[:3], v.shape[3]) if doutput is None else doutput
    dfinal = q.new_zeros(ctx.state, dtype=torch.float32) if dfinal is None else dfinal
    return *gradients(doutput, dfinal, *saved), None, None


operator.register_autograd(_backward, setup_context=_keep)


def _call(q: Tensor, k: Tensor, v: Tensor, state: Tensor, first: Tensor | None) -> Call:
    unread = torch.empty(1, device=q.device)  # there are no mixing weights
    fixed = Settings("gated_deltanet", scale=1.0, feature_map="given")
    return call_of(q, k, v, unread, fixed, None, state, first, None)[0]


def run(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor, state: Tensor, document: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `gated_delta.fused`."""
    log_g, beta = (x[..., 0].float().transpose(1, 2).flatten(0, 1).contiguous() for x in (log_g, beta))
    given = *(x.contiguous() for x in (q, k, v)), log_g, beta, state.float().contiguous()
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    output, final, *_ = operator(*given, first_tokens(document, None), keep)
    return output, final
