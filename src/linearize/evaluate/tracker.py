"""A small model that is trained on a state-tracking task and tested on longer rows of it.

A row is a token that begins it and the task's symbols. *Direct*, the model is asked for the answer after the last
symbol (S5: for the product after each). *With a scratchpad* it writes the state after each symbol and reads it
before the next one; the last state written is the answer. In tests it reads what it has written itself.
"""

import math
import os
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from linearize.config import drop_idle, validated
from linearize.convert import convert
from linearize.errors import LinearizeError
from linearize.evaluate.tasks import TASKS, Task
from linearize.files import disk_error
from linearize.graphs import RecordingError, on_the_side, record

FORMATS = ("direct", "scratchpad")
IGNORED = -100  # cross_entropy's mark of a place without a target
WARM_UP = 3  # eager steps before a CUDA graph is captured
MIXER: dict[str, Any] = {  # of the layers that are trained: the recurrence alone
    "feature_map": "none",
    "readout": "rms",
    "local": "none",
    "gate_source": "learned",
}


class Settings(BaseModel):
    """Of one run; two runs in one folder must agree on them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden_size: int = Field(128, ge=1, description="of the model")
    heads: int = Field(4, ge=1, description="each with a key and a value of hidden_size / heads")
    layers: int = Field(3, ge=1, description="a recurrence and an MLP each")
    mlp: int | None = Field(None, ge=1, description="width inside an MLP; null: twice hidden_size")
    initial: float = Field(0.02, gt=0, description="standard deviation of weights at the start")
    convolution: int | None = Field(None, ge=2, description="tokens of a short convolution over keys and values")
    convolution_form: Literal["linear", "silu"] = Field(
        "linear", description="linear starts as the token itself; silu at random, is over queries too, and SiLU follows"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of products, by autocast; weights are in fp32")
    steps: int = Field(20_000, ge=1, description="at most, for direct parity and arithmetic")
    other_steps: int = Field(5_000, ge=1, description="at most, for the other tasks and for scratchpads")
    batch: int = Field(256, ge=1, description="rows of a step")
    learning_rate: float = Field(1e-3, gt=0, description="AdamW's")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    final: float = Field(0.1, ge=0, le=1, description="share of the learning rate that its cosine ends at")
    weight_decay: float = Field(0, ge=0, description="AdamW's, of all weights but those of norms")
    clip: float | None = Field(1.0, gt=0, description="the largest norm of a step's gradient; null: any")
    shortest: int = Field(3, ge=3, description="symbols of a row in training")
    longest: int = Field(40, ge=3, description="symbols of a row in training; tests begin here")
    every: bool = Field(False, description="ask for the state after each symbol in direct training, not for the answer")
    curriculum: float = Field(0, ge=0, lt=1, description="share of the steps in which the longest rows grow to that")
    block: int = Field(250, ge=1, description="steps between two checks, each with a checkpoint")
    tests: int = Field(2048, ge=1, description="rows of a test")
    training_seconds: float | None = Field(
        None, gt=0, description="of a pair's training: what is left of its steps then is left out; null: all steps"
    )
    compiled: bool = Field(False, description="on a GPU a step by torch.compile, which takes half a minute first")
    seed: int = Field(0, ge=0, description="of weights and data")
    own: dict[str, dict[str, Any]] = Field({}, description="settings of single tasks, in place of those above")

    @model_validator(mode="after")
    def _whole_heads(self) -> "Settings":
        if self.hidden_size % (2 * self.heads):
            raise LinearizeError(f"hidden_size {self.hidden_size} is not {self.heads} heads of an even size")
        if self.convolution is None and self.convolution_form != "linear":
            raise LinearizeError(f"convolution_form {self.convolution_form} has no effect: there is no convolution")
        if self.longest < self.shortest:
            raise LinearizeError(f"longest is {self.longest}, less than shortest {self.shortest}")
        return self

    def of(self, task: str) -> "Settings":
        """Those of one task."""
        return validated(Settings, {**self.model_dump(), **self.own.get(task, {}), "own": {}}, f"{task} settings")


class Pair(NamedTuple):
    """What is trained on what."""

    task: str
    format: str
    structure: str
    negative_eigenvalues: bool

    @property
    def name(self) -> str:
        """Of its files."""
        return "-".join([self.task, self.format, self.structure, *["negative"] * self.negative_eigenvalues])

    def steps(self, settings: Settings) -> int:
        """Of its training, at most; the published results are on direct parity and arithmetic."""
        published = self.format == "direct" and self.task in ("parity", "arithmetic")
        return settings.steps if published else min(settings.steps, settings.other_steps)


class Result(BaseModel):
    """What came of a pair: scaled accuracy, 0 at chance and 1 where every answer is right."""

    model_config = ConfigDict(extra="forbid")

    task: str
    format: str
    structure: str
    negative_eigenvalues: bool
    trained: float = Field(description="on rows as long as in training")
    longer: float = Field(description="on longer rows")
    steps: int = Field(description="of training; fewer than all where two checks in a row were at 0.999")
    seconds: float = Field(description="of training, on all machines together")
    checks: list[tuple[int, float, float]] = Field(description="step, loss, and scaled accuracy on other, longer rows")


def build(pair: Pair, settings: Settings) -> PreTrainedModel:
    """A random Llama whose attention is the recurrence."""
    task = TASKS[pair.task]
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=1 + task.symbols + task.states,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.mlp or 2 * settings.hidden_size,
        initializer_range=settings.initial,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=4 * task.longest,
        bos_token_id=None,
        eos_token_id=None,
    )
    chosen = {
        "structure": pair.structure,
        "negative_eigenvalues": pair.negative_eigenvalues,
        "convolution": settings.convolution,
        "convolution_form": settings.convolution_form,
    }
    return convert(LlamaForCausalLM(config), **drop_idle(MIXER, chosen)[0])


def draw(task: Task, shortest: int, longest: int, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Symbols and states `[rows, longest]` of lengths `[rows]` that are uniform from `shortest` to `longest`."""
    lengths = torch.randint(shortest, longest + 1, (rows,), generator=generator, device=generator.device)
    lengths = task.fit(lengths)
    symbols, states = (F.pad(x, (0, longest - x.shape[1])) for x in task.generate(lengths, generator))
    return symbols, states, lengths


