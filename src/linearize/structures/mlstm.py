"""mLSTM and Gated Retention: one decay for each head, `σ(mean of k)` (Liger, table 1)."""

import torch.nn.functional as F
from torch import Tensor

from linearize.ops.gated_linear import gated_linear
from linearize.structures.base import Inputs, Layer, Structure


def inputs(q: Tensor, k: Tensor, v: Tensor, layer: Layer) -> Inputs:
    """Pooling is the mean over the head size."""
    log_g = F.logsigmoid(k.float().mean(-1, keepdim=True)) / layer.config.gate_temperature
    return Inputs(layer.feature_map(q), layer.feature_map(k), v, log_g)


MLSTM = Structure(inputs, gated_linear)
