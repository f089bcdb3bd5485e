"""The chunked distillation loss against the formula, and alignment's against its own."""

import pytest
import torch
import torch.nn.functional as F
from tiny import FAMILIES, assert_close, ids, tiny
from torch import nn

from linearize import convert
from linearize.convert import attention_of, decoder
from linearize.train.align import align_loss
from linearize.train.distill import distill_loss
from linearize.train.losses import IGNORED, distillation_loss, relative_error
from linearize.train.trainer import shared_copy

N, HIDDEN, VOCAB = 23, 6, 11


class Head(nn.Linear):
    """Remembers how many rows it was given at once."""

    def __init__(self) -> None:
        super().__init__(HIDDEN, VOCAB)
        self.rows: list[int] = []

    def forward(self, x):
        self.rows.append(len(x))
        return super().forward(x)


def direct(student, teacher, targets, kl_weight):
    """Mean over tokens with a target, in float64, from all logits at once."""
    keep = targets != IGNORED
    student, teacher, targets = student.double()[keep], teacher.double()[keep], targets[keep]
    p, log_q = teacher.softmax(-1), student.log_softmax(-1)
    kl = (p * (p.log() - log_q)).sum(-1)
    return (kl_weight * kl + (1 - kl_weight) * F.cross_entropy(student, targets, reduction="none")).mean()


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 23, 100])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
def test_chunks_are_the_formula(kl_weight, rows, trainable):
    ours, theirs = Head(), Head()
    ours.requires_grad_(trainable)
    hidden, expected_hidden = torch.randn(2, N, HIDDEN)
    hidden.requires_grad_()
    targets = torch.randint(VOCAB, (N,))
    targets[[0, 5, 6, 22]] = IGNORED
    inputs = [hidden, *ours.parameters()] if trainable else [hidden]
    loss = distillation_loss(hidden, expected_hidden, ours, theirs, targets, kl_weight, rows=rows)
    gradients = torch.autograd.grad(3 * loss, inputs)
    given = nn.Linear.forward(ours, hidden), nn.Linear.forward(theirs, expected_hidden)
    expected = direct(given[0], given[1].detach(), targets, kl_weight)
    assert_close(loss, expected)
    for gradient, other in zip(gradients, torch.autograd.grad(3 * expected, inputs), strict=True):
        assert_close(gradient, other)


def test_logits_exist_for_a_few_rows_at_a_time():
    ours, theirs = Head(), Head()
    hidden = torch.randn(N, HIDDEN, requires_grad=True)
    distillation_loss(hidden, torch.randn(N, HIDDEN), ours, theirs, torch.ones(N).long(), 0.5, rows=4).backward()
    assert ours.rows == theirs.rows == [4, 4, 4, 4, 4, 3]


def test_next_token_alone_needs_no_teacher():
    head, hidden, targets = Head(), torch.randn(N, HIDDEN), torch.randint(VOCAB, (N,))
    loss = distillation_loss(hidden, None, head, Head(), targets, 0.0)
    assert_close(loss, F.cross_entropy(head(hidden), targets))


def test_no_target_at_all_is_zero_and_not_nan():
    hidden = torch.randn(3, HIDDEN, requires_grad=True)
    loss = distillation_loss(hidden, hidden.detach(), Head(), Head(), torch.full((3,), IGNORED), 0.5)
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()


def test_the_teacher_gets_no_gradient():
    theirs, hidden = Head(), torch.randn(N, HIDDEN, requires_grad=True)
    expected = torch.randn(N, HIDDEN, requires_grad=True)
    distillation_loss(hidden, expected, Head(), theirs, torch.ones(N).long(), 1.0).backward()
    assert expected.grad is None
    assert theirs.weight.grad is None


def test_relative_error():
    assert relative_error(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 3.0])).item() == pytest.approx(0.1)
    assert relative_error(torch.zeros(3), torch.randn(3)).item() == pytest.approx(1)


def batch(*lengths: int) -> dict:
    """One packed row of documents of the given lengths."""
    total = sum(lengths)
    tokens, positions = ids(1, total), torch.cat([torch.arange(n) for n in lengths])[None]
    targets = torch.full((1, total), IGNORED)
    inside = positions[:, 1:] > 0
    targets[:, :-1] = torch.where(inside, tokens[:, 1:], IGNORED)
    return {"input_ids": tokens, "position_ids": positions, "targets": targets}


def alone(packed: dict, lengths: tuple[int, ...]) -> list[dict]:
    parts = zip(*(x.split(lengths, dim=1) for x in packed.values()), strict=True)
    return [dict(zip(packed, part, strict=True)) for part in parts]


LENGTHS = (12, 5, 1, 18)


