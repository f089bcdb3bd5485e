"""Which layers or heads to leave as softmax attention: a score for each, from window conversions or a short alignment.

A conversion that keeps some of them shares its teacher's parameters, so a candidate costs a few forward passes.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from linearize.checkpoint import unwrapped
from linearize.config import MixerSettings
from linearize.convert import check_convertible, convert, decoder, mixers, native_window
from linearize.errors import LinearizeError, unknown
from linearize.evaluate.perplexity import score
from linearize.families import Head, family_of, rotation_of
from linearize.heads import heads_text
from linearize.mixer import LinearizedAttention
from linearize.ops.liger import wide
from linearize.probes import Probes, probes, recall
from linearize.ranges import spans
from linearize.recipe import AlignSettings, Recipe
from linearize.results import Schema
from linearize.train.align import align_loss, layer_errors
from linearize.train.documents import load_documents
from linearize.train.sequences import pack
from linearize.train.trainer import shared_copy
from linearize.variants import Base, build, load_base, mixer_of, train_stage, with_adapters

SELECTORS = ("late", "recall", "both", "gradient", "align")
FINGERPRINT_TOKENS = 32  # past window and sinks, where conversions begin to differ


class Measured(Schema):
    """What a conversion that keeps some layers can do."""

    late_loss: float = Field(description="nats, positions >= T / 2")
    recall: float = Field(description="mean log-probability of a needle's right word, among all words")
    accuracy: float = Field(description="share of needles whose right word is the most likely one")


class Selection(Schema):
    """Chosen layers or heads, the best first, and what they were chosen by."""

    model: str
    selector: str
    greedy: bool
    window: int
    sinks: int
    kept: list[str] = Field(description="layers, or heads as layer/head, to leave as softmax attention, the best first")
    key: str = Field(description="a recipe's `layers`, the others, or its `softmax_heads`")
    value: str = Field(description="of that key")
    rounds: list[dict[str, float]] = Field(description="scores by layer or head; one round, or one for each chosen")
    measured: dict[str, Measured] = Field(description="of the teacher, the window alone, the chosen, as many evenly")
    functions: int = Field(description="different functions that were scored")
    seconds: float


class Candidates:
    """Window conversions of one teacher, each by what it keeps; what is one function is measured once.

    A unit is a layer or, where `heads` are chosen, one of the model's key/value heads, counted through all layers.
    """

    def __init__(self, teacher: PreTrainedModel, mixer: MixerSettings, probes: Probes, heads: bool = False) -> None:
        shortest = min(rows.shape[1] for rows in (probes.sequences, *(n.rows for n in probes.needles)))
        if shortest <= (seen := mixer.widest_window() + max(mixer.values("sinks"))):
            raise LinearizeError(f"texts of {shortest} tokens fit into window and sinks ({seen}); give longer ones")
        self.teacher, self.mixer, self.probes, self.heads = teacher, mixer, probes, heads
        self.of_layer = teacher.config.num_key_value_heads if heads else 1
        self.units = range(teacher.config.num_hidden_layers * self.of_layer)
        self.fixed = probes.sequences[:2, : seen + FINGERPRINT_TOKENS]
        self._model: tuple[frozenset[int], PreTrainedModel] | None = None  # the one measured last
        self._functions: dict[frozenset[int], str] = {}
        self._found: dict[tuple[str, str], Any] = {}

    @property
    def functions(self) -> int:
        """How many different functions were met so far."""
        return len(set(self._functions.values()))

    def model(self, kept: Iterable[int]) -> PreTrainedModel:
        """The conversion that keeps `kept`; the teacher itself where that is all layers."""
        kept = frozenset(kept)
        if self._model is None or self._model[0] != kept:
            made = self.teacher
            if kept != frozenset(self.units):
                key, value = self.setting(kept)
                given: dict[str, Any] = {key: value} if value else {}
                made = convert(shared_copy(self.teacher), **given, **self.mixer.root)
            self._model = kept, made.eval()
        return self._model[1]

    def setting(self, kept: Iterable[int]) -> tuple[str, str]:
        """The recipe's key, and its value, by which these units stay softmax attention."""
        kept = frozenset(kept)
        if not self.heads:
            return "layers", spans(sorted(set(self.units) - set(kept)))
        by_layer: dict[int, tuple[int, ...]] = {}
        for unit in sorted(kept):
            layer, head = divmod(unit, self.of_layer)
            by_layer[layer] = (*by_layer.get(layer, ()), head)
        return "softmax_heads", heads_text(by_layer)

    def name(self, unit: int) -> str:
        """As people say it: a layer's number, or layer/head."""
        return "{}/{}".format(*divmod(unit, self.of_layer)) if self.heads else str(unit)

    @torch.no_grad()
    def function(self, kept: Iterable[int]) -> str:
        """A hash of the last hidden states on a few fixed tokens: equal for conversions that are the same function."""
        kept = frozenset(kept)
        if kept not in self._functions:
            model = self.model(kept)
            hidden = decoder(model)(input_ids=self.fixed.to(model.device), use_cache=False).last_hidden_state
            self._functions[kept] = hashlib.sha256(hidden.float().cpu().numpy().tobytes()).hexdigest()
        return self._functions[kept]

    def late_loss(self, kept: Iterable[int]) -> float:
        """Mean loss over the second half of the positions, in nats."""
        half = self.probes.sequences.shape[1] // 2
        return self._once(
            "late", kept, lambda model: score(model, self.probes.sequences).loss[:, half:].double().mean().item()
        )

    def recall(self, kept: Iterable[int]) -> tuple[float, float]:
        """Mean log-probability of the right words, and how often they are the most likely."""
        return self._once("recall", kept, lambda model: recall(model, self.probes.needles))

    def measure(self, kept: Iterable[int]) -> Measured:
        """All of it."""
        log_probability, accuracy = self.recall(kept)
        return Measured(late_loss=self.late_loss(kept), recall=log_probability, accuracy=accuracy)

    def gradient(self, kept: Iterable[int]) -> dict[int, float]:
        """What leaving each unit full would take off the late loss, in nats, to first order: the loss's derivative by
        the share of full attention in the unit's output, where that is 0. One backward pass a sequence for all."""
        family, layers = family_of(self.teacher.config), range(self.teacher.config.num_hidden_layers)
        if family.softcap or family.null_logits or any(native_window(self.teacher, i) is not None for i in layers):
            raise LinearizeError(
                "gradient needs plain causal softmax attention in all layers; valid: late, recall, both"
            )
        model, sequences = self.model(kept), self.probes.sequences
        half, head = sequences.shape[1] // 2, Head(model)
        embed, count = model.get_input_embeddings(), self.teacher.config.num_key_value_heads
        gains = torch.zeros(len(decoder(model).layers), count, dtype=torch.float64)
        for ids in tqdm(sequences.split(1), desc="select gradient", unit="sequence"):
            ids = ids.to(model.device)
            with FullShares(mixers(model)) as shares:
                embedded = embed(ids).detach().requires_grad_()
                hidden = decoder(model)(inputs_embeds=embedded, use_cache=False).last_hidden_state
                loss = F.cross_entropy(wide(head(hidden[0, half - 1 : -1])), ids[0, half:])
                torch.autograd.grad(loss, embedded)
            gains -= shares.derivatives(gains) / len(sequences)
        return dict(enumerate((gains if self.heads else gains.sum(1)).flatten().tolist()))

    def _once(self, what: str, kept: Iterable[int], measure: Callable[[PreTrainedModel], Any]) -> Any:
        key = what, self.function(kept)
        if key not in self._found:
            self._found[key] = measure(self.model(kept))
        return self._found[key]


