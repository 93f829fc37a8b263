"""What is trained: small parts beside a frozen CLIP."""
