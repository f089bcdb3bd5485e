"""Gated linear attention by its Triton kernels, with gates that are given: a decay for each key channel, for each value
channel, or for a head.

What is written is x yᵀ, of which x decays: `[B, T, KV, D]` both, in states `[B, KV, D, D]` x's channels first. By value
channel, x is the value.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from linearize.ops import gated_linear_triton as kernels
from linearize.ops import liger_backward_triton, liger_forward_triton
from linearize.ops.liger import Settings, first_tokens
from linearize.ops.liger_fused import Call, call_of, launch, pass_over_states, without_groups


class Written(NamedTuple):
    """What is written, and what `given_kernel` and the pass over the states made of it."""

    x: Tensor
    y: Tensor
    log_g: Tensor
    near_x: Tensor
    totals: Tensor
    for_reading: Tensor
    states: Tensor


@torch.library.custom_op("linearize::gated", mutates_args=())
def operator(
    q: Tensor, x: Tensor, y: Tensor, log_g: Tensor, state: Tensor, first: Tensor | None, by_value: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, final state and what the gradients need. As one operator, which `torch.compile` does not open."""
    call = _call(q, x if by_value else y, state, first, log_g)
    near_x, totals, for_reading = _empty(call, x, log_g)
    told = without_groups(call.heads())
    with torch.cuda.device_of(q):  # kernels run on the current device; backward, autograd sees to it
        kernels.given_kernel[(call.chunks, call.pairs)](
            x, log_g, near_x, totals, for_reading, q.shape[1], SCALAR=call.scalar, **told, **launch("given", call)
        )
        inputs, kernel = (near_x, y, call.first, totals), liger_forward_triton.states_kernel
        states, final = pass_over_states(call, "states", kernel, inputs, state, told)
        written = Written(x, y, log_g, near_x, totals, for_reading, states)
        output = read_plain(call, written, q)[0] if by_value else read(call, written, q, decayed(call, written, q))
    return output, final, near_x, totals, for_reading, states


@operator.register_fake
def _(
    q: Tensor, x: Tensor, y: Tensor, log_g: Tensor, state: Tensor, first: Tensor | None, by_value: bool
) -> tuple[Tensor, ...]:
    call, D = _call(q, x if by_value else y, state, first, log_g), x.shape[3]
    states = x.new_empty(call.pairs, call.chunks, D, D, dtype=call.dtype)
    return torch.empty_like(q), torch.empty_like(state), *_empty(call, x, log_g), states


