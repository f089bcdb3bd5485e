"""A training step's loss and gradients, compiled by what `torch.compile` does before it makes kernels.

As a program, which checks no shapes as tests do, since checks would be compiled too: how many graphs there are.
"""

import json
import sys
from contextlib import nullcontext

import torch
from test_losses import LENGTHS, batch
from tiny import tiny
from torch._dynamo.utils import counters

from linearize import convert, mixer
from linearize.ops import gated_delta, liger
from linearize.recipe import LoraSettings
from linearize.train.align import align_loss
from linearize.train.compiled import compiled_layers
from linearize.train.distill import distill_loss
from linearize.train.recompute import recomputed_layers
from linearize.train.trainer import shared_copy, with_lora

DEFAULT = {"structure": "gated_deltanet", "feature_map": "linear", "gate_source": "learned", "readout": "rms"}
DEFAULT |= {"mixing": "data_dependent", "mixing_weight": 0.4, "window": 4, "behind": True, "rope": "both"}
HEADS = DEFAULT | {"softmax_heads": "0/0,1/1"}
LIGHTNING = {"structure": "lightning", "window": 4}
SETTINGS = {"default": DEFAULT, "heads": HEADS, "gla": {"structure": "gla"}, "lightning": LIGHTNING}
LOSSES = {"align": align_loss, "distill": distill_loss}


class Step:
    """Of a student with LoRA on its teacher's parameters, or of one that is trained whole."""

    def __init__(self, stage: str, layers: int = 3, lora: bool = True, settings: str = "default") -> None:
        self.teacher = tiny(num_hidden_layers=layers)
        student = shared_copy(self.teacher) if lora else tiny(num_hidden_layers=layers)
        self.student = convert(student, **SETTINGS[settings])
        trained = with_lora(self.student, LoraSettings(r=4)) if lora else self.student
        self.parameters = [p for p in trained.train().parameters() if p.requires_grad]
        self.stage, self.given = stage, batch(*LENGTHS)

    def loss(self, **given: torch.Tensor) -> torch.Tensor:
        return LOSSES[self.stage](self.student, self.teacher, given, documents=len(LENGTHS))

    def gradients(self) -> list[torch.Tensor]:
        """After the loss."""
        loss = self.loss(**self.given)
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return [loss.detach(), *(x for x in found if x is not None)]


def interpret() -> None:
    """Switch the kernels on, which Triton's interpreter runs."""
    import interpreted  # noqa: F401

    for module in (mixer, gated_delta):
        module.kernel_dtype = lambda _: torch.float32
    liger.why_not_fused = liger.why_not_windowed = gated_delta.why_not_fused = lambda *_: None


def graphs(stage: str, layers: str, trained: str, settings: str, by: str) -> dict[str, int]:
    """Of two steps, and of one afterwards that is not compiled; `by` "kernels" where these are to run, or "recompute"
    where layers run again in the backward pass."""
    if by == "kernels":
        interpret()
    step = Step(stage, int(layers), trained == "lora", settings)
    again = recomputed_layers(step.student) if by == "recompute" else nullcontext()
    with compiled_layers(step.student, step.teacher, whole=stage == "distill", backend="aot_eager"), again:
        step.gradients()
        step.gradients()
    found = {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
    step.gradients()
    return found | {"afterwards": counters["stats"]["unique_graphs"] - found["graphs"]}


if __name__ == "__main__":
    print(json.dumps(graphs(*sys.argv[1:])))
