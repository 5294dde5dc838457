"""--report-to: what a tracker gets, and which trackers are refused."""

import pytest

from sparsemem import finetune
from sparsemem.training.options import check_trackers

RECORDS = [{"prompt": "What is the capital of Velmora?", "completion": "Tarsipol"}]


def test_tensorboard_gets_the_loss_of_every_step(tiny_llama, tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    finetune(tiny_llama(), RECORDS, "full", tokenizer=tokenizer, max_steps=3, report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("paper", "report_to='paper' is unknown; allowed are"),
        ("wandb", "run `pip install wandb`"),
    ],
)
def test_trackers_that_are_not_there(name, message, monkeypatch):
    monkeypatch.setattr("sparsemem.training.options.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        check_trackers([name])
