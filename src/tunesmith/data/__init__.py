"""Rows become token ids and labels.

row ── load ──► row ── normalize ──► Example ── render ──► Rendered ── tokenize ──► {input_ids, labels} ── pack ──► same, longer
"""
