"""Real engines behind the `Backend` protocol. Empty in this version: ``sim`` is the only backend."""
