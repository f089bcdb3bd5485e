"""Layers that run again in the backward pass: the same gradients, also with dropout, in a graph, and what is kept."""

from contextlib import nullcontext

import pytest
import torch
from test_losses import LENGTHS, batch
from tiny import assert_close, tiny
from waiting import NeverWaiting

from linearize import convert
from linearize.convert import attention_of
from linearize.recipe import LoraSettings
from linearize.train.align import align_loss
from linearize.train.distill import distill_loss
from linearize.train.graph import Graphed
from linearize.train.recompute import draws, recomputed_layers
from linearize.train.trainer import with_lora

STAGES = ["align", "distill"]


def loss_of(stage, student, teacher, given, recomputed=True, documents=None):
    if stage == "align":
        return align_loss(student, teacher, given, recomputed, documents)
    with recomputed_layers(student) if recomputed else nullcontext():
        return distill_loss(student, teacher, given, documents=documents)


def gradients_of(loss, model):
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert_close(other[name], gradient)


@pytest.mark.parametrize("kept", [{}, {"layers": "0,2"}, {"softmax_heads": "0/1,2/0"}], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_the_same(stage, kept):
    student, teacher = convert(tiny(), window=4, mixing_weight=0.4, **kept).train(), tiny()
    plain, again = (gradients_of(loss_of(stage, student, teacher, batch(*LENGTHS), x), student) for x in (False, True))
    assert any("mixing" in name for name in plain)
    assert_same(plain, again)


def test_layers_run_twice_and_once_afterwards():
    student, teacher, runs = convert(tiny(), window=4).train(), tiny(), []
    for index in range(3):
        attention_of(student, index).register_forward_pre_hook(lambda *_, index=index: runs.append(index))
    loss_of("distill", student, teacher, batch(*LENGTHS)).backward()
    assert runs == [0, 1, 2, 2, 1, 0]
    runs.clear()
    loss_of("distill", student, teacher, batch(*LENGTHS), recomputed=False).backward()
    assert runs == [0, 1, 2]


def test_dropout_is_the_same_when_a_layer_runs_again():
    teacher, given = tiny(), batch(*LENGTHS)
    student = convert(tiny(), window=4)
    wrapped = with_lora(student, LoraSettings(r=4, dropout=0.5)).train()
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    assert draws(student)
    found = []
    for recomputed in (False, True):
        torch.manual_seed(1)
        found.append(gradients_of(loss_of("distill", student, teacher, given, recomputed), wrapped))
    assert_same(*found)


def test_what_draws():
    assert not draws(convert(tiny(), window=4))
    assert not draws(with_lora(tiny(), LoraSettings(r=4)).base_model.model)
    assert draws(tiny(attention_dropout=0.1))
    assert draws(tiny("mixtral", router_jitter_noise=0.1))


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_waits(stage, monkeypatch):
    """So that a CUDA graph can hold it."""
    student, teacher = convert(tiny(), window=4).train(), tiny()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with NeverWaiting():
        loss_of(stage, student, teacher, batch(*LENGTHS), documents=len(LENGTHS)).backward()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Liger Attention runs unfused")  # as it does in fp32
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # in a thread of autograd's, whose first product it is
@pytest.mark.parametrize("stage", STAGES)
def test_a_graph_gives_what_the_operations_give(stage):
    teacher, student = tiny().cuda(), convert(tiny(), window=4, mixing_weight=0.4).cuda().train()
    parameters = [p for p in student.parameters() if p.requires_grad]
    graphed = Graphed(lambda **given: loss_of(stage, student, teacher, given, True, len(LENGTHS)), parameters)
    for lengths in (LENGTHS, LENGTHS[::-1], (12,)):  # the last one has another shape
        given = {name: rows.cuda() for name, rows in batch(*lengths).items()}
        plain = loss_of(stage, student, teacher, given, False, len(LENGTHS))
        expected = torch.autograd.grad(plain, parameters, allow_unused=True)
        plain = plain.detach()  # what autograd keeps of it is of another stream than the graph's
        ours = graphed(**given)
        assert_close(ours, plain)
        for new, old in zip(torch.autograd.grad(ours, parameters, allow_unused=True), expected, strict=True):
            assert (new is None) == (old is None)
            if new is not None:
                assert_close(new, old)
    assert graphed.graph is not None
