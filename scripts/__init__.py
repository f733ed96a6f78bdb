"""Programs a person runs, from a checkout: ``python scripts/compare.py --help``."""
