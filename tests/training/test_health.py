from __future__ import annotations

from dde_ds.training.health import HealthMonitor, find_problems


def row(chosen=0.0, rejected=0.0, learnt=0.0, wrong=0.0):
    return {
        "drift/chosen": chosen,
        "drift/rejected": rejected,
        "error/reference_chosen": 0.1,
        "error/reference_rejected": 0.1,
        "rewards/accuracies": 0.98,
        "dde/saturated_learnt": learnt,
        "dde/saturated_wrong": wrong,
    }


def test_both_errors_blow_up_while_accuracy_rises():
    (message,) = find_problems(row(chosen=0.03, rejected=0.2)).values()
    assert "winners' error is 30% above the reference's (losers' 200%) at accuracy 0.98" in message
    assert "optimizer.learning_rate" in message


def test_a_healthy_run_is_left_in_peace():
    assert not find_problems(row(chosen=0.004, rejected=0.03, learnt=0.2, wrong=0.1))
    assert not find_problems(row(chosen=-0.01, rejected=0.05))


def test_one_tenth_of_the_timesteps_that_the_mean_hides():
    """Errors are small where the noise is strong: twice as large there, they hardly move the mean over all."""
    tenths = {"drift_by_t/300-399": 0.05, "drift_by_t/900-999": 1.0}
    (message,) = find_problems(row(chosen=0.004, rejected=0.03) | tenths).values()
    assert "winners' error is 100% above the reference's at timesteps 900-999" in message
    assert not find_problems(row(chosen=0.004, rejected=0.03) | {"drift_by_t/900-999": 0.127})


def test_a_path_far_from_the_reference():
    """At winners' errors that look well: the policy moved along them."""
    (message,) = find_problems(row(chosen=0.004) | {"drift/path_kl": 300.0, "error/reference_path": 1000.0}).values()
    assert "path KL from the reference is 300 nats, 30% of what the reference's own errors come to" in message
    assert not find_problems(row(chosen=0.004) | {"drift/path_kl": 100.0, "error/reference_path": 1000.0})


def test_the_two_ends_of_saturation_are_told_apart():
    (message,) = find_problems(row(learnt=0.8)).values()
    assert message.startswith("80% of the pairs are learnt")
    assert "objective.beta" in message
    (message,) = find_problems(row(wrong=0.4)).values()
    assert message.startswith("40% of the pairs are far on the wrong side")
    assert "optimizer.learning_rate" in message


def test_sft_has_no_reference():
    assert not find_problems({"loss": 0.1, "error/policy_chosen": 0.1})


def test_each_concern_is_said_once_until_it_has_gone():
    watch = HealthMonitor()
    assert not watch(row())
    said = [watch(row(chosen=0.04)) for _ in range(20)]
    assert sum(map(len, said)) == 1
    assert not said[0], "one noisy row is no concern yet"
    for _ in range(40):
        assert not watch(row())
    assert sum(len(watch(row(chosen=0.05))) for _ in range(20)) == 1
