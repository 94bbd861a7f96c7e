"""From a job file to what the user wants.

paths.py    start here: the one door for paths that a person named: exists, kind, readable
document.py the YAML of a job file as plain values with their lines; `--set`
secrets.py  secrets by name: which a job needs, their values, and where one that is written out is refused
"""
