"""Reinforcement learning and preferences: rollouts, rewards, the objectives of GRPO and its kin, reward models, DPO."""
