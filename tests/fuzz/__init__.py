"""Damaged input for every verb, in one process: each ends with a message and its exit code, and nothing else.

    case.py        start here: one input, the files it needs and the command line; how it is laid out in a folder
    judge.py       runs a case and says what is wrong with how it ended
    values.py      texts, numbers, paths and bytes that break readers; mutations of values and of texts
    world.py       the sound things that cases damage: a model, rows, machines, a bank, a finished run
    kinds.py       kind -> generator: jobs, settings, hardware, rows, names
    folders.py     bank, runs: what the program wrote itself
    session.py     the process that tries them

An input is made from its seed, kind and number alone, so one command brings it back:

    python -m tests.fuzz --kind jobs --count 500            the first 500 job files of seed 0
    python -m tests.fuzz --kind jobs --only 17 --show       input 17 alone, its files and what it printed
    python -m tests.fuzz --code ../older                    the same inputs against another checkout
"""
