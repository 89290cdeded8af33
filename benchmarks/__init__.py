"""What one need not read to read bench.py: its options, the machine's rates, other engines, narrower measurements."""
