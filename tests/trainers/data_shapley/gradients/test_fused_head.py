"""Scores of TRL's fused output layer, of its log-probabilities and entropy, are those of each row alone."""

import pytest
import torch
from torch import nn
from trl.trainer.utils import _ChunkedLogProbFunction as Fused

from hf_iclr.trainers.data_shapley.gradients import fused_head
from hf_iclr.trainers.data_shapley.gradients.direction import sketch
from hf_iclr.trainers.data_shapley.gradients.fused_head import tap_fused_head
from hf_iclr.trainers.data_shapley.gradients.rows import find_layout
from tests.trainers.data_shapley.gradients.test_taps import row_by_row, scored, token_batch


class Head(nn.Module):
    """A loss of log-probabilities and entropies, as TRL computes them; of labelled positions, as on a GPU, or all."""

    def __init__(self, softcap, scale, bias, compact):
        super().__init__()
        self.softcap, self.scale, self.compact = softcap, scale, compact
        self.embed, self.lm_head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=bias)

    def forward(self, input_ids, labels, attention_mask=None):
        hidden, labels = self.embed(input_ids).tanh()[:, :-1], labels[:, 1:]
        mask = labels != -100
        some, targets = (
            (hidden[mask], labels[mask]) if self.compact else (hidden.reshape(-1, 8), labels.clamp(min=0).reshape(-1))
        )
        outputs = Fused.apply(
            some, self.lm_head.weight, self.lm_head.bias, targets, 0.7, 16, self.softcap, self.scale, ("entropy",)
        )
        log_probs, entropy = (
            found.new_zeros(mask.shape).masked_scatter(mask, found)
            if self.compact
            else found.view(mask.shape).masked_fill(~mask, 0)
            for found in outputs[:2]
        )
        return {"loss": (0.3 * entropy - log_probs).sum(), "log_probs": log_probs, "label_mask": mask}


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(("softcap", "scale", "bias"), [(None, 1.0, False), (3.0, 1.5, True)])
def test_scores_are_those_of_each_row_alone(softcap, scale, bias, compact, monkeypatch):
    monkeypatch.setattr(fused_head, "_LOGITS_AT_ONCE", 1000)  # several tiles
    torch.manual_seed(0)
    model, batch = Head(softcap, scale, bias, compact).train(), token_batch()

    def loss_of(model, batch):
        output = model(**batch)
        if taps:
            tap_fused_head(taps[0], output)
        return output["loss"]

    taps = []
    start = fused_head.Taps.start
    monkeypatch.setattr(fused_head.Taps, "start", lambda self, *args: (taps.append(self), start(self, *args)))
    found, parameters, directions = scored(model, batch, 6, loss_of, with_tokens=True)
    taps.clear()
    expected = row_by_row(model, batch, 6, parameters, directions, loss_of)
    assert found.scores.double().sum(0)[:, 0].tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert found.tokens[..., 0].sum(1).tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert {found.modules[index].name for index in found.fired} == {"embed", "lm_head"}


def test_a_sketch_of_full_rank_scores_as_the_whole():
    torch.manual_seed(0)
    model, batch = Head(None, 1.0, False, False).train(), token_batch()
    rows = []
    for low in (False, True):
        taps = fused_head.Taps(model)
        whole = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
        u = sketch(whole, 8, torch.Generator().manual_seed(0)) if low else whole
        taps.modules = [tapped for tapped in taps.modules if tapped.name == "lm_head"]
        taps.modules[0].directions, taps.modules[0].index = [{"weight": u}], 0
        taps.start(find_layout(batch, 6), 1)
        taps.on = True
        output = model(**batch)
        tap_fused_head(taps, output)
        output["loss"].backward()
        rows.append(taps.scores[0, :, 0].tolist())
    assert rows[0] == pytest.approx(rows[1], rel=1e-3) and max(map(abs, rows[0])) > 0.1
