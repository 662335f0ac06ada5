"""The ledger: what a checkpoint carries, what a resumed run takes up, what summary.json says."""

import pytest

from training_ledger import Ledger


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
