"""Comparing policies: the suite ``bench-v1``, comparisons over rates and seeds, replays, tuning, ablation and their statistics."""
