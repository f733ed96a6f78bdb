"""The page docs/paper-linear-model.md: the linear-model experiments of arXiv 2504.11320 over many seeds."""
