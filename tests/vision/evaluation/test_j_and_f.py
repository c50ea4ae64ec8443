"""J&F: equal to the official code's numbers, exact at the edges of frames, and an `evaluate` module."""

import json
import math

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from hf_iclr import load_metric
from hf_iclr.vision.evaluation.j_and_f import contour_accuracy, j_and_f, region_similarity
from tests.vision.video_data import VIDEO_DATA, needs_video_data


def blob(seed: int, shape=(3, 40, 60)) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=shape)
    return ndimage.gaussian_filter(noise, (0, 4, 4)) > 0.03


def contour_by_the_book(mask: np.ndarray) -> np.ndarray:
    """The official definition, written out pixel by pixel."""
    height, width = mask.shape
    contour = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            after = [(y, x + 1)] if y == height - 1 else [(y + 1, x)] if x == width - 1 else []
            after = after or [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            contour[y, x] = (y, x) != (height - 1, width - 1) and any(mask[place] != mask[y, x] for place in after)
    return contour


def f_by_the_book(one: np.ndarray, other: np.ndarray, radius: int) -> float:
    """Contours dilated by a disc, as the official code does."""
    disc = np.hypot(*np.mgrid[-radius : radius + 1, -radius : radius + 1]) <= radius
    edges = [contour_by_the_book(mask) for mask in (one, other)]
    if not edges[0].any() or not edges[1].any():
        return float(edges[0].any() == edges[1].any())
    near = [ndimage.binary_dilation(edge, disc) for edge in edges]
    precision, recall = (edges[0] & near[1]).sum() / edges[0].sum(), (edges[1] & near[0]).sum() / edges[1].sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@needs_video_data
@pytest.mark.parametrize("sequence", ["car-shadow", "drift-straight"])
def test_equal_to_the_official_numbers(sequence):
    davis = VIDEO_DATA / "davis"
    official = json.loads((davis / "osvos_reference_jf.json").read_text())[sequence]
    folders = davis / "osvos" / sequence, davis / "Annotations" / "480p" / sequence
    masks = [np.stack([np.asarray(Image.open(file)) > 0 for file in sorted(folder.iterdir())]) for folder in folders]
    scores = j_and_f([masks[0]], [masks[1]], skip_first_and_last=True, per_frame=True)
    assert np.abs(np.subtract(scores["j_per_frame"][0], official["J"])).max() == 0.0
    assert np.abs(np.subtract(scores["f_per_frame"][0], official["F"])).max() == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_f_is_that_of_dilated_contours(seed):
    one, other = blob(seed), blob(seed + 100)
    other[0] = np.roll(one[0], 2, axis=1)
    expected = [f_by_the_book(a, b, math.ceil(0.008 * math.hypot(40, 60))) for a, b in zip(one, other, strict=True)]
    assert contour_accuracy(one, other).tolist() == expected
    expected = [f_by_the_book(a, b, 3) for a, b in zip(one, other, strict=True)]
    assert contour_accuracy(one, other, tolerance=3).tolist() == expected


@pytest.mark.parametrize("place", [np.s_[:5, :5], np.s_[35:, 50:], np.s_[:, :], np.s_[39:, :], np.s_[7:8, 9:10]])
def test_masks_at_the_edge_of_the_frame(place):
    one, other = np.zeros((2, 1, 40, 60), bool)
    one[0][place] = True
    other[0, 3:38, 2:59] = True
    for pair in ((one, other), (other, one), (one, one)):
        assert contour_accuracy(*pair, tolerance=2).tolist() == [f_by_the_book(pair[0][0], pair[1][0], 2)]


def test_empty_masks():
    mask = blob(0)
    empty = np.zeros_like(mask)
    for measure in (region_similarity, contour_accuracy):
        assert measure(empty, empty).tolist() == [1.0] * 3
        assert measure(empty, mask).tolist() == measure(mask, empty).tolist() == [0.0] * 3
        assert measure(mask, mask).tolist() == [1.0] * 3


def test_recall_decay_and_means_over_objects():
    reference = np.ones((300, 2, 2), bool)
    fading = reference.copy()
    fading[200:, 0] = False
    fading[250:, :] = False
    scores = j_and_f([fading, reference], [reference, reference], per_frame=True)
    assert scores["j_per_frame"] == [[1.0] * 200 + [0.5] * 50 + [0.0] * 50, [1.0] * 300]
    assert scores["j"] == (225 / 300 + 1) / 2
    assert scores["j_recall"] == (200 / 300 + 1) / 2  # half is not enough
    assert scores["j_decay"] == pytest.approx((1 - (26 / 2) / 76) / 2)  # frames 224..299, 26 of them half right
    assert scores["j_and_f"] == (scores["j"] + scores["f"]) / 2


def test_the_first_and_last_frame_may_be_skipped():
    reference = blob(0)
    prediction = reference.copy()
    prediction[[0, 2]] = False
    assert j_and_f([prediction], [reference])["j"] == 1 / 3
    assert j_and_f([prediction], [reference], skip_first_and_last=True)["j"] == 1.0
    with pytest.raises(ValueError, match="got masks of 2 frames"):
        j_and_f([prediction[:2]], [reference[:2]], skip_first_and_last=True)


def test_as_an_evaluate_module():
    """Videos of two sizes at once or one by one."""
    videos = [blob(0), blob(1, (5, 20, 30))]
    references = [blob(2), blob(3, (5, 20, 30))]
    expected = j_and_f(videos, references, per_frame=True)
    metric = load_metric("j_and_f")
    assert metric.compute(predictions=videos, references=references, per_frame=True) == expected
    for prediction, reference in zip(videos, references, strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute(skip_first_and_last=True) == j_and_f(videos, references, skip_first_and_last=True)
    assert "J&F" in metric.description


@pytest.mark.parametrize(
    ("predictions", "references", "words"),
    [
        ([], [], "an array of masks an object"),
        (None, [blob(0)], "got NoneType and list"),
        ([blob(0)], [blob(0), blob(1)], "got 1 and 2"),
        ([blob(0)[0]], [blob(0)[0]], r"got bool of shape \(40, 60\) at 0"),
        ([blob(0).astype(int)], [blob(0)], "got int64"),
        ([blob(0)[:2]], [blob(0)], r"\(2, 40, 60\) and \(3, 40, 60\) at 0"),
    ],
)
def test_bad_input_gets_a_sentence(predictions, references, words):
    for measure in (j_and_f, lambda p, r: load_metric("j_and_f").compute(predictions=p, references=r)):
        with pytest.raises(ValueError, match=words):
            measure(predictions, references)
