"""SmolLM2-135M in 4 bits (NF4), LoRA r16 on all linear layers, Alpaca rows, 8 a step, on this CPU: ours, TRL two ways.

    python -m benchmarks.cpu_qlora MODEL_FOLDER alpaca_en_demo.json --rounds 3

TRL as installed by `pip install tunesmith[bench,quant]`: its defaults, and packed in bfloat16 without checkpointing.
Every side multiplies in bfloat16. The plain loop says what losses and norms should be. Nothing else may run.
"""

from benchmarks.pairs import main

SIDES = ("tunesmith", "trl", "trl_tuned_bf16", "plain")

if __name__ == "__main__":
    main("cpu_qlora", __doc__, "qlora", SIDES)
