"""Conversion in place and back, saving and loading, and everything that is refused."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, assert_close, ids, logits, tiny
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

import linearize
from linearize import LinearizeError, convert, revert
from linearize.convert import attention_of, choose_layers, is_linearized, linearized_classes, mixers
from linearize.families import FAMILIES as ROWS

SETTINGS = {"window": 5, "sinks": 2, "mixing_weight": 0.4}
TOKENS = ids(2, 20)


def change_mixing(model) -> None:
    for mixer in mixers(model):
        mixer.mixing.weight.data.uniform_(0.1, 0.9)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_shared_and_none_is_new(family):
    model = tiny(family)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    convert(model, mixing="fixed")
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("family", FAMILIES)
def test_per_head_mixing_adds_one_number_a_head(family):
    model = tiny(family)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    convert(model, layers="0,2")
    after = dict(model.named_parameters())
    new = {name: after[name].numel() for name in after.keys() - before.keys()}
    assert new == {f"model.layers.{i}.self_attn.mixing.weight": 6 for i in (0, 2)}
    assert all(after[name].data_ptr() == pointer for name, pointer in before.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_revert_undoes_it(family):
    model = tiny(family)
    types, config = (type(model), type(model.config)), model.config.to_dict()
    names, expected = list(model.state_dict()), logits(model, TOKENS)
    revert(convert(model, **SETTINGS))
    assert (type(model), type(model.config)) == types
    assert model.config.to_dict() == config
    assert list(model.state_dict()) == names
    assert not is_linearized(model)
    assert torch.equal(logits(model, TOKENS), expected)


def test_revert_keeps_projections_that_were_replaced():
    model = convert(tiny(), **SETTINGS)
    new = torch.nn.Linear(48, 48, bias=False)
    attention_of(model, 1).q_proj = new
    assert attention_of(revert(model), 1).q_proj is new


def test_a_reverted_model_can_be_converted_again():
    model = convert(tiny(), **SETTINGS)
    expected = logits(model, TOKENS)
    assert torch.equal(logits(convert(revert(model), **SETTINGS), TOKENS), expected)


def test_converting_twice_and_reverting_nothing_is_refused():
    model = tiny()
    with pytest.raises(LinearizeError, match="'llama' model is not linearized"):
        revert(model)
    with pytest.raises(LinearizeError, match=r"linearized already; linearize\.revert"):
        convert(convert(model))


@pytest.mark.parametrize("layers", ["all", "0,2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_it_is_the_same_model(family, layers, tmp_path):
    model = convert(tiny(family), layers=layers, **SETTINGS)
    change_mixing(model)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is type(model)
    assert loaded.config.linearize == model.config.linearize
    assert [m.layer_idx for m in mixers(loaded)] == [m.layer_idx for m in mixers(model)]
    assert torch.equal(logits(loaded, TOKENS), logits(model, TOKENS))


def test_a_loaded_model_reverts(tmp_path):
    expected = logits(tiny(), TOKENS)
    convert(tiny(), **SETTINGS).save_pretrained(tmp_path)
    assert torch.equal(logits(revert(AutoModelForCausalLM.from_pretrained(tmp_path)), TOKENS), expected)


def test_new_mixing_weights_are_initialised_when_a_base_checkpoint_is_loaded(tmp_path):
    tiny().save_pretrained(tmp_path)
    config_class, model_class = linearized_classes("llama")
    plan = {"layers": [0, 2], "mixer": linearize.MixerConfig(mixing_weight=0.3).model_dump()}
    config = config_class.from_pretrained(tmp_path, linearize=plan)
    model = model_class.from_pretrained(tmp_path, config=config)
    assert [m.mixing.weight.tolist() for m in mixers(model)] == [pytest.approx([0.3] * 6)] * 2
    expected = convert(tiny(), layers=[0, 2], mixing_weight=0.3)
    assert_close(logits(model, TOKENS), logits(expected, TOKENS))


def test_a_config_without_its_plan_is_refused():
    config_class, model_class = linearized_classes("llama")
    with pytest.raises(LinearizeError, match="'linearized_llama' config lacks its 'linearize' entry"):
        model_class(config_class(hidden_size=32, intermediate_size=8, num_hidden_layers=1, vocab_size=8))


@pytest.mark.parametrize(
    ("layers", "every", "expected"),
    [
        ("all", None, [0, 1, 2, 3, 4, 5]),
        ("0-2,5", None, [0, 1, 2, 5]),
        (" 1 , 3-3", None, [1, 3]),
        ([4, 1, 1], None, [1, 4]),
        (range(2), None, [0, 1]),
        ("all", 3, [0, 1, 3, 4]),
        ("all", 2, [0, 2, 4]),
        ("2-4", 3, [3, 4]),
    ],
)
def test_layers(layers, every, expected):
    assert choose_layers(layers, every, 6) == expected


@pytest.mark.parametrize(
    ("layers", "every", "message"),
    [
        ("0-6", None, "names .*6.*; this model's layers are 0-5"),
        ([-1], None, "names .*-1"),
        ("3-1", None, "'all' or numbers and ranges"),
        ("", None, "'all' or numbers and ranges"),
        ("some", None, "'some' is not valid"),
        ("-1", None, "'-1' is not valid"),
        ("all", 1, "leaves no layer"),
        ([], None, "leaves no layer"),
        ("all", 0, "softmax_every is 0; valid: 1 and up"),
        ("all", "2", "softmax_every is '2'; valid: 1 and up"),
    ],
)
def test_layers_that_are_refused(layers, every, message):
    with pytest.raises(LinearizeError, match=message):
        choose_layers(layers, every, 6)


def test_other_layers_stay_as_they_are():
    model = tiny()
    attention = [attention_of(model, i) for i in range(3)]
    convert(model, softmax_every=2)
    assert [attention_of(model, i) is attention[i] for i in range(3)] == [False, True, False]
    assert model.config.linearize["layers"] == [0, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"structure": "mamba"}, "unknown structure 'mamba'; valid: deltanet, gated_deltanet"),
        ({"windows": 3}, "unknown mixer key 'windows'; valid: structure, local, window, .*mixing_weight"),
        ({"window": 0}, "'window' is 0: .*greater than or equal to 1"),
        ({"window": -5}, "'window' is -5"),
        ({"sinks": -1}, "'sinks' is -1"),
        ({"mixing": "both"}, "'mixing' is 'both': .*'fixed', 'per_head', "),
        ({"mixing_weight": 1.5}, "'mixing_weight' is 1.5"),
        ({"gate_temperature": 0}, "'gate_temperature' is 0"),
        ({"feature_map": "tanh"}, "'feature_map' is 'tanh': .*'softmax'"),
        ({"layers": "0-7"}, "this model's layers are 0-2"),
    ],
)
def test_settings_that_are_refused_leave_the_model_alone(settings, message):
    model = tiny()
    expected = logits(model, TOKENS)
    with pytest.raises(LinearizeError, match=message):
        convert(model, **settings)
    assert not is_linearized(model)
    assert torch.equal(logits(model, TOKENS), expected)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=7, n_positions=8))


def bert():
    return BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1, vocab_size=7))


@pytest.mark.parametrize(("make", "message"), [(gpt2, "'gpt2'"), (bert, "'bert'"), (t5, "'t5' is an encoder-decoder")])
def test_other_families_are_refused(make, message):
    with pytest.raises(LinearizeError, match=rf"{message}.*llama, mistral, mixtral"):
        convert(make())


def test_a_native_window_smaller_than_ours_is_refused():
    convert(tiny("mistral", sliding_window=8), window=8)
    with pytest.raises(LinearizeError, match="layer 0 has a sliding window of 8 tokens of its own, less than window 9"):
        convert(tiny("mistral", sliding_window=8), window=9)


def test_a_native_window_counts_in_the_layers_that_have_one():
    settings = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    convert(tiny("qwen2", **settings), window=9, layers="0")
    with pytest.raises(LinearizeError, match="layer 1 has a sliding window of 8"):
        convert(tiny("qwen2", **settings), window=9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deep_copy_is_a_model_of_its_own(family):
    model = convert(tiny(family), **SETTINGS)
    other = copy.deepcopy(model)
    expected = logits(model, TOKENS)
    assert torch.equal(logits(other, TOKENS), expected)
    change_mixing(other)
    output = ROWS[family].projections[-1]
    attention_of(other, 0).get_submodule(output).weight.data.zero_()
    assert not torch.equal(logits(other, TOKENS), expected)
    assert torch.equal(logits(model, TOKENS), expected)
    revert(other)
    assert torch.equal(logits(model, TOKENS), expected)
    assert not attention_of(other, 0).get_submodule(output).weight.any()


def test_lora_trains_the_mixing():
    model = get_peft_model(
        convert(tiny(), **SETTINGS), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mixing"])
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {".mixing." in name or "lora_" in name for name in trained} == {True}
    mixing = {name: p.detach().clone() for name, p in model.named_parameters() if ".mixing.modules_to_save" in name}
    assert len(mixing) == 3
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    assert all((model.get_parameter(name) != before).all() for name, before in mixing.items())
    assert mixers(model)[0].mixing_weights().tolist() != [pytest.approx(0.4)] * 6


def test_the_mixing_follows_the_model_s_dtype():
    model = convert(tiny().bfloat16(), **SETTINGS)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model, TOKENS).dtype == torch.bfloat16


def test_layers_by_number():
    assert convert(tiny(), layers=1).config.linearize["layers"] == [1]
    for layers in (True, [1.5], [True], None):
        with pytest.raises(LinearizeError, match="is not valid; give 'all' or numbers"):
            convert(tiny(), layers=layers)


def test_a_converted_model_can_be_pickled():
    model = convert(tiny())
    assert_close(logits(pickle.loads(pickle.dumps(model)), ids(1, 9)), logits(model, ids(1, 9)))


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification, type("Mine", (LlamaForCausalLM,), {})])
def test_what_is_no_causal_language_model_of_its_family_is_refused(kind):
    """Its class would be lost."""
    model = kind(tiny().config)
    with pytest.raises(LinearizeError, match=f"a {kind.__name__} is no LlamaForCausalLM"):
        convert(model)
    assert type(model) is kind


def test_numbers_are_kept_as_numbers():
    model = convert(tiny(), window="5", sinks=[2.0, "3"], gate_temperature="1e2")
    assert (
        model.config.linearize["mixer"] | {"window": 5, "sinks": [2, 3], "gate_temperature": 100.0}
        == (model.config.linearize["mixer"])
    )
    model(ids(1, 12))


def test_attention_weights_are_not_to_be_had():
    with pytest.raises(LinearizeError, match="has no attention weights to give"):
        convert(tiny())(ids(1, 5), output_attentions=True)


def test_what_is_no_transformers_model_is_refused():
    for change in (convert, revert):
        with pytest.raises(LinearizeError, match="a Linear is not a transformers model"):
            change(torch.nn.Linear(2, 2))
