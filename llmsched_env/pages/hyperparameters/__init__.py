"""The page of the hyper-parameters that rl_zoo3 runs: what was tried, and what the chosen ones reach."""
