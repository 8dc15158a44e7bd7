"""Several GPUs, a process each: `accelerate launch examples/multi_gpu.py`, or `torchrun --nproc_per_node 2 ...`.

`python examples/multi_gpu.py` uses one GPU, whatever their number. (TRL's documentation says all of them, by
`DataParallel`, which would cut batches between documents.) Under DDP gradient checkpointing must be the kind that does
not re-enter.
"""

import torch
from accelerate import PartialState
from datasets import load_dataset
from transformers import AutoModelForCausalLM

from tunesmith import SFTConfig, SFTTrainer

# the whole model on this process's own device; without a GPU there is nothing to choose
device_string = PartialState().process_index if torch.cuda.is_available() else "cpu"

model = AutoModelForCausalLM.from_pretrained(
    "facebook/opt-350m",
    device_map={"": device_string},
)

training_args = SFTConfig(
    output_dir="/tmp",
    gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False},
)

trainer = SFTTrainer(
    model,
    train_dataset=load_dataset("stanfordnlp/imdb", split="train"),
    args=training_args,
)
trainer.train()
