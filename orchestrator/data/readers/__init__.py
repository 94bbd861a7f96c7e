"""Files and hub data sets -> rows.

sources   start here: the data keys of a job -> files and rows
columnar  rows of parquet and Arrow files and of hub data sets
encoding  which encoding a text that is no UTF-8 is in, and the command that converts it
files     rows of one data file
folders   the data files of a folder
text      rows of JSON lines, of JSON lists and of csv files, one at a time, whatever the file's size
"""
