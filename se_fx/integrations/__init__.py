"""Trainers of others: a callback for Lightning, an algorithm for Composer. Each is imported by itself, with its trainer."""
