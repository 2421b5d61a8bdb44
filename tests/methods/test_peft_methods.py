"""Methods of this package in PEFT's registry."""

import pickle

import peft
import pytest
from peft import mapping
from peft.utils.peft_types import PeftType

from loge_kernels.methods.registry import register


@pytest.fixture
def member():
    class Config(peft.LoraConfig):
        pass

    class Model(peft.LoraModel):
        prefix = "example_"

    yield register("loge_example", Config, Model), Config, Model
    for table in (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING):
        table.pop("LOGE_EXAMPLE")
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING.pop("LOGE_EXAMPLE")


def test_a_registered_method_is_a_member_like_any_other(member):
    found, config, model = member
    assert found == "LOGE_EXAMPLE"
    assert found is PeftType("LOGE_EXAMPLE") is PeftType["LOGE_EXAMPLE"] is PeftType.LOGE_EXAMPLE
    assert found in list(PeftType)
    assert pickle.loads(pickle.dumps(found)) is found
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[found] is config
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[found] is model
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING[found] == "example_"
    with pytest.raises(KeyError, match="loge_example"):  # a name is given once
        register("loge_example", config, model)
