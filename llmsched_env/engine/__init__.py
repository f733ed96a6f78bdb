"""The fast simulator."""
