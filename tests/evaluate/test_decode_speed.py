"""What decoding costs is measured on the model as it will be used: with its adapters merged."""

import tiny
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from linearize import convert
from linearize.checkpoint import as_merged, unwrapped
from linearize.decoding import why_not
from linearize.evaluate.decoding import decode_speed
from linearize.recipe import LoraSettings
from linearize.train.trainer import with_lora


def test_speed_is_that_of_the_merged_model():
    student = with_lora(convert(tiny.tiny(), window=4, mixing="data_dependent"), LoraSettings(r=2)).eval()
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model, ids = unwrapped(student), torch.randint(0, 50, (1, 12))
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        with as_merged(model):
            assert why_not(model) is None, "there is a decoder for it"
            assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
            assert not torch.equal(model(ids, use_cache=False).logits, before), "its values are not the merged ones"
            speed, size = decode_speed(model, (8, 16), 3)
        assert "LoRA" in str(why_not(model))
        assert torch.equal(model(ids, use_cache=False).logits, before)
    assert min(speed.values()) > 0
    assert size[8] == size[16]


def test_bytes_are_those_of_the_context():
    """Also where steps after one context go beyond the next."""
    model = tiny.tiny()
    _, size = decode_speed(model, (16, 20), 16)
    assert size == {16: decode_speed(model, (16,), 1)[1][16], 20: decode_speed(model, (20,), 1)[1][20]}
