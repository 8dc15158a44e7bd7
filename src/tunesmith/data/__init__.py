"""Rows become token ids and labels.

row ─ load ─► row ─ normalize ─► Example ─ render ─► Rendered ─ tokenize ─► {input_ids, labels} ─ pack ─► longer
"""

IGNORE_INDEX = -100
"""Label of a token that the loss does not cover."""
