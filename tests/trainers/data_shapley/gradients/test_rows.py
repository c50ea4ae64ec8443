"""How many tokens of each row count: those with a label, whatever their width; else those that are no padding."""

import pytest
import torch

from hf_iclr.trainers.data_shapley.gradients.rows import find_layout


IDS = torch.tensor([[3, 4, 5, 6, 0], [3, 4, 0, 0, 0]])


@pytest.mark.parametrize("width", [3, 5, 7])
def test_labels_of_an_encoder_decoder_count_whatever_the_width_of_sources(width):
    labels = torch.full((2, width), -100)
    labels[0, :3], labels[1, :1] = 7, 7
    for inputs in ({"input_ids": IDS}, {"input_features": torch.randn(2, 4, 9)}):
        assert find_layout({**inputs, "labels": labels}, 2).tokens.tolist() == [3, 1]
    assert find_layout({"input_ids": IDS.repeat(2, 1), "labels": labels.repeat(2, 1)}, 2).tokens.tolist() == [6, 2]


def test_without_labels_of_tokens_those_that_are_no_padding_count():
    mask = (IDS != 0).long()
    for labels in (torch.tensor([1, 0]), torch.tensor([[1.0, 0.0, 1.0]] * 2), None):
        inputs = {"input_ids": IDS, "attention_mask": mask, **({} if labels is None else {"labels": labels})}
        assert find_layout(inputs, 2).tokens.tolist() == [4, 2]
    assert find_layout({"pixel_values": torch.randn(2, 3, 4, 4)}, 2).tokens.tolist() == [1, 1]
