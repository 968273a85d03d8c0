"""The paper's equations one by one, slow and obvious, in plain float64 torch.

The oracle of the test suite: written from the specification alone, never from the code it judges. Every function names its equation
("P eq" = DeepSeek-V2 report, "Y" = YaRN) or its section, works on one sequence (no batch axis) and leaves the loops of the paper visible.
"""
