"""Learned policies: the two that ship (``llmsched_agents.checkpoint.load_checkpoint("generalist")``), and what trains them.

``llmsched_agents.sb3_vec.SB3VecEnv`` presents the vector environment to stable-baselines3 (extra ``agents``);
``llmsched_agents.lookup`` builds any policy that a person names.
"""
