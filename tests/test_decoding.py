"""Steps by fixed addresses are those of the ordinary forward, whatever happens to cache, batch and weights between."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from test_cache import LENGTH, in_parts, one_by_one
from tiny import FAMILIES, VOCAB, assert_close, ids, logits, relative, tiny
from transformers import AutoModelForCausalLM, DynamicCache
from waiting import NeverWaiting

from linearize import LinearizeError, convert, decoding
from linearize.convert import mixers
from linearize.decoder import Decoder
from linearize.decoding import UNEVEN
from linearize.ops import dispatch, liger, products, step

SETTINGS = {"window": 5, "sinks": 3, "mixing_weight": 0.4}
DELTA = {"structure": "gated_deltanet", "feature_map": "linear", "gate_source": "learned", "gate_temperature": 256.0}
WHOLE = [  # layers that are one kernel though they are not the published ones
    DELTA | {"readout": "rms", "mixing": "data_dependent"},
    DELTA | {"readout": "gated", "mixing": "data_dependent", "window": 64},
    DELTA | {"structure": "deltanet", "gate_temperature": 16.0, "negative_eigenvalues": True},
    {"structure": "gated_deltanet", "mixing": "data_dependent"},
    DELTA | {"readout": "rms", "mixing": "data_dependent", "behind": True},
    DELTA | {"readout": "gated", "mixing": "data_dependent", "behind": True, "rope": "both"},
    DELTA | {"structure": "deltanet", "gate_temperature": 16.0, "readout": "soft_rms", "behind": True, "rope": "none"},
    {"structure": "hgrn2", "readout": "gated", "mixing": "data_dependent"},
    DELTA | {"feature_map": "products", "shifts": 3, "readout": "soft_rms", "mixing": "data_dependent", "behind": True},
]
BY_OPERATIONS = [  # of whole layers, or of the recurrence alone
    DELTA | {"readout": "rms", "mixing": "data_dependent", "time_scales": 30.0},
    {"structure": "deltanet", "negative_eigenvalues": True, "convolution": 3},
    {"structure": "deltanet", "convolution": 3, "convolution_form": "silu"},
    {"structure": "gsa", "slots": 5, "feature_map": "none"},
    {"structure": "kronecker"},
    {"structure": "gla", "feature_map": "hedgehog", "readout": "denominator"},
    {"structure": "gla", "feature_map": "hedgehog", "mixing": "shared_normalizer"},
    {"structure": "mlstm", "mixing": "shared_normalizer", "window": 64},
    {"structure": "rwkv6", "bonus": True, "time_scales": 30.0, "gate_source": "v"},
    {"structure": "lightning", "feature_map": "elu", "mixing": "data_dependent"},
    {"structure": "gla", "rope": "both"},
    {"structure": "gla", "rope": "none"},
    {"structure": "gla", "behind": True},
    {"structure": "gated_deltanet", "behind": True, "rope": "both"},
    DELTA | {"readout": "rms", "behind": True, "time_scales": 30.0},
    {"structure": "gsa", "slots": 5, "feature_map": "none", "behind": True},
    {"structure": "kronecker", "behind": True, "rope": "both"},
    {"structure": "hgrn2", "local": "block"},
    {"structure": "mamba2", "score": "softplus_reweighted"},
    {"structure": "none", "local": "block"},
    {"structure": "gated_deltanet", "local": "none", "window": 64, "sinks": 4},
    {"local": ["window", "none", "block"], "sinks": 2, "structure": ["gla", "gated_deltanet", "none"]},
    {"window": [3, 7, 5], "sinks": [2, 4, 0], "mixing": ["shared_normalizer", "data_dependent", "per_head"]},
]
UNFUSED = "ignore:Liger Attention runs unfused", "ignore:decoding goes without", "ignore:decoding steps"
PADDING = "ignore:padding behind tokens of its row"
pytestmark = [pytest.mark.filterwarnings(warning) for warning in UNFUSED]  # on a GPU, in fp32
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
GROWS = "what stays softmax attention grows, for which layers must be as in llama, mistral, qwen2, qwen3, smollm3"


def converted(family: str = "llama", rope_parameters=None, **settings):
    overrides = {"head_dim": 16} if family in ("llama", "mistral", "qwen2") else {}
    overrides |= {"rope_parameters": rope_parameters} if rope_parameters else {}
    return convert(tiny(family, **overrides), **SETTINGS | settings).to(DEVICE)


@pytest.fixture
def steps(monkeypatch):
    """How many steps decoders made."""
    made, step = [], Decoder.step

    def counted(self, *args):
        made.append(self)
        return step(self, *args)

    monkeypatch.setattr(Decoder, "step", counted)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, steps):
    model, tokens = converted(family), ids(2, LENGTH).to(DEVICE)
    full = logits(model, tokens, use_cache=False)
    assert_close(in_parts(model, tokens, one_by_one(9))[0], full)
    assert len(steps) == (0 if family in UNEVEN else LENGTH - 9)


@pytest.mark.parametrize("structure", [*liger.GATES, "gated_retention", "none"])
@pytest.mark.parametrize("prompt", [1, 2, 9])
def test_every_structure_after_any_prompt(structure, prompt, steps):
    """Sinks are still to come after short ones."""
    model, tokens = converted(structure=structure), ids(2, LENGTH).to(DEVICE)
    full = logits(model, tokens, use_cache=False)
    assert_close(in_parts(model, tokens, one_by_one(prompt))[0], full)
    assert len(steps) == LENGTH - prompt


@pytest.mark.parametrize(
    "settings",
    [
        {"window": 1, "sinks": 0},
        {"window": 64, "sinks": 2},
        {"window": [3, 7, 5], "sinks": [2, 4, 0]},
        {"structure": ["gla", "mamba2", "none"]},
        {"mixing": "fixed"},
        {"feature_map": "none", "gate_temperature": 1.0},
    ],
    ids=str,
)
def test_settings(settings, steps):
    model, tokens = converted(**settings), ids(2, LENGTH).to(DEVICE)
    full = logits(model, tokens, use_cache=False)
    assert_close(in_parts(model, tokens, one_by_one(6))[0], full)
    assert len(steps) == LENGTH - 6


def learned(settings, family="llama"):
    """A model whose new parameters are not those that change nothing."""
    beside = {} if settings.get("local") == "none" else SETTINGS  # which have no effect there
    model = converted(family, **settings) if beside else convert(tiny(family, head_dim=16), **settings).to(DEVICE)
    torch.manual_seed(0)
    for mixer in mixers(model):
        for branch in (mixer.recurrence, mixer.mixing):
            for parameter in () if branch is None else branch.parameters():
                parameter.data += 0.2 * torch.randn(parameter.shape).to(DEVICE)
    return model


@pytest.mark.filterwarnings(PADDING)
@pytest.mark.parametrize("settings", [*WHOLE, *BY_OPERATIONS], ids=str)
def test_what_is_not_as_published(settings, steps):
    """After any prompt, with padding, and with chunks between the steps, which give the cache its tensors back."""
    model, tokens = learned(settings), ids(3, LENGTH).to(DEVICE)
    full = logits(model, tokens, use_cache=False)
    sizes = [one_by_one(1), one_by_one(2), one_by_one(9), [6, 1, 1, 4, 1, 1, 3, 1, 1, 1, 4]]
    for parts in sizes:
        assert_close(in_parts(model, tokens, parts)[0], full)
    assert len(steps) == sum(part == 1 for parts in sizes for part in parts[1:])
    pads = torch.tensor([0, 3, 9])
    mask = torch.arange(LENGTH) >= pads[:, None]
    mask[0, [12, 15]] = False
    mask = mask.to(DEVICE)
    padded, _ = in_parts(model, tokens, one_by_one(10), mask.long())
    made = len(steps)
    with patch("linearize.convert.next_token", lambda *_: None):
        ordinary, _ = in_parts(model, tokens, one_by_one(10), mask.long())
    assert len(steps) == made
    assert_close(padded[mask], ordinary[mask])
    for row, pad in enumerate(pads):
        if row > 0:
            assert_close(padded[row, pad:], logits(model, tokens[row : row + 1, pad:], use_cache=False)[0])


def test_which_layers_are_one_kernel():
    for whole, settings in ((True, WHOLE), (False, BY_OPERATIONS)):
        for other in settings:
            assert Decoder(learned(other), 1).by_operations != whole, other


@pytest.mark.parametrize("heads", [1, 12])
def test_learned_gates_of_few_and_of_many_heads(heads, steps):
    """By one weight and by two; the readout's by one weight where there are few channels."""
    shape = {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 16}
    model, tokens = convert(tiny(**shape), **SETTINGS | WHOLE[1]).to(DEVICE), ids(2, LENGTH).to(DEVICE)
    for mixer in mixers(model):
        for parameter in (*mixer.recurrence.gate.parameters(), *mixer.recurrence.readout.parameters()):
            parameter.data += 0.2 * torch.randn(parameter.shape).to(DEVICE)
    assert_close(in_parts(model, tokens, one_by_one(9))[0], logits(model, tokens, use_cache=False))
    assert len(steps) == LENGTH - 9


