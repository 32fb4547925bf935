"""Generated from `proto/` by `make proto`; never edited by hand. `tests/test_wire_is_fresh.py` compares."""
