"""Answers of a given form: what a client asks for (`wanted`), and whether it can be had (`examination`)."""
