"""Triton kernels on a CPU, by Triton's interpreter; TRITON_INTERPRET is set before this is imported.

The interpreter runs a launch's programs one after the other and reads any address, which a GPU does not: `checked`
finds what depends on that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _with_loop_bounds(tensor: Any, scope: Any) -> None:
    """Scalars of shape [1] as bounds of loops: NumPy 2.4 refuses `int` of them, which Triton 3.6 relies on."""
    _patch_tensor(tensor, scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = _with_loop_bounds


_cast = interpreter.InterpreterBuilder.cast_impl


def _rounded(self: Any, x: Any, dtype: Any) -> Any:
    """To bf16 as GPUs round, and back; the interpreter cuts off, and changes the smallest numbers."""
    if (x.dtype.scalar, dtype.scalar) == (tl.float32, tl.bfloat16):
        bits = torch.from_numpy(np.array(x.data)).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(bits, dtype.scalar)
    if (x.dtype.scalar, dtype.scalar) == (tl.bfloat16, tl.float32):
        bits = np.array(x.data).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), dtype.scalar)
    return _cast(self, x, dtype)


def _by_value(self: Any, a: Any, b: Any, sums: Any, *_: Any) -> Any:
    """Products, summed in float64 and rounded once: in what order a machine's BLAS adds shows in fp32, and of bf16 the
    interpreter multiplies the bits, as if they were whole numbers."""
    a, b = (_rounded(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    product = np.matmul(a.data, b.data, dtype=np.float64).astype(sums.data.dtype)
    return interpreter.TensorHandle(product + sums.data, sums.dtype.scalar)


interpreter.InterpreterBuilder.cast_impl, interpreter.InterpreterBuilder.create_dot = _rounded, _by_value


class Accesses:
    """What the programs of one launch read and write: addresses of elements, and the number of the program."""

    def __init__(self, args: tuple) -> None:
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in args if isinstance(x, torch.Tensor)}
        self.begins = np.sort(np.array(list(storages), dtype=np.int64))
        self.ends = np.array([begin + storages[begin].nbytes() for begin in self.begins.tolist()])
        self.seen: dict[bool, list[np.ndarray]] = {written: [np.zeros((2, 0), np.int64)] for written in (False, True)}
        self.given: dict[int, list[np.ndarray]] = {}  # by counter, what was written by those who have counted there
        self.taken: dict[int, list[np.ndarray]] = {}  # by program, what it may therefore read

    def count(self, builder: Any, pointer: Any) -> None:
        """An atomic operation, which passes on what its program has written, and lets it read what others have."""
        program, counter = self.program(builder), int(pointer.data.item())
        self.bounded(np.array([counter]), "counts")
        given, taken = self.given.setdefault(counter, []), self.taken.setdefault(program, [])
        taken += given
        given += [addresses for addresses, owner in self.seen[True] if (owner == program).all()]

    def bounded(self, addresses: np.ndarray, what: str) -> None:
        place = np.searchsorted(self.begins, addresses, side="right") - 1
        if (place < 0).any() or (addresses >= self.ends[place]).any():
            raise IndexError(f"a program {what} outside the tensors it is given")

    @staticmethod
    def program(builder: Any) -> int:
        return int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim))

    def note(self, builder: Any, pointers: Any, mask: Any, written: bool) -> None:
        """One load or store of the program that the builder is at."""
        addresses, inside = np.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[inside].astype(np.int64)
        self.bounded(addresses, "writes" if written else "reads")
        program, addresses = self.program(builder), np.unique(addresses)
        if not written and program in self.taken:
            addresses = np.setdiff1d(addresses, np.concatenate([addresses[:0], *self.taken[program]]))
        self.seen[written].append(np.stack([addresses, np.full_like(addresses, program)]))

    def check(self, kernel: str, overlaps: bool) -> None:
        """That no program depends on another one; with `overlaps`, that none writes what another one writes."""
        (written, writers), (read, readers) = (
            np.unique(np.concatenate(self.seen[x], axis=1), axis=1) for x in (True, False)
        )
        if (written[1:] == written[:-1]).any():
            raise RuntimeError(f"two programs of {kernel} write the same element")
        if overlaps:
            return
        place = np.searchsorted(written, read)
        known = place < len(written)
        place, read, readers = place[known], read[known], readers[known]
        if ((written[place] == read) & (writers[place] != readers)).any():
            raise RuntimeError(f"a program of {kernel} reads what another one writes")


@contextmanager
def checked(overlaps: bool = False) -> Iterator[None]:
    """Inside, what is allocated and not written is NaN, and a launch fails, whatever it computes, that reads or writes
    outside its tensors, or where what one program writes is read or written by another: a GPU runs them in any order.
    It may be read by who comes later to a counter, by an atomic operation; with `overlaps`, by programs that make
    nothing of it.
    """
    builder, executor = type(interpreter.interpreter_builder), interpreter.GridExecutor
    load, store, run = builder.create_masked_load, builder.create_masked_store, executor.__call__
    atomic = builder.create_atomic_rmw
    current: list[Accesses] = []

    def noted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        current[-1].note(self, pointers, mask, written=False)
        return load(self, pointers, mask, *rest)

    def noted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        current[-1].note(self, pointers, mask, written=True)
        return store(self, pointers, value, mask, *rest)

    def noted_atomic(self: Any, operation: Any, pointer: Any, *rest: Any) -> Any:
        current[-1].count(self, pointer)
        return atomic(self, operation, pointer, *rest)

    def checked_run(self: Any, *args: Any, **kwargs: Any) -> None:
        current[:] = [Accesses(args)]
        run(self, *args, **kwargs)
        current[-1].check(self.fn.__name__, overlaps)

    torch.use_deterministic_algorithms(True)
    try:
        with (
            patch.object(builder, "create_masked_load", noted_load),
            patch.object(builder, "create_masked_store", noted_store),
            patch.object(builder, "create_atomic_rmw", noted_atomic),
            patch.object(executor, "__call__", checked_run),
        ):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
