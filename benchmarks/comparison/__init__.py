"""The parts of `benchmarks.peers`: other servers, installed and started; the same loads put on all; what may be said of it."""
