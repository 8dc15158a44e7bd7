"""Rows become token ids and labels: load ─► normalize ─► render ─► tokenize ─► pack."""