@pytest.mark.skipif(GPU, reason="there the graph itself shows it")
@pytest.mark.parametrize("settings", [{}, {"structure": "none"}, *WHOLE, *BY_OPERATIONS], ids=str)
def test_a_step_waits_for_nothing(settings, monkeypatch):
    model, tokens = learned(settings), ids(2, LENGTH)
    decoder, outputs = Decoder(model, 2), []
    for module in ("ops.step", "ops.token"):
        monkeypatch.setattr(f"linearize.{module}.may_look", lambda _: False)
    addresses = [x.data_ptr() for moment in decoder.moments for x in moment.held if x is not None]
    with NeverWaiting():
        for t, token in enumerate(tokens.split(1, dim=1)):
            decoder.position.fill_(t)
            decoder.ids.copy_(token)
            outputs.append(decoder.run())
    assert_close(torch.cat(outputs, 1), logits(model, tokens, use_cache=False))
    assert addresses == [x.data_ptr() for moment in decoder.moments for x in moment.held if x is not None]


@pytest.mark.parametrize("settings", [WHOLE[0], WHOLE[4], *BY_OPERATIONS[:7:2], BY_OPERATIONS[12]], ids=str)
def test_beyond_the_length_otherwise(settings, steps):
    for family in ("llama", "gemma3_text"):
        model = convert(tiny(family, max_position_embeddings=10), **SETTINGS | settings).to(DEVICE)
        tokens = ids(2, LENGTH).to(DEVICE)
        assert_close(in_parts(model, tokens, one_by_one(7))[0], logits(model, tokens, use_cache=False))
    assert len(steps) == 2 * (LENGTH - 7)


