"""Packed documents by where they start: the same as by masks, in the teacher and in what a student leaves softmax."""

import pytest
import torch
import torch.nn.functional as F
from test_losses import batch
from tiny import assert_close, tiny
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linearize import convert, packing
from linearize.packing import document_masks, starts
from linearize.recipe import LoraSettings
from linearize.train.align import align_loss
from linearize.train.distill import distill_loss
from linearize.train.trainer import shared_copy, with_lora


def one_by_one(q, k, v, starts, longest, scale):
    """What `packing.of_documents` does on a GPU."""
    spans, found = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True), []
    for first, end in spans:
        parts = (x[first:end].transpose(0, 1)[None] for x in (q, k, v))
        found.append(F.scaled_dot_product_attention(*parts, is_causal=True, scale=scale, enable_gqa=True)[0])
        assert end - first <= longest
    return torch.cat(found, dim=1).transpose(0, 1)


@pytest.fixture
def by_starts(monkeypatch):
    """As on a GPU; how often."""
    calls = []
    monkeypatch.setattr(packing, "by_starts", lambda model: True)
    monkeypatch.setattr(packing, "of_documents", lambda *given: calls.append(given) or one_by_one(*given))
    yield calls
    del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_starts_count_through_the_rows():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4]])
    found = starts(positions, 4)
    assert found.tolist() == [0, 3, 5, 6, 6, 12, 12, 12, 12, 13, 18, 18, 18]
    assert found.dtype == torch.int32


@pytest.mark.parametrize("documents", [3, 5])
@pytest.mark.parametrize("settings", [{"layers": "0,2"}, {"softmax_heads": "0/1,2/0"}, {}], ids=str)
@pytest.mark.parametrize("loss", [align_loss, distill_loss])
def test_losses_and_gradients_are_as_by_masks(loss, settings, documents, request):
    teacher = tiny()
    student = with_lora(convert(shared_copy(teacher), window=4, mixing_weight=0.4, **settings), LoraSettings())
    rows = [batch(9, 17, 10), batch(20, 16)]
    given = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    trained = [p for p in student.parameters() if p.requires_grad]

    def found():
        value = loss(student.base_model.model, teacher, given, documents=documents)
        return [value.detach(), *torch.autograd.grad(value, trained, allow_unused=True)]

    expected = found()
    calls = request.getfixturevalue("by_starts")
    for ours, theirs in zip(found(), expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or theirs.norm() < 1e-6 or (ours - theirs).norm() / theirs.norm() < 1e-4
    heads, layers = 2 * ("softmax_heads" in settings), "layers" in settings and loss is distill_loss
    assert len(calls) == 3 + heads + layers  # aligning does not run a student's softmax layers


def test_masks_are_made_where_it_does_not_fit(by_starts, monkeypatch):
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
    ids = torch.ones_like(positions)
    with packing.packing(2):
        assert document_masks(tiny(), ids, positions).dtype == torch.int32
    with packing.packing(1):
        assert document_masks(tiny(), ids, positions) is None
    assert document_masks(tiny(), ids, positions) is None
    monkeypatch.undo()
    with packing.packing(2):
        assert document_masks(tiny(), ids, positions) is None  # on a CPU the model makes a mask
    ALL_ATTENTION_FUNCTIONS["sdpa"] = packing.attend  # for the fixture


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "KV"), [(4, 4), (9, 3)])
@pytest.mark.parametrize("D", [16, 64, 128])
def test_gpu_documents_without_a_mask(H, KV, D):
    """One of them is missing, another has a single token."""
    torch.manual_seed(0)
    T, bounds = 300, torch.tensor([0, 100, 101, 300, 300, 450, 600], dtype=torch.int32)
    q, k, v = (torch.randn(2 * T, heads, D, dtype=torch.bfloat16).cuda().requires_grad_() for heads in (H, KV, KV))
    ours = packing.of_documents(q, k, v, bounds.cuda(), T, D**-0.5)
    truth = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    expected = one_by_one(*truth, bounds, T, D**-0.5)
    weights = torch.randn_like(expected)
    assert_close(ours.cpu(), expected, 5e-3)
    gradients = torch.autograd.grad(ours, (q, k, v), weights.to(ours))
    for gradient, other in zip(gradients, torch.autograd.grad(expected, truth, weights), strict=True):
        assert_close(gradient.cpu(), other, 5e-3)


@pytest.mark.gpu
def test_gpu_a_model_without_masks():
    """In half precision: what masks give, to rounding."""
    model = tiny(hidden_size=96, head_dim=16).cuda().bfloat16()
    positions = torch.cat([torch.arange(90), torch.arange(1), torch.arange(109)])[None].cuda()
    ids = torch.randint(1, 30, (1, 200), device="cuda")
    with torch.no_grad():
        expected = model.model(ids, position_ids=positions, use_cache=False).last_hidden_state.float()
        with packing.packing(4):
            masks = document_masks(model, ids, positions)
            assert masks.dtype == torch.int32
            given = {"position_ids": positions, "attention_mask": masks, "use_cache": False}
            found = model.model(ids, **given).last_hidden_state.float()
    assert ((found - expected).norm() / expected.norm()).item() < 2e-2
