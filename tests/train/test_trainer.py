"""Training on a tiny model: what moves, what must not, and what happens when it is killed."""

import copy

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny import VOCAB, timeless, tiny
from transformers import TrainingArguments

from linearize import LinearizeError, convert
from linearize.checkpoint import unwrapped
from linearize.convert import mixers
from linearize.families import family_of
from linearize.recipe import DistillSettings, LoraSettings, StageSettings
from linearize.train.align import align_loss
from linearize.train.distill import distill_loss
from linearize.train.sequences import pack
from linearize.train.trainer import (
    LinearizeTrainer,
    Pair,
    _arguments,
    keep,
    newest_checkpoint,
    shared_copy,
    train,
    with_lora,
)

STEPS = 12
LORA = LoraSettings(r=4, alpha=8, dropout=0.1)  # dropout: a resumed run has to draw the same numbers
STAGES = {"align": align_loss, "distill": distill_loss}


def sequences(length: int = 32, count: int = 2 * STEPS) -> list:
    generator = np.random.default_rng(0)
    documents = [generator.integers(1, VOCAB, size) for size in generator.integers(1, 60, 100)]
    return pack(documents, length, count * length)


class Job:
    """A student on its teacher's parameters, or on its own, and a stage to train it in."""

    def __init__(self, folder, lora=LORA, stage="distill", loss=None, seed=0, mixer=None, **settings) -> None:
        self.teacher = tiny()
        torch.manual_seed(seed)
        student = shared_copy(self.teacher) if lora else copy.deepcopy(self.teacher)
        convert(student, window=4, **{"mixing_weight": 0.1} | (mixer or {}))
        self.student = with_lora(student, lora) if lora else student
        self.folder, self.stage, self.loss = folder / "work", stage, loss or STAGES[stage]
        settings = {"learning_rate": 3e-3, "mixing_learning_rate": 3e-2, "batch_size": 2} | settings
        self.settings = StageSettings(tokens=1, **settings)

    def train(self):
        given = self.student, self.teacher, self.loss, sequences(), self.settings, self.folder, 0
        return timeless([train(self.stage, "converted", *given)])[0]

    def weights(self):
        return {name: p.detach().clone() for name, p in self.student.named_parameters() if p.requires_grad}


