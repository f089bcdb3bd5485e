"""Decoder layers of the plain families in a decoding step: a few kernels, in place."""

import sys
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from linearize.families import base_model_type, family_of, separate
from linearize.growing import Growing
from linearize.mixer import LinearizedAttention, Moment
from linearize.ops.liger import Rope
from linearize.ops.products import Norm, add_product, normed, normed_product, normed_swiglu, product

PLAIN = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # x + attention(norm(x)), then x + mlp(norm(x)), no more
ROWS = 16  # a product's outputs are made a multiple of it: each row of them is then aligned


def original_of(attention: Any) -> Any:
    """The model's own attention module, converted or not."""
    return attention.original if isinstance(attention, LinearizedAttention) else attention


def is_plain(stack: Any) -> bool:
    """Whether `PlainLayer` can stand for every layer."""
    if base_model_type(stack.config.model_type) not in PLAIN:
        return False
    if stack.config.hidden_act != "silu":
        return False
    own = sys.modules[type(stack).__module__]
    parts = [stack.norm, *stack.layers]
    parts += [part for layer in stack.layers for name, part in layer.named_children() if name != "self_attn"]
    if any(vars(own).get(type(part).__name__) is not type(part) or "forward" in vars(part) for part in parts):
        return False
    linears = [
        linear
        for layer in stack.layers
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj, *_projections(layer.self_attn))
    ]
    return all(type(linear) is nn.Linear for linear in linears)  # not a quantised one


def _projections(attention: Any) -> list[nn.Linear]:
    return [getattr(attention, name) for name in family_of(original_of(attention).config).projections]


class PlainLayer:
    """A decoder layer in place: norms, residuals and SwiGLU are done by the matrix products (`ops.products`), and
    products of one input are one."""

    def __init__(self, layer: Any, moment: Moment | None, growing: Growing | None) -> None:
        """Of a converted layer with its `moment`, or of one that stays softmax attention, `growing`."""
        self.attention: Any = layer.self_attn
        self.mixer, self.growing = (self.attention if moment is not None else None), growing
        self.split = family_of(original_of(self.attention).config).project
        *projections, output = _projections(self.attention)
        self.norm, self.mlp_norm = norm_of(layer.input_layernorm), norm_of(layer.post_attention_layernorm)
        self.together = self.split is separate
        if self.together:
            others = moment.inputs if moment is not None else []
            self.qkv = joined(projections, others)
            self.width = sum(linear.out_features for linear in projections)
            self.inputs = sum(len(weight) for weight in others)
        self.unseen = self.together and (moment is None or self.attention.is_whole(moment.settings))
        self.gate_up, self.size = joined([layer.mlp.gate_proj, layer.mlp.up_proj]), layer.mlp.up_proj.out_features
        self.output, self.down = (output.weight, output.bias), (layer.mlp.down_proj.weight, layer.mlp.down_proj.bias)

    def __call__(self, hidden: Tensor, rope: Rope, time: Tensor, seen: Tensor, moment: Moment | None) -> None:
        """hidden `[B, hidden]` becomes what the layer makes of it; `time` and `seen` as `Growing.attend` has them."""
        x, heads, made = self.project(hidden)
        if moment is None:
            assert self.growing is not None
            read = self.growing.attend(heads, rope, time, seen)
        else:
            here = moment._replace(growing=self.growing, seen=seen)
            read = self.attention.step(x[:, None], heads, rope, here, made)
        add_product(hidden, read.flatten(1), self.output)
        add_product(hidden, normed_swiglu(hidden, self.mlp_norm, self.gate_up, self.size), self.down)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The mixer's input `[B, hidden]`, or anything like it where the mixer does not look at it; q, k and v of it
        `[B, H + 2 KV, D]`; and its products with the moment's `inputs`, where they are made together."""
        if not self.together:
            x = normed(hidden, self.norm)
            return x, torch.cat(self.split(self.attention, x[:, None]), dim=2)[:, 0], None
        x = hidden if self.unseen else normed(hidden, self.norm)
        products = normed_product(hidden, self.norm, self.qkv) if self.unseen else product(x, self.qkv)
        heads, made, _ = products.tensor_split([self.width, self.width + self.inputs], dim=1)
        return x, heads.unflatten(1, (-1, self.attention.head_dim)), made


def norm_of(module: Any) -> Norm:
    """A model's own norm, for `ops.products`."""
    return Norm(module.weight, module.variance_epsilon)


@torch.no_grad()
def joined(linears: list[nn.Linear], others: list[nn.Parameter] | None = None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one linear layer that is all of these, and below them `others`, weights without a bias; their
    parameters become parts of it, so that nothing is kept twice. Zeros make its size fit for fast products."""
    weights = [*(linear.weight for linear in linears), *(others or [])]
    rows = sum(len(x) for x in weights)
    weight = _one(weights, -rows % ROWS)
    biases = [linear.bias for linear in linears]
    return weight, None if biases[0] is None else _one(biases, len(weight) - sum(len(x) for x in biases))


def _one(parameters: Sequence[Tensor], zeros: int) -> Tensor:
    """One tensor of parameters, which become parts of it, and of so many rows of zeros; where they are parts of such a
    one already, which another decoder made, that one."""
    like, rows = parameters[0].data, sum(map(len, parameters)) + zeros
    storage = like.untyped_storage()
    places = accumulate((x.nbytes for x in parameters), initial=storage.data_ptr())
    if (
        storage.nbytes() == rows * like[:1].nbytes
        and all(x.data_ptr() == place for x, place in zip(parameters, places, strict=False))
        and all(x.is_contiguous() for x in parameters)
    ):
        return like.as_strided((rows, *like.shape[1:]), like.stride())
    whole = torch.cat([*(x.data for x in parameters), like.new_zeros(zeros, *like.shape[1:])])
    for x, part in zip(parameters, whole.split([*(len(x) for x in parameters), zeros]), strict=False):
        x.data = part
    return whole
