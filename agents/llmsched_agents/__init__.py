"""What trains policies. ``llmsched_agents.sb3_vec.SB3VecEnv`` presents the vector environment to stable-baselines3 (extra ``agents``).

No learned policy ships in this version: train with SB3 through the adapter, or with any Gymnasium library on ``LLMSched-v0``.
"""
