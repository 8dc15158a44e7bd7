"""Rows become token ids and labels.

row ─ load ─► row ─ normalize ─► Example ─ render ─► Rendered ─ tokenize ─► {input_ids, labels} ─ pack ─► longer

    a run     collect: registry (names → sources) ─► sources (load, normalize) ─► hold out ─► mix
              stream: the same while training reads
    encode    render (templates, spans) ─► tokenize ─► lengths (turn_limits); in threads or processes (parallel)
    beside    pairs (two answers to a prompt), cache (tokens kept by content), report (what became of every row)
"""

IGNORE_INDEX = -100
"""Label of a token that the loss does not cover."""
