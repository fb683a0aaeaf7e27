"""Selection, ranking files and criteria on numbers small enough to check by hand."""

import json

import numpy as np
import pytest

from fmda.data import class_list, templates
from fmda.errors import UserError
from fmda.methods.class_text import template_hash
from fmda.methods.floss import criteria
from fmda.methods.floss.rankings import Ranking, read_ranking
from fmda.methods.floss.selection import Guards, choose_n, order, select
from fmda.methods.floss.tally import Tally

# The first and last entries of three classes in the rankings published with the paper (whole Cityscapes train split).
PUBLISHED = {
    "maskclip": {
        "road": ([66, 9, 54, 2], [1.01207948655, 1.02879377158, 1.04217482397, 1.05538434249]),
        "sidewalk": ([41, 66, 35, 52], [1.20080225725, 1.21004413407, 1.22825709645, 1.23222219213]),
    },
    "clip-dinoiser": {
        "road": ([9, 2, 79, 58], [0.37830835410, 0.41707331501, 0.44018842099, 0.44521819179]),
        "sidewalk": ([41, 35, 66, 49], [0.64671330776, 0.69952878601, 0.70474527240, 0.71899352548]),
    },
}


def _published_file(path, host, dead=()):
    """A file of the published form: known heads, the other templates behind them."""
    classes = {}
    for name, (ids, values) in PUBLISHED[host].items():
        rest = [m for m in range(80) if m not in ids]
        rows = [{"template_id": m, "entropy": v, "pixel_percentage": 20.0} for m, v in zip(ids, values, strict=True)]
        rows += [{"template_id": m, "entropy": 2 + m / 100, "pixel_percentage": 1.0} for m in rest]
        for row in rows:
            if row["template_id"] in dead:  # as published: entropy 0, and so first in the file
                row.update(entropy=0.0, pixel_percentage=0.0)
        rows.sort(key=lambda r: r["entropy"])
        classes[name] = {"entropy_ranking": [{**r, "rank": i} for i, r in enumerate(rows, 1)]}
    content = {"model": host, "dataset": "cityscapes", "split": "train", "classes": classes}
    path.write_text(json.dumps(content))
    return content


@pytest.mark.parametrize("host", sorted(PUBLISHED))
def test_selection_reproduces_the_published_experts(tmp_path, host):
    _published_file(tmp_path / "r.json", host, dead=(70,))
    ranking = read_ranking(tmp_path / "r.json")
    chosen = select(ranking.risks, ranking.share)
    assert chosen == tuple(tuple(ids) for ids, _ in PUBLISHED[host].values())
    assert order(ranking.risks, ranking.share)[-1].tolist() == [70, 70]  # never predicted: last


def test_ties_go_to_the_lower_id_and_the_never_predicted_come_last():
    risks = np.asarray([[0.0], [0.5], [0.5], [0.1]])
    share = np.asarray([[0.0], [1.0], [2.0], [3.0]])
    assert order(risks, share)[:, 0].tolist() == [3, 1, 2, 0]
    assert select(risks, share, 4) == ((3, 1, 2),)
    assert select(risks, np.zeros_like(share), 2) == ((),)


def test_guards_drop_rare_templates_and_shrink_their_risks():
    risks = np.asarray([[0.1, 1.0], [0.5, 1.0], [0.6, 1.0]])
    share = np.asarray([[0.001, 90.0], [10.0, 80.0], [20.0, 80.0]])
    assert select(risks, share, 1) == ((0,), (0,))
    assert select(risks, share, 1, Guards(min_share=0.01))[0] == (1,)
    assert select(risks, share, 1, Guards(shrink=1.0))[0] == (1,)


def test_a_bad_n_is_refused():
    with pytest.raises(UserError, match="n: 5 templates"):
        select(np.ones((4, 1)), np.ones((4, 1)), 5)


