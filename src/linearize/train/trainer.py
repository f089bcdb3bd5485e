"""The one training loop: a `transformers.Trainer` that trains a student against a teacher by a plain loss function."""

import copy
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from linearize import processes
from linearize.checkpoint import Student, unwrapped
from linearize.convert import decoder
from linearize.errors import LinearizeError
from linearize.families import family_of
from linearize.files import MARKER, new_folder, verify_folder
from linearize.recipe import LoraSettings, StageSettings
from linearize.results import Curve
from linearize.train.compiled import compiled_layers
from linearize.train.graph import Batch, Graphed
from linearize.train.recompute import draws, recomputed_layers
from linearize.train.watch import Watch

Loss = Callable[..., Tensor]  # of student, teacher, batch and `documents`, the most that are packed into a row
ADDED = ("mixing", "recurrence")  # the modules of a mixer that hold what a conversion added


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own structure on the same parameters: converting or wrapping it leaves `model` as it is."""
    return copy.deepcopy(model, memo={id(p): p for p in model.parameters()})


def with_lora(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """`model` with LoRA on its projections; what the conversion added is trained in full and saved with the adapter."""
    targets = settings.targets or family_of(model.config).projections
    added = [part for part in ADDED if any(f".{part}." in name for name, _ in model.named_parameters())]
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(targets),
        modules_to_save=added or None,
        task_type="CAUSAL_LM",
    )
    layers = decoder(model).layers.named_modules()  # the head may share its weight with the embedding
    linear = [f".{name}" for name, module in layers if isinstance(module, nn.Linear)]
    if missing := [target for target in targets if not any(name.endswith(f".{target}") for name in linear)]:
        valid = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise LinearizeError(f"lora targets {missing} are no linear layers of this model; valid: {valid}")
    return get_peft_model(model, config)


@torch.no_grad()
def keep(student: Student, share: float) -> None:
    """Take the projections back towards the original's, by all but `share` of what LoRA learned (WiSE-FT, arXiv
    2109.01903): what training costs that it is not for goes sooner than what it is for. What the conversion added
    stays."""
    for name, parameter in student.named_parameters():
        if ".lora_B." in name:
            parameter.mul_(share)


class Pair(nn.Module):
    """Student and teacher in one forward, so that what wraps this module, as autocast does, sees the whole step."""

    def __init__(
        self, student: Student, teacher: PreTrainedModel, loss: Loss, documents: int | None = None, graph: bool = False
    ) -> None:
        super().__init__()
        self.student, self.loss, self.documents = student, loss, documents
        self._teacher = (teacher.eval(),)  # not registered: never trained, never saved, never put into train mode
        trained = [p for p in self.parameters() if p.requires_grad]
        self.graphed = Graphed(self.eager, trained) if graph else None

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """`input_ids`, `position_ids` and `targets`, each `[B, T]`, to a loss."""
        return {"loss": self.eager(**batch) if self.graphed is None else self.graphed(**batch)}

    def eager(self, **batch: Tensor) -> Tensor:
        """The loss, operation by operation."""
        return self.loss(unwrapped(self.student), self._teacher[0], batch, documents=self.documents)


class LinearizeTrainer(Trainer):
    """Trainer with a learning rate for added parameters, checkpoints that are whole or absent, and a stop at NaN."""

    def __init__(
        self, pair: Pair, arguments: TrainingArguments, mixing_learning_rate: float, clip: float, **kwargs: Any
    ) -> None:
        super().__init__(pair, arguments, **kwargs)
        self.pop_callback(PrinterCallback)
        self.watch = Watch(clip, self.locate)
        self.add_callback(self.watch)
        self.mixing_learning_rate = mixing_learning_rate
        self.loss_is_scaled_for_ga = False  # a mean over each batch
        self.model_accepts_loss_kwargs = False

    def create_accelerator_and_postprocess(self) -> None:
        """Without DistributedDataParallel, under whose hooks no CUDA graph can be recorded: `Watch` averages."""
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over two groups: what the conversion added, and the rest."""
        named = [(name, p) for name, p in (model or self.model).named_parameters() if p.requires_grad]
        mixing = [p for name, p in named if any(f".{part}." in name for part in ADDED)]
        others = [p for name, p in named if not any(f".{part}." in name for part in ADDED)]
        groups = [{"params": others, "lr": self.args.learning_rate, "weight_decay": self.args.weight_decay}]
        if mixing:
            groups.append({"params": mixing, "lr": self.mixing_learning_rate, "weight_decay": 0.0})
        betas, fused = (self.args.adam_beta1, self.args.adam_beta2), torch.cuda.is_available()
        self.optimizer = torch.optim.AdamW(groups, betas=betas, fused=fused)
        self.watch.guard(self.optimizer)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """The pair's loss; stops where it is not a number, if that is known already."""
        try:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        except FloatingPointError as error:
            where = f"step {self.state.global_step + 1} of {self.state.max_steps}"
            raise LinearizeError(f"not a number at {where}, in {error}; try a lower learning_rate") from error
        self.watch.saw(self.accelerator.gather(loss.detach()).mean(), inputs)
        return loss

    def locate(self, batch: Batch) -> None:
        """Raise FloatingPointError where the pair's loss first is not a number, if operations say."""
        once = torch.compiler.set_stance("force_eager")  # compiling takes longer
        with torch.no_grad(), self.accelerator.autocast(), once:
            self._pair().eager(**batch)  # a graph does not say where

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trainable = {name: p.detach().contiguous() for name, p in self._pair().named_parameters() if p.requires_grad}
        save_file(trainable, folder / "trainable.safetensors")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.watch.look(self.state)
        if not processes.is_first():
            self.store_flos()  # which all of them add up
            self._save_rng_state("")
            return
        runs, name = self.args.output_dir, f"checkpoint-{self.state.global_step}"
        with new_folder(Path(runs) / name, kind="training checkpoint") as temporary:
            self.args.output_dir = str(temporary)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = runs
            for path in (temporary / name).iterdir():
                path.rename(temporary / path.name)
            (temporary / name).rmdir()
        rotate_checkpoints(output_dir=runs, save_total_limit=self.args.save_total_limit)

    def _save_rng_state(self, output_dir: str) -> None:
        """Of every process, in the first one's checkpoint."""
        super()._save_rng_state(processes.told(output_dir))
        processes.wait()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / "trainable.safetensors")
        parameters = {name: p for name, p in self._pair().named_parameters() if p.requires_grad}
        if differing := sorted(saved.keys() ^ parameters.keys()):
            raise LinearizeError(f"{resume_from_checkpoint} is of another recipe ({differing[0]}); give another folder")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])

    def _pair(self) -> Pair:
        return self.accelerator.unwrap_model(self.model)


