"""Time and memory of heads, distillation and rankings beside their naive forms."""