def test_n_is_the_smallest_of_the_most_consistent():
    assert choose_n({1: 0.40, 2: 0.62, 4: 0.624, 8: 0.5}) == 2
    assert choose_n({1: 0.40, 2: 0.60, 4: 0.624, 8: 0.5}) == 4


def test_a_written_ranking_is_read_back(tmp_path):
    rng = np.random.default_rng(0)
    names, meta = ("sky", "road"), {"images": 3}
    ranking = Ranking("naclip", "camvid", "train", names, rng.random((80, 2)), rng.random((80, 2)), meta)
    ranking.save(tmp_path / "r.json")
    again = read_ranking(tmp_path / "r.json")
    np.testing.assert_array_equal(again.risks, ranking.risks)
    np.testing.assert_array_equal(again.share, ranking.share)
    assert (again.host, again.split, again.classes, again.meta) == ("naclip", "train", ("sky", "road"), {"images": 3})
    content = json.loads((tmp_path / "r.json").read_text())
    first = content["classes"]["sky"]["entropy_ranking"][0]
    assert first["rank"] == 1 and set(first) == {"template_id", "entropy", "pixel_percentage", "rank"}


def test_rankings_carry_over_by_name_and_synonym():
    voc = class_list("voc20")
    names = tuple(p[0] for p in reversed(voc.naclip))
    risks = np.arange(80 * 20, dtype=float).reshape(80, 20)
    ranking = Ranking("naclip", "voc20", "train", names, risks, np.ones((80, 20)))
    turned = ranking.for_classes(voc)
    assert turned.classes == voc.names
    assert "ship" in names and turned.risks[0, voc.names.index("boat")] == risks[0, names.index("ship")]


def test_a_ranking_of_other_or_reordered_templates_is_refused(tmp_path):
    """A file says which templates its ids mean; published ones mean the 80 of ImageNet."""
    bank = templates("imagenet80")
    reordered = (*bank[1:], bank[0])
    _published_file(tmp_path / "published.json", "maskclip")
    meta = {"templates": template_hash(reordered)}
    Ranking("maskclip", "x", "train", ("road",), np.ones((80, 1)), np.ones((80, 1)), meta).save(tmp_path / "ours.json")
    assert read_ranking(tmp_path / "ours.json", reordered).classes == ("road",)
    for name, wrong in (("published", reordered), ("ours", bank)):
        with pytest.raises(UserError, match=f"{name}.json: ranks other templates, or the same in another order"):
            read_ranking(tmp_path / f"{name}.json", wrong)


def test_ranking_of_other_classes_is_refused():
    ranking = Ranking("maskclip", "x", "train", ("cat", "dog"), np.ones((80, 2)), np.ones((80, 2)))
    with pytest.raises(UserError, match="r.json: ranks other classes"):
        ranking.for_classes(class_list("cityscapes"), "r.json")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c["classes"].clear(), "ranks no class"),
        (lambda c: c.pop("classes"), "'classes' is missing"),
        (lambda c: c["classes"]["road"]["entropy_ranking"].pop(), "class 'road' ranks 79"),
        (lambda c: c["classes"]["road"]["entropy_ranking"][0].update(template_id=9), "class 'road' ranks 79"),
        (lambda c: c["classes"]["road"]["entropy_ranking"][0].pop("entropy"), "'entropy' is missing"),
        (lambda c: c["classes"]["road"]["entropy_ranking"][0].update(pixel_percentage=120), "out of range"),
    ],
)
def test_broken_ranking_files_are_refused(tmp_path, spoil, message):
    content = _published_file(tmp_path / "r.json", "maskclip")
    spoil(content)
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        read_ranking(tmp_path / "r.json")
    assert "\n" not in str(caught.value) and "r.json" in str(caught.value)


