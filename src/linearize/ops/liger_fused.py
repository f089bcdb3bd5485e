"""Liger Attention by its Triton kernels: launch settings, and what runs forward and backward."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler.compiler import max_shared_mem

from linearize.ops import liger_backward_triton as gradients
from linearize.ops import liger_forward_triton as kernels
from linearize.ops import liger_group_triton as grouped
from linearize.ops import liger_steep_triton as steep
from linearize.ops import liger_window_triton as windows
from linearize.ops.dispatch import from_hopper_on
from linearize.ops.liger import Rope, Settings, no_state

CHUNK = 64
ONE_DECAY_A_HEAD = ("mlstm", "mamba2", "lightning")
MULTIPROCESSORS = 132  # programs that a pass over the states needs to be busy; H100


class Launch(NamedTuple):
    """How a kernel runs."""

    num_warps: int
    num_stages: int
    block: int = 64  # value channels of one program, in the passes over the states; rows at a time, of one warp
    registers: int = 0  # of a thread at most; 0 for what the compiler likes
    heads: int = 1  # query heads at once, in `group_output`, if their number divides a group's


# by padded head size; by reasoning about registers and shared memory, and tuned on a device at 128, but for passes over
# the states, `group_output`, windows of more than a chunk and what steep chunks add, and in the stages of the delta
# rule's passes at 64. At 16, `delta_output` of four warps is wrong on an H200 as Triton 3.6 compiles it, and of one
# warp right. With 168 registers `output`, `group_output` and `window` at 64 have three programs of four warps on a
# multiprocessor
LAUNCHES: dict[str, dict[int, Launch]] = {
    "window": {16: Launch(4, 1), 32: Launch(4, 1), 64: Launch(4, 1, registers=168), 128: Launch(4, 1)},
    "prepare": {16: Launch(1, 1, 32), 32: Launch(1, 1, 16), 64: Launch(1, 1, 16), 128: Launch(1, 1, 4)},
    "states": {16: Launch(1, 2, 16), 32: Launch(2, 2, 32), 64: Launch(4, 3), 128: Launch(4, 3)},
    "output": {16: Launch(4, 1), 32: Launch(4, 1), 64: Launch(4, 1, registers=168), 128: Launch(4, 1)},
    "group_output": {16: Launch(4, 1), 32: Launch(4, 1), 64: Launch(4, 1, registers=168), 128: Launch(8, 1, heads=2)},
    "state_gradients": {16: Launch(1, 2, 16), 32: Launch(2, 2, 32), 64: Launch(4, 3), 128: Launch(4, 3)},
    "query_gradients": {16: Launch(4, 1), 32: Launch(4, 1), 64: Launch(4, 1), 128: Launch(4, 1)},
    "key_gradients": {16: Launch(4, 1), 32: Launch(4, 1), 64: Launch(4, 1), 128: Launch(4, 1)},
    "gate_gradients": {16: Launch(1, 1, 32), 32: Launch(1, 1, 16), 64: Launch(1, 1, 16), 128: Launch(1, 1, 4)},
    "window_gradients": {16: Launch(4, 2), 32: Launch(4, 2), 64: Launch(4, 2), 128: Launch(4, 2)},
    "add_output": {16: Launch(4, 1), 32: Launch(4, 1), 64: Launch(4, 1), 128: Launch(8, 1)},
    "add_gradients": {16: Launch(4, 1), 32: Launch(4, 1), 64: Launch(4, 1), 128: Launch(8, 1)},
    "long_window": {16: Launch(4, 1), 32: Launch(4, 1), 64: Launch(4, 2), 128: Launch(8, 2)},
    "long_window_query_gradients": {16: Launch(4, 1), 32: Launch(4, 1), 64: Launch(4, 2), 128: Launch(4, 1)},
    "window_query_gradients": {16: Launch(4, 1), 32: Launch(4, 1), 64: Launch(4, 1), 128: Launch(4, 2)},
    "window_key_gradients": {16: Launch(4, 1), 32: Launch(4, 1), 64: Launch(4, 1), 128: Launch(8, 1)},
    "delta_solve": {16: Launch(4, 1), 32: Launch(4, 1), 64: Launch(4, 1), 128: Launch(4, 1)},
    "delta_states": {16: Launch(1, 2, 16), 32: Launch(2, 2, 32), 64: Launch(4, 3, 32), 128: Launch(4, 2)},
    "delta_carry": {16: Launch(4, 2, 16), 32: Launch(4, 2, 16), 64: Launch(4, 3, 16), 128: Launch(8, 3, 16)},
    "delta_output": {16: Launch(1, 1), 32: Launch(4, 1), 64: Launch(4, 1), 128: Launch(4, 1)},
    "delta_query_gradients": {16: Launch(4, 1), 32: Launch(4, 1), 64: Launch(4, 1), 128: Launch(8, 1)},
    "delta_score_gradients": {256: Launch(8, 1)},
    "delta_channel_gradients": {256: Launch(8, 1, 64)},
    "delta_state_gradients": {16: Launch(1, 2, 16), 32: Launch(2, 2, 32), 64: Launch(4, 3, 32), 128: Launch(4, 2)},
    "delta_key_gradients": {16: Launch(4, 1), 32: Launch(4, 1), 64: Launch(4, 1), 128: Launch(8, 1)},
}
# with gates that are given
LAUNCHES["given"] = {16: Launch(4, 1), 32: Launch(4, 1), 64: Launch(8, 1, registers=128)}
LAUNCHES["given"][128] = LAUNCHES["given"][64]
LAUNCHES["near"] = {16: Launch(1, 1), 32: Launch(2, 1), 64: Launch(4, 1), 128: Launch(8, 1)}
LAUNCHES["read"] = {16: Launch(4, 1), 32: Launch(4, 1), 64: Launch(4, 1), 128: Launch(8, 1)}
# two stages are a tenth faster at 128 and do not fit into 99 KB of shared memory
LAUNCHES["read_gradients"] = {16: Launch(4, 1), 32: Launch(4, 1), 64: Launch(8, 1), 128: Launch(4, 1)}
LAUNCHES["write_gradients"] = {16: Launch(4, 1), 32: Launch(4, 1), 64: Launch(4, 1), 128: Launch(4, 1)}
# keys of up to 256 are for the delta rule with gates that are given, over values of up to 64
for _kernel in ("delta_solve", "delta_output", "delta_key_gradients"):
    LAUNCHES[_kernel][256] = Launch(8, 1)
for _kernel in ("delta_states", "delta_state_gradients"):
    LAUNCHES[_kernel][256] = Launch(8, 2, 32)
LAUNCHES["delta_carry"][256] = Launch(8, 2, 16)


class Call(NamedTuple):
    """One call: its tensors, contiguous, and what the kernels are compiled for."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    mixing: Tensor
    first: Tensor
    decay: Tensor
    rate: float
    lower: float
    strength: float
    scale: float
    rotary: int
    window: int
    sinks: int
    gate: str
    feature_map: str
    packed: bool

    @property
    def chunks(self) -> int:
        """In a sequence."""
        return triton.cdiv(self.q.shape[1], CHUNK)

    @property
    def pairs(self) -> int:
        """Sequences times key/value heads: how many states there are."""
        return self.k.shape[0] * self.k.shape[2]

    @property
    def rope_stride(self) -> int:
        """From one sequence's angles to the next one's, in tokens: kernels, which multiply it by the rotated channels,
        so know that rows are aligned, and load several channels at once."""
        return self.q.shape[1] if self.cos.dim() == 3 and self.cos.shape[0] > 1 else 0

    @property
    def scalar(self) -> bool:
        """Whether a head has one decay."""
        return self.gate in ONE_DECAY_A_HEAD

    @property
    def dtype(self) -> torch.dtype:
        """Of the operands of matrix products, as values have it; fp16 has not the range for decayed keys."""
        return torch.float32 if self.v.dtype == torch.float32 else torch.bfloat16

    def heads(self) -> dict[str, Any]:
        """How kernels are told the shapes and the type of operands."""
        D, KV = self.q.shape[3], self.k.shape[2]
        dtype = tl.float32 if self.dtype == torch.float32 else tl.bfloat16
        return {"KV": KV, "GROUPS": self.q.shape[2] // KV, "D": D, "DP": padded(D), "DTYPE": dtype}

    def grid(self, heads: int) -> tuple[int, int, int]:
        """Of kernels that ask `program` for the chunk and head they have; so many heads, or groups, a sequence."""
        return heads, self.chunks, self.q.shape[0]

    def gating(self) -> dict[str, Any]:
        """How kernels are told what becomes of a key."""
        return {"GATE": self.gate, "FEATURE": self.feature_map, "SCALAR": self.scalar}


class Operands(NamedTuple):
    """What `prepare_kernel` makes of keys; `for_queries` of a decay for each channel is rounded as operands are."""

    near_key: Tensor
    turned_key: Tensor
    totals: Tensor
    for_queries: Tensor


def padded(D: int) -> int:
    """The head size as kernels see it."""
    return max(16, triton.next_power_of_2(D))


def launch(kernel: str, call: Call) -> dict[str, int]:
    """Keyword arguments of a launch; operands in fp32 take twice the memory."""
    settings = LAUNCHES[kernel][padded(call.q.shape[3])]
    if call.dtype == torch.float32:
        num_warps = 8 if call.q.shape[3] > 64 else settings.num_warps
        settings = settings._replace(num_stages=1, num_warps=num_warps, registers=0)
    limit = {"maxnreg": settings.registers} if settings.registers else {}
    return {"num_warps": settings.num_warps, "num_stages": settings.num_stages, **limit}


def by_halves(call: Call) -> bool:
    """Whether tiles are in parts (`liger_parts_triton`): where all channels are rotated, or none, and products take
    operands from shared memory. Older GPUs take them from registers, which would not hold as many."""
    D = call.q.shape[3]
    return D == padded(D) >= 32 and call.rotary in (0, D) and from_hopper_on(call.q)  # a product has 16 at least


def fills(call: Call) -> bool:
    """Whether there is a program for every multiprocessor where each has a chunk and a group of heads."""
    return call.chunks * call.pairs >= MULTIPROCESSORS


def heads_at_once(call: Call) -> int:
    """Of `group_output`; 0 where there is no group, too few of them, or too little shared memory for what it holds, as
    there is in fp32."""
    groups, DP = call.q.shape[2] // call.k.shape[2], padded(call.q.shape[3])
    if groups == 1 or not fills(call):
        return 0
    heads = math.gcd(LAUNCHES["group_output"][DP].heads, groups)
    held = 2 * DP * (6 * CHUNK + DP + 2 * CHUNK * heads)  # as Triton 3.6 lays it out for bf16
    if call.q.is_cuda and (call.dtype == torch.float32 or held > max_shared_mem(call.q.device.index)):
        return 0
    return heads


def segments_of(call: Call, blocks: int) -> tuple[int, int]:
    """Into how many segments a pass over the states is cut, and their chunks: one, if that fills the device."""
    wanted = 1
    if call.pairs * blocks < MULTIPROCESSORS // 2 and call.chunks >= 64:
        wanted = min(MULTIPROCESSORS * 2 // (call.pairs * blocks), call.chunks // 16)
    size = triton.cdiv(call.chunks, wanted)
    return triton.cdiv(call.chunks, size), size


def pass_over_states(call: Call, name: str, kernel: Any, inputs: tuple, initial: Tensor, told: dict) -> tuple:
    """The state (or its gradient) at every chunk, and what comes out at the end, fp32.

    Where there are too few programs, the sequence is cut into segments: first what each of them adds, then what
    enters each, then all at once.
    """
    D = call.q.shape[3]
    BV = min(LAUNCHES[name][padded(D)].block, padded(D))
    blocks = triton.cdiv(D, BV)
    segments, size = segments_of(call, blocks)
    states = call.q.new_empty(call.pairs, call.chunks, D, D, dtype=call.dtype)
    final = torch.empty_like(initial)
    told = told | {"BV": BV, "PACKED": call.packed} | launch(name, call)
    grid = (blocks, segments, call.pairs)
    rest = (call.q.shape[1], size)
    if segments == 1:
        kernel[grid](*inputs, initial, states, final, final, *rest, STORE=True, **told)
        return states, final
    starts = initial.new_empty(call.pairs, segments, D, D)
    finals, products = torch.empty_like(starts), initial.new_empty(call.pairs, segments, D)
    kernel[grid](*inputs, torch.zeros_like(starts), states, finals, products, *rest, STORE=False, **told)
    reverse = kernel is gradients.state_gradients_kernel
    kernels.carry_kernel[(blocks, call.pairs)](
        initial, finals, products, starts, final, segments, D=D, DP=padded(D), BV=BV, REVERSE=reverse, num_warps=4
    )
    kernel[grid](*inputs, starts, states, finals, products, *rest, STORE=True, **told)
    return states, final


def without_groups(told: dict[str, Any]) -> dict[str, Any]:
    """For kernels that see no queries."""
    return {name: value for name, value in told.items() if name != "GROUPS"}


def by_rows(name: str, call: Call) -> dict[str, Any]:
    """How a kernel of one warp, which goes through its chunk by rows and makes no products, is told shapes and rows."""
    D, settings = call.q.shape[3], LAUNCHES[name][padded(call.q.shape[3])]
    told = {"KV": call.k.shape[2], "D": D, "DP": padded(D), "ROWS": settings.block}
    return told | {"num_warps": settings.num_warps, "num_stages": settings.num_stages}


def prepare(call: Call) -> Operands:
    """Operands of the matrix products; without RoPE, the window's are the projections themselves."""
    T, D = call.q.shape[1], call.q.shape[3]
    near_key = torch.empty_like(call.k, dtype=call.dtype)
    turned_key = torch.empty_like(near_key) if call.rotary > 0 else call.k
    totals = call.q.new_empty(call.pairs, call.chunks, D, dtype=torch.float32)
    K, dtype = (1, torch.float32) if call.scalar else (D, call.dtype)
    made = Operands(near_key, turned_key, totals, totals.new_empty(*call.k.shape[:3], K, dtype=dtype))
    kernels.prepare_kernel[call.grid(call.k.shape[2])](
        call.k, call.cos, call.sin, call.decay, *made, T, call.rope_stride, call.rate, call.lower, R=call.rotary,
        **call.gating(), **by_rows("prepare", call),
    )  # fmt: skip
    return made


def forward(call: Call, initial: Tensor, keep: bool = True) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, final state, and what `kept` names, which is not all written unless `keep`."""
    B, T, H, _ = call.q.shape
    made, told = prepare(call), call.heads()
    inputs = (made.near_key, call.v, call.first, made.totals)
    states, final = pass_over_states(call, "states", kernels.states_kernel, inputs, initial, without_groups(told))
    output, lse = torch.empty_like(call.q), call.q.new_empty(B, H, T, dtype=torch.float32)
    near_query = torch.empty_like(call.q, dtype=call.dtype) if keep else output  # an argument that nothing reads
    turned_query = torch.empty_like(near_query) if keep and call.rotary > 0 else output
    given = (
        call.q, *made, call.v, call.cos, call.sin, call.mixing, call.first, states, output, near_query, turned_query,
        lse, T, call.rope_stride, call.scale,
    )  # fmt: skip
    told_output = told | {
        "R": call.rotary, "W": call.window, "SINKS": call.sinks, "FEATURE": call.feature_map, "SCALAR": call.scalar,
        "PACKED": call.packed, "KEEP": keep,
    }  # fmt: skip
    if heads := heads_at_once(call):
        kernel = grouped.group_output_kernel[(call.chunks, call.pairs)]
        kernel(*given, HEADS=heads, HALVES=by_halves(call), **told_output, **launch("group_output", call))
    else:
        kernels.output_kernel[call.grid(H)](*given, HALVES=by_halves(call), **told_output, **launch("output", call))
    steep.add_output_kernel[(triton.cdiv(call.chunks, steep.STEP.value), call.pairs)](
        call.q, call.k, call.v, call.mixing, call.first, call.decay, made.totals, output, T, call.rate, call.lower,
        PACKED=call.packed, **told, **call.gating(), **launch("add_output", call),
    )  # fmt: skip
    turned = [turned_query, made.turned_key] if call.rotary > 0 else []
    return output, final, [near_query, made.near_key, made.totals, states, lse, *turned]


def kept(call: Call) -> list[Tensor]:
    """Tensors as those that a backward pass needs: queries and keys for the recurrence, the decay of every chunk, the
    state before it, the window's log-sum-exp, and queries and keys after RoPE, where there is RoPE."""
    B, T, H, D = call.q.shape
    near, turned = ([torch.empty_like(x, dtype=call.dtype) for x in (call.q, call.k)] for _ in range(2))
    totals = call.q.new_empty(call.pairs, call.chunks, D, dtype=torch.float32)
    states = call.q.new_empty(call.pairs, call.chunks, D, D, dtype=call.dtype)
    lse = call.q.new_empty(B, H, T, dtype=torch.float32)
    return [*near, totals, states, lse, *(turned if call.rotary > 0 else [])]


def window(call: Call, output: Tensor, lse: Tensor | None = None) -> None:
    """Write (1 - w) · window to the output, and its log-sum-exp to `lse` `[B, H, T]`."""
    B, T, H, _ = call.q.shape
    given = (
        call.q, call.k, call.v, call.cos, call.sin, call.mixing, call.first, output, output if lse is None else lse, T,
        call.rope_stride, call.scale,
    )  # fmt: skip
    told = call.heads() | {
        "R": call.rotary, "W": call.window, "SINKS": call.sinks, "PACKED": call.packed, "KEEP": lse is not None
    }  # fmt: skip
    if call.window > CHUNK:
        windows.long_window_kernel[call.grid(H)](*given, **told, **launch("long_window", call))
        return
    heads = H // call.k.shape[2] if fills(call) else 1
    kernel = windows.window_kernel[call.grid(H // heads)]
    kernel(*given, TURNS=heads, **told, **launch("window", call))


def run(call: Call, initial: Tensor) -> tuple[Tensor, Tensor]:
    """Output and final state, where there is no backward pass; what one would need is freed."""
    return forward(call, initial, keep=False)[:2]


def backward(call: Call, made_before: Sequence[Tensor], doutput: Tensor, dfinal: Tensor) -> tuple[Tensor, ...]:
    """The gradients of q, k, v, the mixing weights and the initial state, from what `kept` names."""
    B, T, H, D = call.q.shape
    near_query, near_key, totals, states, lse, *turned = made_before
    turned_query, turned_key = turned or (call.q, call.k)
    dq, dk, dv = torch.empty_like(call.q), torch.empty_like(call.k), torch.empty_like(call.v)
    delta, dmixing = torch.empty_like(lse), lse.new_empty(B, H, call.chunks)
    terms = lse.new_empty(*call.k.shape[:3], 1 if call.scalar else D)
    sinks = [lse.new_empty(B, H, call.chunks, call.sinks, D) for _ in range(2)]
    told, grid = call.heads() | {"PACKED": call.packed}, call.grid(call.k.shape[2])
    turning, gate, gating = (call.cos, call.sin), (call.rate, call.lower), call.gating()
    inputs = (near_query, doutput, call.mixing, call.first, totals)
    kernel = gradients.state_gradients_kernel
    dstates, dinitial = pass_over_states(call, "state_gradients", kernel, inputs, dfinal, call.heads())
    windows.window_query_gradients_kernel[call.grid(H)](
        turned_query, turned_key, call.v, *turning, call.mixing, call.first, lse, doutput, dq, delta, dmixing, *sinks,
        T, call.rope_stride, call.scale, R=call.rotary, W=call.window, SINKS=call.sinks, TURNED=True,
        HALVES=by_halves(call), **told, **launch("window_query_gradients", call),
    )  # fmt: skip
    gradients.query_gradients_kernel[grid](
        call.q, call.k, near_query, near_key, call.v, call.mixing, call.first, call.decay, totals, states, doutput, dq,
        dmixing, terms, T, *gate, **told, **gating, **launch("query_gradients", call),
    )  # fmt: skip
    dnear_key, lasts = lse.new_empty(call.k.shape), lse.new_empty(call.pairs, call.chunks, terms.shape[-1])
    gradients.key_gradients_kernel[grid](
        near_query, near_key, call.v, call.mixing, call.first, totals, states, dstates, doutput, dnear_key, lasts, dv,
        T, SCALAR=call.scalar, **told, **launch("key_gradients", call),
    )  # fmt: skip
    gradients.gate_gradients_kernel[grid](
        call.k, near_key, call.decay, totals, terms, dnear_key, lasts, dk, T, *gate,
        **gating, **by_rows("gate_gradients", call),
    )  # fmt: skip
    gradients.window_gradients_kernel[grid](
        turned_query, turned_key, call.v, *turning, call.mixing, call.first, lse, delta, doutput, dk, dv, T,
        call.rope_stride, call.scale, R=call.rotary, W=call.window, HALVES=by_halves(call), **told,
        **launch("window_gradients", call),
    )  # fmt: skip
    steep.add_gradients_kernel[(triton.cdiv(call.chunks, steep.STEP.value), call.pairs)](
        call.q, call.k, call.v, call.mixing, call.first, call.decay, totals, doutput, dq, dk, dv, dmixing, T,
        *gate, **told, **gating, **launch("add_gradients", call),
    )  # fmt: skip
    if call.sinks > 0:
        add_sink_gradients(call, dk, dv, *sinks)
    return dq, dk, dv, dmixing.sum((0, 2)), dinitial


def add_sink_gradients(call: Call, dk: Tensor, dv: Tensor, dsink_key: Tensor, dsink_values: Tensor) -> None:
    """What every chunk adds to the gradients of its document's sinks, the keys' taken back through RoPE."""
    B, T, KV, D = dk.shape
    # [B, chunks, sinks, KV, D], of all heads of a group together
    dkey, dvalues = (x.unflatten(1, (KV, -1)).sum(2).permute(0, 2, 3, 1, 4) for x in (dsink_key, dsink_values))
    if call.packed:
        begin = call.first[:, ::CHUNK].long()
        dkey, dvalues = (_sums_at_first_chunks(x, begin) for x in (dkey, dvalues))
    else:
        begin = torch.zeros(B, 1, dtype=torch.long, device=dk.device)
        dkey, dvalues = dkey.sum(1, keepdim=True), dvalues.sum(1, keepdim=True)
    # [B, chunks * sinks]; a slot past the sequence, or past a short document, has a gradient of 0
    index = (begin[:, :, None] + torch.arange(call.sinks, device=dk.device)).flatten(1).clamp(max=T - 1)
    dkey, dvalues = dkey.flatten(1, 2), dvalues.flatten(1, 2)
    if call.rotary > 0:
        cos, sin = (x.expand(B, -1, -1) if x.dim() == 3 else x.expand(B, *x.shape) for x in (call.cos, call.sin))
        wide = index[:, :, None].expand(-1, -1, call.rotary)
        cos, sin = (x.gather(1, wide)[:, :, None].float() for x in (cos, sin))
        turned, rest = dkey.split([call.rotary, D - call.rotary], dim=-1)
        left, right = (turned * sin).chunk(2, dim=-1)
        dkey = torch.cat([turned * cos + torch.cat([right, -left], dim=-1), rest], dim=-1)
    for total, part in ((dk, dkey), (dv, dvalues)):
        # of what meets at a token, all but one is 0: no order of additions can be felt
        total.scatter_add_(1, index[:, :, None, None].expand_as(part), part.to(total.dtype))


def _sums_at_first_chunks(x: Tensor, begin: Tensor) -> Tensor:
    """x `[B, chunks, ...]` added up over each document's chunks, in the first of them; 0 in the others."""
    leads = F.pad(begin[:, 1:] != begin[:, :-1], (1, 0), value=True)
    adds = leads[:, :, None] & (begin[:, :, None] == begin[:, None, :])
    with torch.autocast(x.device.type, enabled=False):
        return (adds.to(x.dtype) @ x.flatten(2)).view_as(x)


def call_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    settings: Settings,
    rope: Rope | None,
    state: Tensor | None,
    first: Tensor | None,
    decay: Tensor | None,
) -> tuple[Call, Tensor]:
    """What `liger.fused` is given, as kernels take it, and the initial state."""
    mixing = mixing.float().contiguous()
    initial = no_state(k) if state is None else state.float().contiguous()
    cos, sin = (mixing, mixing) if rope is None else (x.contiguous() for x in rope)  # an argument that nothing reads
    call = Call(
        q=q.contiguous(), k=k.contiguous(), v=v.contiguous(), cos=cos, sin=sin, mixing=mixing,
        first=mixing if first is None else first.int().contiguous(),
        decay=mixing if decay is None else decay.float().contiguous(),
        rate=1.0 / settings.temperature, lower=settings.lower, strength=settings.strength, scale=settings.scale,
        rotary=0 if rope is None else cos.shape[-1], window=settings.window, sinks=settings.sinks,
        gate=settings.gate, feature_map=settings.feature_map, packed=first is not None,
    )  # fmt: skip
    return call, initial