def test_rows_with_padding(steps):
    model, tokens = converted(), ids(3, LENGTH).to(DEVICE)
    pads = (0, 3, 9)
    mask = (torch.arange(LENGTH) >= torch.tensor(pads)[:, None]).long().to(DEVICE)
    padded, _ = in_parts(model, tokens, one_by_one(10), mask)
    for row, pad in enumerate(pads):
        assert_close(padded[row, pad:], logits(model, tokens[row : row + 1, pad:], use_cache=False)[0])
    assert len(steps) == LENGTH - 10


def test_padding_between_tokens_neither_decays_nor_writes(steps):
    model, tokens, mask = converted(window=64), ids(2, LENGTH).to(DEVICE), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, [12, 15]] = 0
    padded, _ = in_parts(model, tokens, one_by_one(10), mask.to(DEVICE))
    for row in range(2):
        real = mask[row].bool().to(DEVICE)
        assert_close(padded[row, real], logits(model, tokens[row, real][None], use_cache=False)[0])
    assert len(steps) == LENGTH - 10


def test_beyond_the_length_the_model_was_trained_at(steps):
    for family in ("llama", "gemma3_text", "olmo3"):
        model = convert(tiny(family, max_position_embeddings=10), **SETTINGS).to(DEVICE)
        tokens = ids(2, LENGTH).to(DEVICE)
        full = logits(model, tokens, use_cache=False)
        assert_close(in_parts(model, tokens, one_by_one(7))[0], full)
    assert len(steps) == 3 * (LENGTH - 7)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"behind": True}], ids=["published", "behind"])
