"""Benchmarks of operations, towers and exports; the GPU campaign; studies, costs and naive forms."""
