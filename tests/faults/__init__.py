"""Runs that are killed, starved and fed rubbish: what must hold afterwards."""