def test_two_caches_in_turn_and_chunks_between(settings, steps):
    """One decoder serves both: a cache gets its own tensors back when the other comes, or more than a token does."""
    model, first, second = converted(**settings), ids(2, LENGTH).to(DEVICE), ids(2, LENGTH, seed=1).to(DEVICE)
    caches, outputs = [DynamicCache(config=model.config) for _ in range(2)], [[], []]
    begin = 0
    for size in (6, 1, 1, 4, 1, 3, 1, 1, 1, 5):
        for cache, tokens, output in zip(caches, (first, second), outputs, strict=True):
            output.append(model(tokens[:, begin : begin + size], past_key_values=cache).logits)
        begin += size
    for tokens, output in zip((first, second), outputs, strict=True):
        assert_close(torch.cat(output, 1), logits(model, tokens, use_cache=False))
    assert len(set(steps)) == 1
    assert len(steps) == 12


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("settings", [{}, {"behind": True}], ids=["published", "behind"])
def test_copies_of_a_cache_go_ways_of_their_own(settings, copied, steps):
    model, tokens = converted(**settings), ids(2, LENGTH).to(DEVICE)
    _, cache = in_parts(model, tokens[:, :12], one_by_one(9)[:4])
    other = copied(cache)
    other_tokens = torch.cat([tokens[:, :12], ids(2, 5, seed=2).to(DEVICE)], 1)
    for t in range(12, 17):
        ours = model(tokens[:, [t]], past_key_values=cache).logits
        theirs = model(other_tokens[:, [t]], past_key_values=other).logits
    assert_close(ours, logits(model, tokens[:, :17], use_cache=False)[:, -1:])
    assert_close(theirs, logits(model, other_tokens, use_cache=False)[:, -1:])
    assert len(steps) == 13


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "repeat"],
)
@pytest.mark.parametrize("settings", [{}, {"behind": True}], ids=["published", "behind"])
def test_rows_that_move(settings, change, rows, steps):
    model, tokens = converted(**settings), ids(3, LENGTH).to(DEVICE)
    _, cache = in_parts(model, tokens[:, :12], one_by_one(9)[:4])
    change(cache)
    parts = [logits(model, tokens[rows][:, [t]], past_key_values=cache) for t in range(12, LENGTH)]
    assert_close(torch.cat(parts, 1), logits(model, tokens[rows], use_cache=False)[:, 12:])
    assert len(steps) == 3 + LENGTH - 12


@torch.no_grad()
def test_a_cache_that_is_reset_or_dropped(steps):
    model, tokens = converted(), ids(2, LENGTH).to(DEVICE)
    _, cache = in_parts(model, tokens, one_by_one(9))
    cache.reset()
    parts = [logits(model, part, past_key_values=cache) for part in tokens.split(one_by_one(20), 1)]
    assert_close(torch.cat(parts, 1), logits(model, tokens, use_cache=False))
    del cache
    assert_close(in_parts(model, tokens, one_by_one(9))[0], logits(model, tokens, use_cache=False))
    assert len(steps) == 2 * (LENGTH - 9) + LENGTH - 20


@pytest.mark.parametrize("settings", [{}, WHOLE[0]], ids=["published", "default"])
def test_weights_that_changed_are_seen(settings, steps):
    """In place, as in training; by others in their place; and a recurrence that is left out."""
    model, tokens = learned(settings), ids(2, LENGTH).to(DEVICE)
    mixer = model.model.layers[1].self_attn

    def in_place() -> None:
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
            mixer.mixing.weight.fill_(0.9)
            for parameter in mixer.recurrence.parameters():
                parameter.mul_(-1.5)

    def replaced() -> None:
        model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
            -model.model.layers[0].mlp.up_proj.weight.detach()
        )

    def ablated() -> None:
        mixer.ablated = "recurrence"

    outputs = []
    for change in (lambda: None, in_place, replaced, ablated):
        change()
        outputs.append(in_parts(model, tokens, one_by_one(9))[0])
        assert_close(outputs[-1], logits(model, tokens, use_cache=False))
    assert len(steps) == 3 * (LENGTH - 9)
    assert all(relative(a, b) > 1e-3 for a, b in pairwise(outputs))


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"layers": "0,2"}, {"softmax_heads": "0/0"}], ids=str)
def test_a_cache_that_another_model_goes_on_with(settings, steps):
    """A copy of the first, once and in turns."""
    model, tokens = converted(**settings), ids(2, LENGTH).to(DEVICE)
    other, full = copy.deepcopy(model), logits(model, tokens, use_cache=False)
    for turns in ([model] * 8 + [other] * LENGTH, [model, other] * LENGTH):
        _, cache = in_parts(model, tokens[:, :9], [9])
        for t, chosen in zip(range(9, LENGTH), turns, strict=False):
            assert_close(chosen(tokens[:, [t]], past_key_values=cache).logits, full[:, [t]])
    assert len(steps) == 2 * (LENGTH - 9)


