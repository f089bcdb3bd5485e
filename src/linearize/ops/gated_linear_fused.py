"""Gated linear attention by its Triton kernels, with gates that are given: a decay for each key channel, for each value
channel, or for a head."""

from typing import Any

import torch
from torch import Tensor

from linearize.ops import gated_linear_triton as kernels
from linearize.ops import liger_backward_triton, liger_forward_triton
from linearize.ops.liger import Settings, first_tokens
from linearize.ops.liger_fused import Call, call_of, launch, pass_over_states, without_groups

# What is written is x yᵀ, of which x decays: `[B, T, KV, D]` both, the state `[B, KV, D, D]` x's channels first


@torch.library.custom_op("linearize::gated", mutates_args=())
def operator(
    q: Tensor, x: Tensor, y: Tensor, log_g: Tensor, state: Tensor, first: Tensor | None, by_value: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, final state and what the gradients need. As one operator, which `torch.compile` does not open."""
    call, one = _call(q, x if by_value else y, state, first, log_g), {"SCALAR": log_g.shape[3] == 1}
    near_x, totals, for_reading, states = _made(call, x, log_g)
    output = torch.empty_like(q)
    with torch.cuda.device_of(q):  # kernels run on the current device; backward, autograd sees to it
        kernels.given_kernel[(call.chunks, call.pairs)](
            x, log_g, near_x, totals, for_reading, q.shape[1], **without_groups(call.heads()), **one,
            **launch("prepare", call),
        )  # fmt: skip
        told, inputs = without_groups(call.heads()), (near_x, y, call.first, totals)
        states, final = pass_over_states(call, "states", liger_forward_triton.states_kernel, inputs, state, told)
        if by_value:
            _read_plain(call, q, x, near_x, y, log_g, for_reading, totals, states, q, output, None)
        else:
            near_q = decayed(q, for_reading, call)
            _read(call, q, near_q, x, near_x, y, log_g, totals, states, output)
    return output, final, near_x, totals, for_reading, states


@operator.register_fake
def _(
    q: Tensor, x: Tensor, y: Tensor, log_g: Tensor, state: Tensor, first: Tensor | None, by_value: bool
) -> tuple[Tensor, ...]:
    call = _call(q, x if by_value else y, state, first, log_g)
    return torch.empty_like(q), torch.empty_like(state), *_made(call, x, log_g)


@torch.library.custom_op("linearize::gated_gradients", mutates_args=())
def gradients(
    doutput: Tensor, dfinal: Tensor, q: Tensor, x: Tensor, y: Tensor, log_g: Tensor, first: Tensor | None,
    near_x: Tensor, totals: Tensor, for_reading: Tensor, states: Tensor, by_value: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of q, x, y, the log decay and the initial state. By value, q and the output's gradient change places."""
    call, T = _call(q, x if by_value else y, dfinal, first, log_g), q.shape[1]
    p, r = (doutput, q) if by_value else (q, doutput)
    near_p = decayed(p, for_reading, call)
    dq, dx, dy, dlog_g, terms = *(torch.empty_like(t) for t in (q, x, y, log_g)), torch.empty_like(for_reading)
    ones = torch.ones(q.shape[2], device=q.device)  # weights of heads, which Liger Attention has
    dstates, dinitial = pass_over_states(
        call, "state_gradients", liger_backward_triton.state_gradients_kernel, (near_p, r, ones, call.first, totals),
        dfinal, call.heads(),
    )  # fmt: skip
    read = torch.empty_like(q) if by_value else dq  # of by value, the output once more
    _read_plain(call, near_p, x, near_x, y, log_g, for_reading, totals, states, r, read, terms)
    if by_value:
        _read(call, p, near_p, x, near_x, y, log_g, totals, states, dq)
    kernels.write_gradients_kernel[(call.chunks, call.pairs)](
        p, near_p, x, near_x, y, log_g, call.first, totals, states, dstates, r, terms, dx, dy, dlog_g, T,
        SCALAR=log_g.shape[3] == 1, PACKED=call.packed, **call.heads(), **launch("write_gradients", call),
    )  # fmt: skip
    return dq, dx, dy, dlog_g, dinitial


@gradients.register_fake
def _(
    doutput: Tensor, dfinal: Tensor, q: Tensor, x: Tensor, y: Tensor, log_g: Tensor, first: Tensor | None,
    near_x: Tensor, totals: Tensor, for_reading: Tensor, states: Tensor, by_value: bool
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(torch.empty_like(t) for t in (q, x, y, log_g, dfinal))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, x, y, log_g, state, first, ctx.by_value = inputs
    ctx.save_for_backward(q, x, y, log_g, first, *output[2:])
    ctx.set_materialize_grads(False)
    ctx.state = state.shape


def _backward(ctx: Any, doutput: Tensor | None, dfinal: Tensor | None, *_: Any) -> tuple[Any, ...]:
    q = ctx.saved_tensors[0]
    doutput = torch.zeros_like(q) if doutput is None else doutput.contiguous()
    dfinal = q.new_zeros(ctx.state, dtype=torch.float32) if dfinal is None else dfinal.contiguous()
    return *gradients(doutput, dfinal, *ctx.saved_tensors, ctx.by_value), None, None


operator.register_autograd(_backward, setup_context=_keep)


def _call(q: Tensor, v: Tensor, state: Tensor, first: Tensor | None, log_g: Tensor) -> Call:
    """Shapes, and the dtype of operands, that of values; keys are of their shape."""
    unread = torch.empty(1, device=q.device)  # there are no mixing weights
    fixed = Settings("mlstm" if log_g.shape[3] == 1 else "gla", scale=1.0, feature_map="given")
    return call_of(q, v, v, unread, fixed, None, state, first, None)[0]


def _made(call: Call, x: Tensor, log_g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For what `kernels.given_kernel` makes, and the states."""
    D = x.shape[3]
    totals = x.new_empty(call.pairs, call.chunks, D, dtype=torch.float32)
    states = x.new_empty(call.pairs, call.chunks, D, D, dtype=call.dtype)
    return torch.empty_like(x, dtype=call.dtype), totals, torch.empty_like(log_g, dtype=torch.float32), states


def decayed(p: Tensor, for_reading: Tensor, call: Call) -> Tensor:
    """p `[B, T, H, D]` as it reads."""
    grouped = p.unflatten(2, (for_reading.shape[2], -1)) * for_reading[:, :, :, None]
    return grouped.flatten(2, 3).to(call.dtype)


def _read(call: Call, p: Tensor, near_p: Tensor, *others: Tensor) -> None:
    x, near_x, y, log_g, totals, states, output = others
    kernels.read_kernel[(call.chunks, p.shape[0] * p.shape[2])](
        p, near_p, x, near_x, y, log_g, call.first, totals, states, output, p.shape[1],
        SCALAR=log_g.shape[3] == 1, PACKED=call.packed, **call.heads(), **launch("read", call),
    )  # fmt: skip


def _read_plain(call: Call, near_p: Tensor, *others: Any) -> None:
    x, near_x, y, log_g, for_reading, totals, states, r, output, terms = others
    kernels.read_gradients_kernel[(call.chunks, call.pairs)](
        near_p, x, near_x, y, log_g, for_reading, call.first, totals, states, r, output,
        for_reading if terms is None else terms, r.shape[1], TERMS=terms is not None,
        SCALAR=log_g.shape[3] == 1, PACKED=call.packed, **call.heads(), **launch("read_gradients", call),
    )  # fmt: skip


def run(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, state: Tensor, document: Tensor | None, by_value: bool = False
) -> tuple[Tensor, Tensor]:
    """As `gated_linear.fused`."""
    x, y = (v, k) if by_value else (k, v)
    state = state.float().mT if by_value else state.float()
    given = (t.contiguous() for t in (q, x, y, log_g.float(), state))
    output, final, *_ = operator(*given, first_tokens(document, None), by_value)
    return output, final.mT if by_value else final
