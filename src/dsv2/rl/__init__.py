<<<<<<< HEAD
"""Alignment after fine-tuning (section 4.2): rewards, preferences, reinforcement learning."""
=======
"""Reinforcement learning and preferences: rollouts, rewards, the objectives of GRPO and its kin, reward models, DPO."""
>>>>>>> i6-me
