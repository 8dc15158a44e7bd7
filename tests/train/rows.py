"""Token rows for the trainer's tests: a few documents of unequal length, prompts not trained."""

import datasets
import torch

from tunesmith.data import IGNORE_INDEX
from tunesmith.train.options import SFTConfig
from tunesmith.train.sft import SFTTrainer

LENGTHS = (9, 4, 14, 6, 11, 5, 8, 17)


def token_rows(lengths=LENGTHS, seed=0, weights=False, prefix=0) -> datasets.Dataset:
    """Random ids behind `prefix` that all have in common; the first third of each document is prompt, too.

    With `weights`, tokens count 0.5, 1.5, 0.5, ...
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        own = torch.randint(0, 256, (length,), generator=generator).tolist()
        ids = list(range(1, prefix + 1)) + own
        prompt = prefix + max(1, length // 3)
        row = {"input_ids": ids, "labels": [IGNORE_INDEX] * prompt + ids[prompt:]}
        if weights:
            row["weights"] = [0.5 + (index % 2) for index in range(len(ids))]
        rows.append(row)
    return datasets.Dataset.from_list(rows)


def make_trainer(model, tokenizer, dataset, tmp_path, **options) -> SFTTrainer:
    """A float32 trainer on the CPU that takes the rows in their order."""
    defaults = {
        "output_dir": str(tmp_path),
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
    }
    peft_config = options.pop("peft_config", None)
    collator = options.pop("data_collator", None)
    evaluation = options.pop("eval_dataset", None)
    return SFTTrainer(
        model,
        SFTConfig(**{**defaults, **options}),
        data_collator=collator,
        train_dataset=dataset,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def first_gradients(trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first optimizer step, accumulated over its micro-batches, before the update."""
    trainer._compile()
    trainer.create_optimizer_and_scheduler(num_training_steps=1)
    batches = iter(trainer.get_train_dataloader())
    samples, items = trainer.get_batch_samples(batches, trainer.args.gradient_accumulation_steps, trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(samples)
    model = trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)  # under autocast, as `train` has it
    loss = sum(trainer.training_step(model, sample, items).item() for sample in samples)
    named = trainer.model.named_parameters()
    return loss, {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def reference_gradients(model, dataset) -> tuple[float, dict[str, torch.Tensor]]:
    """The same by a plain loop: one document at a time, full logits, `F.cross_entropy`, float32."""
    model.zero_grad()
    total, weight = torch.zeros(()), 0.0
    for row in dataset:
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        targets = torch.tensor(row["labels"])[1:]
        nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE_INDEX)
        scale = torch.tensor(row.get("weights") or [1.0] * ids.shape[1])[1:]
        total = total + (nll * scale).sum()
        weight += scale[targets != IGNORE_INDEX].sum().item()
    (total / weight).backward()
    named = model.named_parameters()
    return (total / weight).item(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same(found, expected, tolerance=1e-5):
    """Loss and every gradient agree; none is missing on either side."""
    assert abs(found[0] - expected[0]) < tolerance
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=tolerance, rtol=1e-4, msg=name)
