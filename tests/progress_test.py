"""Speed and waiting in the lines of a run."""

from types import SimpleNamespace

import pytest

from moss_tok.objectives.config import build_objective, configure
from moss_tok.training import progress

OBJECTIVE = SimpleNamespace(progress=lambda values: "")


@pytest.mark.parametrize("stage", ["pretrain", "adversarial"])
def test_a_run_says_what_to_look_for(stage):
    config = configure(model="tiny", stage=stage, waveform_weight=20.0)
    signs = build_objective(config).good_signs()
    assert "waveform falls below 0.8 (1 is silence)" in signs
    assert "perplexity rises above 614 of 1024 codes" in signs
    assert ("discriminator" in signs) == (stage == "adversarial")


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock.now)
    return clock


@pytest.mark.parametrize(("waited", "said"), [(3.0, "30% of the time waiting for data"), (0.5, "")])
def test_waiting_for_data_is_a_share_of_training_time(clock, waited, said):
    rates = progress.Rates(step=4)
    clock.now += 15
    rates.leave_out(5)  # an evaluation
    rates.add_wait(waited)
    values = rates.since_last(9, batch_seconds=8)
    assert values["steps_per_second"] == pytest.approx(0.5)
    assert values["audio_seconds_per_second"] == pytest.approx(4)
    assert values["data_wait_share"] == pytest.approx(waited / 10)
    assert progress.line(9, 69, values, OBJECTIVE).startswith("step 9/69 all updates skipped ")
    text = progress.line(9, 69, {"loss": 1.0} | values, OBJECTIVE)
    assert text.startswith("step 9/69 loss 1.000 4 s of audio per s, 2.0 min left")
    assert text.endswith(said)
    assert ("waiting" in text) == bool(said)
    clock.now += 1
    assert rates.since_last(10, 8)["data_wait_share"] == 0
