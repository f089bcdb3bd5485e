"""One layer against its equations, and whole models against the teacher that they must equal at the limits."""

import pytest
import torch
import torch.nn.functional as F
from tiny import FAMILIES, assert_close, ids, logits, relative, tiny

from linearize import LinearizeError, convert
from linearize.convert import attention_of, mixers
from linearize.ops import gated_linear, local

LENGTH = 20


PLAIN = (  # families whose projections and rotation `liger` writes out
    *("gemma", "gemma2", "gemma3_text", "gpt_oss", "granite", "llama", "mistral", "mixtral"),
    *("qwen2", "qwen3", "starcoder2"),
)
SCALES = {"gemma2": 5**-0.5, "gemma3_text": 5**-0.5, "granite": 0.5}  # as tests/tiny.py sets them
SOFTCAPS = {"gemma2": 2.0}


def liger(family, attention, x, rope, w, window, sinks, temperature):
    """Liger Attention written out from a softmax attention's own projections, for one unpadded document."""
    heads = [p(x).unflatten(-1, (-1, attention.head_dim)) for p in (attention.q_proj, attention.k_proj)]
    v = attention.v_proj(x).unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, "q_norm"):
        heads = [attention.q_norm(heads[0]), attention.k_norm(heads[1])]
    q, k = heads
    log_g = torch.log(torch.sigmoid(k.double()) ** (1 / temperature))
    state = torch.zeros(len(x), k.shape[2], k.shape[3], v.shape[3])
    recurrent, _ = gated_linear.reference(q.softmax(-1), k.softmax(-1), v, log_g, state)
    cos, sin = (torch.cat([part] * (q.shape[-1] // part.shape[-1]), -1)[:, :, None] for part in rope)
    q, k = (y * cos + torch.cat([-y[..., y.shape[-1] // 2 :], y[..., : y.shape[-1] // 2]], -1) * sin for y in (q, k))
    first = local.Sinks(k[:, :sinks], v[:, :sinks], torch.arange(sinks).expand(len(x), -1))
    scale, null_logits = SCALES.get(family, attention.head_dim**-0.5), getattr(attention, "sinks", None)
    scoring = local.Scoring(scale, softcap=SOFTCAPS.get(family), null_logits=null_logits)
    near, _ = local.reference(q, k, v, window, scoring, first)
    return attention.o_proj((w * recurrent + (1 - w) * near).float().flatten(2))


@pytest.mark.parametrize("settings", [{"mixing": "fixed", "mixing_weight": 0.3}, {"gate_temperature": 2.0}], ids=str)
@pytest.mark.parametrize("family", PLAIN)
def test_a_layer_is_liger_attention(family, settings):
    model = convert(tiny(family), window=5, sinks=2, **settings)
    mixer = attention_of(model, 1)
    w = 0.3
    if mixer.config.mixing == "per_head":
        w = torch.rand(6, 1)
        mixer.mixing.weight.data = w[:, 0].clone()
    seen = {}
    mixer.register_forward_hook(lambda _, __, kwargs, output: seen.update(kwargs, output=output[0]), with_kwargs=True)
    logits(model, ids(2, LENGTH))
    x, rope = seen["hidden_states"], seen["position_embeddings"]
    expected = liger(family, mixer.original, x, rope, w, 5, 2, mixer.config.gate_temperature)
    assert_close(seen["output"], expected)


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("window", [LENGTH, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_recurrence_and_with_a_full_window_it_is_the_teacher(family, window, sinks):
    model = tiny(family)
    expected = logits(model, ids(2, LENGTH))
    convert(model, window=window, sinks=sinks, mixing="fixed", mixing_weight=0)
    assert_close(logits(model, ids(2, LENGTH)), expected)
    assert_close(logits(model, ids(2, LENGTH), use_cache=False), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_full_window_is_the_teacher(family):
    model, mask = tiny(family), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"attention_mask": mask, "position_ids": positions}
    expected = logits(model, ids(2, LENGTH), **given)
    convert(model, window=LENGTH, mixing="fixed", mixing_weight=0)
    assert_close(logits(model, ids(2, LENGTH), **given)[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("settings", [{"window": 4}, {"mixing_weight": 0.5}], ids=str)
def test_the_window_and_the_recurrence_change_the_model(settings):
    """Or the tests above would say nothing."""
    model = tiny()
    expected = logits(model, ids(2, LENGTH))
    convert(model, **{"window": LENGTH, "mixing_weight": 0.0} | settings)
    assert relative(logits(model, ids(2, LENGTH)), expected) > 0.05


@pytest.mark.parametrize("layers", ["all", "0,2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family, layers):
    model = convert(tiny(family), layers=layers, window=5, mixing_weight=0.4)
    tokens, pads = ids(3, LENGTH), (0, 3, 17)
    mask = torch.arange(LENGTH) >= torch.tensor(pads)[:, None]
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    padded = logits(model, tokens, attention_mask=mask.long(), position_ids=positions)
    for row, pad in enumerate(pads):
        assert_close(padded[row, pad:], logits(model, tokens[row : row + 1, pad:])[0])


@pytest.mark.parametrize("layers", ["all", "0,2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_are_as_if_alone(family, layers):
    model = convert(tiny(family), layers=layers, window=5, mixing_weight=0.4)
    lengths = [6, 1, 2, 11]
    tokens, positions = ids(1, LENGTH), torch.cat([torch.arange(n) for n in lengths])[None]
    packed = logits(model, tokens, position_ids=positions, use_cache=False)
    assert_close(packed, torch.cat([logits(model, part) for part in tokens.split(lengths, dim=1)], dim=1))


@pytest.mark.parametrize("mixing", ["fixed", "per_head"])
@pytest.mark.parametrize(("given", "expected"), [(None, {"fixed": 0.5, "per_head": 0.02}), (0.0, {}), (0.7, {})])
def test_mixing_weights_start_where_they_should(mixing, given, expected):
    model = convert(tiny(), mixing=mixing, mixing_weight=given)
    for mixer in mixers(model):
        assert_close(mixer.mixing_weights(), torch.full((6,), expected.get(mixing, given)))


def test_the_window_alone_has_no_mixing_and_carries_no_state():
    model = convert(tiny(), structure="none", window=5)
    cache = model(ids(1, LENGTH)).past_key_values
    assert [layer.state for layer in cache.layers] == [None] * 3
    expected = convert(tiny(), window=5, mixing="fixed", mixing_weight=0)
    assert_close(logits(model, ids(1, LENGTH)), logits(expected, ids(1, LENGTH)))


@pytest.mark.parametrize("family", ["qwen3", "cohere", "gemma2", "gpt_oss", "phi"])
def test_gradients_reach_every_parameter(family):
    model = convert(tiny(family), window=5, mixing_weight=0.4)
    F.cross_entropy(model(ids(2, LENGTH)).logits.flatten(0, 1), ids(2, LENGTH).flatten()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_a_layer_that_gets_no_tokens_says_so():
    mixer = attention_of(convert(tiny()), 1)
    rope = (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
    with pytest.raises(LinearizeError, match=r"layer 1 \(LlamaAttention\) got no description"):
        mixer(torch.randn(1, 3, 48), rope)
