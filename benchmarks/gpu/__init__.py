"""Parts of benchmarks/attention.py: inputs, competitors, checks, timing, memory."""
