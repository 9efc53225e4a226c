"""What the benchmark runs on: models with the shifted data they meet."""
