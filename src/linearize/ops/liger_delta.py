"""Liger Attention with the delta rule by its Triton kernels: the window, then the recurrence, which adds itself."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.ops import liger_delta_backward_triton as gradients
from linearize.ops import liger_delta_forward_triton as kernels
from linearize.ops import liger_delta_wide_triton as wide
from linearize.ops.liger_fused import (
    CHUNK,
    LAUNCHES,
    MULTIPROCESSORS,
    Call,
    add_sink_gradients,
    launch,
    padded,
    window,
)
from linearize.ops.liger_window import window_gradients


class Solved(NamedTuple):
    """What the forward pass makes of keys and values; the names are those of `liger_delta_forward_triton`."""

    key: Tensor
    residual: Tensor
    left: Tensor
    solved: Tensor
    beta: Tensor
    log_g: Tensor
    states: Tensor


def empty(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For what the forward pass makes but for the gates, in the order of `Solved`."""
    D, V, bounded = call.k.shape[3], call.v.shape[3], torch.float32 if call.dtype == torch.float32 else torch.float16
    key, residual, left = (torch.empty_like(x, dtype=call.dtype) for x in (call.k, call.v, call.k))
    solved = key.new_empty(call.pairs, call.chunks, CHUNK, CHUNK, dtype=bounded)
    return key, residual, left, solved, key.new_empty(call.pairs, call.chunks, D, V)


def heads(call: Call) -> dict[str, Any]:
    """How kernels are told the shapes."""
    V = call.v.shape[3]
    return call.heads() | {"V": V, "VP": padded(V), "PACKED": call.packed}


def key_heads(call: Call) -> dict[str, Any]:
    """The same for kernels that see no queries."""
    return {name: value for name, value in heads(call).items() if name != "GROUPS"}


def keys_alone(call: Call) -> dict[str, Any]:
    """The same for kernels that see no values either."""
    return {name: value for name, value in key_heads(call).items() if name not in ("V", "VP")}


def fine(call: Call) -> dict[str, Any]:
    """How kernels are told the type of operands that are in fp16's range, as they come from vectors of length 1."""
    return {"FINE": tl.float32 if call.dtype == torch.float32 else tl.float16}


def gated(call: Call) -> bool:
    """Whether there is a decay."""
    return call.gate == "gated_deltanet"


