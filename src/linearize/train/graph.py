"""A training step as one CUDA graph: recorded once, replayed without Python between its kernels."""

import gc
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from linearize.graphs import RecordingError, on_the_side, record

Batch = dict[str, Tensor]


class Graphed:
    """`loss(**batch)` with the gradients of `parameters`, as one graph for batches of the first one's shape.

    Others, as a short last one, run as they are, and so do all where recording fails (a loss that waits for the GPU
    cannot be recorded), which is said once. `parameters` must stay where they are in memory.
    """

    def __init__(self, loss: Callable[..., Tensor], parameters: Sequence[Tensor]) -> None:
        self.loss, self.parameters = loss, list(parameters)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch: Batch = {}
        self.gradients: list[Tensor | None] = []
        self.result = torch.zeros(())
        self.failed = False

    def __call__(self, **batch: Tensor) -> Tensor:
        """The loss, a number that can be differentiated."""
        if self.graph is None and not self.failed:
            self._record(batch)
        if self.failed:
            with _recast():  # as in the runs before the recording: what was compiled there serves here
                return self.loss(**batch)
        if any(batch[name].shape != kept.shape for name, kept in self.batch.items()):
            return _Made.apply(lambda: self._run_eagerly(batch), *self.parameters)
        return _Made.apply(lambda: self.replay(batch), *self.parameters)

    def replay(self, batch: Batch) -> tuple[Tensor, list[Tensor | None]]:
        """Loss and gradients of `batch`; the gradients are overwritten by the next call."""
        assert self.graph is not None
        for name, kept in self.batch.items():
            kept.copy_(batch[name])
        self.graph.replay()
        return self.result.clone(), self.gradients

    def _record(self, batch: Batch) -> None:
        kept = {name: value.clone() for name, value in batch.items()}
        here = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        # forked, or a run that goes on would have other dropout than one that never stopped
        with _recast(), torch.enable_grad(), torch.random.fork_rng(here):
            on_the_side(lambda: self._run_compiled(kept))
            gc.collect()
            torch.cuda.empty_cache()
            try:
                self.graph, (self.result, self.gradients) = record(lambda: self._run(kept))
            except RecordingError as error:
                self.failed = True
                warnings.warn(f"training steps are not one CUDA graph and take longer: {error}", stacklevel=2)
                return
        self.batch = kept

    def _run_compiled(self, batch: Batch) -> None:
        """For what cannot be compiled here there is the way without."""
        try:
            self._run(batch)
        except (torch.OutOfMemoryError, FloatingPointError):
            raise
        except Exception as error:  # whatever a compiler raises
            torch.compiler.set_stance("force_eager")
            self._run(batch)
            warnings.warn(f"training steps are not compiled and take longer: {error}", stacklevel=2)

    def _run_eagerly(self, batch: Batch) -> tuple[Tensor, list[Tensor | None]]:
        """For a batch or two, compiling takes longer than it saves; so does the backward pass, in which layers may run
        again."""
        with torch.compiler.set_stance("force_eager"), torch.enable_grad():
            return self._run(batch)

    def _run(self, batch: Batch) -> tuple[Tensor, list[Tensor | None]]:
        loss = self.loss(**batch)
        return loss.detach(), list(torch.autograd.grad(loss, self.parameters, allow_unused=True))


def _recast() -> torch.autocast:
    """Autocast as it is, with each cast made anew: one kept from before a recording would go on with the weights of
    then."""
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    return torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False)


class _Made(torch.autograd.Function):
    """The loss of `run`, whose gradients exist as soon as it does."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[], tuple[Tensor, list[Tensor | None]]], *parameters: Tensor) -> Tensor:
        loss, ctx.gradients = run()
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        there = [x for x in ctx.gradients if x is not None]
        scaled = iter(torch._foreach_mul(there, gradient))
        return None, *(None if x is None else next(scaled) for x in ctx.gradients)
