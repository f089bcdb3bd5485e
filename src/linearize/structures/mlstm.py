"""mLSTM and Gated Retention: one decay for each head, `σ(P)`, P the mean of the key (Liger, table 1)."""

from linearize.ops.gated_linear import gated_linear
from linearize.structures.base import Structure, per_head
from linearize.structures.gla import inputs

MLSTM = Structure(inputs, gated_linear, per_head)
