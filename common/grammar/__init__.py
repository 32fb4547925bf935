"""What the text of an answer must look like: grammars, on their way from a client to a mask over tokens.

    router    examines a client's grammar in a process of its own (`examiner`), before any work starts
    worker    compiles it against the model's tokens (`common.engine.grammar`) and masks every draw with it

Both compile with `compiling`, under the same limits, so what the one lets pass the other can do.
"""
