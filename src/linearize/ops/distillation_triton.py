"""The loss of distillation over the vocabulary and its gradient in one kernel.

A program has one token. It goes over both rows of logits twice: forwards for their normalizers, and back for what the
loss and the gradient take, by when most of them are still in a cache: one token at a time is at work on a
multiprocessor, so that all of them together are 26 of an H100's 50 MB at a vocabulary of 49,152. Memory is read once
and written once. Logits are rounded as they are given, the gradient once; all between is in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.ops.liger_triton import LOG2_E, exp

BYTES = 16  # of one load of a thread
FAR = tl.constexpr(-1e30)  # below all logits, and finite, so that no infinities are subtracted
THREADS = 1024  # of a program at most: with 64 registers each, one program fills a multiprocessor


@triton.jit
def load_logits(row, places, V: tl.constexpr, BLOCK: tl.constexpr):
    """`[LANES, WIDTH]` of a row, FAR past its end, where it does not end with a block."""
    x = tl.load(row + places, mask=places < V, other=0.0).to(tl.float32)
    if V % BLOCK > 0:
        x = tl.where(places < V, x, FAR)
    return x


@triton.jit
def with_more(largest, total, x):
    """The largest logit of each lane and the sum of exp(logit - largest), `[LANES]`, with those of x
    `[LANES, WIDTH]`."""
    more = tl.maximum(largest, tl.max(x, 1))
    return more, total * exp(largest - more) + tl.sum(exp(x - more[:, None]), 1)


@triton.jit
def normalizer(largest, total):
    """Of a row, from all lanes: its largest logit, and the log to base 2 of its sum of exp(logit - largest)."""
    most = tl.max(largest, 0)
    return most, tl.log2(tl.sum(total * exp(largest - most), 0))


@triton.jit
def distillation_kernel(
    student, teacher, targets, weights, losses, gradient, kl_weight,
    V: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, TAUGHT: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """The loss of a row of logits, to `losses`, and its gradient, both times the row's weight; TAUGHT where there is a
    teacher, NEXT where the next token has a share. `gradient` may be the teacher's logits: each element is written by
    the thread that has read it."""
    row = tl.program_id(0)
    at, target, unit = row.to(tl.int64) * V, tl.load(targets + row), tl.load(weights + row)
    BLOCK: tl.constexpr = LANES * WIDTH
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    lane, column = tl.arange(0, LANES)[:, None], tl.arange(0, WIDTH)[None, :]
    # a thread's logits are one load where rows are aligned; else loads of neighbours are side by side
    places = lane * WIDTH + column if V % WIDTH == 0 else column * LANES + lane
    if unit == 0.0:
        tl.store(losses + row, 0.0)
        zeros = tl.zeros([LANES, WIDTH], gradient.dtype.element_ty)
        for n in range(BLOCKS):
            tl.store(gradient + at + n * BLOCK + places, zeros, mask=n * BLOCK + places < V)
        return
    largest, total = tl.full([LANES], FAR, tl.float32), tl.zeros([LANES], tl.float32)
    taught_largest, taught_total = largest, total
    for n in range(BLOCKS):
        x = load_logits(student + at, n * BLOCK + places, V, BLOCK)
        if TAUGHT:
            y = load_logits(teacher + at, n * BLOCK + places, V, BLOCK)
            taught_largest, taught_total = with_more(taught_largest, taught_total, y)
        largest, total = with_more(largest, total, x)
    largest, total = normalizer(largest, total)
    if TAUGHT:
        taught_largest, taught_total = normalizer(taught_largest, taught_total)
    divergence = tl.zeros([LANES, WIDTH], tl.float32)
    for n in range(BLOCKS):
        here = (BLOCKS - 1 - n) * BLOCK + places  # what was read last is most likely in a cache
        log_q = (load_logits(student + at, here, V, BLOCK) - largest) * LOG2_E - total
        slope = tl.exp2(log_q)
        if TAUGHT:
            log_p = (load_logits(teacher + at, here, V, BLOCK) - taught_largest) * LOG2_E - taught_total
            p = tl.exp2(log_p)
            divergence += p * (log_p - log_q)
            slope -= p * kl_weight
        else:
            slope *= 1.0 - kl_weight
        if NEXT:
            slope = tl.where(here == target, slope - (1.0 - kl_weight), slope)
        tl.store(gradient + at + here, (slope * unit).to(gradient.dtype.element_ty), mask=here < V)
    loss = kl_weight * tl.sum(tl.sum(divergence, 1), 0)
    if NEXT:
        said = (tl.load(student + at + target).to(tl.float32) - largest) * LOG2_E - total
        loss -= (1.0 - kl_weight) * said
    tl.store(losses + row, loss * unit / LOG2_E)


def distillation(
    student: Tensor, teacher: Tensor | None, targets: Tensor, kl_weight: float, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """As `distillation.distillation`; the gradient is written over the teacher's logits where these are of its type."""
    student, taught = student.contiguous(), teacher is not None
    teacher = student if teacher is None else teacher.contiguous()
    gradient = teacher if taught and teacher.dtype == student.dtype else student.new_empty(student.shape)
    losses = torch.empty_like(weights)
    V, width = student.shape[1], BYTES // student.itemsize
    lanes = min(THREADS, triton.next_power_of_2(triton.cdiv(V, width)))
    distillation_kernel[(len(student),)](
        student, teacher, targets.contiguous(), weights, losses, gradient, kl_weight,
        V=V, LANES=lanes, WIDTH=width, TAUGHT=taught, NEXT=kl_weight < 1, num_warps=max(1, lanes // 32),
    )  # fmt: skip
    return losses.sum(), gradient