def encode(
    task: Task,
    symbols: Int[Tensor, "N L"],
    states: Int[Tensor, "N L"],
    lengths: Int[Tensor, "N"],
    scratchpad: bool = False,
    every: bool = False,
) -> tuple[Int[Tensor, "N T"], Int[Tensor, "N T"]]:
    """Tokens and what is to be said after each, IGNORED where nothing is: T is 1 + L, or 2 L with a scratchpad.

    Token 0 begins a row and pads it; symbols come next, then states.
    """
    tokens, written = 1 + symbols, 1 + task.symbols + states
    place = torch.arange(symbols.shape[1], device=symbols.device)
    asked = place < lengths[:, None] if scratchpad or every or task.every else place == lengths[:, None] - 1
    targets = written.masked_fill(~asked, IGNORED)
    if scratchpad:
        tokens = torch.stack([tokens, written], dim=2).flatten(1)[:, :-1]
        targets = torch.stack([targets, torch.full_like(targets, IGNORED)], dim=2).flatten(1)[:, :-1]
    return F.pad(tokens, (1, 0)), F.pad(targets, (1, 0), value=IGNORED)


def autocast(settings: Settings, device: torch.device) -> torch.autocast:
    """Products in the precision of `settings`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")


class Step:
    """A training step, `step(tokens, targets)` to the loss; on a GPU, from the fourth on, the replay of a CUDA graph.

    A step of these small models is hundreds of kernels that take longer to launch than to run; `compiled`, they are
    fewer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
        capture: bool,
        compiled: bool = False,
    ) -> None:
        self.model, self.optimizer, self.settings = model, optimizer, settings
        self.objective = torch.compile(self._objective, dynamic=False) if compiled else self._objective
        self.stream = torch.cuda.Stream() if capture else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager, self.loss = 0, torch.empty(0)
        self.static: tuple[Tensor, Tensor] | None = None  # what the graph reads

    @property
    def ready(self) -> bool:
        """Whether no graph is still to be recorded."""
        return self.stream is None or self.graph is not None

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The tensors' shapes are the same in every call."""
        if self.stream is None:
            return self._step(tokens, targets)
        if self.graph is None and self.eager >= WARM_UP:
            self._capture(self.stream, tokens, targets)
        if self.graph is None:
            self.eager += 1
            return on_the_side(lambda: self._step(tokens, targets), times=1, stream=self.stream)
        assert self.static is not None
        self.static[0].copy_(tokens)
        self.static[1].copy_(targets)
        self.graph.replay()
        return self.loss

    def _objective(self, tokens: Tensor, targets: Tensor) -> Tensor:
        with autocast(self.settings, tokens.device):
            logits = self.model(input_ids=tokens, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def _step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss = self.objective(tokens, targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.settings.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        return loss.detach()

    def _capture(self, stream: torch.cuda.Stream, tokens: Tensor, targets: Tensor) -> None:
        static = self.static = tokens.clone(), targets.clone()
        self.optimizer.zero_grad(set_to_none=True)
        try:
            self.graph, self.loss = record(lambda: self._step(*static), stream)
        except RecordingError as error:
            tqdm.write(f"no CUDA graph, so steps take longer: {str(error).splitlines()[0]}")
            self.stream = None
            self.optimizer.zero_grad(set_to_none=True)


class Training:
    """A pair's model, optimizer and progress, which goes on from the checkpoint at `path` if there is one."""

    def __init__(self, pair: Pair, settings: Settings, path: Path, device: torch.device, capture: bool) -> None:
        self.pair, self.settings, self.path = pair, settings, path
        self.task, self.scratchpad = TASKS[pair.task], pair.format == "scratchpad"
        self.steps = pair.steps(settings)
        self.model = build(pair, settings).to(device).train()
        on_gpu = device.type == "cuda"
        norms = [x for name, x in self.model.named_parameters() if "norm" in name]
        others = [x for name, x in self.model.named_parameters() if "norm" not in name]
        self.optimizer = torch.optim.AdamW(
            [{"params": others, "weight_decay": settings.weight_decay}, {"params": norms, "weight_decay": 0.0}],
            lr=torch.tensor(settings.learning_rate, device=device),  # a tensor, so that a CUDA graph reads it anew
            capturable=on_gpu,
            fused=on_gpu,
        )
        self.generator = torch.Generator(device)
        self.progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "checks": []}
        if path.exists():
            kept = torch.load(path, map_location=device, weights_only=True)
            self.model.load_state_dict(kept["model"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.progress = kept["progress"]
        self.step = Step(self.model, self.optimizer, settings, capture and on_gpu, settings.compiled and on_gpu)

    @property
    def done(self) -> bool:
        """All steps or all the time, or two checks in a row at 0.999."""
        last = [accuracy for _, _, accuracy in self.progress["checks"][-2:]]
        return self._share(self.progress["step"]) >= 1 or (len(last) == 2 and min(last) >= 0.999)

    def block(self) -> None:
        """Train up to the next check, check, and write a checkpoint."""
        started, first = time.perf_counter(), self.progress["step"]
        steps = min(self.settings.block, self.steps - first)
        self.generator.manual_seed(self._seed(1 + first))
        rows, longest = steps * self.settings.batch, self._longest(first)
        symbols, states, lengths = draw(self.task, self.settings.shortest, longest, rows, self.generator)
        wide = (0, self.settings.longest - longest)  # one shape, whatever the lengths
        symbols, states = F.pad(symbols, wide), F.pad(states, wide)
        tokens, targets = encode(self.task, symbols, states, lengths, self.scratchpad, self.settings.every)
        losses = torch.zeros(steps, device=tokens.device)
        for i, batch in enumerate(zip(*(x.unflatten(0, (steps, -1)) for x in (tokens, targets)), strict=True)):
            for group in self.optimizer.param_groups:
                group["lr"].fill_(self._rate(first + i))
            losses[i] = self.step(*batch)
            if not self.step.ready:  # what is compiled meanwhile is no training
                started = time.perf_counter()
        loss = losses.mean().item()
        if not math.isfinite(loss):
            raise LinearizeError(f"{self.pair.name} diverged at step {first + steps}; give a lower --set learning_rate")
        rows = min(512, self.settings.tests)
        accuracy = self.accuracy(self.settings.longest, self.task.longest, rows, 0, free=False)
        self.progress["checks"].append((first + steps, round(loss, 6), accuracy))
        self.progress["step"] = first + steps
        self.progress["seconds"] += time.perf_counter() - started
        self._save()

    def latest(self) -> str:
        """The last check in words."""
        if not self.progress["checks"]:
            return "no check yet"
        step, loss, accuracy = self.progress["checks"][-1]
        return f"step {step:,} of {self.steps:,}, loss {loss:.4f}, longer rows {accuracy:.3f}"

    def result(self) -> Result:
        """Tests on rows that no check has seen."""
        shortest, longest, tests = self.settings.shortest, self.settings.longest, self.settings.tests
        return Result(
            **self.pair._asdict(),
            trained=self.accuracy(shortest, longest, tests, 1, free=True),
            longer=self.accuracy(longest, self.task.longest, tests, 2, free=True),
            steps=self.progress["step"],
            seconds=round(self.progress["seconds"], 1),
            checks=self.progress["checks"],
        )

    @torch.no_grad()
    def accuracy(self, shortest: int, longest: int, rows: int, number: int, free: bool) -> float:
        """Scaled accuracy of the answer on rows of these lengths; `number` tells one test's rows from another's.

        A scratchpad holds what the model has written itself where `free`, and what is right otherwise, which is the
        same up to the first mistake.
        """
        self.model.eval()
        self.generator.manual_seed(self._seed(-1 - number))
        symbols, states, lengths = draw(self.task, shortest, longest, rows, self.generator)
        right = 0
        for part in zip(*(x.split(1024) for x in (symbols, states, lengths)), strict=True):
            with autocast(self.settings, lengths.device):
                answer = self._write(part[0], part[2]) if free and self.scratchpad else self._read(*part)
            right += int((answer == part[1].gather(1, part[2][:, None] - 1)[:, 0]).sum())
        self.model.train()
        return round(self.task.scaled(right / rows), 4)

    def _read(self, symbols: Tensor, states: Tensor, lengths: Tensor) -> Tensor:
        tokens, _ = encode(self.task, symbols, states, lengths, self.scratchpad)
        last = (2 * lengths - 1 if self.scratchpad else lengths)[:, None, None]
        hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        return self._state(hidden.gather(1, last.expand(-1, 1, hidden.shape[2])))[:, 0]

    def _write(self, symbols: Tensor, lengths: Tensor) -> Tensor:
        """Decode: each symbol is given, the state after it is what the model finds likeliest."""
        cache, written, answer = None, torch.zeros_like(lengths), torch.zeros_like(lengths)
        for i in range(symbols.shape[1]):
            before = 1 + self.task.symbols + written if i else torch.zeros_like(written)
            tokens = torch.stack([before, 1 + symbols[:, i]], dim=1)
            output = self.model.model(input_ids=tokens, past_key_values=cache, use_cache=True)
            cache, written = output.past_key_values, self._state(output.last_hidden_state)[:, -1]
            answer = torch.where(lengths == i + 1, written, answer)
        return answer

    def _state(self, hidden: Tensor) -> Tensor:
        """The likeliest state, `[N, T]`."""
        return self.model.lm_head(hidden)[..., 1 + self.task.symbols :].argmax(-1)

    def _seed(self, number: int) -> int:
        return (self.settings.seed << 32) + number % (1 << 32)

    def _share(self, step: int) -> float:
        """Of the training that is over: of its steps or, as far as the last check knows, of its time."""
        seconds = self.settings.training_seconds
        return max(step / self.steps, 0 if seconds is None else self.progress["seconds"] / seconds)

    def _longest(self, step: int) -> int:
        shortest, longest, over = self.settings.shortest, self.settings.longest, self.settings.curriculum
        share = self._share(step)
        return longest if share >= over else shortest + int((longest - shortest) * share / over)

    def _rate(self, step: int) -> float:
        """A linear warm-up, then half a cosine down to `final`."""
        share, warm = self._share(step), self.settings.warmup
        if share < warm:
            return self.settings.learning_rate * min(1, (share + 1 / self.steps) / warm)
        fallen = (1 - math.cos(math.pi * min(1, (share - warm) / (1 - warm)))) / 2
        return self.settings.learning_rate * (1 - (1 - self.settings.final) * fallen)

    def _save(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "progress": self.progress}
        try:
            torch.save(state, temporary)
            os.replace(temporary, self.path)
        except OSError as error:
            raise disk_error(self.path, error) from error
        finally:
            temporary.unlink(missing_ok=True)
