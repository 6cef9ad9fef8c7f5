"""Answers that a model draws while it trains, and what they are worth."""
