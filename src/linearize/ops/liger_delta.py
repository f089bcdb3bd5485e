"""Liger Attention with the delta rule by its Triton kernels: the window, then the recurrence, which adds itself."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.ops import liger_delta_triton as kernels
from linearize.ops.liger_fused import CHUNK, LAUNCHES, Call, add_sink_gradients, launch, padded, window
from linearize.ops.liger_window import window_gradients


class Solved(NamedTuple):
    """What the forward pass makes of keys and values; the names are those of `liger_delta_triton`."""

    key: Tensor
    residual: Tensor
    left: Tensor
    solved: Tensor
    beta: Tensor
    log_g: Tensor
    states: Tensor


def empty(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For what the forward pass makes but for the gates, in the order of `Solved`."""
    D, bounded = call.q.shape[3], torch.float32 if call.dtype == torch.float32 else torch.float16
    key, residual, left = (torch.empty_like(call.k, dtype=call.dtype) for _ in range(3))
    solved = key.new_empty(call.pairs, call.chunks, CHUNK, CHUNK, dtype=bounded)
    return key, residual, left, solved, key.new_empty(call.pairs, call.chunks, D, D)


def heads(call: Call) -> dict[str, Any]:
    """How kernels that see no queries are told the shapes."""
    return {name: value for name, value in call.heads().items() if name != "GROUPS"} | {"PACKED": call.packed}


def fine(call: Call) -> dict[str, Any]:
    """How kernels are told the type of operands that are in fp16's range, as they come from vectors of length 1."""
    return {"FINE": tl.float32 if call.dtype == torch.float32 else tl.float16}


def gated(call: Call) -> bool:
    """Whether there is a decay."""
    return call.gate == "gated_deltanet"


def blocks(call: Call, kernel: str) -> tuple[int, dict[str, Any]]:
    """Of value channels in a pass over the states, and how its kernel is told."""
    D = call.q.shape[3]
    BV = min(LAUNCHES[kernel][padded(D)].block, padded(D))
    return triton.cdiv(D, BV), {"BV": BV, "GATED": gated(call), **launch(kernel, call)}


def add_recurrence(call: Call, beta: Tensor, log_g: Tensor, initial: Tensor, output: Tensor) -> tuple[Tensor, Solved]:
    """Add the recurrence to the output, and return its final state and what it was made of; β and the log decay
    `[B * KV, T]` are written, unless the call says that they are given."""
    B, T, H, _ = call.q.shape
    key, residual, left, solved, states = empty(call)
    told = {"FEATURE": call.feature_map, "GATED": gated(call)}
    kernels.delta_solve_kernel[(call.chunks, call.pairs)](
        call.k, call.first, key, left, solved, beta, log_g, T, call.rate, call.strength,
        **told, **heads(call), **fine(call), **launch("delta_solve", call),
    )  # fmt: skip
    final = torch.empty_like(initial)
    count, passing = blocks(call, "delta_states")
    kernels.delta_states_kernel[(count, call.pairs)](
        key, call.v, left, call.first, beta, log_g, initial, states, residual, final, T, **heads(call), **passing
    )
    kernels.delta_output_kernel[(call.chunks, B * H)](
        call.q, key, residual, solved, call.mixing, call.first, log_g, states, output, T,
        **told, **call.heads(), **fine(call), PACKED=call.packed, **launch("delta_output", call),
    )  # fmt: skip
    return final, Solved(key, residual, left, solved, beta, log_g, states)


class Gradients(NamedTuple):
    """Where gradients go: of q, k and v, of the mixing weights by chunk, of the given gates."""

    q: Tensor
    k: Tensor
    v: Tensor
    mixing: Tensor
    beta: Tensor
    log_g: Tensor


def add_gradients(call: Call, made: Solved, doutput: Tensor, dfinal: Tensor, sums: Gradients) -> Tensor:
    """Add those through the recurrence, and return that of the initial state."""
    T, grid = call.q.shape[1], (call.chunks, call.pairs)
    told = {"FEATURE": call.feature_map, "GATED": gated(call)}
    key, residual, left, solved, beta, log_g, states = made
    dread, dstates, dinitial = torch.empty_like(states), torch.empty_like(states), torch.empty_like(dfinal)
    dresidual, dkey, dsums = torch.empty_like(residual), torch.empty_like(residual), torch.empty_like(log_g)
    kernels.delta_query_gradients_kernel[grid](
        call.q, key, residual, solved, call.mixing, call.first, log_g, states, doutput, sums.q, sums.mixing, dread,
        dresidual, dkey, dsums, T,
        **told, **call.heads(), **fine(call), PACKED=call.packed, **launch("delta_query_gradients", call),
    )  # fmt: skip
    count, passing = blocks(call, "delta_state_gradients")
    kernels.delta_state_gradients_kernel[(count, call.pairs)](
        key, left, call.first, beta, log_g, dread, dfinal, dresidual, dstates, dinitial, T, **heads(call), **passing
    )
    kernels.delta_key_gradients_kernel[grid](
        call.k, call.v, key, residual, solved, call.first, beta, log_g, states, dstates, dresidual, dkey, dsums,
        sums.k, sums.v, sums.beta, sums.log_g, T, call.rate, call.strength,
        **told, **heads(call), **launch("delta_key_gradients", call),
    )  # fmt: skip
    return dinitial


def forward(call: Call, initial: Tensor, keep: bool = True) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, final state, and what `kept` names, of which the log-sum-exp is written only if `keep`."""
    B, T, H, _ = call.q.shape
    output, lse = torch.empty_like(call.q), initial.new_empty(B, H, T)
    window(call, output, lse if keep else None)
    beta, log_g = initial.new_empty(call.pairs, T), initial.new_empty(call.pairs, T)
    final, made = add_recurrence(call, beta, log_g, initial, output)
    return output, final, [*made, lse]


def kept(call: Call) -> list[Tensor]:
    """Tensors as those that a backward pass needs: `Solved`, and the window's log-sum-exp."""
    B, T, H, _ = call.q.shape
    *made, states = empty(call)
    beta, log_g = (call.k.new_empty(call.pairs, T, dtype=torch.float32) for _ in range(2))
    lse = call.k.new_empty(B, H, T, dtype=torch.float32)
    return [*made, beta, log_g, states, lse]


def backward(call: Call, made_before: Sequence[Tensor], doutput: Tensor, dfinal: Tensor) -> tuple[Tensor, ...]:
    """The gradients of q, k, v, the mixing weights and the initial state, from what `kept` names."""
    made, lse = Solved(*made_before[:-1]), made_before[-1]
    dq, dk, dv, dmixing, sinks = window_gradients(call, lse, doutput)
    unread = made.beta, made.log_g  # gates come from the key, and so do their gradients
    dinitial = add_gradients(call, made, doutput, dfinal, Gradients(dq, dk, dv, dmixing, *unread))
    if call.sinks > 0:
        add_sink_gradients(call, dk, dv, *sinks)
    return dq, dk, dv, dmixing.sum((0, 2)), dinitial


def run(call: Call, initial: Tensor) -> tuple[Tensor, Tensor]:
    """Output and final state, where there is no backward pass."""
    return forward(call, initial, keep=False)[:2]
