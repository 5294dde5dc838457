"""The medical recipe on a tiny random model: every method runs and has every figure."""

import pytest

from sparsemem.compare.compare import compare
from sparsemem.compare.recipes.arms import ARMS
from sparsemem.compare.recipes.medical import (
    METHODS,
    ArmSettings,
    MedicalSettings,
    method_settings,
    num_steps,
    recipe,
)
from sparsemem.compare.recipes.rivals import RIVALS

SETTINGS = MedicalSettings(
    num_train=16,
    num_test=4,
    max_steps=2,
    memory_steps=3,
    batch_size=4,
    arms=ArmSettings(stage1_steps=2, stage1_batch_size=2, stage1_tokens=600),
    max_new_tokens=2,
    prose_tokens=200,
    background_tokens=200,
    piece_tokens=64,
)
CHOSEN = ("base", "smf", "smf-own", "additive-kl", "lora-long")


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_words):
    out = tmp_path_factory.mktemp("medical")
    made = compare(recipe(model=str(tiny_words), settings=SETTINGS), out=out, methods=CHOSEN, seeds=[0])
    return {**made, "out": out}


@pytest.mark.slow
def test_every_method_has_every_figure(results):
    rows = {row["method"]: row for row in results["rows"]}
    assert set(rows) == set(CHOSEN)
    for method, row in rows.items():
        for key in ("chapters", "capitals", "perplexity", "drift", "seconds", "steps", "samples"):
            assert isinstance(row[key], int | float), (method, key)
    assert rows["additive-kl"]["steps"] == 2
    assert rows["lora-long"]["steps"] == rows["smf"]["steps"] == 3
    assert rows["lora-long"]["samples"] == 12
    assert rows["base"]["samples"] == 0


@pytest.mark.slow
def test_an_arm_leaves_its_retrofit_for_the_others(results):
    made = sorted(path.name for path in (results["out"] / "stage1").iterdir() if path.is_dir())
    assert made == ["dense-additive"]


def test_settings_of_one_method_do_not_reach_another():
    changed = MedicalSettings(arms=ArmSettings(lr=1.0))
    for method in METHODS:
        same = method_settings(MedicalSettings(), method) == method_settings(changed, method)
        assert same == (method not in ARMS), method
    assert num_steps(SETTINGS, "full-long") == 3
    assert set(RIVALS) < set(METHODS)
