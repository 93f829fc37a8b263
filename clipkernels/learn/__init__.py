"""Small trained modules beside a frozen CLIP: few-shot heads, patch ranking, distillation."""
