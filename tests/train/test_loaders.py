"""How batches come to the device."""

from types import SimpleNamespace

import pytest
import torch

from tests.train.rows import token_rows
from tunesmith.train import loaders
from tunesmith.train.batching import EpochSampler, RankBatches
from tunesmith.train.collate import FlatCollator, LocatedCollator


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


def drawn(rows):
    """A collator that draws by chance."""
    return {"input_ids": torch.rand(len(rows), 2), "seen": torch.tensor([row["input_ids"][0] for row in rows])}


def test_workers_that_live_on_draw_anew_in_every_epoch():
    """As new ones do, or a resumed run would differ."""
    args = SimpleNamespace(
        device=torch.device("cpu"), dataloader_pin_memory=False, dataloader_num_workers=1, process_index=0,
        dataloader_persistent_workers=True, dataloader_prefetch_factor=None,
    )  # fmt: skip

    def epochs(*numbers):
        sampler = EpochSampler(6, seed=3)
        collate = LocatedCollator(drawn, 3, sampler)
        made = loaders.loader(token_rows(), RankBatches(sampler, 2), collate, args)
        for number in numbers:
            made.set_epoch(number)
            yield torch.cat([batch["input_ids"] for batch in made])

    first, second = epochs(0, 1)
    (again,) = epochs(1)
    assert torch.equal(second, again)
    assert not torch.equal(first, second)
