"""Writes answers alone in a test, or as one of several processes under torchrun; see `test_generation`."""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.tiny import make_byte_tokenizer, make_tiny_model
from tests.train.rows import make_trainer, token_rows
from tunesmith.evaluate.generate import generate_ids, generation_config
from tunesmith.evaluate.predict import predict
from tunesmith.ranks import rank_and_world

ROWS = (9, 4, 14, 6, 11)  # not to be shared out evenly
SHORT = {"max_new_tokens": 6, "generation_batch_size": 2}


def trained(folder: Path, **options) -> dict:
    """Losses of a short run whose evaluations write answers, and the predictions of the trained model."""
    trainer = make_trainer(
        make_tiny_model(),
        make_byte_tokenizer(),
        token_rows(),
        folder,
        eval_dataset=options.pop("eval_dataset", token_rows(ROWS)),
        predict_with_generate=True,
        generation_max_length=6,
        per_device_train_batch_size=4 // rank_and_world()[1],
        per_device_eval_batch_size=2,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        **options,
    )
    seen: list[list[str]] = []
    trainer.text_metric = lambda predictions, references: seen.append([*predictions, *references]) or {"mine": 1.0}
    trainer.train()
    results = trainer.predict(token_rows(ROWS))
    trainer.save_predictions(results)
    losses = [line[key] for line in trainer.state.log_history for key in ("loss", "eval_loss") if key in line]
    return {"seen": seen, "losses": losses, "predictions": results.predictions.tolist()}


def predicted(path: Path) -> dict:
    """Figures of `evaluate.predict.predict`, without those of the clock."""
    examples = [{"prompt": "a" * length, "completion": str(length)} for length in ROWS]
    figures = predict(
        make_tiny_model(),
        make_byte_tokenizer(),
        examples,
        path,
        decoding={**SHORT, "do_sample": True},
        metric="token_f1",
    )
    return {"samples": figures["predict_samples"], "token_f1": figures["token_f1"]}


def sharded() -> dict:
    """Answers of a model of which each process holds a part, with a batch fewer on one of them."""
    model = make_tiny_model()
    if torch.distributed.is_initialized():
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    prompts = {number: [97] * length for number, length in enumerate(ROWS)}
    config = generation_config({"max_new_tokens": 6}, [], 258)
    return {str(n): ids for n, ids in generate_ids(model, prompts, config, batch_size=2, share=rank_and_world())}


def everything(folder: Path) -> dict:
    streamed = token_rows(ROWS).to_iterable_dataset()
    return {
        "trained": trained(folder / "trained"),
        "streamed": trained(folder / "streamed", eval_dataset=streamed),
        "predicted": predicted(folder / "predicted.jsonl"),
        "sharded": sharded(),
    }


def main(folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = everything(Path(folder))
    (Path(folder) / f"rank{rank_and_world()[0]}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
