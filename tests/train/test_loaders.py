"""How batches come to the device."""

from types import SimpleNamespace

import pytest
import torch

from tests.train.rows import token_rows
from tunesmith.train import loaders
from tunesmith.train.collate import FlatCollator


@pytest.mark.parametrize(
    ("device", "pinned", "waits"), [("cuda", True, False), ("cuda", False, True), ("cpu", True, True)]
)
def test_copies_from_pinned_memory_do_not_wait_for_the_device(monkeypatch, device, pinned, waits):
    """One that waits leaves the device idle while the next batch is collated."""
    seen = {}
    monkeypatch.setattr(loaders, "prepare_data_loader", lambda made, *_, **options: seen.update(options, made=made))
    args = SimpleNamespace(
        device=torch.device(device), dataloader_pin_memory=pinned, dataloader_num_workers=0, process_index=0,
        dataloader_persistent_workers=False, dataloader_prefetch_factor=None,
    )  # fmt: skip
    loaders.loader(token_rows(), [[0, 1]], FlatCollator(), args)
    assert seen["non_blocking"] is not waits
    assert seen["made"].pin_memory is not waits
    assert seen["put_on_device"]
