"""Read, unpack, run and show what comes from outside without trusting it.

reading   start here: reading what comes from outside
archives  unpacking a tar that another person or program made
cache     the user's cache folder
commands  run a program that may hang
locking   a lock on a file, on every system
writing   a file that is there whole or not at all
masking   passwords and tokens in URLs, masked wherever a text is shown, sent or written down again
"""
