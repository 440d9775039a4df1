"""The parts of benchmark_layers.py: what is timed, how, the check before it, and the output."""