@torch.library.custom_op("linearize::gated_gradients", mutates_args=())
def gradients(
    doutput: Tensor, dfinal: Tensor, q: Tensor, x: Tensor, y: Tensor, log_g: Tensor, first: Tensor | None,
    near_x: Tensor, totals: Tensor, for_reading: Tensor, states: Tensor, by_value: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of q, x, y, the log decay and the initial state. By value, q and the output's gradient change places."""
    call = _call(q, x if by_value else y, dfinal, first, log_g)
    written = Written(x, y, log_g, near_x, totals, for_reading, states)
    p, r = (doutput, q) if by_value else (q, doutput)
    near_p = decayed(call, written, p)
    ones = torch.ones(q.shape[2], device=q.device)  # mixing weights, of which are none
    inputs, kernel = (near_p, r, ones, call.first, totals), liger_backward_triton.state_gradients_kernel
    dstates, dinitial = pass_over_states(call, "state_gradients", kernel, inputs, dfinal, call.heads())
    dq, terms = read_plain(call, written, r, near_p)  # by value, the output once more
    if by_value:
        dq = read(call, written, p, near_p)
    dx, dy, dlog_g = (torch.empty_like(t) for t in (x, y, log_g))
    kernels.write_gradients_kernel[(call.chunks, call.pairs)](
        p, near_p, x, near_x, y, log_g, call.first, totals, states, dstates, r, terms, dx, dy, dlog_g, q.shape[1],
        **_told(call), **launch("write_gradients", call),
    )  # fmt: skip
    return dq.to(q.dtype), dx, dy, dlog_g, dinitial


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
    q, *_ = saved = ctx.saved_tensors  # asked for once, which is all that gradient checkpointing allows
    doutput = torch.zeros_like(q) if doutput is None else doutput.contiguous()
    dfinal = q.new_zeros(ctx.state, dtype=torch.float32) if dfinal is None else dfinal.contiguous()
    return *gradients(doutput, dfinal, *saved, ctx.by_value), None, None


operator.register_autograd(_backward, setup_context=_keep)


def _call(q: Tensor, v: Tensor, state: Tensor, first: Tensor | None, log_g: Tensor) -> Call:
    """Shapes, and the dtype of operands, that of values; keys are of their shape."""
    unread = torch.empty(1, device=q.device)  # there are no mixing weights
    fixed = Settings("mlstm" if log_g.shape[3] == 1 else "gla", scale=1.0, feature_map="given")
    return call_of(q, v, v, unread, fixed, None, state, first, None)[0]


def _told(call: Call) -> dict[str, Any]:
    """What kernels with queries are told."""
    return call.heads() | {"SCALAR": call.scalar, "PACKED": call.packed}


def _empty(call: Call, x: Tensor, log_g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For what `given_kernel` makes."""
    totals = x.new_empty(call.pairs, call.chunks, x.shape[3], dtype=torch.float32)
    return torch.empty_like(x, dtype=call.dtype), totals, torch.empty_like(log_g, dtype=torch.float32)


def decayed(call: Call, written: Written, p: Tensor) -> Tensor:
    """p `[B, T, H, D]` as it reads, by `near_kernel`."""
    told = {name: value for name, value in _told(call).items() if name not in ("DTYPE", "PACKED")}
    near_p = torch.empty_like(p, dtype=call.dtype)
    kernels.near_kernel[call.grid(written.x.shape[2])](
        p, written.for_reading, near_p, p.shape[1], **told, **launch("near", call)
    )
    return near_p


def read(call: Call, written: Written, p: Tensor, near_p: Tensor) -> Tensor:
    """As `read_kernel`; `near_p` is p, `decayed`."""
    x, y, log_g, near_x, totals, _, states = written
    output = torch.empty_like(p)
    kernels.read_kernel[(call.chunks, p.shape[0] * p.shape[2])](
        p, near_p, x, near_x, y, log_g, call.first, totals, states, output, p.shape[1],
        **_told(call), **launch("read", call),
    )  # fmt: skip
    return output


def read_plain(call: Call, written: Written, r: Tensor, near_p: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `read_gradients_kernel`: what r reads and, of `near_p`, terms of the gate's gradient."""
    x, y, log_g, near_x, totals, for_reading, states = written
    output, terms = torch.empty_like(r), torch.empty_like(for_reading)
    kernels.read_gradients_kernel[(call.chunks, call.pairs)](
        r if near_p is None else near_p, x, near_x, y, log_g, for_reading, call.first, totals, states, r, output,
        terms, r.shape[1], TERMS=near_p is not None, **_told(call), **launch("read_gradients", call),
    )  # fmt: skip
    return output, terms


def run(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, state: Tensor, document: Tensor | None, by_value: bool = False
) -> tuple[Tensor, Tensor]:
    """As `gated_linear.fused`."""
    K, V = k.shape[3], v.shape[3]
    if K != V:  # channels of 0 make them one size, which rows of memory are aligned by
        D = 16 * triton.cdiv(max(K, V), 16)
        q, k, v = (F.pad(t, (0, D - t.shape[3])) for t in (q, k, v))
        log_g = log_g if log_g.shape[3] == 1 else F.pad(log_g, (0, D - log_g.shape[3]))
        state = F.pad(state, (0, D - V, 0, D - K))
    x, y = (v, k) if by_value else (k, v)
    state = state.float().mT if by_value else state.float()
    given = (t.contiguous() for t in (q, x, y, log_g.float(), state))
    output, final, *_ = operator(*given, first_tokens(document, None), by_value)
    final = final.mT if by_value else final
    return output[..., :V], final[..., :K, :V]
