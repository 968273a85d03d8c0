"""A model over many ranks: the cluster planner, arithmetic about layouts that need no cluster. Without torch."""
