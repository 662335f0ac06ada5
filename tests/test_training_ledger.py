"""The ledger: what a checkpoint carries, what a resumed run takes up, what summary.json says."""

from types import SimpleNamespace

import pytest
import torch

from training_ledger import Ledger, StepMeter, SummedPower, energy_counter, nvml_counter


def ledger(**changes):
    return Ledger(tokens_per_step=100, flops_per_token=6.0, stream_hash="start", **changes)


def evaluation(step, loss):
    return {"kind": "eval", "step": step, "val_loss": loss, "bits_per_byte": None if loss is None else loss / 2}


def test_tokens_and_flops_follow_from_the_steps():
    counters = ledger(step=7)
    assert counters.tokens_processed == 700 and counters.flops == 4200.0


def test_a_restored_ledger_goes_on_where_it_was():
    old = ledger(step=4, tokens_supervised=390, train_seconds=2.5, eval_seconds=0.5, non_finite_steps=1)
    old.stream_hash = "later"
    rows = [
        {"kind": "train", "step": 1, "tokens_per_second": 1.0},  # the first step warms up
        {"kind": "train", "step": 2, "tokens_per_second": 50.0},
        evaluation(2, 3.0),
        {"kind": "train", "step": 4, "tokens_per_second": 70.0},
    ]
    new = ledger()
    new.restore(old.state(), rows)
    assert new.state() == old.state() and new.step == 4 and new.stream_hash == "later"
    assert new.evaluations == [rows[2]] and new.speeds == [50.0, 70.0]
    assert {*old.state()} == {*Ledger.SAVED}


def test_rows_after_the_checkpoint_are_not_taken_up():
    new = ledger()
    new.restore(ledger(step=2).state(), [evaluation(2, 3.0), evaluation(4, 2.0),
                                         {"kind": "train", "step": 4, "tokens_per_second": 70.0}])  # fmt: skip
    assert [row["step"] for row in new.evaluations] == [2] and new.speeds == []


def test_best_is_the_lowest_finite_loss():
    counters = ledger()
    assert counters.best() == {}
    counters.evaluations = [evaluation(1, float("nan")), evaluation(2, 3.0), evaluation(3, 2.0), evaluation(4, None)]
    assert counters.best()["step"] == 3
    assert counters.best(among={1, 2})["step"] == 2 and counters.best(among={4}) == {}
    assert counters.evaluated_at(4) and not counters.evaluated_at(5)


def test_summary():
    counters = ledger(step=5, train_seconds=9.0, speeds=[10.0, 90.0, 30.0], status="finished")
    counters.evaluations = [evaluation(2, 2.0), evaluation(5, 2.5)]
    summary = counters.summary()
    expected = {
        "status": "finished", "steps": 5, "final_val_loss": 2.5, "best_val_loss": 2.0, "best_step": 2,
        "bits_per_byte": 1.25, "tokens_processed": 500, "total_flops": 3000.0, "tokens_per_second": 30.0,
        "stream_hash": "start",
    }  # fmt: skip
    assert {name: summary[name] for name in expected} == expected
    assert ledger().summary()["final_val_loss"] is None and ledger().summary()["tokens_per_second"] is None


@pytest.mark.parametrize("counter", ["evaluations", "speeds"])
def test_two_ledgers_share_no_list(counter):
    getattr(ledger(), counter).append({})
    assert getattr(ledger(), counter) == []


# ---- joules ----------------------------------------------------------------------------------------------------------


def counter_of(*readings):
    """A device whose counter says these, one after another."""
    left = list(readings)
    return lambda: left.pop(0)


def test_joules_between_start_and_stop_count_and_no_others():
    # asked once at first, then start, stop, start, stop, and once when they are taken
    meter = StepMeter(torch.device("cpu"), counter_of(5.0, 10.0, 13.0, 100.0, 104.5, 104.5))
    for _ in range(2):
        meter.start()
        assert meter.stop() >= 0
    assert meter.take_joules() == 7.5 and meter.joules == 0.0


@pytest.mark.parametrize("readings", [
    (None, None, None, None), (5.0, 10.0, None, 12.0), (None, 10.0, 12.0, 14.0),
])  # fmt: skip
def test_steps_that_were_not_told_make_the_joules_unknown(readings):
    meter = StepMeter(torch.device("cpu"), counter_of(*readings))
    meter.start()
    meter.stop()
    assert meter.take_joules() is None


def test_the_ledger_adds_up_all_ranks_until_one_does_not_tell():
    counters = ledger()
    counters.add_joules([1.0, 2.0])
    counters.add_joules([0.5, 0.5])
    assert (
        counters.train_joules == counters.at_evaluation()["train_joules"] == counters.summary()["train_joules"] == 4.0
    )
    again = ledger()
    again.restore(counters.state(), [])
    assert again.train_joules == 4.0
    counters.add_joules([1.0, None])
    assert counters.train_joules is None
    counters.add_joules([1.0, 1.0])
    assert counters.train_joules is None  # a part of it is no total


def test_a_checkpoint_from_before_joules_were_kept_leaves_them_unknown():
    state = ledger().state()
    del state["train_joules"]
    new = ledger()
    new.restore(state, [])
    assert new.train_joules is None


class NVMLError(Exception):
    pass


def board(total=None, watts=None):
    """NVML as pynvml has it, for a device with a total counter (mJ), with a power sensor (mW), or with neither."""

    def told(value):
        if value is None:
            raise NVMLError
        return value

    return SimpleNamespace(
        NVMLError=NVMLError, nvmlDeviceGetTotalEnergyConsumption=lambda _: told(total and total.pop(0)),
        nvmlDeviceGetPowerUsage=lambda _: told(watts),
    )  # fmt: skip


def test_nvml_counts_in_millijoules_and_may_fall_silent():
    read = nvml_counter(board(total=[1000, 2000, 3500, None]), None)  # the first asks whether there is a counter
    assert [read(), read(), read()] == [2.0, 3.5, None]


def test_without_a_total_the_power_is_summed_over_time():
    assert nvml_counter(board(watts=250_000), None)() == 0.0
    summed = SummedPower(counter_of(100.0, 200.0, 200.0), clock=counter_of(0.0, 2.0, 3.0))
    assert [summed(), summed(), summed()] == [0.0, 300.0, 500.0]
    with pytest.raises(NVMLError):
        nvml_counter(board(), None)


def test_a_processor_tells_nothing():
    assert energy_counter(torch.device("cpu"))() is None
