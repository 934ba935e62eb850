"""Measurements: one script per claim, results as JSON, and the bars they are held against."""
