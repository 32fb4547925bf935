"""Answers to similar questions, given again while the share of wrong ones is shown to stay under a bound. See `lookup`."""
