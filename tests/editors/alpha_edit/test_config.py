"""Settings out of their range."""

import pytest

from hf_iclr.editors.alpha_edit.config import AlphaEditConfig


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"solver": "rome"}, "solver among alphaedit"),
        ({"nullspace_energy": 0.9, "nullspace_rank": 3}, "exactly one of"),
        ({"nullspace_energy": 1.5}, "nullspace_energy between 0 and 1"),
        ({"l2": -1.0}, "l2 to be at least"),
        ({"clamp_factor": 0.0}, "clamp_factor to be positive"),
        ({"project": False}, "without it: solver='ridge'"),
        ({"context_templates": ["no place"]}, "end in {}"),
        ({"context_templates": ["x {}"]}, "the plain prompt"),
        ({"post_processing": "magic"}, "post_processing among None, rect"),
    ],
)
def test_settings_out_of_range_get_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=f"(?i){sentence}"):
        AlphaEditConfig(**settings)