@torch.no_grad()
@pytest.mark.parametrize("change", ["weights", "hook", "ablation", "layer"])
def test_what_is_done_to_a_model_between_two_tokens(change, steps):
    """It is seen by a cache that has been decoded with, as by one that has not."""
    model, tokens, called = converted(), ids(2, LENGTH).to(DEVICE), []
    caches = [in_parts(model, tokens[:, :12], sizes)[1] for sizes in (one_by_one(9)[:4], [12])]
    assert len(steps) == 3
    layer = model.model.layers[1]
    if change == "weights":
        model.load_state_dict({name: 1.1 * x for name, x in model.state_dict().items()}, assign=True)
    elif change == "hook":
        layer.mlp.register_forward_hook(lambda *_: called.append(1))
    elif change == "ablation":
        layer.self_attn.ablated = "recurrence"
    else:
        layer.mlp = copy.deepcopy(layer.mlp).requires_grad_(False).to(DEVICE)
        layer.mlp.down_proj.weight.mul_(-1)
    live, fresh = (model(tokens[:, [12]], past_key_values=cache).logits for cache in caches)
    assert_close(live, fresh)
    assert len(called) == 2 * (change == "hook")


@pytest.mark.parametrize("settings", [{}, WHOLE[1]], ids=["published", "gated"])
def test_a_model_is_saved_trained_and_copied_as_before(settings, tmp_path, steps):
    """Though projections of one input are parts of one tensor now."""
    model, tokens = learned(settings), ids(2, LENGTH).to(DEVICE)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    in_parts(model, tokens, one_by_one(9))
    assert steps
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    expected = logits(model, tokens, use_cache=False)
    model.save_pretrained(tmp_path)
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE), copy.deepcopy(model)):
        assert torch.equal(logits(again, tokens, use_cache=False), expected)
        assert_close(in_parts(again, tokens, one_by_one(9))[0], expected)
    model.train()(tokens, labels=tokens).loss.backward()
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"layers": "0,2", "family": "phi"}, GROWS),
        ({"softmax_heads": "0/1", "family": "olmo2"}, GROWS),
        ({"family": "mixtral"}, "the experts of mixtral do a different amount of work for every text"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "the frequencies of dynamic RoPE depend on the length",
        ),
    ],
)
def test_models_without_a_decoder_say_why(settings, reason):
    assert decoding.why_not(converted(**settings)) == reason


def test_float64_goes_the_ordinary_way(steps):
    model, tokens = converted().double(), ids(2, LENGTH).to(DEVICE)
    assert_close(in_parts(model, tokens, one_by_one(9))[0], logits(model, tokens, use_cache=False))
    assert not steps


