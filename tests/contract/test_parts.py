"""What `hf-iclr doctor` runs: each part does here what it was written to do. `make matrix` runs this under every
release that we support."""

import pkgutil

import pytest

from hf_iclr.doctor import self_check


@pytest.mark.parametrize("part", self_check.PARTS)
def test_part_works(part):
    pkgutil.resolve_name(self_check.PARTS[part])()


def test_a_wrong_result_is_a_sentence():
    self_check.expect(True, "nothing")
    with pytest.raises(self_check.WrongResultError, match=r"^Expected 2, got 3\.$"):
        self_check.expect(False, "2, got 3")
