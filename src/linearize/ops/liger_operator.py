"""Liger Attention's kernels as one operator, which can be differentiated and which `torch.compile` does not open."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from linearize.ops import liger_delta, liger_fused
from linearize.ops.liger import DELTA
from linearize.ops.liger_fused import Call

CALL = (  # the fields of `Call`
    "Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor mixing, Tensor first, Tensor decay, "
    "float rate, float lower, float strength, float scale, int rotary, int window, int sinks, "
    "str gate, str feature_map, bool packed"
)
TENSORS = CALL.count("Tensor ")  # which come first


def _kernels(call: Call) -> Any:
    return liger_delta if call.gate in DELTA else liger_fused


@torch.library.custom_op(
    "linearize::liger", mutates_args=(), schema=f"(Tensor initial, bool keep, {CALL}) -> (Tensor, Tensor, Tensor[])"
)
def operator(initial: Tensor, keep: bool, *given: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, final state and, if `keep`, what the gradients need."""
    call = Call(*given)
    with torch.cuda.device_of(call.q):  # kernels run on the current device; backward, autograd sees to it
        return _kernels(call).forward(call, initial) if keep else (*_kernels(call).run(call, initial), [])


@operator.register_fake
def _(initial: Tensor, keep: bool, *given: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    call = Call(*given)
    return torch.empty_like(call.q), torch.empty_like(initial), _kernels(call).kept(call) if keep else []


@torch.library.custom_op(
    "linearize::liger_gradients",
    mutates_args=(),
    schema=f"(Tensor doutput, Tensor dfinal, Tensor[] kept, {CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def gradients(doutput: Tensor, dfinal: Tensor, kept: Sequence[Tensor], *given: Any) -> tuple[Tensor, ...]:
    """Of q, k, v, the mixing weights and the initial state."""
    call = Call(*given)
    return _kernels(call).backward(call, kept, doutput.contiguous(), dfinal.contiguous())


@gradients.register_fake
def _(doutput: Tensor, dfinal: Tensor, kept: Sequence[Tensor], *given: Any) -> tuple[Tensor, ...]:
    call = Call(*given)
    return tuple(torch.empty_like(x) for x in (call.q, call.k, call.v, call.mixing, dfinal))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    initial, _, *given = inputs
    ctx.save_for_backward(*given[:TENSORS], *output[2])
    ctx.set_materialize_grads(False)
    ctx.fixed, ctx.state = given[TENSORS:], initial.shape


def _backward(ctx: Any, doutput: Tensor | None, dfinal: Tensor | None, _: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # asked for once, which is all that gradient checkpointing allows
    given, kept = saved[:TENSORS], saved[TENSORS:]
    doutput = torch.zeros_like(given[0]) if doutput is None else doutput
    dfinal = doutput.new_zeros(ctx.state, dtype=torch.float32) if dfinal is None else dfinal
    dq, dk, dv, dmixing, dinitial = gradients(doutput, dfinal, kept, *given, *ctx.fixed)
    through = {"q": dq, "k": dk, "v": dv, "mixing": dmixing}
    return dinitial, None, *(through.get(name) for name in Call._fields)


operator.register_autograd(_backward, setup_context=_keep)


def run(call: Call, initial: Tensor) -> tuple[Tensor, Tensor]:
    """Output and final state."""
    given = call.q, call.k, call.v, call.mixing, initial
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return operator(initial, keep, *call)[:2]