@pytest.mark.slow
def test_a_cache_that_lives_to_the_end():
    """What is left of it when Python ends disturbs nobody."""
    script = (
        "import tiny, torch; from linearize import convert; from transformers import DynamicCache\n"
        "model, ids = convert(tiny.tiny('llama'), window=5, layers='0,2'), tiny.ids(1, 12)\n"
        "cache = DynamicCache(config=model.config)\n"
        "with torch.no_grad(): [model(part, past_key_values=cache) for part in ids.split([10, 1, 1], 1)]\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("name", ["model.layers.1.mlp", "model.norm", "model.embed_tokens", "model", "lm_head"])
def test_hooks_are_called(name, steps):
    model, tokens, called = converted(), ids(2, LENGTH).to(DEVICE), []
    handle = model.get_submodule(name).register_forward_hook(lambda *_: called.append(1))
    in_parts(model, tokens, one_by_one(9))
    assert len(called) == LENGTH - 8
    assert not steps
    handle.remove()
    in_parts(model, tokens, one_by_one(9))
    assert len(steps) == LENGTH - 9


def test_adapters_have_no_decoder(steps):
    from peft import LoraConfig, get_peft_model

    model, tokens = converted(), ids(2, LENGTH).to(DEVICE)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    in_parts(wrapped, tokens, one_by_one(9))
    assert not steps
    merged = wrapped.merge_and_unload()
    assert_close(in_parts(merged, tokens, one_by_one(9))[0], logits(merged, tokens, use_cache=False))
    assert len(steps) == LENGTH - 9


@torch.no_grad()
def test_what_is_not_a_plain_step_goes_the_ordinary_way(steps):
    model, tokens = converted(), ids(2, LENGTH).to(DEVICE)
    full = logits(model, tokens, use_cache=False)
    cache = in_parts(model, tokens[:, :9], [9])[1]
    output = model(tokens[:, [9]], past_key_values=cache, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    assert_close(output.logits, full[:, [9]])
    assert_close(model(tokens[:, [10]], past_key_values=cache, return_dict=False)[0], full[:, [10]])
    with torch.enable_grad():
        assert model(tokens[:, [11]], past_key_values=cache).logits.requires_grad
    assert not steps
    assert_close(model(tokens[:, [12]], None, None, cache).logits, full[:, [12]])
    with torch.inference_mode():
        assert_close(model(tokens[:, [13]], past_key_values=cache).logits, full[:, [13]])
    assert_close(model(tokens[:, [14]], past_key_values=cache).logits, full[:, [14]])
    assert len(steps) == 3


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, WHOLE[4]], ids=["gla", "behind"])
def test_a_step_that_was_interrupted_leaves_nothing(settings, monkeypatch):
    model, tokens = learned(settings), ids(2, LENGTH).to(DEVICE)
    _, cache = in_parts(model, tokens[:, :10], [9, 1])
    decoder = decoding._decoders[model][2]

    def interrupted(*_):
        raise KeyboardInterrupt

    decoder.graph = None  # a CPU's way
    with monkeypatch.context() as patched:
        patched.setattr("linearize.decoder.advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(tokens[:, [10]], past_key_values=cache)
    found, _ = in_parts(model, tokens, one_by_one(12))
    assert_close(found, logits(model, tokens, use_cache=False))


def test_logits_are_not_written_over():
    model, tokens = converted(), ids(2, LENGTH).to(DEVICE)
    cache = in_parts(model, tokens[:, :9], [9])[1]
    first = logits(model, tokens[:, [9]], past_key_values=cache)
    kept = first.clone()
    logits(model, tokens[:, [10]], past_key_values=cache)
    assert torch.equal(first, kept)


@pytest.mark.skipif(GPU, reason="the kernel's fp32 is the interpreter's")
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, {}) for family in ("llama", "olmo2", "phi")),
        *((family, WHOLE[0]) for family in ("qwen2", "olmo2")),  # a product with a bias, and several
        ("qwen3", WHOLE[1]),
        *((family, WHOLE[4]) for family in ("phi", "smollm3")),  # a part turns, not in every layer
        ("llama", WHOLE[8]),
        ("phi", BY_OPERATIONS[0]),
    ],
    ids=str,
)
def test_models_by_the_kernel(family, settings, steps, monkeypatch):
    pytest.importorskip("triton", reason="the kernels are Triton's")
    import interpreted  # noqa: F401

    model, tokens = learned(settings, family), ids(2, LENGTH)
    full = logits(model, tokens, use_cache=False)
    for module in (step, products):
        monkeypatch.setattr(module, "why_not_fused", lambda *_, **__: None)
    assert_close(in_parts(model, tokens, one_by_one(LENGTH - 3))[0], full)
    assert len(steps) == 3


@pytest.mark.parametrize("kernels", [False, True])
def test_an_mlp_of_a_width_that_fits_no_tile(kernels, steps, monkeypatch):
    if kernels and (GPU or find_spec("triton") is None):
        pytest.skip("the kernels' fp32 is the interpreter's")
    given = {"head_dim": 16, "intermediate_size": 100, "attention_bias": True, "mlp_bias": True}
    model, tokens = convert(tiny(**given), **SETTINGS).to(DEVICE), ids(2, LENGTH).to(DEVICE)
    full = logits(model, tokens, use_cache=False)
    if kernels:
        import interpreted  # noqa: F401

        monkeypatch.setattr(products, "why_not_fused", lambda *_, **__: None)
    assert_close(in_parts(model, tokens, one_by_one(LENGTH - 2))[0], full)
    assert len(steps) == 2


