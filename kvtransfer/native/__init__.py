"""Copies and digests pieces in one pass: C++ that is compiled on the machine it runs on.

    choice    the library for this machine: from the cache, compiled beside the service, or none, which is said once
    kernel    its C interface

Digests are the same with it and without; two workers of which one has none understand each other.
"""
