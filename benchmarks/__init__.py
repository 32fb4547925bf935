"""Programs that measure pdserve, and the log of what they measured (RESULTS.md). Not shipped, imported by no package."""
