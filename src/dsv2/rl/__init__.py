"""Alignment after fine-tuning (section 4.2): rewards, preferences, reinforcement learning."""
