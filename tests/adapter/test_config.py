import copy
import json
import pickle

import pytest
from peft import LoraConfig, PeftConfig, PeftType, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from sparsemem import SparseMemoryConfig
from sparsemem.adapter import _register
from sparsemem.adapter.config import SparseMemoryType
from sparsemem.adapter.model import SparseMemoryModel


def test_defaults_match_the_public_contract():
    config = SparseMemoryConfig(task_type="CAUSAL_LM")
    assert config.peft_type == "SPARSE_MEMORY"
    assert config.peft_type.value == "SPARSE_MEMORY"
    assert (config.num_keys, config.top_k, config.key_dim) == (64, 64, 64)
    assert (config.num_heads, config.write) == (16, "last")
    assert (config.mode, config.value_gate, config.scale_init) == ("additive", "none", 1.0)
    assert (config.trainable, config.init_weights) == ("values", True)
    assert config.target_modules is None
    assert config.layers_to_transform is None
    assert not config.is_prompt_learning
    # PEFT's get_model_status takes the method's name from here.
    assert str(config.peft_type).partition(".")[2] == "SPARSE_MEMORY"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_keys", 1, "num_keys=1 must be a whole number >= 2"),
        ("num_keys", 8.0, "num_keys=8.0 must be a whole number >= 2"),
        ("num_keys", True, "num_keys=True must be a whole number >= 2"),
        ("num_heads", 0, "num_heads=0 must be a whole number >= 1"),
        ("top_k", 0, "top_k=0 must be a whole number >= 1"),
        ("top_k", 4097, r"top_k=4097 must be at most num_keys \*\* 2 = 4096"),
        ("key_dim", 7, "key_dim=7 must be even"),
        ("write", "first", "write='first' must be one of 'last', 'own'"),
        ("mode", "replacement", "mode='replacement' needs write='own'"),
        ("query_norm", None, "query_norm=None must be one of True, False"),
        ("mode", "parallel", "mode='parallel' must be one of 'additive', 'replacement'"),
        ("value_gate", "gelu", "value_gate='gelu' must be one of 'none', 'silu'"),
        ("trainable", "keys", "trainable='keys' must be one of 'values', 'values.scale', 'memory'"),
        ("init_weights", "zeros", "init_weights='zeros' must be one of True, False, 'paper'"),
        ("init_weights", 1, "init_weights=1 must be one of True, False, 'paper'"),
        ("scale_init", float("nan"), "scale_init=nan must be a finite number"),
        ("scale_init", "1", "scale_init='1' must be a finite number"),
        ("layers_to_transform", [0, -1], r"layers_to_transform=\[0, -1\] must be one or more block indices"),
        ("layers_to_transform", [], r"layers_to_transform=\[\] must be one or more block indices"),
        ("layers_to_transform", "3", "layers_to_transform='3' must be one or more block indices"),
        ("layers_pattern", "layers", "`layers_to_transform` must also be specified"),
        ("task_type", "CHAT", "Invalid task type: 'CHAT'"),
    ],
)
def test_a_bad_field_is_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        SparseMemoryConfig(**{field: value})


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError, match="num_keys") as error:
        SparseMemoryConfig(num_keys=0, mode="both", scale_init=float("inf"), layers_pattern="h")
    for word in ("num_keys=0", "mode='both'", "scale_init=inf", "layers_pattern"):
        assert word in str(error.value)
    with pytest.raises(ValueError, match=r"top_k=17 .*key_dim=3 "):
        SparseMemoryConfig(num_keys=4, top_k=17, key_dim=3)


@pytest.mark.parametrize("extra", [{"layers_to_transform": [1]}, {"layers_pattern": ["h"]}])
def test_a_regular_expression_excludes_layer_indices(extra):
    with pytest.raises(ValueError, match="cannot be used when `target_modules` is a str"):
        SparseMemoryConfig(target_modules=r".*\.mlp", **extra)


@pytest.mark.parametrize("task_type", [*TaskType, None])
def test_every_task_type_is_allowed(task_type):
    assert SparseMemoryConfig(task_type=task_type).task_type == task_type


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": ["mlp", "down_proj"], "layers_to_transform": [1, 2], "layers_pattern": "layers"},
        {"target_modules": r".*\.mlp$", "exclude_modules": ["a", "b"], "modules_to_save": ["lm_head"]},
        {
            "layers_to_transform": 0,
            "num_keys": 16,
            "value_gate": "silu",
            "mode": "replacement",
            "write": "own",
        },
        {"init_weights": "paper", "trainable": "values+scale", "scale_init": 0.25, "base_fingerprint": "ab"},
    ],
)
def test_survives_json_copy_and_pickle(fields, tmp_path):
    config = SparseMemoryConfig(task_type="CAUSAL_LM", **fields)
    config.save_pretrained(str(tmp_path))
    for loaded in (
        SparseMemoryConfig.from_pretrained(str(tmp_path)),
        PeftConfig.from_pretrained(str(tmp_path)),
        PeftConfig.from_peft_type(**json.loads((tmp_path / "adapter_config.json").read_text())),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert type(loaded) is SparseMemoryConfig
        assert loaded == config
        assert isinstance(loaded.peft_type, SparseMemoryType)


def test_module_names_become_sets_as_in_peft():
    config = SparseMemoryConfig(
        target_modules=["b", "a"], exclude_modules=("c",), layers_to_transform=range(2)
    )
    assert config.target_modules == LoraConfig(target_modules=["a", "b"]).target_modules
    assert config.exclude_modules == {"c"}
    assert config.layers_to_transform == [0, 1]


def test_the_file_is_the_same_for_the_same_config(tmp_path):
    names = [f"model.layers.{i}.mlp" for i in range(9)]
    for order, folder in ((names, "a"), (names[::-1], "b")):
        SparseMemoryConfig(target_modules=order).save_pretrained(str(tmp_path / folder))
    text = (tmp_path / "a/adapter_config.json").read_text()
    assert text == (tmp_path / "b/adapter_config.json").read_text()
    assert json.loads(text)["target_modules"] == names


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    SparseMemoryConfig(num_keys=16).save_pretrained(str(tmp_path))
    before = (tmp_path / "adapter_config.json").read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        SparseMemoryConfig(num_keys=8).save_pretrained(str(tmp_path))
    assert (tmp_path / "adapter_config.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_keys_of_a_later_version_are_ignored_with_a_warning(tmp_path):
    SparseMemoryConfig(num_keys=8).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "new_field": 1}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['new_field'\]"):
        assert PeftConfig.from_pretrained(str(tmp_path)).num_keys == 8


def test_registered_with_peft():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SPARSE_MEMORY"] is SparseMemoryConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["SPARSE_MEMORY"] is SparseMemoryModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["SPARSE_MEMORY"] == "sparse_memory_"
    assert "SPARSE_MEMORY" not in list(PeftType)


def test_a_taken_name_is_refused(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, SparseMemoryType.SPARSE_MEMORY, LoraConfig)
    with pytest.raises(
        ImportError, match=r"'SPARSE_MEMORY' is already taken by peft\S*LoraConfig; uninstall"
    ):
        _register()


def test_a_model_without_decoder_blocks_asks_for_targets():
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), SparseMemoryConfig())


def test_the_saved_config_says_what_to_install(tmp_path):
    SparseMemoryConfig().save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["requires"].startswith("pip install sparsemem")
    assert SparseMemoryConfig.from_pretrained(str(tmp_path)) == SparseMemoryConfig()
