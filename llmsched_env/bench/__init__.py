"""Comparing policies: the suite ``bench-v2``, comparisons over rates and seeds, replays, tuning, ablation and their statistics."""
