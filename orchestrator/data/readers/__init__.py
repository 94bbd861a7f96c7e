"""Open files -> rows.

text.py reads JSON lines, JSON and csv, columnar.py parquet, Arrow and hub data sets, encoding.py says what a file that
is no UTF-8 text is.  Start at ../files.py, which opens a file and picks its reader.
"""
