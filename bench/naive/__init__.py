"""Published formulas, transcribed literally: baselines of benchmarks and oracles of tests."""