def killed_at(call: int, loss=distill_loss):
    """`loss`, with the interrupt of an impatient person at the given call."""
    calls = iter(range(call))

    def interrupted(*args, **kwargs):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return loss(*args, **kwargs)

    return interrupted


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Curve and weights of a distillation that nobody interrupted."""
    job = Job(tmp_path_factory.mktemp("whole"))
    return job.train(), job.weights()


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("structure", ["gla", "none"])
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "all"])
@pytest.mark.parametrize("stage", ["align", "distill"])
def test_a_stage_lowers_its_loss(tmp_path, stage, lora, structure):
    job = Job(tmp_path, lora, stage, mixer={"structure": structure}, learning_rate=1e-2 if lora else 3e-3)
    batch = {key: torch.stack([s[key] for s in sequences()]) for key in sequences()[0]}

    def loss() -> float:
        with torch.no_grad():
            return job.loss(unwrapped(job.student.eval()), job.teacher, batch).item()

    before = loss()
    curve = job.train()
    assert loss() < 0.97 * before
    assert curve.tokens == [64 * step for step in range(1, STEPS + 1)]
    assert not job.student.training
    weights = [m.mixing_weights() for m in mixers(job.student)] if structure == "gla" else []
    assert all((w - 0.1).abs().min() > 1e-4 for w in weights)


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "all"])
def test_the_teacher_stays_as_it_is_to_the_bit(tmp_path, lora):
    job = Job(tmp_path, lora)
    before = {name: p.clone() for name, p in job.teacher.state_dict().items()}
    job.train()
    assert_same(dict(job.teacher.state_dict()), before)
    assert all(p.grad is None for p in job.teacher.parameters())


def test_lora_shares_the_teacher_s_parameters_and_trains_few():
    teacher = tiny()
    student = with_lora(convert(shared_copy(teacher), window=4), LORA)
    shared = {p.data_ptr() for p in teacher.parameters()}
    assert all(p.data_ptr() in shared for p in student.parameters() if not p.requires_grad and p.numel() > 6)
    trained = {name.split(".self_attn.")[1] for name, p in student.named_parameters() if p.requires_grad}
    adapters = {f"{p}.lora_{x}.default.weight" for p in family_of(teacher.config).projections for x in "AB"}
    assert trained == adapters | {"mixing.modules_to_save.default.weight"}


def test_converting_a_shared_copy_leaves_the_model_alone():
    teacher = tiny()
    convert(shared_copy(teacher))
    assert mixers(teacher) == []
    assert type(teacher).__name__ == "LlamaForCausalLM"
    assert not hasattr(teacher.config, "linearize")


@pytest.mark.parametrize("target", ["wq", "lm_head", "embed_tokens", "mlp", "input_layernorm"])
def test_lora_targets_that_are_no_linear_layers_are_refused(target):
    """The head's weight may be the embedding's, which an adapter merged into it would change."""
    with pytest.raises(LinearizeError, match=rf"lora targets \['{target}'\].*valid: .*k_proj, .*q_proj"):
        with_lora(convert(tiny()), LoraSettings(targets=("q_proj", target)))


def test_one_process_has_one_gpu(tmp_path, monkeypatch):
    """Trainer would take all there are, by DataParallel."""

    def with_two(self):
        self._n_gpu = 2
        return torch.device("cpu")

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(with_two))
    assert _arguments(DistillSettings(), tmp_path, 0).n_gpu == 1


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "all"])
def test_mixing_weights_have_a_learning_rate_of_their_own(tmp_path, lora):
    """At a rate of nearly nothing for everything else, they alone move."""
    job = Job(tmp_path, lora, learning_rate=1e-12, mixing_learning_rate=1e-2, warmup=0)
    before = job.weights()
    job.train()
    moved = {name: (p - before[name]).abs().max().item() for name, p in job.weights().items()}
    assert all(change > 5e-3 for name, change in moved.items() if ".mixing." in name)
    assert all(change < 1e-8 for name, change in moved.items() if ".mixing." not in name)


def test_weight_decay_spares_the_mixing_weights(tmp_path):
    job = Job(tmp_path)
    arguments = TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to="none")
    trainer = LinearizeTrainer(Pair(job.student, job.teacher, job.loss), arguments, 0.5, clip=1.0)
    others, mixing = trainer.create_optimizer().param_groups
    assert (others["weight_decay"], mixing["weight_decay"], mixing["lr"]) == (0.1, 0.0, 0.5)
    assert len(mixing["params"]) == 3


@pytest.mark.parametrize(("stage", "lora"), [("align", LORA), ("distill", LORA), ("distill", None)])
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, stage, lora):
    whole = Job(tmp_path / "whole", lora, stage)
    expected = whole.train()
    for seed, call in ((0, 7), (5, 3)):  # twice: the second time from what the first resumed run had saved
        with pytest.raises(KeyboardInterrupt):
            Job(tmp_path, lora, stage, killed_at(call, STAGES[stage]), seed, save_every=2).train()
    assert newest_checkpoint(tmp_path / "work").name == "checkpoint-8"
    calls = []
    counted = lambda *args, **told: (calls.append(1), STAGES[stage](*args, **told))[1]  # noqa: E731
    resumed = Job(tmp_path, lora, stage, counted, seed=9, save_every=2)
    curve = resumed.train()
    assert len(calls) == STEPS - 8
    assert curve == expected
    assert_same(resumed.weights(), whole.weights())


def test_gradients_accumulate_across_a_kill(tmp_path):
    settings = {"batch_size": 1, "accumulate": 3}
    whole = Job(tmp_path / "whole", **settings)
    expected = whole.train()
    with pytest.raises(KeyboardInterrupt):
        Job(tmp_path, loss=killed_at(11), save_every=2, **settings).train()
    resumed = Job(tmp_path, save_every=2, **settings)
    assert resumed.train() == expected
    assert_same(resumed.weights(), whole.weights())


@pytest.mark.parametrize("damage", ["trainable.safetensors", "optimizer.pt", "linearize.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, whole, damage):
    with pytest.raises(KeyboardInterrupt):
        Job(tmp_path, loss=killed_at(9), save_every=2).train()
    newest = tmp_path / "work" / "checkpoint-8"
    assert newest_checkpoint(tmp_path / "work") == newest
    (newest / damage).write_bytes((newest / damage).read_bytes()[:-5])
    assert newest_checkpoint(tmp_path / "work").name == "checkpoint-6"
    resumed = Job(tmp_path, save_every=2)
    assert resumed.train() == whole[0]
    assert_same(resumed.weights(), whole[1])


def test_a_checkpoint_whose_writing_was_killed_does_not_count(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("linearize.train.trainer.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        Job(tmp_path, save_every=2).train()
    assert newest_checkpoint(tmp_path / "work") is None
    assert list((tmp_path / "work").glob("checkpoint-*")) == []


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    Job(tmp_path, save_every=6).train()
    with pytest.raises(LinearizeError, match="is of another recipe"):
        Job(tmp_path, LoraSettings(r=4, targets=("q_proj",)), save_every=6).train()


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, stage):
    calls = iter(range(100))

    def loss(student, teacher, batch, documents):
        if next(calls) == 4:
            weight = next(p for name, p in student.named_parameters() if "layers.1" in name and "lora_B" in name)
            weight.data[0] = torch.nan
        return STAGES[stage](student, teacher, batch)

    with pytest.raises(LinearizeError, match="step 5 of 12") as error:
        Job(tmp_path, stage=stage, loss=loss).train()
    if stage == "align":
        assert "layer 1" in str(error.value)


def test_a_gradient_that_is_not_a_number_stops_before_it_reaches_the_weights(tmp_path):
    calls = iter(range(100))

    def poisoned(student, teacher, batch, documents):
        value = distill_loss(student, teacher, batch)
        if next(calls) == 4:
            value.register_hook(lambda gradient: gradient * torch.nan)
        return value

    job = Job(tmp_path, loss=poisoned)
    with pytest.raises(LinearizeError, match=r"the gradient of .*(lora|mixing).* is not a number at step 5"):
        job.train()
    assert all(torch.isfinite(p).all() for p in job.weights().values())


def test_what_is_kept_lies_between_the_original_and_what_was_trained(tmp_path):
    job = Job(tmp_path)
    job.train()
    shorter = copy.deepcopy(job.student)
    keep(shorter, 0.3)
    merged, between = (dict(model.merge_and_unload().named_parameters()) for model in (job.student, shorter))
    moved = 0
    for name, original in tiny().named_parameters():
        expected = torch.lerp(original, merged[name], 0.3)
        assert torch.allclose(between[name], expected, atol=1e-6)
        moved += not torch.equal(original, merged[name])
    assert moved == 3 * 4
    assert all(torch.equal(between[name], p) for name, p in merged.items() if "mixing" in name)


def test_two_runs_are_the_same(tmp_path, whole):
    other = Job(tmp_path)
    assert other.train() == whole[0]
    assert_same(other.weights(), whole[1])


def test_gradient_checkpointing_changes_nothing_and_is_off_afterwards(tmp_path):
    no_dropout = LoraSettings(r=4, alpha=8)
    plain, saving = Job(tmp_path / "a", no_dropout), Job(tmp_path / "b", no_dropout, gradient_checkpointing=True)
    assert saving.train().loss == pytest.approx(plain.train().loss, rel=1e-5)
    assert isinstance(saving.student, PeftModel)
    assert all(layer._compiled_call_impl is None for layer in saving.student.base_model.model.model.layers)
