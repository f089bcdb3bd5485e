"""What a step leaves behind, looked at without making the GPU wait: losses, and gradients that are no numbers."""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback

from linearize import processes
from linearize.errors import LinearizeError
from linearize.train.graph import Batch


class Step(NamedTuple):
    """A step whose values are on their way."""

    number: int
    last: int  # of the run
    names: list[str]  # of the gradients
    values: Tensor  # on the CPU: the loss, then the norm of each gradient
    arrived: torch.cuda.Event | None
    batches: list[Batch]


class Watch(TrainerCallback):
    """Averages gradients over processes, clips them, writes losses into the trainer's history, and stops at what is
    not a number.

    With a fused optimizer, as on a GPU, a step's values are looked at when the next step has been queued, so that there
    is always one for the GPU to do. What is not a number does not reach the weights meanwhile: the optimizer reads
    `bad`, on the GPU.
    """

    def __init__(self, clip: float, locate: Callable[[Batch], Any]) -> None:
        """`clip` is the largest norm of all gradients together; `locate` runs a batch again, whose loss is not a
        number, and raises FloatingPointError where it finds out where that begins."""
        self.clip, self.locate = clip, locate
        self.losses: list[Tensor] = []  # of the batches of the step that runs
        self.batches: list[Batch] = []
        self.steps: deque[Step] = deque()
        self.bad: Tensor | None = None  # 1 from the first gradient on that is not a number, else 0

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Let a fused `optimizer` read `bad`, under the name that mixed precision's gradient scaler uses."""
        if optimizer.defaults["fused"]:
            self.bad = torch.zeros((), device=optimizer.param_groups[0]["params"][0].device)
            optimizer.found_inf = self.bad  # type: ignore[attr-defined]

    def saw(self, loss: Tensor, batch: Batch) -> None:
        """The loss of one batch, a mean over processes."""
        self.losses.append(loss.detach().float())
        self.batches.append(batch)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """With all gradients there."""
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        processes.average(list(gradients.values()))
        norms = torch.stack(torch._foreach_norm(list(gradients.values())))  # in few kernels
        torch._foreach_mul_(list(gradients.values()), (self.clip / (norms.norm() + 1e-6)).clamp(max=1.0))
        values = torch.cat([torch.stack(self.losses).mean()[None], norms])
        arrived = None
        if self.bad is not None:
            self.bad.copy_(self.bad.maximum((~torch.isfinite(values)).any().float()))
        if values.is_cuda:
            values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.steps.append(Step(state.global_step + 1, state.max_steps, list(gradients), values, arrived, self.batches))
        self.losses, self.batches = [], []
        self.look(state, late=0 if self.bad is None else 1)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The last step's values too."""
        self.look(state)

    def look(self, state: Any, late: int = 0) -> None:
        """At all steps but the `late` last ones, and wait for them. Raises LinearizeError."""
        while len(self.steps) > late:
            step = self.steps.popleft()
            if step.arrived is not None:
                step.arrived.synchronize()
            loss = step.values[0].item()
            if not torch.isfinite(step.values).all():
                self._stop(step, loss)
            state.log_history.append({"loss": loss, "step": step.number})

    def _stop(self, step: Step, loss: float) -> None:
        where = f"step {step.number} of {step.last}"
        if torch.isfinite(step.values[0]):
            name = step.names[int((~torch.isfinite(step.values[1:])).nonzero()[0])]
            raise LinearizeError(f"the gradient of {name} is not a number at {where}")
        try:
            for batch in step.batches:
                self.locate(batch)
        except FloatingPointError as error:
            raise LinearizeError(f"not a number at {where}, in {error}; try a lower learning_rate") from error
        raise LinearizeError(f"the loss is {loss} at {where}; try a lower learning_rate")
