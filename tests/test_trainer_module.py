"""`tunesmith.trainer` has what scripts import from `trl.trainer`."""

import subprocess
import sys

import pytest

import tunesmith


# trainer: D1 G5
def test_the_names_of_trl_trainer_can_be_imported():
    from tunesmith.trainer import ConstantLengthDataset, DataCollatorForCompletionOnlyLM, SFTConfig, SFTTrainer

    assert ConstantLengthDataset.__module__ == "tunesmith.train.constant_length"
    assert DataCollatorForCompletionOnlyLM.__module__ == "tunesmith.train.completion_only"
    assert (SFTConfig, SFTTrainer) == (tunesmith.SFTConfig, tunesmith.SFTTrainer)


def test_all_names_are_listed():
    import tunesmith.trainer

    assert {"ConstantLengthDataset", "SFTTrainer"} <= set(dir(tunesmith.trainer))


def test_another_name_is_refused():
    with pytest.raises(ImportError, match="cannot import name 'PPOTrainer'"):
        from tunesmith.trainer import PPOTrainer  # noqa: F401


def test_the_module_itself_imports_nothing_heavy():
    code = "import sys, tunesmith.trainer; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
