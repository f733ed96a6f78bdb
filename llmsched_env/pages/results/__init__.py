"""The page docs/results.md: baselines and agents on the suite ``bench-v2``."""
