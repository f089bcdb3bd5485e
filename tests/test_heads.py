"""Heads that stay softmax attention in converted layers: what they see, what a cache keeps of them, their names."""

import pytest
import torch
from test_cache import LENGTH, SPLITS, in_parts
from tiny import FAMILIES, assert_close, ids, logits, tiny
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linearize import LinearizeError, convert, revert
from linearize.cache import cache_bytes
from linearize.convert import kept_softmax, mixers
from linearize.heads import heads_text, parse_heads
from linearize.inspect import inspect
from linearize.recipe import LoraSettings
from linearize.train.align import align_loss
from linearize.train.distill import distill_loss
from linearize.train.trainer import shared_copy, with_lora

HEADS = "0/1,2/0"
SETTINGS = {"window": 5, "sinks": 3, "mixing_weight": 0.4, "softmax_heads": HEADS}
PLAIN = [name for name in FAMILIES if name not in ("gemma2", "gemma3_text", "gpt_oss", "olmo3")]
DEFAULT = {"structure": "gated_deltanet", "feature_map": "linear", "gate_source": "learned", "readout": "soft_rms",
           "behind": True, "mixing": "data_dependent"}  # fmt: skip


def outputs(model, tokens: Tensor, layer: int = 0) -> Tensor:
    """What a layer's heads give `[B, T, H, D]`."""
    found = []
    attention = model.base_model.layers[layer].self_attn
    handle = attention.o_proj.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    logits(model, tokens, use_cache=False)
    handle.remove()
    return found[0].unflatten(-1, (-1, attention.head_dim))


def by_head(module, q, k, v, mask, scaling, **_):
    """Softmax attention of which each head sees what is said of it: the equation, in one matrix."""
    chosen = parse_heads(HEADS, 3, 2).get(module.layer_idx, ())
    index = torch.arange(q.shape[2])
    distance = index[:, None] - index
    near = (distance < SETTINGS["window"]) | (index < SETTINGS["sinks"])
    whole = torch.tensor([head in chosen for head in range(2)]).repeat_interleave(3)[:, None, None]
    sees = (distance >= 0) & (near | whole)
    k, v = (x.repeat_interleave(3, dim=1) for x in (k, v))
    weights = (q @ k.mT * scaling).masked_fill(~sees, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2), None


def test_they_see_the_whole_text_and_the_others_a_window():
    original, tokens = tiny().double(), ids(2, 40)
    given = shared_copy(original).requires_grad_(False)
    model = convert(given, structure="none", **{k: v for k, v in SETTINGS.items() if k != "mixing_weight"})
    ALL_ATTENTION_FUNCTIONS.register("by_head", by_head)
    original.set_attn_implementation("by_head")
    embedded = original.get_input_embeddings()(tokens).detach()
    found = []
    for each in (model, original):
        x = embedded.clone().requires_grad_()
        out = each(inputs_embeds=x, use_cache=False).logits
        found.append((out.detach(), *torch.autograd.grad(out.cos().sum(), x)))
    for ours, truth in zip(*found, strict=True):
        assert_close(ours, truth, 1e-6)


def test_other_heads_are_as_without_them():
    tokens = ids(2, 40)
    both = outputs(convert(tiny(), **SETTINGS), tokens)
    alone = outputs(convert(tiny(), **{k: v for k, v in SETTINGS.items() if k != "softmax_heads"}), tokens)
    assert_close(both[:, :, :3], alone[:, :, :3])
    assert_close(both[:, :, 3:], outputs(tiny(), tokens)[:, :, 3:])


@pytest.mark.parametrize("sizes", SPLITS[1:4], ids=str)
@pytest.mark.parametrize("family", PLAIN)
def test_cached_decoding_is_the_full_forward(family, sizes):
    model, tokens = convert(tiny(family), **SETTINGS), ids(2, LENGTH)
    assert_close(in_parts(model, tokens, sizes)[0], logits(model, tokens, use_cache=False))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_is_not_seen(implementation):
    model = convert(tiny(), **SETTINGS, **DEFAULT)
    model.set_attn_implementation(implementation)
    tokens = ids(2, LENGTH)
    mask = (torch.arange(LENGTH) >= torch.tensor([0, 7])[:, None]).long()
    padded, _ = in_parts(model, tokens * mask, [13, 1, 1, 9], mask)
    assert_close(padded[:1], logits(model, tokens[:1]))
    assert_close(padded[1:, 7:], logits(model, tokens[1:, 7:]))


def test_packed_documents_are_apart():
    model, tokens = convert(tiny(), **SETTINGS, **DEFAULT), ids(1, 40)
    positions = torch.cat([torch.arange(17), torch.arange(23)])[None]
    packed = logits(model, tokens, position_ids=positions, use_cache=False)
    assert_close(packed[:, :17], logits(model, tokens[:, :17], use_cache=False))
    assert_close(packed[:, 17:], logits(model, tokens[:, 17:], use_cache=False))


