"""The commands of `pdserve`, one idea per file. Heavy imports happen inside a command, never at its module's top."""
