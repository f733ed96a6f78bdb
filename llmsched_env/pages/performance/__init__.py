"""The page docs/performance.md: how fast the simulator is, each figure beside its yardstick."""
