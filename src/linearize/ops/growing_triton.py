"""One token's softmax attention over all tokens so far, with the keys in parts: few heads would leave a GPU idle.

Flash-decoding: a program has one key/value head of one row and a part of its keys, and gives the part's output, its
largest score and its sum of weights; a second kernel puts the parts together. Parts behind the newest token read none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # keys at a time; half as many of keys larger than LARGE
LARGE = 256  # bytes
LEAST = 16  # the smallest side of a matrix product: a group's queries are made as many
PARTS = 32  # of the keys of one head, at most
PROGRAMS = 512  # that a GPU is to have


@triton.jit
def parts_kernel(
    q, keys, values, seen, time, outputs, largest, sums, room, part, scale,
    KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """`outputs` `[B KV, parts, ROWS, WIDTH]`, `largest` and `sums` `[B KV, parts, ROWS]`, fp32."""
    pair, number, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row = pair // KV
    queries, channels = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    there = channels[None, :] < D
    at = (pair * GROUP + queries[:, None]) * D + channels[None, :]
    query = tl.load(q + at, mask=(queries[:, None] < GROUP) & there, other=0.0)
    most = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, WIDTH], tl.float32)
    end = tl.minimum(number * part + part, tl.load(time).to(tl.int32) + 1)
    for first in range(number * part, end, KEYS):
        index = first + tl.arange(0, KEYS)
        is_seen = (index < end) & (tl.load(seen + row.to(tl.int64) * room + index, mask=index < end, other=0) != 0)
        place = (pair.to(tl.int64) * room + index)[:, None] * D + channels[None, :]
        key = tl.load(keys + place, mask=is_seen[:, None] & there, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(is_seen[None, :], scores, -float("inf"))
        more = tl.maximum(most, tl.max(scores, 1))
        shift = tl.where(more == -float("inf"), 0.0, more)
        weights = tl.exp(scores - shift[:, None])
        kept = tl.exp(most - shift)
        value = tl.load(values + place, mask=is_seen[:, None] & there, other=0.0)
        output = output * kept[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        total = total * kept + tl.sum(weights, 1)
        most = more
    mine = (pair.to(tl.int64) * parts + number) * ROWS + queries
    tl.store(outputs + mine[:, None] * WIDTH + channels[None, :], output)
    tl.store(largest + mine, most)
    tl.store(sums + mine, total)


@triton.jit
def together_kernel(
    outputs, largest, sums, result, parts,
    GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`result` `[B KV, GROUP, D]`, of which at least one key of each query was seen."""
    pair = tl.program_id(0)
    queries, channels = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    most = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, WIDTH], tl.float32)
    for number in range(0, parts):
        part = (pair.to(tl.int64) * parts + number) * ROWS + queries
        here = tl.load(largest + part)
        more = tl.maximum(most, here)
        shift = tl.where(more == -float("inf"), 0.0, more)
        kept, added = tl.exp(most - shift), tl.exp(here - shift)
        own = tl.load(outputs + part[:, None] * WIDTH + channels[None, :])
        output = output * kept[:, None] + own * added[:, None]
        total = total * kept + tl.load(sums + part) * added
        most = more
    output = output / total[:, None]
    tl.store(
        result + (pair * GROUP + queries[:, None]) * D + channels[None, :],
        output.to(result.dtype.element_ty),
        mask=(queries[:, None] < GROUP) & (channels[None, :] < D),
    )


def attend(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, time: Tensor, scale: float) -> Tensor:
    """Of q `[B, KV, G, D]`, as q is; of keys and values `[B, KV, room, D]` those up to `time` `[1]` that are `seen`
    `[B, room]`, one at least."""
    B, KV, G, D = q.shape
    room, rows, width = keys.shape[2], max(LEAST, triton.next_power_of_2(G)), max(16, triton.next_power_of_2(D))
    block = BLOCK if width * keys.itemsize <= LARGE else BLOCK // 2
    blocks = triton.cdiv(room, block)
    part = block * triton.cdiv(blocks, min(PARTS, max(1, PROGRAMS // (B * KV)), blocks))
    parts = triton.cdiv(room, part)
    outputs = torch.empty(B * KV, parts, rows, width, dtype=torch.float32, device=q.device)
    largest, sums = outputs.new_empty(2, B * KV, parts, rows)
    result = torch.empty_like(q)
    sizes = {"GROUP": G, "D": D, "WIDTH": width, "ROWS": rows}
    parts_kernel[(B * KV, parts)](
        q, keys, values, seen.view(torch.uint8), time, outputs, largest, sums, room, part, scale,
        KV=KV, KEYS=block, num_warps=4, **sizes,
    )  # fmt: skip
    together_kernel[(B * KV,)](outputs, largest, sums, result, parts, num_warps=4, **sizes)
    return result
