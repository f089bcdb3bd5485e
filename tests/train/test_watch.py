"""What a step leaves behind is looked at one step late, and what is not a number does not reach the weights."""

from types import SimpleNamespace

import pytest
import torch
from test_losses import LENGTHS, batch
from tiny import tiny
from waiting import NeverWaiting

from linearize import LinearizeError, convert
from linearize.train.distill import distill_loss
from linearize.train.watch import Watch

CLIP, STEPS = 0.5, 4


class Steps:
    """A student, and steps that the trainer would take with it; a fused optimizer, as it is on a GPU."""

    def __init__(self, fused: bool = True) -> None:
        self.teacher, self.student = tiny(), convert(tiny(), window=4, mixing_weight=0.4).train()
        self.trained = dict(self.student.named_parameters())
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-3, fused=fused)
        self.watch = Watch(CLIP, self.locate)
        self.watch.guard(self.optimizer)
        self.state = SimpleNamespace(global_step=0, max_steps=STEPS, log_history=[])
        self.given = batch(*LENGTHS)

    def locate(self, given) -> None:
        assert given is self.given
        raise FloatingPointError("the test")

    def step(self, poisoned: str | None = None, scale: float = 1.0) -> None:
        """With the gradient of one parameter, or the loss, made NaN."""
        loss = scale * distill_loss(self.student, self.teacher, self.given, documents=len(LENGTHS))
        loss.backward()
        self.watch.saw(loss * torch.nan if poisoned == "loss" else loss, self.given)
        if poisoned in self.trained:
            self.trained[poisoned].grad[0] *= torch.nan
        self.watch.on_pre_optimizer_step(None, self.state, None, model=self.student)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.global_step += 1

    def values(self) -> list[torch.Tensor]:
        """Of parameters and optimizer."""
        kept = self.optimizer.state
        return [x.clone() for p in self.trained.values() for x in (p.detach(), *kept[p].values())]


def test_a_step_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # as a graph of it is recorded
    steps = Steps()
    with NeverWaiting():
        steps.step()
    assert steps.state.log_history == []
    steps.step()
    assert [log["step"] for log in steps.state.log_history] == [1]
    steps.watch.on_train_end(None, steps.state, None)
    assert [log["step"] for log in steps.state.log_history] == [1, 2]
    assert steps.state.log_history[1]["loss"] < steps.state.log_history[0]["loss"]


@pytest.mark.parametrize(
    ("poisoned", "message"),
    [
        ("model.layers.1.self_attn.mixing.weight", r"of model\.layers\.1\.self_attn\.mixing\.weight .* step 2 of 4"),
        ("loss", "not a number at step 2 of 4, in the test"),
    ],
)
def test_what_is_no_number_reaches_neither_weights_nor_optimizer(poisoned, message):
    steps = Steps()
    steps.step()
    before = steps.values()
    steps.step(poisoned)
    with pytest.raises(LinearizeError, match=message):
        steps.step()
    steps.optimizer.step()  # whatever the next step's gradients are
    assert all(torch.equal(x, y) for x, y in zip(steps.values(), before, strict=True))


def test_an_optimizer_that_is_not_fused_is_told_before_it_steps():
    steps = Steps(fused=False)
    steps.step()
    before = steps.values()
    with pytest.raises(LinearizeError, match="not a number at step 2 of 4"):
        steps.step("loss")
    assert all(torch.equal(x, y) for x, y in zip(steps.values(), before, strict=True))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_gradients_are_clipped_together(scale):
    steps, seen = Steps(), []
    steps.optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in steps.trained.values()))
    loss = scale * distill_loss(steps.student, steps.teacher, steps.given)
    gradients = torch.autograd.grad(loss, list(steps.trained.values()))
    norm = torch.cat([x.flatten() for x in gradients]).norm()
    steps.step(scale=scale)
    for ours, given in zip(seen, gradients, strict=True):
        torch.testing.assert_close(ours, given * min(1.0, CLIP / norm.item()))