def segments_of(call: Call, blocks: int) -> tuple[int, int]:
    """Into how many segments a pass over the states is cut, and their chunks: as many as give each program of a pass a
    multiprocessor of its own (in the first pass two share one), but no more than make the fewest steps; one where that
    saves less than about half of the steps."""
    wanted = min(MULTIPROCESSORS // (call.pairs * blocks), math.isqrt(2 * call.chunks))  # fewest: 2 · size + segments
    if wanted < 4 or call.chunks < 64:
        return 1, call.chunks
    size = triton.cdiv(call.chunks, wanted)
    return triton.cdiv(call.chunks, size), size


def pass_over_states(call: Call, name: str, kernel: Any, inputs: tuple, initial: Tensor, made: tuple) -> Tensor:
    """Write what such a kernel makes of every chunk, and return the state, or its gradient, at the end.

    Where there are too few programs, the sequence is cut into segments: first what each of them but the last makes of
    what enters it, then what enters each, then all at once.
    """
    T, D, V = call.q.shape[1], call.k.shape[3], call.v.shape[3]
    BV = min(LAUNCHES[name][padded(D)].block, padded(V))
    blocks = triton.cdiv(V, BV)
    segments, size = segments_of(call, blocks)
    options = launch(name, call)
    told = key_heads(call) | {"BV": BV, "GATED": gated(call), "STAGES": options["num_stages"]} | options
    starts, final = initial, torch.empty_like(initial)
    if segments > 1:
        effects = initial.new_empty(call.pairs, segments - 1, D, V + D)
        grid = triton.cdiv(padded(V) + padded(D), BV), segments - 1, call.pairs
        kernel[grid](*inputs, initial, *made, effects, T, size, STORE=False, **told)
        starts = initial.new_empty(call.pairs, segments, D, V)
        carried = min(LAUNCHES["delta_carry"][padded(D)].block, padded(V))
        kernels.delta_carry_kernel[(triton.cdiv(V, carried), call.pairs)](
            initial, effects, starts, segments, D=D, DP=padded(D), V=V, BV=carried, PART=padded(D) if D <= 128 else 64,
            **launch("delta_carry", call),
        )  # fmt: skip
    kernel[(blocks, segments, call.pairs)](*inputs, starts, *made, final, T, size, STORE=True, **told)
    return final


def add_recurrence(call: Call, beta: Tensor, log_g: Tensor, initial: Tensor, output: Tensor) -> tuple[Tensor, Solved]:
    """Add the recurrence to the output, and return its final state and what it was made of; β and the log decay
    `[B * KV, T]` are written, unless the call says that they are given."""
    B, T, H, _ = call.q.shape
    key, residual, left, solved, states = empty(call)
    told = {"FEATURE": call.feature_map, "GATED": gated(call)}
    kernels.delta_solve_kernel[(call.chunks, call.pairs)](
        call.k, call.first, key, left, solved, beta, log_g, T, call.rate, call.strength,
        **told, **keys_alone(call), **fine(call), **launch("delta_solve", call),
    )  # fmt: skip
    inputs = key, call.v, left, call.first, beta, log_g
    final = pass_over_states(call, "delta_states", kernels.delta_states_kernel, inputs, initial, (states, residual))
    kernels.delta_output_kernel[(call.chunks, B * H)](
        call.q, key, residual, solved, call.mixing, call.first, log_g, states, output, T,
        **told, **heads(call), **fine(call), **launch("delta_output", call),
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
    dread, dstates = torch.empty_like(states), torch.empty_like(states)
    dresidual, dkey, dsums = torch.empty_like(residual), torch.empty_like(key), torch.empty_like(log_g)
    if call.k.shape[3] > 128:
        wide_query_gradients(call, made, doutput, sums.q, dread, dresidual, dkey, dsums)
    else:
        gradients.delta_query_gradients_kernel[grid](
            call.q, key, residual, solved, call.mixing, call.first, log_g, states, doutput, sums.q, sums.mixing, dread,
            dresidual, dkey, dsums, T,
            **told, **heads(call), **fine(call), **launch("delta_query_gradients", call),
        )  # fmt: skip
    inputs, kernel = (key, left, call.first, beta, log_g, dread), gradients.delta_state_gradients_kernel
    dinitial = pass_over_states(call, "delta_state_gradients", kernel, inputs, dfinal, (dresidual, dstates))
    gradients.delta_key_gradients_kernel[grid](
        call.k, call.v, key, residual, solved, call.first, beta, log_g, states, dstates, dresidual, dkey, dsums,
        sums.k, sums.v, sums.beta, sums.log_g, T, call.rate, call.strength,
        **told, **key_heads(call), **launch("delta_key_gradients", call),
    )  # fmt: skip
    return dinitial


def wide_query_gradients(
    call: Call,
    made: Solved,
    doutput: Tensor,
    dq: Tensor,
    dread: Tensor,
    dresidual: Tensor,
    dkey: Tensor,
    dsums: Tensor,
) -> None:
    """As `delta_query_gradients_kernel`, of given gates and more than 128 channels of keys."""
    B, T, H, D = call.q.shape
    dscores = made.key.new_empty(B * H, call.chunks, CHUNK, CHUNK)
    given = call.first, made.log_g, made.states, doutput, dscores
    told = {name: value for name, value in heads(call).items() if name != "DP"} | {"GATED": gated(call)}
    score, channel = (LAUNCHES[f"delta_{name}_gradients"][padded(D)].block for name in ("score", "channel"))
    wide.delta_score_gradients_kernel[(call.chunks, call.pairs)](
        call.q, made.key, made.residual, made.solved, *given, dresidual, dsums, T,
        BLOCK=score, **told, **fine(call), **launch("delta_score_gradients", call),
    )  # fmt: skip
    wide.delta_channel_gradients_kernel[(call.chunks, call.pairs, triton.cdiv(D, channel))](
        call.q, made.key, *given, dq, dread, dkey, T, BLOCK=channel, **told, **launch("delta_channel_gradients", call)
    )


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
