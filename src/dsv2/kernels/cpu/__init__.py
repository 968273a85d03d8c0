"""The CPU kernels in C++: sources, their compilation on first use, and their interface."""
