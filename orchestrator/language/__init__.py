"""What people read in their language: English is written, and translated where it is printed.

catalogue  start here: an English text -> the same in Japanese, by a gettext catalogue
choice     which language: --lang, else the environment
help       help pages and mistakes of the command line, in cells of a terminal
"""
