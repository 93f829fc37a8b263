"""Published formulas as they read: the yardsticks of benches and the oracles of tests."""
