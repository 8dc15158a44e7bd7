"""A name becomes a model that trains, or one that answers.

name ─ open ─► where its weights and adapters lie ─ load ─► weights ─ chain ─► adapters merged ─ adapt ─► what trains

    load      quantize (4 and 8 bits), rope (longer positions), chat_format (new tokens)
    adapt     lora, full, freeze; norms (held in float32), value_head (a reward model's)
    run       capabilities (what the model does exactly and the machine does fast) ─► attention (documents kept apart)
"""
