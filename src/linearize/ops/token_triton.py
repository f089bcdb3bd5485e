"""The kernels of `token`: one before a decoding step's layers, and one after them."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from linearize.ops.step import Clock
from linearize.ops.token import Rings, Token

COLUMNS = 1024  # of an embedding, that a program copies
ROWS = 128  # sequences at a time, one for each thread: none reads what another one has moved on


@triton.jit
def write_angles(position, cos, sin, frequency, place, scaling, R: tl.constexpr, inside):
    """Both halves of a row of cosines and sines."""
    angle, half = position.to(tl.float32) * frequency, tl.arange(0, frequency.shape[0])
    c, s = tl.cos(angle) * scaling, tl.sin(angle) * scaling
    for begin in tl.static_range(0, R, R // 2):
        tl.store(cos + place + begin + half, c.to(cos.dtype.element_ty), mask=inside)
        tl.store(sin + place + begin + half, s.to(sin.dtype.element_ty), mask=inside)


@triton.jit
def begin_kernel(
    ids, table, hidden, position, time, rings, frequencies, cos, sin, B, E, vocabulary, scaling, limit,
    R: tl.constexpr, HALF: tl.constexpr, WINDOWS: tl.constexpr, TOTAL: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one token's row of the table `[vocabulary, E]`, or NaN where there is none, for padding too: a
    kernel raises no error. With the first of them cos and sin `[2 + windows, B, R]`, of the token, of where it sees
    the sinks from, and of what leaves each window."""
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns, half = part * BLOCK + tl.arange(0, BLOCK), tl.arange(0, HALF)
    own = tl.load(ids + b)
    there = tl.where((own >= 0) & (own < vocabulary), E, 0)  # columns
    row = tl.load(table + own * E + columns, mask=columns < there, other=float("nan"))
    tl.store(hidden + b * E + columns, row, mask=columns < E)
    if part == 0:
        here, inside = tl.load(position + b), half < R // 2
        frequency, t = tl.load(frequencies + half, mask=inside, other=0.0), tl.load(time)
        write_angles(here, cos, sin, frequency, b * R, scaling, R, inside)
        write_angles(tl.minimum(here, limit - 1), cos, sin, frequency, (B + b) * R, scaling, R, inside)
        ring = rings + b * TOTAL
        for index in tl.static_range(COUNT):
            leaving = tl.load(ring + t % WINDOWS[index])
            ring += WINDOWS[index]
            write_angles(leaving, cos, sin, frequency, ((2 + index) * B + b) * R, scaling, R, inside)


@triton.jit
def advance_kernel(
    time, real, valid, sink_time, position, rings, B,
    M: tl.constexpr, WINDOWS: tl.constexpr, TOTAL: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The one program moves the clock on, and puts the token's position into the rings."""
    t = tl.load(time)
    for begin in range(0, B, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        there = rows < B
        fresh, before = tl.load(valid + rows, mask=there, other=0) != 0, tl.load(real + rows, mask=there, other=0)
        tl.store(sink_time + rows * M + before, t, mask=there & fresh & (before < M))
        tl.store(real + rows, before + fresh.to(tl.int64), mask=there)
        if COUNT > 0:
            here, ring = tl.load(position + rows, mask=there, other=0).to(tl.int32), rings + rows * TOTAL
            for index in tl.static_range(COUNT):
                tl.store(ring + t % WINDOWS[index], here, mask=there)
                ring += WINDOWS[index]
    tl.debug_barrier()  # all threads have read the time
    tl.store(time, t + 1)


def windows_of(rings: Rings) -> dict[str, Any]:
    """The kernels' constants."""
    return {"WINDOWS": rings.windows, "TOTAL": sum(rings.windows), "COUNT": len(rings.windows)}


def begin(table: Tensor, rotary: Any, ids: Tensor, position: Tensor, limit: int, clock: Clock, rings: Rings) -> Token:
    """As `token.begin`, of the embeddings' table."""
    (B, _), E, R = ids.shape, table.shape[1], 2 * len(rotary.inv_freq)
    hidden, (cos, sin) = table.new_empty(B, E), table.new_empty(2, 2 + len(rings.windows), B, R)
    begin_kernel[(B, triton.cdiv(E, COLUMNS))](
        ids, table, hidden, position, clock.time, rings.positions, rotary.inv_freq, cos, sin, B, E,
        len(table), rotary.attention_scaling, limit,
        R=R, HALF=triton.next_power_of_2(R // 2), BLOCK=COLUMNS, **windows_of(rings),
    )  # fmt: skip
    rope, sinks, *leaving = zip(cos, sin, strict=True)
    return Token(hidden, rope, sinks, leaving)


def advance(clock: Clock, position: Tensor, rings: Rings) -> None:
    """As `token.advance`."""
    advance_kernel[(1,)](
        clock.time, clock.real, clock.valid, clock.sink_time, position, rings.positions, len(position),
        M=clock.sink_time.shape[1], BLOCK=ROWS, num_warps=ROWS // 32, **windows_of(rings),
    )  # fmt: skip
