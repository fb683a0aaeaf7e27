import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmda.errors import UserError
from fmda.evaluate.quality import alignment, pairwise_diversity, standard_error
from fmda.evaluate.stopping import choose_step

STEPS = (0, 100, 200, 400, 800, 1600)
OVERFIT = (0.50, 0.42, 0.34, 0.30, 0.28, 0.26)
COLLAPSE = (0.60, 0.58, 0.54, 0.40, 0.20, 0.05)


def test_overfit_stops_where_gain_no_longer_pays():
    choice = choose_step(STEPS, OVERFIT, COLLAPSE)
    # gains 0 .08 .16 .20 .22 .24 times kept 1 .967 .9 .667 .333 .083
    np.testing.assert_allclose(choice.score, [0, 0.0773, 0.144, 0.1333, 0.0733, 0.02], atol=1e-4)
    assert choice.step == 200
    assert choice.reason == "step 200: 32 % nearer to the target, 90 % of the diversity kept"


def test_gain_without_loss_runs_to_the_end_and_says_so():
    choice = choose_step(STEPS, (0.5, 0.45, 0.4, 0.35, 0.3, 0.25), (0.6,) * 6)
    assert choice.step == 1600
    assert "a longer run may do better" in choice.reason


def test_a_plateau_is_left_at_its_beginning():
    choice = choose_step(STEPS, (0.5, 0.4, 0.31, 0.305, 0.303, 0.302), (0.6,) * 6)
    assert choice.step == 200
    assert "step 1600 is better by no more than" in choice.reason


@pytest.mark.parametrize(
    "far", [(0.5,) * 6, (0.5, 0.51, 0.52, 0.53, 0.54, 0.55), (0.5, 0.499, 0.498, 0.497, 0.496, 0.495)]
)
def test_no_gain_is_step_0(far):
    choice = choose_step(STEPS, far, COLLAPSE)
    assert choice.step == 0
    assert choice.reason.startswith("step 0: no gain")


def test_a_gain_within_its_error_is_step_0_and_a_clear_one_is_not():
    far, wide = (0.50, 0.47, 0.46, 0.47, 0.48, 0.46), (0.6,) * 6
    assert choose_step(STEPS, far, wide, alignment_error=(0.04,) * 6, diversity_error=(0.01,) * 6).step == 0
    assert choose_step(STEPS, far, wide, alignment_error=(0.002,) * 6, diversity_error=(0.01,) * 6).step == 200


def test_errors_move_the_choice_forward_never_back():
    plain = choose_step(STEPS, OVERFIT, COLLAPSE)
    for error in (0.001, 0.01, 0.05):
        choice = choose_step(STEPS, OVERFIT, COLLAPSE, alignment_error=(error,) * 6, diversity_error=(error,) * 6)
        assert choice.step <= plain.step


def test_steps_that_lose_classes_are_not_admitted():
    choice = choose_step(STEPS, OVERFIT, COLLAPSE, (0.9, 0.9, 0.7, 0.5, 0.3, 0.1))
    assert choice.step == 100
    assert choice.admitted.tolist() == [True, True, False, False, False, False]
    assert choice.reason.endswith("too few classes at step 200, 400, 800, 1600")
    assert choose_step(STEPS, OVERFIT, COLLAPSE, (0.9, 0, 0, 0, 0, 0)).step == 0
    # 0.7 of 0.9 is 0.02 too few
    for error, admitted in ((0.01, False), (0.02, True)):
        choice = choose_step(STEPS, OVERFIT, COLLAPSE, (0.9, 0.9, 0.7, 0.5, 0.3, 0.1), coverage_error=(error,) * 6)
        assert choice.admitted.tolist() == [True, True, admitted, False, False, False]
    assert choose_step(STEPS, OVERFIT, COLLAPSE, (0.9, 0.9, 0.7, 0.5, 0.3, 0.1), coverage_floor=0.5).step == 200