class FullShares:
    """Inside, a backward pass finds the derivative of what it starts from by each head's share of full attention.

    A converted layer gives o; with a share a of full attention f of the same queries, keys and values it would give
    o + a (f - o), so that the derivative at a = 0 is (f - o) · do, summed over tokens.
    """

    def __init__(self, layers: Sequence[LinearizedAttention]) -> None:
        self.layers = layers
        self._handles: list[Any] = []
        self._full: dict[int, Tensor] = {}
        self._found: dict[int, Tensor] = {}

    def __enter__(self) -> "FullShares":
        for mixer in self.layers:
            output: Any = getattr(mixer, mixer.family.projections[-1])
            self._handles += [
                mixer.register_forward_pre_hook(self._attend, with_kwargs=True),
                output.register_forward_pre_hook(partial(self._listen, mixer.layer_idx)),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _attend(self, mixer: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        hidden, rope = args[0] if args else given["hidden_states"], given["position_embeddings"]
        q, k, v = mixer.family.project(mixer, hidden)
        q, k = rotation_of(mixer.original)(q, k, *rope, unsqueeze_dim=2)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        full = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=mixer.scaling, enable_gqa=True)
        self._full[mixer.layer_idx] = full.transpose(1, 2)

    def _listen(self, index: int, _: Any, args: tuple[Tensor, ...]) -> None:
        full, output = self._full.pop(index), args[0]
        gained = (full.flatten(2) - output).detach()

        def hear(gradient: Tensor) -> None:
            self._found[index] = (gradient * gained).unflatten(2, full.shape[2:]).double().sum((0, 1, 3))

        output.register_hook(hear)

    def derivatives(self, like: Tensor) -> Tensor:
        """`[layers, KV]`, as `like`: each of a key/value head and its group; 0 in layers that are not converted."""
        found = torch.zeros_like(like)
        for index, by_head in self._found.items():
            found[index] = by_head.unflatten(0, (like.shape[1], -1)).sum(1).cpu()
        return found


# --- selectors -------------------------------------------------------------------------------------------------------


def by_gain(candidates: Candidates, keep: int, selector: str, greedy: bool) -> tuple[list[int], list[dict[int, float]]]:
    """The `keep` best units, the best first, and the scores of each round.

    A unit's score is what leaving it full gains: nats of late loss (`late`), the same to first order (`gradient`),
    nats of the right words' log-probability (`recall`), or the mean of `late` and `recall`, each as a share of what the
    teacher gains (`both`). Greedily a unit is scored beside those chosen before it, else alone.
    """
    kept: list[int] = []
    rounds: list[dict[int, float]] = []
    while len(kept) < keep:
        others = [unit for unit in candidates.units if unit not in kept]
        if selector == "gradient":
            gains = candidates.gradient(kept)
            scores = {unit: gains[unit] for unit in others}
        else:
            bar = tqdm(others, desc=f"select {selector}", unit="candidate")
            scores = {unit: GAINS[selector](candidates, [*kept, unit]) for unit in bar}
        rounds.append(scores)
        kept += _best(scores, 1 if greedy else keep)
    return kept, rounds


def late_gain(candidates: Candidates, kept: Iterable[int]) -> float:
    """What keeping these units takes off the window's late loss, in nats."""
    return candidates.late_loss(()) - candidates.late_loss(kept)


def recall_gain(candidates: Candidates, kept: Iterable[int]) -> float:
    """What keeping these units adds to the right words' log-probability, in nats."""
    return candidates.recall(kept)[0] - candidates.recall(())[0]


def both_gain(candidates: Candidates, kept: Iterable[int]) -> float:
    """The mean of both, each as a share of the teacher's."""
    gaps = [gain(candidates, candidates.units) for gain in (late_gain, recall_gain)]
    if min(gaps) <= 0:
        raise LinearizeError(
            f"the teacher is {gaps[0]:.3f} (late) and {gaps[1]:.3f} (recall) nats better than its window, and shares "
            "need both above 0; valid selectors: late, recall, gradient, align"
        )
    return (late_gain(candidates, kept) / gaps[0] + recall_gain(candidates, kept) / gaps[1]) / 2


GAINS: dict[str, Callable[[Candidates, Iterable[int]], float]] = {
    "late": late_gain,
    "recall": recall_gain,
    "both": both_gain,
}


def by_alignment(recipe: Recipe, base: Base, keep: int, tokens: int) -> tuple[list[int], list[dict[int, float]]]:
    """The `keep` layers that are worst at giving the teacher's attention output after a short alignment, and errors.

    All layers are aligned side by side on `tokens` by the recipe, one sequence a step; the error is measured on the
    text's last sequences of them.
    """
    given = (recipe.align or AlignSettings()).model_dump()
    settings = AlignSettings(**given | {"tokens": tokens, "batch_size": 1, "accumulate": 1, "save_every": 0})
    trained = with_adapters(recipe, build(recipe, recipe.mixer, base.teacher))
    with tempfile.TemporaryDirectory() as work:
        train_stage(recipe, "align", "select", settings, align_loss, trained, base, Path(work))
    sequences = pack(base.documents, recipe.data.sequence_length, tokens)[-4:]
    batch = {key: torch.stack([one[key] for one in sequences]).to(base.teacher.device) for key in sequences[0]}
    with torch.no_grad():
        errors = layer_errors(unwrapped(trained).eval(), base.teacher, batch)
    scores = {index: error.item() for index, error in errors.items()}
    return _best(scores, keep), [scores]


def uniform(keep: int, units: int) -> list[int]:
    """`keep` of `units` in the middles of equal parts of the depth."""
    return [(2 * part + 1) * units // (2 * keep) for part in range(keep)]


def _best(scores: dict[int, float], count: int) -> list[int]:
    return sorted(scores, key=lambda index: (-scores[index], index))[:count]


# --- the command -----------------------------------------------------------------------------------------------------


def select(
    recipe: Recipe,
    keep: int,
    selector: str | None = None,
    greedy: bool = False,
    sequences: int = 4,
    trials: int = 8,
    tokens: int = 32_768,
    heads: bool = False,
) -> Selection:
    """Choose `keep` layers, or key/value heads, of the recipe's model to leave as softmax attention, on its training
    text.

    Without a `selector` by `late` or, of heads, of which there are many, by `gradient`. These, `recall` and `both` (see
    `by_gain`) look at `sequences` of the recipe's length and at `trials` needles of each length, in untrained
    conversions to the recipe's window without a recurrence; `align` (see `by_alignment`) trains on `tokens`. Raises
    LinearizeError for an unknown selector, a `keep` that leaves nothing to convert, and what else is wrong with the
    recipe.
    """
    selector = ("gradient" if heads else "late") if selector is None else selector
    if selector not in SELECTORS:
        raise unknown("selector", selector, SELECTORS)
    if greedy and selector == "align":
        raise LinearizeError(
            "greedy has no meaning for align, which scores all layers at once; valid: late, recall, both, gradient"
        )
    if heads and selector == "align":
        raise LinearizeError("align scores layers, not heads; valid: late, recall, both, gradient")
    started = time.perf_counter()
    recipe = recipe.model_copy(update={"layers": "all", "softmax_every": None, "softmax_heads": None, "distill": None})
    recipe = recipe.model_copy(
        update={"align": (recipe.align or AlignSettings()).model_copy(update={"tokens": tokens})}
    )
    texts = load_documents(recipe.data.train, "train")
    base = load_base(recipe, ["window_only"], train=selector == "align")
    count = base.teacher.config.num_hidden_layers * (base.teacher.config.num_key_value_heads if heads else 1)
    if not 1 <= keep < count:
        raise LinearizeError(f"keep is {keep}; valid for this model: 1-{count - 1}")
    given = recipe.data.sequence_length, sequences, trials, recipe.seed, recipe.data.train
    mixer = mixer_of(recipe, "window_only", base.teacher)
    if heads:
        check_convertible(base.teacher, mixer, "all", None, "0/0")  # else told after all of the work
    candidates = Candidates(base.teacher, mixer, probes(texts, base.tokenizer, *given), heads)
    if selector == "align":
        kept, rounds = by_alignment(recipe, base, keep, tokens)
    else:
        kept, rounds = by_gain(candidates, keep, selector, greedy)
    sets = {"teacher": candidates.units, "window": (), "chosen": kept, "uniform": uniform(keep, count)}
    key, value = candidates.setting(kept)
    return Selection(
        model=recipe.model,
        selector=selector,
        greedy=greedy,
        window=mixer.widest_window(),
        sinks=max(mixer.values("sinks")),
        kept=[candidates.name(unit) for unit in kept],
        key=key,
        value=value,
        rounds=[{candidates.name(unit): score for unit, score in scores.items()} for scores in rounds],
        measured={name: candidates.measure(units) for name, units in sets.items()},
        functions=candidates.functions,
        seconds=round(time.perf_counter() - started, 2),
    )


def table(chosen: Selection) -> str:
    """Scores by layer or head, and what the chosen can do, as text."""
    unit = "layer" if chosen.key == "layers" else "head"
    heads = [unit, *([f"round {i}" for i in range(1, len(chosen.rounds) + 1)] if chosen.greedy else ["score"]), ""]
    lines = ["".join(f"{head:>10}" for head in heads)]
    for index in chosen.rounds[0]:
        cells = [f"{scores[index]:.4f}" if index in scores else "" for scores in chosen.rounds]
        place = f"chosen {chosen.kept.index(index) + 1}" if index in chosen.kept else ""
        lines.append("".join(f"{cell:>10}" for cell in (index, *cells, place)).rstrip())
    names = {"teacher": "all", "window": "none", "chosen": ",".join(chosen.kept)}
    width = max(24, len(names["chosen"]) + 2)
    lines += ["", f"{f'full {unit}s':{width}}{'late loss':>10}{'recall':>10}{'accuracy':>10}"]
    for name, found in chosen.measured.items():
        cells = [f"{found.late_loss:.4f}", f"{found.recall:.4f}", f"{found.accuracy:.0%}"]
        lines.append(f"{names.get(name, name):{width}}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)
