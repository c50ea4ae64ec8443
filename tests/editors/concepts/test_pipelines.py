"""What a denoiser reads of text, and which of its directions are preserved."""

import torch
from diffusers import SD3Transformer2DModel

from hf_iclr.editors.concepts.pipelines import find_text_layers, preserved_directions
from hf_iclr.tour.demo.pipeline import WIDTH, build_demo_pipeline


def test_preserved_directions_by_hand():
    """
    Retained states 3 e1, 3 e1, e2 have the mean square 6 e1 e1^T + 1/3 e2 e2^T; the fixed state is e2 + e3. By the
    threshold 1 or rank 1 e1 is retained, and (e2 + e3) / √2 added; with all the energy e1, e2, e3.
    """
    e = torch.eye(4, dtype=torch.float64)
    retained, fixed = torch.stack([3 * e[0], 3 * e[0], e[1]], 1), (e[1] + e[2])[:, None]
    expected = torch.stack([e[0], (e[1] + e[2]) / 2**0.5], 1)
    for rule in ({"threshold": 1.0}, {"rank": 1}, {"energy": 0.9}):
        found = preserved_directions(retained, fixed, **rule)
        assert torch.allclose(found @ found.T, expected @ expected.T)
    whole = preserved_directions(retained, fixed, energy=1.0)
    assert torch.allclose(whole @ whole.T, torch.diag(torch.tensor([1.0, 1, 1, 0], dtype=torch.float64)))
    assert preserved_directions(retained, fixed, rank=0).shape == (4, 1)


def test_layers_of_other_transformers_are_found_by_class_or_by_name():
    sd3 = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=24, out_channels=4,
    )  # fmt: skip
    found = find_text_layers(sd3)
    assert list(found["states"]) == ["context_embedder"]
    assert [layer.in_features for layer in found["pooled"].values()] == [24]
    unet = build_demo_pipeline().unet
    assert len(find_text_layers(unet)["states"]) == 8
    only_values = find_text_layers(unet, r".*attn2\.to_v")
    assert len(only_values["states"]) == 4 and "pooled" not in only_values
    assert all(layer.in_features == WIDTH for layer in only_values["states"].values())
