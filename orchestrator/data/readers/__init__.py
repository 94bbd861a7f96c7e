"""Files and hub data sets -> rows.

sources   start here: the data keys of a job -> files and rows
cells     rows of csv files: separators, quotes, Excel's line `sep=`
columnar  rows of parquet and Arrow files and of hub data sets
corpus    rows of txt files: lines, paragraphs, or the whole
encoding  which encoding a text that is no UTF-8 is in, and such a text as UTF-8
files     rows of one data file
folders   the data files of a folder
remote    data files at addresses, fetched into the user's cache
text      rows of JSON lines and of JSON lists, one at a time, whatever the file's size
"""