def test_repeating_the_target_is_no_diversity_left():
    # crops of one image differ by 0.15: the last steps repeat it, and do so ever better
    far, wide = (0.50, 0.38, 0.30, 0.22, 0.14, 0.10), (0.30, 0.27, 0.24, 0.20, 0.17, 0.15)
    assert choose_step(STEPS, far, wide).step == 800
    choice = choose_step(STEPS, far, wide, repeated=0.15)
    assert choice.step == 200
    assert choice.kept[-1] == pytest.approx(0)


def test_a_busy_target_forbids_nothing():
    assert choose_step(STEPS, OVERFIT, COLLAPSE, repeated=0.59).step == 200
    assert choose_step(STEPS, OVERFIT, COLLAPSE, repeated=9.0).kept[2] == pytest.approx(0.8)


def test_broken_images_are_not_rewarded_for_being_diverse():
    far, wide = (0.5, 0.4, 0.38, 0.45, 0.49, 0.49), (0.5, 0.5, 0.5, 0.8, 1.5, 1.9)
    choice = choose_step(STEPS, far, wide)
    assert choice.step == 200
    assert choice.kept.max() == 1


def test_a_kink_of_noise_does_not_win():
    far = (0.50, 0.42, 0.34, 0.30, 0.28, 0.15)
    assert choose_step(STEPS, far, COLLAPSE).step == 200


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.05, 1.0), min_size=2, max_size=8),
    st.lists(st.floats(0.05, 1.0), min_size=8, max_size=8),
    st.floats(0.01, 100),
    st.floats(0.01, 100),
)
def test_units_do_not_matter_and_worse_steps_after_the_end_neither(far, wide, a, b):
    wide, steps = wide[: len(far)], list(range(len(far)))
    choice = choose_step(steps, far, wide)
    scaled = choose_step(steps, [a * x for x in far], [b * x for x in wide])
    np.testing.assert_allclose(scaled.score, a * choice.score, atol=1e-9 * a)
    longer = choose_step([*steps, len(steps)], [*far, far[0]], [*wide, wide[0]])
    assert longer.step == choice.step
    # never a step that is beaten in both by an earlier one, beyond the tolerance
    assert choice.step == 0 or choice.gain[choice.step] > 0


def test_a_simulated_run_stops_between_too_little_and_too_much():
    # domain = one direction, content = the others; the run first moves into the domain, then onto the one image
    generator = np.random.default_rng(0)
    target = generator.normal(size=32)
    crops = target + 0.3 * generator.normal(size=(40, 32)) + 4 * np.eye(32)[0]
    content = generator.normal(size=(200, 32))
    far, wide, far_error, wide_error = [], [], [], []
    for style, copied in [(0, 0), (0.5, 0), (1, 0.05), (1, 0.5), (1, 0.9), (1, 1)]:
        rows = (1 - copied) * content + copied * crops[np.arange(200) % 40]
        rows = rows + 4 * (style - copied) * np.eye(32)[0]
        far.append(alignment(rows, crops).mean)
        wide.append(pairwise_diversity(rows))
        far_error.append(standard_error(lambda x: alignment(x, crops).mean, rows))
        wide_error.append(standard_error(pairwise_diversity, rows))
    choice = choose_step(
        STEPS, far, wide, alignment_error=far_error, diversity_error=wide_error, repeated=pairwise_diversity(crops)
    )
    assert choice.step == 200


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (((100, 200), (0.5, 0.4), (0.5, 0.4)), "ascend from 0"),
        (((0, 200, 100), (0.5,) * 3, (0.5,) * 3), "ascend from 0"),
        (((), (), ()), "ascend from 0"),
        (((0, 100), (0.5,), (0.5, 0.4)), "alignment"),
        (((0, 100), (0.5, 0.4), (0.5, float("nan"))), "diversity"),
        (((0, 100), (0.0, 0.4), (0.5, 0.4)), "no distance"),
        (((0, 100), (0.5, 0.4), (0.5, 0.4), (1.0,)), "coverage"),
    ],
)
def test_curves_that_do_not_fit_are_refused(arguments, word):
    with pytest.raises(UserError, match=word):
        choose_step(*arguments)
