"""The page docs/reproduction.md: the results of arXiv 2504.11320 from this project's engine and policies."""
