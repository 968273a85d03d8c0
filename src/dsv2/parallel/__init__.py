"""A model over many ranks: the cluster planner, arithmetic about layouts that need no cluster. Without torch.

Formulas live here and return numbers; every word that is printed is in ``plan/``. ``docs/plan.md`` shows what the commands print and is
tested line by line, so a change of a formula moves it, too.
"""
