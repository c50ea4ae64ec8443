"""What rows have in common, as position embeddings, is scored where it meets them, and the model gets what it made."""

import pytest
import torch
from torch import nn

from tests.trainers.data_shapley.gradients.test_taps import check


class Model(nn.Module):
    """Rows of shape `(batch, 5, 4)`, to which `meet` adds what `common` gives for all of them."""

    def __init__(self, meet):
        super().__init__()
        self.meet, self.shapes = meet, []
        self.first, self.second = nn.Embedding(5, 4), nn.Embedding(5, 4)
        self.project, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        common = self.first(torch.arange(5)[None])
        self.shapes.append(tuple(common.shape))
        return self.out(self.meet(self, x, common).tanh()).square().mean(-1)


def in_place(model, x, common):
    x = x.clone()
    x += common
    return x


def columns_and_rows(model, x, common):
    """As DETR's learned positions."""
    rows = model.second(torch.arange(5)[None]).transpose(0, 1)
    both = torch.cat([common.expand(5, -1, -1), rows.expand(-1, 5, -1)], -1)
    positions = both.permute(2, 0, 1).unsqueeze(0).repeat(len(x), 1, 1, 1)
    return x + positions.mean(2).transpose(1, 2)[..., 2:6]


MEETINGS = {
    "added": lambda model, x, common: x + common,
    "repeated": lambda model, x, common: torch.cat([x, common.repeat(len(x), 1, 1)], 1),
    "expanded": lambda model, x, common: x * common.expand(len(x), -1, -1),
    "without the first dimension": lambda model, x, common: x + common[0],
    "as a tuple": lambda model, x, common: x + torch.cat(common.split(2, dim=1)[::-1], dim=1),
    "in place": in_place,
    "projected": lambda model, x, common: x + model.project(common).tanh() * common,
    "with another": lambda model, x, common: x + (common + model.second(torch.arange(5)[None])).tanh(),
    "in attention": lambda model, x, common: nn.functional.scaled_dot_product_attention(x, x, x, common @ common.mT),
    "columns and rows": columns_and_rows,
}  # fmt: skip


@pytest.mark.parametrize("name", MEETINGS)
@pytest.mark.parametrize("rows", [3, 5])
def test_scores_are_those_of_each_row_alone_however_it_is_met(name, rows):
    torch.manual_seed(0)
    model = Model(MEETINGS[name])
    model.second.requires_grad_(name in ("with another", "columns and rows"))
    model.project.requires_grad_(name == "projected")
    batch = {"x": torch.randn(rows, 5, 4)}
    check(model, batch, lambda model, batch: model(**batch).sum() / rows)
    assert set(model.shapes) == {(1, 5, 4)}
