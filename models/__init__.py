"""The demo model: its corpus, training, export and evaluation."""
