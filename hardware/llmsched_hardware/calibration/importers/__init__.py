"""Readers of raw profiles: one module a format, each with ``import_profile(source, model, name, *, config, tensor_parallel)``."""
