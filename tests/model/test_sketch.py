"""A model without values has the parameters that a loaded one would, of the same types, and the same ones train."""

import pytest

from tests.model.folders import for_training, save_adapter, save_base
from tunesmith.config import ModelFields
from tunesmith.errors import ModelError
from tunesmith.model.sketch import sketch


def sketched(**options):
    return sketch(ModelFields(**options), use_cpu=True)


def parameters(model):
    return {name: (tuple(one.shape), one.dtype, one.requires_grad) for name, one in model.named_parameters()}


@pytest.fixture
def base(tmp_path, tiny_model, byte_tokenizer):
    return save_base(tmp_path / "base", tiny_model, byte_tokenizer)


@pytest.mark.parametrize(
    "options",
    [{"adapter": "full"}, {"adapter": "freeze", "freeze_trainable_layers": 1}, {"lora_r": 4}, {"dtype": "bfloat16"}],
    ids=["full", "freeze", "lora", "half precision"],
)
def test_a_sketch_has_the_parameters_of_the_loaded_model(base, options):
    found = sketched(model_name_or_path=base, **options)
    assert all(one.is_meta for one in found.parameters())
    assert parameters(found) == parameters(for_training(model_name_or_path=base, **options))


def test_an_adapter_that_goes_on_is_sketched_with_its_own_rank(base, tmp_path):
    folder = save_adapter(tmp_path / "adapter", base, r=3)
    options = {"model_name_or_path": base, "checkpoint_dir": folder, "resume_lora_training": True}
    assert parameters(sketched(**options)) == parameters(for_training(**options))


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_few_bits_are_counted_as_bitsandbytes_holds_them(base, bits):
    pytest.importorskip("bitsandbytes")
    options = {"model_name_or_path": base, bits: True, "lora_r": 4}
    told, loaded = (dict(make(**options).named_parameters()) for make in (sketched, for_training))
    assert {name: one.nbytes for name, one in told.items()} == {name: one.nbytes for name, one in loaded.items()}


def test_a_base_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        sketched(model_name_or_path=str(tmp_path / "missing" / "model"))
