"""Layers that are compiled: how often, what comes out, and what happens where that fails."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import jaxtyping
import pytest
import torch
from compilations import Step
from tiny import assert_close
from torch._dynamo.utils import counters

from linearize.train.compiled import compiled_layers
from linearize.train.graph import Graphed
from linearize.train.recompute import recomputed_layers

HERE = Path(__file__).parent


@pytest.fixture
def unchecked():
    """Shapes are not checked, which cannot be compiled; nothing is left of what was."""
    torch._dynamo.reset()
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


def fails(*_):
    raise RuntimeError("the compiler fails")


def makes_what_fails(*_):
    return fails


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for x, y in zip(ours, theirs, strict=True):
        assert_close(x, y)


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")


@pytest.mark.parametrize(
    ("expected", "case"),
    [
        (2, "distill 3 all default operations"),  # the teacher's layer, and the student's
        (3, "distill 3 all heads operations"),  # and that of a layer without softmax heads
        (2, "align 3 lora default operations"),  # a norm and an MLP, the teacher's
        (3, "distill 3 lora lightning operations"),  # the teacher's layer; each mixer is another, and left out
        (2, "distill 3 lora default recompute"),  # as without
        pytest.param(2, "distill 2 lora default kernels", marks=interpreted),
    ],
)
def test_layers_share_graphs(expected, case):
    command = [sys.executable, HERE / "compilations.py", *case.split()]
    path = os.pathsep.join(map(str, [HERE.parent, *sys.path]))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, check=True)
    assert json.loads(done.stdout) == {"graphs": expected, "breaks": 0, "afterwards": 0}


@pytest.mark.parametrize("stage", ["align", "distill"])
@pytest.mark.usefixtures("unchecked")
def test_compiled_layers_give_the_same(stage):
    step = Step(stage)
    expected = step.gradients()
    with compiled_layers(step.student, step.teacher, whole=stage == "distill", backend="aot_eager"):
        assert_same(step.gradients(), expected)
        assert_same(step.gradients(), expected)
    assert_same(step.gradients(), expected)


@pytest.mark.usefixtures("unchecked")
def test_compiled_layers_run_again_in_the_backward_pass():
    step = Step("distill")
    expected = step.gradients()
    with compiled_layers(step.student, step.teacher, backend="aot_eager"), recomputed_layers(step.student):
        assert_same(step.gradients(), expected)
        assert_same(step.gradients(), expected)
    assert_same(step.gradients(), expected)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.usefixtures("unchecked")
def test_a_batch_of_another_shape_than_the_graph_s(recomputed):
    """It is not compiled, nor are layers that run again for it."""
    step = Step("distill")
    expected = step.gradients()
    graphed = Graphed(step.loss, step.parameters)
    graphed.graph = object()
    graphed.batch = {name: torch.cat([rows, rows]) for name, rows in step.given.items()}
    again = recomputed_layers(step.student) if recomputed else nullcontext()
    with compiled_layers(step.student, step.teacher, backend="aot_eager"), again:
        step.gradients()
        loss = graphed(**step.given)
        found = torch.autograd.grad(2 * loss, step.parameters, allow_unused=True)
    assert_same([loss.detach(), *(x / 2 for x in found if x is not None)], expected)


@pytest.mark.usefixtures("unchecked")
def test_layers_that_cannot_be_compiled_run_as_they_are():
    step = Step("distill")
    expected = step.gradients()
    with compiled_layers(step.student, step.teacher, backend=fails):
        assert_same(step.gradients(), expected)


@pytest.mark.usefixtures("unchecked")
def test_training_goes_on_where_what_was_compiled_fails():
    step = Step("distill")
    expected = step.gradients()
    graphed = Graphed(step.loss, step.parameters)
    with compiled_layers(step.student, step.teacher, backend=makes_what_fails):
        with pytest.raises(RuntimeError, match="the compiler fails"):
            step.gradients()
        with pytest.warns(match="training steps are not compiled and take longer: the compiler fails"):
            graphed._run_compiled(step.given)
        graphed._run_compiled(step.given)  # a second warning would be an error
        assert_same(step.gradients(), expected)


def test_nothing_is_compiled_on_a_cpu_by_itself():
    step, before = Step("distill"), counters["stats"]["unique_graphs"]
    with compiled_layers(step.student, step.teacher):
        step.gradients()
    assert counters["stats"]["unique_graphs"] == before
