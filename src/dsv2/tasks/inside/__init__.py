"""What runs in the confined process itself. Standard library only, and little of it: each import costs every program a millisecond."""
