"""Rates with a clock in the hand."""

import pytest

from fmda.train.metrics import Meter, status


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run(meter, clock, steps, seconds, examples=8):
    for _ in range(steps):
        clock.now += seconds
        meter.count(examples)


def test_rate_leaves_out_the_first_two_steps_and_pauses():
    clock = Clock()
    meter = Meter(clock=clock)
    run(meter, clock, 2, 100.0)
    run(meter, clock, 4, 0.5)
    with meter.pause():
        clock.now += 1000.0
    reading = meter.read()
    assert reading == {"seconds": 1202.0, "examples_per_second": 16.0, "data_wait": 0.0}
    assert meter.seconds_left(10) == pytest.approx(5.0)


def test_each_reading_begins_anew_and_the_forecast_does_not():
    clock = Clock()
    meter = Meter(clock=clock)
    run(meter, clock, 6, 1.0)
    meter.read()
    run(meter, clock, 4, 3.0)
    assert meter.read()["examples_per_second"] == pytest.approx(8 / 3)
    assert meter.seconds_left(1) == pytest.approx((4 * 1.0 + 4 * 3.0) / 8)


def test_mfu_is_the_share_of_the_peak():
    clock = Clock()
    meter = Meter(flops_per_example=10.0, peak_flops=400.0, clock=clock)
    run(meter, clock, 6, 0.5)
    assert meter.read()["mfu"] == pytest.approx(16.0 * 10.0 / 400.0)


def test_data_wait_is_the_share_of_the_time():
    clock = Clock()
    meter = Meter(clock=clock)
    run(meter, clock, 2, 1.0)
    run(meter, clock, 4, 1.0)
    assert meter.read(waited=1.0)["data_wait"] == pytest.approx(0.25)
    run(meter, clock, 4, 1.0)
    assert meter.read(waited=3.0)["data_wait"] == pytest.approx(0.5)


def test_no_forecast_before_a_rate_is_known():
    assert Meter(clock=Clock()).seconds_left(10) is None


def test_status_line():
    reading = {"examples_per_second": 512.34, "mfu": 0.4119, "data_wait": 0.031}
    assert status("train", 120, 1000, 0.43214, reading, 123.0) == (
        "train: step 120/1000, loss 0.4321, 512.3 images/s, MFU 41.2%, data wait 3%, ETA 2:03"
    )
    assert status("train", 1, 10, None, {}, None) == "train: step 1/10"
