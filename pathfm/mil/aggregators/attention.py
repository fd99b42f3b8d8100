"""Attention pooling (Ilse, Tomczak and Welling 2018, arXiv 1802.04712): one map per slide, or one per output.

Legend: N tiles of all bags together, B bags, H width, O outputs, M heads.
"""

from __future__ import annotations

from torch import nn

from pathfm.mil.aggregators.contract import Aggregator, Packed, Pooled
from pathfm.mil.aggregators.segments import Scores, attend, attention_logit


class Abmil(Aggregator):
    """Gated attention; the attended mean goes to one linear layer.

    With several heads each has its own map and mean, and the layer sees the means side by side. The attention that is given out
    is the mean of the maps, so that there is one per slide whatever the number of heads.
    """

    gated = True
    half_precision = True

    def __init__(self, width: int, outputs: int, attention: int = 64, heads: int = 1) -> None:
        super().__init__()
        self.scores = Scores(width, attention, heads, self.gated)
        self.head = nn.Linear(heads * width, outputs)

    def forward(self, packed: Packed) -> Pooled:
        """See ``Aggregator``."""
        logit_NM = self.scores(packed.tile_NH)
        vector_BMH, attention_NM = attend(logit_NM, packed.tile_NH, packed.lengths)
        slide_BH = vector_BMH.flatten(1)
        attention_N1 = attention_NM.mean(dim=1, keepdim=True)
        logit_N1 = logit_NM if logit_NM.shape[1] == 1 else attention_logit(attention_N1)
        return Pooled(self.head(slide_BH), slide_BH, attention_N1, logit_N1)


class AbmilPlain(Abmil):
    """The same without the gate."""

    gated = False


class ClassQueries(Aggregator):
    """One gated attention map per output: each output is a linear function of the mean under its own map alone."""

    half_precision = True

    def __init__(self, width: int, outputs: int, attention: int = 64) -> None:
        super().__init__()
        self.scores = Scores(width, attention, outputs)
        self.head = nn.Linear(width, outputs)

    def forward(self, packed: Packed) -> Pooled:
        """See ``Aggregator``."""
        logit_NO = self.scores(packed.tile_NH)
        vector_BOH, attention_NO = attend(logit_NO, packed.tile_NH, packed.lengths)
        output_BO = (vector_BOH * self.head.weight).sum(dim=2) + self.head.bias
        return Pooled(output_BO, vector_BOH.flatten(1), attention_NO, logit_NO)
