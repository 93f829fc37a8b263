"""Small modules trained on a frozen CLIP: few-shot heads, patch ranking, distillation."""
