"""Completion in shells: commands, options, and the names of what runs here.

    script (once, in the shell's start-up files) -> at a key press: pdserve WORDS... with a variable set -> lines of candidates

A key press must not wait for the imports of a command line, so the answer comes from a small file that describes all commands
(`command_tree`) and from the names of files that clusters leave (`names`).
"""

ASKING_SHELL = "_PDSERVE_COMPLETE"  # set by the scripts to the name of their shell; the words follow as arguments