@pytest.mark.skipif(GPU or find_spec("triton") is None, reason="needs Triton's interpreter")
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("settings", [{}, WHOLE[4], WHOLE[-1]], ids=["published", "default", "wide"])
def test_whole_steps_by_kernels(settings, many, steps, monkeypatch):
    """As on a GPU: beginning, norms, products, attention and end."""
    import interpreted

    from linearize.ops import step_triton

    model, tokens = learned(settings).bfloat16(), ids(2, LENGTH)
    full, name, ran = logits(model, tokens, use_cache=False), "attention_kernel" if many else "step_kernel", []

    def launched(self, *args, run=interpreted.interpreter.GridExecutor.__call__, **told):
        ran.append(self.fn.__name__)
        return run(self, *args, **told)

    monkeypatch.setattr(interpreted.interpreter.GridExecutor, "__call__", launched)
    monkeypatch.setattr(step_triton, "MANY", 0 if many else sys.maxsize)
    monkeypatch.setattr(dispatch, "no_device", lambda _: None)
    with interpreted.checked(overlaps=not many):
        assert_close(in_parts(model, tokens, one_by_one(LENGTH - 6))[0], full, 3e-2)
    assert len(steps) == 6
    layers = model.config.num_hidden_layers
    expected = {"begin_kernel": 1, name: layers, "product_kernel": 4 * layers, "norm_kernel": 1, "advance_kernel": 1}
    assert {n: ran.count(n) for n in expected} == {n: 6 * count for n, count in expected.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, WHOLE[0]], ids=["published", "default"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("many", [False, True])
def test_sixteen_bits_on_a_gpu(many, overlap, family, settings, steps, monkeypatch):
    """By the kernel for few sequences and those for many; one after the other, and each beside the one ahead."""
    from linearize.ops import products_triton, step_many_triton, step_triton

    monkeypatch.setattr(step_triton, "MANY", 0 if many else sys.maxsize)
    if not overlap:
        for module in (products_triton, step_many_triton, step_triton):
            monkeypatch.setattr(module, "can_overlap", lambda _: False)
    model, tokens = learned(settings, family).bfloat16(), ids(2, LENGTH).to(DEVICE)
    full = logits(model, tokens, use_cache=False)
    assert_close(in_parts(model, tokens, one_by_one(9))[0], full, 3e-2)
    assert all(decoder.graph is not None for decoder in steps)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [*WHOLE, *BY_OPERATIONS], ids=str)
def test_all_that_a_graph_holds(settings, steps):
    model, tokens = learned(settings), ids(2, LENGTH).to(DEVICE)
    assert_close(in_parts(model, tokens, one_by_one(9))[0], logits(model, tokens, use_cache=False))
    assert len(steps) == LENGTH - 9
    assert all(decoder.graph is not None for decoder in steps)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("settings", [{}, WHOLE[0]], ids=["published", "default"])
def test_a_model_on_another_device_than_the_current_one(settings, steps):
    model, tokens = learned(settings).bfloat16().to("cuda:1"), ids(2, LENGTH).to("cuda:1")
    full = logits(model, tokens, use_cache=False)
    assert_close(in_parts(model, tokens, one_by_one(9))[0], full, 3e-2)
    assert all(decoder.graph is not None for decoder in steps)


@pytest.mark.parametrize("settings", [{}, {"softmax_heads": "0/0"}], ids=["published", "hybrid"])
def test_threads_that_share_a_model(settings, steps):
    """They have its decoder in turns, each with its own cache."""
    model = converted(**settings)
    given = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    prompts = [ids(1, 9, seed=seed).to(DEVICE) for seed in range(3)]
    expected = [model.generate(prompt, **given) for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda prompt: model.generate(prompt, **given), prompts * 4))
    assert len(steps) == 15 * 29
    for output, other in zip(found, expected * 4, strict=True):
        assert torch.equal(output, other)


def test_generation_uses_it(steps):
    model, mask = converted(), torch.ones(2, 9, dtype=torch.long, device=DEVICE)
    mask[1, :4] = 0
    given = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    with_it = model.generate(ids(2, 9).to(DEVICE), **given)
    assert len(steps) == 8
    assert torch.equal(with_it, model.generate(ids(2, 9).to(DEVICE), use_cache=False, **given))


