"""What a step as one CUDA graph rests on: losses that never wait for the GPU; and, where there is one, the graph."""

import pytest
import torch
from test_losses import LENGTHS, batch
from tiny import assert_close, tiny
from waiting import NeverWaiting

from linearize import convert
from linearize.train.align import align_loss
from linearize.train.distill import distill_loss
from linearize.train.graph import Graphed
from linearize.train.trainer import most_documents

SETTINGS = [
    {"structure": "gla"},
    {"structure": "gated_deltanet", "feature_map": "linear", "gate_source": "learned", "readout": "rms"},
    {"structure": "gla", "mixing": "shared_normalizer", "feature_map": "hedgehog"},
    {"structure": "gated_deltanet", "gate_source": "learned", "behind": True, "rope": "both"},
    {"structure": "lightning", "mixing": "data_dependent"},
    {"structure": "gsa", "convolution": 4},
    {"structure": "none"},
    {"structure": "gated_deltanet", "mixing": "data_dependent", "softmax_heads": "0/1,2/0"},
]

pytestmark = pytest.mark.filterwarnings(
    "ignore:Liger Attention runs unfused",
    "ignore:the window of Liger Attention",
    "ignore:Attempting to run cuBLAS",  # in a thread of autograd's, whose first product it is
)


@pytest.mark.parametrize("documents", [4, 7])
@pytest.mark.parametrize("loss", [align_loss, distill_loss])
def test_knowing_how_many_documents_there_are_changes_nothing(loss, documents):
    teacher, student = tiny(), convert(tiny(), window=4, mixing_weight=0.4)
    packed = batch(*LENGTHS)
    assert_close(loss(student, teacher, packed, documents=documents), loss(student, teacher, packed))


@pytest.mark.parametrize("lengths", [LENGTHS, (36,)])
@pytest.mark.parametrize("loss", [align_loss, distill_loss])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s["structure"] + s.get("mixing", ""))
def test_nothing_waits(settings, loss, lengths, monkeypatch):
    teacher, student, given = tiny(), convert(tiny(), window=4, **settings).train(), batch(*lengths)
    documents = most_documents([{name: rows[0] for name, rows in given.items()}])
    assert documents == len(lengths)
    expected = loss(student, teacher, given)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with NeverWaiting():
        recorded = loss(student, teacher, given, documents=documents)
        recorded.backward()
    assert_close(recorded, expected)


@pytest.mark.parametrize("lengths", [LENGTHS, (36,)])
@pytest.mark.parametrize("loss", [align_loss, distill_loss])
def test_layers_see_the_same_masks_before_and_while_a_graph_is_recorded(loss, lengths, monkeypatch):
    """Or they would be compiled again."""
    teacher, student, given = tiny(), convert(tiny(), layers="0,2", window=4), batch(*lengths)
    masks: list[torch.Tensor | None] = []
    for model in (teacher, student):
        for layer in model.model.layers:
            layer.register_forward_pre_hook(
                lambda _, __, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
            )
    for recording in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda recording=recording: recording)
        loss(student, teacher, given, documents=len(lengths))
    before, while_recording = masks[: len(masks) // 2], masks[len(masks) // 2 :]
    assert len(before) in (3, 6)
    for one, other in zip(before, while_recording, strict=True):
        assert (one is None) == (other is None) == (len(lengths) == 1)
        assert one is None or one.equal(other)


@pytest.mark.gpu
@pytest.mark.parametrize("loss", [align_loss, distill_loss])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s["structure"] + s.get("mixing", ""))
def test_a_graph_gives_what_the_operations_give(settings, loss):
    teacher, student = tiny().cuda(), convert(tiny(), window=4, mixing_weight=0.4, **settings).cuda().train()
    parameters = [p for p in student.parameters() if p.requires_grad]

    def both(**given):
        return loss(student, teacher, given, documents=len(LENGTHS))

    graphed = Graphed(both, parameters)
    for lengths in (LENGTHS, LENGTHS[::-1], (36,), (12,)):  # the last one has another shape
        given = {name: rows.cuda() for name, rows in batch(*lengths).items()}
        ours, theirs = graphed(**given), both(**given)
        assert_close(ours, theirs)
        gradients = (torch.autograd.grad(2 * x, parameters, allow_unused=True) for x in (ours, theirs))
        for new, old in zip(*gradients, strict=True):
            assert (new is None) == (old is None)
            if new is not None:
                assert_close(new, old)
    assert graphed.graph is not None
    assert not graphed.failed
