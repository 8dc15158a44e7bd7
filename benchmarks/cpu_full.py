"""SmolLM2-135M trained whole, Alpaca rows, 8 a step, on this CPU: ours, TRL three ways, a plain loop.

    python -m benchmarks.cpu_full MODEL_FOLDER alpaca_en_demo.json --rounds 5

TRL as installed by `pip install tunesmith[bench]`: its defaults; in float32 without checkpointing; and tuned, which is
packed, in float32 and in bfloat16. Nothing else may run on the machine.
"""

from benchmarks.pairs import main

SIDES = ("tunesmith", "tunesmith_fp32", "trl", "trl_fp32", "trl_tuned", "trl_tuned_bf16", "plain")

if __name__ == "__main__":
    main("cpu_full", __doc__, "full", SIDES)
