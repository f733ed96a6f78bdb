"""Iteration times: measured on the engine at hand, or imported from raw profiles."""
