"""Time and memory of heads, distillation and rankings, compared with their naive forms."""
