"""The copy score against its definition."""

import numpy as np

from fmda.evaluate.copies import copy_scores


def test_scores_are_means_of_best_matches_with_the_most_similar_crop():
    rng = np.random.default_rng(0)
    images, crops = rng.normal(size=(3, 6, 5)).astype(np.float32), rng.normal(size=(4, 7, 5)).astype(np.float32)
    images[1] = crops[2, ::-1][:6]  # the patches of a crop, in other places
    scores, nearest = copy_scores(images, crops)
    images, crops = images - crops.mean((0, 1)), crops - crops.mean((0, 1))
    for image, score, index in zip(images, scores, nearest, strict=True):
        cosines = [
            np.mean([max(p @ q / np.linalg.norm(p) / np.linalg.norm(q) for q in crop) for p in image]) for crop in crops
        ]
        assert index == np.argmax(cosines) and abs(score - max(cosines)) < 1e-5
    assert nearest[1] == 2 and abs(scores[1] - 1) < 1e-5