@pytest.mark.parametrize("layers", ["all", "0,2"])
@pytest.mark.parametrize(("kl_weight", "family"), [(0.0, "llama"), (0.3, "llama"), *((1.0, name) for name in FAMILIES)])
def test_distillation_does_not_leak_between_documents(kl_weight, family, layers):
    teacher, student = tiny(family), convert(tiny(family), layers=layers, window=4, mixing_weight=0.4)
    packed = batch(*LENGTHS)
    total = sum(
        distill_loss(student, teacher, part, kl_weight) * (part["targets"] != IGNORED).sum()
        for part in alone(packed, LENGTHS)
    )
    count = (packed["targets"] != IGNORED).sum()
    assert_close(distill_loss(student, teacher, packed, kl_weight), total / count)


def test_a_ramp_weighs_tokens_by_their_place_in_their_document():
    teacher, student, packed = tiny(), convert(tiny(), window=4, mixing_weight=0.4), batch(*LENGTHS)
    kept = packed["targets"] != IGNORED
    each = [  # the loss of every token by itself
        distill_loss(
            student, teacher, packed | {"targets": packed["targets"].where(torch.arange(kept.numel()) == t, IGNORED)}
        )
        for t in range(kept.numel())
    ]
    weights = ((packed["position_ids"] + 1.0) / 8).clamp(max=1)[kept]
    expected = (weights * torch.stack(each)[kept[0]]).mean()
    assert_close(distill_loss(student, teacher, packed, ramp=8), expected)


def test_batches_one_after_the_other_are_one_batch():
    """Of documents of any lengths: short ones do not count more where they are alone."""
    teacher, student = tiny(), convert(tiny(), window=4, mixing_weight=0.4)
    rows = [batch(36), batch(*[4] * 9)]
    rows = [row | {"targets": row["targets"].where(torch.arange(36) % 4 != 3, IGNORED)} for row in rows]
    both = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    each = [distill_loss(student, teacher, row, ramp=16) for row in rows]
    assert_close(distill_loss(student, teacher, both, ramp=16), sum(each) / 2)
    assert each[0] > 2 * each[1]


def attention_outputs(model, given: dict) -> list[torch.Tensor]:
    seen = []
    hooks = [
        attention_of(model, i).register_forward_hook(lambda _, __, output: seen.append(output[0])) for i in range(3)
    ]
    with torch.no_grad():
        decoder(model)(given["input_ids"], position_ids=given["position_ids"], use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_alignment_does_not_leak_between_documents(family):
    """Mean over layers of the relative error, worked out from documents read one by one."""
    teacher = tiny(family)
    student = convert(tiny(family), layers="0", window=4, mixing_weight=0.4)  # its first layer's input is the teacher's
    packed = batch(*LENGTHS)
    pairs = [
        (attention_outputs(student, part)[0], attention_outputs(teacher, part)[0]) for part in alone(packed, LENGTHS)
    ]
    ours, theirs = (torch.cat(side, dim=1) for side in zip(*pairs, strict=True))
    assert_close(align_loss(student, teacher, packed), relative_error(ours, theirs))


@pytest.mark.parametrize("family", FAMILIES)
def test_alignment_is_zero_where_nothing_is_lost(family):
    student = convert(tiny(family), window=64, mixing="fixed", mixing_weight=0)
    assert align_loss(student, tiny(family), batch(*LENGTHS)).item() < 1e-10


def test_alignment_beyond_the_length_the_model_was_trained_at():
    """Sinks are met as the model itself meets them."""
    teacher = tiny("llama", max_position_embeddings=10)
    student, seen = convert(shared_copy(teacher), structure="none", window=4, sinks=2, layers="0"), []
    given = batch(24)
    for model in (teacher, student):
        hook = attention_of(model, 0).register_forward_hook(lambda _, __, output: seen.append(output[0]))
        model(given["input_ids"], position_ids=given["position_ids"], use_cache=False)
        hook.remove()
    assert_close(align_loss(student, teacher, given), relative_error(seen[1], seen[0]))


def test_no_gradient_of_alignment_runs_from_layer_to_layer():
    """Layer 0's gradients are those of aligning it alone."""
    gradients = []
    for layers in ("all", "0"):
        student = convert(tiny(), layers=layers, window=4, mixing_weight=0.4)
        align_loss(student, tiny(), batch(*LENGTHS)).backward()
        gradients.append(attention_of(student, 0).q_proj.weight.grad)
    assert_close(3 * gradients[0], gradients[1])


def test_alignment_names_the_layer_that_is_not_a_number():
    student = convert(tiny(), window=4)
    attention_of(student, 1).mixing.weight.data[2] = torch.nan
    with pytest.raises(FloatingPointError, match="layer 1"):
        align_loss(student, tiny(), batch(8))
