"""Questions and how to score them, for evaluation and for reward: confined execution of code, answers in text. Without torch."""