@pytest.mark.parametrize("loss", [align_loss, distill_loss])
def test_training_on_packed_documents_is_training_on_each(loss):
    """Losses that say nothing of what the teacher's masks hold for the student."""
    teacher = tiny()
    student = convert(shared_copy(teacher), **SETTINGS, **DEFAULT)
    student = with_lora(student, LoraSettings()).base_model.model
    tokens, targets = ids(1, 40), ids(1, 40, seed=1)
    spans = [slice(0, 17), slice(17, 40)]

    def of(where: list[slice]) -> Tensor:
        positions = torch.cat([torch.arange(span.stop - span.start) for span in where])[None]
        given = (torch.cat([x[:, span] for span in where], dim=1) for x in (tokens, targets))
        batch = dict(zip(("input_ids", "targets"), given, strict=True)) | {"position_ids": positions}
        return loss(student, teacher, batch, documents=len(where))

    def gradient(value: Tensor) -> Tensor:
        trained = [p for p in student.parameters() if p.requires_grad]
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, trained, allow_unused=True) if g is not None])

    packed = of(spans)
    if loss is distill_loss:  # a mean over tokens
        apart = sum(of([span]) * (span.stop - span.start) for span in spans) / 40
        assert_close(packed, apart)
        assert_close(gradient(packed), gradient(apart), 1e-4)
    swapped = of(spans[::-1])
    assert_close(packed, swapped, 1e-4)


def test_a_cache_grows_by_them_alone():
    model = convert(tiny(), **SETTINGS)
    sizes = [cache_bytes(in_parts(model, ids(1, n), [n - 3, 3])[1]) for n in (30, 50)]
    assert sizes[1] - sizes[0] == 20 * 2 * 2 * 8 * 4  # tokens, heads, keys and values, channels, bytes
    found = inspect(model.to(torch.bfloat16))
    assert [layer.per_token for layer in found.layers] == [2 * 8 * 2, 0, 2 * 8 * 2]
    assert found.cache_bytes(50) - found.cache_bytes(30) == 20 * 2 * 2 * 8 * 2


def test_what_stays_is_said():
    assert kept_softmax(convert(tiny(), **SETTINGS)) == "2 of 6 key/value heads"
    both = convert(tiny(), **SETTINGS | {"layers": "0-1", "softmax_heads": "0/1"})
    assert kept_softmax(both) == "1 of 3 layers and 1 of 6 key/value heads"
    assert kept_softmax(convert(tiny())) is None


def test_rows_move_with_them():
    model, tokens = convert(tiny(), **SETTINGS), ids(2, LENGTH)
    _, cache = in_parts(model, tokens[:, :10], [10])
    cache.reorder_cache(torch.tensor([1, 1]))
    assert_close(logits(model, tokens[[1, 1], 10:], past_key_values=cache), logits(model, tokens[[1, 1]])[:, 10:])


def test_saved_and_loaded_and_undone(tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokens = convert(tiny(), **SETTINGS), ids(2, 30)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert_close(logits(revert(model), tokens), logits(tiny(), tokens))


def test_a_layer_of_which_all_heads_are_named_is_left_as_it_is():
    model = convert(tiny(), **SETTINGS | {"softmax_heads": "0/1,2/0-1"})
    assert [mixer.layer_idx for mixer in mixers(model)] == [0, 1]
    assert model.config.linearize["softmax_heads"] == "0/1"
    assert convert(tiny(), **SETTINGS | {"softmax_heads": "2/0-1"}).config.linearize.keys() == {"layers", "mixer"}


def test_names_are_read_as_they_are_written():
    heads = parse_heads("17/1-2,8/0,17/4", 30, 5)
    assert heads == {8: (0,), 17: (1, 2, 4)}
    assert heads_text(heads) == "8/0,17/1-2,17/4"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"softmax_heads": "1"}, "give layer/head as in '8/0,17/1-2'"),
        ({"softmax_heads": "1/x"}, "give layer/head"),
        ({"softmax_heads": "3/0"}, "names layer 3; this model's layers are 0-2"),
        ({"softmax_heads": "1/2"}, "of layer 1 that there are not; this model's are 0-1"),
        ({"softmax_heads": "1/1-0"}, "give layer/head"),
        ({"softmax_heads": "1/0", "layers": "0,2"}, "names layer 1, which is not converted"),
        ({"softmax_heads": "0/0-1,1/0-1,2/0-1"}, "leaves no head to convert"),
    ],
)
def test_what_is_no_head_is_told(settings, told):
    with pytest.raises(LinearizeError, match=told):
        convert(tiny(), **settings)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_layers_that_slide_by_themselves_are_told(family):
    model = tiny(family, **({"sliding_window": 8} if family == "mistral" else {}))
    with pytest.raises(LinearizeError, match="which has a sliding window of its own"):
        convert(model, softmax_heads="0/1", window=4)


def test_what_is_passed_on_reaches_them():
    seen = []

    def listening(module, q, k, v, mask, **given):
        seen.append(given.get("position_ids"))
        return sdpa_attention_forward(module, q, k, v, mask, **given)

    ALL_ATTENTION_FUNCTIONS.register("listening", listening)
    ALL_MASK_ATTENTION_FUNCTIONS.register("listening", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model, positions = convert(tiny(), **SETTINGS), torch.arange(30)[None]
    model.set_attn_implementation("listening")
    found = logits(model, ids(1, 30), position_ids=positions, use_cache=False)
    assert_close(found, logits(convert(tiny(), **SETTINGS), ids(1, 30), use_cache=False))
    assert all(x is not None and x.equal(positions) for x in seen)
    assert len(seen) == 2


def test_a_range_without_end_is_told_at_once():
    with pytest.raises(LinearizeError, match="of layer 0 that there are not"):
        parse_heads("0/0-99999999999", 3, 2)


@pytest.mark.parametrize(("family", "what"), [("gemma2", "attn_logit_softcapping"), ("gpt_oss", "sinks")])
def test_families_that_they_do_not_fit_are_told(family, what):
    with pytest.raises(LinearizeError, match=f"softmax_heads has no place for the {what}"):
        convert(tiny(family), softmax_heads="0/1")