def most_documents(sequences: Sequence[Batch]) -> int:
    """Documents of the sequence that has most, by position ids that start over."""
    return max(int((s["position_ids"][1:] != s["position_ids"][:-1] + 1).sum()) for s in sequences) + 1


def newest_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint in `folder`; damaged ones after it are removed, since they block its step."""
    steps = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*") if path.is_dir()}
    for step in sorted(steps, reverse=True):
        try:
            verify_folder(steps[step])
            if (steps[step] / MARKER).is_file():
                return steps[step]
            reason = f"{steps[step]} has no {MARKER}"
        except LinearizeError as error:
            reason = str(error)
        print(f"removing a damaged training checkpoint: {reason}", file=sys.stderr)
        shutil.rmtree(steps[step])
    return None


class _Progress(TrainerCallback):
    """A bar with speed and time left."""

    def __init__(self, label: str, tokens_per_step: int, tokens: int) -> None:
        self.label, self.tokens_per_step, self.tokens = label, tokens_per_step, tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        bar = {"unit": "token", "unit_scale": True, "disable": not processes.is_first()}
        self.bar = tqdm(desc=self.label, total=self.tokens, initial=self._seen(state), **bar)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(self._seen(state) - self.bar.n)
        if state.log_history:
            self.bar.set_postfix(loss=f"{state.log_history[-1]['loss']:.3f}", refresh=False)

    def _seen(self, state: Any) -> int:
        return min(state.global_step * self.tokens_per_step, self.tokens)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


def train(
    stage: str,
    name: str,
    student: Student,
    teacher: PreTrainedModel,
    loss: Loss,
    sequences: Sequence[Batch],
    settings: StageSettings,
    folder: Path,
    seed: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> Curve:
    """Run `stage` of the variant `name` on packed `sequences` (`train.sequences.pack`); return its curve.

    Checkpoints go to `folder`, and a stage found there goes on from its newest whole one. Raises LinearizeError at a
    loss or gradient that is not a number.
    """
    student.train()
    base = unwrapped(student)
    arguments = _arguments(settings, folder, seed)
    length = len(sequences[0]["input_ids"])
    tokens = len(sequences) * length
    tokens_per_step = settings.batch_size * settings.accumulate * length * arguments.world_size
    gpu = arguments.device.type == "cuda"
    most = most_documents(sequences) if gpu else None  # a GPU is not to be asked what a batch has
    graph = gpu and not (settings.gradient_checkpointing and draws(base))
    trainer = LinearizeTrainer(
        Pair(student, teacher, loss, most, graph),
        arguments,
        settings.mixing_learning_rate,
        settings.clip,
        train_dataset=sequences,
        callbacks=[_Progress(f"{stage} {name}", tokens_per_step, tokens), *callbacks],
    )
    processes.make_same(parameter for parameter in student.parameters() if parameter.requires_grad)
    if processes.is_first():
        newest_checkpoint(folder)  # damaged ones are gone then
    processes.wait()
    last, started = newest_checkpoint(folder), time.perf_counter()
    recomputed = recomputed_layers(base) if settings.gradient_checkpointing and stage == "distill" else nullcontext()
    try:
        with compiled_layers(base, teacher, whole=stage == "distill"), recomputed:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    except torch.OutOfMemoryError as error:
        raise LinearizeError(
            f"out of GPU memory in {stage} with batch_size {settings.batch_size}; lower it and raise accumulate, "
            "or set gradient_checkpointing"
        ) from error
    student.eval()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return Curve(
        stage=stage,
        model=name,
        tokens=[min(log["step"] * tokens_per_step, tokens) for log in logs],  # the last step may be a short one
        loss=[float(log["loss"]) for log in logs],
        seconds=round(time.perf_counter() - started, 2),
    )


def _arguments(settings: StageSettings, folder: Path, seed: int) -> TrainingArguments:
    """`settings` in Trainer's words."""
    gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,  # below 1 it is a share of all steps
        weight_decay=settings.weight_decay,
        max_grad_norm=0.0,  # `Watch` clips
        bf16=gpu,
        use_cpu=not gpu,
        seed=seed,
        data_seed=seed,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 500,
        save_total_limit=2,
        logging_strategy="no",  # `Watch` writes the history
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=gpu,
        accelerator_config={"non_blocking": gpu},
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of one process; more are for several (DDP), not for DataParallel
    return arguments