def test_missing_file_no_json_and_duplicate_class(tmp_path):
    with pytest.raises(UserError, match="no such ranking file"):
        read_ranking(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_ranking(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"classes": {"road": 1, "road": 2}}')
    with pytest.raises(UserError, match="'road' occurs twice"):
        read_ranking(tmp_path / "b.json")


def _tally():
    tally = Tally.empty(3, 2)._replace(images=1, pixels=10, ordinary=np.asarray([5, 5]), truth=np.asarray([4, 6]))
    tally.sums["count"][:] = [[4, 6], [10, 0], [5, 5]]
    tally.sums["entropy"][:] = [[2, 6], [1, 0], [5, 1]]
    tally.sums["confidence"][:] = [[3, 3], [9, 0], [3, 4]]
    tally.sums["margin"][:] = [[2, 1], [8, 0], [1, 3]]
    tally.sums["smooth"][:] = [[4, 5], [10, 0], [4, 4]]
    tally.sums["consensus"][:] = [[4, 5], [5, 0], [4, 4]]
    tally.sums["hits"][:] = [[4, 6], [4, 0], [2, 3]]
    tally.sums["labelled"][:] = [[4, 6], [10, 0], [5, 5]]
    return tally


def test_shares_of_a_template_sum_to_one_hundred():
    np.testing.assert_allclose(_tally().share.sum(1), 100)


def test_criteria_by_hand():
    tally = _tally()
    np.testing.assert_allclose(criteria.CRITERIA["entropy"](tally), [[0.5, 1.0], [0.1, 0.0], [1.0, 0.2]])
    np.testing.assert_allclose(criteria.CRITERIA["confidence"](tally)[0], [0.25, 0.5])
    np.testing.assert_allclose(criteria.CRITERIA["margin"](tally)[0], [0.5, 5 / 6])
    np.testing.assert_allclose(criteria.CRITERIA["smoothness"](tally)[2], [0.2, 0.2])
    np.testing.assert_allclose(criteria.consensus(tally)[:, 0], [1 - 4 / 5, 1 - 5 / 10, 1 - 4 / 6])
    np.testing.assert_allclose(criteria.true_iou(tally), [[1, 1], [0.4, 0], [2 / 7, 3 / 8]])
    assert criteria.entropy_consensus(tally)[0, 0] == 0.5  # second by entropy, first by consensus
    # the never-predicted class of template 1 takes that template's mean
    assert criteria.CRITERIA["shrunk-entropy"](tally)[1, 1] == pytest.approx(0.1)


def test_flip_needs_mirrored_images():
    tally = _tally()
    with pytest.raises(UserError, match=r"ranking\.flip=true"):
        criteria.flip(tally)
    tally.mirrored[:] = [[5, 5], [10, 0], [4, 6]]
    tally.sums["flip"][:] = [[4, 5], [10, 0], [4, 5]]
    np.testing.assert_allclose(criteria.flip(tally)[0], [1 - 4 / 5, 1 - 5 / 6])


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(1)
    risks, iou = np.round(rng.random((80, 3)), 1), rng.random((80, 3))
    found = criteria.rank_correlation(risks, iou, np.ones((80, 3)))
    expected = [spearmanr(-risks[:, k], iou[:, k]).statistic for k in range(3)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.isnan(criteria.rank_correlation(risks[:2], iou[:2], np.ones((2, 3)))).all()


def test_comparison_puts_the_best_criterion_first():
    rows = criteria.comparison(_tally(), 1)
    values = [row["correlation"] for row in rows if row["correlation"] == row["correlation"]]
    assert values == sorted(values, reverse=True) and len(rows) == len(criteria.CRITERIA) - 1
    assert rows[0]["best_iou"] == pytest.approx(100.0)


def test_a_saved_tally_is_the_same(tmp_path):
    tally = _tally()
    tally.save(tmp_path / "t.npz")
    again = Tally.load(tmp_path / "t.npz")
    for name, sums in tally.sums.items():
        np.testing.assert_array_equal(again.sums[name], sums)
    assert (again.images, again.pixels) == (1, 10)
    (tmp_path / "t.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="damaged"):
        Tally.load(tmp_path / "t.npz")