def test_modules_that_are_not_the_family_s_own(steps):
    """A norm or an MLP that was put in their place, or whose forward was."""
    tokens = ids(2, LENGTH).to(DEVICE)

    class Louder(type(tiny().model.norm)):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    for change in ("norm", "class", "forward"):
        model = converted()
        if change == "norm":
            model.model.norm = torch.nn.RMSNorm(model.config.hidden_size).to(DEVICE)
        elif change == "class":
            model.model.layers[1].input_layernorm.__class__ = Louder
        else:
            mlp = model.model.layers[1].mlp
            mlp.forward = lambda hidden, run=mlp.forward: 2 * run(hidden)
        assert_close(in_parts(model, tokens, one_by_one(9))[0], logits(model, tokens, use_cache=False))
    assert steps


def test_a_head_or_frequencies_that_were_replaced():
    model, tokens = converted(), ids(1, 12).to(DEVICE)
    cache = DynamicCache(config=model.config)
    logits(model, tokens[:, :9], past_key_values=cache)
    logits(model, tokens[:, 9:10], past_key_values=cache)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, VOCAB, bias=False).to(DEVICE)
    found = logits(model, tokens[:, 10:11], past_key_values=cache)
    assert_close(found, logits(model, tokens[:, :11], use_cache=False)[:, -1:])
    decoder = decoding._decoders[model][1]
    model.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    assert not decoder.fits(model)


def test_a_model_that_is_moved_leaves_nothing_behind():
    model = converted()
    in_parts(model, ids(2, LENGTH).to(DEVICE), one_by_one(9))
    kept = [weakref.ref(layer.qkv[0]) for layer in decoding._decoders[model][2].layers]
    model.to(torch.bfloat16)
    gc.collect()
    assert not any(reference() is not None for reference in kept)


@pytest.fixture
def made(monkeypatch):
    """How many sequences each decoder is for, in the order in which they are made."""
    batches = []

    class Noted(Decoder):
        def __init__(self, model, batch):
            batches.append(batch)
            super().__init__(model, batch)

    monkeypatch.setattr(decoding, "Decoder", Noted)
    return batches


@pytest.mark.parametrize("settings", [{}, {"softmax_heads": "0/1"}], ids=str)
def test_caches_of_several_sizes_in_turns(settings, made):
    """Each has its decoder, until it is gone."""
    model, sizes = learned(settings), (1, 2, 3)
    tokens = [ids(batch, 14).to(DEVICE) for batch in sizes]
    caches = [in_parts(model, text[:, :9], [9])[1] for text in tokens]
    found = [[logits(model, x[:, [t]], past_key_values=cache) for x, cache in zip(tokens, caches, strict=True)]
             for t in range(9, 12)]  # fmt: skip
    assert made == [1, 2, 3]
    for text, parts in zip(tokens, zip(*found, strict=True), strict=True):
        assert_close(torch.cat(parts, 1), logits(model, text[:, :12], use_cache=False)[:, 9:])
    del caches[1]
    another = in_parts(model, ids(4, 10).to(DEVICE), [9, 1])[1]
    assert made == [1, 2, 3, 4]
    assert list(decoding._decoders[model]) == [1, 3, 4]
    full = logits(model, tokens[2][:, :13], use_cache=False)[:, 12:]
    assert_close(logits(model, tokens[2][:, [12]], past_key_values=caches[1]), full)
    assert made == [1, 2, 3, 4]
    assert another.get_seq_length() == 10


def test_how_many_decoders_a_model_has(made):
    model = converted()
    caches = [in_parts(model, ids(batch, 10).to(DEVICE), [9, 1])[1] for batch in (1, 2, 3, 4, 5)]
    assert list(decoding._decoders[model]) == [2, 3, 4, 5]
    assert caches[0].layers[0].lender is None
    model.lm_head = torch.nn.Linear(model.config.hidden_size, VOCAB, bias=False).to(DEVICE)
    logits(model, ids(2, 1).to(DEVICE), past_key_values=caches[1])
    assert list(decoding._decoders[model]) == [2]  # the others were for another head


def test_continuous_batching_is_refused():
    with pytest.raises(LinearizeError, match="continuous batching does not work"):
        converted().generate_batch([[1, 2]])


def test_decoders_of_one_model_share_its_weights():
    """Also where they take turns, as batches of two sizes do."""
    model = converted()
    first, second = (Decoder(model, batch) for batch in (1, 2))
    for one, other in zip(first.layers, second.layers, strict=True):
        for name in ("qkv", "gate_up"):
            assert getattr(one, name)[0].data_ptr() == getattr(other, name)[0].data_ptr()
            assert_close(getattr(one, name)[0], getattr(other, name)[0])
