"""Other engines behind the `Backend` protocol; loaded by name through ``make_backend`` only."""
