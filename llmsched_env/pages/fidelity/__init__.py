"""The page docs/fidelity.md: every part of the simulator measured against data that are not ours."""
